"""What the benchmarks share: the machine's fingerprint, variants measured in turn, a table and a JSON line.

Every variant runs in a process of its own, so that none profits from another's warm allocator or caches, and waits
there until its turn comes. A round measures all of them once, one after the other; variants are compared by the
median over the rounds of their ratio within a round, which a machine that slows down for all of them leaves alone.

Only torch is needed here, so that a peer's Python can import this file; dinoreg is imported where it is used.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # an installed dinoreg comes first, else this checkout's
# glibc keeps freed memory: the settings under which a peer is as well off as dinoreg, which asks for it itself.
KEEP_FREED = {"MALLOC_TRIM_THRESHOLD_": "8000000000", "MALLOC_MMAP_THRESHOLD_": "8000000000"}

PEERS_SCRIPT = "peers.py"

Measurement = dict[str, float]
Round = dict[str, Measurement]


class WorkerError(RuntimeError):
    """A variant's process ended or answered with an error; the message ends with what it wrote last."""


class Worker:
    """One variant in a process of its own: `python SCRIPT --worker JSON`, which calls `serve`."""

    def __init__(
        self,
        script: str,
        settings: Mapping[str, Any],
        python: str = sys.executable,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Start it, and return when it is warmed up. Raises WorkerError when it cannot be."""
        self._errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - closed in close()
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GOMP_"))}
        if script != PEERS_SCRIPT:  # what dinoreg sets where it is imported before torch, as it is not here
            env = {"GOMP_SPINCOUNT": "1000", **(env or {})}
        self._process = subprocess.Popen(
            [python, "-W", "ignore", str(HERE / script), "--worker", json.dumps(dict(settings))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**inherited, **(env or {})},
        )
        self.description: dict[str, Any] = self._read()

    def measure(self) -> Measurement:
        """One measurement, taken now."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("measure\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the reading says why
        return self._read()

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            said = "".join(self._errors.readlines()[-8:]).strip()
            killed = "killed by signal 9, as when memory runs out: measure fewer variants at a time (--only)"
            raise WorkerError(f"a variant stopped: {said or (killed if code == -9 else f'exit code {code}')}")
        return json.loads(line)


def serve(build: Callable[[dict[str, Any]], Callable[[], Measurement]], settings: str) -> None:
    """The worker's side: build the variant, then measure whenever asked, until the other side closes.

    build  settings -> a function that takes one measurement; building includes warming up
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes elsewhere

    def answer(values: Mapping[str, Any]) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # for the others: each holds tens of gigabytes during a step
        answers.write(json.dumps(dict(values)) + "\n")
        answers.flush()

    measure = build(json.loads(settings))
    answer({"torch": torch.__version__, "python": sys.executable})
    for _ in sys.stdin:
        answer(measure())


class Inline:
    """A variant in this process, for the short form: starting processes would be all that takes time."""

    def __init__(self, take: Callable[[], Measurement]) -> None:
        self.measure = take

    def close(self) -> None:
        """Nothing to end."""


def in_turn(workers: Mapping[str, Worker | Inline], rounds: int, budget: float = float("inf")) -> list[Round]:
    """`rounds` rounds of one measurement of every worker; the order is reversed in every other round.

    budget  seconds after which no further round begins; the first one is always made
    """
    begun = time.perf_counter()
    results: list[Round] = []
    while len(results) < rounds and (not results or time.perf_counter() - begun < budget):
        names = list(workers) if len(results) % 2 == 0 else list(workers)[::-1]
        taken = {name: workers[name].measure() for name in names}
        results.append({name: taken[name] for name in workers})
    return results


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """`count` processes beside that use a core each, as neighbours on a shared machine do."""
    neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for each in neighbours:
            each.kill()
            each.wait()


@contextlib.contextmanager
def workers_of(
    variants: Mapping[str, tuple[str, Mapping[str, Any], str, Mapping[str, str] | None]],
    inline: Callable[[dict[str, Any]], Callable[[], Measurement]] | None = None,
) -> Iterator[dict[str, Worker | Inline]]:
    """Start all variants (script, settings, python, environment); those that cannot start are named and left out.

    inline  builds a variant of the calling script from its settings; given, those of this Python run in this process
    """
    workers: dict[str, Worker | Inline] = {}
    try:
        for name, (script, settings, python, env) in variants.items():
            here = inline is not None and script != PEERS_SCRIPT
            try:
                workers[name] = Inline(inline(dict(settings))) if here else Worker(script, settings, python, env)
            except (WorkerError, RuntimeError, ValueError) as error:
                print(f"{name}: left out; {error}", file=sys.stderr)
        if not workers:
            raise SystemExit("no variant could be started")
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


def median(rounds: Sequence[Round], name: str, key: str) -> float:
    return statistics.median(values[name][key] for values in rounds)


def ratio(rounds: Sequence[Round], name: str, base: str, key: str) -> float:
    """The median over the rounds of `name` over `base`, both of the same round."""
    return statistics.median(values[name][key] / values[base][key] for values in rounds)


def compare(rounds: Sequence[Round], key: str, bases: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Per variant: every measured number's median, the spread of `key`, and its ratio to each of `bases`."""
    summary: dict[str, dict[str, Any]] = {}
    for name in rounds[0]:
        values = [measured[name][key] for measured in rounds]
        summary[name] = {number: round(median(rounds, name, number), 4) for number in rounds[0][name]}
        summary[name]["spread"] = [round(min(values), 4), round(max(values), 4)]
        summary[name]["ratio"] = {
            base: round(ratio(rounds, name, base, key), 3) for base in bases if base in rounds[0] and base != name
        }
    return summary


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table; the columns are those of the first row that has them, in order."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[str(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def comparison_rows(summary: Mapping[str, Mapping[str, Any]], key: str, unit: str) -> list[dict[str, Any]]:
    """The rows of `table` for what `compare` returned."""
    rows = []
    for name, values in summary.items():
        low, high = values["spread"]
        row = {"variant": name, unit: f"{values[key]:.4g}", "min-max": f"{low:.4g}-{high:.4g}"}
        row |= {f"x {base}": f"{value:.2f}" for base, value in values["ratio"].items()}
        rows.append(row)
    return rows


def fingerprint() -> dict[str, Any]:
    """What a figure depends on: processor, cores, versions, allocator and thread settings, commit."""
    from dinoreg.runtime.environment import environment

    found = environment()
    kept = ("commit", "cpu", "cores", "memory_gib", "cpu_capability", "cpu_bf16", "threads", "cuda", "variables")
    packages = {name: found["packages"][name] for name in ("torch", "torchvision", "pillow", "numpy", "xformers")}
    return {**{key: found.get(key) for key in kept}, **packages, "load": round(os.getloadavg()[0], 2)}


def report(benchmark: str, settings: Mapping[str, Any], results: Mapping[str, Any], *tables: str) -> None:
    """Print the tables, then everything as one line of JSON."""
    for text in tables:
        print(text, end="\n\n")
    line = {
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": fingerprint(),
        "settings": dict(settings),
        "results": dict(results),
    }
    print(json.dumps(line))


def parser(description: str, peers: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    options = argparse.ArgumentParser(description=description.splitlines()[0])
    options.add_argument("--rounds", type=int, default=5, help="rounds in which all variants are measured in turn")
    options.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no round begins")
    options.add_argument("--short", action="store_true", help="the smallest form, to see that it works: no figures")
    options.add_argument("--worker", help=argparse.SUPPRESS)
    if peers:
        options.add_argument("--peer", choices=peers, help="measure this project in turn with dinoreg")
        options.add_argument("--peer-python", default=sys.executable, help="the Python that has the peer installed")
    return options


def seconds(work: Callable[[], object], device: torch.device, repeat: int = 1) -> float:
    """Seconds that one `work()` takes: by events on the stream on CUDA, by the clock elsewhere."""
    if device.type == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeat):
            work()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1000 / repeat
    begun = time.perf_counter()
    for _ in range(repeat):
        work()
    return (time.perf_counter() - begun) / repeat


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a plain matrix product here and now: the ceiling that a step is held against."""
    size, repeat = (8192, 10) if device.type == "cuda" else (2048, 1)  # a small one is over before the next is launched
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b
    return 2 * size**3 / min(seconds(lambda: a @ b, device, repeat) for _ in range(3))


def peak_gib(device: torch.device) -> float:
    """Most memory in use so far, in GiB: of the device on CUDA, resident in this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
