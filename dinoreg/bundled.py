"""Where configs/, eval/ and launch/ are: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def bundled(name: str) -> Path:
    """Folder `configs`, `eval` or `launch`: the checkout's own if there is one, else the wheel's copy."""
    checkout = PACKAGE.parent / name
    if (PACKAGE.parent / "setup.py").is_file() and checkout.is_dir():
        return checkout
    return PACKAGE / "_bundled" / name
