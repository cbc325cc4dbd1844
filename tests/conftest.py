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
from PIL import Image


def pytest_configure(config: pytest.Config) -> None:
    # One thread: sums then have one order, whatever the machine.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
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


def photograph(seed: int, height: int, width: int) -> Image.Image:
    """Smooth colour fields with edges and grain: something a JPEG encoder and a crop find natural."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    planes = []
    for _ in range(3):
        a, b, c, d = rng.uniform(1, 9, size=4)
        planes.append(np.sin(a * x + b * y) + np.cos(c * x * y + d))
    image = np.stack(planes, axis=-1)
    top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
    image[top : top + height // 3, left : left + width // 3] = rng.uniform(-2, 2, size=3)
    image += rng.normal(scale=0.05, size=image.shape)
    return Image.fromarray(np.uint8(np.clip((image + 2) / 4, 0, 1) * 255))


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
