"""Does going on from a real backbone teach it a few hundred to a few thousand pictures, and what does it forget?

    python benchmarks/real_data.py FOLDER
    python benchmarks/continuation.py FOLDER --out runs/continuation

Half of the pictures of a set (without their labels) are trained on in several ways, from FOLDER/dinov2_s. The backbone
before and after is then frozen: k-NN and logistic regression learn from the labels of that half and are tested on the
other one. Each figure is compared with the start's on the same test pictures (the paired bootstrap of
`evaluation/comparison.py`). Another set, which was not trained on, shows what is forgotten: its k-NN is what
`probe.general` follows, and `probe.margin` (3 points) what may be lost. Runs and features that are there already are
kept, so the same command finishes what was interrupted.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch

from dinoreg.config.load import load_config
from dinoreg.data.open import read_labelled
from dinoreg.data.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from dinoreg.evaluation.comparison import BETTER, WORSE, compare
from dinoreg.evaluation.metrics.bootstrap import bootstrap_interval
from dinoreg.evaluation.metrics.knn_rankme import knn_predict
from dinoreg.evaluation.result import Row
from dinoreg.evaluation.solvers.regularisation_path import balanced_split, select_and_fit
from dinoreg.runtime.device import autocast, pick_device, pick_precision
from dinoreg.train.loop import pretrain
from dinoreg.weights.load import load

MARGIN = 0.03  # of k-NN on the general set, as probe.margin
NEIGHBOURS = 20  # as the in-run probe
CS = np.geomspace(1e-5, 1.0, 11).tolist()
PROBES = {
    "knn": "k-NN",
    "centred": "k-NN about the mean",
    "cls": "logistic, class token",
    "both": "logistic, class token and mean patch",
}

STAGED, FEW = "continue_vits14_reg4", "continue_few_vits14_reg4"
SMALL = {"crops.num_local": 2, "head.prototypes": 1024}
# The config, and options on top of it.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "staged": (STAGED, SMALL),
    "staged, quick teacher": (STAGED, {**SMALL, "schedule.momentum": [0.9, 1.0], "adapt.lr": 0.3}),
    "few": (FEW, {}),
    "few, last 2 blocks": (FEW, {"adapt.blocks": 2}),
    "few, anchor": (FEW, {"loss.anchor_weight": 1.0}),
}


@dataclass(frozen=True)
class Pictures:
    """A labelled set, half of it to learn from: paths, labels (n,), and which pictures are of that half (n,) bool."""

    paths: list[Path]
    labels: torch.Tensor
    learnt: torch.Tensor

    @classmethod
    def of(cls, folder: Path, most: int | None) -> Pictures:
        """The pictures of a folder of classes, split as the folder says, else half of every class; at most `most`."""
        read = read_labelled(folder)
        labels = torch.from_numpy(read.labels)
        learnt = ~balanced_split(labels, 0.5)
        if read.words is not None:
            learnt = torch.tensor([word == "train" for word in read.words])
        chosen = np.random.default_rng(0).permutation(len(labels))[:most]
        paths = [Path(read.source.name(index)) for index in chosen]
        return cls(paths, labels[chosen], learnt[chosen])


@torch.no_grad()
def features(weights: Path, pictures: Pictures, size: int, cache: Path) -> torch.Tensor:
    """Class token and mean patch of every picture as a whole, (n, 2 D); kept in `cache`."""
    if not cache.is_file():
        see = Preprocessing(IMAGENET_MEAN, IMAGENET_STD, (size, size), size)
        device = pick_device("auto")
        dtype, model, rows = pick_precision("auto", device), load(weights).to(device), []
        for first in range(0, len(pictures.paths), 32):
            images = torch.stack([see(path) for path in pictures.paths[first : first + 32]]).to(device)
            with autocast(device, dtype):
                tokens = model(images)
            rows.append(torch.cat([tokens.cls, tokens.patches.mean(dim=1)], dim=1).float().cpu())
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.save(cache, torch.cat(rows).numpy())
    return torch.from_numpy(np.load(cache))


def probes(rows: torch.Tensor, pictures: Pictures) -> dict[str, Row]:
    """Accuracy on the tested half by each of PROBES, with its bootstrap replicates."""
    learnt, classes = pictures.learnt, int(pictures.labels.max()) + 1
    labels, tested = pictures.labels[learnt], pictures.labels[~learnt]
    found = {}
    for name in PROBES:
        used = rows if name == "both" else rows[:, : rows.shape[1] // 2]
        train, test = used[learnt], used[~learnt]
        if name in ("knn", "centred"):
            middle = train.mean(dim=0) if name == "centred" else 0.0
            train, test = train - middle, test - middle
            predicted = knn_predict(train, labels, test, classes, (NEIGHBOURS,))[NEIGHBOURS].argmax(dim=1)
        else:
            train, test = (torch.nn.functional.layer_norm(each, each.shape[1:]) for each in (train, test))
            predicted = select_and_fit(train, labels, classes, CS, validation_share=0.2).model.predict(test)
        right = (predicted == tested).numpy()
        interval = bootstrap_interval(right)
        ends = (interval.low, interval.high)
        found[name] = Row(name, "top-1", right.mean(), *ends, n_test=len(right), replicates=tuple(interval.replicates))
    return found


def continue_run(given: argparse.Namespace, method: str, seed: int, train: Path) -> Path:
    """Go on in one way; returns the last teacher file."""
    out: Path = given.out / given.set / f"{method.replace(', ', '_').replace(' ', '_')}_s{seed}"
    config, changes = METHODS[method]
    options: dict[str, Any] = {
        **{"init": str(given.folder / "dinov2_s"), "model.name": "vits14_reg0", "data": str(train), "out": str(out)},
        **{"data.root": str(given.folder), "crops.global_size": given.size, "crops.local_size": given.size // 28 * 14},
        **{"steps": given.steps, "batch_size": given.batch, "seed": seed, "checkpoint.every": given.steps},
        **{"probe.every": 0, "log.tensorboard": False, **changes},
    }
    print("dinoreg pretrain", config, *(f"{key}={value}" for key, value in options.items()), flush=True)
    if not list((out / "teacher").glob(f"step_{given.steps:07d}.safetensors")):
        pretrain(load_config(config, {**options, "resume": out.is_dir()}))
    return max((out / "teacher").glob("step_*.safetensors"))


def cells(after: dict[str, dict[str, Row]], before: dict[str, dict[str, Row]]) -> dict[str, Any]:
    """A table's row: every figure after, its paired difference to the one before in points, and the verdicts."""
    row: dict[str, Any] = {}
    for kind, rows in after.items():
        for name, figure in rows.items():
            found = compare(figure, before[kind][name])
            ends = "" if found["low"] is None else f" [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"
            mark = {BETTER: " **better**", WORSE: " **worse**"}.get(found["verdict"], "")
            row[f"{kind}: {PROBES[name]}"] = f"{100 * figure.value:.1f}, {100 * found['difference']:+.1f}{ends}{mark}"
    lost = before["general"]["knn"].value - after["general"]["knn"].value
    return {**row, "within margin": "yes" if lost <= MARGIN else "no"}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, help="what real_data.py wrote")
    options.add_argument("--out", type=Path, required=True, help="folder for runs and features")
    options.add_argument("--set", default="elpv_defect", help="pictures to go on with, a folder in FOLDER")
    options.add_argument("--general", default="tiles", help="pictures that must not be forgotten")
    options.add_argument("--size", type=int, default=112, help="pixels of pictures and global crops")
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--most", type=int, help="pictures of each set that are used; none: all")
    options.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    given = options.parse_args()
    given.folder = given.folder.absolute()
    sets = {kind: Pictures.of(given.folder / name, given.most) for kind, name in vars(given).items() if kind in KINDS}
    train = given.out / given.set / "train.txt"
    train.parent.mkdir(parents=True, exist_ok=True)
    train.write_text("".join(f"{path}\n" for path, used in zip(sets["set"].paths, sets["set"].learnt) if used))

    def measured(weights: Path, where: Path) -> dict[str, dict[str, Row]]:
        return {k: probes(features(weights, each, given.size, where / f"{k}.npy"), each) for k, each in sets.items()}

    before = measured(given.folder / "dinov2_s", given.out / given.set / f"start_{given.size}")
    rows = [{"method": "start", "seed": "", **cells(before, before)}]
    print(measure.table(rows), flush=True)
    for seed in given.seeds:
        for method in given.methods:
            weights = continue_run(given, method, seed, train)
            rows.append({"method": method, "seed": seed, **cells(measured(weights, weights.parent.parent), before)})
            print(measure.table(rows[-1:]), flush=True)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(given).items()}
    measure.report("continuation", settings, {"rows": rows}, measure.table(rows))


KINDS = ("set", "general")  # the arguments that name sets of pictures

if __name__ == "__main__":
    main()
