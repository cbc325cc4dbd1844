"""Images inside uncompressed tar archives, one archive per class as ImageNet-22k is handed out, read by position.

Where an archive's members lie is found once: in DINOv2's `extra/entries.npy`, in tar's own block listing
(`blocks/NAME.log`), or else by walking the headers; the result is kept beside the other indexes. Nothing is unpacked,
no name of a member is ever used as a path, and every read is checked against the header that it starts with.
"""

import hashlib
import os
import re
import tarfile
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinoreg.data.decode import BadImage
from dinoreg.data.folder_index import EXTENSIONS, PathBlock, index_file, load_index, save_index
from dinoreg.data.source import Source, stamp_of_files
from dinoreg.runtime.errors import UserError, readable, reworded
from dinoreg.runtime.parallel import parallel
from dinoreg.runtime.printable import print_status
from dinoreg.runtime.regular_files import load_array, open_regular, read_regular

BLOCK = 512  # bytes of a header; members begin at multiples of it
MAX_BYTES = 1 << 28  # of one member, packed or unpacked; more is no photograph
_VERSION = 1
_CHUNK = 1 << 20  # rows of an entries.npy looked at together
_THREADS = 8  # archives indexed at once; the time goes into waiting for the disk
_WORTH_SAYING = 1 << 30  # bytes of archives from which on indexing them takes long enough to be announced
_LOG_LINE = re.compile(r"block (\d+): (.+)")
_LOG_END = re.compile(r"\*\* .* \*\*")  # "** Block of NULs **", "** End of File **"


@dataclass(eq=False)
class TarSource(Source):
    """The images in the archives of one folder. The archive is opened for each read, so that threads share nothing.

    root      the folder, absolute
    archives  (a,) file names in the folder, ascending
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
            with open_regular(self._archive(index)) as file:
                file.seek(start)
                member = file.read(end - start)
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
        return stamp_of_files(self.fingerprint().encode(), (os.path.join(self.root, name) for name in self.archives))

    def _archive(self, index: int) -> str:
        return os.path.join(self.root, self.archives[int(self.archive[index])])


def index_tars(
    root: str | os.PathLike[str],
    index_dir: str | os.PathLike[str] | None = None,
    extra: str | os.PathLike[str] | None = None,
) -> TarSource:
    """The images in the archives `root/*.tar`: archives in the order of their names, members as they lie.

    index_dir  where the index is kept; by default the user's cache folder. One that cannot be written is done without
    extra      the folder of DINOv2's `entries.npy`; by default `root/extra`, where there is one

    Members count as images by their extension, as files of a folder do; links, folders and hidden files are left out.
    Raises UserError, in one line, for no archives, a damaged one, or a listing that does not fit them.
    """
    root = os.path.abspath(root)
    archives = _archives(root)
    entries = Path(extra or os.path.join(root, "extra")) / "entries.npy"
    has_entries = entries.is_file()
    if extra is not None and not has_entries:
        raise UserError(f"data: {entries} is missing, expected DINOv2's table of the images in the archives of {root}")
    logs = {} if has_entries else _logs(root, archives)
    paths = [*(Path(root, name) for name in archives), *([entries] if has_entries else map(Path, logs.values()))]
    states = [(path.name, status.st_size, status.st_mtime_ns) for path in paths for status in (path.stat(),)]
    evidence = hashlib.sha256(repr((_VERSION, states)).encode()).hexdigest()
    file = index_file(os.fsencode(f"tars\0{root}\0{entries}"), index_dir)
    kept = load_index(file, evidence)
    if kept is not None:
        names = PathBlock(kept["names"].tobytes())
        return TarSource(root, archives, names, kept["archive"], kept["start"], kept["end"])
    started = time.time_ns()
    sizes = np.array([size for _, size, _ in states[: len(archives)]], dtype=np.int64)
    if has_entries:
        source = _from_entries(root, entries, archives, sizes)
    else:
        source = _from_archives(root, archives, sizes, logs)
    if not len(source):
        raise UserError(f"data: no image files in the {len(archives)} archives of {root}")
    arrays = {name: getattr(source, name) for name in ("archive", "start", "end")}
    arrays["names"] = source.names.as_array()
    save_index(file, evidence, arrays, started, newest=max(changed for _, _, changed in states))
    return source


def _archives(root: str) -> list[str]:
    """The names of the archives in a folder, ascending."""
    with readable(f"data: the folder {root}"), os.scandir(root) as entries:
        names = sorted(e.name for e in entries if e.name.endswith(".tar") and e.name[0] != "." and e.is_file())
    if not names:
        raise UserError(f"data: no .tar archives in {root}")
    return names


def _logs(root: str, archives: Iterable[str]) -> dict[str, str]:
    """The block listing of each archive that has one."""
    folder = os.path.join(root, "blocks")
    present = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    logs = {name: f"{name.removesuffix('.tar')}.log" for name in archives}
    return {name: os.path.join(folder, log) for name, log in logs.items() if log in present}


# ------------------------------------------------------------------------------------------------------------
# Three ways to find the members


def _from_entries(root: str, entries: Path, archives: Sequence[str], sizes: np.ndarray) -> TarSource:
    """From DINOv2's table, in its order, which is that of the indices of DINOv2's own runs."""
    with reworded(f"data: {entries} is not a readable array", OSError, ValueError):
        table = load_array(entries, mmap_mode="r")
    wanted = {"class_id", "start_offset", "end_offset", "filename"}
    if table.ndim != 1 or not wanted <= set(table.dtype.names or ()):
        raise UserError(f"data: {entries} has no columns {', '.join(sorted(wanted))}")
    numbers = {name.removesuffix(".tar"): number for number, name in enumerate(archives)}
    archive = np.empty(len(table), dtype=np.int32)
    start, end = (table[column].astype(np.int64) for column in ("start_offset", "end_offset"))
    blocks: list[bytes] = []
    for first in range(0, len(table), _CHUNK):
        rows = np.asarray(table[first : first + _CHUNK])
        ids = rows["class_id"]
        starts = np.flatnonzero(np.append(True, ids[1:] != ids[:-1]))  # of runs of one class
        names_of_runs = [str(name) for name in ids[starts]]
        unknown = [name for name in names_of_runs if name not in numbers]
        if unknown:
            raise UserError(f"data: {entries} lists images of {unknown[0]}, but {root} has no {unknown[0]}.tar")
        lengths = np.diff(np.append(starts, len(ids)))
        archive[first : first + len(rows)] = np.repeat([numbers[name] for name in names_of_runs], lengths)
        blocks.append(PathBlock.of(rows["filename"].tolist()).block)
    names = PathBlock(b"".join(blocks))
    outside = np.flatnonzero((start < 0) | (end < start + BLOCK) | (end > sizes[archive]))
    if len(outside) or len(names) != len(table):
        at = int(outside[0]) if len(outside) else 0
        raise UserError(
            f"data: {entries}: {table[at]['filename']} at bytes {start[at]}..{end[at]} does not lie in "
            f"{archives[archive[at]]} of {sizes[archive[at]]} bytes; without this file the archives are indexed anew"
        )
    return TarSource(root, archives, names, archive, start, end)


def _from_archives(root: str, archives: Sequence[str], sizes: np.ndarray, logs: dict[str, str]) -> TarSource:
    """From block listings where there are any, else from the archives' own headers."""
    unlisted = [number for number, name in enumerate(archives) if name not in logs]
    if int(sizes[unlisted].sum()) > _WORTH_SAYING:
        print_status(f"data: finding the images in {len(unlisted):,} archives of {root}, once")

    def members(number: int) -> tuple[bytes, list[int], list[int]]:
        path = os.path.join(root, archives[number])
        log = logs.get(archives[number])
        listed = _from_headers(path) if log is None else _from_log(log, path, int(sizes[number]))
        images = [each for each in listed if _is_image(each[0])]
        return PathBlock.of([name for name, _, _ in images]).block, [s for _, s, _ in images], [e for _, _, e in images]

    found = list(parallel(members, range(len(archives)), _THREADS))
    return TarSource(
        root,
        archives,
        PathBlock(b"".join(block for block, _, _ in found)),
        np.repeat(np.arange(len(found), dtype=np.int32), [len(starts) for _, starts, _ in found]),
        np.concatenate([np.array(starts, dtype=np.int64) for _, starts, _ in found]),
        np.concatenate([np.array(ends, dtype=np.int64) for _, _, ends in found]),
    )


def _is_image(name: str) -> bool:
    leaf = name.rsplit("/", 1)[-1]
    return os.path.splitext(leaf)[1].lower() in EXTENSIONS and not leaf.startswith(".") and "\0" not in name


def _from_headers(path: str) -> list[tuple[str, int, int]]:
    """(name, start, end) of every regular member, by walking the headers."""
    found = []
    damaged = tarfile.TarError, OSError, EOFError, ValueError, OverflowError
    whole = reworded(f"data: {path} is not a whole uncompressed tar archive", *damaged)
    with whole, open_regular(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            if member.isreg() and not member.issparse():
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                found.append((member.name, member.offset_data - BLOCK, end))
        # tarfile takes a broken header for the end of the archive; a whole one ends in zeros, or at once.
        assert archive.fileobj is not None
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(BLOCK).strip(b"\0"):
            raise tarfile.ReadError(f"no header at byte {archive.offset}")
    return found


def _from_log(log: str, path: str, size: int) -> list[tuple[str, int, int]]:
    """(name, start, end) of every member that the listing of `tar --list --block-number` names."""
    with readable(f"data: {log}"):
        lines = read_regular(log).decode("utf-8", "surrogateescape").splitlines()
    starts, names = [], []
    for number, line in enumerate(filter(None, map(str.rstrip, lines)), 1):
        matched = _LOG_LINE.fullmatch(line)
        if matched is None:
            raise UserError(f"data: {log} line {number}: {line[:80]!r}, expected 'block N: NAME'")
        starts.append(int(matched[1]) * BLOCK)
        names.append(matched[2])
    if not names or not _LOG_END.fullmatch(names[-1]):
        raise UserError(f"data: {log} does not end with '** Block of NULs **': it is not whole")
    for start, end in zip(starts, [*starts[1:], size]):
        if not start <= end <= size:
            raise UserError(f"data: {log} does not fit {path}, whose {size} bytes do not reach or order its blocks")
    return [
        (name, start, end)
        for name, start, end in zip(names[:-1], starts, starts[1:])
        if not name.endswith("/") and end > start
    ]


def _unpack(data: bytes) -> bytes:
    """What a gzip member holds; never more than MAX_BYTES of it."""
    engine = zlib.decompressobj(wbits=31)
    try:
        unpacked = engine.decompress(data, MAX_BYTES)
    except zlib.error as error:
        raise BadImage(f"damaged gzip data ({error})") from None
    if engine.unconsumed_tail:
        raise BadImage(f"unpacks to more than the limit of {MAX_BYTES} bytes")
    if not engine.eof:
        raise BadImage("its gzip data end too early")
    return unpacked
