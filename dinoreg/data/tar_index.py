"""Images inside uncompressed tar archives, read by position: ImageNet-22k's, one a class, and WebDataset's shards.

Where an archive's members lie is found once, by walking the headers, and kept beside the other indexes. Nothing is
unpacked, no name of a member is ever used as a path, and every read is checked against the header that it starts with.

Shards are not streamed through a buffer, as the webdataset package does: a stream has no length, an order that depends
on the number of its readers, and no place to go on from. By an index every image is drawn once an epoch in an order
that the seed alone says, and a stopped run goes on to the bit, on any number of processes. What it costs is one read of
the headers, once, and of shards at a URL of the whole shards.
"""

import gzip
import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from dinoreg.data.decode import BadImage
from dinoreg.data.folder_index import EXTENSIONS, PathBlock, kept_index
from dinoreg.data.shards import Shards, states_of
from dinoreg.data.source import Source, stamp_of_files
from dinoreg.data.tables import INDEX, Columns, Table, may_tell, text_of
from dinoreg.runtime.errors import UserError, reworded
from dinoreg.runtime.parallel import parallel
from dinoreg.runtime.places import joined, opened, read_range
from dinoreg.runtime.printable import print_status

BLOCK = 512  # bytes of a header; members begin at multiples of it
MAX_BYTES = 1 << 28  # of one member, packed or unpacked; more is no photograph
_MOST_OF_LABELS = 1 << 20  # bytes of the labels of one picture
_VERSION = 2
_THREADS = 8  # archives indexed at once; the time goes into waiting for the disk
_WORTH_SAYING = 1 << 30  # bytes of archives from which on indexing them takes long enough to be announced


@dataclass(eq=False)
class TarSource(Source):
    """The images in some archives. The archive is opened for each read, so that threads share nothing.

    root      the folder that they lie below: an absolute path, or a URL
    archives  (a,) their names below it
    names     (n,) names of the members
    archive   (n,) int32, which archive each is in
    start     (n,) int64, the byte at which its header begins
    end       (n,) int64, the byte at which the next header begins
    """

    root: str
    archives: Sequence[str]
    names: PathBlock
    archive: np.ndarray
    start: np.ndarray
    end: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> bytes:
        """The bytes of a member; BadImage when its archive cannot be read or is cut off."""
        start, end = int(self.start[index]), int(self.end[index])
        if end - start > MAX_BYTES:
            raise BadImage(f"{end - start} bytes, more than the limit of {MAX_BYTES}")
        try:
            member = read_range(self._archive(index), start, end)
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from error
        try:
            size = tarfile.TarInfo.frombuf(member[:BLOCK], "utf-8", "surrogateescape").size
        except tarfile.TarError:
            raise BadImage(f"no tar header at byte {start}: the archive is damaged or not the one indexed") from None
        data = member[BLOCK : BLOCK + size]
        if len(data) < size:
            raise BadImage(f"the archive ends or goes on with another file after {len(data)} of its {size} bytes")
        # 26 images of ImageNet-22k are packed once more inside; no image format begins with these two bytes.
        return _unpack(data) if data[:2] == b"\x1f\x8b" else data

    def name(self, index: int) -> str:
        """`ARCHIVE:MEMBER`, with the folder."""
        return f"{self._archive(index)}:{self.names[index]}"

    def fingerprint(self) -> str:
        """Over the archives' names, and each member's name and archive."""
        digest = hashlib.sha256(PathBlock.of(list(self.archives)).block)
        digest.update(self.names.block)
        digest.update(self.archive.tobytes())
        return digest.hexdigest()[:16]

    def stamp(self) -> str:
        """By sizes and times of change of the archives."""
        return stamp_of_files(self.fingerprint().encode(), (joined(self.root, name) for name in self.archives))

    def shards(self) -> list[tuple[str, int]]:
        """The archives; the images of each follow one another."""
        return list(zip(self.archives, np.bincount(self.archive, minlength=len(self.archives)).tolist()))

    def _archive(self, index: int) -> str:
        return joined(self.root, self.archives[int(self.archive[index])])


def index_tars(shards: Shards, index_dir: str | os.PathLike[str] | None = None) -> TarSource:
    """The images in tar archives: archives in their order, members as they lie.

    index_dir  where the index is kept; by default the user's cache folder. One that cannot be written is done without

    Members count as images by their extension, as files of a folder do; links, folders and hidden files are left out.
    Raises UserError, in one line, for a damaged archive, and for archives without an image.
    """
    places = [joined(shards.root, name) for name in shards.names]
    states = states_of(places)

    def find() -> dict[str, np.ndarray]:
        if sum(size for _, size, _ in states) > _WORTH_SAYING:
            print_status(f"data: finding the images in {len(places):,} archives of {shards.root}, once")
        blocks, ends = zip(*parallel(lambda number: _images_of(places[number]), range(len(places)), _THREADS))
        start, end = np.ascontiguousarray(np.concatenate(ends).T)
        archive = np.repeat(np.arange(len(ends), dtype=np.int32), [len(each) for each in ends])
        return {"names": np.frombuffer(b"".join(blocks), np.uint8), "archive": archive, "start": start, "end": end}

    kept = kept_index("\0".join(("tars", *places)), (_VERSION, states), index_dir, find)
    if not len(kept["start"]):
        raise UserError(f"data: no image files in the {len(places)} archives of {shards.root}")
    names = PathBlock(kept["names"].tobytes())
    return TarSource(shards.root, shards.names, names, kept["archive"], kept["start"], kept["end"])


def sidecars(source: TarSource, title: str, columns: Columns) -> Table:
    """What lies beside each picture of WebDataset's shards, KEY.cls and the fields of KEY.json; no JSON says nothing.

    A key is the picture's name without its ending or, as WebDataset has it, without all behind the name's first dot.
    Of fields that cannot be labels or splits the names are kept, not the values: captions may take gigabytes.

    columns  the names of those of labels and splits, where they are not usual ones
    """
    rows: list[dict[str, str]] = []
    names: dict[str, str] = {}  # one object for each
    for number, name in enumerate(source.archives):
        told = {}
        for archive, member in _walked(joined(source.root, name)):
            if member.name.endswith((".cls", ".json")):
                text = archive.extractfile(member).read(_MOST_OF_LABELS)  # type: ignore[union-attr]
                told[member.name] = _fields(member.name, text, columns)
        for index in np.flatnonzero(source.archive == number).tolist():
            stem = os.path.splitext(source.names[index])[0]
            folder, slash, leaf = stem.rpartition("/")
            rows.append({})
            for key in (folder + slash + leaf.partition(".")[0], stem):
                for field, value in (told.get(f"{key}.json", {}) | told.get(f"{key}.cls", {})).items():
                    field = names.setdefault(field, field)
                    if value is not None:
                        rows[-1][field] = value
    return Table(title, title, tuple(names), "image", files=tuple(source.archives), known=rows)


def _fields(name: str, text: bytes, columns: Columns) -> dict[str, str | None]:
    """The fields of a sidecar, with None for a value that is not asked for; none where it is no JSON object.

    A field with another name than usual may be the label where it is the only one.
    """
    if name.endswith(".cls"):
        return {"cls": text.decode("utf-8", "replace").strip()} if text else {}
    with suppress(ValueError, RecursionError):
        found = json.loads(text)
        if isinstance(found, dict):
            others = [each for each in found if not may_tell(each, columns) and each.strip().lower() not in INDEX]
            left = others if len(others) > 1 or "label" in columns else ()
            return {field: None if field in left else text_of(value) for field, value in found.items()}
    return {}


def _images_of(path: str) -> tuple[bytes, np.ndarray]:
    """The images of an archive: their names as a `PathBlock` has them, and (n, 2) int64 where each starts and ends."""
    images = [each for each in members_of(path) if is_image(each[0])]
    ends = np.array([each[1:] for each in images], dtype=np.int64).reshape(-1, 2)
    return PathBlock.of([name for name, _, _ in images]).block, ends


def is_image(name: str) -> bool:
    """Whether a member is a picture by its ending, and not hidden."""
    leaf = name.rsplit("/", 1)[-1]
    return os.path.splitext(leaf)[1].lower() in EXTENSIONS and not leaf.startswith(".") and "\0" not in name


def members_of(path: str) -> list[tuple[str, int, int]]:
    """(name, start, end) of every regular member of an archive, by walking the headers; UserError for a damaged one."""
    return [
        (member.name, member.offset_data - BLOCK, member.offset_data + -(-member.size // BLOCK) * BLOCK)
        for _, member in _walked(path)
    ]


class _Member(tarfile.TarInfo):
    """A member of at least 0 bytes: by a negative size Python before 3.11.14 walks back, for ever (CVE-2025-8194)."""

    def _block(self, count: int) -> int:
        if count < 0:
            raise tarfile.ReadError(f"a member of {count} bytes")
        return -(-count // BLOCK) * BLOCK


def _walked(path: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Every regular member with the open archive, which keeps none of them; UserError as `members_of`."""
    damaged = tarfile.TarError, OSError, EOFError, ValueError, ArithmeticError, LookupError, RecursionError, MemoryError
    whole = reworded(f"data: {path} is not a whole uncompressed tar archive", *damaged)
    with whole, opened(path) as file, tarfile.open(fileobj=file, mode="r:", tarinfo=_Member) as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]
            if member.isreg() and not member.issparse():
                yield archive, member
        # tarfile takes a broken header for the end of the archive; a whole one ends in zeros, or at once.
        assert archive.fileobj is not None
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(BLOCK).strip(b"\0"):
            raise tarfile.ReadError(f"no header at byte {archive.offset}")


def _unpack(data: bytes) -> bytes:
    """What a gzip member holds; never more than MAX_BYTES of it."""
    try:
        with gzip.open(io.BytesIO(data)) as file:
            unpacked = file.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise BadImage(f"damaged gzip data ({error})") from None
    if len(unpacked) > MAX_BYTES:
        raise BadImage(f"unpacks to more than the limit of {MAX_BYTES} bytes")
    return unpacked
