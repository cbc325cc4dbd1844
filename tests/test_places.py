"""Data at URLs, by fsspec: in its memory, and on a server of this machine that hands out ranges of files."""

from __future__ import annotations

import http.server
import json
import os
import re
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dinoreg.commands.main import main
from dinoreg.data.open import open_source, read_labelled
from dinoreg.data.value_range import BadImage
from dinoreg.runtime import places
from dinoreg.runtime.errors import RunError, UserError
from dinoreg.visualize.subject import run_source
from tests.test_shards import PICTURES, contents, parquet, picture, told, webdataset


class Ranges(http.server.SimpleHTTPRequestHandler):
    """A file server that knows `Range: bytes=A-B`; `asked` holds the ranges that it was asked for."""

    asked: ClassVar[list[str]] = []
    failures: ClassVar[list[int]] = []  # answers of the next requests
    whole = packed = False

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if self.failures:
            self.send_error(self.failures.pop())
        elif found is None or self.whole or not path.is_file():
            super().do_GET()
        else:
            self.asked.append(found[0])
            first, last = map(int, found.groups())
            data = path.read_bytes()[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{path.stat().st_size}")
            self.send_header("Content-Length", str(len(data)))
            if self.packed:
                self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """(a folder, its URL)"""
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setattr(places, "WAITS", (0.01, 0.01))
    monkeypatch.setattr(Ranges, "asked", [])
    monkeypatch.setattr(Ranges, "failures", [])
    handler = type("Here", (Ranges,), {"directory": str(folder)})
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *given: handler(*given, directory=str(folder))
    ) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """(a folder, the URL at which its files are once `put` has copied them); arguments as s3fs has them"""
    whole = MemoryFileSystem.cat_file

    def cat_file(
        self: MemoryFileSystem, path: str, version_id: str | None = None, start: int = 0, end: int = 0, **more: object
    ) -> object:
        assert version_id is None
        return whole(self, path, start=start, end=end, **more)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    yield tmp_path, "memory://bucket"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def put(folder: Path, url: str) -> None:
    if url.startswith("memory"):
        fsspec.filesystem("memory").put(f"{folder}/", "/bucket/", recursive=True)


@pytest.mark.parametrize("store", ["served", "memory"])
def test_shards_lists_and_folders_at_a_url_hold_what_they_hold_on_a_disk(
    store: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder, url = request.getfixturevalue(store)
    webdataset(folder / "tars")
    for number in range(2):
        parquet(folder / f"tables/train-{number}.parquet", range(6 * number, 6 * number + 6))
    for number in range(12):
        (folder / "plain/sub").mkdir(parents=True, exist_ok=True)
        (folder / f"plain/sub/{number:02}.png").write_bytes(picture(number))
        (folder / "v1.0").mkdir(exist_ok=True)
        (folder / f"v1.0/{number:02}.png").write_bytes(picture(number))
    (folder / "plain/list.csv").write_text("path\n" + "".join(f"sub/{number:02}.png\n" for number in range(12)))
    put(folder, url)
    kept = tmp_path / "kept"
    for spec in (
        "tars",
        "tars/train-{0000..0002}.tar",
        "tables",
        "tables/train-*.parquet",
        "plain",
        "v1.0",
        "plain/list.csv",
    ):
        if store == "served" and "*" in spec:
            continue
        found = open_source(f"{url}/{spec}", index_dir=kept)
        assert contents(found) == PICTURES, spec
        here = open_source(str(folder / spec), index_dir=kept)
        assert [found.name(i).removeprefix(url) for i in range(12)] == [
            here.name(i).removeprefix(str(folder)) for i in range(12)
        ]
        assert found.stamp() == open_source(f"{url}/{spec}", index_dir=kept).stamp()
    assert contents(open_source(f"simplecache::{url}/tars/train-{{0000..0002}}.tar", index_dir=kept)) == PICTURES
    assert told(read_labelled(f"{url}/tars", kept)) == [(f"kind {number % 2}", "train") for number in range(12)]
    assert told(read_labelled(f"{url}/tables", kept))[1] == ("dog", "train")
    for spec in ("plain", "plain/list.csv"):
        with pytest.raises(UserError, match=f"{url}/{spec}: at a URL labels are read of shards alone"):
            read_labelled(f"{url}/{spec}", kept)
    (folder / "own.txt").write_text(f"{url}/plain/sub/03.png\nsub/04.png\n")
    assert contents(open_source(folder / "own.txt", root=f"{url}/plain")) == PICTURES[3:5]
    with pytest.raises(UserError, match="names a user"):
        open_source(folder / "own.txt", root="https://me:secret@host/plain")
    (folder / "own.txt").write_text(f"{url}/tars/../secret.png\n")
    with pytest.raises(UserError, match=r"line 1: .* leaves"):
        open_source(folder / "own.txt", root=f"{url}/plain")


def test_a_picture_of_a_shard_is_one_range_and_a_failing_server_is_asked_again(served: tuple[Path, str]) -> None:
    folder, url = served
    webdataset(folder)
    source = open_source(f"{url}/train-{{0000..0002}}.tar", index_dir=folder / "kept")
    Ranges.asked.clear()
    assert source.read(5) == PICTURES[5]
    assert len(Ranges.asked) == 1
    Ranges.failures += [503, 429]
    assert source.read(6) == PICTURES[6]
    Ranges.failures += [503] * 9
    with pytest.raises(RunError, match="does not answer, asked 3 times") as caught:
        source.read(7)
    assert "\n" not in str(caught.value)
    Ranges.failures.clear()
    os.unlink(folder / "train-0002.tar")
    with pytest.raises(BadImage, match="no such file"):
        source.read(9)
    Ranges.whole = True
    try:
        with pytest.raises(RunError, match="hands out whole files"):
            source.read(0)
    finally:
        Ranges.whole = False


@pytest.mark.parametrize(
    ("spec", "code", "words"),
    [
        ("reference::memory://bucket/of.json", 2, "'reference', expected https"),
        ("simplecache::zip://a.png::memory://bucket/a.zip", 2, "'zip', expected https"),
        ("https://me:secret@host/a.tar", 2, "https://…@host/a.tar names a user"),
        ("s3://me:secret@host/a.tar", 2, "s3://…@host/a.tar names a user"),
        ("http://127.0.0.1:1/a.csv?key=secret&more=1", 1, "a.csv?…: does not answer"),
        ("nowhere://bucket/photos", 2, "nowhere://bucket/photos cannot be opened"),
        ("memory://bucket/none.tar", 2, "no such file"),
        ("memory://nothing", 2, "no image files below memory://nothing"),
        ("http://127.0.0.1:1/a.tar", 1, "does not answer"),
    ],
)
def test_what_cannot_be_reached_is_said_in_a_line(
    spec: str, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(places, "WAITS", (0.01,))
    assert main(["inspect", f"data={spec}"]) == code
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
    assert "secret" not in said


def test_without_a_url_no_file_system_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    webdataset(tmp_path)
    monkeypatch.setattr(places, "filesystem", lambda url: pytest.fail(f"{url} was asked for"))
    assert contents(open_source(str(tmp_path))) == PICTURES


def test_of_a_server_that_hands_out_whole_or_packed_files_no_more_is_read_than_is_asked_for(
    served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, url = served
    with open(folder / "a.tar", "wb") as file:
        file.truncate(1 << 26)
    monkeypatch.setattr(Ranges, "whole", True)
    tracemalloc.start()
    for start in (0, 1 << 20):
        with pytest.raises(RunError, match="hands out whole files"):
            places.read_range(f"{url}/a.tar", start, start + 1000)
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()
    monkeypatch.setattr(Ranges, "whole", False)
    assert places.read_range(f"{url}/a.tar", (1 << 26) - 3, 1 << 26) == bytes(3)
    monkeypatch.setattr(Ranges, "packed", True)
    with pytest.raises(RunError, match="packs what it hands out"):
        places.read_range(f"{url}/a.tar", 0, 10)


def test_a_file_that_was_replaced_by_one_of_its_size_is_noticed_without_an_etag(served: tuple[Path, str]) -> None:
    folder, url = served
    states = set()
    for time in (100, 200):
        (folder / "a.tar").write_bytes(b"x" * 9)
        os.utime(folder / "a.tar", (time, time))
        states.add(places.state(f"{url}/a.tar"))
    assert len(states) == 2


@pytest.mark.parametrize("key", ["source", "root"])
def test_a_url_in_the_config_of_a_run_is_not_asked_for(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "filesystem", lambda url: pytest.fail(f"{url} was asked for"))
    data = {"source": "list.txt", key: "http://10.0.0.1/a.tar"}
    (tmp_path / "config.yaml").write_text(json.dumps({"data": data}))
    with pytest.raises(UserError, match=r"which you name: images=http://10\.0\.0\.1/a\.tar"):
        run_source(SimpleNamespace(run=tmp_path))  # type: ignore[arg-type]
