"""What is no regular file, or has no end, is said at once wherever a path of others is read."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dinoreg.data.labelled import read_classes
from dinoreg.data.open import open_source
from dinoreg.data.preprocess import Preprocessing
from dinoreg.data.value_range import BadImage
from dinoreg.evaluation.readers.files import read_bytes
from dinoreg.evaluation.readers.pixel_maps import read_mask, read_pixels
from dinoreg.runtime.digest import digest
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.json_files import read_json, read_text
from dinoreg.runtime.regular_files import open_regular, read_regular
from dinoreg.weights.files import read_file


@pytest.fixture(params=["pipe", "device", "folder", "socket"])
def irregular(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "x.png"
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "device":
        path.symlink_to("/dev/zero")
    elif request.param == "folder":
        path.mkdir()
    else:
        import socket

        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    return path


READERS: list[tuple[Callable[[Path], object], type[Exception]]] = [
    (read_regular, OSError),
    (lambda path: open_regular(path).__enter__(), OSError),
    (digest, OSError),
    (read_pixels, OSError),
    (read_file, UserError),
    (lambda path: read_bytes(path, "own", "an archive"), UserError),
    (lambda path: read_mask(path, range(2), 255, "own"), UserError),
]


@pytest.mark.parametrize(("read", "error"), READERS)
def test_no_reader_waits_for_what_is_no_file(irregular: Path, read: Callable[[Path], object], error: type) -> None:
    with pytest.raises(error):
        read(irregular)
    assert read_text(irregular) == ""
    assert read_json(irregular) == {}


def test_a_list_may_name_a_pipe_and_the_picture_is_bad(irregular: Path) -> None:
    (irregular.parent / "list.txt").write_text(f"{irregular}\n")
    with pytest.raises(BadImage, match="cannot be read"):
        open_source(str(irregular.parent / "list.txt")).read(0)


def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="more than the"):
        read_regular(tmp_path / "sparse")
    assert read_classes(tmp_path) is None
    assert read_text(Path("/proc/meminfo")).startswith("MemTotal")  # of no size, and yet regular


@pytest.mark.parametrize("verb", ["inspect data={folder}/list.txt", "embed {folder}/list.txt weights={folder}/x.pth"])
def test_a_verb_ends_where_pipes_are_named(tmp_path: Path, verb: str) -> None:
    os.mkfifo(tmp_path / "a.png")
    os.mkfifo(tmp_path / "x.pth")
    Image.new("RGB", (40, 40)).save(tmp_path / "b.png")
    (tmp_path / "list.txt").write_text("a.png\nb.png\n")
    command = [sys.executable, "-m", "dinoreg", *verb.format(folder=tmp_path).split(), f"out={tmp_path / 'out'}"]
    if verb.startswith("inspect"):
        command.pop()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
    assert done.returncode == (0 if verb.startswith("inspect") else 2), done.stderr
    if verb.startswith("inspect"):
        assert "not a regular file" in done.stdout


def test_the_preprocessing_of_a_model_names_a_pipe(irregular: Path) -> None:
    with pytest.raises(UserError, match=r"x\.png: cannot be read as an image"):
        Preprocessing((0.5,) * 3, (0.5,) * 3, (32, 32), 32)(irregular)
