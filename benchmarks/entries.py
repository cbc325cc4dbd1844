"""Ten million index entries: memory and time from `data=` to the first batch, of a list, of tars and of parquet files.

    python benchmarks/entries.py
    python benchmarks/entries.py --entries 10000000 --batch 64

A few hundred small JPEGs stand for all: the list names them through folders that are links, tars and parquet files are
hard links to one. Each is opened twice in a process of its own, the second time with the index that the first has kept.
Printed: seconds until the source is open and from there to the first batch of 64 (its order included), the peak of the
process's own memory, looked at fifty times a second, and of that what PyTorch and the imports take.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import measure
import numpy as np

KINDS = ("list", "tar", "parquet")
FILES = 100  # a folder or a parquet row group
SHARD = 10_000  # images of a tar or parquet file


def jpeg(number: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((40, 40)).save(buffer, "JPEG")
    return buffer.getvalue()


def make(kind: str, folder: Path, entries: int) -> Path:
    """Write the data of a kind; returns what `data=` names."""
    pictures = [jpeg(number) for number in range(FILES)]
    if kind == "list":
        (folder / "photos").mkdir()
        for number, data in enumerate(pictures):
            (folder / "photos" / f"img_{number:05}.jpg").write_bytes(data)
        for number in range(1000):
            os.symlink(".", folder / f"site_{number:04}")
        with open(folder / "list.csv", "w") as file:
            file.write("path\n")
            for row in range(entries):
                site, place = row // FILES % 1000, row // FILES // 1000
                file.write(f"site_{site:04}/site_{place:04}/photos/img_{row % FILES:05}.jpg\n")
        return folder / "list.csv"
    first, each = folder / f"000000.{kind}", min(SHARD, entries)
    if kind == "tar":
        with tarfile.open(first, "w") as archive:
            for row in range(each):
                member = tarfile.TarInfo(f"site_{row // FILES:04}/img_{row:08}.jpg")
                member.size = len(pictures[row % FILES])
                archive.addfile(member, io.BytesIO(pictures[row % FILES]))
    else:
        import pyarrow.parquet

        images = [{"bytes": pictures[row % FILES], "path": f"img_{row:08}.jpg"} for row in range(each)]
        pyarrow.parquet.write_table(pyarrow.table({"image": images}), first, row_group_size=FILES)
    for number in range(1, -(-entries // each)):
        os.link(first, folder / f"{number:06}.{kind}")
    past = time.time() - 60  # an index of what has just been written is not kept
    os.utime(first, (past, past))
    return folder


def first_batch(data: str, index_dir: str, batch: int) -> dict[str, float]:
    """Open a source and ask for a batch, in this process."""
    from large import memory, watched

    from dinoreg.config.schema import DataConfig
    from dinoreg.config.view_settings import AugmentSettings, CropSettings, MaskSettings
    from dinoreg.data.loader import BatchLoader, Views
    from dinoreg.data.open import open_source

    views = Views(CropSettings(global_size=32, local_size=16, num_local=2), AugmentSettings(), MaskSettings(), 8)
    before = memory("RssAnon")
    with watched(0.02) as own:
        started = time.perf_counter()
        source = open_source(data, index_dir=index_dir)
        opened = time.perf_counter()
        with BatchLoader(source, views, DataConfig(workers=2), batch_size=batch) as batches:
            next(batches)
        done = time.perf_counter()
    return {
        "entries": len(source),
        "open s": opened - started,
        "to first batch s": done - opened,
        "peak GiB": max(own),
        "of that imports": before,
    }


def main() -> None:
    options = measure.parser(__doc__)
    options.add_argument("--entries", type=int, default=10_000_000)
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--folder", type=Path, help="where the data go (a temporary folder)")
    options.add_argument("--only", choices=KINDS)
    options.add_argument("--once", nargs=2, metavar=("DATA", "INDEX"), help="measure this one, in this process")
    given = options.parse_args()
    if given.short:
        given.entries, given.batch = 1000, 4
    if given.once:
        print(json.dumps(first_batch(*given.once, given.batch)))
        return
    results, table = {}, []
    for kind in KINDS if given.only is None else (given.only,):
        with tempfile.TemporaryDirectory(dir=given.folder) as made:
            (folder := Path(made) / kind).mkdir()
            data = make(kind, folder, given.entries)
            for time_of in ("first", "again"):
                command = [sys.executable, __file__, "--once", str(data), f"{made}/index", "--batch", str(given.batch)]
                found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
                results[f"{kind}, {time_of}"] = found
                shown = {key: f"{value:,}" if key == "entries" else f"{value:.3g}" for key, value in found.items()}
                table.append({"kind": kind, "opened": time_of, **shown})
    measure.report("entries", {"entries": given.entries, "batch": given.batch}, results, measure.table(table))


if __name__ == "__main__":
    main()
