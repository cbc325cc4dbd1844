"""What a protocol receives besides its data: folders, seed, sizes, and states of unfinished work."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dinoreg.checkpoint.atomic import replacing, write_picture
from dinoreg.data.preprocess import Preprocessing
from dinoreg.data.source import Source
from dinoreg.evaluation.features.images import CentreCrop

SAVE_SECONDS = 120.0  # between saved states of work that can be resumed


@dataclass
class Context:
    """One evaluation of one encoder on one dataset.

    features    folder of cached frozen features
    state       folder for states of unfinished work; removed when the evaluation is done
    examples    folder for pictures of predictions, or None where none are wanted (baselines)
    image_size  side of square crops, in pixels
    preprocessing  of the weights that are measured, which holds for one's own pictures, for baselines too
    batch_size  images that the backbone sees at once
    workers     decoding threads; 0 decodes in the calling thread
    progress    (items, total, description) -> the items, showing progress as they are taken
    features_dtype  of cached features: "float32", or "float16" for half the disk: 3 decimal digits, which moves scores
                    by hundredths of a percent
    """

    features: Path
    state: Path
    examples: Path | None
    seed: int
    image_size: int
    batch_size: int
    workers: int
    num_examples: int = 8
    features_dtype: str = "float32"
    preprocessing: Preprocessing | None = None
    progress: Callable[[Iterable[Any], int, str], Iterator[Any]] = lambda items, _total, _what: iter(items)

    def crop(self, source: Source, published: float = 1.0) -> CentreCrop:
        """What is seen of an image for its features: of one's own pictures what the weights state.

        published  of a benchmark: the short side over the crop's side
        """
        size = self.image_size
        if self.preprocessing is None or not source.as_trained:
            return CentreCrop(size if source.whole else round(size * published), size)
        stated = self.preprocessing.at(size)
        return CentreCrop(stated.short_side, size, stated.interpolation)

    def example_indices(self, count: int) -> list[int]:
        """Evenly spaced indices below `count` of the images to draw examples of; empty where no examples are wanted."""
        wanted = min(self.num_examples, count) if self.examples is not None else 0
        return np.unique(np.linspace(0, count - 1, wanted).round().astype(int)).tolist()

    def save_example(self, picture: Image.Image, prefix: str, number: int) -> None:
        """Write an example as `PREFIX_NN.png`, where examples are wanted."""
        if self.examples is not None:
            self.examples.mkdir(parents=True, exist_ok=True)
            write_picture(self.examples / f"{prefix}_{number:02d}.png", picture)


class SavedState:
    """State of unfinished work under one name, of tensors and plain values, saved every SAVE_SECONDS.

    key    what the work depends on; compared by its repr
    state  what an interrupted process saved under the same name and key, or None
    """

    def __init__(self, context: Context, name: str, key: object) -> None:
        self._path, self._key = context.state / f"{name}.pt", repr(key)
        self.state: dict[str, Any] | None = None
        with suppress(Exception):  # missing, torn or of another version: the work is done again
            found = torch.load(self._path, map_location="cpu", weights_only=True)
            self.state = found["state"] if found["key"] == self._key else None
        self._last = time.monotonic()

    def save_when_due(self, make: Callable[[], dict[str, Any]], now: bool = False) -> None:
        """Save what `make` returns if SAVE_SECONDS have passed since the last save, or if `now`."""
        if now or time.monotonic() - self._last > SAVE_SECONDS:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path) as aside:
                torch.save({"key": self._key, "state": make()}, aside)
            self._last = time.monotonic()
