"""Optical flow by matching: the arithmetic against literal loops, planted motion, interruption, bad input."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dinoreg.evaluation.backbones.encoder import Encoder, PixelEncoder
from dinoreg.evaluation.benchmark import Task, load_benchmark
from dinoreg.evaluation.data import Data, FlowPairs
from dinoreg.evaluation.dense import flow_matching
from dinoreg.evaluation.dense.flow_matching import Geometry, Projection, Truth, figures, match, tally
from dinoreg.evaluation.dense.pictures import draw_flow
from dinoreg.evaluation.features import cache as feature_rows
from dinoreg.evaluation.options import EvalOptions, FlowOptions
from dinoreg.evaluation.protocols import flow
from dinoreg.evaluation.protocols.measurement import Measurement
from dinoreg.evaluation.result import Row
from dinoreg.runtime.errors import RunError, UserError
from tests.encoders import context, small_encoder
from tests.miniatures import sintel

BENCHMARK = load_benchmark(Path(__file__).resolve().parent.parent / "eval" / "sintel.py")
TASK = BENCHMARK.tasks[0]
QUICK = EvalOptions(flow=FlowOptions(steps=20, lr=1e-2, batch_size=1, dim=24))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sintel")
    sintel.write(folder, per_class=3)
    return folder


def read(folder: Path, rendering: str = "clean") -> Data:
    return TASK.read(BENCHMARK.find(folder), {"pass": rendering})


def tiny(patch_size: int = 14) -> Encoder:
    return small_encoder(patch_size=patch_size, image_size=2 * patch_size)


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


# -- the arithmetic --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 1, 2])
def test_soft_argmax_equals_a_literal_loop(window: int) -> None:
    rows, columns, temperature = 4, 5, 0.1
    first, second = unit(20, 3), unit(20, 3)
    expected = torch.zeros(20, 2)
    for i in range(20):
        cosines = [float(first[i] @ second[j]) for j in range(20)]
        best = max(range(20), key=lambda j: cosines[j])
        weights, x, y = 0.0, 0.0, 0.0
        for j in range(20):
            far = max(abs(j // columns - best // columns), abs(j % columns - best % columns))
            if window and far > window:
                continue
            weight = math.exp(cosines[j] / temperature)
            weights, x, y = weights + weight, x + weight * (j % columns), y + weight * (j // columns)
        expected[i] = torch.tensor([x / weights - i % columns, y / weights - i // columns])
    torch.testing.assert_close(match(first, second, (rows, columns), temperature, window), expected)


def test_blocks_of_rows_change_neither_flow_nor_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = unit(24, 5), unit(24, 5)
    projection = Projection(5, 3, 0.1)
    grids: list[tuple[Tensor, list[Tensor]]] = []
    largest: list[int] = []
    softmax = Tensor.softmax
    monkeypatch.setattr(Tensor, "softmax", lambda self, dim: largest.append(self.numel()) or softmax(self, dim=dim))
    for block in (1 << 20, 24 * 7):
        monkeypatch.setattr(flow_matching, "BLOCK", block)
        projection.zero_grad()
        largest.clear()
        found = projection(first, second, (4, 6))
        found.square().sum().backward()
        grids.append((found.detach(), [p.grad.clone() for p in projection.parameters() if p.grad is not None]))
    assert max(largest) == 24 * 7  # never all pairs at once, and every block twice: forwards and backwards
    assert len(largest) == 2 * 4
    torch.testing.assert_close(grids[0][0], grids[1][0])
    assert len(grids[0][1]) == 2
    torch.testing.assert_close(grids[0][1], grids[1][1])


def test_sides_are_rounded_to_whole_patches_as_the_protocol_says() -> None:
    geometry = Geometry((436, 1024), 14)
    assert (geometry.working, geometry.grid) == ((434, 1022), (31, 73))
    geometry = Geometry((436, 1024), 14, upscale=2)
    assert (geometry.working, geometry.grid) == ((868, 2044), (62, 146))
    assert Geometry((5, 40), 14).grid == (1, 3)


def test_flow_in_patches_becomes_pixels_of_the_frame_each_side_by_its_own_scale() -> None:
    geometry = Geometry((30, 52), 14)  # 28 x 56 after the resize
    patches = torch.tensor([1.0, -2.0]).expand(8, 2)
    expected = torch.tensor([14 * 52 / 56, -2 * 14 * 30 / 28]).expand(30, 52, 2)
    torch.testing.assert_close(geometry.to_pixels(patches), expected)
    ramp = torch.zeros(2, 4, 2)
    ramp[..., 0] = torch.arange(4)
    pixels = geometry.to_pixels(ramp.view(8, 2))[..., 0]
    along, down = pixels.diff(dim=1), pixels.diff(dim=0).abs()  # columns stay columns
    assert float(along.min()) > -1e-4
    assert float(along.max()) > 1
    assert float(down.max()) < 1e-4


def test_errors_and_rates_equal_a_literal_loop_over_pixels() -> None:
    rng = np.random.default_rng(0)
    predicted = [rng.normal(scale=3, size=(6, 7, 2)).astype(np.float32) for _ in range(2)]
    true = [rng.normal(scale=3, size=(6, 7, 2)).astype(np.float32) for _ in range(2)]
    valid, occluded = rng.random((2, 6, 7)) < 0.7, rng.random((2, 6, 7)) < 0.4
    true[0][~valid[0]] = 1e10  # what is invalid may hold anything
    true[1][~valid[1]] = np.nan
    errors: dict[str, list[float]] = {"all": [], "matched": [], "unmatched": []}
    for n in range(2):
        for y in range(6):
            for x in range(7):
                if valid[n, y, x]:
                    error = math.dist(predicted[n][y, x].tolist(), true[n][y, x].tolist())
                    errors["all"].append(error)
                    errors["unmatched" if occluded[n, y, x] else "matched"].append(error)
    truths = [Truth(*(torch.from_numpy(part[n]) for part in (true, valid, occluded))) for n in range(2)]
    found = figures(torch.stack([tally(torch.from_numpy(predicted[n]), truths[n]) for n in range(2)]))
    for part, values in errors.items():
        assert found[part] == pytest.approx(sum(values) / len(values))
    for rate in (1, 3, 5):
        assert found[f"within {rate} px"] == sum(error <= rate for error in errors["all"]) / len(errors["all"])


def test_figures_of_nothing_are_nan_and_not_zero() -> None:
    truth = Truth(torch.ones(2, 3, 2), torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool))
    found = figures(tally(torch.zeros(2), truth)[None])
    assert found["all"] == found["matched"] == pytest.approx(math.sqrt(2))
    assert math.isnan(found["unmatched"])


def test_the_projection_starts_as_the_tokens_own_cosines_and_does_not_see_their_length() -> None:
    first, second = unit(12, 6), unit(12, 6)
    projection = Projection(6, 6, 0.2)
    found = projection(first, second, (3, 4))
    torch.testing.assert_close(found, match(first, second, (3, 4), 0.2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(projection(3 * first, 0.5 * second, (3, 4)), found, rtol=1e-4, atol=1e-4)


def test_whole_patches_of_translation_are_found_exactly_by_raw_pixels() -> None:
    canvas = torch.rand(1, 3, 60, 60)
    frames = torch.cat([canvas[..., 8:40, 8:48], canvas[..., 4:36, 0:40]])  # the content moves by (8, 4)
    tokens = F.normalize(PixelEncoder(4, (32, 40)).tokens(frames).patches, dim=-1)
    geometry = Geometry((32, 40), 4)
    found = match(tokens[0], tokens[1], geometry.grid, 0.01, 1) * 4
    inside = found.view(8, 10, 2)[:7, :8]  # what does not leave the frame
    torch.testing.assert_close(inside, torch.tensor([8.0, 4.0]).expand_as(inside), rtol=0, atol=1e-3)


# -- the protocol ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", [tiny(14), PixelEncoder(14, (28, 28))], ids=["vit", "pixels"])
def test_planted_motion_is_found_better_than_no_or_mean_motion(encoder: Encoder, root: Path, tmp_path: Path) -> None:
    rows = flow.evaluate(Measurement(encoder, read(root, "both"), TASK, QUICK, context(tmp_path)))
    assert [row.variant for row in rows] == [
        "linear, clean, temple_2",
        "linear, final, temple_2",
        "zero-shot, clean, temple_2",
        "zero-shot, final, temple_2",
        "zero-shot, clean, all pairs",
        "zero-shot, final, all pairs",
    ]
    assert len({row.key for row in rows}) == len(rows)
    assert [row.n_train for row in rows] == [8, 8, 0, 0, 0, 0]
    assert [row.n_test for row in rows] == [2, 2, 2, 2, 6, 6]
    for row in rows:
        zero, mean = row.details["zero flow"], row.details["mean flow of train"]
        assert zero["all"] == pytest.approx(28)  # everything moves by as much
        assert row.value < 0.9 * min(zero["all"], mean["all"])
        assert row.details["matched"] < 0.3 * zero["matched"]
        assert row.details["unmatched"] > row.details["matched"]
        assert row.low <= row.value <= row.high
        assert (row.unit, row.higher_is_better, row.chosen_on) == ("px", False, "")
    assert set(rows[4].details["scenes"]) == {"alley_1", "market_2", "temple_2"}
    assert rows[4].details["scenes"]["temple_2"] == pytest.approx(rows[2].value)
    assert rows[0].settings["temperature"] != rows[2].settings["temperature"] == 0.05


def test_told_flow_that_has_nothing_to_do_with_the_pictures_leaves_nothing_to_find(tmp_path: Path) -> None:
    sintel.write(tmp_path, per_class=3, shuffled=True)
    rows = flow.evaluate(Measurement(tiny(14), read(tmp_path), TASK, QUICK, context(tmp_path)))
    for row in rows:
        assert row.value > row.details["zero flow"]["all"]
        assert row.details["matched"] > 0.6 * row.details["zero flow"]["matched"]


def test_mean_flow_is_that_of_the_training_scenes_alone(root: Path, tmp_path: Path) -> None:
    data = read(root)
    row = flow.evaluate(Measurement(tiny(14), data, TASK, QUICK, context(tmp_path)))[0]
    train, test = data.splits["train"], data.splits["test"]
    valid = [train.flow(index)[train.valid(index)] for index in range(len(train))]
    mean = np.concatenate(valid).astype(np.float64).mean(axis=0)
    errors = [np.linalg.norm(test.flow(n)[test.valid(n)] - mean, axis=-1) for n in range(len(test))]
    assert row.details["mean flow of train"]["all"] == pytest.approx(np.concatenate(errors).mean(), rel=1e-5)


def test_training_the_projection_lowers_its_error_on_what_it_is_fitted_to(root: Path, tmp_path: Path) -> None:
    data = read(root)
    train = replace(data, splits={"train": data.splits["train"], "test": data.splits["train"]}, extra={})
    values = []
    for steps, lr in ((1, 1e-12), (40, 1e-2)):
        options = EvalOptions(flow=FlowOptions(steps=steps, lr=lr, batch_size=2, dim=24))
        row = flow.evaluate(Measurement(tiny(28), train, TASK, options, context(tmp_path / str(steps))))[0]
        assert row.variant == "linear, temple_2"  # one rendering has no name
        values.append(row.value)
    assert values[1] < 0.97 * values[0]


def test_the_same_seed_gives_the_same_rows_and_a_finer_grid_other_ones(root: Path, tmp_path: Path) -> None:
    data, encoder = read(root), tiny(28)
    options = EvalOptions(flow=replace(QUICK.flow, steps=3))
    rows = [flow.evaluate(Measurement(encoder, data, TASK, options, context(tmp_path / name)))[:2] for name in "ab"]
    assert _numbers(rows[0]) == _numbers(rows[1])
    finer = EvalOptions(flow=replace(options.flow, upscale=2))
    other = flow.evaluate(Measurement(encoder, data, TASK, finer, context(tmp_path / "c")))[0]
    assert (rows[0][0].settings["patches"], other.settings["patches"]) == ([4, 6], [9, 12])
    assert other.value != rows[0][0].value


def test_half_precision_on_disk_changes_little(root: Path, tmp_path: Path) -> None:
    found = []
    for dtype in ("float32", "float16"):
        given = context(tmp_path / dtype)
        given.features_dtype = dtype
        row = flow.evaluate(Measurement(tiny(28), read(root), TASK, QUICK, given))[1]
        assert row.settings["tokens_on_disk"] == dtype
        found.append(row.value)
    assert found[0] != found[1]
    assert found[1] == pytest.approx(found[0], rel=0.01)


def test_an_evaluation_that_was_stopped_anywhere_goes_on_as_if_it_had_not_been(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinoreg.evaluation.context.SAVE_SECONDS", -1.0)
    monkeypatch.setattr(feature_rows, "FLUSH_BYTES", 1)
    data = read(root)
    options = EvalOptions(flow=replace(QUICK.flow, steps=4))
    whole = flow.evaluate(Measurement(tiny(14), data, TASK, options, context(tmp_path / "whole")))
    given = context(tmp_path / "stopped")
    given.batch_size, seen = 1, []
    counted: list[str] = []

    def stops(items: Iterable[Any], total: int, what: str) -> Iterator[Any]:
        """Lets two steps of each kind of work through, then ends everything; the next time two more."""
        seen.append(what)
        for done, item in enumerate(items):
            if done == 2 and what != "mean flow of the training pairs":
                raise KeyboardInterrupt
            counted.append(what)
            yield item

    given.progress = stops
    attempts = 0
    rows: list[Row] = []
    while not rows:
        attempts += 1
        assert attempts < 40
        try:
            rows = flow.evaluate(Measurement(tiny(14), data, TASK, options, given))
        except KeyboardInterrupt:
            continue
    assert attempts > 5
    tokens = [what for what in counted if what.startswith("tokens")]
    assert len(tokens) == 9  # frames in batches of one: none was encoded twice
    assert len([what for what in counted if "linear" in what]) == 4  # steps
    assert _numbers(rows) == _numbers(whole)


def test_the_tokens_on_disk_are_given_back_when_the_rows_are_there(root: Path, tmp_path: Path) -> None:
    given = context(tmp_path)
    flow.evaluate(Measurement(tiny(28), read(root), TASK, EvalOptions(flow=replace(QUICK.flow, steps=1)), given))
    assert not list(given.state.glob("*.npy"))


def test_other_options_take_up_no_state_of_before(root: Path, tmp_path: Path) -> None:
    data, encoder, given = read(root), tiny(28), context(tmp_path)
    options = EvalOptions(flow=replace(QUICK.flow, steps=2))
    cold = EvalOptions(flow=replace(options.flow, temperature=0.5))
    first = flow.evaluate(Measurement(encoder, data, TASK, options, given))
    again = flow.evaluate(Measurement(encoder, data, TASK, cold, given))
    fresh = flow.evaluate(Measurement(encoder, data, TASK, cold, context(tmp_path / "fresh")))
    assert _numbers(again) == _numbers(fresh) != _numbers(first)


def _numbers(rows: list[Row]) -> list[tuple[float, ...]]:
    return [(row.value, row.low, row.high, row.details["within 5 px"]) for row in rows]


# -- pictures --------------------------------------------------------------------------------------------------------


def test_examples_are_strips_of_frame_prediction_and_truth(root: Path, tmp_path: Path) -> None:
    given = context(tmp_path, examples=True)
    given.num_examples = 1
    flow.evaluate(Measurement(tiny(28), read(root), TASK, EvalOptions(flow=replace(QUICK.flow, steps=1)), given))
    assert given.examples is not None
    (path,) = given.examples.iterdir()
    assert path.name == "flow_00.png"
    with Image.open(path) as picture:
        assert 600 < picture.width <= 900
    given.examples = None
    flow.evaluate(Measurement(tiny(28), read(root), TASK, EvalOptions(flow=replace(QUICK.flow, steps=1)), given))
    assert len(list(path.parent.iterdir())) == 1


def test_a_picture_shows_untrusted_truth_in_grey() -> None:
    true = np.full((20, 296, 2), 1e10, dtype=np.float32)
    true[:, :148] = (8, 0)
    valid = np.zeros((20, 296), dtype=bool)
    valid[:, :148] = True
    pixels = np.asarray(draw_flow(Image.new("RGB", (296, 20)), np.zeros((20, 296, 2)), true, valid, "text"))
    assert pixels[5, 2 * 300 + 20].tolist() == [255, 0, 0]
    assert pixels[2, 2 * 300 + 200].tolist() == [70, 74, 82]
    assert pixels[5, 300 + 20].tolist() == [255, 255, 255]


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("upscale", 0),
        ("temperature", 0.0),
        ("window", -1),
        ("dim", 0),
        ("steps", 0),
        ("lr", math.inf),
        ("batch_size", 0),
    ],
)
def test_options_out_of_range_are_named(key: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"flow\.{key}="):
        FlowOptions(**{key: value})  # type: ignore[arg-type]


def test_another_metric_or_a_missing_split_is_refused(root: Path, tmp_path: Path) -> None:
    data, encoder = read(root), tiny(28)
    task = Task(protocol="flow", read=TASK.read, metric="mIoU")
    with pytest.raises(UserError, match="metric 'mIoU': optical flow has EPE"):
        flow.evaluate(Measurement(encoder, data, task, QUICK, context(tmp_path)))
    alone = Data({"test": data.splits["test"]})
    with pytest.raises(UserError, match="the train split is missing"):
        flow.evaluate(Measurement(encoder, alone, TASK, QUICK, context(tmp_path)))
    partly = replace(data, extra={"passes": {"final": {"train": data.splits["train"]}}})
    with pytest.raises(UserError, match="the test split of the final pass is missing"):
        flow.evaluate(Measurement(encoder, partly, TASK, QUICK, context(tmp_path)))


def test_a_frame_of_another_size_and_truth_of_another_size_are_named(tmp_path: Path) -> None:
    sintel.write(tmp_path, per_class=3)
    path = tmp_path / "Sintel" / "training" / "clean" / "market_2" / "frame_0003.png"
    content = path.read_bytes()
    Image.new("RGB", (100, 90)).save(path)
    with pytest.raises(UserError, match=rf"{path}: a frame of 90x100 pixels, expected 126x168"):
        flow.evaluate(Measurement(tiny(28), read(tmp_path), TASK, QUICK, context(tmp_path)))
    path.write_bytes(content)
    data = read(tmp_path)
    test: FlowPairs = data.splits["test"]
    smaller = replace(test, occluded=lambda index: test.occluded(index)[1:])
    wrong = replace(data, splits={**data.splits, "test": smaller}, extra={})
    with pytest.raises(UserError, match=r"temple_2/frame_0001\.png: flow, validity and occlusion are of .*125x168"):
        flow.evaluate(Measurement(tiny(28), wrong, TASK, QUICK, context(tmp_path)))


def test_tokens_that_are_not_finite_name_their_frame(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = tiny(28)
    tokens = encoder.tokens

    def broken(images: Tensor) -> Any:
        found = tokens(images)
        found.patches[1, 0, 0] = torch.nan
        return found

    monkeypatch.setattr(encoder, "tokens", broken)
    given = context(tmp_path)
    given.batch_size = 10_000
    with pytest.raises(RunError, match=r"alley_1/frame_0002\.png: its feature is not finite"):
        flow.evaluate(Measurement(encoder, read(root), TASK, QUICK, given))


def test_too_small_a_disk_is_told_before_anything_is_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_rows.shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    given = context(tmp_path)
    with pytest.raises(RunError, match=r"the tokens of frames need .* GiB and .* are free; features_dtype=float16"):
        flow.evaluate(Measurement(tiny(28), read(root), TASK, QUICK, given))
    assert not list(given.state.glob("*.npy"))
