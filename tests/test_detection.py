"""P8: the linear box head against literal forms, planted objects found by it, and what surrounds the number."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou, generalized_box_iou

from dinoreg.evaluation.backbones.encoder import PixelEncoder, wrap
from dinoreg.evaluation.benchmark import Task
from dinoreg.evaluation.data import Boxed, Data
from dinoreg.evaluation.dense.windows import batches_of_one_shape, fit_size
from dinoreg.evaluation.options import DetectionOptions, EvalOptions
from dinoreg.evaluation.protocols import detection
from dinoreg.evaluation.protocols.detection import (
    BACKGROUND,
    IGNORED,
    Answers,
    BoxProbe,
    LinearBoxHead,
    Prepared,
    Targets,
    around,
    assign,
    box_loss,
    centre_ness,
    centres,
    detect,
    evaluate,
    prepare,
    typical_reach,
)
from dinoreg.evaluation.protocols.measurement import Measurement
from dinoreg.evaluation.result import Row
from dinoreg.models.vit import RegisterViT
from dinoreg.runtime.errors import RunError, UserError
from tests.box_pictures import Pictures, coloured, context

TASK = Task("detection", lambda folder, options: Data({}), "AP50")
PIXELS = PixelEncoder(8, (32, 32))
OPTIONS = DetectionOptions(size=40, max_size=80, steps=60, batch_size=8, lrs=(0.01,))


def run(
    train: Boxed,
    test: Boxed,
    folder: Path,
    encoder: Any = PIXELS,
    metric: str = "AP50",
    extra: dict[str, Any] | None = None,
    examples: bool = False,
    **changes: Any,
) -> list[Row]:
    data = Data({"train": train, "test": test}, class_names=("red", "green", "blue"), extra=extra or {})
    options = EvalOptions(detection=dataclasses.replace(OPTIONS, **changes))
    return evaluate(
        Measurement(encoder, data, dataclasses.replace(TASK, metric=metric), options, context(folder, examples))
    )


def test_the_loss_equals_its_formula_patch_by_patch() -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([BACKGROUND, 2, 0, BACKGROUND, 1, 2])
    reach = torch.rand(6, 4, generator=generator) * 3 + 0.2
    answers = Answers(
        torch.randn(6, 3, generator=generator),
        torch.rand(6, 4, generator=generator) * 3 + 0.2,
        torch.randn(6, generator=generator),
    )
    boxes = generalized_box_iou(around(0.0, answers.reach), around(0.0, reach)).diagonal()
    focal = apart = central = entropy = 0.0
    for m in range(6):
        for c in range(3):
            p = 1 / (1 + np.exp(-float(answers.logits[m, c])))
            focal += -0.25 * (1 - p) ** 2 * np.log(p) if labels[m] == c else -0.75 * p**2 * np.log(1 - p)
        if labels[m] < 0:
            continue
        left, top, right, bottom = reach[m].tolist()
        weight = np.sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom))
        assert float(centre_ness(reach[m : m + 1])) == pytest.approx(weight, rel=1e-5)
        apart += weight * (1 - float(boxes[m]))
        central += weight
        q = 1 / (1 + np.exp(-float(answers.centredness[m])))
        entropy -= weight * np.log(q) + (1 - weight) * np.log(1 - q)
    expected = focal / 4 + apart / central + entropy / 4
    assert float(box_loss(answers, Targets(labels, reach))) == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_objects_has_only_the_loss_of_its_background() -> None:
    answers = Answers(torch.zeros(3, 2), torch.ones(3, 4), torch.zeros(3))
    targets = Targets(torch.full((3,), BACKGROUND), torch.zeros(3, 4))
    assert float(box_loss(answers, targets)) == pytest.approx(6 * 0.75 * 0.25 * np.log(2), rel=1e-5)


def test_assignment_equals_a_loop_over_patches_and_boxes() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        grid, patch, height, width = (5, 7), 4, 18, 26
        count = int(rng.integers(0, 6))
        start = rng.uniform(0, 16, (count, 2))
        boxes = np.concatenate([start, start + rng.uniform(0, 12, (count, 2))], axis=1).astype(np.float32)
        labels, ignored = rng.integers(0, 3, count), rng.random(count) < 0.3
        found = assign(centres(grid, patch), patch, (height, width), boxes, labels, ignored)
        for n in range(35):
            x, y = (n % 7 + 0.5) * patch, (n // 7 + 0.5) * patch
            inside = [k for k, (x0, y0, x1, y1) in enumerate(boxes) if x0 < x < x1 and y0 < y < y1]
            owners = [k for k in inside if not ignored[k]]
            owner = min(owners, key=lambda k: (boxes[k, 2] - boxes[k, 0]) * (boxes[k, 3] - boxes[k, 1]), default=None)
            if x >= width or y >= height:
                assert found.labels[n] == IGNORED
            elif owner is not None:
                assert found.labels[n] == labels[owner]
                x0, y0, x1, y1 = boxes[owner]
                expected = np.array([x - x0, y - y0, x1 - x, y1 - y]) / patch
                np.testing.assert_allclose(found.reach[n].numpy(), expected, rtol=1e-5)
            else:
                assert found.labels[n] == (IGNORED if inside else BACKGROUND)


def test_a_mirrored_image_has_mirrored_targets() -> None:
    split = coloured(4, seed=0)
    plain, mirrored = (prepare(split, 3, PIXELS, OPTIONS, flip) for flip in (False, True))
    assert torch.equal(plain.image.flip(2), mirrored.image)
    assert plain.targets is not None
    assert mirrored.targets is not None
    labels, other = (each.labels.view(8, 5) for each in (plain.targets, mirrored.targets))
    assert torch.equal(labels.flip(1), other)
    reach, other = (each.reach.view(8, 5, 4) for each in (plain.targets, mirrored.targets))
    torch.testing.assert_close(reach.flip(1)[..., [2, 1, 0, 3]], other)
    assert (labels >= 0).any()


def test_the_short_side_is_scaled_unless_the_long_one_grows_too_long() -> None:
    assert fit_size(50, 100, 80, 200) == (80, 160)
    assert fit_size(100, 50, 80, 200) == (160, 80)
    assert fit_size(50, 400, 80, 200) == (25, 200)
    assert fit_size(1, 5000, 80, 200) == (1, 200)


def test_boxes_scale_with_the_image_and_padding_is_ignored() -> None:
    split = coloured(2, seed=0)
    options = dataclasses.replace(OPTIONS, size=52, max_size=70)
    found = prepare(split, 0, PIXELS, options, False)  # 64x40 pixels
    assert found.size == (44, 70)
    assert found.image.shape == (3, 48, 72)
    assert found.scale == (70 / 64, 44 / 40)
    assert found.targets is not None
    # No centre of a patch lies in the padding here: 44 is the last row's own centre, which is outside.
    labels = found.targets.labels.view(6, 9)
    assert (labels[5] == IGNORED).all()
    assert (labels[:5] != IGNORED).all()
    x0, y0, x1, y1 = split.boxes[0][0] * np.array([70 / 64, 1.1, 70 / 64, 1.1])
    owned = (labels == split.labels[0][0]).nonzero().float() * 8 + 4
    assert owned[:, 1].min() > x0
    assert owned[:, 1].max() < x1
    assert owned[:, 0].min() > y0
    assert owned[:, 0].max() < y1


def test_detections_equal_a_greedy_loop() -> None:
    generator = torch.Generator().manual_seed(3)
    grid, patch, size, scale = (4, 5), 8, (30, 38), (2.0, 1.5)
    answers = Answers(
        torch.randn(20, 3, generator=generator),
        torch.rand(20, 4, generator=generator) * 3 + 0.1,
        torch.randn(20, generator=generator),
    )
    points = centres(grid, patch)
    seen, chosen = Prepared(0, torch.zeros(0), size, scale), dataclasses.replace(OPTIONS, nms=0.4, max_boxes=17)
    boxes, labels, scores = detect(answers, points, patch, seen, chosen)
    candidates = []
    for n in range(20):
        x, y = (n % 5 + 0.5) * patch, (n // 5 + 0.5) * patch
        left, top, right, bottom = (answers.reach[n] * patch).tolist()
        box = [max(x - left, 0), max(y - top, 0), min(x + right, 38), min(y + bottom, 30)]
        box = [box[0] / 2, box[1] / 1.5, box[2] / 2, box[3] / 1.5]
        for c in range(3):
            score = torch.sqrt(answers.logits[n, c].sigmoid() * answers.centredness[n].sigmoid())
            candidates.append((float(score), c, box))
    kept: list[tuple[float, int, list[float]]] = []
    for score, c, box in sorted(candidates, key=lambda each: -each[0]):
        rivals = [other for _, d, other in kept if d == c]
        if not rivals or float(box_iou(torch.tensor([box]), torch.tensor(rivals)).max()) <= 0.4:
            kept.append((score, c, box))
    kept = kept[:17]
    assert labels.tolist() == [each[1] for each in kept]
    np.testing.assert_allclose(scores.numpy(), [each[0] for each in kept], rtol=1e-5)
    np.testing.assert_allclose(boxes.numpy(), [each[2] for each in kept], rtol=1e-4, atol=1e-4)


def test_the_head_is_linear_in_normalised_tokens_and_starts_unsure() -> None:
    head = LinearBoxHead(6, 4, reach=2.5).eval()
    answers = head(torch.zeros(2, 6))
    torch.testing.assert_close(answers.logits.sigmoid(), torch.full((2, 4), 0.01))
    torch.testing.assert_close(answers.reach, torch.full((2, 4), 2.5))
    torch.testing.assert_close(answers.centredness, torch.zeros(2))
    assert [tuple(each.shape) for each in head.parameters()] == [(6,), (6,), (9, 6), (9,)]
    state = LinearBoxHead(6, 4, seed=1).linear.weight
    assert torch.equal(LinearBoxHead(6, 4, seed=1).linear.weight, state)
    assert not torch.equal(head.linear.weight, state)


def test_training_starts_at_the_typical_reach_of_its_boxes() -> None:
    targets = Targets(
        torch.tensor([1, BACKGROUND, IGNORED]), torch.tensor([[1.0, 2, 3, 4], [9, 9, 9, 9], [9, 9, 9, 9]])
    )
    assert typical_reach([targets]) == pytest.approx(2.5)
    assert typical_reach([Targets(targets.labels[1:], targets.reach[1:])]) == 3.0


def test_batches_have_one_shape_lose_nothing_and_wait_little() -> None:
    rng = np.random.default_rng(0)
    taken = 0

    def images() -> Any:
        nonlocal taken
        for place in range(50):
            taken += 1
            side = int(rng.integers(1, 7))
            yield Prepared(place, torch.zeros(3, side, 2), (side, 2), (1.0, 1.0))

    seen: list[int] = []
    for batch in batches_of_one_shape(images(), 3, lambda each: each.image.shape):
        assert len({each.image.shape for each in batch}) == 1
        assert 1 <= len(batch) <= 3
        seen += [each.number for each in batch]
        assert taken - len(seen) <= 12
    assert sorted(seen) == list(range(50))


def test_an_images_boxes_do_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = wrap(RegisterViT(image_size=32, patch_size=8, dim=32, depth=2, heads=4))
    split = coloured(7, seed=1)
    chosen = {"x": LinearBoxHead(32, 3).eval()}
    one_by_one = BoxProbe(encoder, dataclasses.replace(OPTIONS, batch_size=1), context(tmp_path))
    alone = one_by_one.predict(chosen, split, "boxes")
    probe = BoxProbe(encoder, OPTIONS, context(tmp_path))
    together = probe.predict(chosen, split, "boxes")
    np.testing.assert_array_equal(alone["x"].image, together["x"].image)
    np.testing.assert_allclose(alone["x"].scores, together["x"].scores, atol=1e-5)
    some = probe.predict(chosen, split.chosen(np.array([5, 2])), "boxes")
    first = some["x"].boxes[some["x"].image == 0]
    np.testing.assert_allclose(first, together["x"].boxes[together["x"].image == 5], atol=1e-3)


@pytest.fixture(scope="module")
def planted() -> tuple[Boxed, Boxed]:
    return coloured(32, seed=1), coloured(16, seed=2)


@pytest.mark.slow
def test_planted_objects_are_found_and_shuffled_ones_are_not(planted: tuple[Boxed, Boxed], tmp_path: Path) -> None:
    train, test = planted
    eleven, every = run(train, test, tmp_path / "true", examples=True, steps=120)
    assert (eleven.metric, eleven.variant, every.variant) == ("AP50", "11-point", "all-points")
    assert eleven.value > 0.85
    assert eleven.low < eleven.value < eleven.high
    assert eleven.note == "linear patch probe, not comparable with published detectors"
    assert eleven.chosen_on == ""
    assert (eleven.n_train, eleven.n_test) == (32, 16)
    assert eleven.settings["lr"] == 0.01
    assert set(eleven.details["per class"]) == {"red", "green", "blue"}
    mixed = coloured(32, seed=1, shuffled=True), coloured(16, seed=2, shuffled=True)
    shuffled = run(*mixed, tmp_path / "false", steps=120)
    assert shuffled[0].value < 0.15
    files = sorted((tmp_path / "true/examples").iterdir())
    assert [each.name for each in files] == [f"detection_{n:02d}.png" for n in range(3)]
    with Image.open(files[0]) as image:
        assert image.width <= 900
        colours = np.asarray(image).reshape(-1, 3).tolist()
    assert [240, 90, 70] in colours
    assert [70, 200, 120] in colours


@pytest.mark.slow
def test_a_random_vit_reads_them_too_and_coco_quotes_the_mean_over_thresholds(
    planted: tuple[Boxed, Boxed], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    encoder = wrap(RegisterViT(image_size=32, patch_size=8, dim=64, depth=1, heads=4, num_registers=2))
    rows = run(*planted, tmp_path, encoder, metric="AP", steps=240)
    assert [(row.metric, row.variant) for row in rows] == [("AP", ""), ("AP50", "")]
    assert 0.1 < rows[0].value < rows[1].value
    assert rows[1].value > 0.8


def test_the_metric_and_the_rule_say_what_comes_first(planted: tuple[Boxed, Boxed], tmp_path: Path) -> None:
    train, test = coloured(4, seed=1), coloured(3, seed=2)
    small = {"steps": 2}
    assert run(train, test, tmp_path / "a", extra={"rule": "voc2012"}, **small)[0].variant == "all-points"
    rows = run(train, test, tmp_path / "b", metric="AP50", extra={"rule": "coco"}, **small)
    assert [row.metric for row in rows] == ["AP50", "AP"]


def test_one_of_several_rates_is_chosen_on_held_out_images_or_the_official_ones(tmp_path: Path) -> None:
    train, test = coloured(12, seed=1), coloured(6, seed=2)
    row = run(train, test, tmp_path / "a", steps=25, lrs=(0.01, 1e-6))[0]
    assert row.chosen_on == "1 held-out training images, seed 0"
    assert row.n_train == 11
    assert row.details["by rate"]["lr 0.01"] > row.details["by rate"]["lr 1e-06"]
    data = Data({"train": train, "val": coloured(5, seed=3), "test": test})
    options = EvalOptions(detection=dataclasses.replace(OPTIONS, steps=25, lrs=(1e-6, 0.01)))
    row = evaluate(Measurement(PIXELS, data, TASK, options, context(tmp_path / "b")))[0]
    assert row.chosen_on == "the official validation split"
    assert row.n_train == 12
    assert row.settings["lr"] == 0.01
    assert row.value == row.details["by rate"]["lr 0.01"]


def test_a_rate_that_diverges_is_left_out(tmp_path: Path) -> None:
    train, test = coloured(8, seed=1), coloured(4, seed=2)
    row = run(train, test, tmp_path, steps=6, lrs=(1e30, 0.01))[0]
    assert row.details["by rate"]["lr 1e+30"] == "diverged"
    assert row.settings["lr"] == 0.01
    with pytest.raises(RunError, match="stopped being finite"):
        run(train, test, tmp_path / "all", steps=6, lrs=(1e30,))


def test_a_training_that_was_stopped_ends_bitwise_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = coloured(10, seed=1), coloured(4, seed=2)
    unbroken = run(train, test, tmp_path / "a", steps=8, batch_size=4)
    monkeypatch.setattr("dinoreg.evaluation.context.SAVE_SECONDS", -1.0)
    box_loss, calls = detection.box_loss, []

    def stops(*given: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return box_loss(*given)

    monkeypatch.setattr(detection, "box_loss", stops)
    with pytest.raises(KeyboardInterrupt):
        run(train, test, tmp_path / "b", steps=8, batch_size=4)
    resumed = run(train, test, tmp_path / "b", steps=8, batch_size=4)
    for one, other in zip(unbroken, resumed, strict=True):
        assert dataclasses.replace(one, hours=0) == dataclasses.replace(other, hours=0)
    assert len(calls) == 9  # the step that was stopped is done again


def test_images_without_objects_and_crowds_are_mean_count_without_harm(tmp_path: Path) -> None:
    train, test = coloured(6, seed=1), coloured(4, seed=2)
    boxes, labels = list(train.boxes), list(train.labels)
    boxes[0], labels[0] = boxes[0][:0], labels[0][:0]
    boxes[1] = np.array([[5, 5, 5, 9]], np.float32)  # empty
    labels[1] = labels[1][:1]
    crowd = [np.full(len(each), place == 2) for place, each in enumerate(labels)]
    none = [np.zeros(len(each), dtype=bool) for each in labels]
    train = Boxed(train.source, boxes, labels, 3, none, crowd)
    row = run(train, test, tmp_path, steps=3)[0]
    assert np.isfinite(row.details["training loss"])


class Broken(PixelEncoder):
    def _layers(self, x: torch.Tensor, blocks: Any, norm: bool) -> Any:
        (tokens,) = super()._layers(x, blocks, norm)
        bad = x.mean(dim=(1, 2, 3), keepdim=True)[:, 0] > 1.5
        return [tokens._replace(patches=torch.where(bad, torch.nan, tokens.patches))]


def test_a_feature_that_is_not_finite_names_the_image(tmp_path: Path) -> None:
    train, test = coloured(4, seed=1), coloured(4, seed=2)
    pixels = list(test.source.pixels)  # type: ignore[attr-defined]
    pixels[3] = np.full_like(pixels[3], 255)
    test = dataclasses.replace(test, source=Pictures(pixels))
    with pytest.raises(RunError, match="picture 3: its feature is not finite"):
        run(train, test, tmp_path, Broken(8, (32, 32)), steps=2)


def test_bad_input_is_said_in_one_line(tmp_path: Path) -> None:
    train, test = coloured(2, seed=1), coloured(2, seed=2)
    with pytest.raises(UserError, match="metric 'mAP' with rule 'voc2007'"):
        run(train, test, tmp_path, metric="mAP")
    with pytest.raises(UserError, match="rule 'lvis'"):
        run(train, test, tmp_path, extra={"rule": "lvis"})
    with pytest.raises(UserError, match="train split is missing"):
        evaluate(Measurement(PIXELS, Data({"test": test}), TASK, EvalOptions(), context(tmp_path)))
    hard = dataclasses.replace(test, difficult=[np.ones(len(each), dtype=bool) for each in test.labels])
    with pytest.raises(UserError, match="no boxes that count"):
        run(train, hard, tmp_path, steps=1)
    first = Pictures(train.source.pixels[:1])  # type: ignore[attr-defined]
    one = Boxed(first, train.boxes[:1], train.labels[:1], 3, train.difficult[:1], train.crowd[:1])
    with pytest.raises(UserError, match="at least 2 training images"):
        run(one, test, tmp_path, lrs=(0.1, 0.2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lrs": ()}, "detection.lrs"),
        ({"lrs": (0.1, 0.1)}, "detection.lrs"),
        ({"max_size": 100}, "detection.max_size=100"),
        ({"nms": 1.5}, "detection.nms=1.5"),
        ({"steps": 0}, "detection.steps=0"),
        ({"max_boxes": 0}, "detection.max_boxes=0"),
    ],
)
def test_options_out_of_range_are_named(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DetectionOptions(**options)
