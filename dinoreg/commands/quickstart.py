"""`dinoreg quickstart`: pretrain a tiny register ViT on the embedded scenes, measure it, write a report.

It is measured by the evaluators' logistic regression on held-out scenes, beside two baselines under the same protocol:
the same network before training, and raw pixels.
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np

from dinoreg.checkpoint.run_folder import Run
from dinoreg.commands.report import report_run
from dinoreg.config.load import Config, load_config
from dinoreg.data.source import ScenesSource
from dinoreg.evaluation.backbones.encoder import RANDOM_WEIGHTS, Encoder, NativeEncoder
from dinoreg.evaluation.benchmark import Task
from dinoreg.evaluation.custom.datasets import BLANK
from dinoreg.evaluation.data import Data, Labelled
from dinoreg.evaluation.options import EvalOptions
from dinoreg.evaluation.request import Request
from dinoreg.evaluation.result import Result
from dinoreg.evaluation.runner import look, measure, preflight
from dinoreg.models.vit import RegisterViT
from dinoreg.reports.verdict import verdict
from dinoreg.runtime.json_files import read_json
from dinoreg.runtime.templates import with_interval
from dinoreg.scenes.render import CLASS_NAMES, NUM_CLASSES, label_of
from dinoreg.train.loop import pretrain
from dinoreg.train.state import build_networks
from dinoreg.weights.load import load

# The data set of scenes is endless; the probe's scenes come long after those that a run trains on.
FIRST_PROBE_SCENE = 20_000_000
NUM_TRAIN, NUM_TEST = 4000, 2000


def quickstart(out: str | Path | None = None, seed: int = 0, overwrite: bool = False) -> Path:
    """Pretrain, probe and report; returns the run folder. An unfinished run in `out` is resumed.

    out     None: runs/quickstart
    raises  UserError when `out` has other content
    """
    started = time.perf_counter()
    out = Path(out or "runs/quickstart")
    unfinished = not overwrite and (out / "config.yaml").is_file()
    config = load_config("quickstart", {"out": str(out), "seed": seed, "resume": unfinished, "overwrite": overwrite})
    pretrain(config)
    result = probe_run(config, out)
    report = report_run(out)
    _show(result, verdict(Run(out)).headline, time.perf_counter() - started, report)
    return out


class PretrainedEncoder(NativeEncoder):
    """The backbone of a run as an encoder; its random init is the network that the run started from."""

    def __init__(self, config: Config, run: Path) -> None:
        model = load(run)
        super().__init__(model, run.resolve().name, model.preprocessing)
        self.config = config

    def random_init(self, seed: int = 0) -> Encoder:
        """The student before the first step of a run with this seed: for the run's own, what it started from."""
        start = cast(RegisterViT, build_networks(replace(self.config, seed=seed))[0]["backbone"])
        return NativeEncoder(start, f"{self.name}{RANDOM_WEIGHTS}", self.preprocessing)


def probe_run(
    config: Config, run: Path, num_train: int = NUM_TRAIN, num_test: int = NUM_TEST, baselines: bool = True
) -> Result:
    """Evaluate a run on held-out scenes, some to learn from and some to test; it is written to `run`/eval/STEP/."""
    size = config.crops.global_size

    def scenes(first: int, count: int) -> Labelled:
        labels = np.array([label_of(index) for index in range(first, first + count)])
        return Labelled(ScenesSource(count, size, first=first), labels, NUM_CLASSES)

    train = scenes(FIRST_PROBE_SCENE, num_train)
    test = scenes(FIRST_PROBE_SCENE + num_train, num_test)
    folder = run / "eval" / f"{read_json(run / 'status.json')['step']:07d}"
    data = Data({"train": train, "test": test}, CLASS_NAMES)
    return probe(PretrainedEncoder(config, run), data, folder, baselines=baselines, seed=config.seed)


def probe(
    encoder: Encoder, data: Data, folder: Path, name: str = "scenes", baselines: bool = True, seed: int = 0
) -> Result:
    """Logistic regression on class token and mean patch token; the result is written to `folder/<name>.json`.

    data       splits "train" and "test", with one class per image
    baselines  whether to measure random weights and pixels, too
    seed       of the evaluation and of the random weights
    """
    task = Task("logistic", lambda root, options: data, "top-1", options={"token": "cls+mean"})
    classes, title = data.splits["train"].num_classes, "Embedded scenes"
    benchmark = replace(
        BLANK, name=name, title=title, classes=classes, tasks=(task,), options={}, licence="none needed"
    )
    with tempfile.TemporaryDirectory() as features:  # pixels as features would outweigh the run
        size = min(encoder.image_size)
        request = Request(EvalOptions(image_size=size, examples=0, features=features, baselines=baselines, seed=seed))
        ((plan,), _) = preflight([benchmark], request)
        return measure(encoder, look(encoder, plan, request), request, folder)


def _show(result: Result, headline: str, seconds: float, report: Path) -> None:
    print(f"linear probe on {result.headline.n_test} held-out scenes, {NUM_CLASSES} classes, top-1:")
    for name, (row, *_) in {"pretrained": result.rows, **result.baselines}.items():
        print(f"  {name + ':':<12} {with_interval(row.value, row.low, row.high)}")
    print(f"{headline} {seconds / 60:.1f} minutes in all.\nreport: {report}")
