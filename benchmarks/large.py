"""Memory of an evaluation on a large set: a million rows of 1,024 features through every classification protocol.

    python benchmarks/large.py
    python benchmarks/large.py --rows 1000000 --dim 1024 --dtype float16

The features are synthetic and lie in a memory-mapped file, as extraction leaves them. Printed for each protocol:
seconds, the peak of memory that is the process's own (looked at five times a second), and of all that was resident so
far, pages of the file included, which the system takes back when it needs them.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure
import numpy as np

PROTOCOLS = ("logistic", "knn", "linear")


def write_features(path: Path, labels: np.ndarray, dim: int, dtype: str, seed: int) -> None:
    """Rows around one centre per class, written in pieces."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(int(labels.max()) + 1, dim)).astype(np.float32) * 0.15
    rng = np.random.default_rng(seed)
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(len(labels), 1, dim))
    for start in range(0, len(labels), 20_000):
        part = labels[start : start + 20_000]
        rows[start : start + len(part), 0] = centres[part] + rng.normal(size=(len(part), dim)).astype(np.float32)
    rows.flush()


def memory(key: str) -> float:
    """A field of the process's status in GiB: VmHWM, the peak of all that was resident, or RssAnon, its own now."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[key].split()[0]) / 2**20


@contextlib.contextmanager
def watched(period: float = 0.2) -> Iterator[list[float]]:
    """The process's own memory in GiB, every `period` seconds while the body runs."""
    seen, done = [memory("RssAnon")], threading.Event()

    def watch() -> None:
        while not done.wait(period):
            seen.append(memory("RssAnon"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def main() -> None:
    options = measure.parser(__doc__)
    options.add_argument("--rows", type=int, default=1_000_000)
    options.add_argument("--test-rows", type=int, default=20_000)
    options.add_argument("--dim", type=int, default=1024)
    options.add_argument("--classes", type=int, default=20)
    options.add_argument("--dtype", choices=("float16", "float32"), default="float32")
    options.add_argument("--protocol", choices=PROTOCOLS, help="only this one")
    options.add_argument("--folder", type=Path, help="where the features go (a temporary folder)")
    given = options.parse_args()
    if given.short:
        given.rows, given.test_rows, given.dim, given.classes = 300, 60, 16, 3
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        results = {name: evaluate(name, Path(folder), given) for name in PROTOCOLS if given.protocol in (None, name)}
    settings = {key: getattr(given, key) for key in ("rows", "test_rows", "dim", "classes", "dtype")}
    table = [{"protocol": name, **{key: f"{value:.3g}" for key, value in row.items()}} for name, row in results.items()]
    measure.report("large", settings, results, measure.table(table))


def evaluate(protocol: str, folder: Path, given: Any) -> dict[str, float]:
    """One protocol on the features."""
    from dinoreg.data.folder_index import PathBlock
    from dinoreg.data.source import PathSource
    from dinoreg.evaluation.backbones.encoder import wrap
    from dinoreg.evaluation.benchmark import Task
    from dinoreg.evaluation.context import Context
    from dinoreg.evaluation.data import Data, Labelled
    from dinoreg.evaluation.options import EvalOptions, KnnOptions, LinearOptions, LogisticOptions
    from dinoreg.evaluation.protocols import classification, linear
    from dinoreg.evaluation.protocols.measurement import Measurement
    from dinoreg.models.vit import RegisterViT
    from dinoreg.runtime.parallel import show_progress

    splits = {}
    for seed, (name, count) in enumerate((("train", given.rows), ("test", given.test_rows)), 1):
        labels = np.arange(count) % given.classes
        path = folder / f"{name}.npy"
        if not path.exists():
            write_features(path, labels, given.dim, given.dtype, seed)
        source = PathSource(str(folder), PathBlock(b"x\0" * count))
        splits[name] = Labelled(source, labels, given.classes)

    def stored(_context: object, _encoder: object, source: object, *_: object, **__: object) -> np.ndarray:
        """Stands where the cache of features is: every split is there already."""
        name = next(name for name, split in splits.items() if split.source is source)
        return np.load(folder / f"{name}.npy", mmap_mode="r")

    for module in (classification, linear):
        module.extract_features = stored  # type: ignore[attr-defined]
    encoder = wrap(RegisterViT(image_size=16, patch_size=8, dim=64, depth=1, heads=1))
    context = Context(folder, folder / "state", None, 0, 16, 64, 0, 0, progress=show_progress)
    chosen = EvalOptions(
        knn=KnnOptions(k=(20,)),
        logistic=LogisticOptions(min_c=1e-5, max_c=1e-1, num_c=5),
        linear=LinearOptions(lrs=(1e-2, 1e-1), blocks=(1,), avgpool=(0,), epochs=1, epoch_steps=200, augment=False),
    )
    evaluate = {"logistic": classification.logistic, "knn": classification.knn, "linear": linear.evaluate}[protocol]
    task = Task(protocol, lambda *_: Data({}), "top-1")
    started = time.perf_counter()
    with watched() as own:
        rows = evaluate(Measurement(encoder, Data(splits), task, chosen, context))
    return {
        "seconds": time.perf_counter() - started,
        "top-1": rows[0].value,
        "own GiB": max(own),
        "resident GiB": memory("VmHWM"),
    }


if __name__ == "__main__":
    main()
