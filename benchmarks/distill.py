"""How much of a real backbone does a small network learn in minutes? Distillation, judged by k-NN on unseen pictures.

    python benchmarks/distill.py FOLDER --out runs/distill --seeds 0 1 2 --write docs/results/distill.md

FOLDER is that of `real_data.py`, which is asked for what is missing there: photographs of solar cells and a
DINOv2-S-class backbone. `distill_vitt16_reg4` learns from the backbone on half of the photographs, without labels; k-NN
(20 neighbours among that half) tells monocrystalline from polycrystalline cells in the other half. The halves are
blocks of 300 consecutive photographs in turn, so that hardly any module has cells in both. The figure is the share of
the way from random weights of the student's architecture (the mean of three) to the backbone, (student - random) /
(backbone - random), with a bootstrap interval over the photographs that were not seen; the backbone counts at its own
224 pixels or at those of the run, whichever is better.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import measure
import numpy as np
import real_data
import torch
from torch import nn

from dinoreg.config.load import Config, load_config
from dinoreg.data.open import open_source
from dinoreg.evaluation.backbones.encoder import NativeEncoder
from dinoreg.evaluation.metrics.bootstrap import bootstrap_statistic
from dinoreg.models.vit import RegisterViT
from dinoreg.runtime.device import keep_freed_memory, pick_precision
from dinoreg.train.loop import pretrain
from dinoreg.train.probes import build_probe
from dinoreg.weights.load import load

CONFIG, CPU = "distill_vitt16_reg4", torch.device("cpu")
RANDOM_STARTS = 3
BLOCK = 300  # photographs; modules have 60 or 72 cells


def halves(folder: Path, out: Path) -> Path:
    """Solar cells as a labelled folder with train and test."""
    for path in sorted(real_data.elpv(folder, "cell").glob("*/*.png")):
        split = ("train", "test")[(int(path.stem.removeprefix("cell")) - 1) // BLOCK % 2]
        place = out / split / path.parent.name / path.name
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path.resolve())
    return out


class Judge:
    """k-NN at one size; called with a network it says which of the unseen pictures it names right."""

    def __init__(self, pictures: Path, size: int) -> None:
        patch = next(patch for patch in (8, 14, 16) if size % patch == 0)  # a config's crops are of whole patches
        overrides = {"model.name": f"vits{patch}_reg0", "crops.global_size": size, "crops.num_local": 0}
        wanted = {"probe.data": str(pictures), "probe.num_images": 1_000_000}
        probe = build_probe(load_config(None, {**overrides, **wanted}), open_source(str(pictures)))
        assert probe is not None
        self.probe = probe  # equal pictures in both halves do not count
        contents = [image.numpy().tobytes() for image in probe.images]
        bank = set(contents[: probe.in_bank])
        self.unseen = np.array([content not in bank for content in contents[probe.in_bank :]])

    def __call__(self, network: nn.Module) -> np.ndarray:
        found = self.probe.measure(network.eval(), CPU, pick_precision("auto", CPU))
        assert found.right is not None
        return found.right[self.unseen].astype(float)


def train(config: Config) -> tuple[RegisterViT, float]:
    """The student of a run, and the seconds that the run took, with everything that it writes."""
    began = time.perf_counter()
    out = pretrain(config)
    return load(out), time.perf_counter() - began


def interval(count: int, statistic: Any) -> list[float]:
    found = bootstrap_statistic(count, statistic)
    return [round(found.low, 4), round(found.high, 4)]


def judge(
    students: list[RegisterViT], tutor: Path, pictures: Path, size: int, tutor_sizes: tuple[int, ...]
) -> dict[str, Any]:
    """Accuracies, and the share of the way, each with its interval over the tested pictures."""
    at_size = Judge(pictures, size)
    stated = NativeEncoder(students[0], "student", None)
    starts = [stated.random_init(seed).module for seed in range(RANDOM_STARTS)]  # type: ignore[attr-defined]
    right = {"random weights": np.mean([at_size(start) for start in starts], axis=0)}
    rows = [at_size(student) for student in students]
    right["student"] = np.mean(rows, axis=0)
    backbone = load(tutor)
    for each in tutor_sizes:
        right[f"backbone at {each} px"] = Judge(pictures, each)(backbone)
    ceiling = max((name for name in right if name.startswith("backbone")), key=lambda name: right[name].mean())
    floor, reached, most = right["random weights"], right["student"], right[ceiling]
    count = len(floor)

    def share(weights: np.ndarray) -> float:
        return float(weights @ (reached - floor) / (weights @ (most - floor)))

    found: dict[str, Any] = {
        name: {"top1": round(float(row.mean()), 4), "interval": interval(count, lambda w, r=row: float(w @ r / count))}
        for name, row in right.items()
    }
    found["share"] = {"value": round(share(np.ones(count)), 4), "interval": interval(count, share)}
    found["share of each seed"] = [round(float((row - floor).mean() / (most - floor).mean()), 4) for row in rows]
    return found | {"ceiling": ceiling, "tested pictures": count}


def table(found: dict[str, Any]) -> str:
    def cell(value: float, limits: list[float]) -> str:
        return f"{100 * value:.1f} [{100 * limits[0]:.1f}, {100 * limits[1]:.1f}]"

    rows = [
        {"network": name, "20-NN top-1, % [95 %]": cell(row["top1"], row["interval"])}
        for name, row in found.items()
        if isinstance(row, dict) and "top1" in row
    ]
    share = cell(found["share"]["value"], found["share"]["interval"])
    each = ", ".join(f"{100 * value:.1f}" for value in found["share of each seed"])
    words = f"Share of the way from random weights to the {found['ceiling']}: **{share} %** (seeds: {each} %)"
    return f"{measure.table(rows)}\n\n{words}, over {found['tested pictures']} unseen pictures."


def page(found: dict[str, Any], given: argparse.Namespace, seconds: list[float]) -> str:
    machine = measure.fingerprint()
    what = (__doc__ or "").partition("FOLDER is")[2]
    changed = ["--set", *given.set] if given.set else []
    command = ["python benchmarks/distill.py FOLDER --seeds", *map(str, given.seeds), *changed]
    parts = [
        "# Distillation of a real backbone",
        f"```\n{' '.join(command)}\n```",
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, commit {machine['commit']}. "
        f"Minutes a run, files included: {', '.join(f'{each / 60:.1f}' for each in seconds)}.",
        table(found),
        f"FOLDER is{what}".strip(),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    options = measure.parser(__doc__)
    options.add_argument("folder", type=Path, help="of real_data.py")
    options.add_argument("--out", type=Path, default=Path("runs/distill"), help="folder for the runs")
    options.add_argument("--seeds", type=int, nargs="+", default=[0])
    options.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other values than the config's")
    options.add_argument("--write", type=Path, help="the page of results to write")
    given = options.parse_args()
    keep_freed_memory()
    folder = given.folder.absolute()
    pictures, tutor = halves(folder, given.out.absolute() / "pictures"), real_data.backbone(folder)
    students, seconds = [], []
    for seed in given.seeds:
        overrides = [
            f"data={pictures / 'train'}",
            f"distill={tutor}",
            f"out={given.out / f'seed{seed}'}",
            f"seed={seed}",
        ]
        config = load_config(CONFIG, [*overrides, "overwrite=true", "probe.every=0", "device=cpu", *given.set])
        student, took = train(config)
        students.append(student)
        seconds.append(took)
    found = judge(students, tutor, pictures, config.crops.global_size, (config.distill_size or 224, 224))
    if given.write is not None:
        given.write.write_text(page(found, given, seconds))
    settings = {"config": CONFIG, "set": given.set, "seeds": given.seeds}
    measure.report("distill", settings, found | {"seconds": [round(each, 1) for each in seconds]}, table(found))


if __name__ == "__main__":
    main()
