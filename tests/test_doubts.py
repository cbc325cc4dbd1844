"""Named doubts, and whole evaluations of data that give cause for them: through the command line, onto the pages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import small_vit
from PIL import Image

from dinoreg.commands.main import main
from dinoreg.data.source import ScenesSource
from dinoreg.evaluation.comparison import compared, doubts, with_majority
from dinoreg.evaluation.data import Data, MultiLabelled
from dinoreg.evaluation.metrics.bootstrap import bootstrap_interval
from dinoreg.evaluation.result import Result, Row

FAST = ["protocols=logistic,knn,few_shot", "logistic.num_c=6", "few_shot.repeats=2", "few_shot.shares=[1]"]
FAST += ["batch_size=32", "workers=0", "precision=fp32", "examples=2", "image_size=32"]


def row(right: np.ndarray, **fields: Any) -> Row:
    interval = bootstrap_interval(right)
    return Row(
        *("any", "top-1", float(right.mean()), interval.low, interval.high),
        **{"n_test": len(right), "replicates": tuple(interval.replicates.tolist()), **fields},
    )


def named(*rows: Row, baselines: dict[str, tuple[Row, ...]] | None = None, data: tuple[Data, ...] = ()) -> list[str]:
    """The names of the doubts about some rows."""
    baselines = baselines or {}
    return [line.partition(":")[0] for line in doubts(compared(rows, baselines), baselines, data)]


def test_each_doubt_has_its_cause_and_a_sound_result_has_none() -> None:
    rng = np.random.default_rng(0)
    good, fair, poor = (rng.random(200) < share for share in (0.9, 0.6, 0.3))
    pixels, random = {"raw pixels": (row(poor),)}, {"random init": (row(fair),)}
    assert named(with_majority(row(good, chance=0.25), row(fair)), baselines=pixels | random) == []
    assert named(with_majority(row(fair), row(good))) == ["largest class"]
    assert named(with_majority(row(good), row(good))) == ["largest class"]
    assert named(row(good, chance=1.0)) == ["one answer"]
    assert named(with_majority(row(np.ones(200)), row(np.ones(200)))) == ["one answer"]
    assert named(row(poor), baselines=pixels) == ["as raw pixels"]
    assert named(row(poor), baselines=pixels | random) == ["as raw pixels"]
    assert named(row(poor), baselines=pixels | {"random init": (row(poor),)}) == ["all the same"]
    assert named(row(good[:29])) == ["few test images"]
    assert named(row(good[:30])) == []
    assert named(row(good, warnings=("equal features: all",))) == ["equal features"]
    labels = np.where(rng.random((40, 5)) < 0.4, 1, -1)
    assert named(row(good), data=(Data({"test": MultiLabelled(ScenesSource(40, 16), labels, 5)}),)) == ["unused truth"]


def write(folder: Path, counts: dict[str, int], visible: bool, seed: int = 0) -> Path:
    """`folder/<class>/<number>.png`: noise, with a colour of the class where it is `visible`."""
    rng = np.random.default_rng(seed)
    for place, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (32, 32, 3))
            if visible:
                pixels[..., place] = pixels[..., place] // 4 + 190
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")
    return folder


def small(path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = small_vit()
    if seed:
        for value in model.parameters():
            value.data += 0.02 * torch.randn_like(value)
    torch.save(model.state_dict(), path)
    return path


def record(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / "eval" / "0000000" / f"{name}.json").read_text())


def test_where_one_class_is_most_of_the_data_it_is_spoken_of_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "noise", {"many": 180, "few": 12, "rare": 8}, visible=False)
    weights = small(tmp_path / "small.pth")
    where = [f"weights={weights}", f"out={tmp_path / 'out'}", "own.test_share=0.2"]
    assert main(["eval", str(data), *where, *FAST]) == 0
    shown = capsys.readouterr()
    found = record(tmp_path / "out", "noise")
    assert found["majority"] == pytest.approx(36 / 40)
    assert found["against"]["majority class"]["verdict"] != "better"
    assert any(line.startswith("largest class: logistic") for line in found["warnings"])
    assert "warning: largest class: logistic" in shown.err
    first = found["rows"][0]
    assert np.sum(first["details"]["confusion"]) == 40
    assert [each["n"] for each in first["details"]["classes"]] == [2, 36, 2]
    assert first["details"]["micro and macro"]["mean per class"] < 0.7
    page = (tmp_path / "out/eval/0000000/report.html").read_text()
    assert "Not better than always naming the largest class (90.0 %)" in " ".join(re.sub("<[^>]+>", "", page).split())
    assert "said to be" in page or "columns what was said" in page
    assert page.count("held out, seed 0") == 1
    assert not (tmp_path / "out/eval/0000000/.unfinished").exists()


def test_pictures_that_are_all_black_are_measured_to_the_end_and_doubted(tmp_path: Path) -> None:
    folder = tmp_path / "black"
    for name in ("a", "b"):
        (folder / "train" / name).mkdir(parents=True)
        (folder / "test" / name).mkdir(parents=True)
        for number in range(12):
            for split in ("train", "test"):
                Image.new("RGB", (40 + number, 32)).save(folder / split / name / f"{number}.png")
    weights = small(tmp_path / "small.pth")
    assert main(["eval", str(folder), f"weights={weights}", f"out={tmp_path / 'out'}", *FAST]) == 0
    found = record(tmp_path / "out", "black")
    assert {row["protocol"] for row in found["rows"]} == {
        "logistic regression",
        "weighted k-NN",
        "few-shot and label efficiency",
    }
    assert {row["value"] for row in found["rows"]} == {0.5}
    names = {line.partition(":")[0] for line in found["warnings"]}
    assert names >= {"equal features", "all the same", "largest class", "few test images"}
    assert any("every value 0" in line for line in found["warnings"])


def test_weights_in_one_folder_and_runs_of_one_report_are_compared_on_the_same_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "colours", {"red": 40, "green": 40, "blue": 40}, visible=True)
    common = ["baselines=false", "protocols=logistic", "own.test_share=0.2", *FAST[1:]]
    weights = [small(tmp_path / f"{name}.pth", seed) for seed, name in enumerate(("one", "two"))]
    for path in weights:
        assert main(["eval", str(data), f"weights={path}", f"out={tmp_path / 'both'}", *common]) == 0
        alone = tmp_path / f"run_{path.stem}"
        assert main(["eval", str(data), f"weights={path}", f"out={alone}", *common]) == 0
    said = r"(better|worse) by [\d.]+ points \[[\d., ]+\]|not shown with 24 images|no difference"
    assert re.search(
        rf"logistic regression, top-1: two [\d.]+ % against one [\d.]+ %: ({said})", capsys.readouterr().err
    )
    page = (tmp_path / "both/eval/0000000/report.html").read_text()
    assert "Weights on the same images" in page
    assert re.search(said, page)
    runs = [str(tmp_path / f"run_{path.stem}") for path in weights]
    for run in runs:
        (Path(run) / "config.yaml").write_text("seed: 0\n")
    assert main(["report", *runs, f"out={tmp_path / 'compared.html'}"]) == 0
    assert re.search(said, (tmp_path / "compared.html").read_text())
    # Nothing is paired where the test images are others.
    assert (
        main(["eval", str(data), f"weights={weights[1]}", f"out={runs[1]}", *common, "own.seed=1", "overwrite=true"])
        == 0
    )
    assert main(["report", *runs, f"out={tmp_path / 'other.html'}"]) == 0
    assert "On the same test images" not in (tmp_path / "other.html").read_text()


def test_replicates_are_kept_to_the_bit_of_every_row_of_the_model() -> None:
    first, second = row(np.arange(50) % 3 == 0), row(np.arange(50) % 2 == 0, variant="k = 5")
    kept = Result.from_dict(json.loads(json.dumps(Result("x", "k", (first, second), {}).as_dict()))).rows
    assert [each.replicates for each in kept] == [first.replicates, second.replicates]
