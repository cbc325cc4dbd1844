"""P7: object discovery on pictures with planted objects, and what surrounds the number."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dinoreg.evaluation.backbones.encoder import PixelEncoder, wrap
from dinoreg.evaluation.benchmark import Task
from dinoreg.evaluation.data import Boxed, Data
from dinoreg.evaluation.dense.windows import pad_to_patches
from dinoreg.evaluation.metrics.bootstrap import bootstrap_interval
from dinoreg.evaluation.options import DiscoveryOptions, EvalOptions
from dinoreg.evaluation.protocols import discovery
from dinoreg.evaluation.protocols.discovery import correct, crosswise, evaluate, features_of
from dinoreg.evaluation.protocols.measurement import Measurement
from dinoreg.evaluation.result import Row
from dinoreg.models.vit import RegisterViT
from dinoreg.runtime.errors import RunError, UserError
from tests.box_pictures import Pictures, bright_on_dark, context, split_of

TASK = Task("discovery", lambda folder, options: Data({}), "CorLoc")
PIXELS = PixelEncoder(8, (32, 32))


def vit(registers: int = 4, patch: int = 8) -> Any:
    torch.manual_seed(0)
    return wrap(RegisterViT(image_size=4 * patch, patch_size=patch, dim=32, depth=3, heads=4, num_registers=registers))


def run(split: Boxed, folder: Path, encoder: Any = PIXELS, examples: bool = False, **options: Any) -> list[Row]:
    return evaluate(
        Measurement(
            encoder,
            Data({"test": split}),
            TASK,
            EvalOptions(discovery=DiscoveryOptions(**options)),
            context(folder, examples),
        )
    )


def test_planted_objects_are_found_at_the_images_own_size_and_boxes_end_with_the_image(tmp_path: Path) -> None:
    split = bright_on_dark(12, seed=0)
    headline, whole = run(split, tmp_path)
    assert headline.metric == "CorLoc"
    assert headline.value == 1.0
    assert headline.chosen_on == ""
    assert headline.n_test == 12
    again = Measurement(PIXELS, Data({"test": split}), TASK, EvalOptions(), context(tmp_path / "again"))
    found = discovery._find(again, split, DiscoveryOptions(blocks=(0,)))
    np.testing.assert_array_equal(found[0, :, :4], np.concatenate(list(split.boxes)))
    # Some objects reach into a patch that the picture cuts off.
    assert any(box[0][2] % 8 or box[0][3] % 8 for box in split.boxes)
    assert whole.variant == "whole-image box"
    assert whole.value == headline.details["whole-image box"] < 0.5
    assert headline.details["box is the whole image"] == 0.0


def test_shuffled_boxes_are_found_by_chance_only(tmp_path: Path) -> None:
    split = bright_on_dark(24, seed=0)
    mixed = np.random.default_rng(1).permutation(24)
    moved = dataclasses.replace(split, boxes=[split.boxes[each] for each in mixed])
    assert run(moved, tmp_path)[0].value < 0.4


def test_all_positive_similarities_give_the_whole_image_and_the_details_say_so(tmp_path: Path) -> None:
    pixels = [np.full((20, 30, 3), 200, dtype=np.uint8) for _ in range(3)]
    boxes = [[(0, 0, 30, 18)], [(0, 0, 10, 10)], [(2, 2, 29, 20)]]
    encoder = PixelEncoder(10, (30, 30))  # no padding, whose patches would be like nothing
    row, whole = run(split_of(pixels, boxes, [[0]] * 3, 1), tmp_path, encoder)
    assert row.value == whole.value == pytest.approx(2 / 3)
    assert row.details["box is the whole image"] == 1.0
    expected = bootstrap_interval([1, 0, 1])
    assert (row.low, row.high) == (expected.low, expected.high)


class Shared(PixelEncoder):
    """Features that all have one large direction in common, as those of some models do: products grow by 1000."""

    def _qkv(self, x: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super()._qkv(x, block)
        return q, torch.cat([k, k.new_full((*k.shape[:2], 1), 1000**0.5)], dim=2), v


def test_a_sweep_quotes_the_best_says_where_it_was_chosen_and_shows_all(tmp_path: Path) -> None:
    split, encoder = bright_on_dark(10, seed=3), Shared(8, (32, 32))
    plain = run(split, tmp_path / "plain", encoder)[0]
    assert plain.details["box is the whole image"] == 1.0
    row, whole = run(split, tmp_path / "swept", encoder, biases=(0.0, -1000.0, -1e6))
    assert row.value == 1.0 > plain.value
    assert row.value == max(each["CorLoc"] for each in row.details["sweep"])
    assert [each["bias"] for each in row.details["sweep"]] == [0.0, -1000.0, -1e6]
    assert row.details["sweep"][0]["CorLoc"] == plain.value
    assert row.settings["bias"] == -1000.0
    assert row.settings["block"] == 0
    assert row.chosen_on == "the reported split itself"
    assert whole.chosen_on == ""
    assert row.variant == "keys, best of 1 x 3 blocks x biases"
    assert 0 <= row.details["chosen on one half of the images, scored on the other"] <= row.value


def test_every_block_is_tried_and_raw_pixels_have_only_one(tmp_path: Path) -> None:
    split = bright_on_dark(4, seed=1)
    options = {"blocks": (-1, 2, 0), "biases": (0.0, -0.1), "normalise": True}
    model = run(split, tmp_path / "model", vit(), **options)[0]
    assert [(each["block"], each["bias"]) for each in model.details["sweep"]] == [
        (2, 0.0),
        (2, -0.1),
        (0, 0.0),
        (0, -0.1),
    ]
    pixels = run(split, tmp_path / "pixels", **options)[0]
    assert [each["block"] for each in pixels.details["sweep"]] == [0, 0]
    assert pixels.key == model.key  # comparable
    with pytest.raises(UserError, match="block 3 is out of range"):
        run(split, tmp_path / "none", vit(), blocks=(3,))


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("feature", ["query", "key", "value", "token"])
def test_features_are_those_of_the_patches_without_class_token_and_registers(registers: int, feature: str) -> None:
    encoder = vit(registers)
    image = torch.rand(3, 24, 40, generator=torch.Generator().manual_seed(0))
    found = features_of(encoder, image, [0, 2], feature)
    assert [each.shape for each in found] == [(15, 32), (15, 32)]
    x = (image - torch.tensor(encoder.preprocessing.mean)[:, None, None]) / torch.tensor(encoder.preprocessing.std)[
        :, None, None
    ]
    for block, features in zip((0, 2), found):
        if feature == "token":
            expected = encoder.module.intermediate_tokens(x[None], [block], True)[0].patches[0]
        else:
            part = ("query", "key", "value").index(feature)
            expected = encoder.module.qkv(x[None], block)[part][0].transpose(0, 1).flatten(1)[1 + registers :]
        torch.testing.assert_close(features, expected)


def test_padding_equals_zeros_after_normalisation() -> None:
    encoder = vit()
    pixels = np.random.default_rng(0).integers(0, 256, (21, 35, 3), dtype=np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    normalised = (image - torch.tensor(encoder.preprocessing.mean)[:, None, None]) / torch.tensor(
        encoder.preprocessing.std
    )[:, None, None]
    zeros = torch.zeros(3, 24, 40)
    zeros[:, :21, :35] = normalised
    expected = encoder.module(zeros[None]).patches
    found = encoder.tokens(pad_to_patches(pixels, 8, encoder.preprocessing.mean)[None]).patches
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_corloc_takes_any_box_but_crowds_and_an_image_without_boxes_is_missed(tmp_path: Path) -> None:
    split = bright_on_dark(4, seed=5)
    boxes = list(split.boxes)
    # 0: a second box that is far off; 1: the object is a crowd; 2: difficult; 3: no boxes.
    boxes[0] = np.concatenate([np.array([[0, 0, 3, 3]], np.float32), boxes[0]])
    boxes[3] = boxes[3][:0]
    counts = [len(each) for each in boxes]
    split = dataclasses.replace(
        split,
        boxes=boxes,
        labels=[np.zeros(count, dtype=np.int64) for count in counts],
        crowd=[np.full(count, place == 1) for place, count in enumerate(counts)],
        difficult=[np.full(count, place == 2) for place, count in enumerate(counts)],
    )
    row, _ = run(split, tmp_path)
    assert row.value == 0.5
    assert row.details["images without boxes"] == 2


def test_correct_equals_a_loop_over_all_boxes() -> None:
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 20, (40, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 20, (40, 2))], axis=1)
    truth = []
    for box in boxes:
        moved = box + rng.uniform(-8, 8, (int(rng.integers(0, 4)), 4))
        truth.append(
            np.concatenate([np.minimum(moved[:, :2], moved[:, 2:]), np.maximum(moved[:, :2], moved[:, 2:])], 1)
        )
    expected = []
    for (x0, y0, x1, y1), true in zip(boxes, truth):
        hit = False
        for a0, b0, a1, b1 in true:
            shared = max(min(x1, a1) - max(x0, a0), 0) * max(min(y1, b1) - max(y0, b0), 0)
            hit |= shared / ((x1 - x0) * (y1 - y0) + (a1 - a0) * (b1 - b0) - shared) >= 0.5
        expected.append(hit)
    assert correct(boxes, truth).tolist() == expected
    assert 5 < sum(expected) < 35


def test_crosswise_scores_each_half_by_the_others_choice() -> None:
    # Even images (0, 2) are best by the first setting, odd ones (1, 3) by the second.
    hits = np.array([[1, 0, 1, 0], [0, 1, 0, 1]], dtype=bool)
    assert hits.mean(axis=1).tolist() == [0.5, 0.5]
    assert crosswise(hits) == 0.0
    assert crosswise(np.array([[1, 1, 0, 1], [0, 0, 0, 1]], dtype=bool)) == 0.75


def test_an_interrupted_discovery_goes_on_and_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinoreg.evaluation.context.SAVE_SECONDS", -1.0)
    split = bright_on_dark(9, seed=2)
    options = {"biases": (0.0, -5.0)}
    unbroken = run(split, tmp_path / "a", **options)

    class Stops(Pictures):
        def read(self, index: int) -> np.ndarray:
            if index == 6:
                raise KeyboardInterrupt
            return super().read(index)

    pixels = split.source.pixels  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        run(dataclasses.replace(split, source=Stops(pixels)), tmp_path / "b", **options)
    again = Pictures(pixels)
    resumed = run(dataclasses.replace(split, source=again), tmp_path / "b", **options)
    assert again.reads == [6, 7, 8]
    for one, other in zip(unbroken, resumed, strict=True):
        assert dataclasses.replace(one, hours=0) == dataclasses.replace(other, hours=0)
    # Other settings do not take up what these left.
    fresh = Pictures(pixels)
    run(dataclasses.replace(split, source=fresh), tmp_path / "b", biases=(0.0,))
    assert len(fresh.reads) == 9


def test_pictures_of_findings_are_written(tmp_path: Path) -> None:
    run(bright_on_dark(7, seed=2), tmp_path, vit(), examples=True, blocks=(0, 1))
    files = sorted((tmp_path / "examples").iterdir())
    assert [each.name for each in files] == [f"discovery_{n:02d}.png" for n in range(3)]
    with Image.open(files[0]) as image:
        assert image.width <= 900
        pixels = np.asarray(image).reshape(-1, 3).tolist()
    assert [240, 90, 70] in pixels
    assert [70, 200, 120] in pixels


class Broken(PixelEncoder):
    def _qkv(self, x: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super()._qkv(x, block)
        return q, k * (torch.nan if x.mean() > 0 else 1.0), v


def test_a_feature_that_is_not_finite_names_the_image(tmp_path: Path) -> None:
    pixels = [np.full((16, 16, 3), value, dtype=np.uint8) for value in (10, 20, 250)]
    split = split_of(pixels, [[(0, 0, 4, 4)]] * 3, [[0]] * 3, 1)
    with pytest.raises(RunError, match="picture 2: its feature is not finite"):
        run(split, tmp_path, Broken(8, (16, 16)))


def test_bad_input_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = bright_on_dark(2, seed=0)
    with pytest.raises(UserError, match="metric 'mIoU': object discovery has CorLoc"):
        evaluate(
            Measurement(
                PIXELS,
                Data({"test": split}),
                dataclasses.replace(TASK, metric="mIoU"),
                EvalOptions(),
                context(tmp_path),
            )
        )
    with pytest.raises(UserError, match="test split is missing"):
        evaluate(Measurement(PIXELS, Data({"train": split}), TASK, EvalOptions(), context(tmp_path)))
    monkeypatch.setattr(discovery, "MAX_PATCHES", 5)
    with pytest.raises(UserError, match=r"picture 0: .* pixels are \d+ patches, .* at most 5"):
        run(split, tmp_path)


def test_without_scipy_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(UserError, match=r"pip install 'dinoreg\[eval\]'"):
        run(bright_on_dark(1, seed=0), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature": "keys"}, "discovery.feature=keys"),
        ({"blocks": ()}, "discovery.blocks"),
        ({"biases": ()}, "discovery.biases"),
        ({"k_patches": 0}, "discovery.k_patches=0"),
    ],
)
def test_options_out_of_range_are_named(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DiscoveryOptions(**options)


def test_objects_of_the_voc_miniature_are_found_and_shuffled_ones_are_not(tmp_path: Path) -> None:
    from dinoreg.evaluation.benchmark import find_benchmark
    from tests.miniatures import voc2007

    benchmark = find_benchmark("voc2007")
    task = next(each for each in benchmark.tasks if each.protocol == "discovery")
    options = EvalOptions(discovery=DiscoveryOptions(normalise=True, biases=(0.0, -0.2, -0.4)))
    values = {}
    for shuffled in (False, True):
        root = tmp_path / str(shuffled)
        voc2007.write(root, per_class=2, shuffled=shuffled)
        data = task.read(benchmark.find(root), {})
        row = evaluate(Measurement(vit(patch=14), data, task, options, context(root)))[0]
        assert row.variant.endswith("trainval")
        values[shuffled] = row.value
    assert values[False] > 0.65
    assert values[True] < 0.35
