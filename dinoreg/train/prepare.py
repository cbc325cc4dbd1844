"""From a config to everything a run needs. Every check that can be made before a file is written is made here."""

import copy
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from dinoreg.checkpoint.async_writer import Writer
from dinoreg.checkpoint.atomic import write_atomic
from dinoreg.config.load import BUDGETS, Config, load_config, to_yaml
from dinoreg.config.option import check
from dinoreg.config.overwrite import check_out, delete_run, refuse_live
from dinoreg.config.presets import PRESETS
from dinoreg.data import augment as photometric
from dinoreg.data.labelled import passed_over_in_words
from dinoreg.data.loader import BatchLoader, Views
from dinoreg.data.open import open_source
from dinoreg.data.preprocess import Preprocessing
from dinoreg.data.source import Source
from dinoreg.data.statistics import Survey, survey, with_statistics
from dinoreg.data.value_range import ValueRange
from dinoreg.distributed.process_group import ALONE, Ranks
from dinoreg.models.attention import resolve_backend
from dinoreg.models.vit import ARCHITECTURE, RegisterViT
from dinoreg.runtime.device import keep_freed_memory, pick_device, pick_precision
from dinoreg.runtime.errors import UserError, reworded
from dinoreg.runtime.json_files import pointed_step
from dinoreg.train.class_probe import Probe, build_general, build_probe, class_tokens_of_all
from dinoreg.train.dense_probe import DenseProbe, build_dense
from dinoreg.train.init_weights import InitialWeights, copy_init, load_init
from dinoreg.train.outlook import Outlook
from dinoreg.train.parallelize import choose_strategy
from dinoreg.train.schedules import Schedules
from dinoreg.train.state import Networks, TrainState, build_networks, build_state, model_arguments
from dinoreg.train.trackers import check_trackers
from dinoreg.train.tutor import Tutor, load_tutor, views_of

# How long a file that rank 0 wrote may take to show on another machine (NFS keeps listings for a while).
SHARED_SECONDS = 30.0

# Sections that fix the shapes of a checkpoint: a resumed run may not change them, but for what is no architecture.
SHAPING = ("model", "head")


@dataclass
class Setup:
    """A run that is ready to start; nothing has been written yet.

    out      the run folder
    dtype    of autocast
    config   as it was given, with what was measured of the data
    source   the images to train on
    deep     whether they have more than eight bits
    probe    measured on the run's own domain; general: on images that it must not forget; dense: patches. None: no such
    student, teacher  on the CPU
    init     the weights that the run starts from; None: random ones
    tutor    the frozen network to learn from, on `device`; None without `distill=`
    notes    lines for the log
    """

    config: Config
    ranks: Ranks
    out: Path
    device: torch.device
    dtype: torch.dtype
    source: Source
    deep: bool
    probe: Probe | None
    general: Probe | None
    dense: DenseProbe | None
    student: Networks
    teacher: Networks
    init: InitialWeights | None
    tutor: Tutor | None
    schedules: Schedules
    notes: list[str]

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.schedules.num_steps

    @property
    def global_batch_size(self) -> int:
        """Images a step, over all processes."""
        return self.config.batch_size * self.ranks.world_size

    @property
    def outlook(self) -> Outlook:
        """What the run is in for, without its time."""
        device = "this CPU" if self.device.type == "cpu" else f"{self.ranks.world_size} GPU(s)"
        batch, model, own = self.global_batch_size, self.config.model.name, self.config.init is not None
        return Outlook(len(self.source), batch, self.num_steps, None, device, model, own, self.ranks.world_size)

    @cached_property
    def stages(self) -> dict[int, Views]:
        """{first step: what is made of an image} of the stages of the run, in order."""
        stages, patch_size = self.config.stages(self.num_steps), self.student.backbone.patch_size
        return {first: views_of(self.config, crops, patch_size, self.tutor) for first, crops in stages.items()}

    def stage_of(self, step: int) -> tuple[Views, int]:
        """What is made of an image in the stage that `step` is in, and the step with which it ends."""
        last = max(first for first in self.stages if first <= step)
        return self.stages[last], min((first for first in self.stages if first > step), default=self.num_steps)

    def new_state(self) -> TrainState:
        """The training state at step 0, on `device` and distributed over `ranks`; see `build_state`."""
        anchor = self.init.anchor if self.init else None
        if self.config.loss.gram_weight > 0:
            anchor = copy.deepcopy(self.teacher.backbone)
        seen, where = None, (self.device, self.dtype)
        if self.config.loss.diet_weight > 0:
            backbone = self.teacher.backbone.to(self.device)
            seen = class_tokens_of_all(self.config, self.source, backbone, *where, self.ranks)
        networks, tutor = (self.student, self.teacher), self.tutor
        state = build_state(self.config, *networks, *where, anchor, self.ranks, seen=seen, tutor=tutor)
        if tutor is not None:
            state.history["distill"] = tutor.encoder.identity
        return state

    def batches(self, state: TrainState) -> BatchLoader:
        """The endless loader of the stage that `state.step` is in, starting at the sample `state.position`."""
        config = self.config
        loader = BatchLoader(
            self.source,
            self.stage_of(state.step)[0],
            config.data,
            deep=self.deep,
            batch_size=config.batch_size,
            seed=config.seed,
            device=self.device,
            position=state.position,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
        )
        loader.bad.update(state.history.get("bad", {}))
        return loader

    @property
    def preprocessing(self) -> Preprocessing:
        """What the weights of this run state of pictures: crops of the size of the global ones, seen whole."""
        config = self.config
        size, limits = config.crops.global_size, ValueRange.of(config.data.range)
        return Preprocessing(config.augment.mean, config.augment.std, (size, size), size, value_range=limits)

    def open_writer(self) -> Writer:
        """The writer of this run's checkpoints, which claims the run folder for this process group.

        raises UserError when the folder cannot be written
        """
        config = self.config
        stated = {
            "architecture": self.teacher.backbone.architecture(),
            "preprocessing": self.preprocessing.as_json(),
            "config_hash": config.hash(),
        }
        return Writer(self.out, config.checkpoint, stated, config.parallel.timeout, self.ranks)


def _of_pictures(config: Config, source: Source, seen: Survey) -> list[str]:
    """Lines on what becomes of the pictures, for the log."""
    warnings = [*seen.warnings, *passed_over_in_words(source.passed_over)]
    if seen.deep and config.data.reference_decode:
        warnings.append("data.reference_decode cuts more than eight bits off: 16-bit pictures become nearly white")
    left_out = photometric.left_out(config.augment, config.model.crop_channels)
    preset = config.augment.preset
    why = f"augment.preset={preset}: {PRESETS[preset].why}" if preset else ""
    return [*filter(None, [why, left_out]), *(f"warning: data: {line}" for line in warnings)]


def prepare(config: Config, ranks: Ranks = ALONE) -> Setup:
    """Check a config against the machine, the data and the weights; every process calls this.

    raises UserError, in one line, when the config cannot be run
    """
    if not config.out:
        raise UserError("out: expected the folder to write the run to, as out=runs/NAME")
    out, config = Path(config.out), config.as_trained()
    check_out(config, out)
    refuse_live(out, config.takeover)
    check_trackers(config.log.to)
    device, dtype = _device(config)
    data = config.data
    if data.source is None:
        raise UserError("data: expected a folder of images, a list of paths, scenes or a named dataset, as data=PATH")
    with ranks.main_first():  # the others find the index ready
        source = open_source(data.source, data.weights, data.index_dir, data.root, data.range, data.columns)
    saved = out / "config.yaml"
    before = load_config(saved) if config.resume and saved.is_file() else None
    config, measured = with_statistics(config, source, before)
    num_steps = config.num_steps(len(source), ranks.world_size)
    config = with_horizon(config, num_steps, before, out)
    changed = [] if before is None else changed_config(config, before, out)
    seen = survey(source, config.model.in_channels)
    tutor = load_tutor(config, device, dtype)
    student, teacher = build_networks(config, tutor)
    notes = [config.explain_lr(ranks.world_size), *([tutor.note] if tutor else []), *changed, *measured]
    notes += _of_pictures(config, source, seen)
    notes += _processes(config, student, ranks.world_size)
    init = load_init(config, out, student, teacher)
    schedules = Schedules(num_steps, config.peak_lr(ranks.world_size), config.schedule, config.adapt if init else None)
    if init is not None:
        notes += [init.note, config.explain_start(schedules.horizon, ranks.world_size)]
    probe, general, dense = _probes(config, source, student.backbone.patch_size)
    looking = (probe, general, None if dense is None else dense.pictures)
    notes += [f"warning: {line}" for each in looking if each is not None for line in each.notes]
    setup = Setup(
        config=config,
        ranks=ranks,
        out=out,
        device=device,
        dtype=dtype,
        source=source,
        deep=seen.deep and not data.reference_decode,
        probe=probe,
        general=general,
        dense=dense,
        student=student,
        teacher=teacher,
        init=init,
        tutor=tutor,
        schedules=schedules,
        notes=notes,
    )
    notes += _stages(setup)
    if advice := setup.outlook.advice():
        notes.append(f"advice: {advice}")
    return setup


def _probes(config: Config, source: Source, patch_size: int) -> tuple[Probe | None, Probe | None, DenseProbe | None]:
    """Those of the run's own domain, of general images, and of patches; UserError where they cannot be built."""
    probe, general = build_probe(config, source), build_general(config)
    if general is not None and probe is None:
        raise UserError(f"probe.general={config.probe.general}: probing needs at least 4 images in data=, too")
    return probe, general, build_dense(config, probe, patch_size)


def _stages(setup: Setup) -> list[str]:
    """A line on the stages of the run, or [] where it has one."""
    ends = [*setup.stages][1:]
    words = [f"{views.crops.global_size} and {views.crops.local_size} px" for views in setup.stages.values()]
    parts = [f"{size} to step {end}" for size, end in zip(words, ends)]
    return [f"crops in stages: {', '.join(parts)}, then {words[-1]}"] if ends else []


def _device(config: Config) -> tuple[torch.device, torch.dtype]:
    """The device, and the dtype of autocast; threads and allocator of this process are set for it.

    raises UserError for an attention backend that does not run there
    """
    device = pick_device(config.device)
    dtype = pick_precision(config.precision, device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    resolve_backend(config.model.attention, device, dtype=dtype)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if device.type == "cpu":
        keep_freed_memory()
    return device, dtype


def _processes(config: Config, student: Networks, world_size: int) -> list[str]:
    """A line on how several processes share the run, or []; UserError where they cannot."""
    strategy = choose_strategy(config.parallel, sum(p.numel() for p in student.parameters()), world_size)
    koleo_ranks = config.loss.koleo_ranks
    if koleo_ranks is not None and world_size % koleo_ranks:
        raise UserError(f"loss.koleo_ranks={koleo_ranks}: expected a divisor of the {world_size} processes")
    return [] if strategy == "single" else [f"{world_size} processes, {strategy}"]


def check_shared(out: Path, ranks: Ranks) -> None:
    """Check that all processes see a file that rank 0 writes to `out`; it is removed again.

    raises UserError on all processes when `out` cannot be written, or when one of them does not see the file within
    `SHARED_SECONDS`
    """
    if ranks.world_size == 1:
        return
    # A kill leaves what counts as unfinished, so that the run can be started again (`check_out`).
    path = out / f".shared-{ranks.from_main(secrets.token_hex(8))}.part"
    try:
        with ranks.collective_errors():
            if ranks.is_main:
                with reworded(f"out={out}: cannot be written", OSError):
                    out.mkdir(parents=True, exist_ok=True)
                    path.touch()
        with ranks.collective_errors():
            deadline = time.monotonic() + SHARED_SECONDS
            while not path.exists():
                if time.monotonic() > deadline:
                    raise UserError(f"out={out}: expected a folder that all machines share; rank 0's is another")
                time.sleep(0.2)
    except UserError:
        if ranks.is_main:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # not empty: it was there before
                out.rmdir()
        raise
    if ranks.is_main:
        path.unlink(missing_ok=True)


def with_horizon(config: Config, num_steps: int, before: Config | None, out: Path) -> Config:
    """A config with the horizon of a constant schedule, that of the run's first start, so that `steps` may grow.

    before  the config that the run in `out` has; None: it has not begun
    raises  UserError for a cool-down that would begin before what the run has reached
    """
    schedule, reached = config.schedule, 0
    if before is not None and not before.schedule.cooldown:
        reached = pointed_step(out, "last") or 0
    left = (
        f"at most {max(0, num_steps - reached)}, what is left of {num_steps} steps after step {reached}; or more steps="
    )
    check(schedule.cooldown <= max(0, num_steps - reached), "schedule.cooldown", schedule.cooldown, left)
    if schedule.shape == "cosine" or schedule.horizon is not None:
        return config
    first = None if before is None else before.schedule.horizon
    return replace(config, schedule=replace(schedule, horizon=first or num_steps))


def changed_config(config: Config, before: Config, out: Path) -> list[str]:
    """A one-line message when the run in `out` is resumed with other values of options that affect its weights, or [].

    before  the config that the run has
    raises UserError where init=, distill= or an option of the architecture differs from the run's config.yaml
    """
    if model_arguments(before)["ffn_ratio"] == model_arguments(config)["ffn_ratio"]:  # given, or by the name
        before = replace(before, model=replace(before.model, ffn_ratio=config.model.ffn_ratio))
    for key in ("init", "distill"):
        then, now = getattr(before, key), getattr(config, key)
        if then != now:
            started = f"without {key}=" if then is None else f"from {key}={then}"
            raise UserError(f"{key}={now}: the run in {out} was started {started}; a resumed run keeps its start")
    for section in SHAPING:
        then, now = vars(getattr(before, section)), vars(getattr(config, section))
        for key in now:
            shapes = section == "head" or key in ("name", *ARCHITECTURE)
            if shapes and then[key] != now[key]:
                kept = f"the run in {out} has {then[key]}; a resumed run keeps its architecture"
                raise UserError(f"{section}.{key}={now[key]}: {kept}")
    # The device shapes no weights but by its rounding.
    old, new = ({**each.shaping(), "device": each.device} for each in (before, config))
    if "constant" == before.schedule.shape == config.schedule.shape and not before.schedule.cooldown:
        for key in (*BUDGETS, "schedule.cooldown"):  # nothing that was computed depends on where it ends
            del old[key], new[key]
    changed = [f"{key}={new[key]} (was {old[key]})" for key in new if old[key] != new[key]]
    return [f"resumed with {', '.join(changed)}: losses differ from an unbroken run's"] if changed else []


def claim_folder(config: Config, out: Path, init: InitialWeights | None, backbone: RegisterViT) -> None:
    """Create the run folder `out` and write the resolved config and the initial weights, if any, into it.

    backbone  with the weights of `init`
    raises    UserError when the folder cannot be written, or has files that `overwrite=true` must not delete
    """
    with reworded(f"out={out}: cannot be written", OSError):
        if config.overwrite:
            delete_run(out, config.takeover)
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "config.yaml", to_yaml(config))
        if init is not None:
            copy_init(config, out, init, backbone)
