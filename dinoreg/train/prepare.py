"""From a config to everything a run needs. Whatever can be refused is refused here, before a file is written."""

from __future__ import annotations

import secrets
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from dinoreg.checkpoint.atomic import write_atomic
from dinoreg.config.load import Config, load_config, to_yaml
from dinoreg.data.loader import BatchLoader
from dinoreg.data.open import open_source
from dinoreg.data.source import Source
from dinoreg.distributed import process_group as distributed
from dinoreg.runtime.device import keep_freed_memory, pick_device, pick_precision
from dinoreg.runtime.errors import UserError
from dinoreg.train.init_weights import Start, check_same_start, keep_start, load_start
from dinoreg.train.online_probe import Probe, build_general, build_probe
from dinoreg.train.parallelize import choose_strategy
from dinoreg.train.schedules import Schedules
from dinoreg.train.state import Networks, TrainState, build_networks, build_state

# How long a file that rank 0 wrote may take to show on another machine (NFS keeps listings for a while).
SHARED_SECONDS = 30.0

# Sections that fix the shapes of a checkpoint: a resumed run may not change them.
SHAPING = ("model", "head")


@dataclass
class Setup:
    """A run that is ready to start; nothing has been written yet."""

    config: Config
    out: Path
    device: torch.device
    dtype: torch.dtype
    source: Source
    probe: Probe | None
    general: Probe | None
    student: Networks
    teacher: Networks
    start: Start | None
    schedules: Schedules
    notes: list[str]

    @property
    def num_steps(self) -> int:
        return self.schedules.num_steps

    @property
    def global_batch_size(self) -> int:
        return self.config.batch_size * distributed.world_size()

    def new_state(self) -> TrainState:
        anchor = self.start.anchor if self.start else None
        return build_state(self.config, self.student, self.teacher, self.device, self.dtype, anchor)

    def batches(self, state: TrainState) -> BatchLoader:
        """The endless loader of this run, from the samples on that `state` has reached."""
        config = self.config
        loader = BatchLoader(
            self.source,
            crops=config.crops,
            augment=config.augment,
            mask=config.mask,
            patch_size=self.student.backbone.patch_size,
            batch_size=config.batch_size,
            seed=config.seed,
            workers=config.data.workers,
            device=self.device,
            position=state.position,
            max_bad_fraction=config.data.max_bad_fraction,
            max_pixels=config.data.max_pixels,
            in_channels=config.model.in_channels,
            prefetch=config.data.prefetch,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
        loader.bad.update(state.history.get("bad", {}))
        return loader


def prepare(config: Config) -> Setup:
    """Check a config against the machine, the data and the weights; UserError in one line when it cannot run."""
    if not config.out:
        raise UserError("out: expected the folder to write the run to, as out=runs/NAME")
    if config.data.source is None:
        raise UserError("data: expected a folder of images, a list of paths, scenes or a named dataset, as data=PATH")
    out = Path(config.out)
    _check_out(config, out)
    device = pick_device(config.device)
    dtype = pick_precision(config.precision, device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if device.type == "cpu":
        keep_freed_memory()
    with distributed.main_first():  # the others find the index ready
        source = open_source(
            config.data.source,
            weights=config.data.weights,
            root=config.data.root,
            index_dir=config.data.index_dir,
        )
    num_steps = config.num_steps(len(source), distributed.world_size())
    student, teacher = build_networks(config)
    notes = [config.explain_lr(distributed.world_size()), *changed_config(config, out)]
    num_parameters = sum(p.numel() for p in student.parameters())
    strategy = choose_strategy(config.parallel, num_parameters, distributed.world_size())
    if strategy != "single":
        notes.append(f"{distributed.world_size()} processes, {strategy}")
    koleo_ranks, world_size = config.loss.koleo_ranks, distributed.world_size()
    if koleo_ranks is not None and world_size % koleo_ranks:
        raise UserError(f"loss.koleo_ranks={koleo_ranks}: expected a divisor of the {world_size} processes")
    start = load_start(config, out, student, teacher)
    if start is not None:
        notes += [start.note, config.explain_start(num_steps, distributed.world_size())]
    probe, general = build_probe(config, source), build_general(config)
    if general is not None and probe is None:
        raise UserError(f"probe.general={config.probe.general}: probing needs at least 4 images in data=, too")
    schedule, adapt = config.schedule, config.adapt
    schedules = Schedules(
        num_steps=num_steps,
        peak_lr=config.peak_lr(distributed.world_size()),
        final_lr=schedule.final_lr,
        warmup=schedule.warmup,
        weight_decay=schedule.weight_decay,
        momentum=schedule.momentum,
        teacher_temp=schedule.teacher_temp,
        teacher_temp_warmup=schedule.teacher_temp_warmup,
        freeze_last_layer=schedule.freeze_last_layer,
        backbone_frozen=adapt.heads if start else 0.0,
        backbone_warmup=adapt.warmup if start else 0.0,
        backbone_rate=adapt.lr if start else 1.0,
    )
    return Setup(
        config=config,
        out=out,
        device=device,
        dtype=dtype,
        source=source,
        probe=probe,
        general=general,
        student=student,
        teacher=teacher,
        start=start,
        schedules=schedules,
        notes=notes,
    )


def check_shared(setup: Setup) -> None:
    """All processes see what rank 0 writes to `out`, else UserError on all of them, and nothing is left there."""
    if distributed.world_size() == 1:
        return
    # A kill leaves what counts as unfinished, so that the run can be started again (`_check_out`).
    path = setup.out / f".shared-{distributed.from_main(secrets.token_hex(8))}.part"
    try:
        with distributed.collective_errors():
            if distributed.is_main():
                try:
                    setup.out.mkdir(parents=True, exist_ok=True)
                    path.touch()
                except OSError as error:
                    raise UserError(f"out={setup.out}: cannot be written ({error.strerror})") from None
        with distributed.collective_errors():
            deadline = time.monotonic() + SHARED_SECONDS
            while not path.exists():
                if time.monotonic() > deadline:
                    raise UserError(f"out={setup.out}: expected a folder that all machines share; rank 0's is another")
                time.sleep(0.2)
    except UserError:
        if distributed.is_main():
            path.unlink(missing_ok=True)
            with suppress(OSError):  # not empty: it was there before
                setup.out.rmdir()
        raise
    if distributed.is_main():
        path.unlink(missing_ok=True)


def _check_out(config: Config, out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out}: is a file, expected a folder")
    # A kill in the very first write leaves nothing but an unfinished file; `launch/` was there before the run.
    if not out.is_dir() or all(path.suffix == ".part" or path.name == "launch" for path in out.iterdir()):
        return
    if config.overwrite:
        if not (out / "config.yaml").is_file():
            raise UserError(f"out={out}: holds something other than a run (no config.yaml); it is not overwritten")
    elif config.resume:
        _check_same_shapes(config, out)
    else:
        raise UserError(f"out={out}: not empty; use resume=true to go on, overwrite=true to start anew")


def _check_same_shapes(config: Config, out: Path) -> None:
    """A run can only be resumed with the networks it was started with."""
    path = out / "config.yaml"
    if not path.is_file():
        raise UserError(f"out={out}: holds no run to resume (no config.yaml)")
    before = load_config(path)
    check_same_start(before, config, out)
    free = {
        "model": {"drop_path", "drop_path_uniform", "attention", "checkpointing", "compile"},
        "head": set(),
    }
    for section in SHAPING:
        then, now = getattr(before, section), getattr(config, section)
        for key in vars(now):
            if key not in free[section] and getattr(then, key) != getattr(now, key):
                raise UserError(
                    f"{section}.{key}={getattr(now, key)}: the run in {out} has {getattr(then, key)}; "
                    "a resumed run keeps its architecture"
                )


def changed_config(config: Config, out: Path) -> list[str]:
    """One line when a run is resumed with options that move its weights and differ from those it was started with."""
    path = out / "config.yaml"
    if not config.resume or not path.is_file():
        return []
    # The device shapes no weights but by its rounding.
    before, after = ({**each.shaping(), "device": each.device} for each in (load_config(path), config))
    changed = [f"{key}={after[key]} (was {before[key]})" for key in after if before[key] != after[key]]
    return [f"resumed with {', '.join(changed)}: losses differ from an unbroken run's"] if changed else []


def claim_folder(setup: Setup) -> None:
    """Make `out` this run's folder; write there the resolved config and the weights it starts from, if any."""
    if setup.config.overwrite and setup.out.is_dir():
        shutil.rmtree(setup.out)
    try:
        setup.out.mkdir(parents=True, exist_ok=True)
        write_atomic(setup.out / "config.yaml", to_yaml(setup.config))
        if setup.start is not None:
            keep_start(setup.out, setup.start, setup.teacher.backbone)
    except OSError as error:
        raise UserError(f"out={setup.out}: cannot be written ({error.strerror})") from None
