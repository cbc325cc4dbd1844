"""The training step alone, on random crops: images a second, phases, peak memory, operations a second.

    python benchmarks/step.py
    python benchmarks/step.py --peer lightly-train --peer-python PEER/bin/python
    python benchmarks/step.py --only dinoreg "dinoreg, fp32" --phases
    python benchmarks/step.py --only dinoreg "dinoreg, spinning" --busy 1

ViT-S/16 with 4 registers, 65536 prototypes, batch 8, 2 x 224 + 8 x 96 unless told otherwise. Everything but the
data is dinoreg's own: the networks, the step and the optimizer are those that a run is made of.
"""

from __future__ import annotations

import sys
from typing import Any

import measure
import torch

# Overrides of the options below, per variant; "malloc": whether glibc keeps freed memory; "spin": whether threads that
# wait spin for as long as GNU OpenMP has it by itself.
OURS: dict[str, dict[str, Any]] = {
    "dinoreg": {},
    "dinoreg, malloc left alone": {"malloc": False},
    "dinoreg, spinning": {"spin": True},
    "dinoreg, fp32": {"precision": "fp32"},
    "dinoreg, bf16": {"precision": "bf16"},
    "dinoreg, drop path 0.1": {"drop_path": 0.1},
    "dinoreg, no drop path": {"drop_path": 0.0},
    "dinoreg, 8192 prototypes": {"prototypes": 8192},
    "dinoreg, xformers": {"attention": "xformers"},
    "dinoreg, varlen": {"attention": "varlen"},
    "dinoreg, sdpa": {"attention": "sdpa"},
    "dinoreg, compiled": {"compile": True},
}
PEERS: dict[str, dict[str, dict[str, Any]]] = {
    "lightly-train": {
        "lightly-train": {"precision": "fp32", "drop_path": 0.1, "malloc": False},
        "lightly-train, malloc": {"precision": "fp32", "drop_path": 0.1},
        "lightly-train, malloc, drop path 0.3": {"precision": "fp32", "drop_path": 0.3},
        "lightly-train, bf16": {"precision": "bf16", "drop_path": 0.1, "malloc": False},
        "lightly-train, bf16, malloc": {"precision": "bf16", "drop_path": 0.1},
        "lightly-train, bf16, malloc, drop path 0.3": {"precision": "bf16", "drop_path": 0.3},
    }
}
MODEL = ("dim", "depth", "heads", "attention", "compile")
DEFAULT = ("dinoreg", "dinoreg, no drop path", "dinoreg, 8192 prototypes")


def build(settings: dict[str, Any]) -> Any:
    """One variant of dinoreg, warmed up; see `measure.serve`."""
    from dinoreg.config.load import load_config
    from dinoreg.plan.devices import local_device
    from dinoreg.plan.job import describe
    from dinoreg.plan.memory import operations_of
    from dinoreg.runtime.device import DTYPES, keep_freed_memory, pick_device, pick_precision
    from dinoreg.train.parallelize import compile_blocks
    from dinoreg.train.schedules import Now
    from dinoreg.train.state import TrainState, build_networks
    from dinoreg.train.step import train_step

    config = load_config(
        None,
        {
            "model.name": settings["model"],
            **({} if settings["drop_path"] is None else {"model.drop_path": settings["drop_path"]}),
            **{f"model.{key}": settings[key] for key in MODEL if settings.get(key)},
            "crops.global_size": settings["global_size"],
            "crops.local_size": settings["local_size"],
            "crops.num_local": settings["num_local"],
            "head.prototypes": settings["prototypes"],
            "batch_size": settings["batch_size"],
            "precision": settings["precision"],
            "device": settings["device"],
            "threads": settings["threads"],
        },
    )
    device = pick_device(config.device)
    dtype = pick_precision(config.precision, device)
    if config.threads:
        torch.set_num_threads(config.threads)
    if device.type == "cpu":
        keep_freed_memory()
    student, teacher = build_networks(config)
    state = TrainState(config, student, teacher, device, dtype)
    if config.model.compile:
        compile_blocks(student, teacher)
    batches = [random_batch(config, student.backbone.patch_size, number, device) for number in range(4)]
    now = Now(lr=1e-4, last_layer_lr=1e-4, weight_decay=0.04, momentum=0.992, teacher_temp=0.04)

    here = local_device()
    operations = operations_of(describe(config, 1, 1, here)).total  # of one image
    peak = here.peak(next(name for name, known in DTYPES.items() if known == dtype))  # TFLOP/s, on paper

    def step() -> None:
        train_step(state, batches[state.step % len(batches)], now)

    def take() -> measure.Measurement:
        if device.type == "cuda":
            step()  # takes the memory again that was given back for the others
        spent = measure.seconds(step, device, settings["steps"])
        executed = operations * config.batch_size / spent
        return {
            "images_per_s": config.batch_size / spent,
            "gflops": executed / 1e9,
            "share_of_matmul": executed / measure.matmul_flops(device, dtype),
            **({"share_of_peak": executed / (peak * 1e12)} if peak else {}),
            "peak_gib": measure.peak_gib(device),
        }

    step()
    if settings["phases"]:
        return lambda: phases(state, batches[0], now, config, device)
    return take


def random_batch(config: Any, patch_size: int, number: int, device: torch.device) -> Any:
    """A batch of random pixels with the masks that a run draws."""
    from dinoreg.data.loader import Batch
    from dinoreg.data.masks import block_masks, mask_tensors

    crops, count = config.crops, config.batch_size
    generator = torch.Generator().manual_seed(number)

    def pixels(rows: int, size: int) -> torch.Tensor:
        return torch.randn(rows, 3, size, size, generator=generator).to(device)

    grid = (crops.global_size // patch_size,) * 2
    hidden = torch.from_numpy(block_masks(0, number, 2 * count, grid, config.mask))
    indices, weights = mask_tensors(hidden)
    return Batch(
        global_crops=pixels(2 * count, crops.global_size),
        local_crops=pixels(crops.num_local * count, crops.local_size) if crops.num_local else None,
        mask=hidden.to(device),
        mask_indices=indices.to(device),
        mask_weights=weights.to(device),
        hidden=hidden.sum(dim=1).numpy(),
        sample_ids=torch.arange(count).numpy(),
        position=count * (number + 1),
        data_time=0.0,
    )


def phases(state: Any, batch: Any, now: Any, config: Any, device: torch.device) -> dict[str, float]:
    """Seconds that the parts of one step take, in their order."""
    from dinoreg.train.micro_batch import micro_batches
    from dinoreg.train.optimizer import clip_gradients, set_rates, update_teacher
    from dinoreg.train.step import koleo_of_views, student_losses, teacher_targets

    kept: dict[str, Any] = {}

    def teacher() -> None:
        kept["targets"] = teacher_targets(state, batch, now.teacher_temp)

    def student() -> None:
        (part,) = micro_batches(batch, 1)
        losses, tokens = student_losses(state, part, kept["targets"])
        kept["loss"] = sum(losses.values()) + config.loss.koleo_weight * koleo_of_views(tokens)

    def clip_and_step() -> None:
        clip_gradients(state.student, config.optim.clip_grad, state.optimizer, state.loss_scale)
        set_rates(state.optimizer, now)
        state.optimizer.step()

    state.optimizer.zero_grad(set_to_none=True)
    parts = {
        "teacher and targets": teacher,
        "student and losses": student,
        "backward": lambda: kept["loss"].backward(),
        "clip and AdamW": clip_and_step,
        "moving average": lambda: update_teacher(
            state.teacher, state.student, now.momentum, torch.ones((), device=device)
        ),
    }
    spent = {name: measure.seconds(work, device) for name, work in parts.items()}
    return {**spent, "images_per_s": config.batch_size / sum(spent.values())}


def main() -> None:
    options = measure.parser(__doc__, tuple(PEERS))
    options.add_argument("--only", nargs="+", metavar="VARIANT", help="measure these variants, by name; all: every one")
    options.add_argument("--phases", action="store_true", help="seconds of each part of dinoreg's step")
    options.add_argument("--model", default="vits16_reg4")
    options.add_argument("--device", default="auto")
    options.add_argument("--precision", default="auto")
    options.add_argument("--threads", type=int)
    for name, default in (("batch-size", 8), ("global-size", 224), ("local-size", 96), ("num-local", 8)):
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--prototypes", type=int, default=65536)
    options.add_argument("--drop-path", type=float, help="of dinoreg; none: its default")
    options.add_argument("--steps", type=int, default=1, help="steps of one measurement")
    options.add_argument("--busy", type=int, default=0, help="processes beside that use a core each")
    given = options.parse_args()
    if given.worker:
        measure.serve(build, given.worker)
        return
    keys = ("model", "device", "precision", "threads", "batch_size", "global_size", "local_size", "num_local")
    settings = {key: getattr(given, key) for key in (*keys, "prototypes", "drop_path", "steps", "phases")}
    if given.short:
        small = {"dim": 32, "depth": 2, "heads": 2, "batch_size": 2, "prototypes": 64, "num_local": 2}
        settings |= {**small, "global_size": 32, "local_size": 16, "threads": 1}
        given.rounds = 1
    theirs = PEERS.get(given.peer, {}) if not given.phases else {}
    known = {**OURS, **theirs}
    base = next(iter(theirs), None)
    chosen = given.only or [*(DEFAULT if not given.phases else DEFAULT[:1]), *([base] if base else [])]
    if chosen == ["all"]:
        chosen = list(known)
    if unknown := [name for name in chosen if name not in known]:
        raise SystemExit(f"unknown variant {unknown[0]!r}; known: {', '.join(known)}")
    variants = {}
    for name in chosen:
        own = {**settings, **known[name]}
        malloc, spin = own.pop("malloc", True), own.pop("spin", False)
        if name in theirs:
            env = measure.KEEP_FREED if malloc else None
            variants[name] = (measure.PEERS_SCRIPT, {"peer": given.peer, "what": "step", **own}, given.peer_python, env)
        else:
            own["prototypes"] = min(own["prototypes"], settings["prototypes"])
            env = {} if malloc else {"DINOREG_MALLOC": "0"}
            variants[name] = ("step.py", own, sys.executable, env | ({"GOMP_SPINCOUNT": "300000"} if spin else {}))
    with measure.workers_of(variants, build if given.short else None) as workers, measure.busy(given.busy):
        rounds = measure.in_turn(workers, given.rounds, given.budget)
    bases = [name for name in theirs if name in rounds[0]] or [next(iter(rounds[0]))]
    summary = measure.compare(rounds, "images_per_s", bases)
    if given.phases:
        table = []
        for name, values in summary.items():
            parts = {key: value for key, value in values.items() if key not in ("images_per_s", "spread", "ratio")}
            whole = sum(parts.values())
            table += [
                {"variant": name, "part": key, "s": f"{value:.3f}", "share": f"{100 * value / whole:.1f} %"}
                for key, value in parts.items()
            ]
    else:
        table = measure.comparison_rows(summary, "images_per_s", "img/s")
        for row in table:
            values = summary[row["variant"]]
            row["GFLOP/s"] = f"{values['gflops']:.0f}" if "gflops" in values else ""
            row["of matmul"] = f"{100 * values['share_of_matmul']:.0f} %" if "share_of_matmul" in values else ""
            row["peak GiB"] = f"{values['peak_gib']:.2f}"
    measure.report("step", {**settings, "busy": given.busy, "rounds": len(rounds)}, summary, measure.table(table))


if __name__ == "__main__":
    main()
