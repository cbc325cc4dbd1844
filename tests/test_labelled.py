"""Labelled images of one's own: splits, classes, masks and tables are told apart, or what may be either is refused."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from dinoreg.data.labelled import LabelledImages
from dinoreg.data.open import open_source, read_labelled
from dinoreg.data.source import PathSource
from dinoreg.data.split_names import split_of
from dinoreg.runtime.errors import UserError


def fill(root: Path, folders: Iterable[str], count: int = 2, ending: str = "png") -> Path:
    """So many files in each folder; they are not opened."""
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (root / folder / f"{number}.{ending}").touch()
    return root


def table(root: Path, text: str, name: str = "labels.csv", pictures: Iterable[str] = ("a.png", "b.png")) -> Path:
    """A table, and the pictures that it lists."""
    for picture in pictures:
        (root / picture).parent.mkdir(parents=True, exist_ok=True)
        (root / picture).touch()
    (root / name).write_text(text, encoding="utf-8")
    return root / name


def refusal(path: Path, columns: str = "") -> str:
    with pytest.raises(UserError) as caught:
        read_labelled(path, columns=columns)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def paths(found: LabelledImages) -> list[str]:
    assert isinstance(found.source, PathSource)
    return [*found.source.paths]


def told(found: LabelledImages) -> list[tuple[str, str | None, str]]:
    """(path, split, class) of every image."""
    words = found.words or [None] * len(found.labels)
    return list(zip(paths(found), words, (found.class_names[label] for label in found.labels), strict=True))


def split_counts(found: LabelledImages) -> dict[str, int]:
    return dict(Counter(found.words or []))


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", "train Training TR trn trainval train2017 train_set training_images train-data TrainSet"),
        ("val", "val valid Validation dev DEVEL val2014 validation_set images_val"),
        ("test", "test TESTING tst eval evaluation test_set Testing-Images holdout"),
        (None, "tram trains valley testament bus unlabeled fold0 train_masks training_wheels 2017 images data set"),
    ],
)
def test_splits_go_by_their_usual_names_in_any_case(split: str | None, names: str) -> None:
    assert {name: split_of(name) for name in names.split()} == dict.fromkeys(names.split(), split)


@pytest.mark.parametrize(
    "splits", [("train", "val"), ("Training", "Testing"), ("tr", "dev", "eval"), ("train2017", "val2017")]
)
def test_a_root_of_splits_has_the_classes_below_them(tmp_path: Path, splits: tuple[str, ...]) -> None:
    fill(tmp_path, [f"{split}/{name}" for split in splits for name in ("cat", "dog")])
    found = read_labelled(tmp_path)
    assert told(found) == [
        (f"{split}/{name}/{number}.png", split_of(split), name)
        for split in sorted(splits)
        for name in ("cat", "dog")
        for number in range(2)
    ]
    assert found.warnings == []


@pytest.mark.parametrize("other", ["unlabeled", "sample", "extra/cat", "oak"])
def test_a_folder_beside_two_splits_is_left_out_and_said(tmp_path: Path, other: str) -> None:
    fill(tmp_path, ["train/cat", "train/dog", "val/cat", "val/dog", other], count=3)
    found = read_labelled(tmp_path)
    assert (found.class_names, split_counts(found)) == (["cat", "dog"], {"train": 6, "val": 6})
    (line,) = found.warnings
    assert f"{other.split('/')[0]}/ (3 images)" in line


def test_unlabelled_images_beside_a_lone_train_folder_are_left_out_and_said(tmp_path: Path) -> None:
    found = read_labelled(fill(tmp_path, ["train/cat", "train/dog", "unlabeled"]))
    assert (found.class_names, split_counts(found)) == (["cat", "dog"], {"train": 4})
    assert "unlabeled/ (2 images)" in found.warnings[0]


def test_folders_that_may_be_splits_or_classes_are_refused_until_a_list_of_classes_says_which(tmp_path: Path) -> None:
    vehicles = fill(tmp_path, ["train/steam", "train/diesel", "bus/city", "bus/coach"])
    assert "classes.txt" in refusal(vehicles)
    (vehicles / "classes.txt").write_text("bus\ntrain\n")
    found = read_labelled(vehicles)
    assert (found.class_names, found.words) == (["bus", "train"], None)
    (vehicles / "classes.txt").write_text("steam\ndiesel\n")
    found = read_labelled(vehicles)
    assert (found.class_names, split_counts(found)) == (["diesel", "steam"], {"train": 4})
    assert "bus/ (4 images)" in found.warnings[0]


def test_a_class_that_is_called_like_a_split_is_one_where_it_holds_images_and_no_folders(tmp_path: Path) -> None:
    found = read_labelled(fill(tmp_path, ["train", "bus", "car"]))
    assert (found.class_names, found.words) == (["bus", "car", "train"], None)
    assert "train/ is taken as a class" in found.warnings[0]


@pytest.mark.parametrize(
    ("folders", "what"),
    [
        (["train", "val"], "lies in a split but in no class"),
        (["train", "val", "unlabeled"], "lies in a split but in no class"),
        (["train/cat", "train/dog", "test"], "lies in a split but in no class"),
        (["train", "unlabeled"], "may be a split or a class"),
        (["train", "train_masks"], "may be a split or a class"),
        (["tr/2019", "de/2019"], "may be a split or a class"),
        (["val/cat", "test/cat", "val/dog"], "no train/"),
        (["test/cat", "test/dog"], "no train/"),
        (["cat"], "expected one per class"),
        (["train/cat", "val/cat"], "expected one per class"),
    ],
)
def test_splits_without_classes_and_classes_without_others_are_refused(
    tmp_path: Path, folders: list[str], what: str
) -> None:
    assert what in refusal(fill(tmp_path, folders))


def test_folders_in_folders_of_the_same_name_are_gone_into(tmp_path: Path) -> None:
    fill(tmp_path, [f"{split}/{split}/{name}" for split in ("training_set", "test_set") for name in ("cat", "dog")])
    found = read_labelled(tmp_path)
    assert (found.class_names, split_counts(found)) == (["cat", "dog"], {"train": 4, "test": 4})


def test_the_one_folder_in_which_everything_lies_is_gone_into_and_said(tmp_path: Path) -> None:
    found = read_labelled(fill(tmp_path, ["archive/pets/train/cat", "archive/pets/train/dog", "archive/pets/val/cat"]))
    assert (found.class_names, split_counts(found)) == (["cat", "dog"], {"train": 4, "val": 2})
    assert "archive/pets/" in found.warnings[0]


def test_splits_inside_of_the_classes_are_splits(tmp_path: Path) -> None:
    fill(tmp_path, [f"{name}/{split}" for name in ("bottle", "cable") for split in ("train/good", "test/broken")])
    found = read_labelled(tmp_path)
    assert (found.class_names, split_counts(found)) == (["bottle", "cable"], {"train": 4, "test": 4})


@pytest.mark.parametrize("masks", ["masks", "lung_masks", "GT", "Segmentation", "ground_truth", "annotations"])
def test_masks_in_folders_beside_a_class_s_pictures_are_no_pictures(tmp_path: Path, masks: str) -> None:
    found = read_labelled(
        fill(tmp_path, [f"{name}/{kind}" for name in ("Covid", "Normal") for kind in ("images", masks)])
    )
    assert paths(found) == [f"{name}/images/{number}.png" for name in ("Covid", "Normal") for number in range(2)]
    (line,) = found.warnings
    assert "4 images" in line
    assert masks in line


def test_masks_that_are_called_after_their_picture_are_no_pictures(tmp_path: Path) -> None:
    fill(tmp_path, ["benign", "malignant"])
    for name in ("benign/0_mask.png", "benign/0_mask_1.png", "malignant/1_segmentation.png"):
        (tmp_path / name).touch()
    (tmp_path / "malignant" / "white_mask.png").touch()  # a picture: there is no "white.png"
    found = read_labelled(tmp_path)
    assert sorted(paths(found)) == [
        *("benign/0.png", "benign/1.png"),
        *("malignant/0.png", "malignant/1.png", "malignant/white_mask.png"),
    ]
    assert "3 images" in found.warnings[0]


def test_other_folders_that_repeat_below_the_classes_are_said(tmp_path: Path) -> None:
    fill(tmp_path, [f"{name}/{kind}" for name in ("cat", "dog") for kind in ("original", "augmented")])
    found = read_labelled(tmp_path)
    assert len(found.labels) == 8
    assert "augmented/, original/" in found.warnings[0]
    tiny = read_labelled(fill(tmp_path / "tiny", [f"{name}/images" for name in ("n01", "n02")]))
    assert (tiny.class_names, tiny.warnings) == (["n01", "n02"], [])


def test_litter_and_empty_folders_are_no_classes(tmp_path: Path) -> None:
    fill(tmp_path, ["cat", "dog", "__MACOSX/cat", ".ipynb_checkpoints", "cat/.ipynb_checkpoints", "@eaDir/0.png"])
    (tmp_path / "owl").mkdir()
    (tmp_path / "Thumbs.db").touch()
    found = read_labelled(tmp_path)
    assert (len(found.labels), found.class_names, found.warnings) == (4, ["cat", "dog"], [])


def test_classes_that_differ_in_case_only_are_said(tmp_path: Path) -> None:
    found = read_labelled(fill(tmp_path, ["train/Cat", "train/dog", "val/cat", "val/dog"]))
    assert found.class_names == ["Cat", "cat", "dog"]
    assert "'Cat', 'cat'" in found.warnings[0]


def test_a_list_of_classes_beside_folders_says_what_is_absent_and_what_is_too_many(tmp_path: Path) -> None:
    fill(tmp_path, ["cat", "dog", "junk"])
    (tmp_path / "classes.txt").write_text("cat\ndog\nowl\n")
    found = read_labelled(tmp_path)
    assert (found.class_names, len(found.labels)) == (["cat", "dog"], 4)
    assert any("owl" in line for line in found.warnings)
    assert any("junk (2 images)" in line for line in found.warnings)


def test_linked_names_of_one_folder_are_classes_and_splits_each(tmp_path: Path) -> None:
    pool = fill(tmp_path / "pool", ["cats", "dogs"])
    for link, target in (("words/cats", "cats"), ("words/felines", "cats"), ("words/dogs", "dogs")):
        (tmp_path / link).parent.mkdir(exist_ok=True)
        (tmp_path / link).symlink_to(pool / target)
    assert read_labelled(tmp_path / "words").class_names == ["cats", "dogs", "felines"]
    (tmp_path / "splits").mkdir()
    for split in ("train", "test"):
        (tmp_path / "splits" / split).symlink_to(pool)
    found = read_labelled(tmp_path / "splits")
    assert (found.class_names, split_counts(found)) == (["cats", "dogs"], {"train": 4, "test": 4})
    (tmp_path / "words" / "dogs" / "up").symlink_to(tmp_path / "words")  # in a circle
    assert read_labelled(tmp_path / "words").class_names == ["cats", "dogs", "felines"]


# ------------------------------------------------------------------------------------------------------------
# Tables

SAME = [("a.png", None, "x"), ("b.png", None, "y")]


@pytest.mark.parametrize(
    "text",
    [
        "path,label\na.png,x\nb.png,y\n",
        "\ufeffpath,label\r\na.png,x\r\nb.png,y\r\n",
        "label, path\nx, a.png\ny , b.png\n",
        ' "path" , "label" \n "a.png", "x"\n"b.png" ,y\n',
        "Path,Label\na.png,x\nb.png,y\n\n",
        "path;label\na.png;x\nb.png;y\n",
        "path\tlabel\na.png\tx\nb.png\ty\n",
        "filename,class\na.png,x\nb.png,y\n",
        "target,image_path\nx,a.png\ny,b.png\n",
        "img,category\n./a.png,x\n.//b.png,y\n",
        "ImageId,species\na.png,x\nb.png,y\n",
        ",path,label\n0,a.png,x\n1,b.png,y\n",
        "a.png,x\nb.png,y\n",
        "x,a.png\ny,b.png\n",
        "path,label\na.png,x,\nb.png,y,\n",
    ],
)
def test_a_table_is_read_however_it_was_written(tmp_path: Path, text: str) -> None:
    path = table(tmp_path, text)
    assert told(read_labelled(path)) == SAME
    assert [os.path.basename(open_source(path).name(index)) for index in range(2)] == ["a.png", "b.png"]


def test_backslashes_part_folders_unless_a_file_is_called_so(tmp_path: Path) -> None:
    path = table(tmp_path, "path,label\nim\\a.png,x\nb\\b.png,y\n", pictures=("im/a.png", "b\\b.png"))
    assert paths(read_labelled(path)) == ["im/a.png", "b\\b.png"]


def test_a_list_with_labels_behind_its_paths_is_a_table(tmp_path: Path) -> None:
    path = table(tmp_path, "a.png 0\nsp ace.png\t1\n", "train.txt", ("a.png", "sp ace.png"))
    assert told(read_labelled(path)) == [("a.png", None, "0"), ("sp ace.png", None, "1")]
    assert len(open_source(path)) == 2
    plain = table(tmp_path, "a.png\nsp ace.png\n", "plain.txt")
    assert [os.path.basename(open_source(plain).name(index)) for index in range(2)] == ["a.png", "sp ace.png"]
    assert "no column label" in refusal(plain)


def test_the_first_row_of_a_table_without_names_is_a_row(tmp_path: Path) -> None:
    path = table(tmp_path, "a.gif,0,train\nb.png,1,test\n", pictures=("a.gif", "b.png"))
    found = read_labelled(path)
    assert told(found) == [("a.gif", "train", "0"), ("b.png", "test", "1")]
    assert "first line" in found.warnings[0]
    odd = table(tmp_path, "scan.raw,0\nb.png,1\n", "odd.csv", ("scan.raw", "b.png"))  # a file, whatever its ending
    assert paths(read_labelled(odd)) == ["scan.raw", "b.png"]


def test_named_columns_are_taken_and_others_left_out(tmp_path: Path) -> None:
    text = "id,shot,breed,age,phase\n0,a.png,x,3,train\n1,b.png,y,4,test\n"
    path = table(tmp_path, text)
    assert "breed is 'x', expected 1, 0 or -1" in refusal(path, "path:shot,split:phase")  # all others are labels
    found = read_labelled(path, columns="path:shot,label:breed,split:phase")
    assert told(found) == [("a.png", "train", "x"), ("b.png", "test", "y")]
    assert "no column 'breeed'" in refusal(path, "label:breeed")
    several = read_labelled(
        table(tmp_path, "f,sun,rain\na.png,1,0\nb.png,,1\n", "s.csv"), columns="label:sun,label:rain"
    )
    assert (several.class_names, several.labels.tolist()) == (["sun", "rain"], [[1, 0], [-1, 1]])
    for wrong in ("path=shot", "file:shot", "split:phase,split:id", "path:"):
        with pytest.raises(UserError, match="expected columns as path:NAME"):
            read_labelled(path, columns=wrong)


def test_two_columns_that_may_hold_the_paths_are_refused(tmp_path: Path) -> None:
    path = table(tmp_path, "image,filename,label\na.png,b.png,x\nb.png,a.png,y\n", "two.csv")
    assert "'image' and 'filename'" in refusal(path)


@pytest.mark.parametrize(
    ("labels", "classes", "said"),
    [
        (["1", "1.0", "01", "2", " 2"], ["1", "2"], "1, 1.0, 01"),
        (["1.0", "2.0", "10.0"], ["1", "2", "10"], ""),
        (["01", "02", "10"], ["01", "02", "10"], ""),
        (["Cat", "cat", "Dog "], ["Cat", "Dog", "cat"], "'Cat', 'cat'"),
        (["1", "1.0", "cat"], ["1", "1.0", "cat"], "1, 1.0"),
        (["caf\u00e9", "cafe\u0301", "bar"], ["bar", "caf\u00e9"], ""),
        (["None", "scratch"], ["None", "scratch"], "'None'"),
    ],
)
def test_spellings_of_a_label_are_one_class_where_that_is_certain_and_said_where_not(
    tmp_path: Path, labels: list[str], classes: list[str], said: str
) -> None:
    pictures = [f"{number}.png" for number in range(len(labels))]
    rows = "".join(f"{picture},{label}\n" for picture, label in zip(pictures, labels))
    found = read_labelled(table(tmp_path, f"path,label\n{rows}", pictures=pictures))
    assert found.class_names == classes
    assert len(found.warnings) == bool(said)
    assert said in "".join(found.warnings)


@pytest.mark.parametrize("cell", ["", "NaN", "nan", "<NA>", '" "'])
def test_a_label_that_is_missing_is_an_error_with_its_line(tmp_path: Path, cell: str) -> None:
    assert "line 3: the label is" in refusal(table(tmp_path, f"path,label\na.png,x\nb.png,{cell}\n"))


@pytest.mark.parametrize("column", ["split", "set", "Subset", "usage"])
def test_splits_of_a_table_go_by_their_usual_names(tmp_path: Path, column: str) -> None:
    path = table(tmp_path, f"path,label,{column}\na.png,x,Training\nb.png,y,Dev\n")
    assert read_labelled(path).words == ["train", "val"]


def test_a_column_that_is_not_all_splits_is_none(tmp_path: Path) -> None:
    assert "unknown column 'set'" in refusal(table(tmp_path, "path,label,set\na.png,x,train\nb.png,y,blue\n"))


def test_parquet_says_the_same_as_text(tmp_path: Path) -> None:
    table(tmp_path, "")
    rows = {"file_name": ["a.png", "b.png"], "class": [1.0, 2.0], "split": ["train", "valid"]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "t.parquet")
    assert told(read_labelled(tmp_path / "t.parquet")) == [("a.png", "train", "1"), ("b.png", "val", "2")]
    assert len(open_source(tmp_path / "t.parquet")) == 2
    pyarrow.parquet.write_table(pyarrow.table({**rows, "class": [1.0, None]}), tmp_path / "n.parquet")
    assert "row 2: the label is empty" in refusal(tmp_path / "n.parquet")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("path,label\na.png,x\n", "every image has the label 'x'"),
        ("path,label\na.png,x,1\nb.png,y\n", "line 2: 3 fields, expected 2"),
        ("path,label\na.png\nb.png,y\n", "line 2: 1 fields, expected 2"),
        ("where,what\n1,x\n2,y\n", "no column path"),
        ("", "lists no images"),
        ("path,label\n", "lists no images"),
        ("path,label\nc.png,x\nb.png,y\n", "c.png is missing"),
        ("path,label\n../c.png,x\nb.png,y\n", "leaves"),
        ("path,label\na.png,x\n./a.png,y\n", "line 3: a.png is listed before, in line 2"),
    ],
)
def test_what_is_wrong_with_a_table_is_told_in_one_line(tmp_path: Path, text: str, what: str) -> None:
    assert what in refusal(table(tmp_path, text))


def test_classes_of_a_list_that_no_row_has_are_said(tmp_path: Path) -> None:
    path = table(tmp_path, "path,label\na.png,cat\nb.png,dog\n")
    (tmp_path / "classes.txt").write_text("cat\ndog\nowl\n")
    found = read_labelled(path)
    assert found.class_names == ["cat", "dog", "owl"]
    assert "owl" in found.warnings[0]


def test_identifiers_without_an_ending_are_those_of_the_one_picture_so_called(tmp_path: Path) -> None:
    pictures = ("a.png", "b.v2.JPG", "c.png", "c.jpg", "d.txt")
    file = table(tmp_path, "image,label\na,0\nb.v2,1\n", pictures=pictures)
    assert paths(read_labelled(file)) == ["a.png", "b.v2.JPG"]
    for name in ("c", "d", "e"):
        file = table(tmp_path, f"image,label\na,0\n{name},1\n", pictures=pictures)
        assert f"/{name} is missing" in refusal(file)


def test_two_identifiers_of_one_picture_are_refused(tmp_path: Path) -> None:
    assert "a.png" in refusal(table(tmp_path, "image,label\na,0\na.png,1\n"))
