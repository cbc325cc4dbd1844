"""A file of features with the paths they belong to: written row by row, resumable, then safetensors or parquet.

Rows are appended in `OUT.part/` beside a note of how far they go; rows beyond the note, which a kill may leave, are cut
off on resuming. At the end the rows get their header (safetensors: in the room that was left in front of them) or are
copied into row groups (parquet), and OUT appears complete, in one rename.
"""

import itertools
import json
import math
import os
import shutil
import struct
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from dinoreg.checkpoint.atomic import sync, write_atomic
from dinoreg.runtime.dependencies import install
from dinoreg.runtime.digest import blocks
from dinoreg.runtime.errors import UserError, reworded
from dinoreg.runtime.printable import print_status
from dinoreg.runtime.regular_files import read_regular

SUFFIXES = (".safetensors", ".parquet")
FORMAT = "dinoreg-features"
NOTE_SECONDS = 10.0  # between notes of how far the rows go; that much is computed again after a kill
_ROOM = 1 << 14  # bytes in front of the rows, for the header of a safetensors file
_CHUNK = 1 << 26  # bytes of rows in a row group of parquet
_NOTE, _ROWS, _PARQUET = "note.json", "rows.bin", "features.parquet"


class RowFile:
    """Rows of one shape on their way to a file, and the images that were left out. OSError where a disk fails.

    next     index of the first image of the source that is not done
    count    rows of the images before it
    skipped  {index: (name, reason)} of the images left out
    """

    def __init__(
        self, out: Path, settings: Mapping[str, Any], shape: tuple[int, ...], dtype: str, total: int, restart: bool
    ) -> None:
        """Go on with `OUT.part/` where its note says, or begin it.

        settings  what shapes the rows; UserError, with nothing changed, when an unfinished file has others, unless
                  `restart` drops it, or when the disk is too small
        shape     of one row
        dtype     "float32" or "float16"
        total     images, so rows at most
        """
        self.out, self.shape, self.dtype, self.total = out, shape, np.dtype(dtype).newbyteorder("<"), total
        self.settings = json.loads(json.dumps({**settings, "shape": shape, "dtype": dtype, "images": total}))
        self.folder = out.with_name(f"{out.name}.part")
        self.row_bytes = self.dtype.itemsize * math.prod(shape)
        self.next, self.count, self._crc, self._running = 0, 0, 0, 0  # CRC-32 of `count` rows, and of all
        self.skipped: dict[int, tuple[str, str]] = {}
        resumed = self.folder.exists() and self._read_note(restart)
        self._check_room()
        if not resumed:
            self._running = 0
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            (self.folder / _ROWS).touch()
        self._rows = open(self.folder / _ROWS, "r+b")  # noqa: SIM115 - closed by close()
        self._rows.truncate(_ROOM + self.row_bytes * self.count)
        self._rows.seek(0, os.SEEK_END)
        self.note()

    def close(self) -> None:
        """Leave the rows as they are; `finish` may follow."""
        self._rows.close()

    def append(self, rows: np.ndarray) -> None:
        """Add the rows (b, *shape) of the next b images that could be read."""
        data = np.ascontiguousarray(rows, dtype=self.dtype).tobytes()
        self._rows.write(data)
        self._running = zlib.crc32(data, self._running)

    def skip(self, index: int, name: str, reason: str) -> None:
        """Record that image `index`, called `name`, is left out, and why."""
        self.skipped[index] = (name, reason)

    def reached(self, index: int) -> None:
        """Record that all images below `index` are done; every NOTE_SECONDS and at the end the note is written."""
        self.next, self.count = index, (self._rows.tell() - _ROOM) // self.row_bytes
        self._crc = self._running
        if time.monotonic() - self._noted >= NOTE_SECONDS or index == self.total:
            self.note()

    def note(self) -> None:
        """Write how far the rows go, once they are on the disk."""
        self._rows.flush()
        os.fsync(self._rows.fileno())
        skipped = {index: each for index, each in self.skipped.items() if index < self.next}
        note = {"settings": self.settings, "next": self.next, "rows": self.count, "crc32": self._crc}
        write_atomic(self.folder / _NOTE, json.dumps({**note, "skipped": skipped}) + "\n")
        self._noted = time.monotonic()

    def finish(self, names: Iterator[str], about: Mapping[str, Any]) -> None:
        """Make OUT of the rows, and list the images left out beside it.

        names   of the images that the rows belong to, in order
        about   facts for the file's metadata
        raises  UserError where parquet is wanted and pyarrow is missing, OSError where the disk fails
        """
        texts = {"format": FORMAT, **{key: str(value) for key, value in about.items()}}
        self.close()
        write = self._to_parquet if self.out.suffix == ".parquet" else self._to_safetensors
        finished = write(names, texts)
        sync(finished)
        listing = skipped_list(self.out)
        listing.unlink(missing_ok=True)
        if self.skipped:
            lines = ({"index": index, "name": name, "reason": why} for index, (name, why) in self.skipped.items())
            write_atomic(listing, "".join(f"{json.dumps(line)}\n" for line in lines))
        os.replace(finished, self.out)
        sync(self.out.parent)
        shutil.rmtree(self.folder, ignore_errors=True)

    # --------------------------------------------------------------------------------------------------------

    def _read_note(self, restart: bool) -> bool:
        """Go to where the note of an unfinished file says; False where there is nothing to go on with."""
        try:
            note = json.loads(read_regular(self.folder / _NOTE))
            settings, following, rows, crc = note["settings"], int(note["next"]), int(note["rows"]), note["crc32"]
            skipped = {int(index): (str(name), str(reason)) for index, (name, reason) in note["skipped"].items()}
            for block in blocks(self.folder / _ROWS, _ROOM, self.row_bytes * max(rows, 0)):
                self._running = zlib.crc32(block, self._running)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            ours = {_ROWS, _NOTE, f"{_NOTE}.part", _PARQUET}  # a kill during the first write leaves only these
            if self.folder.is_dir() and {path.name for path in self.folder.iterdir()} <= ours:
                return False
            raise UserError(f"out={self.out}: {self.folder} is in the way and is no unfinished embed") from None
        if settings != self.settings:
            if restart:
                return False
            known = settings if isinstance(settings, dict) else {}
            key = next((key for key in self.settings if known.get(key) != self.settings[key]), "settings")
            what = f"an unfinished embed has {key}={known.get(key)}, not {self.settings.get(key)}"
            raise UserError(f"out={self.out}: {what}; finish it with its own keys, or drop it with overwrite=true")
        if not 0 <= rows == following - len(skipped) <= self.total or self._running != crc:
            print_status(f"{self.folder}: not as it was written; it is computed anew")
            return False
        self.next, self.count, self.skipped, self._crc = following, rows, skipped, crc
        return True

    def _check_room(self) -> None:
        existing = next(path for path in self.out.absolute().parents if path.is_dir())
        needed = self.row_bytes * ((2 if self.out.suffix == ".parquet" else 1) * self.total - self.count)
        free = shutil.disk_usage(existing).free
        if needed > free:
            room = f"{self.total:,} rows need {needed / 2**30:,.1f} GiB and {free / 2**30:,.1f} GiB are free"
            raise UserError(f"out={self.out}: {room}; dtype=float16 takes half, token=mean one row an image")

    def _to_safetensors(self, names: Iterator[str], texts: Mapping[str, str]) -> Path:
        """Names behind the rows, the header in front of them: nothing that is large is moved."""
        path = self.folder / _ROWS
        paths = [*map(os.fsencode, names)]
        ends = np.cumsum([*map(len, paths)], dtype="<i8")
        header: dict[str, Any] = {"__metadata__": texts}
        begin = 0
        for part, dtype, shape, size in (
            ("features", f"F{8 * self.dtype.itemsize}", [self.count, *self.shape], self.row_bytes * self.count),
            ("path_ends", "I64", ends.shape, ends.nbytes),
            ("paths", "U8", [int(ends[-1])], int(ends[-1])),
        ):
            header[part] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + size]}
            begin += size
        with open(path, "r+b") as file:
            file.write(struct.pack("<Q", _ROOM - 8) + json.dumps(header).encode().ljust(_ROOM - 8))
            file.seek(_ROOM + self.row_bytes * self.count)
            file.writelines([ends.tobytes(), *paths])
            file.truncate()
        return path

    def _to_parquet(self, names: Iterator[str], texts: Mapping[str, str]) -> Path:
        pyarrow = import_pyarrow(self.out)
        path = self.folder / _PARQUET
        width = math.prod(self.shape)
        number = pyarrow.float16() if self.dtype.itemsize == 2 else pyarrow.float32()
        schema = pyarrow.schema(
            [("path", pyarrow.string()), ("features", pyarrow.list_(number, width))],
            metadata={**texts, "shape": "x".join(map(str, self.shape))},
        )
        rows = np.memmap(self.folder / _ROWS, self.dtype, "r", _ROOM, (self.count, width))
        at_once = max(1, _CHUNK // self.row_bytes)
        # A name that is no UTF-8 is written with its odd bytes as \xNN.
        shown = (name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for name in names)
        with pyarrow.parquet.ParquetWriter(path, schema) as writer:
            for first in range(0, self.count, at_once):
                values = pyarrow.array(np.array(rows[first : first + at_once]).ravel(), number)
                lists = pyarrow.FixedSizeListArray.from_arrays(values, width)
                paths = pyarrow.array(itertools.islice(shown, at_once), pyarrow.string())
                writer.write_table(pyarrow.Table.from_arrays([paths, lists], schema=schema))
        return path


def read_rows(path: Path) -> tuple[np.ndarray, list[str]]:
    """(features (n, …), paths of the n images) of a finished file."""
    if path.suffix == ".parquet":
        table = import_pyarrow(path).parquet.read_table(path)
        shape = [int(side) for side in table.schema.metadata[b"shape"].split(b"x")]
        flat = table.column("features").combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(len(table), *shape), table.column("path").to_pylist()
    tensors = load_file(path)
    text, ends = tensors["paths"].tobytes(), [0, *tensors["path_ends"].tolist()]
    return tensors["features"], [os.fsdecode(text[start:end]) for start, end in itertools.pairwise(ends)]


def import_pyarrow(path: Path) -> Any:
    """pyarrow with its parquet module; UserError saying how to install it where it is missing."""
    with reworded(f"{path}: parquet needs pyarrow: {install('pyarrow')}, or use .safetensors", ImportError):
        import pyarrow
        import pyarrow.parquet
    return pyarrow


def skipped_list(out: Path) -> Path:
    """The path of the list of images that were left out: OUT.skipped.jsonl beside the output."""
    return out.with_name(f"{out.name}.skipped.jsonl")
