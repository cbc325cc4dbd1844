"""Frozen features of a set of images, and the two probes a run is judged by: on features and on raw pixels.

The feature is the class token after the final norm, optionally with the mean of the patch tokens behind it
. Every evaluator reads a model through `model(images) -> Tokens` alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn

from dinoreg.evaluation.metrics.bootstrap import bootstrap_interval
from dinoreg.evaluation.solvers.regularisation_path import REFERENCE_CS, select_and_fit
from dinoreg.runtime.errors import RunError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Images = np.ndarray | Tensor | Iterable[ArrayLike] | Callable[[int], ArrayLike]


@torch.no_grad()
def extract_features(
    model: nn.Module,
    images: Images,
    *,
    count: int | None = None,
    batch_size: int = 128,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    device: torch.device | str | None = None,
    mean_patch: bool = False,
    autocast: torch.dtype | None = None,
    names: Sequence[str] | None = None,
) -> Tensor:
    """One feature per image, in order, in eval mode and without gradients; one batch is held at a time.

    images      uint8 (n, H, W, C), an iterable of (H, W, C), or a function of the index with `count` of them
    mean, std   one number, or one per channel, on the scale of [0, 1]
    device      where the model is to run; its own device when None
    mean_patch  append the mean patch token: F = 2 D instead of D
    autocast    run in this type (torch.bfloat16, torch.float16); None keeps the model's own
    names       of the images, for messages
    returns     (n, F) float32 on the CPU; raises RunError naming the first image whose feature is not finite
    """
    where = torch.device(device) if device is not None else _device_of(model)
    model.to(where)
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    rows: list[Tensor] = []
    done = 0
    try:
        for batch in _batches(images, count, batch_size, names):
            pixels = _normalise(batch.to(where, non_blocking=True), mean, std)
            context = torch.autocast(where.type, autocast) if autocast is not None else nullcontext()
            with context:
                tokens = model(pixels)
            feature = tokens.cls.float()
            if mean_patch:
                feature = torch.cat([feature, tokens.patches.float().mean(dim=1)], dim=1)
            feature = feature.cpu()
            bad = (~torch.isfinite(feature).all(dim=1)).nonzero()
            if len(bad):
                raise RunError(f"the feature of {_name(done + int(bad[0]), names)} is not finite")
            rows.append(feature)
            done += len(feature)
    finally:
        for module, training in was_training.items():
            module.training = training
    if not rows:
        raise ValueError("there are no images to extract features from")
    return torch.cat(rows)


@dataclass(frozen=True)
class ProbeRow:
    """A probe's result: accuracy on the test images with its bootstrap interval, and how it was found."""

    accuracy: float
    low: float
    high: float
    C: float
    n_train: int
    n_test: int
    num_classes: int
    num_features: int
    seconds: float  # features and fits together

    def as_dict(self) -> dict[str, Any]:
        """The fields as `eval/<step>/<dataset>.json` holds them: `accuracy` is `value`, of a named metric."""
        fields = asdict(self)
        return {"metric": "accuracy", "value": fields.pop("accuracy"), **fields}


def probe_record(dataset: str, row: ProbeRow, baselines: dict[str, ProbeRow] | None = None) -> dict[str, Any]:
    """The content of one `eval/<step>/<dataset>.json`: the row and what it is to be compared with."""
    return {
        "dataset": dataset,
        "probe": "logistic regression",
        "chance": 1.0 / row.num_classes,
        **row.as_dict(),
        "baselines": {name: each.as_dict() for name, each in (baselines or {}).items()},
    }


def linear_probe(
    model: nn.Module,
    train_images: Images,
    train_labels: ArrayLike,
    test_images: Images,
    test_labels: ArrayLike,
    *,
    num_classes: int | None = None,
    Cs: Sequence[float] = REFERENCE_CS,
    validation_seed: int = 0,
    batch_size: int = 128,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    device: torch.device | str | None = None,
    mean_patch: bool = False,
    autocast: torch.dtype | None = None,
    names: tuple[Sequence[str], Sequence[str]] | None = None,
) -> ProbeRow:
    """Logistic regression on the frozen features of a model; C chosen on a tenth of the training images.

    images as in `extract_features` (a function is asked for as many as there are labels)
    labels (n,) integers in [0, num_classes)
    """
    started = time.perf_counter()

    def features(images: Images, labels: ArrayLike, which: int) -> Tensor:
        return extract_features(
            model,
            images,
            count=len(np.asarray(labels)),
            batch_size=batch_size,
            mean=mean,
            std=std,
            device=device,
            mean_patch=mean_patch,
            autocast=autocast,
            names=None if names is None else names[which],
        )

    train, test = features(train_images, train_labels, 0), features(test_images, test_labels, 1)
    return _probe(train, train_labels, test, test_labels, num_classes, Cs, validation_seed, device, started)


def pixel_probe(
    train_images: Images,
    train_labels: ArrayLike,
    test_images: Images,
    test_labels: ArrayLike,
    *,
    num_classes: int | None = None,
    Cs: Sequence[float] = REFERENCE_CS,
    validation_seed: int = 0,
    size: int | None = 32,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> ProbeRow:
    """The baseline without a network: the same protocol on pixels in [0, 1].

    size  the pictures are averaged down to (size, size) first where they are larger; None keeps every pixel
    """
    started = time.perf_counter()

    def pixels(images: Images, labels: ArrayLike) -> Tensor:
        rows = []
        for batch in _batches(images, len(np.asarray(labels)), batch_size, None):
            x = batch.permute(0, 3, 1, 2).float() / 255
            if size is not None and max(x.shape[-2:]) > size:
                x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
            rows.append(x.flatten(1))
        return torch.cat(rows)

    train, test = pixels(train_images, train_labels), pixels(test_images, test_labels)
    return _probe(train, train_labels, test, test_labels, num_classes, Cs, validation_seed, device, started)


def _probe(
    train: Tensor,
    train_labels: ArrayLike,
    test: Tensor,
    test_labels: ArrayLike,
    num_classes: int | None,
    Cs: Sequence[float],
    seed: int,
    device: torch.device | str | None,
    started: float,
) -> ProbeRow:
    known = np.asarray(train_labels)
    truth = torch.as_tensor(np.asarray(test_labels)).long()
    classes = int(max(known.max(), int(truth.max()))) + 1 if num_classes is None else num_classes
    chosen = select_and_fit(train, known, classes, Cs, seed=seed, device=device)
    correct = (chosen.model.predict(test) == truth).numpy()
    low, high = bootstrap_interval(correct)
    return ProbeRow(
        accuracy=float(correct.mean()),
        low=low,
        high=high,
        C=chosen.C,
        n_train=len(train),
        n_test=len(test),
        num_classes=classes,
        num_features=train.shape[1],
        seconds=time.perf_counter() - started,
    )


def _batches(images: Images, count: int | None, batch_size: int, names: Sequence[str] | None) -> Iterator[Tensor]:
    """uint8 (b, H, W, C) batches of any of the accepted sources."""
    if isinstance(images, np.ndarray | Tensor):
        if images.ndim != 4 or str(images.dtype).removeprefix("torch.") != "uint8":
            raise ValueError(f"images must be uint8 (n, H, W, C), got {images.dtype} {tuple(images.shape)}")
        for start in range(0, len(images), batch_size):
            yield torch.as_tensor(np.ascontiguousarray(images[start : start + batch_size]))
        return
    if callable(images):
        if count is None:
            raise ValueError("images given as a function need a count")
        source: Iterable[ArrayLike] = (images(index) for index in range(count))
    else:
        source = images
    held: list[np.ndarray] = []
    for index, each in enumerate(source):
        image = np.asarray(each)
        if image.ndim != 3 or image.dtype != np.uint8 or (held and image.shape != held[0].shape):
            expected = f"uint8 {held[0].shape}" if held else "uint8 (H, W, C)"
            raise ValueError(f"{_name(index, names)} is {image.dtype} {image.shape}, expected {expected}")
        held.append(image)
        if len(held) == batch_size:
            yield torch.from_numpy(np.stack(held))
            held = []
    if held:
        yield torch.from_numpy(np.stack(held))


def _normalise(batch: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (b, H, W, C) -> float32 (b, C, H, W)."""
    channels = batch.shape[-1]
    if not {len(mean), len(std)} <= {1, channels}:
        raise ValueError(f"images have {channels} channels, but mean has {len(mean)} and std {len(std)} values")
    scale = torch.tensor(std, device=batch.device, dtype=torch.float32) * 255
    shift = torch.tensor(mean, device=batch.device, dtype=torch.float32) * 255
    return ((batch.float() - shift) / scale).permute(0, 3, 1, 2).contiguous()


def _device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _name(index: int, names: Sequence[str] | None) -> str:
    return f"image {index}" if names is None else f"image {index} ({names[index]})"
