"""Own data become benchmarks: folders, tables, masks and depth maps; every mistake in them is told in one line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from dinoreg.commands.main import main
from dinoreg.config.option import Text
from dinoreg.evaluation.benchmark import PROTOCOLS
from dinoreg.evaluation.custom.datasets import own_benchmark
from dinoreg.evaluation.custom.splits import hold_out
from dinoreg.evaluation.data import Data, DepthMaps, MultiLabelled, Segmented
from dinoreg.evaluation.features.images import read_picture, size_of
from dinoreg.runtime.errors import UserError
from tests.encoders import small_vit
from tests.miniatures import own
from tests.miniatures.pictures import pattern, save


def read(path: Path, columns: str = "", **options: Any) -> Data:
    benchmark = own_benchmark(path, options, columns)
    return benchmark.tasks[0].read(path, benchmark.option_values({}))


def refusal(path: Path, **options: Any) -> str:
    """The one line that is said about data that cannot be used, when they are opened or when pixels are read."""
    with pytest.raises(UserError) as caught:
        touch(read(path, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def touch(data: Data) -> None:
    """Read every mask and depth map."""
    for split in data.splits.values():
        for index in range(len(split)):
            if isinstance(split, Segmented):
                split.mask(index)
            elif isinstance(split, DepthMaps):
                split.depth(index)


def names(split: Any) -> list[str]:
    return [split.source.name(index) for index in range(len(split))]


def rewrite(table: Path, change: Callable[[list[list[str]]], None]) -> Path:
    with open(table, newline="") as file:
        rows = list(csv.reader(file))
    change(rows)
    with open(table, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return table


def test_a_folder_of_classes_is_read_as_torchvision_reads_it_and_a_fifth_of_each_class_is_held_out(
    tmp_path: Path,
) -> None:
    folder = own.write(tmp_path, per_class=10)
    (folder / "amber" / ".hidden.jpg").unlink()  # which torchvision would count
    data = read(folder, folds=1)
    theirs = ImageFolder(str(folder))
    ours = {
        path: label
        for split in data.splits.values()
        for path, label in zip(names(split), split.labels.tolist(), strict=True)
    }
    assert ours == dict(theirs.samples)
    assert list(data.class_names) == theirs.classes
    assert np.bincount(data.splits["test"].labels).tolist() == [4, 4, 4]
    assert np.bincount(data.splits["train"].labels).tolist() == [16, 16, 16]
    assert data.variant == "20% of each class held out, seed 0"
    assert not set(names(data.splits["train"])) & set(names(data.splits["test"]))


def test_the_hold_out_follows_its_seed_and_share(tmp_path: Path) -> None:
    folder = own.write(tmp_path, per_class=5)
    first, again, other = read(folder, folds=1), read(folder, test_share=0.2), read(folder, folds=1, seed=1)
    assert names(first.splits["test"]) == names(again.splits["test"]) != names(other.splits["test"])
    assert len(read(folder, test_share=0.5).splits["test"]) == 15
    assert "own.test_share=1.5: expected a share between 0 and 1" in refusal(folder, test_share=1.5)


def test_every_class_with_two_images_is_in_both_parts_and_a_lone_image_is_mean_count() -> None:
    groups = np.array([0] * 7 + [1] * 2 + [2] + [3] * 40)
    held = hold_out(groups, 0.2, seed=3)
    assert [int(held[groups == group].sum()) for group in range(4)] == [1, 1, 0, 8]
    held = hold_out(groups, 0.95, seed=3)
    assert [int(held[groups == group].sum()) for group in range(4)] == [6, 1, 0, 38]


def test_folders_of_splits_are_taken_as_they_are(tmp_path: Path) -> None:
    folder = own.write_splits(tmp_path, per_class=2, splits=("train", "valid", "test"))
    data = read(folder)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 6, "val": 6, "test": 6}
    assert all("/valid/" in path for path in names(data.splits["val"]))
    assert data.variant == ""
    assert data.splits["test"].labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_without_a_test_folder_the_validation_folder_is_reported_on(tmp_path: Path) -> None:
    data = read(own.write_splits(tmp_path, per_class=2, splits=("train", "val")))
    assert set(data.splits) == {"train", "test"}
    assert all("/val/" in path for path in names(data.splits["test"]))
    assert data.variant == "tested on val"


def test_a_lone_train_folder_is_split_by_hold_out(tmp_path: Path) -> None:
    data = read(own.write_splits(tmp_path, per_class=5, splits=("train",)), folds=1)
    assert np.bincount(data.splits["test"].labels).tolist() == [1, 1, 1]
    assert "held out" in data.variant


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("train", "tram"):
        for index in range(3):
            save(pattern(index, 0), tmp_path / name / f"{index}.png", "PNG")
    assert list(read(tmp_path).class_names) == ["train", "tram"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_a_table_says_the_same_in_each_of_its_formats(tmp_path: Path, suffix: str) -> None:
    table = own.write_csv(tmp_path, per_class=2)
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    other = table.with_suffix(suffix)
    if suffix == ".tsv":
        other.write_text("\n".join("\t".join(row) for row in [list(rows[0]), *(list(row.values()) for row in rows)]))
    elif suffix == ".parquet":
        pytest.importorskip("pyarrow")
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(rows), other)
    data = read(other)
    for split in ("train", "test"):
        expected = [row for row in rows if row["split"] == split]
        assert names(data.splits[split]) == [str(table.parent / row["path"]) for row in expected]
        assert [data.class_names[label] for label in data.splits[split].labels] == [row["label"] for row in expected]


def test_labels_that_are_numbers_are_ordered_as_numbers(tmp_path: Path) -> None:
    table = own.write_csv(tmp_path, per_class=2)
    numbers = {"amber": "10", "birch": "9", "cedar": "100"}
    rewrite(table, lambda rows: [row.__setitem__(1, numbers.get(row[1], row[1])) for row in rows])
    assert list(read(table).class_names) == ["9", "10", "100"]


def test_a_bar_between_labels_makes_several_of_them(tmp_path: Path) -> None:
    data = read(own.write_csv(tmp_path, per_class=2, several=True))
    split = data.splits["train"]
    assert isinstance(split, MultiLabelled)
    assert list(data.class_names) == ["amber", "birch", "cedar", "warm"]
    assert split.labels.tolist() == [[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 1]] * 2


def test_several_columns_are_several_labels_and_an_empty_cell_is_not_counted(tmp_path: Path) -> None:
    table = own.write_csv(tmp_path, per_class=1)
    lines = ["path,sun,rain,split"]
    cells = ["1,0", "0.0,1.0", ",1", "-1,0", "true,false", "0,"]
    lines += [f"pictures/{row:03d}.jpg,{cell},{'test' if row > 2 else 'train'}" for row, cell in enumerate(cells)]
    table.write_text("\n".join(lines))
    data = read(table)
    assert list(data.class_names) == ["sun", "rain"]
    assert data.splits["train"].labels.tolist() == [[1, 0], [0, 1], [-1, 1]]
    assert data.splits["test"].labels.tolist() == [[-1, 0], [1, 0], [0, -1]]
    assert [task.protocol for task in own_benchmark(table, {}).tasks] == ["multilabel"]


def test_a_hold_out_of_several_labels_balances_the_rarest(tmp_path: Path) -> None:
    table = own.write_csv(tmp_path, per_class=10, several=True, split=False)
    data = read(table, folds=1)
    assert data.splits["test"].labels.sum(axis=0).tolist() == [4, 4, 4, 8]


def test_named_columns_of_labels_leave_the_others_out(tmp_path: Path) -> None:
    table = own.write_csv(tmp_path, per_class=2)
    rewrite(table, lambda rows: [row.append("patient" if row[0] == "path" else "p1") for row in rows])
    assert "unknown column 'patient'" in refusal(table)
    data = read(table, columns="label:label")
    assert list(data.class_names) == list(own.CLASSES)


def test_classes_beside_a_table_fix_their_order(tmp_path: Path) -> None:
    table = own.write_csv(tmp_path, per_class=2)
    (table.parent / "classes.txt").write_text("cedar\noak\nbirch\namber\n")
    data = read(table)
    assert (data.splits["train"].num_classes, data.class_names[0]) == (4, "cedar")
    assert data.splits["train"].labels.tolist() == [3, 2, 0] * 2


def test_paths_may_begin_at_another_root_that_is_named(tmp_path: Path) -> None:
    table = own.write_csv(tmp_path, per_class=1)
    moved = tmp_path / "lists" / "labels.csv"
    moved.parent.mkdir()
    moved.write_text(table.read_text().replace("pictures/", f"{table.parent}/pictures/"))
    message = refusal(moved)
    assert "line 2" in message
    assert "own.root=FOLDER" in message
    assert len(read(moved, root=str(table.parent)).splits["train"]) == 3


@pytest.mark.parametrize(
    ("row", "column", "value", "expected"),
    [
        (2, 0, "../outside.jpg", "line 3: '../outside.jpg' leaves"),
        (2, 0, "/etc/passwd", "line 3: '/etc/passwd' leaves"),
        (2, 0, "", "line 3: the path is empty"),
        (2, 0, "pictures/none.jpg", "pictures/none.jpg is missing"),
        (6, 0, "pictures/000.jpg", "line 7: pictures/000.jpg is listed before, in line 2"),
        (6, 0, "./pictures//000.jpg", "line 7: pictures/000.jpg is listed before, in line 2"),
        (2, 1, "", "line 3: the label is empty"),
        (2, 2, "tset", "line 3: split 'tset'"),
        (0, 2, "spilt", "unknown column 'spilt'"),
        (0, 2, "label", "has two columns 'label'"),
    ],
)
def test_a_mistake_in_a_table_is_told_with_its_line(
    tmp_path: Path, row: int, column: int, value: str, expected: str
) -> None:
    table = own.write_csv(tmp_path, per_class=1)
    rewrite(table, lambda rows: rows[row].__setitem__(column, value))
    message = refusal(table)
    assert message.startswith(str(table))
    assert expected in message


def test_labels_out_of_range_or_unknown_are_refused(tmp_path: Path) -> None:
    table = own.write_csv(tmp_path, per_class=1)
    numbers = {"amber": "0", "birch": "1", "cedar": "3"}
    (table.parent / "classes.txt").write_text("a\nb\nc\n")
    assert "label 'amber'" in refusal(table)
    rewrite(table, lambda rows: [row.__setitem__(1, numbers.get(row[1], row[1])) for row in rows])
    assert "line 4: label 3 is out of range, expected 0..2" in refusal(table)
    (table.parent / "classes.txt").unlink()
    rewrite(table, lambda rows: rows[1].__setitem__(1, "-1"))
    assert "line 2: label -1 is out of range" in refusal(table)
    (table.parent / "classes.txt").write_text("a\na\n")
    assert "expected two or more different names" in refusal(table)


def test_indicators_are_one_zero_or_minus_one(tmp_path: Path) -> None:
    table = own.write_csv(tmp_path, per_class=1)
    table.write_text("path,sun,rain\npictures/000.jpg,1,0\npictures/001.jpg,2,0\n")
    assert "line 3: sun is '2', expected 1, 0 or -1" in refusal(table)


def test_files_that_are_no_tables_are_refused(tmp_path: Path) -> None:
    for name, content, expected in (
        ("a.csv", b"", "lists no images"),
        ("b.csv", b"path,label\n", "lists no images"),
        ("c.csv", b"path,label\na.jpg,x,y\n", "line 2: 3 fields, expected 2"),
        ("d.csv", b"\xff\xfe\x00", "is not UTF-8 text"),
        ("e.parquet", b"PAR1", "is not a readable parquet file"),
        ("f.json", b"{}", "is a file, expected a folder or a .csv"),
    ):
        (tmp_path / name).write_bytes(content)
        message = refusal(tmp_path / name)
        assert message.startswith(str(tmp_path / name))
        assert expected in message
    assert "does not exist" in refusal(tmp_path / "none")
    assert "no column 'colour'" in refusal(own.write_csv(tmp_path, per_class=1), columns="label:colour")
    assert "own.root=nowhere: is not a folder" in refusal(tmp_path / "own_table" / "labels.csv", root="nowhere")
    assert "own.tets_share: unknown option" in refusal(tmp_path / "own_table" / "labels.csv", tets_share=1)


def test_folders_that_are_neither_are_refused(tmp_path: Path) -> None:
    lone = tmp_path / "lone"
    save(pattern(0, 0), lone / "only" / "a.png", "PNG")
    assert "expected one per class" in refusal(lone)
    splits = own.write_splits(tmp_path, per_class=1)
    save(pattern(0, 0), splits / "test" / "a.png", "PNG")
    assert "lies in a split but in no class" in refusal(splits)
    (tmp_path / "empty").mkdir()
    assert "no image files" in refusal(tmp_path / "empty")


def test_masks_of_palettes_and_greys_hold_the_planted_classes(tmp_path: Path) -> None:
    folder = own.write_masks(tmp_path, per_class=2)
    data = read(folder)
    assert data.variant == "20% held out, seed 0"
    assert sum(len(split) for split in data.splits.values()) == 12
    modes = set()
    for split in data.splits.values():
        assert split.num_classes == 4
        for index, name in enumerate(names(split)):
            path = folder / "masks" / f"{Path(name).stem}.png"
            with Image.open(path) as picture:
                modes.add(picture.mode)
                assert np.array_equal(split.mask(index), np.frombuffer(picture.tobytes(), np.uint8).reshape(70, 84))
            assert split.mask(index).dtype == np.uint8
            assert size_of(read_picture(split.source, index)) == (70, 84)
    assert modes == {"P", "L"}


@pytest.mark.parametrize(("bits", "classes"), [(1, 2), (2, 4), (4, 16)])
def test_grey_masks_of_few_bits_keep_their_class_numbers(tmp_path: Path, bits: int, classes: int) -> None:
    truth = np.arange(24 * 20).reshape(20, 24) % classes
    for index in range(3):
        save(pattern(0, index, 20, 24), tmp_path / "images" / f"{index}.png", "PNG")
        path = tmp_path / "masks" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(_grey_png(truth, bits))
    split = read(tmp_path).splits["train"]
    assert split.num_classes == classes
    assert np.array_equal(split.mask(0), truth)


def _grey_png(values: np.ndarray, bits: int) -> bytes:
    """A grey PNG of few bits a pixel, put together by hand: Pillow does not write such files."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape
    unpacked = np.unpackbits(values.astype(np.uint8)[..., None], axis=2)[..., -bits:].reshape(height, -1)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in unpacked)
    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_names_of_classes_fix_their_number_and_pixels_beyond_are_refused(tmp_path: Path) -> None:
    folder = own.write_masks(tmp_path, per_class=1)
    (folder / "classes.txt").write_text("ground\nred\ngreen\nblue\n")
    data = read(folder)
    assert (data.splits["test"].num_classes, data.class_names[0]) == (4, "ground")
    (folder / "classes.txt").write_text("ground\nred\ngreen\nblue\nyellow\n")
    assert "no mask has a pixel of yellow" in refusal(folder)
    (folder / "classes.txt").write_text("ground\nred\n")
    message = refusal(folder)
    assert ", expected 0..1 or 255" in message
    assert str(folder / "masks") in message


def test_masks_that_do_not_fit_are_refused_in_one_line(tmp_path: Path) -> None:
    folder = own.write_masks(tmp_path, per_class=1)
    path = folder / "masks" / "001.png"
    good = path.read_bytes()
    save(pattern(0, 0, 70, 80).convert("L"), path, "PNG")
    assert f"{path}: is 80 x 70 pixels, its image 001.jpg is 84 x 70" in refusal(folder)
    save(pattern(0, 0, 70, 84), path, "PNG")
    assert "masks are pictures in colour" in refusal(folder)
    Image.fromarray(np.full((70, 84), 300, dtype=np.uint16)).save(path)
    assert "has the value 300, expected 0..254 or 255" in refusal(folder)
    path.write_bytes(good[:60])
    assert f"{path}: cannot be read as a mask" in refusal(folder)
    path.unlink()
    assert "images/001.jpg has no .png or " in refusal(folder)
    path.write_bytes(good)
    save(pattern(0, 0, 70, 84), folder / "images" / "001.bmp", "BMP")
    assert "belongs to two images of the same name" in refusal(folder)


def test_masks_of_one_class_are_refused(tmp_path: Path) -> None:
    for index in range(3):
        save(pattern(0, index, 20, 24), tmp_path / "images" / f"{index}.png", "PNG")
        save(Image.fromarray(np.zeros((20, 24), dtype=np.uint8)), tmp_path / "masks" / f"{index}.png", "PNG")
    assert "masks have 1 class(es), expected 2 or more" in refusal(tmp_path)


@pytest.mark.parametrize("outside", [True, False])
def test_splits_of_pairs_are_folders_outside_or_inside(tmp_path: Path, outside: bool) -> None:
    folder = own.write_masks(tmp_path, per_class=1)
    for kind in ("images", "masks"):
        for path in sorted((folder / kind).iterdir()):
            split = "test" if int(path.stem) > 3 else "train"
            place = folder / split / kind if outside else folder / kind / split
            place.mkdir(parents=True, exist_ok=True)
            path.rename(place / path.name)
        if outside:
            (folder / kind).rmdir()
    data = read(folder)
    assert data.variant == ""
    assert [Path(name).stem for name in names(data.splits["test"])] == ["004", "005"]
    assert [Path(name).stem for name in names(data.splits["train"])] == ["000", "001", "002", "003"]
    assert data.splits["test"].mask(0).shape == (70, 84)
    if not outside:
        save(pattern(0, 0, 70, 84), folder / "images" / "extra.png", "PNG")
        save(Image.fromarray(np.zeros((70, 84), dtype=np.uint8)), folder / "masks" / "extra.png", "PNG")
        assert "extra.png: lies in no split" in refusal(folder)


def test_depth_is_metres_in_every_format_and_zero_where_unknown(tmp_path: Path) -> None:
    folder = own.write_depth(tmp_path, per_class=1)
    data = read(folder, depth_unit="mm")
    found = {}
    for split in data.splits.values():
        for index, name in enumerate(names(split)):
            depth = split.depth(index)
            assert (depth.dtype, depth.shape) == (np.float32, (56, 70))
            assert (depth[:, 0] == 0).all()
            found[Path(name).stem] = depth
    # near is bright: what the picture was made from
    for stem, depth in found.items():
        brightness = np.asarray(Image.open(folder / "images" / f"{stem}.png")).mean(axis=2)
        assert np.abs(brightness[:, 1:] - (250 - 45 * depth[:, 1:])).mean() < 3
    assert {path.suffix for path in (folder / "depth").iterdir()} == {".png", ".npy", ".tiff"}


def test_depth_that_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = own.write_depth(tmp_path, per_class=1)
    png, npy = folder / "depth" / "000.png", folder / "depth" / "001.npy"
    good = png.read_bytes()
    save(pattern(0, 0, 56, 70), png, "PNG")
    message = refusal(folder)
    assert f"{png}: holds a picture of mode RGB, expected a depth (height, width) for each pixel" in message
    png.write_bytes(good)
    for values, expected in (
        (np.zeros((56, 71), dtype=np.float32), "is 71 x 56 pixels, its image 001.png is 70 x 56"),
        (np.zeros((56, 70, 2), dtype=np.int32), "holds int32 (56, 70, 2), expected a depth (height, width)"),
        (np.full((56, 70), -1.0), "holds a depth of -1, expected 0 (unknown) or more"),
        (np.array([{}]), "cannot be read as a depth map"),
    ):
        np.save(npy, values)
        message = refusal(folder)
        assert message.startswith(str(npy))
        assert expected in message


def test_masks_and_depth_beside_the_same_images_are_tasks_of_their_own(tmp_path: Path) -> None:
    folder = own.write_depth(tmp_path, per_class=1)
    (folder / "masks").mkdir()
    for index in range(6):
        Image.fromarray(np.eye(56, 70, dtype=np.uint8) + index % 2).save(folder / "masks" / f"{index:03d}.png")
    benchmark = own_benchmark(folder, {"depth_unit": 0.001})
    protocols = [("segmentation", "mIoU"), ("knn_segmentation", "mIoU"), ("depth", "RMSE")]
    assert [(task.protocol, task.metric) for task in benchmark.tasks] == protocols
    assert benchmark.task == "segmentation and depth"
    segmented, _, depth = (task.read(folder, benchmark.option_values({})) for task in benchmark.tasks)
    assert names(segmented.splits["test"]) == names(depth.splits["test"])


def test_the_benchmark_is_named_by_the_data_and_keeps_the_options_that_were_given(tmp_path: Path) -> None:
    folder = own.write(tmp_path, per_class=2)
    benchmark = own_benchmark(folder, {"seed": Text("3"), "test_share": Text("0.5")})
    assert (benchmark.name, benchmark.aliases, benchmark.classes) == ("own_folder", ("own",), 3)
    assert benchmark.splits == "6 / 6"
    values = benchmark.option_values({})
    assert (values["seed"], values["test_share"]) == (3, 0.5)
    assert [task.protocol for task in benchmark.tasks] == ["logistic", "linear", "knn", "few_shot", "attention"]
    assert [task.asked for task in benchmark.tasks] == [False] * 4 + [True]
    assert {task.read for task in benchmark.tasks} == {benchmark.tasks[0].read}
    assert {task.protocol for task in benchmark.tasks} <= set(PROTOCOLS)
    assert benchmark.tasks[1].options["augment"] is False
    assert own_benchmark(own.write_csv(tmp_path, per_class=1), {}).name == "own_table_labels"
    clash = tmp_path / "pets"
    folder.rename(clash)
    assert own_benchmark(clash, {}).name == "own_pets"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "options"),
    [
        (own.write_splits, ["protocols=[logistic,few_shot]", "logistic.num_c=6", "few_shot.repeats=2"]),
        (partial(own.write_csv, several=True), ["multilabel.num_c=6"]),
    ],
)
def test_the_command_line_finds_the_planted_answer_in_own_data_and_none_in_shuffled_ones(
    tmp_path: Path, write: Callable[..., Path], options: list[str]
) -> None:
    torch.save(small_vit().state_dict(), tmp_path / "small.pth")
    values: dict[bool, list[float]] = {}
    for shuffled in (False, True):
        out = tmp_path / f"out_{shuffled}"
        data = write(tmp_path / str(shuffled), shuffled=shuffled)
        common = [f"weights={tmp_path}/small.pth", f"out={out}", "baselines=false", "workers=0", "batch_size=32"]
        assert main(["eval", str(data), *common, *options]) == 0
        (path,) = out.glob("eval/*/own_*.json")
        values[shuffled] = [row["value"] for row in json.loads(path.read_text())["rows"]]
    assert min(values[False]) > 0.9
    assert max(values[True]) < 0.8


def test_the_command_line_says_in_one_line_what_is_wrong_with_own_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = own.write_csv(tmp_path, per_class=1)
    table.write_text("path,label\n../secret.jpg,x\n")
    assert main(["eval", str(table), "weights=random:vitt14_reg4", f"out={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "'../secret.jpg' leaves" in said[0]
    assert main(["eval", str(table), "weights=random:vitt14_reg4", "own.tets_share=1"]) == 2
    assert "own.tets_share" in capsys.readouterr().err
