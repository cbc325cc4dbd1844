"""Padding, sliding windows and random crops of the dense protocols."""

from __future__ import annotations

import colorsys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from encoders import context

from dinoreg.evaluation.backbones.encoder import PixelEncoder, wrap
from dinoreg.evaluation.dense import windows as dense
from dinoreg.evaluation.dense.windows import (
    Windows,
    bilinear_matrix,
    centre_pad,
    centre_padding,
    fit_size,
    patch_grid,
    shuffled,
    training_batches,
    window_starts,
)
from dinoreg.evaluation.features.cache import require_finite
from dinoreg.evaluation.protocols.segmentation import (
    crop_origin,
    pad_to,
    photometric_distortion,
    scale_saturation,
    turn_hue,
)
from dinoreg.models.vit import RegisterViT
from dinoreg.runtime.errors import RunError


class TestSizes:
    def test_the_short_side_is_reached_unless_the_long_one_is_at_its_limit(self) -> None:
        assert fit_size(300, 400, 512, 2048) == (512, 683)
        assert fit_size(683, 512, 512, 2048) == (683, 512)
        assert fit_size(100, 1000, 512, 2048) == (205, 2048)
        assert fit_size(1, 3000, 10, 40) == (1, 40)

    @pytest.mark.parametrize(("length", "expected"), [(512, (3, 3)), (518, (0, 0)), (517, (0, 1)), (1, (6, 7))])
    def test_padding_makes_whole_patches_and_is_central(self, length: int, expected: tuple[int, int]) -> None:
        assert centre_padding(length, 14) == expected

    def test_a_padded_image_keeps_its_pixels_and_takes_each_channels_colour_around(self) -> None:
        images = torch.rand(2, 3, 5, 8)
        padded = centre_pad(images, 4, (0.1, 0.2, 0.3))
        assert padded.shape == (2, 3, 8, 8)
        assert torch.equal(padded[:, :, 1:6], images)
        border = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1).expand(2, 3, 1, 8)
        assert torch.equal(padded[:, :, :1], border)
        assert torch.equal(padded[:, :, 7:], border)
        assert torch.equal(centre_pad(images, 4)[:, :, 0], torch.zeros(2, 3, 8))

    def test_padding_below_and_right_of_masks_and_images(self) -> None:
        mask = np.arange(6, dtype=np.uint8).reshape(2, 3)
        assert pad_to(mask, 3, 255).tolist() == [[0, 1, 2], [3, 4, 5], [255, 255, 255]]
        image = pad_to(np.zeros((1, 2, 3), dtype=np.uint8), 2, (7, 8, 9))
        assert image[0, :2].max() == 0
        assert image[1].tolist() == [[7, 8, 9], [7, 8, 9]]


class TestPatchGrid:
    def test_tokens_are_a_map_in_the_order_of_rows_and_columns_whatever_the_batch(self) -> None:
        encoder = PixelEncoder(4, (8, 12))
        images = torch.randint(0, 256, (3, 3, 8, 12), dtype=torch.uint8)
        tokens = patch_grid(encoder, images, 2)
        assert tokens.shape == (3, 48, 2, 3)
        corner = images[:, :, 4:8, 8:12].float() / 255
        torch.testing.assert_close(tokens[:, :, 1, 2], ((corner - 0.5) / 0.25).flatten(1))

    def test_what_is_padded_is_zero_after_normalisation(self) -> None:
        seen = patch_grid(PixelEncoder(4, (8, 8)), torch.full((1, 3, 6, 8), 255, dtype=torch.uint8), 1)
        pixels = seen[0, :, 0, 0].view(3, 4, 4)
        assert pixels[:, 0].abs().max() == 0
        assert pixels[:, 1:].min() == 2

    def test_registers_are_not_in_the_map(self) -> None:
        model = RegisterViT(image_size=8, patch_size=4, dim=8, depth=1, heads=2, num_registers=3)
        encoder = wrap(model)
        images = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8)
        expected = encoder.tokens(images).patches
        torch.testing.assert_close(patch_grid(encoder, images, 8).flatten(2).mT, expected)

    def test_a_feature_that_is_not_finite_names_its_image(self) -> None:
        tokens = torch.zeros(3, 2, 2, 2)
        require_finite(tokens, ["a", "b", "c"], PixelEncoder(4, (8, 8)))
        tokens[1, 0, 1, 1] = torch.nan
        with pytest.raises(RunError, match=r"b: its feature is not finite \(raw pixels\)"):
            require_finite(tokens, ["a", "b", "c"], PixelEncoder(4, (8, 8)))


class TestWindows:
    @pytest.mark.parametrize(("out", "length"), [(9, 4), (4, 9), (5, 5), (7, 1), (1, 6)])
    def test_the_matrix_of_bilinear_resizing_equals_interpolate(self, out: int, length: int) -> None:
        x = torch.randn(1, 2, length, dtype=torch.float64)
        expected = F.interpolate(x, size=out, mode="linear", align_corners=False)
        torch.testing.assert_close(x @ torch.from_numpy(bilinear_matrix(out, length)).mT, expected)

    @pytest.mark.parametrize(
        ("length", "expected"), [(512, [0]), (513, [0, 1]), (853, [0, 341]), (854, [0, 341, 342]), (300, [0])]
    )
    def test_windows_cover_the_image_and_the_last_ends_with_it(self, length: int, expected: list[int]) -> None:
        assert window_starts(length, 512, 341) == expected

    @pytest.mark.parametrize(("height", "width", "out"), [(20, 33, (20, 33)), (13, 20, (31, 47)), (41, 26, (17, 11))])
    def test_blocks_of_rows_equal_upsampling_averaging_and_scaling_one_after_the_other(
        self, height: int, width: int, out: tuple[int, int]
    ) -> None:
        size, stride, patch, classes = 20, 13, 6, 4
        windows = Windows(height, width, size, stride, patch)
        tall, wide = min(size, height), min(size, width)
        (top, bottom), (left, right) = centre_padding(tall, patch), centre_padding(wide, patch)
        padded = (top + tall + bottom, left + wide + right)
        maps = torch.randn(
            len(windows.tops) * len(windows.lefts), classes, padded[0] // patch, padded[1] // patch, dtype=torch.float64
        )

        total = torch.zeros(classes, height, width, dtype=torch.float64)
        covered = torch.zeros(height, width, dtype=torch.float64)
        starts = [(y, x) for y in window_starts(height, size, stride) for x in window_starts(width, size, stride)]
        for (y, x), each in zip(starts, maps):
            full = F.interpolate(each[None], size=padded, mode="bilinear", align_corners=False)[0]
            total[:, y : y + tall, x : x + wide] += full[:, top : top + tall, left : left + wide]
            covered[y : y + tall, x : x + wide] += 1
        assert covered.min() > 0
        expected = F.interpolate((total / covered)[None], size=out, mode="bilinear", align_corners=False)[0]

        for elements in (1, 500, 1 << 24):
            blocks = list(windows.rows_of(maps, *out, elements=elements))
            assert all(block.numel() <= max(elements, classes * out[1]) for _, block in blocks)
            torch.testing.assert_close(torch.cat([block for _, block in blocks], dim=1), expected)
            assert np.array_equal(windows.argmax(maps, *out, elements=elements), expected.argmax(0).numpy())

    def test_cut_windows_lie_where_they_start(self) -> None:
        image = torch.arange(6 * 11).view(1, 6, 11)
        windows = Windows(6, 11, 5, 4, 1)
        cut = windows.cut(image)
        assert cut.shape == (6, 1, 5, 5)
        assert cut[:, 0, 0, 0].tolist() == [y * 11 + x for y in (0, 1) for x in (0, 4, 6)]


class TestCrops:
    def test_crops_lie_inside_and_reach_every_corner(self) -> None:
        rng = np.random.default_rng(0)
        mask = rng.permutation(42).reshape(7, 6)  # any crop is good
        found = {crop_origin(mask, 5, rng) for _ in range(200)}
        assert found == {(top, left) for top in range(3) for left in range(2)}
        assert crop_origin(mask[:3, :4], 5, rng) == (0, 0)

    def test_a_crop_of_almost_one_class_is_drawn_again(self) -> None:
        mask = np.zeros((8, 40), dtype=np.uint8)
        mask[:, 36:] = 1
        mask[:4, :20] = 255
        rng = np.random.default_rng(0)
        plain = [crop_origin(np.arange(320).reshape(8, 40), 8, rng)[1] for _ in range(200)]
        chosen = [crop_origin(mask, 8, rng, 0.75)[1] for _ in range(200)]
        # Only crops from column 31 or 32 are good: 2 of 33, so 6 % are hit at once and 46 % within ten tries.
        assert sum(left >= 31 for left in plain) < 30
        assert sum(left >= 31 for left in chosen) > 70

    def test_a_mask_of_one_class_still_gives_a_crop(self) -> None:
        assert crop_origin(np.full((4, 4), 255, dtype=np.uint8), 4, np.random.default_rng(0)) == (0, 0)

    def test_hue_turns_and_saturation_scales_as_in_hsv(self) -> None:
        rng = np.random.default_rng(0)
        image = rng.uniform(0, 255, (4, 5, 3)).astype(np.float32)
        image[0, 0] = 0
        image[0, 1] = 90
        image[0, 2] = (200, 200, 10)
        turned, scaled = turn_hue(image, -50), scale_saturation(image, 1.4)
        for y in range(4):
            for x in range(5):
                h, s, v = colorsys.rgb_to_hsv(*(float(part) / 255 for part in image[y, x]))
                expected = np.array(colorsys.hsv_to_rgb((h - 50 / 360) % 1, s, v)) * 255
                np.testing.assert_allclose(turned[y, x], expected, atol=1e-3)
                expected = np.array(colorsys.hsv_to_rgb(h, min(s * 1.4, 1), v)) * 255
                np.testing.assert_allclose(scaled[y, x], expected, atol=1e-3)

    def test_distortion_changes_colours_within_bounds_and_leaves_some_images_alone(self) -> None:
        image = np.random.default_rng(1).integers(0, 256, (6, 7, 3), dtype=np.uint8)
        before = image.copy()
        found = [photometric_distortion(image, np.random.default_rng(seed)) for seed in range(200)]
        assert np.array_equal(image, before)
        assert all(each.dtype == np.uint8 and each.shape == image.shape for each in found)
        same = sum(np.array_equal(each, image) for each in found)
        assert 3 <= same <= 30  # 1 in 16 expected
        assert len({each.tobytes() for each in found}) > 150
        again = photometric_distortion(image, np.random.default_rng(17))
        assert np.array_equal(again, found[17])


class TestStream:
    def test_every_pass_has_each_image_once_in_an_order_of_its_own(self) -> None:
        passes = [[shuffled(turn * 7 + place, 7, seed=3) for place in range(7)] for turn in range(3)]
        assert all(sorted(each) == list(range(7)) for each in passes)
        assert passes[0] != passes[1]
        assert passes[0] != [shuffled(place, 7, seed=4) for place in range(7)]

    @pytest.mark.parametrize("workers", [0, 3])
    def test_a_step_has_the_same_samples_wherever_the_training_begins(self, workers: int, tmp_path: Path) -> None:
        def load(index: int, rng: np.random.Generator) -> tuple[int, float]:
            return index, float(rng.random())

        expected = list(training_batches(load, 5, 4, 6, context(tmp_path))(0))
        assert len(expected) == 6
        batches = training_batches(load, 5, 4, 6, replace(context(tmp_path), workers=workers))
        assert list(batches(3)) == expected[3:]
        assert next(batches(1)) == expected[1]
        values = [value for step in expected for _, (_, value) in step]
        assert len(set(values)) == len(values)

    def test_leaving_ends_the_threads(self, tmp_path: Path) -> None:
        before = set(threading.enumerate())
        batches = training_batches(lambda index, rng: index, 50, 2, 20, replace(context(tmp_path), workers=3))(0)
        next(batches)
        started = set(threading.enumerate()) - before
        assert started
        del batches
        for thread in started:  # nobody waits for what a thread has in hand
            thread.join(20)
        assert not started & set(threading.enumerate())

    def test_its_random_numbers_are_apart_from_the_order(self) -> None:
        assert dense.ORDER_STREAM != dense.SAMPLE_STREAM
