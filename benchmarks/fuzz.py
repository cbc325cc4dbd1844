"""Damaged files through every reader, far more than the tests try: what ends otherwise than in words is kept.

    python benchmarks/fuzz.py
    python benchmarks/fuzz.py --count 1000000 --seed 7 --memory 6

Readers, whole files and the ways to damage them are those of `tests/hostile/readers.py`. A reader that takes more
memory than --memory GiB, or longer than ten seconds, is a find as well.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import measure

sys.path += [str(measure.HERE.parent), str(measure.HERE.parent / "tests")]

from tests.hostile.readers import fuzz


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--count", type=int, default=100_000, help="damaged files")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--memory", type=float, default=8, help="GiB of address space that the process may have")
    options.add_argument("--out", type=Path, help="folder for the finds; else a new one")
    given = options.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (int(given.memory * 2**30),) * 2)
    folder = given.out or Path(tempfile.mkdtemp(prefix="dinoreg-fuzz-"))
    started = time.perf_counter()
    counts, lines = fuzz(folder, given.count, given.seed)
    rows = [{"reader": name, **count} for name, count in counts.items()]
    took = f"{given.count:,} files in {time.perf_counter() - started:.0f} s, {len(lines)} found"
    found = {"rows": rows, "found": lines}
    settings = {"count": given.count, "seed": given.seed, "memory": given.memory}
    measure.report("fuzz", settings, found, "\n".join([measure.table(rows), *lines, took]))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
