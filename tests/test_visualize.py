"""Attention maps, patch colours, contact sheets and charts."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

from dinoreg.data.loader import Batch
from dinoreg.evaluation.backbones.encoder import NativeEncoder
from dinoreg.evaluation.backbones.open import Opened
from dinoreg.models.vit import RegisterViT
from dinoreg.reports import html
from dinoreg.reports.html import MAX_POINTS, Chart, Line, _moving_average, _thin, darkened, draw_chart, short
from dinoreg.visualize.attention import attention_maps, attention_sheet
from dinoreg.visualize.crops import TILE, crop_sheet, hide
from dinoreg.visualize.gallery import GAP, LABEL, colour_map, sheet, to_pixels
from dinoreg.visualize.pca import patch_basis, patch_colours, pca_sheet
from dinoreg.visualize.subject import picture_size, read_pictures

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def tiny_model(registers: int = 3) -> RegisterViT:
    torch.manual_seed(0)
    model = RegisterViT(image_size=(24, 32), patch_size=8, dim=12, depth=2, heads=3, num_registers=registers)
    return model.eval()


def test_attention_maps_are_the_rows_of_cls_and_registers_over_the_patches() -> None:
    model, images = tiny_model(), torch.randn(2, 3, 24, 32)
    maps = attention_maps(model, images)
    weights = model.attention(images).detach()  # (B, heads, T, T)
    assert maps.shape == (2, 1 + 3, 3, 4)
    for token in range(4):
        for patch in range(12):
            expected = sum(weights[1, head, token, 4 + patch] for head in range(3)) / 3
            torch.testing.assert_close(maps[1, token, patch // 4, patch % 4], expected)


def test_the_attention_sheet_has_the_image_and_one_map_per_special_token() -> None:
    images = torch.randn(2, 3, 24, 32)
    picture = attention_sheet(tiny_model(registers=5), images, to_pixels(images, MEAN, STD))
    tile_width = 157  # 118 high at 24:32
    assert picture.size == (7 * tile_width + 6 * GAP, LABEL + 2 * 118 + GAP)
    opaque = np.array(picture)[LABEL + 5, :, 3] == 255
    assert np.count_nonzero(np.diff(opaque.astype(int)) == -1) == 6  # gaps between seven tiles


def test_the_brightest_patch_of_a_map_is_its_maximum() -> None:
    values = np.array([[0.0, 0.1], [0.4, 0.2]])
    brightness = colour_map(values).astype(int).sum(axis=2)
    assert np.argsort(brightness, axis=None).tolist() == np.argsort(values, axis=None).tolist()
    assert colour_map(np.zeros((2, 2))).sum() == colour_map(values)[0, 0].astype(int).sum() * 4


def test_the_patch_basis_equals_scikit_learn_up_to_sign() -> None:
    torch.manual_seed(1)
    patches = torch.randn(4, 15, 9) @ torch.diag(torch.linspace(3, 0.5, 9)) + 2
    peer = PCA(3).fit(patches.reshape(-1, 9).double().numpy())
    basis = patch_basis(patches)
    for axis, theirs in zip(basis.axes.T.numpy(), peer.components_):
        np.testing.assert_allclose(axis * np.sign(axis @ theirs), theirs, atol=1e-5)
        assert axis[np.abs(axis).argmax()] > 0
    np.testing.assert_allclose(basis.mean.numpy(), peer.mean_, atol=1e-5)


def test_colours_share_one_basis_so_that_equal_patches_look_equal() -> None:
    torch.manual_seed(2)
    patches = torch.randn(3, 10, 7)
    patches[2, 4] = patches[0, 1]
    colours = patch_colours(patches, patch_basis(patches))
    assert colours.shape == (3, 10, 3)
    assert (colours[2, 4] == colours[0, 1]).all()
    assert colours.min() == 0
    assert colours.max() == 255
    alone = patch_colours(patches[1:2], patch_basis(patches))
    assert (alone[0] == colours[1]).all()


def test_fewer_than_three_directions_still_give_colours() -> None:
    line = torch.linspace(0, 1, 8)[None, :, None] * torch.ones(5)
    colours = patch_colours(line, patch_basis(line))
    assert colours[0, :, 0].tolist() == sorted(colours[0, :, 0].tolist(), reverse=bool(colours[0, 0, 0]))
    assert (patch_colours(torch.ones(1, 4, 2), patch_basis(torch.ones(1, 4, 2))) == 0).all()


def test_the_pca_sheet_shows_every_image_above_its_patches() -> None:
    for count, columns, rows in ((3, 3, 2), (9, 8, 4)):
        images = torch.randn(count, 3, 24, 32)
        picture = pca_sheet(tiny_model(), images, to_pixels(images, MEAN, STD))
        assert picture.size == (columns * 160 + (columns - 1) * GAP, rows * 120 + (rows - 1) * GAP)


def test_pixels_undo_the_normalisation() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 6, 3), dtype=np.uint8)
    scale, shift = (torch.tensor(v)[:, None, None] for v in (STD, MEAN))
    normalised = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - shift) / scale
    assert (to_pixels(normalised, MEAN, STD) == pixels).all()


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_channel_counts_become_a_colour_picture(channels: int) -> None:
    assert to_pixels(torch.zeros(1, channels, 4, 4), (0.5,), (0.5,)).shape == (1, 4, 4, 3)


def test_masked_patches_are_grey_and_the_others_untouched() -> None:
    pixels = np.random.default_rng(1).integers(200, 256, (6, 9, 3), dtype=np.uint8)
    mask = np.array([True, False, False, False, False, True])
    shown = hide(pixels, mask, 3)
    assert (shown[:3, :3] == shown[0, 0]).all()
    assert (shown[3:, 6:] == shown[0, 0]).all()
    assert (shown[3:, :6] == pixels[3:, :6]).all()
    assert (shown[:3, 3:] == pixels[:3, 3:]).all()


def batch(images: int = 3, num_local: int = 2) -> Batch:
    mask = torch.zeros(2 * images, 12, dtype=torch.bool)
    mask[1, 3] = True
    local_crops = torch.randn(num_local * images, 3, 12, 12) if num_local else None
    return Batch(
        global_crops=torch.randn(2 * images, 3, 24, 32),
        local_crops=local_crops,
        mask=mask,
        mask_indices=torch.tensor([15]),
        mask_weights=torch.ones(1),
        hidden=mask.sum(dim=1).numpy(),
        sample_ids=np.arange(images),
        position=images,
        data_time=0.0,
    )


def test_the_crop_sheet_has_two_views_each_whole_and_masked_then_the_local_crops() -> None:
    originals = [Image.new("RGB", (TILE, TILE))] * 2
    picture = crop_sheet(batch(), MEAN, STD, patch_size=8, originals=originals)
    wide = 149  # pixels of a global crop at 24:32
    widths = TILE + 4 * wide + 2 * TILE // 2  # local crops are half as high as global ones
    assert picture.size == (widths + 6 * GAP, LABEL + 2 * TILE + GAP)
    without = crop_sheet(batch(num_local=0), MEAN, STD, patch_size=8)
    assert without.size == (4 * wide + 3 * GAP, LABEL + 3 * TILE + 2 * GAP)


def test_a_sheet_makes_room_for_short_rows() -> None:
    tile = Image.new("RGB", (10, 8), "red")
    assert sheet([[tile, tile, tile], [tile]]).size == (30 + 2 * GAP, 16 + GAP)


def test_pictures_are_a_whole_multiple_of_the_training_size_when_that_is_small() -> None:
    for side, patch, shown in ((48, 8, 144), (224, 14, 224), (518, 14, 518)):  # 18 patches a side, and enough
        model = RegisterViT(image_size=side, patch_size=patch, dim=6, depth=1, heads=1)
        assert picture_size(model) == (shown, shown)


def test_images_are_taken_from_all_over_a_source() -> None:
    subject = Opened(NativeEncoder(tiny_model(), "tiny", {"mean": MEAN, "std": STD}))
    found = read_pictures(subject, "scenes:count=100,size=16", 4, (8, 8))
    assert found.names == ("scenes:12", "scenes:37", "scenes:62", "scenes:87")
    assert found.images.shape == (4, 3, 8, 8)


def test_eight_images_are_shown_or_as_many_as_are_named() -> None:
    subject = Opened(NativeEncoder(tiny_model(), "tiny", {"mean": MEAN, "std": STD}))
    for spec, count in (("scenes:count=20,size=16", 8), ([f"scenes:count=1,size=16,seed={i}" for i in range(11)], 11)):
        assert len(read_pictures(subject, spec, None, (8, 8)).names) == count


def test_a_chart_is_the_same_svg_every_time_and_needs_nothing_from_outside() -> None:
    chart = Chart("Loss", lines=[Line("a", range(40), range(40))], levels={"ln K": 3.0}, smooth=True)
    svg = draw_chart(chart)
    assert svg == draw_chart(chart)
    assert darkened(svg) != svg
    assert len(darkened(svg)) == len(svg)
    assert b"ln K" in svg
    assert b'xlink:href="http' not in svg


@pytest.mark.parametrize(
    "line",
    [Line("one", [5], [1.0]), Line("zero", [1, 2, 3], [0.0, 0.0, 0.0]), Line("level", range(50), [2.0] * 50)],
)
def test_charts_of_few_zero_or_equal_values_are_drawn(line: Line) -> None:
    for log in (False, True):
        assert draw_chart(Chart("c", lines=[line], log=log)).startswith(b"<?xml")


@pytest.mark.parametrize("values", [[29.0, 30.0, 31.0], [0.0, 0.0, 0.0], [5.0, 5.0, 5.0]])
def test_no_marker_is_cut_by_the_frame_of_a_chart_from_zero(values: list[float]) -> None:
    svg = ElementTree.fromstring(
        draw_chart(Chart("c", lines=[Line("a", [1, 2, 3], values)], marker=True, from_zero=True))
    )
    tag = "{http://www.w3.org/2000/svg}"
    (clip,) = svg.findall(f".//{tag}clipPath/{tag}rect")
    # Those of the curve are filled; the others are ticks.
    marked = [float(use.get("y", 0)) for use in svg.iter(f"{tag}use") if "fill: #3b7dd8" in use.get("style", "")]
    assert len(marked) == 3
    assert min(marked) > float(clip.get("y", 0)) + 2.5  # the radius and half the line


def test_names_in_a_legend_may_hold_anything() -> None:
    names = ("$\\frac{1", "_hidden", "<b>&", "tab\x00\there", "long " * 20)
    svg = draw_chart(Chart("c", lines=[Line(name, [1, 2], [1.0, 2.0]) for name in names]))
    text = "".join(ElementTree.fromstring(svg).itertext())
    assert all(shown in text for shown in ("$\\frac{1", "_hidden", "<b>&", "tabhere", "long long"))


def test_a_picture_that_is_too_long_for_webp_is_shown_all_the_same(tmp_path: Path) -> None:
    for height, kind in ((16_383, "webp"), (16_384, "png")):
        Image.new("RGBA", (3, height), "red").save(tmp_path / "long.png")
        shown = html.picture(tmp_path / "long.png", "long")
        assert shown is not None
        assert shown.source.startswith(f"data:image/{kind};")
        assert shown.width == 3


def test_long_curves_are_thinned_to_averages() -> None:
    x, y = _thin(np.arange(10_000.0), np.ones(10_000))
    assert len(x) == len(y) == MAX_POINTS
    assert (y == 1).all()
    assert (np.diff(x) > 0).all()


def test_the_moving_average_equals_its_literal_form() -> None:
    y = np.random.default_rng(0).random(20)
    literal = [y[max(0, i - 3) : i + 4].mean() for i in range(20)]
    np.testing.assert_allclose(_moving_average(y, 3), literal)


def test_steps_are_written_short() -> None:
    assert [short(v) for v in (0, 950, 12_500, 3_000_000)] == ["0", "950", "12.5k", "3M"]
