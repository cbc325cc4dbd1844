"""A copy of the package for jobs to run: a requeued job must not pick up what its checkout has become since.

The copy is named by its content, so that launches of the same code share one, and the copy of a running job is never
touched. It has the form of an installed wheel: declarations lie inside the package.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from dinoreg.config.bundled import PACKAGE, bundled
from dinoreg.runtime.errors import UserError

FOLDERS = ("configs", "eval", "launch")


def package_files() -> dict[str, Path]:
    """Every file of the package and its declarations, by its place in a copy."""
    files = {
        f"dinoreg/{path.relative_to(PACKAGE).as_posix()}": path
        for path in PACKAGE.rglob("*")
        if path.is_file() and not {"__pycache__", "_bundled"} & set(path.relative_to(PACKAGE).parts)
    }
    for name in FOLDERS:
        folder = bundled(name)
        for path in folder.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                files[f"dinoreg/_bundled/{name}/{path.relative_to(folder).as_posix()}"] = path
    return dict(sorted(files.items()))


def fingerprint(files: dict[str, Path]) -> str:
    """Twelve hexadecimal digits over names and contents."""
    running = hashlib.sha256()
    for name, path in files.items():
        content = path.read_bytes()
        running.update(f"{name}\0{len(content)}\0".encode())
        running.update(content)
    return running.hexdigest()[:12]


def copy_package(folder: Path) -> Path:
    """`folder/<fingerprint>` with a copy of the package; one that is there is taken as it is.

    raises UserError when the folder cannot be written
    """
    try:
        files = package_files()
        target = folder / fingerprint(files)
        if target.is_dir():
            return target
        folder.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder, prefix=".unfinished-"))
        try:
            for name, path in files.items():
                place = aside / name
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, place)
            aside.chmod(0o755)
            if not target.is_dir():
                os.rename(aside, target)
        except OSError:
            if not target.is_dir():  # another launch may have been quicker
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{folder}: the code cannot be copied there ({error.strerror or error}); see code=") from None
    return target
