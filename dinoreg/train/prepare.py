"""From a config to everything a run needs. Every check that can be made before a file is written is made here."""

import copy
import secrets
import time
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dinoreg.checkpoint.async_writer import Writer
from dinoreg.checkpoint.atomic import write_atomic
from dinoreg.checkpoint.format import write_weights
from dinoreg.config.load import BUDGETS, Config, load_config, require_complete, to_yaml
from dinoreg.config.option import check
from dinoreg.config.overwrite import check_out, delete_run, refuse_live
from dinoreg.config.view_settings import PRESETS
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
from dinoreg.models.vit import ARCHITECTURE
from dinoreg.runtime.device import keep_freed_memory, pick_device, pick_precision
from dinoreg.runtime.digest import digest
from dinoreg.runtime.errors import UserError, reworded
from dinoreg.runtime.json_files import flatten, pointed_step
from dinoreg.train.logger import Remote, begin_trackers, check_trackers
from dinoreg.train.outlook import Outlook
from dinoreg.train.parallelize import choose_strategy
from dinoreg.train.probes import build_dense, build_general, build_probe, class_tokens_of_all, write_probed
from dinoreg.train.schedules import Schedules
from dinoreg.train.state import Networks, TrainState, build_networks, model_arguments
from dinoreg.train.tutor import load_tutor, views_of
from dinoreg.weights.load import load_into

# How long a file that rank 0 wrote may take to show on another machine (NFS keeps listings for a while).
SHARED_SECONDS = 30.0

COPY = "init.safetensors"  # of the weights of `init=`, in the run folder

# Sections that fix the shapes of a checkpoint: a resumed run may not change them, but for what is no architecture.
SHAPING = ("model", "head")


class Setup:
    """A run that is ready to start; nothing has been written yet.

    out      the run folder
    dtype    of autocast
    config   as it was given, with what was measured of the data
    source   the images to train on
    deep     whether they have more than eight bits
    probe    measured on the run's own domain; general: on images that it must not forget; dense: patches. None: no such
    student, teacher  on the CPU
    init     what `load_init` says of the weights that the run starts from; None: random ones
    tutor    the frozen network to learn from, on `device`; None without `distill=`
    notes    lines for the log
    """

    def __init__(self, config: Config, ranks: Ranks = ALONE) -> None:
        """Check a config against the machine, the data and the weights; every process calls this.

        raises UserError, in one line, when the config cannot be run
        """
        data, config = require_complete(config).data, config.as_trained()
        assert config.out
        assert data.source
        self.ranks, self.out = ranks, Path(config.out)
        check_out(config, self.out)
        refuse_live(self.out, config.takeover)
        check_trackers(config.log.to)
        self.device, self.dtype = _device(config)
        with ranks.main_first():  # the others find the index ready
            self.source = open_source(data.source, data.weights, data.index_dir, data.root, data.range, data.columns)
        saved = self.out / "config.yaml"
        before = load_config(saved) if config.resume and saved.is_file() else None
        config, measured = with_statistics(config, self.source, before)
        num_steps = config.num_steps(len(self.source), ranks.world_size)
        self.config = config = with_horizon(config, num_steps, before, self.out)
        changed = [] if before is None else changed_config(config, before, self.out)
        seen = survey(self.source, config.model.in_channels)
        self.deep = seen.deep and not data.reference_decode
        self.tutor = load_tutor(config, self.device, self.dtype)
        self.student, self.teacher = build_networks(config, self.tutor)
        self.notes = [config.explain_lr(ranks.world_size), *([self.tutor.note] if self.tutor else []), *changed]
        self.notes += [*measured, *_of_pictures(config, self.source, seen)]
        self.notes += _processes(config, self.student, ranks.world_size)
        self.init = load_init(config, self.out, self.student, self.teacher)
        adapt = config.adapt if self.init else None
        self.schedules = Schedules(num_steps, config.peak_lr(ranks.world_size), config.schedule, adapt)
        if self.init is not None:
            self.notes += [self.init[0], config.explain_start(self.schedules.horizon, ranks.world_size)]
        self.probe, self.general = build_probe(config, self.source), build_general(config)
        if self.general is not None and self.probe is None:
            raise UserError(f"probe.general={config.probe.general}: probing needs at least 4 images in data=, too")
        self.dense = build_dense(config, self.probe, self.student.backbone.patch_size)
        looking = (self.probe, self.general, self.dense.pictures if self.dense else None)
        self.notes += [f"warning: {line}" for each in looking if each is not None for line in each.notes]
        self.notes += self._stages_in_words()
        if advice := self.outlook.advice():
            self.notes.append(f"advice: {advice}")

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

    def _stages_in_words(self) -> list[str]:
        """A line on the stages of the run, or [] where it has one."""
        ends = [*self.stages][1:]
        words = [f"{views.crops.global_size} and {views.crops.local_size} px" for views in self.stages.values()]
        parts = [f"{size} to step {end}" for size, end in zip(words, ends)]
        return [f"crops in stages: {', '.join(parts)}, then {words[-1]}"] if ends else []

    def claim(self, resumes: bool) -> dict[str, Remote]:
        """Begin the trackers of the run, which are returned, then its folder: config, and a copy of `init=`'s weights.

        The copy makes the run independent of the file it came from: a resumed run rebuilds its anchor from it.

        raises  UserError when either cannot be begun, or has files that `overwrite=true` must not delete
        """
        config, out = self.config, self.out
        trackers = begin_trackers(out, resumes, config.log.to, flatten(asdict(config)))
        with reworded(f"out={out}: cannot be written", OSError):
            if config.overwrite:
                delete_run(out, config.takeover)
            out.mkdir(parents=True, exist_ok=True)
            write_atomic(out / "config.yaml", to_yaml(config))
            if self.init is not None and not _has_copy(config, out):
                backbone = self.teacher.backbone
                tensors = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
                stated = {"step": 0, "architecture": backbone.architecture(), "init": self.init[1]}
                write_weights(out / COPY, tensors, stated)
        if self.probe is not None:
            write_probed(out, self.probe, config)
        return trackers

    def new_state(self) -> TrainState:
        """The training state at step 0, on `device` and distributed over `ranks`; see `TrainState`."""
        anchor = copy.deepcopy(self.teacher.backbone) if self.config.loss.anchored else None
        seen, where = None, (self.device, self.dtype)
        if self.config.loss.diet_weight > 0:
            backbone = self.teacher.backbone.to(self.device)
            seen = class_tokens_of_all(self.config, self.source, backbone, *where, self.ranks)
        networks, tutor = (self.student, self.teacher), self.tutor
        state = TrainState(self.config, *networks, *where, anchor, self.ranks, seen=seen, tutor=tutor)
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

    def open_writer(self) -> Writer:
        """The writer of this run's checkpoints, which claims the run folder for this process group.

        raises UserError when the folder cannot be written
        """
        config, looks = self.config, self.config.augment
        size, limits = config.crops.global_size, ValueRange.of(config.data.range)  # crops are seen whole
        preprocessing = Preprocessing(looks.mean, looks.std, (size, size), size, value_range=limits).as_json()
        architecture = self.teacher.backbone.architecture()
        stated = {"architecture": architecture, "preprocessing": preprocessing, "config_hash": config.hash()}
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
    koleo_ranks, divisor = config.loss.koleo_ranks, f"a divisor of the {world_size} processes"
    check(koleo_ranks is None or world_size % koleo_ranks == 0, "loss.koleo_ranks", koleo_ranks, divisor)
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
        with ranks.main_first():
            if ranks.is_main:
                with reworded(f"out={out}: cannot be written", OSError):
                    out.mkdir(parents=True, exist_ok=True)
                    path.touch()
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
    left = max(0, num_steps - reached)
    expected = f"at most {left}, what is left of {num_steps} steps after step {reached}; or more steps="
    check(schedule.cooldown <= left, "schedule.cooldown", schedule.cooldown, expected)
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
            if (section == "head" or key in ("name", *ARCHITECTURE)) and then[key] != now[key]:
                kept = f"the run in {out} has {then[key]}; a resumed run keeps its architecture"
                raise UserError(f"{section}.{key}={now[key]}: {kept}")
    # The device shapes no weights but by its rounding.
    old, new = ({**each.shaping(), "device": each.device} for each in (before, config))
    if "constant" == before.schedule.shape == config.schedule.shape and not before.schedule.cooldown:
        for key in (*BUDGETS, "schedule.cooldown"):  # nothing that was computed depends on where it ends
            del old[key], new[key]
    changed = [f"{key}={new[key]} (was {old[key]})" for key in new if old[key] != new[key]]
    return [f"resumed with {', '.join(changed)}: losses differ from an unbroken run's"] if changed else []


def load_init(config: Config, out: Path, student: Networks, teacher: Networks) -> tuple[str, dict[str, Any]] | None:
    """Put the weights of `init=` into both backbones; None without `init=`. Nothing is written.

    A resumed run reads them from the copy in its folder, if there is one.

    returns  what was loaded, reshaped and left out, in one line; and {"source", "path", "source_sha256"}: the value of
             `init=`, the file it stands for and that file's digest
    raises   UserError when the weights cannot be read, do not fit, or differ from the digest beside the copy, and for
             a loss that holds to them without `init=`
    """
    config.check_start()
    if config.init is None:
        return None
    if _has_copy(config, out):
        report = load_into(student.backbone, out / COPY)
    else:
        report = load_into(student.backbone, config.init, config.adapt.channels)
    teacher.backbone.load_state_dict(student.backbone.state_dict())
    path = report.weights.path
    return f"init: {report}", {"source": config.init, "path": str(path), "source_sha256": digest(path)}


def _has_copy(config: Config, out: Path) -> bool:
    return config.resume and (out / COPY).is_file()
