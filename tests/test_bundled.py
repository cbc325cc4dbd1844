"""The declarations beside the package are found in a checkout and travel inside the wheel."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dinoreg
from dinoreg.config import bundled as module
from dinoreg.config.bundled import bundled

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", ["configs", "eval", "launch"])
def test_a_checkout_uses_its_own_folders(name: str) -> None:
    assert bundled(name) == ROOT / name
    assert bundled(name).is_dir()


def test_an_installed_package_uses_the_wheels_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "site-packages" / "dinoreg"
    monkeypatch.setattr(module, "PACKAGE", package)
    (tmp_path / "site-packages" / "configs").mkdir(parents=True)  # somebody else's, without setup.py beside it
    assert bundled("configs") == package / "_bundled" / "configs"


@pytest.mark.slow
def test_the_wheel_holds_every_declaration(tmp_path: Path) -> None:
    """Builds from a copy of what an sdist would hold, with the setuptools at hand and no network."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        (copy / name).write_bytes((ROOT / name).read_bytes())
    for folder in ("dinoreg", "configs", "eval", "launch"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                target = copy / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run([*build, "-w", str(tmp_path), str(copy)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"dinoreg-{dinoreg.__version__}-")
    held = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("configs", "eval", "launch"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert f"dinoreg/_bundled/{path.relative_to(ROOT)}" in held
    templates = list((ROOT / "dinoreg").rglob("templates/*"))
    assert len(templates) > 10
    for path in (*templates, *(ROOT / "dinoreg").rglob("*.py")):
        assert str(path.relative_to(ROOT)) in held
    assert not any(name.startswith(("tests/", "configs/")) for name in held)
