"""Revisited Paris in small: as Revisited Oxford."""

from __future__ import annotations

from pathlib import Path

from tests.miniatures.roxford5k import write_set


def write(root: Path, *, per_class: int = 6, shuffled: bool = False, seed: int = 1) -> Path:
    """root/rparis6k with per_class pictures of each thing in the database; its truths as Python 3 writes them."""
    return write_set(root, "rparis6k", per_class=per_class, shuffled=shuffled, seed=seed)
