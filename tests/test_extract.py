"""Features of images and the probes on them, with a small network that obeys the encoder contract."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dinoreg.evaluation.features.extract import extract_features, linear_probe, pixel_probe, probe_record
from dinoreg.runtime.errors import RunError


class Tokens(NamedTuple):
    cls: Tensor
    registers: Tensor
    patches: Tensor


class Encoder(nn.Module):
    """Patches of 4 pixels, one linear map, the mean as class token; dropout would show in train mode."""

    def __init__(self, dim: int = 10, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.project = nn.Conv2d(3, dim, 4, 4)
        self.drop = nn.Dropout(0.5)
        self.largest_batch = 0

    def forward(self, images: Tensor) -> Tokens:
        self.largest_batch = max(self.largest_batch, len(images))
        patches = self.drop(self.project(images).flatten(2).mT.relu())
        return Tokens(patches.mean(1), patches[:, :2], patches)


def pictures(n: int, seed: int = 0, size: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def test_features_do_not_depend_on_the_batch_size_and_no_more_than_a_batch_is_held() -> None:
    images, model = pictures(13), Encoder()
    one, many = extract_features(model, images, batch_size=1), extract_features(model, images, batch_size=5)
    torch.testing.assert_close(one, many, atol=1e-6, rtol=1e-5)
    assert many.shape == (13, 10)
    assert model.largest_batch == 5


def test_features_equal_the_class_token_of_normalised_images() -> None:
    images, model = pictures(4), Encoder().eval()
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    expected = model(x)
    features = extract_features(model, images, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), mean_patch=True)
    torch.testing.assert_close(features, torch.cat([expected.cls, expected.patches.mean(1)], 1))


def test_arrays_tensors_iterables_and_functions_give_the_same_features() -> None:
    images, model = pictures(7), Encoder()
    expected = extract_features(model, images, batch_size=3)
    for source in (torch.from_numpy(images), iter(list(images)), (image for image in images)):
        assert torch.equal(extract_features(model, source, batch_size=3), expected)
    assert torch.equal(extract_features(model, lambda i: images[i], count=7, batch_size=3), expected)


def test_the_model_is_left_in_the_mode_it_came_in() -> None:
    model = Encoder().train()
    model.drop.eval()
    extract_features(model, pictures(2))
    assert model.training
    assert not model.drop.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_feature_that_is_not_finite_names_its_image() -> None:
    class Breaks(Encoder):
        def forward(self, images: Tensor) -> Tokens:
            tokens = super().forward(images)
            return tokens._replace(cls=tokens.cls / (images.amax(dim=(1, 2, 3)) > -5)[:, None].float())

    images = pictures(6)
    images[4] = 0  # black: the network divides by zero there
    model = Breaks()
    black = (0 - 0.485) / 0.01
    assert black < -5
    with pytest.raises(RunError, match=r"image 4 \(e\.png\)"):
        extract_features(model, images, std=(0.01,) * 3, batch_size=3, names=list("abcd") + ["e.png", "f"])


def test_images_of_another_size_or_type_are_refused_by_number() -> None:
    with pytest.raises(ValueError, match="image 1 is uint8"):
        extract_features(Encoder(), [pictures(1)[0], pictures(1, size=8)[0]])
    with pytest.raises(ValueError, match="uint8"):
        extract_features(Encoder(), np.zeros((2, 8, 8, 3), dtype=np.float32))
    with pytest.raises(ValueError, match="channels"):
        extract_features(Encoder(), np.zeros((2, 8, 8, 1), dtype=np.uint8))


def coloured(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three classes told apart by their colour, under noise."""
    labels = np.arange(n) % 3
    tint = 60 * np.eye(3)[labels][:, None, None, :]
    noise = np.random.default_rng(seed).integers(0, 190, (n, 12, 12, 3))
    return (tint + noise).astype(np.uint8), labels


def test_the_probe_finds_a_class_the_features_carry_and_states_its_interval() -> None:
    (train, train_labels), (test, test_labels) = coloured(120, 0), coloured(60, 1)
    row = linear_probe(Encoder(), train, train_labels, test, test_labels, Cs=(0.01, 1.0, 100.0))
    assert row.accuracy > 0.9
    assert row.low <= row.accuracy <= row.high
    assert (row.n_train, row.n_test, row.num_classes, row.num_features) == (120, 60, 3, 10)
    assert row.C in (0.01, 1.0, 100.0)


def test_without_a_pattern_the_interval_of_the_probe_holds_chance() -> None:
    images, labels = pictures(240), np.random.default_rng(5).integers(0, 2, 240)
    row = pixel_probe(images[:120], labels[:120], images[120:], labels[120:], Cs=(1e-4, 1e-2))
    assert row.low <= 0.5 <= row.high
    assert row.num_features == 12 * 12 * 3


def test_larger_pictures_are_averaged_down_for_the_pixel_probe() -> None:
    (train, train_labels), (test, test_labels) = coloured(60, 2), coloured(30, 3)
    row = pixel_probe(train, train_labels, test, test_labels, Cs=(0.1,), size=4)
    assert row.num_features == 4 * 4 * 3
    assert row.accuracy > 0.9


def test_a_record_holds_the_row_and_its_baselines() -> None:
    (train, train_labels), (test, test_labels) = coloured(60, 2), coloured(30, 3)
    row = pixel_probe(train, train_labels, test, test_labels, Cs=(0.1,))
    record = probe_record("colours", row, {"again": row})
    assert record["value"] == row.accuracy
    assert record["chance"] == pytest.approx(1 / 3)
    assert record["baselines"]["again"]["low"] == row.low
