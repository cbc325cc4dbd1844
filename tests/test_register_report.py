"""`dinoreg registers` as a whole: what it finds in planted, clean and trained-like models, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import BLOCK, UNIT, patchy_images, planted_vit, save, write_images

import dinoreg
from dinoreg.commands.main import main
from dinoreg.commands.options import RegistersOptions
from dinoreg.commands.registers import common_size, encoders_of, read_pictures
from dinoreg.data.preprocess import Preprocessing
from dinoreg.evaluation.backbones.encoder import wrap
from dinoreg.registers.measure import Pictures, measure
from dinoreg.registers.page import comparison, judge
from dinoreg.runtime.errors import RunError, UserError
from dinoreg.visualize.subject import open_subject


def pictures(count: int = 40, **options: Any) -> Pictures:
    images, _ = patchy_images(count)
    return Pictures(images, **{"labels": None, "classes": 0, "boxes": None, "source": "patchy"} | options)


def records(page: Path) -> list[dict[str, Any]]:
    return json.loads((page.parent / "registers" / "view.json").read_text())["models"]


def test_planted_outliers_are_found_where_they_are_and_a_clean_model_has_none() -> None:
    planted, clean = (measure(wrap(planted_vit(norm), "m"), pictures()) for norm in (60.0, 0.0))  # type: ignore[arg-type]
    flat = patchy_images(40)[1]
    assert torch.equal(planted.outliers, flat)
    found = planted.record
    assert found["outliers"]["kind"] == "group"
    assert found["outliers"]["share"] == pytest.approx(9 / 64)
    assert found["outliers"]["paper_share"] == 0  # 150 is another model's limit
    assert found["where"]["onset"] == BLOCK
    assert found["where"]["low_information"] == 1.0
    assert found["where"]["cosine_outliers"] > found["where"]["cosine_others"] + 0.3
    np.testing.assert_allclose(np.array(found["where"]["positions"]).ravel(), flat.float().mean(0).numpy(), atol=1e-7)
    assert found["attention"]["cls_to_outliers"] > 0.5
    assert clean.record["outliers"]["kind"] == "none"
    assert clean.record["outliers"]["patches"] == 0
    assert clean.record["where"]["onset"] is None
    assert clean.record["controls"] == []


def test_the_verdicts_are_words_that_fit() -> None:
    planted, clean = (measure(wrap(planted_vit(norm), "m"), pictures(12)).record for norm in (60.0, 0.0))  # type: ignore[arg-type]
    bad, good = judge(planted), judge(clean)
    assert (bad.tone, good.tone) == ("bad", "good")
    assert bad.headline.startswith("Outlier tokens found: 14.1 % of patches")
    assert "block 1 on (of blocks 0 to 3)" in " ".join(bad.sentences)
    assert good.headline.startswith("No outlier tokens")
    assert "small models" in " ".join(good.sentences)
    json.dumps([planted, clean], allow_nan=False)


def test_labels_add_probes_and_controls_and_boxes_add_lost() -> None:
    images, flat = patchy_images(60)
    labels = torch.arange(60) % 2
    inside = flat.view(60, 8, 8).repeat_interleave(8, 1).repeat_interleave(8, 2)  # (60, 64, 64)
    images[labels == 1, 0] //= 3  # one class lacks red
    images[:, 0][inside] = 116
    boxes = [np.array([[8.0, 8.0, 40.0, 40.0]])] * 60
    given = Pictures(images, labels, 2, boxes, "patchy")
    record = measure(wrap(planted_vit(registers=2), "m"), given).record  # type: ignore[arg-type]
    tokens = [probe["token"] for probe in record["probes"]]
    assert tokens == ["CLS", "register 1", "register 2", "mean patch", "normal patch", "outlier patch"]
    scores = {probe["token"]: probe["accuracy"] for probe in record["probes"]}
    assert scores["mean patch"] > 0.9
    difference = record["probes"][-1]["against"]["difference"]
    assert difference == pytest.approx(scores["outlier patch"] - scores["normal patch"])
    assert [row["kind"] for row in record["controls"]] == ["as it is", "zero", "mean", "noise", "shuffle"] * 2
    assert {row["what"] for row in record["controls"]} == {"registers", "outliers"}
    untouched = record["controls"][0]
    assert untouched["cls_cosine"] == pytest.approx(1.0, abs=1e-5)
    assert untouched["patch_accuracy"] == pytest.approx(scores["mean patch"])
    found = record["discovery"]
    assert set(found["sweep"]) == {str(-step / 10) for step in range(10)}
    assert found["CorLoc"] == max(found["sweep"].values())
    assert 0 <= found["whole_image_box"] <= 1


@pytest.mark.parametrize(("zero", "others", "said"), [(0.3, 0.79, True), (0.3, 0.4, False), (0.78, 0.8, False)])
def test_zeroing_that_harms_where_other_replacements_do_not_is_put_in_words(
    zero: float, others: float, said: bool
) -> None:
    record = measure(wrap(planted_vit(norm=0, registers=2), "m"), pictures(6)).record  # type: ignore[arg-type]
    for row in record["controls"]:
        row["cls_accuracy"] = {"as it is": 0.8, "zero": zero}.get(row["kind"], others)
    words = " ".join(judge(record).sentences)
    assert ("needed there more than what it holds" in words) == said
    assert f"changes by {100 * (zero - 0.8):+.1f} points" in words


def test_registers_that_are_copies_are_called_so() -> None:
    model = planted_vit(norm=0, registers=3)
    with torch.no_grad():
        model.register_tokens.fill_(0.1)
    record = measure(wrap(model, "m"), pictures(6)).record  # type: ignore[arg-type]
    assert record["registers_alike"] == pytest.approx(1.0, abs=1e-5)
    assert "copies of one another" in " ".join(judge(record).sentences)


def test_norms_that_are_not_finite_end_the_report() -> None:
    model = planted_vit()
    with torch.no_grad():
        model.blocks[3].mlp.fc2.bias[0] = float("inf")
    with pytest.raises(RunError, match="not finite"):
        measure(wrap(model, "broken"), pictures(4))  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_command_compares_models_and_cleans_the_planted_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [save(planted_vit(), tmp_path / "planted.safetensors")]
    files += [save(planted_vit(0, registers=1), tmp_path / "clean.safetensors")]
    folder = write_images(tmp_path / "images")
    (folder / "class_0" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    out = tmp_path / "out"
    weights = ",".join(map(str, files))
    assert main(["registers", f"weights={weights}", f"images={folder}", f"out={out}", "size=64"]) == 0
    shown = capsys.readouterr().out
    assert "planted: Outlier tokens found" in shown
    assert "clean: No outlier tokens" in shown
    assert str(out / "registers.html") in shown.replace("\n", "")
    before, after, clean = records(out / "registers.html")
    assert [each["name"] for each in (before, after, clean)] == ["planted", "planted + test-time register", "clean"]
    assert [each["num_registers"] for each in (before, after, clean)] == [0, 1, 1]
    assert before["images"] == 24
    assert before["outliers"]["kind"] == "group"
    assert after["outliers"]["patches"] == clean["outliers"]["patches"] == 0
    assert before["test_time"]["neurons"][0]["unit"] == UNIT
    assert before["test_time"]["trials"][-1]["share"] == 0
    assert after["layers"][-1]["registers"][0] > 3 * after["limit"]["median"]
    assert [probe["token"] for probe in before["probes"]] == []  # seven test images would be few, 17 to learn from
    page = (out / "registers.html").read_text()
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "torn.png" in page
    pngs = sorted(path.name for path in (out / "registers").glob("*.png"))
    assert pngs == ["maps_0.png", "maps_1.png", "maps_2.png", "norms.png", "positions.png"]


def seen_at(size: int) -> Preprocessing:
    return Preprocessing.of(None, 3, (size, size), 8, "x")


def test_scenes_come_with_classes_and_boxes(tmp_path: Path) -> None:
    request = RegistersOptions(("x",), "scenes:seed=3", num_images=5)
    found, skipped = read_pictures(request, seen_at(48))
    assert found.images.shape == (5, 3, 48, 48)
    assert found.labels is not None
    assert found.boxes is not None
    assert len(found.boxes) == len(found.labels) == 5
    assert not skipped
    for boxes in found.boxes:
        assert ((boxes >= 0) & (boxes <= 48)).all()
    again, _ = read_pictures(RegistersOptions(("x",), "scenes:seed=3,first=30000002", num_images=2), seen_at(48))
    assert torch.equal(again.images, found.images[2:4])
    assert read_pictures(RegistersOptions(("x",), "scenes", num_images=2, labels=False), seen_at(16))[0].labels is None


def test_a_folder_without_classes_is_looked_at_without_probes(tmp_path: Path, photo_folder: Path) -> None:
    found, _ = read_pictures(RegistersOptions(("x",), str(photo_folder), labels=False, num_images=6), seen_at(32))
    assert found.labels is None
    assert found.images.shape == (6, 3, 32, 32)


def test_models_of_different_patches_are_shown_a_size_that_all_of_them_divide() -> None:
    models = [open_subject(f"random:vitt{patch}_reg0", "cpu") for patch in (8, 14, 16)]
    alone = common_size(models[:1], None)
    assert [common_size(models[:count], None) for count in (2, 3)] == [alone // 56 * 56, alone // 112 * 112]


def test_models_of_one_name_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    files = [save(planted_vit(0, registers=r), tmp_path / f / "m.safetensors") for f, r in (("a", 1), ("b", 2))]
    folder = write_images(tmp_path / "images", 4)
    names = [each.record["name"] for each in dinoreg.registers(files, folder, out=tmp_path / "out", size=64).measured]
    assert names == ["m, 1 registers", "m, 2 registers"]
    rows = dict(comparison(records(tmp_path / "out" / "registers.html")))
    assert rows["registers"] == ["1", "2"]
    assert "probe: CLS" not in rows
    subjects = [open_subject(str(file), "cpu") for file in [*files, files[0], files[0]]]
    named = [each.name for each in encoders_of(subjects)]
    assert named == ["m, 1 registers", "m, 2 registers", "m, 1 registers (2)", "m, 1 registers (3)"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["images=scenes"], "weights= is missing"),
        (["weights=random:vitt8_reg0"], "images= is missing"),
        (["weights=nothing_here", "images=scenes"], "nothing_here"),
        (["weights=random:vitt8_reg0", "images=no_such_folder"], "no_such_folder"),
        (["weights=random:vitt8_reg0", "images=scenes", "size=50"], "multiple of the patch size 8"),
        (["weights=random:vitt8_reg0,random:vitt14_reg0", "images=scenes", "size=64"], "compared on the same pixels"),
        (["weights=random:vitt8_reg0", "images=scenes", "num_images=1"], "at least 2"),
        (["weights=random:vitt8_reg0", "images=scenes", "seed=-1"], "seed=-1"),
        (["weights=random:vitt8_reg0", "images=scenes", "image=scenes"], "unknown key (command line)"),
        (["weights=random:vitt8_reg0", "images=scenes", "out=taken"], "is a file"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("a file")
    assert main(["registers", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert len(error.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["taken"]


def test_images_that_cannot_be_read_are_a_failure_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "torn"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(b"not a picture")
    arguments = ["registers", "weights=random:vitt8_reg0", f"images={folder}", "size=32", f"out={tmp_path / 'out'}"]
    assert main(arguments) == 1
    assert "0 of 3 could be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_request_without_models_is_refused() -> None:
    with pytest.raises(UserError, match="weights=\\[\\]: expected"):
        RegistersOptions((), "scenes")
