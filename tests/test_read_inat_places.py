"""iNaturalist 2018 and Places205: lists are joined and split as they say, and what is absent is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision import datasets

from dinoreg.config.bundled import bundled
from dinoreg.data.open import open_source
from dinoreg.data.statistics import inspect_source
from dinoreg.evaluation.benchmark import Benchmark, load_benchmark
from dinoreg.evaluation.data import Data
from dinoreg.evaluation.features.images import read_rgb
from dinoreg.runtime.errors import UserError
from tests.miniatures import inat2018, places205

INAT, PLACES = (load_benchmark(bundled("eval") / f"{name}.py") for name in ("inat2018", "places205"))


def read(benchmark: Benchmark, root: Path, **options: Any) -> Data:
    return benchmark.tasks[0].read(benchmark.find(root), benchmark.option_values(options))


def pairs(data: Data, split: str) -> list[tuple[str, int]]:
    part = data.splits[split]
    return [(part.source.name(index), int(part.labels[index])) for index in range(len(part))]


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_inat_joins_images_and_annotations_by_identity_not_by_place(tmp_path: Path) -> None:
    folder = inat2018.write(tmp_path, per_class=6)
    data = read(INAT, tmp_path)
    for split, count in (("train", 18), ("test", 9)):
        found = pairs(data, split)
        assert len(found) == count
        for name, label in found:  # the folder of an image is its category
            assert int(Path(name).parent.name) == label
    assert data.class_names == [name for _, name in inat2018.CATEGORIES]
    content = json.loads((folder / "train2018.json").read_text())
    by_place = [each["category_id"] for each in content["annotations"]]
    assert by_place != data.splits["train"].labels.tolist()


def test_torchvision_finds_the_same_labels_on_inats_tree_but_cannot_tell_the_splits(tmp_path: Path) -> None:
    folder = inat2018.write(tmp_path / "ours", per_class=4)
    shutil.copytree(folder / "train_val2018", tmp_path / "theirs/2018")
    theirs = datasets.INaturalist(str(tmp_path / "theirs"), version="2018")
    expected = {name: label for label, name in theirs.index}
    data = read(INAT, tmp_path / "ours")
    found = {Path(name).name: label for split in ("train", "test") for name, label in pairs(data, split)}
    assert found == expected
    assert len(theirs) == len(data.splits["train"]) + len(data.splits["test"])


def test_inats_labels_are_the_ranks_of_its_identifiers(tmp_path: Path) -> None:
    folder = inat2018.write(tmp_path, per_class=2)
    before = read(INAT, tmp_path)

    def renumber(content: dict[str, Any]) -> None:
        for each in content["annotations"]:
            each["category_id"] = 10 * each["category_id"] + 5
        for each in content["categories"]:
            each["id"] = 10 * each["id"] + 5

    for split in ("train", "val"):
        edit(folder / f"{split}2018.json", renumber)
    after = read(INAT, tmp_path)
    assert pairs(after, "test") == pairs(before, "test")
    assert after.class_names == before.class_names


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda c: c["annotations"].pop(), "has no annotation"),
        (lambda c: c["annotations"].append(dict(c["annotations"][0])), "two annotations of one image"),
        (lambda c: c["images"][0].update(id=c["images"][1]["id"]), "two images of one id"),
        (lambda c: c["annotations"][0].update(category_id=8142), "of category 8142, which is out of range"),
        (lambda c: c["annotations"][0].update(category_id="oak"), "no annotations with image_id and category_id"),
        (lambda c: c.pop("annotations"), "no annotations with image_id and category_id"),
        (lambda c: c.pop("categories"), "no list of categories"),
        (lambda c: c["images"][0].pop("file_name"), "no images with id and file_name"),
        (lambda c: c["images"][0].update(file_name="../../secret.jpg"), r"'\.\./\.\./secret\.jpg' leaves"),
        (lambda c: c["images"][0].update(file_name="/etc/passwd"), "'/etc/passwd' leaves"),
        (lambda c: c["images"][0].update(file_name="train_val2018/no.jpg"), r"no\.jpg is missing.*train_val2018\.tar"),
    ],
)
def test_a_damaged_file_of_inat_is_named_in_one_line(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], what: str
) -> None:
    edit(inat2018.write(tmp_path, per_class=2) / "train2018.json", change)
    with pytest.raises(UserError, match=what) as caught:
        read(INAT, tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_no_json_or_missing_of_inat_is_named_with_its_archive(tmp_path: Path) -> None:
    folder = inat2018.write(tmp_path, per_class=2)
    for text in ("{", "[1]", "[" * 100_000):
        (folder / "val2018.json").write_text(text)
        with pytest.raises(UserError, match=r"inat2018: .*val2018\.json (cannot be read as JSON|is not the object)"):
            read(INAT, tmp_path)
    (folder / "val2018.json").unlink()
    with pytest.raises(UserError, match=r"val2018\.json is missing; it comes from val2018\.json\.tar\.gz"):
        INAT.find(tmp_path)
    shutil.rmtree(folder / "train_val2018")
    (folder / "val2018.json").write_text("{}")
    with pytest.raises(UserError, match=r"train_val2018 is missing; it comes from train_val2018\.tar\.gz"):
        INAT.find(tmp_path)


# ------------------------------------------------------------------------------------------------------------
# Places205


def test_places_reads_its_space_separated_lists_and_nested_categories(tmp_path: Path) -> None:
    folder = places205.write(tmp_path, per_class=4)
    data = read(PLACES, tmp_path)
    assert data.class_names == ["abbey", "basilica", "church/outdoor"]
    for split, listed, count in (("train", "train", 12), ("test", "val", 6)):
        rows = [
            line.split()
            for line in (folder / f"trainvalsplit_places205/{listed}_places205.csv").read_text().splitlines()
        ]
        assert len(rows) == count
        assert pairs(data, split) == [(str(folder / places205.IMAGES / name), int(label)) for name, label in rows]
        for index in range(count):
            assert read_rgb(data.splits[split].source, index).size == (48, 40)


@pytest.mark.parametrize("images", ["images256", ".", "my/pictures"])
def test_the_images_of_places_may_lie_elsewhere(tmp_path: Path, images: str) -> None:
    expected = read(PLACES, places205.write(tmp_path / "a", per_class=2).parent)
    folder = places205.write(tmp_path / "b", per_class=2, images=images)
    options = {"images": images} if images == "my/pictures" else {}
    data = read(PLACES, tmp_path / "b", **options)
    assert np.array_equal(data.splits["train"].labels, expected.splits["train"].labels)
    assert data.splits["train"].source.read(0) == expected.splits["train"].source.read(0)
    if images == "my/pictures":
        assert pairs(read(PLACES, tmp_path / "b", images=str(folder / images)), "test") == pairs(data, "test")
        with pytest.raises(
            UserError, match=r"images256/.*is missing.*imagesPlaces205_resize.*places205\.images=FOLDER"
        ):
            read(PLACES, tmp_path / "b")
        with pytest.raises(UserError, match=r"places205\.images=nowhere: .* is not a folder"):
            read(PLACES, tmp_path / "b", images="nowhere")


def test_an_absent_file_of_places_is_named(tmp_path: Path) -> None:
    places205.write(tmp_path, per_class=2, absent=True)
    with pytest.raises(UserError, match=r"a/abbey/gsun_absent\.jpg is missing; it comes from imagesPlaces205_resize"):
        read(PLACES, tmp_path)
    with pytest.raises(UserError, match=r"gsun_absent\.jpg is missing"):
        open_source(f"places205:root={tmp_path}")


def test_an_absent_file_that_no_sample_met_is_named_when_it_is_read(tmp_path: Path) -> None:
    folder = places205.write(tmp_path, per_class=12)
    data = read(PLACES, tmp_path)
    Path(data.splits["train"].source.name(1)).unlink()
    assert folder.is_dir()
    with pytest.raises(UserError, match=r"gsun_.*\.jpg: cannot be read as an image .*No such file"):
        read_rgb(read(PLACES, tmp_path).splits["train"].source, 1)


@pytest.mark.parametrize(
    ("list_name", "text", "what"),
    [
        ("train", "a/abbey/x.jpg,0\n", "expected a file, a space and the number of its class"),
        ("train", "a/abbey/x.jpg 3\n", r"the class of a/abbey/x\.jpg is 3, expected 0\.\.2"),
        ("train", "a/abbey/x.jpg abbey\n", "is 'abbey', expected a whole number"),
        ("train", "../../secret.jpg 0\n", "leaves"),
        ("train", "/etc/passwd 0\n", "leaves"),
        ("train", "\n\n", "lists no images"),
        ("categoryIndex", "/a/abbey 0\n/b/basilica 0\n", "two classes have the number 0"),
        ("categoryIndex", "/a/abbey 0\n/b/basilica 2\n", r"are not 0\.\.1"),
        ("categoryIndex", "/a/abbey 205\n", r"expected 0\.\.204"),
    ],
)
def test_a_damaged_list_of_places_is_named_in_one_line(tmp_path: Path, list_name: str, text: str, what: str) -> None:
    folder = places205.write(tmp_path, per_class=2)
    (folder / f"trainvalsplit_places205/{list_name}_places205.csv").write_text(text)
    with pytest.raises(UserError, match=what) as caught:
        read(PLACES, tmp_path)
    assert "\n" not in str(caught.value)


def test_places_has_205_classes_without_its_index_and_its_lists_are_needed(tmp_path: Path) -> None:
    folder = places205.write(tmp_path, per_class=2)
    (folder / "trainvalsplit_places205/categoryIndex_places205.csv").unlink()
    data = read(PLACES, tmp_path)
    assert (data.splits["train"].num_classes, len(data.class_names)) == (205, 205)
    (folder / "trainvalsplit_places205/val_places205.csv").unlink()
    with pytest.raises(UserError, match=r"val_places205\.csv is missing; it comes from trainvalsplit_places205\.tar"):
        PLACES.find(tmp_path)


# ------------------------------------------------------------------------------------------------------------
# As sources


def test_both_are_sources_by_split(tmp_path: Path) -> None:
    inat2018.write(tmp_path, per_class=4)
    places205.write(tmp_path, per_class=4, images="elsewhere")
    for benchmark, spec, options in (
        (INAT, f"inat2018:root={tmp_path}", {}),
        (PLACES, f"places205:root={tmp_path},images=elsewhere", {"images": "elsewhere"}),
    ):
        data = read(benchmark, tmp_path, **options)
        for split, named in (("train", ""), ("train", ",split=train"), ("test", ",split=val")):
            source = open_source(spec + named)
            assert [source.name(i) for i in range(len(source))] == [name for name, _ in pairs(data, split)]
        found = inspect_source(spec)
        assert (found["images"], found["formats"], found["bad"]) == (12, {"JPEG": 12}, {})
    with pytest.raises(UserError, match=r"split=test: expected train or val"):
        open_source(f"inat2018:root={tmp_path},split=test")
    with pytest.raises(UserError, match=r"inat2018 has no option 'images', expected root, split"):
        open_source(f"inat2018:root={tmp_path},images=x")


def test_a_source_needs_only_the_files_of_its_own_split(tmp_path: Path) -> None:
    (inat2018.write(tmp_path, per_class=2) / "val2018.json").unlink()
    assert len(open_source(f"inat:root={tmp_path}")) == 6
    with pytest.raises(UserError, match=r"val2018\.json is missing"):
        open_source(f"inat:root={tmp_path},split=val")


def test_shuffled_labels_say_nothing_about_the_pictures_and_stay_balanced(tmp_path: Path) -> None:
    for module, benchmark in ((inat2018, INAT), (places205, PLACES)):
        module.write(tmp_path / "plain", per_class=6)
        module.write(tmp_path / "shuffled", per_class=6, shuffled=True)
        plain, shuffled = (read(benchmark, tmp_path / name).splits["train"] for name in ("plain", "shuffled"))
        assert np.bincount(shuffled.labels).tolist() == [6, 6, 6]
        same = [plain.source.read(i) == shuffled.source.read(i) for i in range(len(plain))]
        assert 0 < sum(same) < len(same)  # some pictures are where another class claims to be
