from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from dinoreg.config.view_settings import AugmentSettings
from dinoreg.data.augment import NUMBERS_PER_VIEW, ORDERS, P, augment, draw_photometric, gaussian_blur

PLAIN = AugmentSettings(mean=(0.0,), std=(1.0,))


def drawn(settings: AugmentSettings, images: int = 3000, views: int = 4, seed: int = 1) -> np.ndarray:
    numbers = np.random.default_rng(seed).random((images, views, NUMBERS_PER_VIEW))
    return draw_photometric(numbers, settings)


def pixels(count: int = 7, channels: int = 3, height: int = 19, width: int = 23, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.rand(count, channels, 5, 6, generator=generator)
    image = torch.nn.functional.interpolate(smooth, size=(height, width), mode="bilinear")
    image[:, :, :3, :3] = image[:, :1, :3, :3]  # some pixels without chroma
    return (image * 255).round().to(torch.uint8)


def literal(crop: Tensor, p: np.ndarray, settings: AugmentSettings) -> Tensor:
    """One crop through torchvision's functionals, one after the other."""
    x = crop.float() / 255
    x = V.horizontal_flip(x) if p[P.HFLIP] else x
    x = V.vertical_flip(x) if p[P.VFLIP] else x
    if p[P.JITTER]:
        for change in ORDERS[int(p[P.ORDER])]:
            if change == 0:
                x = V.adjust_brightness(x, float(p[P.BRIGHTNESS]))
            elif change == 1:
                x = V.adjust_contrast(x, float(p[P.CONTRAST]))
            elif change == 2:
                x = V.adjust_saturation(x, float(p[P.SATURATION]))
            else:
                x = V.adjust_hue(x, float(p[P.HUE]))
    x = V.rgb_to_grayscale(x, num_output_channels=3) if p[P.GRAY] else x
    if p[P.SIGMA]:
        x = V.gaussian_blur(x, [settings.blur_kernel] * 2, [float(p[P.SIGMA])] * 2)
    x = V.solarize(x, settings.solarize_threshold / 255) if p[P.SOLARIZE] else x
    return V.normalize(x, list(settings.mean), list(settings.std))


def test_a_batch_equals_torchvisions_functionals_applied_one_by_one() -> None:
    settings = dataclasses.replace(AugmentSettings(), vflip=0.3, hue=0.5, solarize_global2=0.7)
    params = drawn(settings, images=20)[:, 1]
    crops = pixels(20)
    expected = torch.stack([literal(crop, p, settings) for crop, p in zip(crops, params)])
    torch.testing.assert_close(augment(crops, params, settings), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("order", range(24))
def test_every_order_of_the_colour_changes_equals_torchvisions(order: int) -> None:
    params = np.zeros((1, P.END), dtype=np.float32)
    params[0, [P.JITTER, P.BRIGHTNESS, P.CONTRAST, P.SATURATION, P.HUE, P.ORDER]] = (
        1,
        1.3,
        0.7,
        1.2,
        -0.08,
        order,
    )
    crop = pixels(1)
    torch.testing.assert_close(augment(crop, params, PLAIN)[0], literal(crop[0], params[0], PLAIN), atol=2e-6, rtol=0)


def test_the_memory_layout_and_the_company_of_a_crop_do_not_change_it() -> None:
    settings = AugmentSettings()
    params = drawn(settings, images=9)[:, 1]
    crops = pixels(9)
    together = augment(crops, params, settings)
    inner = crops.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(augment(inner, params, settings), together)
    for row in range(9):
        alone = augment(crops[row : row + 1], params[row : row + 1], settings)[0]
        torch.testing.assert_close(alone, together[row], atol=1e-6, rtol=0)


def test_only_the_asked_rows_are_written() -> None:
    params = drawn(PLAIN, images=5)[:, 0]
    out = torch.full((5, 3, 19, 23), -7.0)
    augment(pixels(5), params, PLAIN, out=out, rows=np.array([3, 1]))
    assert [bool((out[row] == -7).all()) for row in range(5)] == [True, False, True, False, True]


@pytest.mark.parametrize("channels", [1, 5])
def test_other_channel_counts_get_brightness_and_contrast_but_no_colour(channels: int) -> None:
    params = np.zeros((1, P.END), dtype=np.float32)
    params[0, [P.JITTER, P.BRIGHTNESS, P.CONTRAST, P.SATURATION, P.HUE, P.GRAY]] = (1, 0.8, 1.3, 0.1, 0.4, 1)
    crop = pixels(1, channels)
    x = (crop.float() / 255 * 0.8).clamp(0, 1)  # order 0: brightness, contrast, saturation, hue
    expected = (1.3 * x - 0.3 * x.mean()).clamp(0, 1)
    torch.testing.assert_close(augment(crop, params, PLAIN), expected, atol=1e-6, rtol=0)


def test_undrawn_parameters_leave_a_crop_alone() -> None:
    crop = pixels(2)
    params = np.zeros((2, P.END), dtype=np.float32)
    torch.testing.assert_close(augment(crop, params, PLAIN), crop.float() / 255, atol=1e-7, rtol=0)


def test_the_devices_blur_equals_the_cpus() -> None:
    x, sigmas = torch.rand(4, 3, 11, 17), np.array([0.1, 0.5, 1.3, 2.0], dtype=np.float32)
    expected = torch.stack([V.gaussian_blur(row, [7, 7], [float(s)] * 2) for row, s in zip(x, sigmas)])
    torch.testing.assert_close(gaussian_blur(x, sigmas, 7), expected, atol=1e-6, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_cpus_crops() -> None:
    settings = AugmentSettings()
    params = drawn(settings, images=50)[:, 1]
    crops = pixels(50)
    on_gpu = augment(crops.cuda(), params, settings).cpu()
    torch.testing.assert_close(on_gpu, augment(crops, params, settings), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("reference", "expected"), [(False, (1.0, 0.1, 0.5, 0.5)), (True, (0.0, 0.9, 0.5, 0.5))])
def test_blur_comes_as_often_as_stated_and_inverted_in_reference_mode(
    reference: bool, expected: tuple[float, ...]
) -> None:
    params = drawn(AugmentSettings(reference_blur=reference))
    blurred = (params[..., P.SIGMA] > 0).mean(axis=0)
    np.testing.assert_allclose(blurred, expected, atol=0.03)
    sigmas = params[..., P.SIGMA][params[..., P.SIGMA] > 0]
    assert sigmas.min() >= 0.1
    assert sigmas.max() <= 2.0
    assert abs(sigmas.mean() - 1.05) < 0.03


def test_solarise_comes_in_a_fifth_of_the_second_global_crops_only() -> None:
    solarized = drawn(AugmentSettings())[..., P.SOLARIZE].mean(axis=0)
    assert abs(solarized[1] - 0.2) < 0.03
    assert solarized[[0, 2, 3]].tolist() == [0, 0, 0]


def test_the_other_changes_have_the_papers_frequencies_and_ranges() -> None:
    params = drawn(AugmentSettings())
    for column, share in ((P.HFLIP, 0.5), (P.VFLIP, 0.0), (P.JITTER, 0.8), (P.GRAY, 0.2)):
        assert abs(params[..., column].mean() - share) < 0.02
    for column, low, high in (
        (P.BRIGHTNESS, 0.6, 1.4),
        (P.CONTRAST, 0.6, 1.4),
        (P.SATURATION, 0.8, 1.2),
        (P.HUE, -0.1, 0.1),
    ):
        values = params[..., column]
        assert values.min() >= low - 1e-6
        assert values.max() <= high + 1e-6
        assert abs(values.mean() - (low + high) / 2) < 0.01
    assert np.bincount(params[..., P.ORDER].astype(int).ravel(), minlength=24).min() > 300
