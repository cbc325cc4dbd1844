"""One warm process for all faults, and a folder on a file system of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Faults
from mounts import mounted_disk


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    with Faults(tmp_path_factory.mktemp("faults")) as faults:
        yield faults


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB, mounted for this test."""
    with mounted_disk(tmp_path / "disk", "8m") as folder:
        yield folder
