"""Labelled images of one's own, whatever they come as: what `eval`, `probe.data` and `probe.general` read."""

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinoreg.data.source import Source
from dinoreg.runtime.errors import UserError, readable
from dinoreg.runtime.printable import listed
from dinoreg.runtime.regular_files import read_regular

# Texts and tables, which nobody expects to be read as pictures.
_COMPANIONS = frozenset(
    (".txt", ".csv", ".tsv", ".xls", ".xlsx", ".parquet", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".ini", ".mat")
    + (".md", ".pdf", ".html", ".log", ".py", ".ipynb", ".db")
)


@dataclass(frozen=True)
class LabelledImages:
    """Images with labels, and what is to be said about how they were read.

    labels       (n,) int64 classes, or (n, K) int8: 1 present, 0 absent, -1 not to be counted
    class_names  in the order of their numbers
    words        "train", "val" or "test" for each image, or None where nothing says so
    warnings     one line each
    """

    source: Source
    labels: np.ndarray
    class_names: list[str]
    words: list[str] | None
    warnings: list[str]

    def has(self) -> np.ndarray:
        """Which classes each image is of, (n, K) bool."""
        single = self.labels.ndim == 1
        return self.labels[:, None] == np.arange(len(self.class_names)) if single else self.labels == 1


def passed_over_in_words(counts: dict[str, int]) -> list[str]:
    """A warning, or none, for files of endings that are not read; texts and tables beside pictures are no loss."""
    lost = Counter({ending: count for ending, count in counts.items() if ending not in _COMPANIONS}).most_common()
    parts = [f"{count:,} {ending or 'without ending'}" for ending, count in lost]
    return [f"files that are not read: {', '.join(parts)}"] if parts else []


def alike(names: Iterable[str]) -> list[str]:
    """A warning for each group of names that differ only in case or in spaces, and count as different classes."""
    groups = defaultdict(list)
    for name in names:
        groups[re.sub(r"[\s_-]+", "", unicodedata.normalize("NFKC", name).casefold())].append(name)
    return [
        f"the classes {listed(map(repr, group))} differ only in case or spacing, and count as {len(group)} classes"
        for group in groups.values()
        if len(group) > 1
    ]


def read_classes(folder: str | os.PathLike[str]) -> list[str] | None:
    """The names in a folder's classes.txt, one a line, None without such a file.

    Raises UserError for a file that cannot be read, fewer than two names, or repeated ones.
    """
    path = Path(folder) / "classes.txt"
    if not path.is_file():
        return None
    with readable(f"{path}:"):
        names = [line.strip() for line in read_regular(path).decode("utf-8-sig").splitlines() if line.strip()]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if len(names) < 2 or repeated:
        raise UserError(f"{path}: expected two or more different names, one a line")
    return names
