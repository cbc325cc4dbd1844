"""ImageNet-22k in small: four classes as tars, with DINOv2's listings, a gzip member and an unreadable file."""

from __future__ import annotations

import gzip
import io
import itertools
import shutil
import tarfile
from pathlib import Path

import numpy as np

from tests.miniatures.pictures import labels_for, pattern, save

WNIDS = ("n01440764", "n02084071", "n06470073", "n12102133")
UNREADABLE = "n06470073_47249.JPEG"


def write(
    root: Path,
    *,
    per_class: int = 6,
    shuffled: bool = False,
    seed: int = 0,
    layout: str = "tars",
    extra: bool = True,
    truncated: bool = False,
) -> Path:
    """`root/imagenet22k` with per_class images of a class, one of them unreadable besides, as in every real copy.

    layout     "tars" or "folders"
    extra      with DINOv2's extra/entries.npy (tars)
    truncated  the last image of the last class ends in its middle
    """
    folder = root / "imagenet22k"
    shown, told = labels_for(per_class * len(WNIDS), len(WNIDS), shuffled, seed)
    for index, (picture, label) in enumerate(zip(shown, told)):
        wnid = WNIDS[label]
        save(pattern(int(picture), seed + index), folder / wnid / f"{wnid}_{10 + 7 * index}.JPEG")
    (folder / "n06470073" / UNREADABLE).write_bytes(b"no image at all")
    if truncated:
        last = max((folder / WNIDS[-1]).iterdir(), key=lambda path: int(path.stem.split("_")[1]))
        last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    if layout == "tars":
        listings = {wnid: _pack(folder, wnid, packed=wnid == WNIDS[1]) for wnid in WNIDS}
        if extra:
            _dump(folder / "extra", listings)
    return folder


def _pack(folder: Path, wnid: str, packed: bool) -> list[tuple[int, str]]:
    """Turn a class's folder into its tar, with the first file packed: (block, name) of each member and of the end."""
    listing = []
    with tarfile.open(folder / f"{wnid}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, path in enumerate(sorted((folder / wnid).iterdir())):
            data = path.read_bytes()
            data = gzip.compress(data, mtime=0) if packed and number == 0 else data
            member = tarfile.TarInfo(path.name)
            member.size = len(data)
            listing.append((archive.offset // 512, path.name))
            archive.addfile(member, io.BytesIO(data))
        listing.append((archive.offset // 512, ""))
    shutil.rmtree(folder / wnid)
    return listing


def _dump(folder: Path, listings: dict[str, list[tuple[int, str]]]) -> None:
    kinds = [
        ("class_index", "<u4"),
        ("class_id", "U9"),
        ("start_offset", "<u4"),
        ("end_offset", "<u4"),
        ("filename", "U24"),
    ]
    rows = [
        (WNIDS.index(wnid), wnid, 512 * start, 512 * end, name)
        for wnid, listing in listings.items()
        for (start, name), (end, _) in itertools.pairwise(listing)
        if name != UNREADABLE
    ]
    folder.mkdir()
    np.save(folder / "entries.npy", np.array(rows, dtype=kinds))
    np.save(folder / "class-ids.npy", np.array(WNIDS))
