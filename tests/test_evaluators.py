"""Every evaluator from a user's seat, on a miniature in its dataset's own layout: the planted answer, and chance."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from pathlib import Path

import pytest
import torch
from encoders import small_vit

from dinoreg.commands.main import main
from dinoreg.config.bundled import bundled
from dinoreg.evaluation.benchmark import PROTOCOLS, benchmarks
from dinoreg.evaluation.request import read_request
from dinoreg.evaluation.runner import preflight

NAMES = sorted(path.stem for path in bundled("eval").glob("*.py"))
# Cheap ones, of image classes and of boxes without labels; the others take longer and come with --slow.
QUICK = ["cifar10", "coco20k"]
FAST = {
    "logistic": ["logistic.num_c=6"],
    "knn": ["knn.k=[5]"],
    "linear": ["linear.lrs=[0.1]", "linear.epochs=2", "linear.epoch_steps=15", "linear.batch_size=16"],
    "multilabel": ["multilabel.min_c=1e-3", "multilabel.max_c=1e3", "multilabel.num_c=7"],
    "segmentation": [
        "segmentation.size=48",
        "segmentation.stride=32",
        "segmentation.steps=120",
        "segmentation.batch_size=6",
        "segmentation.lrs=[0.01]",
    ],
    "knn_segmentation": ["knn_segmentation.size=48", "knn_segmentation.stride=32"],
    "depth": ["depth.steps=40", "depth.batch_size=6", "depth.lrs=[0.01]"],
    "discovery": ["discovery.normalise=true", "discovery.biases=[0,-0.2,-0.4,-0.6,-0.8]", "discovery.k_patches=20"],
    "detection": [
        "detection.size=70",
        "detection.max_size=84",
        "detection.steps=100",
        "detection.batch_size=8",
        "detection.lrs=[0.01]",
    ],
    "retrieval": ["retrieval.size=48"],
    "flow": ["flow.steps=30", "flow.lr=0.01", "flow.batch_size=2"],
}
# How a miniature is written where its default does not suit patches of 8, and what is read of it.
WRITTEN = {"sintel": {"step": 32}}
OWN = {"caltech101": ["caltech101.train_per_class=6"], "imagenet22k": ["imagenet22k.holdout_per_class=2"]}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save(small_vit().state_dict(), path)
    return path


def common(weights: Path, root: Path, out: Path) -> list[str]:
    return [f"weights={weights}", f"root={root}", f"out={out}", "batch_size=32", "workers=0", "precision=fp32"]


def write(name: str, root: Path, shuffled: bool = False) -> None:
    importlib.import_module(f"miniatures.{name}").write(root, shuffled=shuffled, **WRITTEN.get(name, {}))


def run(name: str, weights: Path, folder: Path, shuffled: bool) -> dict:
    """The record of an evaluation; of shuffled ground truth without baselines."""
    root, out = folder / "datasets", folder / "out"
    write(name, root, shuffled)
    protocols = [task.protocol for task in benchmarks()[name].tasks if not task.asked]
    fast = [option for protocol in dict.fromkeys(protocols) for option in FAST[protocol]]
    options = [*fast, *OWN.get(name, []), f"baselines={not shuffled}".lower()]
    assert main(["eval", name, *common(weights, root, out), *options]) == 0
    (path,) = (out / "eval" / "0000000").glob("*.json")
    return json.loads(path.read_text())


def assert_found(name: str, planted: dict, shuffled: dict) -> None:
    """The evaluation of `name` finds the planted answer and its baselines, and no answer in shuffled truth."""
    assert planted["dataset"] == name
    assert set(planted["baselines"]) == {"random init", "raw pixels"}
    for record in (planted, shuffled):
        assert {row["protocol"] for row in record["rows"]} == {
            PROTOCOLS[task.protocol][1] for task in benchmarks()[name].tasks if not task.asked
        }
        for row in record["rows"]:
            assert row["low"] <= row["value"] + 1e-9
            assert row["value"] <= row["high"] + 1e-9
    for protocol in {row["protocol"] for row in planted["rows"]}:
        found, lost = (
            next(row for row in record["rows"] if row["protocol"] == protocol) for record in (planted, shuffled)
        )
        sign = 1 if found["higher_is_better"] else -1
        assert sign * found["value"] > sign * lost["value"], protocol
        if found["unit"] == "share" and found["chance"] is not None:
            assert found["value"] > 0.75, protocol
            assert lost["value"] < found["value"] - 0.25, protocol


@pytest.mark.parametrize("name", QUICK)
def test_an_evaluation_finds_the_planted_answer_and_none_in_shuffled_ones(
    name: str, weights: Path, tmp_path: Path
) -> None:
    planted, shuffled = (run(name, weights, tmp_path / str(kind), kind) for kind in (False, True))
    assert_found(name, planted, shuffled)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_checked_before_the_first_pass_accepts_every_dataset(name: str, tmp_path: Path) -> None:
    write(name, tmp_path)
    request = read_request([f"root={tmp_path}", *OWN.get(name, [])])
    plans, problems = preflight([benchmarks()[name]], request)
    assert problems == {}
    assert [plan.benchmark.name for plan in plans] == [name]


@pytest.fixture(scope="module")
def everything(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of `eval all` over a root with every dataset, and what the command wrote to stderr."""
    folder = tmp_path_factory.mktemp("all")
    root, out = folder / "datasets", folder / "out"
    for name in NAMES:
        write(name, root)
    fast = [option for options in (*FAST.values(), *OWN.values()) for option in options]
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        assert main(["eval", "all", *common(weights, root, out), "examples=2", *fast]) == 0
    return out / "eval" / "0000000", errors.getvalue()


@pytest.mark.slow
def test_all_over_a_root_with_every_dataset_gives_one_report(everything: tuple[Path, str]) -> None:
    folder, errors = everything
    assert {path.stem for path in folder.glob("*.json")} == set(NAMES)
    assert len(NAMES) == 29
    page, table = (folder / "report.html").read_text(), (folder / "table.md").read_text()
    for benchmark in benchmarks().values():
        assert benchmark.title.replace("&", "&amp;") in page
        assert benchmark.title in table
    assert page.count("<section") == 1 + 29
    assert "not evaluated" not in errors


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in QUICK])
def test_the_planted_answer_is_found_and_a_shuffled_one_is_not(
    name: str, everything: tuple[Path, str], weights: Path, tmp_path: Path
) -> None:
    """Planted answers are those of `eval all`, where a dataset has the same options as in a command of its own."""
    planted = json.loads((everything[0] / f"{name}.json").read_text())
    assert_found(name, planted, run(name, weights, tmp_path, shuffled=True))
