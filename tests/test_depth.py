"""Linear depth: the head, the crops it learns from, and whether it finds depth that a picture shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dinoreg.config.bundled import bundled
from dinoreg.data.source import Source
from dinoreg.evaluation.backbones.encoder import Encoder, PixelEncoder, wrap
from dinoreg.evaluation.benchmark import Task, load_benchmark
from dinoreg.evaluation.context import Context
from dinoreg.evaluation.data import Data, DepthMaps
from dinoreg.evaluation.dense import depth_images
from dinoreg.evaluation.dense.depth_images import crop_size, read_pair, seen_size, training_crop
from dinoreg.evaluation.options import DepthOptions, EvalOptions
from dinoreg.evaluation.protocols.depth import DepthHead, DepthHeads, evaluate, head_blocks
from dinoreg.evaluation.protocols.measurement import Measurement
from dinoreg.models.vit import RegisterViT, Tokens
from dinoreg.runtime.errors import RunError, UserError
from tests.miniatures import nyu

TASK = load_benchmark(bundled("eval") / "nyu.py").tasks[0]
FAST = DepthOptions(steps=40, batch_size=6, lrs=(1e-2,), num_bins=64)


class Pixels(Source):
    """Arrays in memory."""

    def __init__(self, images: Sequence[np.ndarray]) -> None:
        self.images = list(images)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> np.ndarray:
        return self.images[index]

    def name(self, index: int) -> str:
        return f"picture {index}"

    def fingerprint(self) -> str:
        return "0" * 16


def _vit(patch_size: int = 7) -> Encoder:
    torch.manual_seed(0)
    return wrap(RegisterViT(image_size=28, patch_size=patch_size, dim=24, depth=2, heads=2, num_registers=2))


def _context(folder: Path, **options: Any) -> Context:
    return Context(folder / "features", folder / "state", None, 0, 28, 16, 0, **options)


def _maps(images: Sequence[np.ndarray], depths: Sequence[np.ndarray]) -> DepthMaps:
    return DepthMaps(Pixels(images), lambda index: depths[index])


def _planted(folder: Path, layout: str = "labelled", shuffled: bool = False) -> Data:
    found = nyu.write(folder, per_class=4, layout=layout, shuffled=shuffled)
    return TASK.read(found, {"layout": "auto", "depths": "raw"})


def test_four_blocks_are_the_published_ones_and_evenly_spaced_elsewhere() -> None:
    assert [block + 1 for block in head_blocks(4, 12)] == [3, 6, 9, 12]
    assert [block + 1 for block in head_blocks(4, 24)] == [5, 12, 18, 24]
    assert [block + 1 for block in head_blocks(4, 40)] == [10, 20, 30, 40]
    assert head_blocks(4, 8) == (1, 3, 5, 7)
    assert head_blocks(4, 2) == (0, 1)
    assert head_blocks(4, 1) == head_blocks(1, 1) == (0,)
    assert head_blocks(1, 24) == (23,)


def test_head_equals_its_published_form() -> None:
    torch.manual_seed(0)
    widths = [(5, 3), (4, 4)]
    head = DepthHead(widths, num_bins=7, min_depth=0.001, max_depth=10.0)
    tokens = [Tokens(torch.randn(2, c), torch.randn(2, 1, p), torch.randn(2, 6, p)) for p, c in widths]
    maps = []
    for each in tokens:
        patches = each.patches.mT.reshape(2, -1, 2, 3)
        beside = torch.cat([patches, each.cls[:, :, None, None].expand(-1, -1, 2, 3)], dim=1)
        maps.append(F.interpolate(beside, scale_factor=4, mode="bilinear", align_corners=False))
    scores = F.conv2d(torch.cat(maps, dim=1), head.project.weight[:, :, None, None], head.project.bias)
    shares = torch.relu(scores) + 0.1
    shares = shares / shares.sum(dim=1, keepdim=True)
    centres = torch.linspace(0.001, 10.0, 7)
    expected = torch.zeros(2, 8, 12)
    for k in range(7):
        expected += shares[:, k] * centres[k]
    torch.testing.assert_close(head(tokens, (2, 3)), expected)


def test_a_crop_and_its_depth_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depth_images, "PROBABILITY", 1.0)
    for name in ("GAMMA", "BRIGHTNESS", "COLOUR"):
        monkeypatch.setattr(depth_images, name, (1.0, 1.0))
    y, x = np.mgrid[0:60, 0:90]
    code = 20 + 2 * x + 0.5 * y  # brightness tells the place
    image = Image.fromarray(np.repeat(code[..., None], 3, axis=2).astype(np.uint8))
    depth = code.astype(np.float32)
    places = set()
    for seed in range(8):
        rng = np.random.default_rng(seed)
        pixels, metres = training_crop(image, depth, (40, 52), ((0, 60, 0, 90), (60, 90)), rng)
        assert pixels.shape == (40, 52, 3)
        assert metres.shape == (40, 52)
        known = metres > 0
        assert known.mean() > 0.9
        shown = pixels[..., 0] * 255
        inside = known & (shown > 15)  # rotation fades into its black corners
        assert abs(shown - metres)[inside].max() < 2.6  # half a pixel, and the rounding of the brightness
        assert metres[20, 40] < metres[20, 10]  # mirrored
        places.add(float(metres[20, 20]))
    assert len(places) > 4


def test_colours_change_but_not_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(np.full((20, 30, 3), 128, dtype=np.uint8))
    depth = np.full((20, 30), 3.0, dtype=np.float32)
    shown = set()
    for seed in range(20):
        pixels, metres = training_crop(image, depth, (8, 8), None, np.random.default_rng(seed))
        shown.add(round(float(pixels[4, 4, 0]), 4))
        assert set(np.unique(metres)) <= {0.0, 3.0}
        assert 0 <= pixels.min() <= pixels.max() <= 1
    assert len(shown) > 5
    assert round(128 / 255, 4) in shown  # half are left alone


@pytest.mark.parametrize(
    ("height", "width", "border", "expected"),
    [
        (480, 640, ((45, 472, 43, 608), (480, 640)), (416, 544)),
        (480, 640, None, (416, 544)),
        (208, 640, None, (208, 272)),
        (960, 1280, None, (416, 544)),  # shrunk to 640 first
        (48, 64, ((45, 472, 43, 608), (480, 640)), (43, 56)),
    ],
)
def test_crops_are_416_by_544_or_less_in_proportion(
    height: int, width: int, border: Any, expected: tuple[int, int]
) -> None:
    split = _maps([np.zeros((height, width, 3), dtype=np.uint8)] * 2, [])
    assert crop_size(split, border, 640) == expected


def test_small_images_are_enlarged_where_the_options_say_so_and_never_beyond_the_long_side() -> None:
    assert seen_size(56, 112, 640) == (56, 112)
    assert seen_size(56, 112, 640, 224) == (224, 448)
    assert seen_size(56, 112, 300, 224) == (150, 300)
    split = _maps([np.zeros((56, 112, 3), dtype=np.uint8)], [])
    assert crop_size(split, None, 640, 224) == (224, 292)


def test_an_image_smaller_than_the_crop_is_filled_up_with_unknown_depth() -> None:
    image = Image.fromarray(np.full((10, 12, 3), 200, dtype=np.uint8))
    pixels, metres = training_crop(image, np.full((10, 12), 2.0, "f4"), (16, 20), None, np.random.default_rng(3))
    assert pixels.shape == (16, 20, 3)
    assert (metres[10:] == 0).all()
    assert (metres[:, 12:] == 0).all()
    assert (metres[2:8, 2:10] == 2).all()


def _untrained(encoder: Encoder, height: int, width: int, **options: Any) -> DepthHeads:
    heads = DepthHeads(encoder, dataclasses.replace(FAST, **options), 0)
    heads._build(height, width)
    for head in heads.heads.values():
        torch.nn.init.normal_(head.project.weight)
    return heads


def test_the_prediction_on_a_mirrored_image_is_the_mirrored_prediction() -> None:
    heads = _untrained(_vit(), 28, 42)
    images = torch.randint(0, 256, (2, 3, 28, 42), dtype=torch.uint8)
    straight = heads.predict(images, [*heads.heads], ["a", "b"])
    mirrored = heads.predict(images.flip(-1), [*heads.heads], ["a", "b"])
    for key in heads.heads:
        assert straight[key].shape == (2, 28, 42)
        assert float(straight[key].std()) > 1e-3
        torch.testing.assert_close(mirrored[key].flip(-1), straight[key])


def test_padding_is_put_around_an_image_and_cut_off_again() -> None:
    encoder = _vit()
    heads = _untrained(encoder, 25, 38, variants=(1,))
    key = (1, 1e-2)
    image = torch.randint(0, 256, (1, 3, 25, 38), dtype=torch.uint8)
    expected = torch.zeros(1, 25, 38)
    for flipped in (image, image.flip(-1)):
        mean = torch.tensor(encoder.preprocessing.mean).view(1, 3, 1, 1)
        padded = mean.expand(1, 3, 28, 42).clone()
        padded[:, :, 1:26, 2:40] = flipped / 255  # 3 missing rows: 1 above, 2 below; 4 missing columns: 2 and 2
        tokens = encoder.layers(padded, (1,), norm=False)
        maps = F.interpolate(heads.heads[key](tokens, (4, 6))[:, None], size=(28, 42), mode="bilinear")[:, 0]
        cut = maps[:, 1:26, 2:40]
        expected += (cut.flip(-1) if flipped is not image else cut) / 2
    torch.testing.assert_close(heads.predict(image, [key], ["a"])[key], expected)


def test_predictions_are_clamped_and_of_the_depth_maps_size() -> None:
    heads = _untrained(_vit(), 28, 28, variants=(1,), max_size=28)
    head = heads.heads[1, 1e-2]
    head.bins.mul_(5)  # most of it beyond the largest depth
    images = [np.random.default_rng(i).integers(0, 256, (56, 40, 3), dtype=np.uint8) for i in range(3)]
    split = _maps([*images, images[0][:28, :28]], [np.ones((56, 40), "f4")] * 3 + [np.ones((28, 28), "f4")])
    found = list(heads.predictions(split, _context(Path("unused"))))
    assert [index for index, _, _ in found] == [0, 1, 2, 3]
    for _, true, predicted in found:
        assert predicted[1, 1e-2].shape == true.shape
        assert predicted[1, 1e-2].max() <= 10.0


def _evaluate(encoder: Encoder, data: Data, folder: Path, depth: DepthOptions = FAST, **context: Any) -> list[Any]:
    with torch.random.fork_rng():
        return evaluate(Measurement(encoder, data, TASK, EvalOptions(depth=depth), _context(folder, **context)))


@pytest.mark.parametrize("layout", ["labelled", "sync"])
def test_depth_that_colours_show_is_found(tmp_path: Path, layout: str) -> None:
    data = _planted(tmp_path, layout)
    context = _context(tmp_path)
    context.examples = tmp_path / "examples"
    context.num_examples = 3
    rows = evaluate(Measurement(_vit(), data, TASK, EvalOptions(depth=FAST), context))
    assert [row.variant.split(",")[0] for row in rows] == ["lin.1", "lin.4"]
    for row in rows:
        baseline = row.details["baselines"]["mean training depth"]
        assert row.value < 0.5 * baseline["rmse"]
        assert row.details["abs_rel"] < 0.5 * baseline["abs_rel"]
        assert row.details["delta1"] > baseline["delta1"] + 0.2
        assert row.low < row.value < row.high
        assert (row.unit, row.higher_is_better, row.metric) == ("m", False, "RMSE")
        assert (row.n_train, row.n_test, row.chosen_on) == (12, 4, "")
        assert row.settings["crop"] == (43, 56)
    assert rows[0].settings["blocks"] == [2]
    assert rows[1].settings["blocks"] == [1, 2]
    pictures = sorted(context.examples.iterdir())
    assert [picture.name for picture in pictures] == ["depth_00.png", "depth_01.png", "depth_02.png"]
    assert Image.open(pictures[0]).size == (896, 240)


def test_raw_pixels_find_it_too(tmp_path: Path) -> None:
    rows = _evaluate(PixelEncoder(7, (28, 28)), _planted(tmp_path), tmp_path, dataclasses.replace(FAST, lrs=(1e-3,)))
    assert rows[0].value < 0.5 * rows[0].details["baselines"]["mean training depth"]["rmse"]
    assert rows[0].value == rows[1].value  # one block is all there is


def test_shuffled_depth_is_not_found(tmp_path: Path) -> None:
    rows = _evaluate(_vit(), _planted(tmp_path, shuffled=True), tmp_path)
    for row in rows:
        assert row.value > 0.9 * row.details["baselines"]["mean training depth"]["rmse"]


def test_baseline_is_the_mean_of_the_training_pixels(tmp_path: Path) -> None:
    images = [np.zeros((30, 40, 3), dtype=np.uint8)] * 3
    depths = [np.full((30, 40), value, dtype=np.float32) for value in (2.0, 4.0, 5.0)]
    depths[0][:, :20] = 0  # half as many pixels
    test = [np.full((30, 40), value, dtype=np.float32) for value in (3.0, 8.0)]
    data = Data({"train": _maps(images, depths), "test": _maps(images[:2], test)})
    row = _evaluate(_vit(), data, tmp_path, dataclasses.replace(FAST, steps=1, variants=(1,)))[0]
    mean = (2.0 * 0.5 + 4.0 + 5.0) / 2.5
    assert row.details["mean_training_depth"] == pytest.approx(mean)
    expected = (abs(mean - 3) + abs(mean - 8)) / 2
    assert row.details["baselines"]["mean training depth"]["rmse"] == pytest.approx(expected)
    assert row.variant == "lin.1"
    assert row.settings["eval_crop"] == "the whole image"


def test_only_pixels_inside_the_evaluation_crop_count(tmp_path: Path) -> None:
    images = [np.zeros((40, 60, 3), dtype=np.uint8)] * 2
    truth = np.full((40, 60), 9.5, dtype=np.float32)
    truth[10:30, 15:45] = 3.0
    flat = np.full((40, 60), 4.0, dtype=np.float32)
    splits = {"train": _maps(images, [flat] * 2), "test": _maps(images, [truth] * 2)}
    data = Data(splits, extra={"eigen_crop": ((20, 60, 30, 90), (80, 120))})
    row = _evaluate(_vit(), data, tmp_path, dataclasses.replace(FAST, steps=1, variants=(1,)))[0]
    assert row.details["baselines"]["mean training depth"]["rmse"] == pytest.approx(1.0)
    # An untrained head says about five metres: 2 m off inside, 4.5 m off in the three quarters outside.
    assert row.value < 2.5
    assert row.settings["eval_crop"] == (20, 60, 30, 90)


def test_of_several_rates_the_best_is_quoted_and_where_it_was_chosen_is_said(tmp_path: Path) -> None:
    data = _planted(tmp_path)
    options = dataclasses.replace(FAST, steps=20, variants=(1,), lrs=(1e-6, 1e-2))
    row = _evaluate(_vit(), data, tmp_path / "a", options)[0]
    assert row.settings["lr"] == 1e-2
    assert row.chosen_on == "the reported split itself"
    assert row.details["rmse_by_lr"]["0.01"] == row.value < row.details["rmse_by_lr"]["1e-06"]
    # A validation split on which the prediction of an untrained head is right: about five metres everywhere.
    images = [data.splits["test"].source.read(index) for index in range(2)]
    flat = [np.full((48, 64), 5.0, dtype=np.float32)] * 2
    splits = {**data.splits, "val": _maps(images, flat)}
    row = _evaluate(_vit(), dataclasses.replace(data, splits=splits), tmp_path / "b", options)[0]
    assert row.settings["lr"] == 1e-6
    assert row.chosen_on == "the official validation split"


def test_the_same_seed_gives_the_same_figures_also_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = _planted(tmp_path)
    options = dataclasses.replace(FAST, steps=12)
    values = [row.value for row in _evaluate(_vit(), data, tmp_path / "a", options)]

    def stops(items: Iterable[Any], total: int, what: str) -> Iterator[Any]:
        for done, item in enumerate(items):
            if what.startswith("depth (shorter") and done == 7:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr("dinoreg.evaluation.context.SAVE_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        _evaluate(_vit(), data, tmp_path / "b", options, progress=stops)
    assert list((tmp_path / "b" / "state").glob("depth*"))
    assert [row.value for row in _evaluate(_vit(), data, tmp_path / "b", options)] == values


def test_data_without_depth_are_refused(tmp_path: Path) -> None:
    image = np.zeros((30, 40, 3), dtype=np.uint8)
    with pytest.raises(UserError, match="linear depth needs a test split of images with depth maps"):
        _evaluate(_vit(), Data({"train": _maps([image], [np.ones((30, 40), "f4")])}), tmp_path)


def test_a_depth_map_of_another_size_names_its_image() -> None:
    split = _maps([np.zeros((30, 40, 3), dtype=np.uint8)], [np.ones((40, 30), dtype=np.float32)])
    with pytest.raises(UserError, match="picture 0: its depth map is 40 x 30 pixels, the image 30 x 40"):
        read_pair(split, 0)


def test_depths_that_are_not_finite_or_negative_are_unknown() -> None:
    depth = np.array([[np.nan, np.inf, -1.0], [-np.inf, 0.0, 2.5]], dtype=np.float32)
    _, found = read_pair(_maps([np.zeros((2, 3, 3), dtype=np.uint8)], [depth]), 0)
    np.testing.assert_array_equal(found, [[0, 0, 0], [0, 0, 2.5]])


@pytest.mark.parametrize("empty", ["train", "test"])
def test_depth_that_is_nowhere_known_ends_the_run(tmp_path: Path, empty: str) -> None:
    image = np.zeros((30, 40, 3), dtype=np.uint8)
    known, unknown = np.ones((30, 40), "f4"), np.zeros((30, 40), "f4")
    splits = {name: _maps([image] * 2, [unknown if name == empty else known] * 2) for name in ("train", "test")}
    with pytest.raises(RunError, match=f"linear depth: no {empty}.* image has a pixel between 0.001 and 10 m"):
        _evaluate(_vit(), Data(splits), tmp_path, dataclasses.replace(FAST, steps=1))


def test_an_image_without_known_depth_is_left_out_and_counted(tmp_path: Path) -> None:
    images = [np.zeros((30, 40, 3), dtype=np.uint8)] * 3
    depths = [np.full((30, 40), value, "f4") for value in (2.0, 0.0, 3.0)]
    data = Data({"train": _maps(images, depths), "test": _maps(images, depths)})
    row = _evaluate(_vit(), data, tmp_path, dataclasses.replace(FAST, steps=1))[0]
    assert row.n_test == 2
    assert row.details["images_without_depth"] == 1


def test_the_largest_depth_is_mean_count_and_what_lies_beyond_is_not(tmp_path: Path) -> None:
    images, options = [np.zeros((30, 40, 3), dtype=np.uint8)] * 2, dataclasses.replace(FAST, steps=1, variants=(1,))
    losses = []
    for value in (10.0, 10.01):
        split = _maps(images, [np.full((30, 40), value, dtype=np.float32)] * 2)
        ended = DepthHeads(_vit(), options, 0).fit(split, (28, 36), None, _context(tmp_path / str(value)))
        losses.append(ended[1, 1e-2])
    assert losses[0] > 0
    assert losses[1] == 0


class Broken(PixelEncoder):
    """Its features of bright images are not finite."""

    def _layers(self, x: Tensor, blocks: Sequence[int], norm: bool) -> list[Tokens]:
        found = super()._layers(x, blocks, norm)
        bad = (x.flatten(1).amax(dim=1) > 1.5)[:, None, None]
        return [Tokens(each.cls, each.registers, each.patches.masked_fill(bad, torch.nan)) for each in found]


def test_an_image_whose_feature_is_not_finite_is_named(tmp_path: Path) -> None:
    dark, bright = np.full((30, 40, 3), 60, dtype=np.uint8), np.full((30, 40, 3), 250, dtype=np.uint8)
    depths = [np.full((30, 40), 2.0, "f4")] * 3
    data = Data({"train": _maps([dark] * 3, depths), "test": _maps([dark, dark, bright], depths)})
    with pytest.raises(RunError, match="picture 2"):
        _evaluate(Broken(7, (28, 28)), data, tmp_path, dataclasses.replace(FAST, steps=1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"variants": ()}, "depth.variants"),
        ({"variants": (0,)}, "depth.variants"),
        ({"lrs": (0.0,)}, "depth.lrs"),
        ({"steps": 0}, "depth.steps=0: expected at least 1"),
        ({"num_bins": 1}, "depth.num_bins=1"),
        ({"min_depth": 11.0}, "depth.min_depth=11: expected less than depth.max_depth=10"),
        ({"max_size": 0}, "depth.max_size=0"),
    ],
)
def test_options_outside_their_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DepthOptions(**values)


def test_the_task_is_declared_as_depth() -> None:
    assert isinstance(TASK, Task)
    assert (TASK.protocol, TASK.metric) == ("depth", "RMSE")
