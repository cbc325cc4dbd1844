"""Random kills of short runs, each resumed: how many are lost, torn, or end with other losses.

    python benchmarks/kills.py
    python benchmarks/kills.py --kills 1000 --seed 7
    python benchmarks/kills.py --disks 200          # as root

Runs are on one process and on two (DDP, FSDP2), with a checkpoint at every second step. SIGKILL comes at a random
instant from the start of the processes to the end of the run, half of the time as soon as a checkpoint is seen being
written, to one rank or to all. After each kill the published state is verified, then the run is started again; at
its end its losses are compared with those of an unbroken run, bit for bit. Ranks are forked from a warm process
(`tests/faults/zygote.py`), so that their start is short; --jobs runs go on side by side.

With --disks the blow is not a kill: the disk of the run fills up, or turns read-only, for a random time. A run may then
go on, or end in words and be started again.
"""

from __future__ import annotations

import collections
import contextlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import measure

sys.path += [str(measure.HERE.parent / "tests" / "faults"), str(measure.HERE.parent / "tests")]

from harness import RUN, Faults, Start, torn, unpointed
from mounts import mount, mounted_disk
from training import loss_trace

KINDS: dict[str, dict[str, Any]] = {
    "one process": {"processes": 1},
    "two, ddp": {"processes": 2, "strategy": "ddp"},
    "two, fsdp": {"processes": 2, "strategy": "fsdp"},
}
MOST_PER_RUN = 5  # kills that one run has to bear
PATIENCE = 90.0  # seconds beyond the time-out that a busy machine may take


@dataclass
class Counts:
    """What has happened to the runs of one kind.

    lost       runs that did not go on or did not end; torn: kills after which a checkpoint did not verify
    differing  runs whose losses are not the unbroken run's; wordless: survivors of a killed rank that did not end
               with exit code 1 and one line about whom they lost
    unpointed  runs found with a first checkpoint that `last` does not name yet; nothing is lost by it
    when       kills by what was going on: starting, training, writing a checkpoint
    """

    runs: int = 0
    kills: int = 0
    lost: int = 0
    torn: int = 0
    differing: int = 0
    wordless: int = 0
    unpointed: set[str] = field(default_factory=set)
    when: collections.Counter[str] = field(default_factory=collections.Counter)
    survivors: list[float] = field(default_factory=list)  # seconds from a rank's death to the other's end
    notes: list[str] = field(default_factory=list)


class Budget:
    """The kills that are still to be made, shared by all jobs."""

    def __init__(self, kinds: dict[str, int], counts: dict[str, Counts], seconds: float) -> None:
        self.left = dict(kinds)
        self.counts = counts
        self.deadline = time.monotonic() + seconds
        self.lock = threading.Lock()

    def next_kind(self) -> str | None:
        """The kind with most kills left; None when there are none, or no time is left."""
        with self.lock:
            if time.monotonic() > self.deadline:
                return None
            kind = max(self.left, key=lambda kind: self.left[kind])
            return kind if self.left[kind] > 0 else None

    def take(self, kind: str) -> bool:
        with self.lock:
            self.left[kind] -= 1
            return self.left[kind] >= 0


def one_run(
    kind: str, out: Path, whole: float, faults: Faults, budget: Budget, rng: random.Random, disks: bool
) -> None:
    """Start, kill, start again …, until the run is through; everything is counted.

    whole  seconds that an unbroken run takes
    disks  the disk that `out` lies on is spoilt for a while, in place of a kill
    """
    counts, options = budget.counts[kind], KINDS[kind]
    given = 0
    while True:
        kill = given < MOST_PER_RUN and budget.take(kind)
        start = faults.start(out, **options)
        killed = kill and (spoil if disks else strike)(start, whole, faults, rng, counts)
        limit = float(RUN["parallel.timeout"]) + PATIENCE + whole
        try:
            codes = faults.wait(start, limit)
        except AssertionError as error:
            with budget.lock:
                counts.lost += 1
                counts.notes.append(f"{out.name}: hung: {error}")
            return
        problems = torn(out)
        with budget.lock:
            if unpointed(out):
                counts.unpointed.add(str(out))
            if problems:
                counts.torn += 1
                counts.notes.append(f"{out.name}: {problems}")
            if killed:
                given += 1
                counts.kills += 1
                (judge_spoilt if disks else judge_survivors)(start, counts)
                if any(codes) or not disks:
                    continue
            if kill and not killed:  # it was through before the blow fell
                budget.left[kind] += 1
            counts.runs += 1
            if any(codes):
                counts.lost += 1
                counts.notes.append(f"{out.name}: did not go on: {start.describe()}")
            elif loss_trace(out) != faults.unbroken(options["processes"], options.get("strategy", "ddp")):
                counts.differing += 1
                counts.notes.append(f"{out.name}: other losses")
        return


def strike(start: Start, whole: float, faults: Faults, rng: random.Random, counts: Counts) -> bool:
    """Wait for a random instant and kill one rank or all; False when the run was through before it came."""
    checkpoints = start.out / "checkpoints"
    at = start.began + rng.uniform(0.0, whole)
    in_writing = rng.random() < 0.5
    victims = rng.sample(start.ranks, rng.choice((1, len(start.ranks))))
    while faults.poll(start) and time.monotonic() < at:
        time.sleep(0.002)
    if in_writing:
        while faults.poll(start) and not any(checkpoints.glob(".unfinished-*")):
            time.sleep(0.0005)
        time.sleep(rng.uniform(0.0, 0.03))
    if not faults.poll(start):
        return False
    writing = any(checkpoints.glob(".unfinished-*"))
    for rank in victims:
        rank.send(signal.SIGKILL)
    began = (start.out / "status.json").exists() and (start.out / "status.json").stat().st_mtime > start.wall
    counts.when["writing" if writing else "training" if began else "starting"] += 1
    return True


def spoil(start: Start, whole: float, faults: Faults, rng: random.Random, counts: Counts) -> bool:
    """Wait for a random instant and fill the run's disk, or make it read-only, for a while; False as `strike`."""
    at = start.began + rng.uniform(0.0, whole)
    while faults.poll(start) and (time.monotonic() < at or not start.out.is_dir()):
        time.sleep(0.002)
    if not faults.poll(start):
        return False
    full, filling = rng.random() < 0.5, start.out.parent / "filling"
    if full:
        with filling.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
    else:
        mount("--bind", start.out, start.out)
        mount("-o", "remount,bind,ro", start.out)
    until = time.monotonic() + rng.uniform(0.0, whole)
    while faults.poll(start) and time.monotonic() < until:
        time.sleep(0.002)
    if full:
        filling.unlink()
    else:
        subprocess.run(["umount", "-l", start.out], check=True)
    counts.when["full disk" if full else "read-only disk"] += 1
    return True


def judge_spoilt(start: Start, counts: Counts) -> None:
    """A rank has to go on, or to stop in at most one line: with exit code 1, or with 2 if it could not even begin."""
    for rank in start.ranks:
        if rank.code not in (0, 1, 2) or len(rank.said()) > 1 or "Traceback" in rank.console():
            counts.wordless += 1
            counts.notes.append(f"{start.out.name}: on a spoilt disk a rank ended with {rank.code}: {rank.console()}")


def judge_survivors(start: Start, counts: Counts) -> None:
    """A rank that was not killed has to stop in one line, with exit code 1."""
    dead = [rank for rank in start.ranks if rank.code == -signal.SIGKILL]
    for rank in start.ranks:
        if rank in dead or rank.code == 0:  # 0: it had nothing left to do
            continue
        said = rank.said()
        named = len(said) == 1 and any(words in said[0] for words in ("lost rank ", "could not meet the others"))
        if rank.code != 1 or not named:
            counts.wordless += 1
            counts.notes.append(f"{start.out.name}: a survivor ended with {rank.code}: {rank.console()}")
        if dead and rank.ended is not None and dead[0].ended is not None:
            counts.survivors.append(rank.ended - dead[0].ended)


def job(number: int, seed: int, folder: Path, budget: Budget, disks: bool) -> None:
    """Run after run, until the kills are used up."""
    scratch = folder / f"job{number}"
    scratch.mkdir()
    rng = random.Random(seed * 1000 + number)
    place = mounted_disk(scratch / "disk", "16m") if disks else contextlib.nullcontext(scratch)
    with place as runs_in, Faults(scratch) as faults:
        runs = 0
        while (kind := budget.next_kind()) is not None:
            faults.unbroken(**KINDS[kind])
            runs += 1
            name = f"{kind.replace(', ', '-').replace(' ', '-')}-{runs}"
            one_run(kind, runs_in / name, faults.duration(**KINDS[kind]), faults, budget, rng, disks)
            if disks:
                shutil.rmtree(runs_in / name)


def main() -> None:
    options = measure.parser(__doc__)
    options.add_argument("--kills", type=int, default=200, help="over all kinds of runs")
    options.add_argument("--disks", type=int, default=0, help="in place of kills: disks that fill up or turn read-only")
    options.add_argument("--jobs", type=int, default=2, help="runs side by side")
    options.add_argument("--seed", type=int, default=0, help="of the instants and victims")
    options.add_argument("--folder", type=Path, help="where the runs are written (a temporary folder)")
    given = options.parse_args()
    if given.short:
        given.kills, given.jobs = 1, 1
    given.kills = given.disks or given.kills
    counts = {kind: Counts() for kind in KINDS}
    share, more = divmod(given.kills, len(KINDS))
    shares = {kind: share + (number < more) for number, kind in enumerate(KINDS)}
    budget = Budget(shares, counts, given.budget)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="kills-") as folder:
        arguments = [(number, given.seed, Path(folder), budget, given.disks > 0) for number in range(given.jobs)]
        jobs = [threading.Thread(target=job, args=each) for each in arguments]
        for thread in jobs:
            thread.start()
        for thread in jobs:
            thread.join()
    for each_counts in counts.values():
        for note in each_counts.notes:
            print(note, file=sys.stderr)
    rows = [row(kind, counts[kind]) for kind in KINDS]
    settings = {
        "kills": given.kills,
        "disks": given.disks > 0,
        "jobs": given.jobs,
        "seed": given.seed,
        "steps": RUN["steps"],
    }
    settings |= {"checkpoint.every": RUN["checkpoint.every"], "parallel.timeout": RUN["parallel.timeout"]}
    settings["seconds"] = round(time.monotonic() - begun)
    measure.report("kills", settings, {r["runs of"]: r for r in rows}, measure.table(rows))
    made = sum(each.kills for each in counts.values())
    failed = sum(each.lost + each.torn + each.differing + each.wordless for each in counts.values())
    if failed or (made < given.kills and given.budget == float("inf")):
        raise SystemExit(1)


def row(kind: str, counts: Counts) -> dict[str, Any]:
    waited = sorted(counts.survivors)
    return {
        "runs of": kind,
        "runs": counts.runs,
        "kills": counts.kills,
        **{f"while {when}": counts.when[when] for when in ("starting", "training", "writing") if counts.when[when]},
        **{when: counts.when[when] for when in ("full disk", "read-only disk") if counts.when[when]},
        "lost runs": counts.lost,
        "torn checkpoints": counts.torn,
        "differing losses": counts.differing,
        "survivors without words": counts.wordless,
        "before the first `last`": len(counts.unpointed),
        "survivor ends after, s": f"{waited[len(waited) // 2]:.1f} (most {waited[-1]:.1f})" if waited else "",
    }


if __name__ == "__main__":
    main()
