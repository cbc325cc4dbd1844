"""Logistic regression, k-NN and the linear grid as protocols: planted answers, chance, and honest bookkeeping."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from encoders import context, small_encoder, small_vit
from miniatures.pictures import labels_for, pattern
from peer_models import timm_model
from PIL import Image
from sklearn import metrics
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from dinoreg.data.folder_index import PathBlock
from dinoreg.data.source import PathSource, ScenesSource
from dinoreg.evaluation.backbones.encoder import PixelEncoder, wrap
from dinoreg.evaluation.benchmark import Task
from dinoreg.evaluation.data import Data, Labelled
from dinoreg.evaluation.features.images import read_picture
from dinoreg.evaluation.metrics.bootstrap import mean_per_class_accuracy
from dinoreg.evaluation.options import EvalOptions, KnnOptions, LinearOptions, LogisticOptions
from dinoreg.evaluation.protocols import classification, linear
from dinoreg.evaluation.protocols.classification import MOST_CLASSES, accuracy_row, class_tables, class_tokens
from dinoreg.evaluation.protocols.measurement import Measurement
from dinoreg.evaluation.solvers.train_heads import cosine
from dinoreg.models.vit import RegisterViT
from dinoreg.runtime.errors import UserError

TASK = Task("logistic", lambda root, options: Data({}), "top-1")
OPTIONS = EvalOptions(
    logistic=LogisticOptions(num_c=8),
    knn=KnnOptions(k=(1, 5, 20)),
    linear=LinearOptions(lrs=(1e-2, 0.1), epochs=2, epoch_steps=10, batch_size=16),
)


def split(folder: Path, name: str, count: int, shuffled: bool = False, first: int = 0) -> Labelled:
    shown, told = labels_for(count, 3, shuffled, seed=first)
    paths = []
    for index, label in enumerate(shown):
        paths.append(f"{name}_{index:03d}.png")
        pattern(int(label), first + index, 36, 40).save(folder / paths[-1])
    return Labelled(PathSource(str(folder), PathBlock.of(paths)), told, 3)


def data(folder: Path, shuffled: bool = False, val: bool = False) -> Data:
    splits = {"train": split(folder, "train", 45, shuffled), "test": split(folder, "test", 30, shuffled, 1000)}
    if val:
        splits["val"] = split(folder, "val", 15, shuffled, 2000)
    return Data(splits, ("red", "green", "blue"))


@pytest.mark.parametrize("protocol", [classification.logistic, classification.knn, linear.evaluate])
def test_a_recoverable_class_is_found_and_a_shuffled_one_is_not(protocol: Callable, tmp_path: Path) -> None:
    for shuffled in (False, True):
        folder = tmp_path / str(shuffled)
        folder.mkdir()
        rows = protocol(Measurement(small_encoder(), data(folder, shuffled), TASK, OPTIONS, context(folder)))
        top = rows[0]
        assert top.metric == "top-1"
        assert 0.0 <= top.low <= top.value <= top.high <= 1.0
        assert (top.n_train, top.n_test) == (45, 30)
        assert top.chance == pytest.approx(1 / 3)
        assert top.value >= 0.9 if not shuffled else top.value <= 0.6


@pytest.mark.parametrize("protocol", [classification.logistic, classification.knn, linear.evaluate])
def test_pixels_go_through_every_protocol(protocol: Callable, tmp_path: Path) -> None:
    encoder = PixelEncoder(8, (32, 32))
    rows = protocol(Measurement(encoder, data(tmp_path), TASK, OPTIONS, context(tmp_path)))
    assert rows[0].value >= 0.6


@pytest.mark.parametrize("protocol", [classification.logistic, classification.knn, linear.evaluate])
def test_the_same_weights_native_or_in_timm_score_the_same(protocol: Callable, tmp_path: Path) -> None:
    native = RegisterViT(image_size=32, patch_size=8, dim=64, depth=2, heads=2, num_registers=4, layerscale=1.0)
    found = data(tmp_path)
    ours, theirs = (
        protocol(Measurement(wrap(model), found, TASK, OPTIONS, context(tmp_path)))
        for model in (native.eval(), timm_model(native))
    )
    assert [row.value for row in ours] == [row.value for row in theirs]


def test_logistic_rows_agree_with_scikit_learn_at_the_chosen_c(tmp_path: Path) -> None:
    found, encoder, where = data(tmp_path, val=True), small_encoder(), context(tmp_path)
    task = Task("logistic", TASK.read, "mean per class")
    measured = Measurement(encoder, found, task, OPTIONS, where)
    macro, micro = classification.logistic(measured)
    assert (macro.metric, micro.metric) == ("mean per class", "top-1")
    assert macro.chosen_on == "the official validation split"
    assert macro.n_train == 60
    features = {name: class_tokens(measured, part.source, name).double().numpy() for name, part in found.splits.items()}
    fit = LogisticRegression(C=macro.settings["C"], max_iter=5000, tol=1e-10).fit(
        np.concatenate([features["train"], features["val"]]),
        np.concatenate([found.splits["train"].labels, found.splits["val"].labels]),
    )
    predicted = fit.predict(features["test"])
    labels = found.splits["test"].labels
    assert macro.value == pytest.approx(metrics.balanced_accuracy_score(labels, predicted), abs=1e-12)
    assert micro.value == pytest.approx((predicted == labels).mean(), abs=1e-12)
    assert macro.details["micro and macro"] == {"top-1": micro.value, "mean per class": macro.value}


def test_knn_reports_every_k_with_20_in_front(tmp_path: Path) -> None:
    rows = classification.knn(Measurement(small_encoder(), data(tmp_path), TASK, OPTIONS, context(tmp_path)))
    assert [row.variant for row in rows] == ["k = 20", "k = 1", "k = 5"]


def test_the_grid_says_where_its_best_head_was_chosen(tmp_path: Path) -> None:
    where = context(tmp_path)
    found = data(tmp_path)
    published = linear.evaluate(Measurement(small_encoder(), found, TASK, OPTIONS, where))
    assert published[0].chosen_on == "the reported split itself, as published"
    assert published[0].value == max(published[0].settings["grid"].values())
    assert len(published[0].settings["grid"]) == 2 * 4
    assert [row.variant for row in published[2:]] == [
        "1 block",
        "1 block + mean patch",
        "2 blocks",
        "2 blocks + mean patch",
    ]
    cautious = EvalOptions(
        linear=LinearOptions(lrs=(1e-2, 0.1), epochs=2, epoch_steps=10, batch_size=16, choose_on="train")
    )
    kept = linear.evaluate(Measurement(small_encoder(), found, TASK, cautious, context(tmp_path / "other")))
    assert "that no head was trained on" in kept[0].chosen_on
    assert kept[0].n_train == 45 - 4
    official = linear.evaluate(
        Measurement(small_encoder(), data(tmp_path, val=True), TASK, OPTIONS, context(tmp_path / "third"))
    )
    assert official[0].chosen_on == "the official validation split"


def test_the_grid_without_augmentation_runs_the_backbone_once_per_image(tmp_path: Path) -> None:
    encoder, seen = small_encoder(), []
    inner = encoder._layers
    encoder._layers = lambda x, *rest: seen.append(len(x)) or inner(x, *rest)  # type: ignore[method-assign,func-returns-value]
    options = EvalOptions(linear=LinearOptions(lrs=(0.1,), epochs=3, epoch_steps=None, batch_size=16, augment=False))
    rows = linear.evaluate(Measurement(encoder, data(tmp_path), TASK, options, context(tmp_path)))
    assert sum(seen) == 45 + 30
    assert rows[0].settings["steps"] == 3 * 3


def test_a_grid_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinoreg.evaluation.context.SAVE_SECONDS", -1.0)
    found = data(tmp_path)
    whole = linear.evaluate(Measurement(small_encoder(), found, TASK, OPTIONS, context(tmp_path / "whole")))
    broken = context(tmp_path / "broken")
    steps = 0

    def stopping(items: object, total: int, what: str) -> object:
        nonlocal steps
        for item in items:  # type: ignore[attr-defined]
            if what == "linear":
                steps += 1
                if steps == 8:
                    raise KeyboardInterrupt
            yield item

    broken.progress = stopping  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        linear.evaluate(Measurement(small_encoder(), found, TASK, OPTIONS, broken))
    resumed = linear.evaluate(Measurement(small_encoder(), found, TASK, OPTIONS, context(tmp_path / "broken")))
    assert resumed[0].settings["grid"] == whole[0].settings["grid"]


def test_random_resized_crops_have_torchvisions_distribution_of_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.transforms import RandomResizedCrop

    picture = pattern(0, 0, 60, 80)
    boxes = [RandomResizedCrop.get_params(picture, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
    theirs = np.array([[h, w, top, left] for top, left, h, w in boxes], dtype=float)
    ours = []

    def recorded(image: Image.Image, top: int, left: int, height: int, width: int) -> Image.Image:
        ours.append([height, width, top, left])
        return image.crop((left, top, left + width, top + height))

    monkeypatch.setattr(linear, "cropped", recorded)
    for seed in range(4000):
        linear.random_resized_crop(picture, 8, np.random.default_rng(seed))
    mine = np.array(ours, dtype=float)
    spread = theirs.std(axis=0) / np.sqrt(len(theirs))
    assert (np.abs(mine.mean(axis=0) - theirs.mean(axis=0)) < 5 * spread).all()
    assert np.allclose(mine.std(axis=0), theirs.std(axis=0), rtol=0.1)


def test_examples_are_drawn_where_they_are_wanted(tmp_path: Path) -> None:
    where = context(tmp_path, examples=True)
    classification.logistic(Measurement(small_encoder(), data(tmp_path), TASK, OPTIONS, where))
    classification.knn(Measurement(small_encoder(), data(tmp_path), TASK, OPTIONS, where))
    assert len(list((tmp_path / "examples").glob("logistic_*.png"))) == 4
    assert len(list((tmp_path / "examples").glob("knn_*.png"))) == 4


def test_wrong_options_and_missing_splits_are_one_line(tmp_path: Path) -> None:
    found = data(tmp_path)
    where = context(tmp_path)
    with pytest.raises(UserError, match=r"logistic\.token=cl: expected cls or cls\+mean"):
        classification.logistic(
            Measurement(small_encoder(), found, TASK, EvalOptions(logistic=LogisticOptions(token="cl")), where)
        )
    with pytest.raises(UserError, match=r"linear\.choose_on=val: expected test or train"):
        linear.evaluate(
            Measurement(small_encoder(), found, TASK, EvalOptions(linear=LinearOptions(choose_on="val")), where)
        )
    with pytest.raises(UserError, match="the test split is missing"):
        classification.logistic(
            Measurement(small_encoder(), Data({"train": found.splits["train"]}), TASK, OPTIONS, where)
        )
    with pytest.raises(UserError, match="metric 'mIoU': classification has"):
        classification.logistic(
            Measurement(wrap(small_vit()), found, Task("logistic", TASK.read, "mIoU"), OPTIONS, where)
        )
    with pytest.raises(UserError, match=r"train_002.png: label 3 is out of range, expected 0..2"):
        Labelled(found.splits["train"].source, [0, 1, 3, *[0] * 42], 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_streamed_images_come_with_their_own_labels(
    batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    told: list[int] = []
    inner = linear.Grid.augmented

    def augmented(self: linear.Grid, samples: list[tuple[int, np.ndarray]]) -> tuple[Tensor, np.ndarray]:
        train = self.split.source
        shown = [np.asarray(read_picture(train, index)).reshape(-1, 3).mean(0) for index in range(len(train))]
        means = [crop.reshape(-1, 3).mean(0) for _, crop in samples]
        seen.extend(int(np.abs(np.array(shown) - mean).sum(axis=1).argmin()) for mean in means)
        features, rows = inner(self, samples)
        told.extend(rows.tolist())
        return features, rows

    monkeypatch.setattr(linear.Grid, "augmented", augmented)
    monkeypatch.setattr(linear, "random_resized_crop", lambda image, size, rng: np.asarray(image.resize((size, size))))
    options = EvalOptions(
        linear=LinearOptions(lrs=(0.01,), blocks=(1,), avgpool=(0,), epochs=1, epoch_steps=5, batch_size=batch_size)
    )
    linear.evaluate(Measurement(small_encoder(), data(tmp_path), TASK, options, context(tmp_path)))
    assert len(told) == 5 * batch_size
    assert seen == told


def test_heads_side_by_side_learn_what_each_learns_alone(tmp_path: Path) -> None:
    """The stacked grid against its literal form: a module and an SGD of its own rate for every head."""
    train = data(tmp_path).splits["train"]
    options = LinearOptions(lrs=(1e-3, 0.05, 2.0), epochs=1, epoch_steps=12, batch_size=16, augment=False)
    grid = linear.Grid(small_encoder(), train, np.arange(len(train)), options, context(tmp_path))
    features = grid.features(train, "train")
    grid.start(features.shape[2])
    alone = {}
    for kind, stacked in grid.maps.items():
        weights = stacked.weight.detach().clone().view(len(options.lrs), train.num_classes, -1)
        for name, lr, weight in zip(grid.names(kind), options.lrs, weights):
            head = torch.nn.Linear(weight.shape[1], train.num_classes)
            head.weight.data, head.bias.data = weight, torch.zeros(train.num_classes)
            sgd = torch.optim.SGD(head.parameters(), lr=0.0, momentum=0.9)
            for step in range(grid.steps):
                x, rows = grid.stored(features, step)
                inputs = x[:, kind.slots(grid.deepest)].flatten(1)
                sgd.param_groups[0]["lr"] = lr * 16 / 256 * cosine(step, grid.steps)
                sgd.zero_grad()
                torch.nn.functional.cross_entropy(head(inputs), torch.from_numpy(train.labels[rows])).backward()
                sgd.step()
            alone[name] = head
    grid.train(features.shape[2])
    for kind, stacked in grid.maps.items():
        weights = stacked.weight.detach().view(len(options.lrs), train.num_classes, -1)
        biases = stacked.bias.detach().view(len(options.lrs), train.num_classes)
        for name, weight, bias in zip(grid.names(kind), weights, biases):
            torch.testing.assert_close(weight, alone[name].weight.detach(), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(bias, alone[name].bias.detach(), rtol=1e-4, atol=1e-6)


def test_a_head_that_diverges_loses_and_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    found, grids = data(tmp_path), {}
    for lrs in ((0.1,), (0.1, 1e38)):
        options = LinearOptions(lrs=lrs, blocks=(1,), avgpool=(0,), epochs=1, epoch_steps=10, batch_size=16)
        where = context(tmp_path / str(len(lrs)))
        rows = linear.evaluate(Measurement(small_encoder(), found, TASK, EvalOptions(linear=options), where))
        grids[lrs] = rows[0].settings["grid"]
    assert grids[0.1, 1e38]["1 block, lr 1e+38"] == -1
    assert grids[0.1, 1e38]["1 block, lr 0.1"] == pytest.approx(grids[0.1,]["1 block, lr 0.1"], abs=0.15)


@pytest.mark.parametrize("classes", [3, 7])
def test_tables_of_classes_are_those_of_scikit_learn(classes: int) -> None:
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes - 1, 90)  # none is of the last class
    predicted = np.where(rng.random(90) < 0.5, labels, rng.integers(1, classes, 90))  # the first is rarely named
    names = [f"c{number}" for number in range(classes)]
    found = class_tables(predicted, labels, names)
    everything = list(range(classes))
    assert np.array_equal(found["confusion"], metrics.confusion_matrix(labels, predicted, labels=everything))
    for key in ("recall", "precision"):
        expected = getattr(metrics, f"{key}_score")(
            labels, predicted, labels=everything, average=None, zero_division=np.nan
        )
        assert np.allclose([row[key] for row in found["classes"]], expected, equal_nan=True)
    assert [row["n"] for row in found["classes"]] == np.bincount(labels, minlength=classes).tolist()
    named = np.isin(everything, predicted)  # without an image, but predicted: 0
    recalls = [row["recall"] if row["n"] else 0.0 for row, said in zip(found["classes"], named) if row["n"] or said]
    assert np.mean(recalls) == pytest.approx(mean_per_class_accuracy(predicted, labels))
    known = predicted < classes - 1  # of others scikit-learn warns
    balanced = metrics.balanced_accuracy_score(labels[known], predicted[known])
    assert mean_per_class_accuracy(predicted[known], labels[known]) == pytest.approx(balanced)


def test_of_many_classes_the_largest_confusions_are_kept() -> None:
    rng = np.random.default_rng(5)
    labels, predicted = rng.zipf(1.3, (2, 3000)) % 40
    names = [f"c{number}" for number in range(40)]
    found = class_tables(predicted, labels, names)
    matrix = metrics.confusion_matrix(labels, predicted, labels=list(range(40)))
    np.fill_diagonal(matrix, 0)
    kept = [count for _, _, count in found["confusions"]]
    assert kept == sorted(matrix.ravel(), reverse=True)[:MOST_CLASSES]
    assert all(matrix[names.index(true), names.index(said)] == count for true, said, count in found["confusions"])


def test_the_largest_class_of_train_is_a_baseline_of_the_same_images(tmp_path: Path) -> None:
    labels = np.repeat([0, 1, 2], [70, 7, 3])
    train = Labelled(ScenesSource(80, size=16), labels, 3)
    measured = Measurement(small_encoder(), Data({"train": train, "test": train}), TASK, OPTIONS, context(tmp_path))
    constant, twelve_wrong = np.zeros(80, dtype=int), np.where(np.arange(80) < 12, 1, labels)
    for predicted, metric, said in (
        (constant, "top-1", "no difference"),
        (constant, "mean per class", "no difference"),
        (labels, "top-1", "better"),
        (twelve_wrong, "mean per class", "better"),
        (twelve_wrong, "top-1", "not shown"),
        (np.ones(80, dtype=int), "top-1", "worse"),
    ):
        found = accuracy_row(measured, train, predicted, metric)
        assert found.majority == pytest.approx(70 / 80 if metric == "top-1" else 1 / 3)
        assert found.against["majority class"]["verdict"] == said
        assert found.against["majority class"]["difference"] == pytest.approx(found.value - found.majority)
