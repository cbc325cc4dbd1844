"""Linear segmentation on planted answers, and its parts against slow literal forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
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
from dinoreg.evaluation.data import Data, Segmented
from dinoreg.evaluation.options import EvalOptions, SegmentationOptions
from dinoreg.evaluation.protocols import segmentation
from dinoreg.evaluation.protocols.measurement import Measurement
from dinoreg.evaluation.protocols.segmentation import (
    LinearHead,
    evaluate,
    pixel_loss,
    training_crop,
    upsample,
    warmup,
)
from dinoreg.evaluation.result import Row
from dinoreg.models.vit import RegisterViT
from dinoreg.runtime.errors import RunError, UserError
from tests.miniatures import ade20k
from tests.miniatures.pictures import COLOURS

TASK = Task("segmentation", lambda folder, options: Data({}), "mIoU")


class Pixels(Source):
    """Images in memory."""

    def __init__(self, images: list[np.ndarray], name: str) -> None:
        self.images, self.called = images, name

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> np.ndarray:
        return self.images[index]

    def name(self, index: int) -> str:
        return f"{self.called}:{index}"

    def fingerprint(self) -> str:
        return "0" * 16


def halves(count: int, name: str, seed: int = 0, num_classes: int = 3) -> Segmented:
    """Images of two coloured halves, of several sizes, with a border that is ignored."""
    rng = np.random.default_rng([seed, len(name)])
    images, masks = [], []
    for number in range(count):
        height, width = ((20, 26), (24, 18), (31, 20))[number % 3]
        mask = np.full((height, width), number % num_classes, dtype=np.uint8)
        mask[:, width // 2 :] = rng.integers(num_classes)
        images.append(np.clip(COLOURS[mask] + rng.normal(scale=6, size=(height, width, 3)), 0, 255).astype(np.uint8))
        mask[0] = 255
        masks.append(mask)
    return Segmented(Pixels(images, name), lambda index: masks[index], num_classes)


@pytest.fixture
def data() -> Data:
    return Data({"train": halves(12, "train"), "test": halves(5, "test")}, ("red", "green", "blue"))


@pytest.fixture(scope="module")
def vit() -> Encoder:
    torch.manual_seed(0)
    return wrap(RegisterViT(image_size=16, patch_size=4, dim=16, depth=2, heads=2, num_registers=2), "tiny")


def options(**changes: Any) -> EvalOptions:
    values = {"size": 18, "stride": 10, "steps": 6, "warmup_steps": 1, "batch_size": 3, "lrs": (0.02,)}
    return EvalOptions(segmentation=SegmentationOptions(**{**values, **changes}))


def context(folder: Path, examples: bool = False, **changes: Any) -> Context:
    made = Context(
        features=folder / "features",
        state=folder / "state",
        examples=folder / "examples" if examples else None,
        seed=0,
        image_size=16,
        batch_size=8,
        workers=0,
        num_examples=2,
    )
    return replace(made, **changes)


def without_time(rows: list[Row]) -> list[dict[str, Any]]:
    return [replace(row, hours=0.0).as_dict() for row in rows]


class TestLoss:
    def test_it_and_its_gradient_equal_cross_entropy_on_upsampled_logits(self) -> None:
        logits = torch.randn(3, 5, 3, 4, dtype=torch.float64, requires_grad=True)
        labels = torch.randint(0, 5, (3, 10, 16))
        labels[torch.rand(3, 10, 16) < 0.3] = 255
        loss = pixel_loss(logits, labels, 4)
        (3 * loss).backward()
        found, logits.grad = logits.grad, None
        full = F.interpolate(logits, size=(12, 16), mode="bilinear", align_corners=False)[:, :, 1:11]
        expected = F.cross_entropy(full, labels, ignore_index=255)
        (3 * expected).backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(found, logits.grad)

    def test_a_batch_without_a_label_costs_nothing(self) -> None:
        logits = torch.randn(2, 3, 2, 2, requires_grad=True)
        loss = pixel_loss(logits, torch.full((2, 8, 8), 255), 4)
        loss.backward()
        assert loss.item() == 0
        assert logits.grad is not None
        assert logits.grad.abs().max() == 0

    def test_upsampled_logits_lie_over_the_pixels_of_their_patch(self) -> None:
        logits = torch.zeros(1, 1, 3, 3)
        logits[0, 0, 0, 2] = 1  # of 12 x 12 padded pixels the rows 0..3 and columns 8..11
        full = upsample(logits, 10, 10, 4)[0, 0]
        y, x = divmod(int(full.argmax()), 10)
        assert (y + 1) // 4 == 0
        assert (x + 1) // 4 == 2


class TestHead:
    def test_it_is_a_batch_norm_and_one_linear_map_per_patch(self) -> None:
        head = LinearHead(6, 4, seed=0)
        x = torch.randn(2, 6, 3, 5) * 4 + 1
        logits = head(x)
        centred = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
        expected = torch.einsum("kd,bdhw->bkhw", head.classify.weight[:, :, 0, 0], centred)
        torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-5)

    def test_it_starts_from_its_seed_alone(self) -> None:
        first, again, other = LinearHead(6, 4, 0), LinearHead(6, 4, 0), LinearHead(6, 4, 1)
        assert torch.equal(first.classify.weight, again.classify.weight)
        assert not torch.equal(first.classify.weight, other.classify.weight)


class TestTrainingCrop:
    def test_image_and_mask_move_together_and_the_rest_is_padding(self) -> None:
        height, width = 30, 22
        mask = np.indices((height, width)).sum(axis=0).astype(np.uint8) // 10
        image = Image.fromarray(np.repeat((mask * 40)[..., None], 3, axis=2))
        padded = whole = flipped = 0
        for seed in range(60):
            rng = np.random.default_rng(seed)
            pixels, labels = training_crop(image, mask, 24, (1, 2, 3), rng)
            assert pixels.shape == (24, 24, 3)
            assert labels.shape == (24, 24)
            outside = labels == 255
            assert (pixels[outside] == (1, 2, 3)).all()
            padded += outside.any()
            whole += not outside.any()
            inside = labels[~outside.all(axis=1)][:, ~outside.all(axis=0)].astype(int)
            slope = inside[:, -1].sum() - inside[:, 0].sum()
            flipped += slope < 0
            # Brighter pixels still are those of higher classes.
            shades = [pixels[labels == k].mean() for k in np.unique(labels) if k != 255 and (labels == k).sum() > 30]
            assert shades == sorted(shades)
        assert padded > 5
        assert whole > 5
        assert 10 < flipped < 50


class TestWarmup:
    def test_it_is_as_asked_but_a_tenth_of_the_steps_at_most(self) -> None:
        assert warmup(SegmentationOptions()) == 1500
        assert warmup(SegmentationOptions(steps=15_000)) == 1500
        assert warmup(SegmentationOptions(steps=1500)) == 150
        assert warmup(SegmentationOptions(steps=5)) == 0


class TestPlanted:
    @pytest.fixture(scope="class")
    def rows(self, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Encoder, bool], Row]:
        benchmark = load_benchmark(bundled("eval") / "ade20k.py")
        task = benchmark.tasks[0]
        chosen = options(size=35, stride=21, steps=60, batch_size=6, lrs=(2e-2,))

        def run(encoder: Encoder, shuffled: bool) -> Row:
            folder = tmp_path_factory.mktemp("ade20k")
            ade20k.write(folder, per_class=4, shuffled=shuffled)
            data = task.read(benchmark.find(folder), {})
            return evaluate(Measurement(encoder, data, task, chosen, context(folder)))[0]

        return run

    @pytest.mark.slow
    def test_a_random_network_finds_classes_that_are_colours(self, rows: Callable[[Encoder, bool], Row]) -> None:
        torch.manual_seed(0)
        model = RegisterViT(image_size=28, patch_size=7, dim=24, depth=2, heads=2, num_registers=2)
        row = rows(wrap(model), False)
        assert row.metric == "mIoU"
        assert row.value > 0.8
        assert row.low <= row.value <= row.high
        assert row.majority is not None
        assert row.majority < 0.15
        assert row.details["pixel_accuracy"] > 0.9
        assert set(row.details["iou"]) == {f"object {n}, thing {n}" for n in range(1, 151)}
        assert sum(math.isfinite(value) for value in row.details["iou"].values()) >= 4

    @pytest.mark.slow
    def test_pixels_find_them_too_and_shuffled_masks_give_the_baseline(
        self, rows: Callable[[Encoder, bool], Row]
    ) -> None:
        encoder = PixelEncoder(7, (28, 28))
        assert rows(encoder, False).value > 0.8
        row = rows(encoder, True)
        assert row.majority is not None
        assert abs(row.value - row.majority) < 0.1


def test_a_single_head_chooses_nothing_and_says_what_was_used(data: Data, vit: Encoder, tmp_path: Path) -> None:
    (row,) = evaluate(Measurement(vit, data, TASK, options(), context(tmp_path, examples=True)))
    assert (row.chosen_on, row.variant, row.n_train, row.n_test, row.seeds) == ("", "", 12, 5, (0,))
    assert row.settings["lr"] == 0.02
    assert row.settings["weight_decay"] == 1e-4
    assert list(row.details["iou"]) == ["red", "green", "blue"]
    assert row.details["most_frequent_class"] in ("red", "green", "blue")
    pictures = sorted((tmp_path / "examples").iterdir())
    assert [path.name for path in pictures] == ["segmentation_00.png", "segmentation_01.png"]
    assert Image.open(pictures[0]).size == (3 * 296 + 8, 232 + 18)


def test_the_score_is_that_of_predictions_made_one_window_at_a_time(
    data: Data, vit: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[str, Any] = {}
    train = segmentation.LinearProbe.train

    def spy(*arguments: Any) -> Any:
        kept["heads"], losses = train(*arguments)
        return kept["heads"], losses

    monkeypatch.setattr(segmentation.LinearProbe, "train", spy)
    (row,) = evaluate(Measurement(vit, data, TASK, options(), context(tmp_path)))
    (head,) = kept["heads"].values()
    right, either = np.zeros(3), np.zeros(3)
    test = data.splits["test"]
    for index in range(len(test)):
        image, mask = test.source.images[index], test.mask(index)
        factor = min(18 / min(mask.shape), 72 / max(mask.shape))
        height, width = (int(side * factor + 0.5) for side in mask.shape)
        pixels = np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
        scaled = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
        total, covered = torch.zeros(3, height, width), torch.zeros(height, width)
        for top in {*range(0, max(height - 18, 0), 10), max(height - 18, 0)}:
            for left in {*range(0, max(width - 18, 0), 10), max(width - 18, 0)}:
                window = scaled[:, :, top : top + 18, left : left + 18]
                mean = torch.tensor(vit.preprocessing.mean).view(1, 3, 1, 1)
                padded = F.pad(window - mean, (1, 1, 1, 1)) + mean  # 18 -> 20 = 5 patches
                tokens = vit.tokens(padded).patches.mT.reshape(1, -1, 5, 5)
                with torch.no_grad():
                    logits = F.interpolate(head(tokens), size=(20, 20), mode="bilinear", align_corners=False)
                total[:, top : top + 18, left : left + 18] += logits[0, :, 1:19, 1:19]
                covered[top : top + 18, left : left + 18] += 1
        full = F.interpolate((total / covered)[None], size=mask.shape, mode="bilinear", align_corners=False)
        found = full[0].argmax(0).numpy()
        for k in range(3):
            right[k] += ((found == k) & (mask == k)).sum()
            either[k] += (((found == k) | (mask == k)) & (mask != 255)).sum()
    assert row.value == pytest.approx((right / either).mean(), abs=1e-3)  # a tie may fall either way


def test_several_heads_share_one_pass_and_the_best_says_where_it_was_chosen(
    data: Data, vit: Encoder, tmp_path: Path
) -> None:
    seen: list[int] = []

    class Counting(PixelEncoder):
        def tokens(self, images: Tensor) -> Any:
            seen.append(len(images))
            return super().tokens(images)

    encoder = Counting(4, (16, 16))
    evaluate(Measurement(encoder, data, TASK, options(), context(tmp_path / "a")))
    alone = sum(seen)
    seen.clear()
    several = options(lrs=(1e-4, 0.02), weight_decays=(1e-4, 1e-3))
    rows = evaluate(Measurement(encoder, data, TASK, several, context(tmp_path / "b")))
    assert sum(seen) == alone
    assert rows[0].variant == "best of 4"
    assert rows[0].chosen_on == "the reported split itself"
    assert rows[0].value == max(row.value for row in rows[1:])
    assert [row.settings["lr"] for row in rows[1:]] == [1e-4, 1e-4, 0.02, 0.02]
    assert [row.settings["weight_decay"] for row in rows[1:]] == [1e-4, 1e-3, 1e-4, 1e-3]
    assert [row.note for row in rows[1:]].count("the best of these") == 1
    assert all(row.chosen_on == "" for row in rows[1:])
    (single,) = evaluate(Measurement(encoder, data, TASK, options(lrs=(0.02,)), context(tmp_path / "c")))
    assert single.value == rows[3].value


def test_an_official_validation_split_chooses_where_there_is_one(data: Data, tmp_path: Path) -> None:
    encoder = PixelEncoder(4, (16, 16))
    with_val = replace(data, splits={**data.splits, "val": halves(3, "val")})
    rows = evaluate(Measurement(encoder, with_val, TASK, options(lrs=(1e-4, 0.02)), context(tmp_path)))
    assert rows[0].chosen_on == "the official validation split"
    assert rows[0].n_test == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_seed_gives_the_same_rows(data: Data, vit: Encoder, tmp_path: Path, workers: int) -> None:
    first = evaluate(Measurement(vit, data, TASK, options(), context(tmp_path / "a")))
    again = evaluate(Measurement(vit, data, TASK, options(), context(tmp_path / "b", workers=workers)))
    assert without_time(first) == without_time(again)


@pytest.mark.parametrize("stop", [4, 9])  # in training (6 steps), and in the test after it
def test_an_interrupted_evaluation_resumes_to_the_same_rows(
    data: Data, vit: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    whole = evaluate(Measurement(vit, data, TASK, options(), context(tmp_path / "whole", examples=True)))
    monkeypatch.setattr("dinoreg.evaluation.context.SAVE_SECONDS", -1.0)
    done: list[str] = []

    def dying(items: Any, total: int, what: str) -> Any:
        for item in items:
            if len(done) == stop:
                raise KeyboardInterrupt
            yield item
            done.append(what)

    with pytest.raises(KeyboardInterrupt):
        evaluate(Measurement(vit, data, TASK, options(), context(tmp_path / "killed", progress=dying)))
    totals: list[int] = []

    def counting(items: Any, total: int, what: str) -> Any:
        totals.append(total)
        return iter(items)

    resumed = evaluate(
        Measurement(vit, data, TASK, options(), context(tmp_path / "killed", examples=True, progress=counting))
    )
    assert totals == ([2, 5] if stop == 4 else [0, 2])  # steps, and images: none is counted twice
    assert without_time(resumed) == without_time(whole)
    for name in ("segmentation_00.png", "segmentation_01.png"):
        assert (tmp_path / "killed/examples" / name).read_bytes() == (tmp_path / "whole/examples" / name).read_bytes()


def test_the_variant_of_the_data_is_said(data: Data, tmp_path: Path) -> None:
    encoder = PixelEncoder(4, (16, 16))
    (row,) = evaluate(Measurement(encoder, replace(data, variant="half"), TASK, options(), context(tmp_path)))
    assert row.variant == "half"


def test_a_head_whose_training_diverges_is_marked_and_never_the_best(data: Data, tmp_path: Path) -> None:
    encoder = PixelEncoder(4, (16, 16))
    rows = evaluate(Measurement(encoder, data, TASK, options(lrs=(1e36, 0.02)), context(tmp_path)))
    assert [row.note for row in rows] == ["", "its training diverged", "the best of these"]
    assert rows[0].settings["lr"] == 0.02


class TestBadInput:
    def test_a_missing_split(self, data: Data, vit: Encoder, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="segmentation needs a split 'test' with masks; the dataset has train"):
            evaluate(Measurement(vit, Data({"train": data.splits["train"]}), TASK, options(), context(tmp_path)))

    def test_a_mask_of_another_size(self, data: Data, vit: Encoder, tmp_path: Path) -> None:
        for shape, said in (((3, 4), "3 x 4"), ((20, 26, 1), "20 x 26 x 1")):
            test = replace(data.splits["test"], mask=lambda _, shape=shape: np.zeros(shape, dtype=np.uint8))
            wrong = replace(data, splits={**data.splits, "test": test})
            with pytest.raises(UserError, match=f"test:0: its mask is {said} pixels, the image 20 x 26"):
                evaluate(Measurement(vit, wrong, TASK, options(), context(tmp_path)))

    def test_a_class_out_of_range(self, data: Data, vit: Encoder, tmp_path: Path) -> None:
        train = replace(data.splits["train"], num_classes=1)
        wrong = replace(data, splits={**data.splits, "train": train})
        with pytest.raises(UserError, match=r"train:\d+: its mask has class [12], expected 0\.\.0 or 255"):
            evaluate(Measurement(vit, wrong, TASK, options(), context(tmp_path)))

    def test_features_that_are_not_finite_name_the_image(self, data: Data, tmp_path: Path) -> None:
        class Broken(PixelEncoder):
            def tokens(self, images: Tensor) -> Any:
                found = super().tokens(images)
                bad = images.flatten(1).amax(dim=1) > 0  # all but the blank that is measured
                return found._replace(patches=found.patches.masked_fill(bad.view(-1, 1, 1), torch.nan))

        with pytest.raises(RunError, match=r"train:\d+: its feature is not finite"):
            evaluate(Measurement(Broken(4, (16, 16)), data, TASK, options(), context(tmp_path)))

    def test_one_patch_a_step_is_too_little_for_a_batch_norm(self, data: Data, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"segmentation\.batch_size=1: a crop of 4 pixels is one patch"):
            evaluate(
                Measurement(
                    PixelEncoder(4, (16, 16)), data, TASK, options(size=4, stride=4, batch_size=1), context(tmp_path)
                )
            )

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"size": 0}, "segmentation.size=0: expected a number of pixels in"),
            ({"stride": 19}, "segmentation.stride=19: expected at most segmentation.size=18 pixels"),
            ({"steps": 0}, "segmentation.steps=0: expected at least 1"),
            ({"warmup_steps": -1}, "segmentation.warmup_steps=-1: expected at least 0"),
            ({"batch_size": 0}, "segmentation.batch_size=0: expected a number in"),
            ({"lrs": ()}, r"segmentation.lrs=\[\]: expected one or more, each a positive number"),
            ({"lrs": (0.0,)}, r"segmentation.lrs=\[0\]: expected each a positive number"),
            ({"weight_decays": (-1.0,)}, r"segmentation.weight_decays=\[-1\]: expected each at least 0"),
        ],
    )
    def test_options_out_of_range(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            options(**changes)
