"""Reading miniatures of datasets through their declarations, and small damages to their files."""

from __future__ import annotations

import importlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import scipy.io

from dinoreg.evaluation.benchmark import find_benchmark
from dinoreg.evaluation.data import Data
from tests.miniatures import python2

Edit = Callable[[Path], object]  # of the folder that a miniature's `write` returns


def read(name: str, root: Path, protocol: str | None = None, **options: Any) -> Data:
    """What a dataset's first task, or the one of a protocol, reads below `root`."""
    benchmark = find_benchmark(name)
    task = next(task for task in benchmark.tasks if protocol in (None, task.protocol))
    return task.read(benchmark.find(root), benchmark.option_values(options))


def pairs(data: Data, split: str) -> list[tuple[str, int]]:
    """(path, label) of every image of a split."""
    part = data.splits[split]
    return [(part.source.name(index), int(part.labels[index])) for index in range(len(part))]


def write(name: str, root: Path, **options: Any) -> Path:
    """A dataset's miniature; returns the folder of its files."""
    return importlib.import_module(f"tests.miniatures.{name}").write(root, **options)


def text(file: str, content: str) -> Edit:
    return lambda folder: (folder / file).write_text(content)


def append(file: str, content: str) -> Edit:
    return lambda folder: (folder / file).write_text((folder / file).read_text() + content)


def replaced(file: str, old: str, new: str) -> Edit:
    """The first `old` becomes `new`."""
    return lambda folder: (folder / file).write_text((folder / file).read_text().replace(old, new, 1))


def line(file: str, start: str, new: str) -> Edit:
    """The lines that begin with `start` become `new`."""

    def edit(folder: Path) -> None:
        rows = (folder / file).read_text().splitlines()
        (folder / file).write_text("\n".join(new if row.startswith(start) else row for row in rows))

    return edit


def cut(file: str, share: float = 0.5) -> Edit:
    def edit(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(len(content) * share)])

    return edit


def gone(pattern: str) -> Edit:
    """Without the files of a pattern, or a folder of that name; there must be one."""

    def edit(folder: Path) -> None:
        paths = sorted(folder.glob(pattern))
        assert paths
        for path in paths:
            path.rename(folder.parent / f"moved_{path.name}") if path.is_dir() else path.unlink()

    return edit


def changed(file: str, change: Callable[[Any], object]) -> Edit:
    """A change of the value in a JSON file."""

    def edit(folder: Path) -> None:
        value = json.loads((folder / file).read_text())
        change(value)
        (folder / file).write_text(json.dumps(value))

    return edit


def matlab(file: str, **variables: Any) -> Edit:
    return lambda folder: scipy.io.savemat(str(folder / file), variables)


def batch(file: str, **changes: Any) -> Edit:
    """A CIFAR batch of four images with other entries; None takes one out."""

    def edit(folder: Path) -> None:
        values = pickle.loads((folder / file).read_bytes(), encoding="latin1")
        values = {"data": values["data"][:4], "labels": values["labels"][:4], **changes}
        (folder / file).write_bytes(python2.dumps({key: each for key, each in values.items() if each is not None}))

    return edit


def both(*edits: Edit) -> Edit:
    return lambda folder: [edit(folder) for edit in edits]
