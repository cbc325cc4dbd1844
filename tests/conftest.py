"""What every test shares: no network, no display, one thread, and a folder of generated photographs."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import numpy as np
import pytest
import torch
from photographs import photograph


def pytest_configure(config: pytest.Config) -> None:
    # One thread: sums then have one order, whatever the machine.
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the thorough tests, too")
    parser.addoption("--guides", action="store_true", help="with --slow: run every command of the guides, too")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A process for each core that may be used; where tests are named, this process alone, which starts sooner.

    The thorough tests wait for other processes half of their time, so that one more finds room beside them.
    """
    if config.args_source is pytest.Config.ArgsSource.ARGS:
        config.option.dist = "no"
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores + 1 if config.getoption("--slow") else cores


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    thorough = {item for item in items if item.get_closest_marker("slow")}
    if not config.getoption("--slow"):
        config.hook.pytest_deselected(items=list(thorough))
        items[:] = [item for item in items if item not in thorough]
    # Files that take long begin first, so that no process is left with one of them at the end.
    long_files = {item.path for item in thorough}
    items.sort(key=lambda item: item.path not in long_files)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _own_cache_and_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Indexes are kept per test, and global randomness starts from one place."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve generated photographs of mixed sizes and formats, in nested folders. Read only."""
    root = tmp_path_factory.mktemp("photos")
    formats = ("jpg", "png", "webp", "bmp", "tif", "jpg")
    for index in range(12):
        folder = root / ("a" if index % 2 else "b/c")
        folder.mkdir(parents=True, exist_ok=True)
        height, width = 40 + 7 * index, 100 - 5 * index
        photograph(index, height, width).save(folder / f"photo_{index:02d}.{formats[index % len(formats)]}")
    return root
