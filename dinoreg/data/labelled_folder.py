"""Folders of labelled images: a subfolder for each class, or `train/`, `val/`, `test/` with such subfolders.

Whatever else lies in such a tree is either told apart by what it is called and where it lies, and said in a warning,
or refused: a split is never taken for a class, nor a mask for a picture. A `classes.txt` in the folder, a name a line,
settles which folders are the classes.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dinoreg.data.folder_index import PathBlock, index_folder
from dinoreg.data.labelled import LabelledImages, alike, read_classes
from dinoreg.data.source import PathSource
from dinoreg.data.split_names import lies_beside_splits, split_of
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.printable import listed

_TRUTH = "masks?|seg|segs|segmentations?|gt|gts|ground_?truths?|annotations?|labels?|depths?|contours?|outlines?"
_TRUTH_FOLDER = re.compile(rf"(?:[a-z]+[_\-. ])?(?:{_TRUTH})(?:[_\-. ]?(?:images?|pngs?|maps?|files?))?", re.IGNORECASE)
_TRUTH_FILE = re.compile(rf"(.+?)[_\-. ](?:{_TRUTH})(?:[_\-. ]?\d+)?", re.IGNORECASE)
_SETTLED = "a classes.txt there that names the classes, one a line, says which"


@dataclass(frozen=True)
class _Image:
    """A path below the root, cut into its split, its class and what follows: folders and the file's name."""

    path: str
    split: str | None
    label: str
    rest: tuple[str, ...]


@dataclass
class _Folder:
    """What a folder holds: images of its own, and how many below each of its folders."""

    own: list[str] = field(default_factory=list)
    below: Counter[str] = field(default_factory=Counter)

    @property
    def count(self) -> int:
        return len(self.own) + self.below.total()


def read_labelled_folder(
    path: str | os.PathLike[str], index_dir: str | os.PathLike[str] | None = None
) -> LabelledImages:
    """Read a tree of labelled images.

    index_dir  where the index of the folder is kept; by default the user's cache folder
    raises     UserError, in one line, for fewer than two classes, images of a split outside of classes, and folders
               that may be splits or classes
    """
    root = os.path.abspath(os.path.expanduser(os.fspath(path)))
    index = index_folder(root, index_dir)
    given = read_classes(root)
    warnings: list[str] = []
    images = _cut(root, [tuple(each.split(os.sep)) for each in index], given, warnings)
    images = _without_truths(images, warnings)
    images = _with_splits_inside(images)
    images = _declared(root, images, given, warnings)
    names, labels = np.unique([image.label for image in images], return_inverse=True)
    if len(names) < 2:
        raise UserError(
            f"{root}: has images in {len(names)} folder(s), expected one per class, at least two{_tables(root)}"
        )
    warnings += _repeated_below(images) + alike(names.tolist())
    splits = [image.split for image in images if image.split is not None]
    source = PathSource(root, PathBlock.of((image.path for image in images), index.passed_over))
    return LabelledImages(source, labels.astype(np.int64), names.tolist(), splits or None, warnings)


def _tables(root: str) -> str:
    """In words which tables lie in a folder that has no classes: one of them may be what was meant."""
    tables = sorted(name for name in os.listdir(root) if name.endswith((".csv", ".tsv", ".parquet")))
    return f"; or give a table of paths and labels, as {os.path.join(root, tables[0])}" if tables else ""


def class_folders(
    path: str | os.PathLike[str], index_dir: str | os.PathLike[str] | None = None
) -> tuple[PathSource, np.ndarray, list[str]]:
    """A published tree of which it is known that it holds a subfolder for each class, whatever they are called.

    Returns the source, its labels (n,) int64 and the class names in order. Files beside the subfolders are left out.
    Raises UserError when there are fewer than two classes.
    """
    root = os.path.abspath(os.path.expanduser(os.fspath(path)))
    paths = [path for path in index_folder(root, index_dir) if os.sep in path]
    names, labels = np.unique([name.split(os.sep, 1)[0] for name in paths], return_inverse=True)
    if len(names) < 2:
        raise UserError(f"{root} has {len(names)} subfolder(s) with images, expected one per class, at least two")
    return PathSource(root, PathBlock.of(paths)), labels.astype(np.int64), names.tolist()


def _cut(root: str, paths: Sequence[tuple[str, ...]], given: list[str] | None, warnings: list[str]) -> list[_Image]:
    """Every image with its split, if there are any, and its class."""
    where, level = root, 0
    while True:
        top = _folders(paths, level)
        beside = [path for path in paths if len(path) == level + 1]
        lone = next(iter(top)) if len(top) == 1 and not beside else None
        if lone is None or split_of(lone) or top[lone].own or (given and lone in given):
            break
        where, level = os.path.join(where, lone), level + 1
    if level:
        warnings.append(f"the folders of {os.path.relpath(where, root)}/ are read, in which everything lies")
    if beside:
        warnings.append(f"{len(beside):,} image(s) that lie in no folder are left out, as {beside[0][-1]}")
    inner = [path for path in paths if len(path) > level + 1]
    splits = _splits(where, top, given, warnings)
    if not splits:
        return [_Image(os.sep.join(path), None, path[level], path[level + 1 :]) for path in inner]
    found = []
    for path in inner:
        split = splits.get(path[level])
        if split is None:
            continue
        start = level + 1 + _doubled(path[level], top[path[level]])
        if len(path) < start + 2:
            raise UserError(f"{os.path.join(root, *path)}: lies in a split but in no class, expected SPLIT/CLASS/IMAGE")
        found.append(_Image(os.sep.join(path), split, path[start], path[start + 1 :]))
    return found


def _folders(paths: Sequence[tuple[str, ...]], level: int) -> dict[str, _Folder]:
    """The folders at a level of the tree that hold images, by name."""
    found: dict[str, _Folder] = defaultdict(_Folder)
    for path in paths:
        if len(path) == level + 2:
            found[path[level]].own.append(path[-1])
        elif len(path) > level + 2:
            found[path[level]].below[path[level + 1]] += 1
    return dict(sorted(found.items()))


def _doubled(name: str, folder: _Folder) -> bool:
    """Whether a split holds nothing but a folder of the same split, as archives that are unpacked by name do."""
    inner = list(folder.below)
    return len(inner) == 1 and not folder.own and (inner[0] == name or split_of(inner[0]) == split_of(name))


def _splits(
    where: str, top: Mapping[str, _Folder], given: Collection[str] | None, warnings: list[str]
) -> dict[str, str]:
    """The split of each folder that is one; none where the folders are the classes.

    raises  UserError where they may be either
    """
    found = {name: split for name in top if (split := split_of(name)) is not None}
    others = [name for name in top if name not in found]
    inner = {name for split in found for name in top[split].below}
    if not found or (given and set(given) & set(top) and not set(given) & inner):
        return {}
    known = given and set(given) & inner
    if not known and len(set(found.values())) == 1 and others:
        first, odd = f"{next(iter(found))}/", f"{others[0]}/"
        unlike = all(map(lies_beside_splits, others))
        if all(not top[name].below for name in found) and not any(map(lies_beside_splits, others)):
            warnings.append(f"{first} is taken as a class, as {odd} is: it holds images and no folders")
            return {}
        if not unlike or not inner:
            raise UserError(f"{where}: {first} beside {odd} may be a split or a class; {_SETTLED}")
    if "train" not in found.values():
        names = listed(f"{name}/" for name in found)
        raise UserError(f"{where}: has {names} but no train/; if they are classes, {_SETTLED}")
    if others:
        left = listed(f"{name}/ ({top[name].count:,} images)" for name in others)
        warnings.append(f"left out beside the splits {listed(f'{name}/' for name in found)}: {left}")
    return found


def _without_truths(images: list[_Image], warnings: list[str]) -> list[_Image]:
    """Without masks and the like: in folders of their own beside a class's pictures, or files called after one."""
    pictured = {image.label for image in images if not _in_truth_folder(image)}
    stems = {os.path.splitext(image.path)[0].lower() for image in images}
    kept, beside, called = [], [], []
    for image in images:
        named = _TRUTH_FILE.fullmatch(os.path.splitext(image.path)[0])
        if _in_truth_folder(image) and image.label in pictured:
            beside.append(image.path)
        elif named is not None and named[1].lower() in stems:
            called.append(image.path)
        else:
            kept.append(image)
    for left, where in ((beside, "in folders beside a class's pictures"), (called, "called after a picture")):
        if left:
            warnings.append(f"left out as masks or the like: {len(left):,} images {where}, as {left[0]}")
    return kept


def _in_truth_folder(image: _Image) -> bool:
    return len(image.rest) > 1 and _TRUTH_FOLDER.fullmatch(image.rest[0]) is not None


def _with_splits_inside(images: list[_Image]) -> list[_Image]:
    """With the splits that every class holds as folders, CLASS/SPLIT/IMAGE, where there are no others."""
    inside = {image.rest[0] if len(image.rest) > 1 else "" for image in images if image.split is None}
    found = {split_of(name) for name in inside}
    if None in found or "train" not in found or len(found) == 1:
        return images
    return [replace(image, split=split_of(image.rest[0]), rest=image.rest[1:]) for image in images]


def _declared(root: str, images: list[_Image], given: list[str] | None, warnings: list[str]) -> list[_Image]:
    """The images of the classes that a classes.txt names; all without one."""
    if given is None:
        return images
    present = {image.label for image in images}
    if not present & set(given):
        warnings.append(f"classes.txt names none of the {len(present)} folders, and is left out")
        return images
    if empty := [name for name in given if name not in present]:
        warnings.append(f"classes of classes.txt without an image: {listed(empty)}")
    if others := sorted(present - set(given)):
        count = sum(image.label not in given for image in images)
        warnings.append(f"left out, since classes.txt does not name them: {listed(others)} ({count:,} images)")
    return [image for image in images if image.label in given]


def _repeated_below(images: Sequence[_Image]) -> list[str]:
    """A warning for folders of the same names below most classes: they are read as pictures of the class."""
    below: dict[str, set[str]] = defaultdict(set)
    for image in images:
        below[image.label].add(f"{image.rest[0]}/" if len(image.rest) > 1 else "")
    classes_of = Counter(name for names in below.values() for name in names)
    repeated = sorted(name for name, count in classes_of.items() if name and count >= max(2, len(below) / 2))
    if not repeated or (len(classes_of) == 1):
        return []
    return [f"{listed(repeated)} lie below {classes_of[repeated[0]]} classes: all images in them count as the class's"]
