"""k-NN segmentation against its literal form, its bounded memory, and planted and shuffled classes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from encoders import context, small_encoder
from PIL import Image
from test_segmentation import halves

from dinoreg.evaluation.backbones.encoder import PixelEncoder
from dinoreg.evaluation.benchmark import Task
from dinoreg.evaluation.data import Data, Segmented
from dinoreg.evaluation.options import EvalOptions, KnnSegmentationOptions
from dinoreg.evaluation.protocols.knn_segmentation import Memory, class_shares, evaluate, remember
from dinoreg.evaluation.protocols.measurement import Measurement
from dinoreg.evaluation.protocols.segmentation import Segmenter
from dinoreg.runtime.errors import UserError

TASK = Task("knn_segmentation", lambda folder, options: Data({}), "mIoU")


def measured(data: Data, where: Path, encoder: Any = None, **changes: Any) -> Measurement:
    options = EvalOptions(knn_segmentation=KnnSegmentationOptions(**{"size": 24, "stride": 16, "k": 5, **changes}))
    return Measurement(encoder or small_encoder(patch_size=4, image_size=16), data, TASK, options, context(where))


def parts(found: Measurement) -> tuple[Segmenter, KnnSegmentationOptions]:
    chosen = found.options.knn_segmentation
    return Segmenter(found.encoder, found.context, "knn_segmentation", chosen.size, chosen.stride), chosen


@pytest.fixture
def data() -> Data:
    return Data({"train": halves(9, "train"), "test": halves(4, "test")}, ("red", "green", "blue"))


@pytest.mark.parametrize("k", [3, 200])
def test_a_patch_is_the_weighted_mean_of_its_nearest(k: int) -> None:
    torch.manual_seed(0)
    features, labels = F.normalize(torch.randn(31, 6), dim=-1), torch.rand(31, 4)
    tokens = 3 * torch.randn(2, 6, 3, 5)
    found = Memory(features, labels, k, 0.02)(tokens)
    assert found.shape == (2, 4, 3, 5)
    for image in range(2):
        for row in range(3):
            for column in range(5):
                query = tokens[image, :, row, column]
                cosines = [float(each @ query / query.norm()) for each in features]
                nearest = sorted(range(31), key=lambda place: -cosines[place])[:k]
                weights = [math.exp((cosines[place] - max(cosines)) / 0.02) for place in nearest]
                expected = sum(weight * labels[place] for weight, place in zip(weights, nearest)) / sum(weights)
                torch.testing.assert_close(found[image, :, row, column], expected, atol=1e-5, rtol=1e-4)


def test_shares_are_of_the_pixels_that_count() -> None:
    mask = np.random.default_rng(0).choice([0, 1, 2, 255], size=(10, 7)).astype(np.uint8)
    mask[4:8, 3:7] = 255
    padded = np.full((12, 8), 255, dtype=np.uint8)
    padded[1:11, 0:7] = mask  # centrally: an odd pixel goes behind
    found = class_shares(torch.from_numpy(mask)[None, None], 4, 3)
    for place, (row, column) in enumerate(np.ndindex(3, 2)):
        pixels = padded[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        counted = (pixels != 255).sum()
        expected = [(pixels == label).sum() / max(counted, 1) for label in range(3)]
        assert found[place].tolist() == pytest.approx(expected)


def test_the_whole_equals_its_literal_form(tmp_path: Path, data: Data) -> None:
    """One window an image, as large as the memory asks for: patches, shares, neighbours and pixels one by one."""
    encoder = small_encoder(patch_size=4, image_size=16)
    square = {}
    for name, split in data.splits.items():
        pixels = [split.source.read(index)[:16, :16] for index in range(len(split))]
        masks = [split.mask(index)[:16, :16] for index in range(len(split))]
        source = type(split.source)(pixels, name)
        square[name] = Segmented(source, lambda index, masks=masks: masks[index], 3)
    row = evaluate(measured(replace(data, splits=square), tmp_path, encoder, size=16, stride=16))[0]

    def tokens(image: np.ndarray) -> torch.Tensor:
        return encoder.tokens(torch.from_numpy(image).permute(2, 0, 1)[None]).patches[0]

    features, labels = [], []
    for index in range(9):
        mask = square["train"].mask(index)
        for place, token in enumerate(tokens(square["train"].source.read(index))):
            r, c = divmod(place, 4)
            pixels = mask[4 * r : 4 * r + 4, 4 * c : 4 * c + 4]
            if (pixels != 255).any():
                features.append((token / token.norm()).half().float())
                labels.append([(pixels == label).sum() / (pixels != 255).sum() for label in range(3)])
    truth = torch.tensor(labels).half().float()
    right, union = np.zeros(3), np.zeros(3)
    for index in range(4):
        mask, maps = square["test"].mask(index), torch.zeros(3, 4, 4)
        for place, token in enumerate(tokens(square["test"].source.read(index))):
            cosines = torch.stack(features) @ (token / token.norm())
            nearest = cosines.argsort(descending=True)[:5]
            maps[:, place // 4, place % 4] = (cosines[nearest] / 0.02).softmax(0) @ truth[nearest]
        said = F.interpolate(maps[None], size=(16, 16), mode="bilinear", align_corners=False)[0].argmax(0).numpy()
        for label in range(3):
            ours, theirs = (said == label) & (mask != 255), mask == label
            right[label] += (ours & theirs).sum()
            union[label] += (ours | theirs).sum()
    assert row.value == pytest.approx((right / union)[union > 0].mean(), abs=1e-9)


@pytest.mark.parametrize("memory", [5, 40, 10_000])
def test_the_memory_is_bounded_and_takes_of_every_image(tmp_path: Path, data: Data, memory: int) -> None:
    found = remember(
        *parts(measured(data, tmp_path, memory=memory))[:1],
        data.splits["train"],
        KnnSegmentationOptions(memory=memory, size=24, stride=16),
    )
    assert len(found.features) == len(found.labels) <= memory
    if memory == 40:
        assert len(found.features) == 9 * 4
    torch.testing.assert_close(found.features.float().norm(dim=-1), torch.ones(len(found.features)), atol=2e-3, rtol=0)
    torch.testing.assert_close(found.labels.float().sum(dim=-1), torch.ones(len(found.labels)), atol=2e-3, rtol=0)


def test_planted_classes_are_found_and_shuffled_ones_are_not(tmp_path: Path, data: Data) -> None:
    rows = evaluate(measured(data, tmp_path))
    assert [(row.variant, row.metric, row.n_train, row.n_test) for row in rows] == [("k = 5", "mIoU", 9, 4)]
    assert rows[0].value > 0.75
    assert rows[0].majority < 0.5
    train = data.splits["train"]
    turned = replace(
        train, mask=lambda index: np.where((m := train.mask(index)) == 255, 255, (m + index) % 3).astype(np.uint8)
    )
    lost = evaluate(measured(replace(data, splits={**data.splits, "train": turned}), tmp_path / "lost"))
    assert lost[0].value < rows[0].value - 0.25
    again = evaluate(measured(data, tmp_path / "again"))
    assert again[0].value == rows[0].value
    assert evaluate(measured(data, tmp_path / "pixels", PixelEncoder(4, (16, 16))))[0].value > 0.5


def test_an_interrupted_pass_goes_on_with_the_same_memory(
    tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinoreg.evaluation.context.SAVE_SECONDS", -1.0)
    whole, broken = evaluate(measured(data, tmp_path / "a"))[0], measured(data, tmp_path / "b")

    def stopping(items: Any, _total: int, what: str) -> Any:
        for number, item in enumerate(items):
            if "test" in what and number == 2:
                raise KeyboardInterrupt
            yield item

    broken.context.progress = stopping
    with pytest.raises(KeyboardInterrupt):
        evaluate(broken)
    assert evaluate(measured(data, tmp_path / "b"))[0].value == whole.value


def test_masks_without_a_class_are_one_line(tmp_path: Path, data: Data) -> None:
    empty = replace(data.splits["train"], mask=lambda index: np.full_like(data.splits["train"].mask(index), 255))
    with pytest.raises(UserError, match="no training image has a pixel of a class"):
        evaluate(measured(replace(data, splits={**data.splits, "train": empty}), tmp_path))
    with pytest.raises(UserError, match=r"knn_segmentation\.stride=30: .*at most knn_segmentation\.size=24"):
        KnnSegmentationOptions(size=24, stride=30)


def test_own_pictures_with_masks_are_measured_so_too(tmp_path: Path) -> None:
    from dinoreg.evaluation.custom.datasets import own_benchmark

    for name, split in (("train", halves(6, "train")), ("test", halves(3, "test"))):
        for index in range(len(split)):
            for kind, pixels in (("images", split.source.read(index)), ("masks", split.mask(index))):
                path = tmp_path / "own" / kind / name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    linear, neighbours = own_benchmark(tmp_path / "own", {}).tasks
    assert (linear.protocol, neighbours.protocol) == ("segmentation", "knn_segmentation")
    assert linear.read is neighbours.read
