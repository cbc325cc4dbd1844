"""A dataset's folder, whose archives may have been unpacked one folder too deep."""

import os
from pathlib import Path

CLUTTER = {"Thumbs.db", "desktop.ini", "__MACOSX"}  # what Windows and macOS leave in folders, besides hidden files


class DatasetFolder(type(Path())):  # type: ignore[misc]  # PosixPath or WindowsPath: what Path() makes on this system
    """A folder below which a folder that holds nothing but one of its own name stands for that one.

    Graphical unpackers and Kaggle's downloads make `cars_train/cars_train/` of `cars_train.tgz`. All paths that are
    built with `/` on such a folder lead into the inner one.
    """

    def __truediv__(self, key: str | os.PathLike[str]) -> "DatasetFolder":
        here = self
        for part in Path(key).parts:
            here = unpacked(super(DatasetFolder, here).__truediv__(part))
        return here


def unpacked(folder: Path) -> DatasetFolder:
    """The folder, or the one of its own name that is all it holds; a path that is no folder stays as it is."""
    inner = os.path.join(folder, folder.name)
    if os.path.isdir(inner):
        with os.scandir(folder) as entries:
            names = {entry.name for entry in entries if entry.name[0] != "." and entry.name not in CLUTTER}
            if names == {folder.name}:
                return DatasetFolder(inner)
    return DatasetFolder(folder)
