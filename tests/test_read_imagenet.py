"""ImageNet-1k is read as torchvision reads it, in every layout; ImageNet-22k in both; both are sources."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import datasets
from training import read_lines, tiny_config

from dinoreg.commands.main import main
from dinoreg.config.bundled import bundled
from dinoreg.data.open import open_source
from dinoreg.data.statistics import inspect_source
from dinoreg.evaluation.benchmark import Benchmark, load_benchmark
from dinoreg.evaluation.data import Data
from dinoreg.evaluation.features.images import read_rgb
from dinoreg.runtime.errors import UserError
from dinoreg.train.loop import pretrain
from tests.miniatures import imagenet1k, imagenet22k

IN1K, IN22K = (load_benchmark(bundled("eval") / f"{name}.py") for name in ("imagenet1k", "imagenet22k"))


def read(benchmark: Benchmark, root: Path, **options: Any) -> Data:
    return benchmark.tasks[0].read(benchmark.find(root), benchmark.option_values(options))


def pairs(data: Data, split: str) -> list[tuple[str, int]]:
    part = data.splits[split]
    return [(part.source.name(index), int(part.labels[index])) for index in range(len(part))]


@pytest.mark.parametrize("meta", [True, False])
def test_imagenet_is_read_as_torchvision_reads_it_with_and_without_its_meta_file(tmp_path: Path, meta: bool) -> None:
    folder = imagenet1k.write(tmp_path, per_class=4)
    theirs = {
        "train": datasets.ImageNet(str(folder), split="train"),
        "test": datasets.ImageNet(str(folder), split="val"),
    }
    if not meta:
        (folder / "meta.bin").unlink()
    data = read(IN1K, tmp_path)
    assert list(data.splits) == ["train", "test"]
    for split, expected in theirs.items():
        assert pairs(data, split) == expected.samples
        for index in range(len(expected)):  # CMYK, grey and PNG files among them
            assert np.array_equal(np.asarray(expected[index][0]), read_rgb(data.splits[split].source, index))
    names = [names[0] for names in theirs["train"].classes] if meta else theirs["train"].wnids
    assert list(data.class_names) == names


def test_two_classes_of_one_name_stay_two(tmp_path: Path) -> None:
    imagenet1k.write(tmp_path, per_class=2)
    data = read(IN1K, tmp_path)
    assert data.class_names == ["tench", "crane", "Shetland sheepdog", "crane"]
    assert data.splits["train"].num_classes == 4
    assert set(data.splits["test"].labels.tolist()) == {0, 1, 2, 3}


def test_a_class_without_validation_images_moves_no_other_label(tmp_path: Path) -> None:
    folder = imagenet1k.write(tmp_path, per_class=4)
    before = dict(pairs(read(IN1K, tmp_path), "test"))
    shutil.rmtree(folder / "val/n01440764")
    after = dict(pairs(read(IN1K, tmp_path), "test"))
    assert after == {name: label for name, label in before.items() if "n01440764" not in name}
    (folder / "val/n00000000").mkdir()
    (folder / "val/n00000000/ILSVRC2012_val_00000001.JPEG").write_bytes(b"x")
    with pytest.raises(UserError, match=r"val has images of n00000000, of which .*train has none"):
        read(IN1K, tmp_path)


def test_a_flat_validation_folder_gets_its_classes_from_the_meta_file(tmp_path: Path) -> None:
    sorted_out = {
        os.path.basename(name): label
        for name, label in pairs(read(IN1K, imagenet1k.write(tmp_path / "a", per_class=6).parent), "test")
    }
    folder = imagenet1k.write(tmp_path / "b", per_class=6, flat_val=True)
    flat = {os.path.basename(name): label for name, label in pairs(read(IN1K, tmp_path / "b"), "test")}
    assert flat == sorted_out
    (folder / "val/ILSVRC2012_val_00050001.JPEG").write_bytes(b"x")
    with pytest.raises(UserError, match=r"00050001\.JPEG is not one of the 12 images that meta\.bin has classes"):
        read(IN1K, tmp_path / "b")
    (folder / "meta.bin").unlink()
    with pytest.raises(UserError, match=r"val has no folders of classes; expected .*or torchvision's meta\.bin in"):
        read(IN1K, tmp_path / "b")


def test_dinov2s_tables_give_the_same_images_and_labels_in_their_own_order(tmp_path: Path) -> None:
    listed = read(IN1K, imagenet1k.write(tmp_path / "a", per_class=4).parent)
    imagenet1k.write(tmp_path / "b", per_class=4, extra=True, meta=False)
    data = read(IN1K, tmp_path / "b")
    for split in ("train", "test"):
        expected = {name.removeprefix(str(tmp_path / "a")): label for name, label in pairs(listed, split)}
        found = {name.removeprefix(str(tmp_path / "b")): label for name, label in pairs(data, split)}
        assert found == expected
        assert list(found) != list(expected)
    assert data.class_names == ["tench", "crane", "Shetland sheepdog", "crane"]  # of labels.txt
    shutil.move(tmp_path / "b/imagenet1k/extra", tmp_path / "tables")
    elsewhere = read(IN1K, tmp_path / "b", extra=str(tmp_path / "tables"))
    assert pairs(elsewhere, "train") == pairs(data, "train")
    with pytest.raises(UserError, match=r"nowhere/entries-TRAIN\.npy is missing"):
        read(IN1K, tmp_path / "b", extra="nowhere")


def test_a_table_of_dinov2_can_name_no_path_and_hold_no_objects(tmp_path: Path) -> None:
    folder = imagenet1k.write(tmp_path, per_class=2, extra=True)
    path = folder / "extra/entries-TRAIN.npy"
    table = np.load(path)
    for table_, what in (
        (np.array([(1, "/../../x")], dtype=[("actual_index", "<u4"), ("class_id", "U9")]), "leaves"),
        (np.array([(99, "n01440764")], dtype=[("actual_index", "<u4"), ("class_id", "U9")]), "_99.JPEG is missing"),
        (table[["class_index"]], "has no columns"),
        (np.array([{}], dtype=object), "not a readable array"),
    ):
        np.save(path, table_, allow_pickle=True)
        with pytest.raises(UserError, match=what) as caught:
            read(IN1K, tmp_path)
        assert "\n" not in str(caught.value)


class _Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("harmed",))


@pytest.mark.parametrize("zipped", [True, False])
def test_the_meta_file_can_hold_nothing_but_plain_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    folder = imagenet1k.write(tmp_path, per_class=2)
    monkeypatch.chdir(tmp_path)
    good = torch.load(folder / "meta.bin", weights_only=True)
    for content in (
        (good[0], _Harm()),
        good[0],
        (good[0], [torch.zeros(2)]),
        ({"n01440764": "tench"}, good[1]),
        ({"n01440764": (3,)}, good[1]),
    ):
        torch.save(content, folder / "meta.bin", _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match=r"meta\.bin (is not the file|does not hold)") as caught:
            read(IN1K, tmp_path)
        assert "\n" not in str(caught.value)
    for damaged in (b"", b"junk", pickle.dumps(_Harm())):
        (folder / "meta.bin").write_bytes(damaged)
        with pytest.raises(UserError, match=r"meta\.bin is not the file that torchvision writes"):
            read(IN1K, tmp_path)
    assert not (tmp_path / "harmed").exists()
    torch.save(good, folder / "meta.bin", _use_new_zipfile_serialization=zipped)
    assert read(IN1K, tmp_path).class_names[0] == "tench"


def test_what_is_missing_is_named_with_its_archive(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"imagenet1k: .*imagenet1k/train is missing; .* ILSVRC2012_img_train\.tar"):
        IN1K.find(tmp_path)
    shutil.rmtree(imagenet1k.write(tmp_path) / "val")
    with pytest.raises(UserError, match=r"imagenet1k/val is missing; .* ILSVRC2012_img_val\.tar"):
        IN1K.find(tmp_path)
    with pytest.raises(UserError, match=r"imagenet22k/n\[0-9\]\*\.tar is missing; .* fall11_whole\.tar"):
        IN22K.find(tmp_path)


# ------------------------------------------------------------------------------------------------------------
# ImageNet-22k


@pytest.mark.parametrize("extra", [True, False])
def test_both_layouts_of_22k_hold_the_same_images_out(tmp_path: Path, extra: bool) -> None:
    imagenet22k.write(tmp_path / "a", per_class=9, extra=extra)
    imagenet22k.write(tmp_path / "b", per_class=9, layout="folders")
    options = {"holdout_per_class": 3, "train_per_class": 4}
    tars, folders = (read(IN22K, tmp_path / name, **options) for name in "ab")
    for split, each in (("train", 4), ("test", 3)):
        found, expected = (
            {re.split("[/:]", name)[-1]: label for name, label in pairs(data, split)} for data in (tars, folders)
        )
        assert found == expected
        assert np.bincount(list(found.values())).tolist() == [each] * 4
        assert all(imagenet22k.WNIDS[label] == name.split("_")[0] for name, label in found.items())
    assert tars.class_names == list(imagenet22k.WNIDS)
    assert tars.variant == "3 images per class held out, 4 per class to train on, seed 0"


def test_nothing_is_both_trained_on_and_held_out_and_the_seed_chooses(tmp_path: Path) -> None:
    imagenet22k.write(tmp_path, per_class=9)
    chosen = {}
    for seed in (0, 1):
        data = read(IN22K, tmp_path, holdout_per_class=3, train_per_class=0, seed=seed)
        train, test = ({name for name, _ in pairs(data, split)} for split in ("train", "test"))
        assert not train & test
        assert len(train | test) == 4 * 9
        chosen[seed] = test
    assert chosen[0] != chosen[1]
    data = read(IN22K, tmp_path, holdout_per_class=100, train_per_class=100)
    assert (len(data.splits["train"]), len(data.splits["test"])) == (4 * 5, 4 * 4)  # half of a small class at most


@pytest.mark.parametrize("layout", ["tars", "folders"])
def test_the_file_that_is_no_image_and_those_of_a_list_are_left_out(tmp_path: Path, layout: str) -> None:
    folder = imagenet22k.write(tmp_path, per_class=4, layout=layout, extra=False)
    data = read(IN22K, tmp_path)
    names = [name for split in data.splits for name, _ in pairs(data, split)]
    assert len(names) == 16
    assert not any(imagenet22k.UNREADABLE in name for name in names)
    for split in data.splits.values():
        for index in range(len(split)):
            assert read_rgb(split.source, index).size == (48, 40)
    (folder / "bad.txt").write_text("n12102133_31.JPEG\n")
    left = read(IN22K, tmp_path, skip="bad.txt")
    assert sum(len(split) for split in left.splits.values()) == 15
    with pytest.raises(UserError, match=r"absent\.txt is missing"):
        read(IN22K, tmp_path, skip="absent.txt")


def test_the_choice_is_the_same_however_many_names_are_looked_at_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = imagenet22k.write(tmp_path, per_class=5, layout="folders")
    (folder / "bad.txt").write_text("n12102133_31.JPEG\n" + "".join(f"x{number}.JPEG\n" for number in range(20)))
    whole = read(IN22K, tmp_path, skip="bad.txt")
    monkeypatch.setattr(sys.modules["dinoreg_declared_imagenet22k"], "CHUNK", 50)
    pieces = read(IN22K, tmp_path, skip="bad.txt")
    for split in ("train", "test"):
        assert pairs(pieces, split) == pairs(whole, split)
    assert len(whole.splits["train"]) + len(whole.splits["test"]) == 4 * 5 - 1


def test_22k_refuses_hold_outs_that_hold_nothing_out(tmp_path: Path) -> None:
    imagenet22k.write(tmp_path, per_class=1)
    with pytest.raises(UserError, match="no class of two images or more"):
        read(IN22K, tmp_path)
    with pytest.raises(UserError, match="holdout_per_class=0: expected a whole number, at least 1"):
        read(IN22K, tmp_path, holdout_per_class=0)
    with pytest.raises(UserError, match=r"imagenet22k\.hold: unknown option.*holdout_per_class"):
        read(IN22K, tmp_path, hold=3)


# ------------------------------------------------------------------------------------------------------------
# As sources


def test_every_layout_of_22k_is_a_source_of_all_readable_images(tmp_path: Path) -> None:
    for layout, extra in (("tars", True), ("tars", False), ("folders", False)):
        folder = imagenet22k.write(tmp_path / f"{layout}{extra}", per_class=3, layout=layout, extra=extra)
        for root in (folder, folder.parent):
            source = open_source(f"imagenet22k:root={root}")
            names = {re.split("[/:]", source.name(index))[-1] for index in range(len(source))}
            assert names == {f"{imagenet22k.WNIDS[i % 4]}_{10 + 7 * i}.JPEG" for i in range(12)}
            found = inspect_source(f"in22k:root={root}")
            assert (found["images"], found["formats"], found["bad"]) == (12, {"JPEG": 12}, {})


def test_a_part_of_22k_is_a_source_too(tmp_path: Path) -> None:
    folder = imagenet22k.write(tmp_path, per_class=3, extra=False)
    (folder / "n01440764.tar").unlink()
    assert len(open_source(f"imagenet22k:root={tmp_path}")) == 9


def test_imagenet_is_a_source_by_split(tmp_path: Path) -> None:
    folder = imagenet1k.write(tmp_path, per_class=4)
    data = read(IN1K, tmp_path)
    for spec, split in (("imagenet1k:root={}", "train"), ("in1k:root={},split=val", "test")):
        source = open_source(spec.format(tmp_path))
        assert [source.name(i) for i in range(len(source))] == [name for name, _ in pairs(data, split)]
    shutil.rmtree(folder / "val")
    assert len(open_source(f"imagenet:root={folder}")) == 16  # the validation images are not asked for
    found = inspect_source(f"imagenet1k:root={tmp_path}")
    assert (found["formats"], found["modes"]) == ({"JPEG": 15, "PNG": 1}, {"RGB": 14, "CMYK": 1, "L": 1})
    mixed = open_source([f"imagenet1k:root={tmp_path}", "scenes:count=4,size=32"], weights=[3, 1])
    assert [group.length for group in mixed.groups()] == [16, 4]


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ("imagenet22:root=/x", r"'imagenet22' is not a known kind of source, expected .*; did you mean imagenet22k\?"),
        (
            "imagenet1k:",
            r"imagenet1k needs the folder .* imagenet1k:root=FOLDER with train of ILSVRC2012_img_train",
        ),
        ("imagenet22k:split=train", "imagenet22k has no option 'split', expected root, extra, skip"),
        ("imagenet1k:root={0},splt=val", "no option 'splt', expected root, split, extra; did you mean split"),
        ("imagenet1k:root={0},split=tran", r"split=tran: expected train or val; did you mean train\?"),
        ("imagenet1k:root={0},root={0}", "root is given twice"),
        ("imagenet1k:root=/no/such/place", "root=/no/such/place is not a folder"),
        ("imagenet1k:root={0}", r"imagenet1k/train is missing; it comes from ILSVRC2012_img_train\.tar"),
        ("imagenet22k:root={0}", r"imagenet22k/n\[0-9\]\*\.tar is missing; it comes from fall11_whole\.tar"),
    ],
)
def test_a_source_that_cannot_be_opened_says_so_in_one_line(tmp_path: Path, spec: str, what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        open_source(spec.format(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_run_reads_the_tars_and_lists_their_truncated_image(tmp_path: Path) -> None:
    root = tmp_path / "a, b"  # a comma without a key behind it is part of the path
    imagenet22k.write(root, per_class=3, truncated=True)
    spec, kept = f"imagenet22k:root={root}", tmp_path / "kept"
    pretrain(tiny_config(tmp_path / "run", data__source=spec, steps=4, data__index_dir=str(kept)))
    assert len(list(kept.iterdir())) == 1
    assert [line["step"] for line in read_lines(tmp_path / "run/metrics.jsonl")] == [1, 2, 3, 4]
    assert "n12102133.tar:n12102133_87.JPEG" in (tmp_path / "run/skipped.jsonl").read_text()


def test_inspect_reads_a_dataset_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imagenet22k.write(tmp_path, per_class=3, truncated=True)
    assert main(["inspect", f"data=imagenet22k:root={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    assert "12 images, 12 looked at" in shown
    assert "bad: 1" in shown
    assert "n12102133.tar:n12102133_87.JPEG" in shown
    assert main(["inspect", "data=imagenet22k:root=/no/such/place"]) == 2
