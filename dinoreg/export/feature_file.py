"""A file of features with the paths they belong to: written row by row, resumable, then safetensors or parquet.

Rows are appended in `OUT.part/` beside a note of how far they go; what a kill left behind the note is cut off when the
work goes on. At the end the rows get their header (safetensors: it stands in front of them, in room that was left for
it) or are copied into row groups (parquet), and OUT appears whole, in one rename.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from dinoreg.checkpoint.atomic import sync, write_atomic
from dinoreg.runtime.dependencies import install
from dinoreg.runtime.errors import RunError, UserError

DTYPES = {"float32": "F32", "float16": "F16"}
SUFFIXES = (".safetensors", ".parquet")
FORMAT = "dinoreg-features"
NOTE_SECONDS = 10.0  # between notes of how far the rows go; that much is computed again after a kill
_ROOM = 1 << 14  # bytes in front of the rows, for the header of a safetensors file
_CHUNK = 1 << 26  # bytes of rows handled at a time when the file is finished
_NAMES = 1 << 16  # names handled at a time
_NOTE, _ROWS, _SKIPPED, _PARQUET = "note.json", "rows.bin", "skipped.jsonl", "features.parquet"


class RowFile:
    """Rows of one shape on their way to a file, and the images that were left out; a context manager.

    next     index of the first image of the source that is not dealt with
    count    rows so far
    skipped  {index: (name, reason)} of the images left out
    """

    def __init__(
        self, out: Path, settings: Mapping[str, Any], shape: tuple[int, ...], dtype: str, total: int, restart: bool
    ) -> None:
        """Go on with `OUT.part/` where its note says, or begin it.

        settings  what shapes the rows; UserError, with nothing changed, when an unfinished file has others, unless
                  `restart` drops it, or when the disk is too small
        total     images, so rows at most
        """
        self.out, self.shape, self.dtype, self.total = out, shape, np.dtype(dtype).newbyteorder("<"), total
        self.settings = json.loads(json.dumps({**settings, "shape": shape, "dtype": dtype, "images": total}))
        self.folder = out.with_name(f"{out.name}.part")
        self.row_bytes = self.dtype.itemsize * math.prod(shape)
        self.next = self.count = 0
        self.skipped: dict[int, tuple[str, str]] = {}
        note = self._read_note(restart)
        self._check_room(note)
        try:
            if note is None:
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir(parents=True)
            self._rows = _cut(self.folder / _ROWS, _ROOM + self.row_bytes * (note["rows"] if note else 0))
            self._list = _cut(self.folder / _SKIPPED, note["skipped"] if note else 0)
            if note is not None:
                self.next, self.count = note["next"], note["rows"]
                for line in (self.folder / _SKIPPED).read_text(encoding="utf-8").splitlines():
                    each = json.loads(line)
                    self.skipped[each["index"]] = (each["name"], each["reason"])
            self._sure = (self.next, self.count, self._list.tell())
            self._noted = time.monotonic()
            self.note()
        except OSError as error:
            raise self.failure(error) from None

    def __enter__(self) -> RowFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rows.close()
        self._list.close()

    def append(self, rows: np.ndarray) -> None:
        """rows (b, *shape) of the next b images that could be read."""
        self._rows.write(np.ascontiguousarray(rows, dtype=self.dtype).tobytes())
        self.count += len(rows)

    def skip(self, index: int, name: str, reason: str) -> None:
        self.skipped[index] = (name, reason)
        self._list.write(f"{json.dumps({'index': index, 'name': name, 'reason': reason})}\n".encode())

    def reached(self, index: int) -> None:
        """All images below `index` are dealt with; now and then that is noted."""
        self.next = index
        self._sure = (index, self.count, self._list.tell())
        if time.monotonic() - self._noted >= NOTE_SECONDS or index == self.total:
            self.note()

    def note(self) -> None:
        """Write down how far the rows go, once they are on the disk."""
        for file in (self._rows, self._list):
            file.flush()
            os.fsync(file.fileno())
        following, rows, skipped = self._sure
        note = {"settings": self.settings, "next": following, "rows": rows, "skipped": skipped}
        write_atomic(self.folder / _NOTE, json.dumps(note) + "\n")
        self._noted = time.monotonic()

    def finish(self, names: Iterator[str], about: Mapping[str, Any]) -> None:
        """Make OUT of the rows.

        names   of the images that the rows belong to, in order
        about   numbers and words that the file carries
        """
        texts = {"format": FORMAT, **{key: str(value) for key, value in about.items()}}
        self.__exit__(None, None, None)
        try:
            if self.out.suffix == ".parquet":
                whole = self._to_parquet(names, texts)
            else:
                whole = self._to_safetensors(names, texts)
            sync(whole)
            listing = skipped_list(self.out)
            if self.skipped:
                os.replace(self.folder / _SKIPPED, listing)
            else:
                listing.unlink(missing_ok=True)
            os.replace(whole, self.out)
            sync(self.out.parent)
        except OSError as error:
            raise self.failure(error) from None
        shutil.rmtree(self.folder, ignore_errors=True)

    def failure(self, error: OSError) -> RunError:
        return RunError(f"out={self.out}: cannot be written ({error.strerror or error})")

    # --------------------------------------------------------------------------------------------------------

    def _read_note(self, restart: bool) -> dict[str, Any] | None:
        """The note of an unfinished file that can be gone on with, else None."""
        if not self.folder.exists():
            return None
        try:
            note = json.loads((self.folder / _NOTE).read_text(encoding="utf-8"))
            settings, numbers = note["settings"], [note[key] for key in ("next", "rows", "skipped")]
            sizes = [(self.folder / name).stat().st_size for name in (_ROWS, _SKIPPED)]
        except (OSError, ValueError, KeyError, TypeError):
            if self._is_ours():
                return None
            raise UserError(f"out={self.out}: {self.folder} is in the way and is no unfinished embed") from None
        if settings != self.settings:
            if restart:
                return None
            known = settings if isinstance(settings, dict) else {}
            key = next((key for key in self.settings if known.get(key) != self.settings[key]), "settings")
            raise UserError(
                f"out={self.out}: an unfinished embed has {key}={known.get(key)}, not {self.settings.get(key)}; "
                "finish it with its own keys, or drop it with overwrite=true"
            )
        whole = all(isinstance(each, int) and each >= 0 for each in numbers)
        if not whole or numbers[0] > self.total or numbers[1] > numbers[0]:
            return None
        fits = sizes[0] >= _ROOM + self.row_bytes * numbers[1] and sizes[1] >= numbers[2]
        return dict(note) if fits else None

    def _is_ours(self) -> bool:
        """A kill in the very first write leaves none but our own files."""
        ours = {_ROWS, _SKIPPED, _NOTE, f"{_NOTE}.part", _PARQUET}
        return self.folder.is_dir() and {path.name for path in self.folder.iterdir()} <= ours

    def _check_room(self, note: Mapping[str, Any] | None) -> None:
        existing = next(path for path in (self.out.parent, *self.out.parent.resolve().parents) if path.is_dir())
        copies = 2 if self.out.suffix == ".parquet" else 1
        needed = copies * self.row_bytes * self.total - self.row_bytes * (note["rows"] if note else 0)
        free = shutil.disk_usage(existing).free
        if needed > free:
            raise UserError(
                f"out={self.out}: {self.total:,} rows need {needed / 2**30:,.1f} GiB and {free / 2**30:,.1f} GiB are "
                "free; dtype=float16 takes half, token=mean one row an image"
            )

    def _to_safetensors(self, names: Iterator[str], texts: Mapping[str, str]) -> Path:
        """Names behind the rows, the header in front of them: nothing that is large is moved."""
        path, ends = self.folder / _ROWS, 0
        features = self.row_bytes * self.count
        with open(path, "r+b") as file:
            file.truncate(_ROOM + features)
            file.seek(_ROOM + features + 8 * self.count)
            at = file.tell()
            for first, chunk in _chunks(map(os.fsencode, names)):
                lengths = np.cumsum([len(name) for name in chunk], dtype="<i8") + ends
                file.seek(_ROOM + features + 8 * first)
                file.write(lengths.tobytes())
                file.seek(at)
                file.write(b"".join(chunk))
                at, ends = file.tell(), int(lengths[-1])
            begin, starts = features, features + 8 * self.count
            kind = DTYPES[self.dtype.name]
            header = {
                "__metadata__": texts,
                "features": {"dtype": kind, "shape": [self.count, *self.shape], "data_offsets": [0, begin]},
                "path_ends": {"dtype": "I64", "shape": [self.count], "data_offsets": [begin, starts]},
                "paths": {"dtype": "U8", "shape": [ends], "data_offsets": [starts, starts + ends]},
            }
            text = json.dumps(header).encode()
            file.seek(0)
            file.write(struct.pack("<Q", _ROOM - 8) + text.ljust(_ROOM - 8))
        return path

    def _to_parquet(self, names: Iterator[str], texts: Mapping[str, str]) -> Path:
        pyarrow = import_pyarrow(self.out)
        path = self.folder / _PARQUET
        width = math.prod(self.shape)
        number = pyarrow.float16() if self.dtype.name == "float16" else pyarrow.float32()
        schema = pyarrow.schema(
            [("path", pyarrow.string()), ("features", pyarrow.list_(number, width))],
            metadata={**texts, "shape": "x".join(map(str, self.shape))},
        )
        rows = np.memmap(self.folder / _ROWS, self.dtype, "r", _ROOM, (self.count, width))
        at_once = max(1, min(_CHUNK // self.row_bytes, _NAMES))
        with pyarrow.parquet.ParquetWriter(path, schema) as writer:
            for first, chunk in _chunks(names, at_once):
                # A name that is no UTF-8 is written with its odd bytes as \xNN.
                shown = [name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for name in chunk]
                values = pyarrow.array(np.array(rows[first : first + len(chunk)]).ravel(), number)
                lists = pyarrow.FixedSizeListArray.from_arrays(values, width)
                writer.write_table(pyarrow.Table.from_arrays([pyarrow.array(shown), lists], schema=schema))
        return path


def read_features(path: str | Path) -> tuple[np.ndarray, list[str]]:
    """(features (n, …), paths (n,)) of a file that `dinoreg embed` wrote; UserError when it is none."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"features {path}: no such file")
    try:
        return _read_parquet(path) if path.suffix == ".parquet" else _read_safetensors(path)
    except (KeyError, IndexError, TypeError, AttributeError):
        raise UserError(f"features {path}: not a file of dinoreg embed") from None


def _read_safetensors(path: Path) -> tuple[np.ndarray, list[str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                raise UserError(f"features {path}: not a file of dinoreg embed")
            features, ends, names = (file.get_tensor(key) for key in ("features", "path_ends", "paths"))
    except (SafetensorError, OSError) as error:
        raise UserError(f"features {path}: not a whole safetensors file ({str(error)[:120]})") from None
    block = names.tobytes()
    return features, [os.fsdecode(block[a:b]) for a, b in itertools.pairwise([0, *ends.tolist()])]


def _read_parquet(path: Path) -> tuple[np.ndarray, list[str]]:
    pyarrow = import_pyarrow(path)
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"features {path}: not a whole parquet file ({str(error).splitlines()[0][:120]})") from None
    shape = [int(side) for side in table.schema.metadata[b"shape"].decode().split("x")]
    flat = table.column("features").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(table), *shape), table.column("path").to_pylist()


def import_pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: parquet needs pyarrow: {install('pyarrow')}, or use .safetensors") from None
    return pyarrow


def skipped_list(out: Path) -> Path:
    """Where the images that were left out are listed: beside the output."""
    return out.with_name(f"{out.name}.skipped.jsonl")


def _cut(path: Path, size: int) -> BinaryIO:
    """A file opened for appending at `size` bytes; what lies behind is cut off."""
    path.touch()
    file = open(path, "r+b")  # noqa: SIM115 - closed by __exit__
    file.truncate(size)
    file.seek(size)
    return file


def _chunks(names: Iterator[Any], size: int = _NAMES) -> Iterator[tuple[int, list[Any]]]:
    """(number of the first, names) of the next `size`, again and again."""
    first = 0
    while chunk := list(itertools.islice(names, size)):
        yield first, chunk
        first += len(chunk)
