"""Every evaluator from a user's seat, on a miniature in its dataset's own layout: the planted answer, and chance."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from encoders import small_vit

from dinoreg.commands.main import main
from dinoreg.config.bundled import bundled
from dinoreg.evaluation.benchmark import PROTOCOLS, benchmarks

NAMES = sorted(path.stem for path in bundled("eval").glob("*.py"))
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
    "depth": ["depth.steps=40", "depth.batch_size=6", "depth.lrs=[0.01]"],
    "discovery": ["discovery.normalise=true", "discovery.biases=[0,-0.2,-0.4,-0.6,-0.8]", "discovery.k_patches=20"],
    "detection": [
        "detection.size=70",
        "detection.max_size=84",
        "detection.steps=100",
        "detection.batch_size=8",
        "detection.lrs=[0.01]",
    ],
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


def command(name: str, weights: Path, root: Path, out: Path) -> list[str]:
    protocols = [task.protocol for task in benchmarks()[name].tasks]
    fast = [option for protocol in dict.fromkeys(protocols) for option in FAST[protocol]]
    common = [f"weights={weights}", f"root={root}", f"out={out}", "batch_size=32", "workers=0", "precision=fp32"]
    return ["eval", name, *common, *fast, *OWN.get(name, [])]


def run(name: str, weights: Path, folder: Path, shuffled: bool) -> dict:
    """The record of an evaluation; of shuffled ground truth without baselines."""
    miniature = importlib.import_module(f"miniatures.{name}")
    root, out = folder / "datasets", folder / "out"
    miniature.write(root, shuffled=shuffled, **WRITTEN.get(name, {}))
    assert main([*command(name, weights, root, out), f"baselines={not shuffled}".lower()]) == 0
    (path,) = (out / "eval" / "0000000").glob("*.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_the_planted_answer_is_found_and_a_shuffled_one_is_not(name: str, weights: Path, tmp_path: Path) -> None:
    planted, shuffled = (run(name, weights, tmp_path / str(kind), kind) for kind in (False, True))
    assert planted["dataset"] == name
    assert set(planted["baselines"]) == {"random init", "raw pixels"}
    for record in (planted, shuffled):
        assert {row["protocol"] for row in record["rows"]} == {
            PROTOCOLS[task.protocol][1] for task in benchmarks()[name].tasks
        }
        for row in record["rows"]:
            assert row["low"] <= row["value"] + 1e-9
            assert row["value"] <= row["high"] + 1e-9
    sign = 1 if planted["higher_is_better"] else -1
    for protocol in {row["protocol"] for row in planted["rows"]}:
        found, lost = (
            next(row for row in record["rows"] if row["protocol"] == protocol) for record in (planted, shuffled)
        )
        sign = 1 if found["higher_is_better"] else -1
        assert sign * found["value"] > sign * lost["value"], protocol
        if found["unit"] == "share" and found["chance"] is not None:
            assert found["value"] > 0.75, protocol
            assert lost["value"] < found["value"] - 0.25, protocol


@pytest.mark.slow
def test_all_over_a_root_with_every_dataset_gives_one_report(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tmp_path / "datasets", tmp_path / "out"
    for name in NAMES:
        importlib.import_module(f"miniatures.{name}").write(root, **WRITTEN.get(name, {}))
    fast = [option for options in (*FAST.values(), *OWN.values()) for option in options]
    common = [f"weights={weights}", f"root={root}", f"out={out}", "batch_size=32", "workers=0", "examples=2"]
    assert main(["eval", "all", *common, *fast]) == 0
    folder = out / "eval" / "0000000"
    assert {path.stem for path in folder.glob("*.json")} == set(NAMES)
    assert len(NAMES) == 22
    page, table = (folder / "report.html").read_text(), (folder / "table.md").read_text()
    for benchmark in benchmarks().values():
        assert benchmark.title.replace("&", "&amp;") in page
        assert benchmark.title in table
    assert page.count("<section") == 1 + 22
    assert "not evaluated" not in capsys.readouterr().err
