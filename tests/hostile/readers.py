"""Every reader of files that others may have made, with a whole file for each, and ways to damage it.

`trial` reads a damaged file: the reader gives a value or one of its own errors in words, within seconds. Anything else
is what `test_fuzz.py` (some thousands, of fixed seeds) and `benchmarks/fuzz.py` (longer) look for.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import random
import shutil
import signal
import tarfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from zoo import zoo

from dinoreg.checkpoint import format as checkpoint
from dinoreg.checkpoint.format import METADATA
from dinoreg.config.load import load_config, to_yaml
from dinoreg.data.decode import decode
from dinoreg.data.folder_index import load_index, save_index
from dinoreg.data.open import open_source, read_labelled
from dinoreg.data.shards import Shards
from dinoreg.data.tar_index import index_tars
from dinoreg.data.value_range import BadImage, ValueRange
from dinoreg.evaluation.features.cache import _written
from dinoreg.evaluation.readers.pixel_maps import UNREADABLE, read_pixels
from dinoreg.evaluation.readers.python2_pickle import read_dictionary
from dinoreg.jobs.records import JOBS, read_events, read_records
from dinoreg.runtime.errors import RunError, UserError
from dinoreg.weights.files import read_file
from dinoreg.weights.load import load
from tests.small_runs import STEP, tiny_model, write_run

WORDS = (UserError, RunError, BadImage)
SECONDS = 10  # that no reader may take
LONGEST = 5_000  # characters of a message: a path alone may have 4,096
# Values that readers of numbers and of names stumble over.
SPLINTERS = [
    b"\x00",
    b"\xff\xff\xff\xff",
    b"\x80\x00\x00\x00",
    b"../../x",
    b"\x1b[2J",
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
]
SPLINTERS += [b"[" * 3000, b"99999999999999999999", b"\n", b'"', b"\xed\xa0\x80", b"cos\nsystem\n(S'true'\ntR.", b"{}"]


@dataclass(frozen=True)
class Reader:
    """A reader, a whole file for it, and the errors that it may end with besides those in words.

    file   that is damaged
    read   reads it, by whatever names it
    whole  its bytes
    """

    file: Path
    read: Callable[[], Any]
    whole: bytes
    errors: tuple[type[BaseException], ...] = ()


class Hanging(BaseException):
    """A reader that took more than `SECONDS`."""


def readers(folder: Path) -> dict[str, Reader]:
    """Every reader by its name, each with files of its own below `folder`."""
    found: dict[str, Reader] = {}

    def add(name: str, file: Path, read: Callable[[], Any], *errors: type[BaseException]) -> None:
        found[name] = Reader(file, read, file.read_bytes(), errors)

    for part in (_weights, _checkpoints, _tables, _pictures):
        place = folder / part.__name__
        place.mkdir(parents=True)
        part(place, add)
    return found


def _weights(place: Path, add: Callable[..., None]) -> None:
    state = tiny_model(depth=1).state_dict()
    save_file(state, place / "a.safetensors")
    add("safetensors", place / "a.safetensors", lambda: read_file(place / "a.safetensors"))
    torch.save({"model": state, "args": {"lr": 1.0}}, place / "a.pth")
    add("torch file", place / "a.pth", lambda: read_file(place / "a.pth"))
    run = write_run(place / "run", tiny_model(depth=1))
    for suffix in ("json", "safetensors"):
        add(f"teacher {suffix}", run / "teacher" / f"step_{STEP:07d}.{suffix}", lambda: load(run))
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, "a.safetensors")}
    (place / "m.safetensors.index.json").write_text(json.dumps(index))
    add("shards", place / "m.safetensors.index.json", lambda: read_file(place / "m.safetensors.index.json"))


def _checkpoints(place: Path, add: Callable[..., None]) -> None:
    tensors = {"student": {"a": torch.arange(6.0), "b": torch.ones(2, 3)}}
    path = checkpoint.save(place, 3, tensors, {"step": 3, "version": checkpoint.VERSION}, keep=1)
    for name in (checkpoint.MANIFEST, checkpoint.NUMBERS, METADATA):
        add(f"checkpoint {name}", path / name, lambda: checkpoint.verify(path, digests=False))
    data = next(file for file in path.iterdir() if file.suffix == ".distcp")
    empty = {"student": {"a": torch.zeros(6), "b": torch.zeros(2, 3)}}
    add("checkpoint data", data, lambda: checkpoint.load(path, empty, verified=True))


def _tables(place: Path, add: Callable[..., None]) -> None:
    (place / "list.txt").write_text("a/b.png\nc.png # 1\n" * 3)
    add("list", place / "list.txt", lambda: open_source(str(place / "list.txt")).name(0))
    (place / "own").mkdir()
    for name in ("a.png", "b.png", "c.png", "d.png"):
        (place / "own" / name).write_bytes(b"")
    (place / "own" / "t.csv").write_text('path,label\na.png,1\n"b.png",0\nc.png,1\nd.png,0\n')
    add("labels", place / "own" / "t.csv", lambda: read_labelled(str(place / "own" / "t.csv")))
    (place / "c.yaml").write_text(to_yaml(load_config("small", {"data": "x"})))
    add("config", place / "c.yaml", lambda: load_config(place / "c.yaml"))
    np.save(place / "rows.npy", np.arange(40, dtype=np.float32).reshape(5, 8))
    (place / "rows.json").write_text(json.dumps({"done": 5, "size": 288, "crc32": 0}))
    for suffix in ("npy", "json"):
        read = lambda: _written(place / "rows.npy", place / "rows.json", 5)  # noqa: E731
        add(f"features {suffix}", place / f"rows.{suffix}", read)
    save_index(place / "index.npz", "as it was", {"paths": np.arange(5)}, time.time_ns(), 0)
    add("index", place / "index.npz", lambda: load_index(place / "index.npz", "as it was"))
    (place / "tars").mkdir()
    with tarfile.open(place / "tars" / "a.tar", "w") as archive:
        archive.add(place / "own" / "a.png", "x/a.png")
        archive.add(place / "c.yaml", "x/b.png")
    add(
        "tar",
        place / "tars" / "a.tar",
        lambda: index_tars(Shards(str(place / "tars"), ["a.tar"], ".tar"), place / "none").read(1),
    )
    launch = place / "launch"
    launch.mkdir()
    (launch / JOBS).write_text(json.dumps({"job": "1", "launch": 1, "command": ["x"], "time": 1.5}) + "\n")
    add("jobs", launch / JOBS, lambda: read_records(place))
    (launch / "1_0_events.jsonl").write_text('{"event": "start", "time": 1.0, "restarts": 0}\n')
    add("events", launch / "1_0_events.jsonl", lambda: read_events(launch, "1"))
    (place / "batch").write_bytes(pickle.dumps({"data": [1, 2], "labels": ["a"]}, protocol=2))
    add("pickle", place / "batch", lambda: read_dictionary(place / "batch", "cifar", "an archive"))


def _pictures(place: Path, add: Callable[..., None]) -> None:
    for name, animal in zoo().items():
        (place / name).write_bytes(animal.data)
        limits = ValueRange(*((value,) for value in animal.value_range)) if animal.value_range else None
        read = partial(_decoded, place / name, animal.in_channels, limits)
        add(f"picture {name}", place / name, read)
    maps = [name for name in zoo() if name.endswith(".png")]
    add("map", place / maps[0], lambda: read_pixels(place / maps[0]), *UNREADABLE)


def _decoded(path: Path, channels: int, limits: ValueRange | None) -> torch.Tensor:
    return decode(path.read_bytes(), channels, 1_000_000, value_range=limits)


def damaged(whole: bytes, draw: random.Random) -> bytes:
    """A file with some of it changed, cut, repeated or replaced; heads, where formats say what follows, the most."""
    data = bytearray(whole)
    for _ in range(draw.choice((1, 1, 2, 5))):
        place = int(len(data) ** draw.random()) - 1 if draw.random() < 0.7 else draw.randrange(len(data) + 1)
        place = min(max(place, 0), len(data))
        kind = draw.randrange(6)
        if kind == 0:
            data[place : place + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            data[place : place + 1] = bytes([(data[place : place + 1] or b"\0")[0] ^ (1 << draw.randrange(8))])
        elif kind == 2:
            del data[place : len(data) if draw.random() < 0.3 else place + draw.randrange(1, 40)]
        elif kind == 3:
            splinter = draw.choice(SPLINTERS)
            data[place : place + (len(splinter) if draw.random() < 0.5 else 0)] = splinter
        elif kind == 4:
            data[place:place] = data[place : place + draw.randrange(1, 200)]
        else:
            data[place : place + 8] = draw.randbytes(8)
    return bytes(data)


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """A context that `Hanging` ends after some seconds; in the main thread alone."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hanging(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def trial(reader: Reader, content: bytes) -> str:
    """Read a damaged file: "read" or "refused"; "" and more words where it ended otherwise."""
    reader.file.write_bytes(content)
    try:
        with within(SECONDS), warnings.catch_warnings(), contextlib.redirect_stderr(None):
            warnings.simplefilter("ignore")
            reader.read()
        return "read"
    except (*WORDS, *reader.errors) as error:
        text = str(error)
        return "refused" if text and len(text) < LONGEST else f"its text has {len(text)} characters: {text[:200]}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:300]
    finally:
        reader.file.write_bytes(reader.whole)


def fuzz(folder: Path, count: int, seed: int) -> tuple[dict[str, dict[str, int]], list[str]]:
    """`count` damaged files, shared out over all readers.

    returns  of each reader how often it read and refused, and a line per file that ended otherwise, which is kept in
             `folder/found`
    """
    draw, table = random.Random(seed), readers(folder / "whole")
    found, lines = {name: {"read": 0, "refused": 0} for name in table}, []
    pictures = [name for name in table if name.startswith("picture")]
    others = [name for name in table if name not in pictures]
    (folder / "found").mkdir()
    for number in range(count):
        names = pictures if number % 2 else others
        name = names[number // 2 % len(names)]
        content = damaged(table[name].whole, draw)
        ended = trial(table[name], content)
        if ended in found[name]:
            found[name][ended] += 1
        else:
            kept = folder / "found" / f"{number}_{table[name].file.name}"
            kept.write_bytes(content)
            lines.append(f"{name}: {ended} ({kept})")
    shutil.rmtree(folder / "whole")
    return found, lines
