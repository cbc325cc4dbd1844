"""ImageNet-22k in small: four classes as tars, with a gzip member and an unreadable file."""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
from pathlib import Path

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
    truncated: bool = False,
) -> Path:
    """`root/imagenet22k` with per_class images of a class, one of them unreadable besides, as in every real copy.

    layout     "tars" or "folders"
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
        for wnid in WNIDS:
            _pack(folder, wnid, packed=wnid == WNIDS[1])
    return folder


def _pack(folder: Path, wnid: str, packed: bool) -> None:
    """Turn a class's folder into its tar, with the first file packed."""
    with tarfile.open(folder / f"{wnid}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, path in enumerate(sorted((folder / wnid).iterdir())):
            data = path.read_bytes()
            data = gzip.compress(data, mtime=0) if packed and number == 0 else data
            member = tarfile.TarInfo(path.name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    shutil.rmtree(folder / wnid)
