from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from dinoreg.data import folder_index as module
from dinoreg.data.folder_index import PathBlock, cache_folder, index_folder
from dinoreg.runtime.errors import UserError


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def names(block: PathBlock) -> list[str]:
    return [block[i] for i in range(len(block))]


def settle(root: Path) -> None:
    """Make every folder look as if it had not been touched for a minute."""
    past = time.time() - 60
    for folder, _, _ in os.walk(root):
        os.utime(folder, (past, past))


def test_images_are_found_at_any_depth_by_extension_in_any_case_and_in_one_order(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "b.JPG",
        "a.jpeg",
        "z/y/x.Png",
        "c/d.webp",
        "c/e.TIFF",
        "c/f.bmp",
        "c/g.tif",
        "notes.txt",
        "h.svg",
    )
    touch(tmp_path, ".hidden/i.jpg", "._b.jpg", "folder.jpg/inner.png")
    expected = [
        "a.jpeg",
        "b.JPG",
        "c/d.webp",
        "c/e.TIFF",
        "c/f.bmp",
        "c/g.tif",
        "folder.jpg/inner.png",
        "z/y/x.Png",
    ]
    assert names(index_folder(tmp_path, tmp_path / "kept")) == expected


def test_names_that_are_not_text_survive(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/caf\xe9 \xf0.jpg"
    with open(raw, "wb") as file:
        file.write(b"x")
    (name,) = names(index_folder(tmp_path, tmp_path / "kept"))
    assert os.path.exists(os.path.join(tmp_path, name))


def test_a_kept_index_is_reused_until_a_folder_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, kept = tmp_path / "photos", tmp_path / "kept"
    touch(root, "a.jpg", "sub/b.jpg")
    settle(root)
    first = names(index_folder(root, kept))
    scans = []
    scan = module._scan
    monkeypatch.setattr(module, "_scan", lambda path: scans.append(path) or scan(path))
    assert names(index_folder(root, kept)) == first
    assert scans == []
    touch(root, "sub/c.jpg")
    assert names(index_folder(root, kept)) == [*first, "sub/c.jpg"]
    assert len(scans) == 1


def test_an_index_made_while_its_folder_was_still_changing_is_not_trusted(tmp_path: Path) -> None:
    root, kept = tmp_path / "photos", tmp_path / "kept"
    touch(root, "a.jpg")
    index_folder(root, kept)
    before = os.stat(root)
    touch(root, "b.jpg")
    os.utime(root, ns=(before.st_atime_ns, before.st_mtime_ns))  # a clock too coarse to tell the two apart
    assert names(index_folder(root, kept)) == ["a.jpg", "b.jpg"]


def test_a_damaged_kept_index_is_rebuilt(tmp_path: Path) -> None:
    root, kept = tmp_path / "photos", tmp_path / "kept"
    touch(root, "a.jpg")
    settle(root)
    index_folder(root, kept)
    (file,) = kept.iterdir()
    whole = file.read_bytes()
    for damage in (b"", b"not an index", whole[: len(whole) // 2]):
        file.write_bytes(damage)
        assert names(index_folder(root, kept)) == ["a.jpg"]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    root, blocked = tmp_path / "photos", tmp_path / "file"
    touch(root, "a.jpg")
    blocked.write_bytes(b"")
    assert names(index_folder(root, blocked / "kept")) == ["a.jpg"]


def test_the_cache_folder_is_where_the_desktop_standard_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/dinoreg")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "dinoreg"


def test_linked_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    root, other = tmp_path / "photos", tmp_path / "other"
    touch(root, "a/b.jpg")
    touch(other, "c.jpg")
    (root / "a" / "up").symlink_to(root)
    (root / "linked").symlink_to(other)
    (root / "more").symlink_to(other)
    assert names(index_folder(root, tmp_path / "kept")) == ["a/b.jpg", "linked/c.jpg", "more/c.jpg"]


def test_a_link_in_a_circle_is_one_bad_image_and_what_is_no_image_is_counted(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    touch(root, "a.jpg", "b.HEIC", "sub/c.heic", "sub/notes", ".hidden.txt")
    (root / "round.jpg").symlink_to(root / "round.jpg")
    for _ in range(2):  # found, then read from the index that was kept
        found = index_folder(root, tmp_path / "kept")
        assert names(found) == ["a.jpg", "round.jpg"]
        assert found.passed_over == {".heic": 2, "": 1}


def test_a_missing_an_empty_folder_and_a_file_are_refused_in_one_line(tmp_path: Path) -> None:
    touch(tmp_path, "file.jpg")
    (tmp_path / "empty").mkdir()
    for path, what in (("absent", "does not exist"), ("empty", "no image files"), ("file.jpg", "is a file")):
        with pytest.raises(UserError, match=what) as caught:
            index_folder(tmp_path / path, tmp_path / "kept")
        assert path in str(caught.value)
        assert "\n" not in str(caught.value)
