"""A copy of the package for jobs to run, so that a requeued job is not affected by later changes of the checkout.

The copy is named by its content, so that launches of the same code share one, and the copy of a running job is never
changed. It has the layout of an installed wheel: declarations are inside the package.
"""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from dinoreg.config.bundled import PACKAGE, bundled
from dinoreg.runtime.digest import digest
from dinoreg.runtime.errors import UserError

DECLARATIONS = ("configs", "eval", "launch")


def package_files() -> dict[str, Path]:
    """The files of the package and its declarations, {path in a copy: path}, sorted."""
    folders = {"dinoreg": PACKAGE} | {f"dinoreg/_bundled/{name}": bundled(name) for name in DECLARATIONS}
    files = {}
    for place, folder in folders.items():
        for path in folder.rglob("*"):
            name = path.relative_to(folder)
            if path.is_file() and not {"__pycache__", "_bundled"} & set(name.parts):
                files[f"{place}/{name.as_posix()}"] = path
    return dict(sorted(files.items()))


def fingerprint(files: dict[str, Path]) -> str:
    """12 hexadecimal digits of the SHA-256 over names and contents."""
    listed = "".join(f"{name}\0{digest(path)}\0" for name, path in files.items())
    return hashlib.sha256(listed.encode()).hexdigest()[:12]


def copy_package(folder: Path) -> Path:
    """Copy the package to `folder/<fingerprint>`, unless that exists; returns its path.

    raises UserError when the folder cannot be written
    """
    files = package_files()
    target = folder / fingerprint(files)
    if target.is_dir():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-", ignore_cleanup_errors=True) as aside:
            for name, path in files.items():
                copied = Path(aside) / target.name / name
                copied.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copied)
            os.rename(Path(aside) / target.name, target)
    except OSError as error:
        if not target.is_dir():  # another launch may have been quicker
            reason = error.strerror or error
            raise UserError(f"{folder}: the code cannot be copied there ({reason}); see code=") from None
    return target
