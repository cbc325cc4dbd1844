"""Pictures in WebDataset's tars and in parquet files: opened by folder, name or pattern, drawn, labelled, refused."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from training import loss_trace, stopped_after, tiny_config

from dinoreg.data import parquet_source, tar_index
from dinoreg.data.labelled import LabelledImages
from dinoreg.data.open import open_names, open_source, read_labelled
from dinoreg.data.parquet_source import ParquetSource
from dinoreg.data.sampler import Sampler
from dinoreg.data.shards import Shards
from dinoreg.data.source import Group, Source, WeightedSource
from dinoreg.data.tables import Table, inside
from dinoreg.data.tar_index import index_tars, sidecars
from dinoreg.data.value_range import BadImage
from dinoreg.evaluation.custom.datasets import own_benchmark
from dinoreg.runtime.errors import UserError
from dinoreg.train.loop import pretrain
from tests.test_tar_index import pack


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), (number, 255 - number, 7 * number % 256)).save(buffer, "PNG")
    return buffer.getvalue()


def webdataset(root: Path, shards: int = 3, each: int = 4, prefix: str = "train") -> None:
    """Shards with keys that have dots and folders; classes in KEY.cls of even ones, in KEY.json of all."""
    root.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        members: dict[str, bytes] = {}
        for number in range(shard * each, (shard + 1) * each):
            key, ending = (f"deep/{number:03}", "png") if number % 3 else (f"{number:03}", "v1.png")
            members[f"{key}.{ending}"] = picture(number)
            members[f"{key}.json"] = json.dumps({"label": f"kind {number % 2}", "size": [1, 2]}).encode()
            members[f"{key}.txt"] = b"a caption"
        pack(root / f"{prefix}-{shard:04}.tar", members)


def parquet(path: Path, numbers: range, plain: bool = False, rows: int = 3, named: bool = True) -> None:
    """A file as Hugging Face's datasets write it, in row groups of `rows`; plain: the bytes alone."""
    cells = [picture(number) for number in numbers]
    image = cells if plain else [{"bytes": each, "path": f"{number}.png"} for number, each in zip(numbers, cells)]
    table = pyarrow.table(
        {"image": image, "label": [number % 2 for number in numbers], "caption": ["x"] * len(numbers)}
    )
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    about = {"huggingface": json.dumps({"info": {"features": features}})} if named else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table.replace_schema_metadata(about), path, row_group_size=rows)


def contents(source: Source) -> list[bytes]:
    return [bytes(source.read(index)) for index in range(len(source))]


PICTURES = [picture(number) for number in range(12)]


@pytest.mark.parametrize(
    "spec", ["", "train-{0000..0002}.tar", "train-*.tar", "train-000{0,1,2}.tar", "*-000[012].tar"]
)
def test_tar_shards_are_opened_by_folder_or_pattern(tmp_path: Path, spec: str) -> None:
    webdataset(tmp_path)
    source = open_source(str(tmp_path / spec))
    assert contents(source) == PICTURES
    assert source.name(1) == f"{tmp_path}/train-0000.tar:deep/001.png"
    assert len(open_source(str(tmp_path / "train-0001.tar"))) == 4
    assert source.fingerprint() != open_source(str(tmp_path / "train-000[01].tar")).fingerprint()


@pytest.mark.parametrize("plain", [False, True])
def test_parquet_shards_are_read_by_row_groups_of_bounded_memory(
    tmp_path: Path, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet(tmp_path / "data/train-00000.parquet", range(7), plain)
    parquet(tmp_path / "data/train-00001.parquet", range(7, 12), plain)
    source = open_source(str(tmp_path))
    assert isinstance(source, ParquetSource)
    assert contents(source) == PICTURES
    assert source.name(9) == f"{tmp_path}/data/train-00001.parquet:2"
    assert source.start.tolist() == [0, 3, 6, 7, 10]
    monkeypatch.setattr(parquet_source, "HELD_BYTES", int(source.size.max()) * 2)
    order = np.random.default_rng(0).permutation(12)
    assert [source.read(int(index)) for index in order] == [PICTURES[index] for index in order]
    assert len(source._held) <= 2
    assert open_source(str(tmp_path / "data/train-0000[01].parquet")).fingerprint() != source.fingerprint()
    monkeypatch.setattr(parquet_source, "HELD_BYTES", 10)
    with pytest.raises(UserError, match=r"row group of .* write it with row groups of"):
        open_source(str(tmp_path))


def test_an_epoch_of_row_groups_reads_each_once_and_depends_on_the_seed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        parquet(tmp_path / f"{number}.parquet", range(number * 30, number * 30 + 30), rows=5)
    source = open_source(str(tmp_path))
    monkeypatch.setattr(parquet_source, "HELD_BYTES", int(source.size.max()) * 8)
    loads: list[int] = []
    load = ParquetSource._load
    monkeypatch.setattr(ParquetSource, "_load", lambda self, group: (loads.append(group), load(self, group))[1])
    sampler = Sampler(source.groups(), seed=3)
    ids, _ = sampler.at(np.arange(240))
    for epoch in (ids[:120], ids[120:]):
        assert sorted(epoch.tolist()) == list(range(120))
    assert ids[:120].tolist() != ids[120:].tolist()
    for index in ids[:120]:
        source.read(int(index))
    assert sorted(loads) == list(range(24))
    # A window holds four row groups, drawn from all over the files and mixed with one another.
    window = ids[:20] // 5
    assert len(set(window.tolist())) == 4
    assert np.abs(np.diff(window)).astype(bool).sum() > 8
    assert np.array_equal(Sampler(source.groups(), seed=3).at(np.arange(77, 131))[0], ids[77:131])


def test_rows_without_a_picture_and_damaged_row_groups_are_bad_images(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    cells = [picture(0), None, b"no picture", picture(3)]
    pyarrow.parquet.write_table(pyarrow.table({"image": cells}), path, row_group_size=2, compression="gzip")
    source = open_source(str(path))
    with pytest.raises(BadImage, match="holds no picture"):
        source.read(1)
    with pytest.raises(BadImage):
        source.decode(2)
    about = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(0)
    data = bytearray(path.read_bytes())
    start = about.dictionary_page_offset or about.data_page_offset
    data[start + 8 : start + 40] = bytes(32)
    path.write_bytes(data)
    source = open_source(str(path))
    with pytest.raises(BadImage, match="row group 0 is not a readable parquet file"):
        source.read(0)
    assert source.read(3) == picture(3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.tar.gz", r"is packed.*unpack it to \.tar"),
        ("shards-{0..3}.tar", r"shards-0\.tar.*cannot be read"),
        ("*.webp2", "matches no file"),
        ("{0..9999999}.tar", "names 10,000,000 files"),
        ("{0..9999}{0..9999}{a,b}.tar", "names 200,000,000 files|names 20,000 files"),
        ("x.*", "several kinds"),
    ],
)
def test_what_is_no_set_of_shards_is_said_in_a_line(tmp_path: Path, name: str, message: str) -> None:
    for made in ("a.tar.gz", "x.tar", "x.parquet"):
        (tmp_path / made).write_bytes(b"")
    with pytest.raises(UserError, match=message) as caught:
        open_source(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_brackets_in_the_folder_of_a_dataset_or_a_file_are_no_pattern(tmp_path: Path) -> None:
    webdataset(tmp_path / "my[1]{2}")
    assert contents(open_source(str(tmp_path / "my[1]{2}"))) == PICTURES
    assert contents(open_source(str(tmp_path / "my[1]{2}/train-0001.tar"))) == PICTURES[4:8]
    with pytest.raises(UserError, match=r"imagenet22k/n\[0-9\]\*\.tar is missing"):
        open_source(f"imagenet22k:root={tmp_path}/my[1]{{2}}")


def test_a_folder_of_pictures_beside_a_table_stays_a_folder_and_a_teaser_beside_shards_does_not(tmp_path: Path) -> None:
    (tmp_path / "teaser.png").write_bytes(picture(1))
    parquet(tmp_path / "labels.parquet", range(3))
    assert len(open_source(str(tmp_path))) == 1
    parquet(tmp_path / "more.parquet", range(3))
    assert len(open_source(str(tmp_path))) == 6
    pyarrow.parquet.write_table(pyarrow.table({"path": ["teaser.png"]}), tmp_path / "paths.parquet")
    assert contents(open_source(str(tmp_path / "paths.parquet"))) == [picture(1)]


def told(found: LabelledImages) -> list[tuple[str, str]]:
    assert contents(found.source) == PICTURES
    return [(found.class_names[label], (found.words or [""] * 12)[row]) for row, label in enumerate(found.labels)]


def test_labels_lie_in_the_shards(tmp_path: Path) -> None:
    webdataset(tmp_path / "json")
    assert told(read_labelled(tmp_path / "json")) == [(f"kind {number % 2}", "train") for number in range(12)]
    (tmp_path / "cls").mkdir()
    for number in range(3):
        members: dict[str, bytes] = {}
        for index in range(number * 4, number * 4 + 4):
            members |= {f"{index}.cls": str(index % 2).encode(), f"{index}.png": picture(index)}
        pack(tmp_path / "cls" / f"{number}.tar", members)
    assert told(read_labelled(str(tmp_path / "cls/{0..2}.tar"))) == [(str(number % 2), "") for number in range(12)]
    parquet(tmp_path / "hf/data/train-0-of-1.parquet", range(8))
    parquet(tmp_path / "hf/data/validation-0-of-1.parquet", range(8, 12))
    expected = [(("cat", "dog")[number % 2], "train" if number < 8 else "val") for number in range(12)]
    assert told(read_labelled(tmp_path / "hf")) == expected
    with pytest.raises(UserError, match=r"no column 'nothing'; its columns: .*caption"):
        read_labelled(tmp_path / "hf", columns="label:nothing")


def fields_of(fields: dict[str, object]) -> dict[str, str | None]:
    return tar_index._fields("a.json", json.dumps(fields).encode(), {})


def test_what_is_not_asked_for_beside_pictures_is_not_kept(tmp_path: Path) -> None:
    texts = ["null", "5", "[1, 2]", '["ab"]', "[" * 5000, '{"label": ' + "[" * 5000]
    members: dict[str, bytes] = {}
    for index in range(12):
        kind = f"kind {index % 2}"
        text = texts[index] if index < len(texts) else json.dumps({"label": kind, "caption": "x" * 99, "url": "y" * 99})
        members |= {f"{index}.cls": kind.encode(), f"{index}.json": text.encode(), f"{index}.png": picture(index)}
    pack(tmp_path / "a.tar", members)
    found = index_tars(Shards(str(tmp_path), ["a.tar"], ".tar"))
    assert told(read_labelled(tmp_path, columns="label:cls")) == [(f"kind {number % 2}", "") for number in range(12)]
    table = sidecars(found, "x", {})
    assert table.names == ("cls", "label", "caption", "url")
    assert [sorted(row) for row in table.known] == [["cls"]] * 6 + [["cls", "label"]] * 6
    assert [row.get("url") for row in sidecars(found, "x", {"label": ["URL"]}).known] == [None] * 6 + ["y" * 99] * 6
    for fields in ({"breed": "a"}, {"breed": "a", "index": 3}, {"breed": "a", "split": "train"}):
        assert fields_of(fields)["breed"] == "a"
    assert fields_of({"breed": "a", "mood": "b"}) == {"breed": None, "mood": None}


def test_row_groups_are_bounded_by_what_they_take_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = bytes(1 << 20)
    table = pyarrow.table({"image": [large] * 60, "label": ["a" * (1 << 20)] * 60})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    source = open_source(str(tmp_path))
    assert isinstance(source, ParquetSource)
    assert source.size.max() < 2 << 20
    monkeypatch.setattr(parquet_source, "HELD_BYTES", 20 << 20)
    before, most = pyarrow.total_allocated_bytes(), []
    few = ParquetSource._pictures_in

    def watched(self: ParquetSource, batches: Iterable[Any], group: int) -> Any:
        return few(self, (most.append(pyarrow.total_allocated_bytes()) or batch for batch in batches), group)

    monkeypatch.setattr(ParquetSource, "_pictures_in", watched)
    with pytest.raises(BadImage, match="unpacks to more than"):
        source.read(0)
    assert max(most) - before < 45 << 20
    with pytest.raises(UserError, match=r"cells of 1,.* bytes, expected words"):
        list(parquet_source.table_of(source, "x").cells("label"))
    monkeypatch.setattr(parquet_source, "HELD_BYTES", 80 << 20)
    assert open_source(str(tmp_path)).read(59) == large


def test_row_groups_are_loaded_one_at_a_time_and_held_by_their_real_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [bytes([number]) * (1 << 16) for number in range(8) for _ in range(10)]
    pyarrow.parquet.write_table(pyarrow.table({"image": cells}), tmp_path / "a.parquet", row_group_size=10)
    source = open_source(str(tmp_path))
    assert isinstance(source, ParquetSource)
    monkeypatch.setattr(parquet_source, "HELD_BYTES", 2 << 20)
    load, running, at_once = ParquetSource._load, [], []

    def watched(self: ParquetSource, group: int) -> Any:
        running.append(group)
        at_once.append(len(running))
        found = load(self, group)
        running.remove(group)
        return found

    monkeypatch.setattr(ParquetSource, "_load", watched)
    order = np.random.default_rng(0).permutation(80).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(source.read, order)] == [cells[index] for index in order]
    assert max(at_once) == 1
    source.read(0)
    assert int(source.size.sum()) < 2 << 20  # by which all eight would be held
    assert len(source._held) <= 3


def test_deep_metadata_of_a_parquet_file_name_no_classes(tmp_path: Path) -> None:
    cells = {"image": [picture(0), picture(1)], "label": ["a", "b"]}
    table = pyarrow.table(cells).replace_schema_metadata({"huggingface": "[" * 100_000})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read_labelled(tmp_path).class_names == ["a", "b"]


def test_pictures_in_parquet_are_drawn_by_weight_and_come_from_one_column(tmp_path: Path) -> None:
    cells = {"image": PICTURES[:3], "other": PICTURES[:3], "often": [1.0, 0.0, 3.0]}
    pyarrow.parquet.write_table(pyarrow.table(cells), tmp_path / "a.parquet")
    for columns in ("path:image,weight:often", "path:image"):
        if columns == "path:image":
            table = pyarrow.table(cells).rename_columns(["image", "other", "sampling_weight"])
            pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        source = open_source(str(tmp_path), columns=columns)
        assert contents(source) == [PICTURES[0], PICTURES[2]]
        assert source.groups() == [Group(0, 1, 0.25), Group(1, 1, 0.75)]
    for columns, words in (("path:image,path:other", "one column"), ("path:image,weight:no", "no column 'no'")):
        with pytest.raises(UserError, match=words):
            open_source(str(tmp_path), columns=columns)
    with pytest.raises(UserError, match="weight: is for training"):
        own_benchmark(tmp_path / "a.parquet", {}, columns="label:x,weight:often")


@pytest.mark.parametrize(
    "entry",
    ["%2e%2e/secret.jpg", "a/%2E./b.jpg", "a%2f..%2fb.jpg", "a.jpg?x=1", "a.jpg#x", "simplecache::file:///b.jpg"],
)
def test_a_list_at_a_url_names_nothing_outside(entry: str) -> None:
    root = "https://example.org/data"
    for each in (entry, f"{root}/{entry}"):
        with pytest.raises(UserError, match=r"leaves|expected the path of a file below"):
            inside(root, each, "line 1", "root")
    assert inside(root, f"{root}/a/b%20c.jpg", "line 1", "root") == "a/b%20c.jpg"


def test_a_list_draws_by_its_weights_and_names_what_lies_in_shards(tmp_path: Path) -> None:
    webdataset(tmp_path / "tars")
    parquet(tmp_path / "tables/a.parquet", range(12), rows=5)
    for folder in ("tars", "tables"):
        source = open_source(str(tmp_path / folder))
        names = [source.name(index) for index in (3, 11, 0)]
        found, root, entries = open_names(names)
        assert contents(found) == [PICTURES[3], PICTURES[11], PICTURES[0]]
        lines = [f"{entry},{weight}" for entry, weight in zip(entries, (1, 0, 3))]
        (tmp_path / "list.csv").write_text("\n".join(("path,sampling_weight", *lines)))
        drawn = open_source(tmp_path / "list.csv", root=root)
        assert contents(drawn) == [PICTURES[3], PICTURES[0]]
        assert drawn.groups() == [Group(0, 1, 0.25), Group(1, 1, 0.75)]
        assert Sampler(drawn.groups(), 0).at(np.arange(4096))[0].mean() == pytest.approx(0.75, abs=1e-3)
    for cell in ("x", "-1", "nan", "inf", "1e308", "1e-300"):
        (tmp_path / "list.csv").write_text(f"path,sampling_weight\na.jpg,{cell}\n")
        with pytest.raises(UserError, match=f"line 2: the weight is '{cell}'"):
            open_source(tmp_path / "list.csv")


def test_a_list_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, reads = tmp_path / "list.csv", []
    cells = Table.cells
    monkeypatch.setattr(Table, "cells", lambda self, *names: (reads.append(names), cells(self, *names))[1])
    for text, count in (("a.jpg,2", 1), ("b.jpg,1\nc.jpg,3", 2)):
        path.write_text(f"path,sampling_weight\n{text}\n")
        os.utime(path, (100 + count, 100 + count))
        for _ in range(2):
            found = open_source(path, index_dir=tmp_path / "kept")
            assert len(found) == count
            assert len(found.groups()) == count
    assert reads == [("path", "sampling_weight")] * 2


def test_many_weights_are_kept_within_a_hundredth() -> None:
    weights = np.random.default_rng(0).uniform(0.5, 20, 5000)
    drawn = WeightedSource(open_source("scenes:count=5000,size=16"), weights)
    groups = drawn.groups()
    assert sum(group.length for group in groups) == 5000
    share = np.concatenate([np.full(group.length, group.weight / group.length) for group in groups])
    np.testing.assert_allclose(share, weights[drawn.indices] / weights.sum(), rtol=0.01)
    sampler = Sampler(groups, 0)
    counts = np.bincount(sampler.at(np.arange(sampler.block))[0], minlength=5000) / sampler.block
    halves = [counts[share < 0.0002].sum(), share[share < 0.0002].sum()]
    assert halves[0] == pytest.approx(halves[1], rel=0.01)


@pytest.mark.slow
def test_a_run_on_shards_stopped_anywhere_goes_on_bit_for_bit_and_lists_its_bad_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        parquet(tmp_path / f"tables/{number}.parquet", range(15 * number, 15 * number + 15), rows=4)
    cells = [{"bytes": each} for each in (picture(90), b"no picture", None, picture(91))]
    pyarrow.parquet.write_table(pyarrow.table({"image": cells}), tmp_path / "tables/2.parquet", row_group_size=2)
    webdataset(tmp_path / "tars")
    lines = [f"tars/train-0000.tar:{name},{weight}" for name, weight in (("000.v1.png", 1), ("deep/001.png", 3))]
    (tmp_path / "drawn.csv").write_text("\n".join(("path,sampling_weight", *lines)))
    monkeypatch.setattr(parquet_source, "HELD_BYTES", 4 * 4 * len(picture(0)))
    data = {"data__source": [str(tmp_path / "tables"), str(tmp_path / "drawn.csv")], "data__weights": [3, 1]}
    options: dict[str, object] = {**data, "data__max_bad_fraction": 0.5, "data__workers": 2}
    whole = pretrain(tiny_config(tmp_path / "whole", **options))
    out = tmp_path / "parts"
    for stop in (2, 5):
        with stopped_after(stop, out):
            pretrain(tiny_config(out, **{**options, "data__workers": stop - 1}, resume=stop > 2))
    pretrain(tiny_config(out, **options, resume=True))
    assert loss_trace(out) == loss_trace(whole)
    skipped = (out / "skipped.jsonl").read_text()
    assert skipped == (whole / "skipped.jsonl").read_text() != ""
    assert "tables/2.parquet:1" in skipped
    assert "tables/2.parquet:2" in skipped


def test_a_list_may_name_files_and_what_lies_in_shards_of_both_kinds(tmp_path: Path) -> None:
    webdataset(tmp_path / "tars")
    parquet(tmp_path / "tables/a.parquet", range(12))
    (tmp_path / "7.png").write_bytes(picture(7))
    lines = {"7.png": 7, "tars/train-0002.tar:deep/010.png": 10, "tables/a.parquet:3": 3, "tables/a.parquet:0": 0}
    for order in (list(lines), list(lines)[::-1]):
        (tmp_path / "list.txt").write_text("\n".join(order))
        found = open_source(tmp_path / "list.txt")
        assert contents(found) == [PICTURES[lines[each]] for each in order]
        assert [found.name(index) for index in range(4)] == [f"{tmp_path}/{each}" for each in order]


@pytest.mark.parametrize(
    ("names", "root"),
    [
        (["/a/p/1.png", "/a/q/2.png"], "/a"),
        (["/a/1.png", "/b/2.png"], "/"),
        (["file:///a/p/1.png", "file:///a/q/2.png"], "file:///a"),
        (["s3://a/p/1.png", "s3://a/q.tar:2.png"], "s3://a"),
        (["simplecache::https://a/p/1.png", "simplecache::https://a/p/2.png"], "simplecache::https://a/p"),
    ],
)
def test_names_are_listed_below_the_folder_that_all_lie_in(names: list[str], root: str) -> None:
    source, found, entries = open_names(names)
    assert found == root
    assert [f"{root.rstrip('/')}/{entry}" for entry in entries] == names
    assert (source is None) == ("://" in root)  # a URL that nobody named is not opened


@pytest.mark.parametrize(
    "names", [["s3://a/1.png", "s3://b/1.png"], ["/a/1.png", "s3://a/1.png"], ["/a/1.png", "scenes:0"]]
)
def test_names_in_no_one_place_are_refused(names: list[str]) -> None:
    for order in (names, names[::-1]):
        with pytest.raises(UserError, match="cannot be listed"):
            open_names(order)


def test_a_name_with_brackets_is_itself_and_links_do_not_repeat_what_they_lead_to(tmp_path: Path) -> None:
    webdataset(tmp_path / "p[1]", shards=1)
    (tmp_path / "p[1]/train-0000.tar").rename(tmp_path / "p[1]/p[1].tar")
    assert contents(open_source(str(tmp_path / "p[1]/p[1].tar"))) == PICTURES[:4]
    (tmp_path / "p[1]/again").symlink_to(tmp_path / "p[1]")
    assert contents(open_source(str(tmp_path / "p[1]"))) == PICTURES[:4]
    (tmp_path / "p[1]/named.tar").symlink_to(tmp_path / "p[1]/p[1].tar")
    assert contents(open_source(str(tmp_path / "**/*.tar"))) == PICTURES[:4]
