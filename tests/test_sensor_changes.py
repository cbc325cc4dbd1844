"""Turns, windows, stains and lost channels of crops; presets; models of some of their channels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.color import hed_from_rgb, rgb_from_hed
from training import read_lines, tiny_config

from dinoreg import RegisterViT, select_channels
from dinoreg.config.load import load_config, to_yaml
from dinoreg.config.schema import DataConfig
from dinoreg.config.view_settings import PRESETS, AugmentSettings, CropSettings, MaskSettings
from dinoreg.data.augment import SENSOR_NUMBERS, P, augment, draw_photometric, left_out
from dinoreg.data.loader import Batch, BatchLoader, Views
from dinoreg.data.source import ScenesSource
from dinoreg.runtime.errors import UserError
from dinoreg.train.loop import pretrain

PLAIN = AugmentSettings(mean=(0.0,), std=(1.0,))


def crops(channels: int = 3, count: int = 6, size: int = 12) -> torch.Tensor:
    return torch.randint(0, 256, (count, channels, size, size), generator=torch.Generator().manual_seed(0)).byte()


def params(**columns: object) -> np.ndarray:
    out = np.zeros((6, P.END), dtype=np.float32)
    for name, values in columns.items():
        out[:, P[name]] = values
    return out


def test_turns_are_numpys() -> None:
    turns = np.array([0, 1, 2, 3, 1, 0])
    expected = [np.rot90(crop, turn, (1, 2)) for crop, turn in zip(crops().numpy(), turns)]
    torch.testing.assert_close(
        augment(crops(), params(TURN=turns), PLAIN) * 255, torch.tensor(np.stack(expected)).float()
    )


def test_a_window_spreads_what_is_left_of_the_range() -> None:
    low, high = np.linspace(0, 0.2, 6), np.linspace(0.3, 0, 6)
    pixels = crops().numpy() / 255
    a, b = (cut[:, None, None, None] for cut in (low, 1 - high))
    expected = np.clip((pixels - a) / (b - a), 0, 1)
    torch.testing.assert_close(augment(crops(), params(LOW=low, HIGH=high), PLAIN), torch.tensor(expected).float())


def test_stains_are_scaled_and_shifted_between_ruifroks_matrices() -> None:
    drawn = params()
    drawn[:, P.STAIN : P.END] = np.random.default_rng(0).uniform(-0.2, 0.2, (6, 6))
    density = -np.log(np.maximum(np.moveaxis(crops().numpy() / 255, 1, -1), 1e-6))
    stains = density @ hed_from_rgb
    factor, shift = 1 + drawn[:, None, None, P.STAIN : P.SHIFT], drawn[:, None, None, P.SHIFT : P.END]
    expected = np.clip(np.exp(-(stains * factor + shift) @ rgb_from_hed), 0, 1)
    torch.testing.assert_close(
        augment(crops(), drawn, PLAIN), torch.tensor(np.moveaxis(expected, -1, 1)).float(), atol=2e-4, rtol=0
    )


def test_lost_channels_are_at_their_mean_and_one_always_stays() -> None:
    settings = AugmentSettings(channel_drop=0.9, mean=(0.4,), std=(0.2,))
    numbers = np.random.default_rng(0).random((2000, 2, SENSOR_NUMBERS + 4))
    lost = draw_photometric(np.zeros((2000, 2, 12)), settings, numbers)[..., P.END :]
    assert lost.shape == (2000, 2, 4)
    assert lost.sum(axis=-1).max() == 3
    # All four would go with 0.9^4; then the one with the largest number stays.
    assert lost.mean() == pytest.approx(0.9 - 0.9**4 / 4, abs=0.01)
    drawn = np.concatenate([params(), np.tile([0.0, 1.0, 1.0, 0.0], (6, 1))], axis=1).astype(np.float32)
    seen = augment(crops(4), drawn, settings)
    assert bool((seen[:, 1:3] == 0).all())
    torch.testing.assert_close(seen[:, [0, 3]], (crops(4)[:, [0, 3]].float() / 255 - 0.4) / 0.2, atol=1e-5, rtol=1e-5)


def test_what_is_drawn_lies_in_the_stated_ranges() -> None:
    settings = AugmentSettings(turn=0.75, window=0.1, stain=0.05)
    drawn = draw_photometric(np.zeros((4000, 1, 12)), settings, np.random.default_rng(1).random((4000, 1, 13)))[:, 0]
    counts = np.bincount(drawn[:, P.TURN].astype(int), minlength=4) / 4000
    np.testing.assert_allclose(counts, 0.25, atol=0.03)
    assert 0 <= drawn[:, P.LOW : P.STAIN].min() < drawn[:, P.LOW : P.STAIN].max() < 0.1
    stains = drawn[:, P.STAIN : P.END]
    assert -0.05 <= stains.min() < -0.049 < 0.049 < stains.max() <= 0.05
    assert "stain" in left_out(settings, 5)


def first(settings: AugmentSettings, workers: int = 0, **options: object) -> Batch:
    views = Views(CropSettings(24, 16, 2), settings, MaskSettings(), 8, **options)
    with BatchLoader(ScenesSource(30, 64), views, DataConfig(workers=workers), batch_size=4) as loader:
        return next(loader)


def test_the_other_changes_of_a_crop_do_not_depend_on_those_of_the_sensor() -> None:
    plain, turned = AugmentSettings(), AugmentSettings(turn=1.0)
    seen, quarter = first(plain), first(turned)
    for one, other in zip(seen.global_crops, quarter.global_crops):
        turns = [torch.allclose(one.rot90(turn, (1, 2)), other, atol=2e-2) for turn in (1, 2, 3)]
        assert sum(turns) == 1
    assert torch.equal(quarter.global_crops, first(turned, workers=2).global_crops)


def test_crops_for_the_anchor_are_turned_alike() -> None:
    still = dict.fromkeys(("jitter_probability", "grayscale", "blur_global1", "blur_global2", "blur_local"), 0.0)
    batch = first(AugmentSettings(turn=0.75, vflip=0.5, solarize_global2=0.0, **still), clean_size=24)
    assert torch.equal(batch.clean_crops, batch.global_crops)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_stands_between_the_config_and_what_is_given_beside_it(name: str, tmp_path: Path) -> None:
    config = load_config("small", [f"augment.preset={name}", "augment.brightness=0.37", "out=x"])
    assert config.augment == replace(
        load_config("small").augment, **{**PRESETS[name].values, "preset": name, "brightness": 0.37}
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config
    assert set(PRESETS["natural"].values) >= set(PRESETS[name].values)


def test_natural_is_what_is_set_without_a_preset() -> None:
    assert replace(load_config(None, ["augment.preset=natural"]).augment, preset=None) == AugmentSettings()
    with pytest.raises(UserError, match=r"augment\.preset=nature"):
        load_config(None, ["augment.preset=nature"])


def test_a_model_of_some_channels_equals_the_whole_one_where_the_others_are_lost() -> None:
    torch.manual_seed(0)
    model = RegisterViT(image_size=16, patch_size=8, dim=32, depth=2, heads=2, in_channels=4).eval()
    model.preprocessing = {"mean": [0.1, 0.2, 0.3, 0.4], "std": [1, 2, 3, 4], "range": [0, 1, 0, 2, 0, 3, 0, 4]}
    images = torch.randn(3, 4, 16, 16)
    some = select_channels(model, [3, 1])
    lost = images.clone()
    lost[:, [0, 2]] = 0
    for own, whole in zip(some(images[:, [3, 1]]), model(lost)):
        torch.testing.assert_close(own, whole)
    assert some.preprocessing == {"mean": [0.4, 0.2], "std": [4, 2], "range": [0, 4, 0, 2]}
    for wrong in ([], [4], [0, 0], [-1]):
        with pytest.raises(UserError, match="expected some of 0 to 3, each once"):
            select_channels(model, wrong)


def test_a_run_with_every_change_learns_and_says_its_preset(tmp_path: Path) -> None:
    out = pretrain(tiny_config(tmp_path / "run", steps=3, augment__preset="microscopy", augment__stain=0.1))
    assert all(np.isfinite(line["loss"]) for line in read_lines(out / "metrics.jsonl"))
    assert f"augment.preset=microscopy: {PRESETS['microscopy'].why}" in (out / "train.log").read_text()
