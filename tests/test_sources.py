from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from dinoreg.data.decode import BadImage
from dinoreg.data.labelled_folder import class_folders
from dinoreg.data.open import open_source
from dinoreg.data.source import Source
from dinoreg.runtime.errors import UserError
from dinoreg.scenes import render as scenes


def names(source: Source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def make(root: Path, *files: str) -> None:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def test_a_folder_gives_its_files_bytes_and_paths(tmp_path: Path) -> None:
    make(tmp_path, "b.jpg", "a/c.PNG")
    source = open_source(str(tmp_path))
    assert names(source) == [str(tmp_path / "b.jpg"), str(tmp_path / "a/c.PNG")]
    assert [source.read(0), source.read(1)] == [b"b.jpg", b"a/c.PNG"]
    assert len(source.groups()) == 1


def test_scenes_beside_a_folder_of_that_name_are_refused_until_it_is_said_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    drawn = open_source("scenes")
    make(tmp_path, "scenes/a.jpg")
    with pytest.raises(UserError, match=r"say \./scenes for it, or scenes: for the drawn"):
        open_source("scenes")
    for spec in ("./scenes", "scenes/", Path("scenes")):
        assert names(open_source(spec)) == [str(tmp_path / "scenes/a.jpg")]
    assert open_source("scenes:").fingerprint() == drawn.fingerprint()
    assert len(open_source("scenes:count=3")) == 3


def test_a_file_that_has_gone_since_is_a_bad_image(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg", "b.jpg")
    source = open_source(tmp_path)
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(BadImage, match="No such file"):
        source.read(0)


def test_several_folders_follow_one_another_and_are_weighted_by_size_or_as_asked(tmp_path: Path) -> None:
    make(tmp_path, "x/a.jpg", "x/b.jpg", "y/c.jpg")
    specs = [str(tmp_path / "x"), str(tmp_path / "y")]
    plain, mixed = open_source(specs), open_source(specs, weights=[1, 3])
    assert [plain.read(i) for i in range(3)] == [b"x/a.jpg", b"x/b.jpg", b"y/c.jpg"]
    assert [group.length for group in plain.groups()] == [3]
    assert [tuple(group) for group in mixed.groups()] == [(0, 2, 0.25, None), (2, 1, 0.75, None)]
    assert plain.fingerprint() != mixed.fingerprint()
    for weights, what in (([1], "1 numbers for 2"), ([1, 0], "positive"), ([1, float("nan")], "positive")):
        with pytest.raises(UserError, match=what):
            open_source(specs, weights=weights)
    with pytest.raises(UserError, match=r"data\.weights has 2 numbers for one source"):
        open_source(specs[0], weights=[1, 2])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.txt", "a.jpg\n\nsub/b 1.png\r\n"),
        ("list.csv", "label,path\n3,a.jpg\n4,sub/b 1.png\n"),
        ("other.csv", 'filename,label\na.jpg,3\n\n"sub/b 1.png",4\n'),
        ("bare.csv", "a.jpg,3\nsub/b 1.png,4\n"),
        ("list.tsv", "path\tx\na.jpg\t1\nsub/b 1.png\t2\n"),
    ],
)
def test_a_list_names_files_beside_it(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert names(open_source(tmp_path / name)) == [str(tmp_path / "a.jpg"), str(tmp_path / "sub/b 1.png")]


def test_a_parquet_list_is_read_and_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "list.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"label": [1, 2], "path": ["a.jpg", "b/c.png"]}), path)
    assert names(open_source(path)) == [str(tmp_path / "a.jpg"), str(tmp_path / "b/c.png")]
    pyarrow.parquet.write_table(pyarrow.table({"number": [1, 2]}), path)
    with pytest.raises(UserError, match="has no column path"):
        open_source(path)
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match="not a readable parquet file"):
        open_source(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="needs pyarrow: pip install"):
        open_source(path)


@pytest.mark.parametrize("entry", ["../secret.jpg", "a/../../secret.jpg", "/etc/passwd", "a\0b.jpg"])
def test_no_path_of_a_list_leaves_its_folder(tmp_path: Path, entry: str) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "list.txt").write_text(f"good.jpg\n{entry}\n")
    with pytest.raises(UserError, match=r"line 2: .* leaves .*data\.root"):
        open_source(folder / "list.txt")


def test_a_root_may_be_given_for_the_paths_of_a_list(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/list.txt").write_text(f"a.jpg\n{tmp_path}/photos/b.jpg\n")
    source = open_source(tmp_path / "lists/list.txt", root=tmp_path / "photos")
    assert names(source) == [str(tmp_path / "photos/a.jpg"), str(tmp_path / "photos/b.jpg")]
    with pytest.raises(UserError, match="leaves"):
        open_source(tmp_path / "lists/list.txt", root=tmp_path / "elsewhere")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/list.txt").write_text("../set-2/a.jpg\n")  # a sibling whose name begins alike
    with pytest.raises(UserError, match="leaves"):
        open_source(tmp_path / "set/list.txt")


def test_scenes_are_rendered_once_and_are_the_renderers_own() -> None:
    source = open_source("scenes:count=5,size=32,seed=2,first=100")
    assert len(source) == 5
    assert source.name(3) == "scenes:103"
    first = source.read(3)
    assert np.array_equal(first, scenes.render(103, 32, 2).image)
    assert np.shares_memory(first, source.read(3))
    assert source.fingerprint() != open_source("scenes:count=5,size=32,seed=2").fingerprint()
    assert len(open_source("scenes")) == 20_000


def test_scenes_beyond_the_memory_for_them_are_rendered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinoreg.data.source.SCENES_CACHE_BYTES", 2 * 32 * 32 * 3)
    source = open_source("scenes:count=4,size=32")
    first = source.read(3)
    assert np.array_equal(first, scenes.render(3, 32, 0).image)
    for index in (0, 1):
        source.read(index)
    assert np.array_equal(source.read(3), first)
    assert not np.shares_memory(source.read(3), first)


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ("", "data is empty"),
        ([], "empty list"),
        ("missing/folder", "missing/folder does not exist"),
        ("imagenet99:root=/x", "'imagenet99' is not a known kind of source, expected a folder"),
        ("scenes:colour=3", r"colour: unknown key \(data=scenes:colour=3\); accepted: count, size, seed"),
        ("scenes:count=many", "count=many: expected a whole number"),
        ("scenes:count=0", r"scenes\.count=0: expected a number in \[1, "),
    ],
)
def test_what_cannot_be_opened_is_refused_in_one_line(spec: str | list[str], what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        open_source(spec)
    assert "\n" not in str(caught.value)


def test_an_empty_folder_an_empty_list_and_a_lone_image_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "one.jpg", "list.txt")
    (tmp_path / "list.txt").write_text("\n\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, what in (
        ("one.jpg", "is a file"),
        ("list.txt", "names no files"),
        ("empty", "no image files"),
        ("binary.txt", "not UTF-8"),
    ):
        with pytest.raises(UserError, match=what):
            open_source(tmp_path / name)


def test_a_published_tree_has_its_classes_at_the_first_level_whatever_they_are_called(tmp_path: Path) -> None:
    make(tmp_path, "cat/1.jpg", "cat/deep/er/2.jpg", "dog/3.jpg", "stray.jpg")
    source, labels, classes = class_folders(tmp_path)
    assert [source.read(i) for i in range(len(source))] == [b"cat/1.jpg", b"cat/deep/er/2.jpg", b"dog/3.jpg"]
    assert labels.tolist() == [0, 0, 1]
    assert classes == ["cat", "dog"]
    with pytest.raises(UserError, match="at least two"):
        class_folders(tmp_path / "cat")
