"""Which images train and which test, for all kinds of own data.

Splits come from folders or from a column, under their usual names. Where there is none, every image of a small set is
tested once, in folds, and of a large one a seeded share of every class is held out; where there is a validation split
but no test split, the validation images are what is reported on.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dinoreg.data.copies import Copies
from dinoreg.runtime.errors import UserError


def hold_out(groups: np.ndarray, share: float, seed: int, copies: Copies | None = None) -> np.ndarray:
    """Which rows are held out, (n,) bool: of each group the share, rounded, at least one row and never all.

    groups  (n,) labels of any type; the only row of a group is not held out
    share   in (0, 1)
    copies  of the n images: the order is that of the files' contents, so that a folder and a table of the same images
            are split alike, and copies of a picture stay on one side
    """
    if copies is not None:
        return _hold_out_by_content(groups, share, seed, copies)
    rng = np.random.default_rng([seed, 1729])
    held = np.zeros(len(groups), dtype=bool)
    order = rng.permutation(len(groups))
    order = order[np.argsort(groups[order], kind="stable")]
    starts = np.flatnonzero(np.diff(groups[order])) + 1
    for members in np.split(order, starts):
        held[members[: min(max(round(share * len(members)), 1), len(members) - 1)]] = True
    return held


def _hold_out_by_content(groups: np.ndarray, share: float, seed: int, copies: Copies) -> np.ndarray:
    held, places = np.zeros(len(groups), dtype=bool), copies.shuffled(seed)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        # A picture that other groups have, too, would be on both sides.
        shared = set(copies.groups[groups != group])
        wanted = min(max(round(share * len(members)), 1), len(members) - 1)
        taken = 0
        for rows in _by_content(members, places, copies):
            if copies.groups[rows[0]] in shared:
                continue
            if taken + len(rows) <= wanted or (taken == 0 and len(rows) < len(members)):
                held[rows] = True
                taken += len(rows)
    return held


def _by_content(members: np.ndarray, places: np.ndarray, copies: Copies) -> list[list[int]]:
    """The pictures among some rows, each with its copies, in the order of their places."""
    pictures = defaultdict(list)
    for row in members[np.argsort(places[members], kind="stable")].tolist():
        pictures[copies.groups[row]].append(row)
    return list(pictures.values())


def deal(groups: np.ndarray, count: int, seed: int, copies: Copies) -> np.ndarray:
    """The fold of each row, (n,) int64 from 0: each group is spread over all folds, copies of a picture are in one.

    groups  (n,) labels of any type; a picture of several groups goes with the first of them
    count   of folds; fewer where there are fewer pictures
    copies  of the n images, by whose contents they are ordered, so that a folder and a table of the same images have
            the same folds

    The pictures of a group, those with most copies first, go one by one to the fold that has least of their group,
    among those to the smallest.
    """
    fold_of, sizes = np.full(len(groups), -1, dtype=np.int64), np.zeros(count, dtype=np.int64)
    members_of, places = defaultdict(list), copies.shuffled(seed)
    for row, picture in enumerate(copies.groups.tolist()):
        members_of[picture].append(row)
    for group in np.unique(groups):
        of_group = np.bincount(fold_of[(groups == group) & (fold_of >= 0)], minlength=count)
        left = np.flatnonzero((groups == group) & (fold_of < 0))
        for rows in sorted(_by_content(left, places, copies), key=len, reverse=True):
            fold = np.lexsort((sizes, of_group))[0]
            everywhere = members_of[copies.groups[rows[0]]]
            fold_of[everywhere] = fold
            of_group[fold] += len(rows)
            sizes[fold] += len(everywhere)
    return np.unique(fold_of, return_inverse=True)[1]


def alone(count: int) -> Copies:
    """Images of which nobody is taken for a copy, in the order that they come in."""
    return Copies(np.arange(count, dtype=">u8").view(np.uint8).reshape(count, -1), np.arange(count))


def copies_across(parts: Mapping[str, np.ndarray], copies: Copies) -> list[str]:
    """A warning for each split that holds copies of training images."""
    learnt = copies.groups[parts["train"]]
    warnings = []
    for name, rows in parts.items():
        if name != "train" and (count := int(np.isin(copies.groups[rows], learnt).sum())):
            warnings.append(f"{count:,} of {len(rows):,} images of {name} are copies of training images")
    return warnings


def parts(
    words: Sequence[str] | None, groups: np.ndarray, share: float, seed: int, where: Path, copies: Copies | None = None
) -> tuple[dict[str, np.ndarray], str]:
    """Rows of each split, {name: (m,) int64 ascending}, and in words how they were split.

    words   "train", "val" or "test" for each row, or None where nothing says so
    groups  (n,) what a hold-out balances: classes, or all zero
    share   in (0, 1), of the rows held out where there is neither a test nor a validation split

    Raises UserError, beginning with `where`, for splits without "train" and for too few rows to hold some out.
    """
    split_of = np.array(words or [], dtype=str)
    named = {name: np.flatnonzero(split_of == name) for name in ("train", "val", "test") if name in split_of}
    if named and "train" not in named:
        raise UserError(f"{where}: no image is in train, only in {' and '.join(named)}")
    if "test" in named:
        return named, ""
    if "val" in named:
        return {"train": named["train"], "test": named["val"]}, "tested on val"
    held = hold_out(groups, share, seed, copies)
    if not held.any():  # every class is one picture and its copies
        held = hold_out(groups, share, seed)
    if not held.any():
        raise UserError(f"{where}: {len(groups)} image(s) are too few to hold some out for testing")
    share_of = f"{share:.0%} of each class" if groups.any() else f"{share:.0%}"
    return {"train": np.flatnonzero(~held), "test": np.flatnonzero(held)}, f"{share_of} held out, seed {seed}"
