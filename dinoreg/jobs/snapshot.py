"""A copy of the package for jobs to run, so that a requeued job is not affected by later changes of the checkout.

The copy is named by its content, so that launches of the same code share one, and the copy of a running job is never
changed. It has the layout of an installed wheel: declarations are inside the package.
"""

import hashlib
import shutil
import tempfile
from pathlib import Path

from dinoreg.config.bundled import PACKAGE, bundled
from dinoreg.runtime.digest import digest
from dinoreg.runtime.errors import reworded

FOLDERS = {"dinoreg": PACKAGE} | {f"dinoreg/_bundled/{name}": bundled(name) for name in ("configs", "eval", "launch")}


def copy_package(folder: Path) -> Path:
    """Copy the package and its declarations to `folder/<fingerprint>`, unless that exists; returns its path.

    raises UserError when the folder cannot be written
    """
    with reworded(f"{folder}: the code cannot be copied there, see code=", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-", ignore_cleanup_errors=True) as aside:
            copy = Path(aside) / "copy"
            for name, source in FOLDERS.items():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", "_bundled"))
            target = folder / _fingerprint(copy)
            try:
                copy.rename(target)
            except OSError:
                if not target.is_dir():  # which an earlier launch has made
                    raise
    return target


def _fingerprint(folder: Path) -> str:
    """12 hexadecimal digits of the SHA-256 over names and contents."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = "".join(f"{path.relative_to(folder).as_posix()}\0{digest(path)}\0" for path in files)
    return hashlib.sha256(listed.encode()).hexdigest()[:12]
