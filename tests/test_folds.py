"""Small sets are split in several ways: what each fold holds, what is measured once, and what the interval covers."""

from __future__ import annotations

import dataclasses
import json
import pkgutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import context, small_encoder, small_vit
from miniatures import own
from miniatures.pictures import pattern, save
from PIL import Image
from torch import Tensor

from dinoreg.commands.main import main
from dinoreg.data.copies import Copies
from dinoreg.data.open import open_source
from dinoreg.data.source import ChosenSource, Source
from dinoreg.evaluation.backbones.encoder import NativeEncoder
from dinoreg.evaluation.benchmark import PROTOCOLS, Benchmark
from dinoreg.evaluation.custom.datasets import own_benchmark
from dinoreg.evaluation.custom.splits import alone, deal
from dinoreg.evaluation.data import Data
from dinoreg.evaluation.features.cache import extract_features, feature_matrix
from dinoreg.evaluation.features.images import CentreCrop
from dinoreg.evaluation.metrics.bootstrap import Clusters, bootstrap_statistic, draws_interval, resample
from dinoreg.evaluation.metrics.knn_rankme import knn_predict
from dinoreg.evaluation.options import EvalOptions, FewShotOptions, LinearOptions, LogisticOptions, MultilabelOptions
from dinoreg.evaluation.protocols.measurement import Measurement
from dinoreg.evaluation.result import Row
from dinoreg.evaluation.solvers.regularisation_path import balanced_split
from dinoreg.runtime.errors import UserError

CROP = CentreCrop(32, 32)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    (tmp_path / "images").mkdir()
    for index in range(9):
        pattern(index % 3, index, 40, 40).save(tmp_path / "images" / f"{index}.png")
    return open_source(str(tmp_path / "images"))


def counting() -> tuple[NativeEncoder, list[int]]:
    """An encoder, and the sizes of the batches that pass its backbone."""
    encoder, seen = small_encoder(depth=3), list[int]()
    inner = encoder._layers
    encoder._layers = lambda x, *rest: seen.append(len(x)) or inner(x, *rest)  # type: ignore[method-assign,func-returns-value]
    return encoder, seen


@pytest.mark.parametrize(
    ("blocks", "mean_patch", "passes"),
    [((-1,), False, 9), ((1, 2), False, 9), ((-1,), True, 9), ((1, 2), True, 9), ((0,), False, 18), ((1,), True, 18)],
)
def test_a_part_of_kept_slots_is_read_and_nothing_else_is(
    source: Source, tmp_path: Path, blocks: tuple[int, ...], mean_patch: bool, passes: int
) -> None:
    encoder, seen = counting()
    where = context(tmp_path)
    extract_features(where, encoder, source, CROP, (1, 2), mean_patch=True)
    found = extract_features(where, encoder, source, CROP, blocks, mean_patch=mean_patch)
    assert sum(seen) == passes
    alone = extract_features(context(tmp_path / "alone"), small_encoder(depth=3), source, CROP, blocks, mean_patch)
    assert np.array_equal(found, alone)
    assert np.array_equal(feature_matrix(found).numpy(), feature_matrix(alone).numpy())


def test_an_unfinished_file_serves_no_one_else(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinoreg.evaluation.features.cache.FLUSH_BYTES", 1)
    encoder, seen = counting()
    inner = encoder._layers

    def stopping(x: Tensor, *rest: object) -> list:
        if sum(seen) >= 6:
            raise KeyboardInterrupt
        return inner(x, *rest)  # type: ignore[arg-type]

    where = dataclasses.replace(context(tmp_path), batch_size=3)
    encoder._layers = stopping  # type: ignore[method-assign,assignment]
    with pytest.raises(KeyboardInterrupt):
        extract_features(where, encoder, source, CROP, (1, 2), mean_patch=True)
    encoder._layers = inner  # type: ignore[method-assign]
    found = extract_features(where, encoder, source, CROP)
    assert sum(seen) == 6 + 9
    alone = extract_features(dataclasses.replace(where, features=tmp_path / "new"), encoder, source, CROP)
    assert np.array_equal(found, alone)
    extract_features(where, encoder, source, CROP, (1, 2), mean_patch=True)
    assert sum(seen) == 6 + 9 + 9 + 3  # it went on where it was stopped


def test_choices_of_the_same_images_are_extracted_once(source: Source, tmp_path: Path) -> None:
    encoder, seen = counting()
    where = context(tmp_path)
    whole = extract_features(context(tmp_path / "whole"), small_encoder(depth=3), source, CROP)
    for chosen in ([0, 5, 3], [8, 1], list(range(9))):
        part = ChosenSource(source, np.array(chosen), one_of_many=True)
        assert np.array_equal(extract_features(where, encoder, part, CROP), whole[chosen])
    assert sum(seen) == 9
    lone = ChosenSource(source, np.array([2, 4]))  # of a set whose other images nobody measures
    extract_features(where, encoder, lone, CROP)
    assert sum(seen) == 9 + 2


FAST = EvalOptions(
    logistic=LogisticOptions(num_c=4),
    multilabel=MultilabelOptions(num_c=4),
    linear=LinearOptions(lrs=(0.01, 0.1), epochs=1, epoch_steps=8, choose_on="train", augment=False),
    few_shot=FewShotOptions(shots=(1, 3), shares=(1.0,), repeats=2),
)


def contents(of: list[str]) -> Copies:
    """Images by what is in them: equal texts are copies."""
    digests = np.array([list(text.ljust(32).encode()) for text in of], dtype=np.uint8)
    return Copies(digests, np.array([of.index(text) for text in of]))


def test_folds_hold_every_class_evenly_and_copies_together_whatever_the_order() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2, 3], [23, 40, 3, 11])
    pictures = [f"{label}-{number}" for number, label in enumerate(labels)]
    fold_of = deal(labels, 5, 0, contents(pictures))
    for label, size in enumerate((23, 40, 3, 11)):
        found = np.bincount(fold_of[labels == label], minlength=5)
        assert found.sum() == size
        assert found.max() - found.min() <= 1
    assert np.ptp(np.bincount(fold_of)) <= 1
    order = rng.permutation(len(labels))
    again = deal(labels[order], 5, 0, contents([pictures[place] for place in order]))
    assert again.tolist() == fold_of[order].tolist()
    assert deal(labels, 5, 1, contents(pictures)).tolist() != fold_of.tolist()
    drawn = rng.integers(0, 77, size=200)  # copies, also of several classes
    fold_of = deal(rng.integers(0, 3, size=200), 5, 0, contents([pictures[place] for place in drawn]))
    assert all(len(set(fold_of[drawn == place])) <= 1 for place in range(77))
    assert np.bincount(fold_of).min() > 30
    assert sorted(deal(np.array([0, 0, 1]), 5, 0, alone(3))) == [0, 1, 2]


def test_what_penalties_are_chosen_on_keeps_copies_together() -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 60, size=300)
    labels = torch.from_numpy(pictures % 3)
    held = balanced_split(labels, 0.2, seed=1, pictures=pictures).numpy()
    assert all(len(set(held[pictures == each])) == 1 for each in range(60))
    assert np.bincount(labels[torch.from_numpy(held)]).min() > 0
    plain = balanced_split(labels, 0.2, seed=1)
    assert torch.equal(balanced_split(labels, 0.2, seed=1, pictures=np.arange(300)), plain)


def folded(folder: Path, *, several: bool = False, **options: Any) -> tuple[Benchmark, Data]:
    table = own.write_csv(folder, per_class=6, several=several, split=False)
    benchmark = own_benchmark(table, {"folds": 3, **options})
    return benchmark, benchmark.tasks[0].read(table, {})


def rows_of(protocol: str, benchmark: Benchmark, data: Data, where: Path, encoder: NativeEncoder) -> list[Row]:
    task = next(each for each in benchmark.tasks if each.protocol == protocol)
    evaluate = pkgutil.resolve_name(PROTOCOLS[protocol][0])
    return evaluate(Measurement(encoder, data, task, FAST, context(where)))


@pytest.mark.parametrize("protocol", ["logistic", "linear", "knn", "few_shot"])
def test_the_figure_of_all_folds_is_that_of_each_alone(tmp_path: Path, protocol: str) -> None:
    """One figure over all images against its literal form: each fold as a data set of its own."""
    benchmark, data = folded(tmp_path)
    test, folds, encoder = data.splits["test"], data.folds, small_encoder()
    assert folds is not None
    assert np.bincount(folds).tolist() == [12, 12, 12]
    found = rows_of(protocol, benchmark, data, tmp_path / "all", encoder)
    right = Counter[tuple[str, str]]()
    for fold in range(3):
        learnt, rows = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        alone = Data({"train": test.chosen(learnt), "test": test.chosen(rows)}, data.class_names, data.variant)
        for row in rows_of(protocol, benchmark, alone, tmp_path / "alone", encoder):
            assert (row.n_train, row.n_test) in ((24, 12), (22, 12), (9, 12), (3, 12))
            right[row.metric, row.variant] += row.value * 12
    for row in found:
        assert row.n_test == 36
        assert 0 <= row.low <= row.value <= row.high <= 1
        assert row.value == pytest.approx(right[row.metric, row.variant] / 36, abs=1e-9)  # folds are balanced
        assert "3 folds, seed 0" in row.variant


def test_several_labels_are_ranked_over_all_folds(tmp_path: Path) -> None:
    benchmark, data = folded(tmp_path, several=True)
    rows = rows_of("multilabel", benchmark, data, tmp_path, small_encoder())
    assert (rows[0].n_train, rows[0].n_test) == (24, 36)
    assert rows[0].value > 0.9 > 0.6 > (rows[0].chance or 1)
    assert {len(values) for values in rows[0].settings["C"].values()} == {3}


@pytest.mark.parametrize("stated", [False, True])
def test_each_image_passes_the_backbone_once_per_resolution_for_all_protocols_and_folds(
    tmp_path: Path, stated: bool
) -> None:
    benchmark, data = folded(tmp_path)
    encoder, seen = counting()
    where = dataclasses.replace(context(tmp_path), preprocessing=encoder.preprocessing if stated else None)
    for protocol in ("linear", "logistic", "knn", "few_shot"):  # as the runner has them
        task = next(each for each in benchmark.tasks if each.protocol == protocol)
        evaluate = pkgutil.resolve_name(PROTOCOLS[protocol][0])
        evaluate(Measurement(encoder, data, task, FAST, where))
    # As published, the crops of the regression and few shots differ from those of k-NN and the grid.
    assert sum(seen) == (36 if stated else 2 * 36)


def test_a_folder_and_a_table_of_the_same_images_give_the_same_figures(tmp_path: Path) -> None:
    folder = own.write(tmp_path, per_class=4)
    (folder / "amber" / ".hidden.jpg").unlink()
    files = sorted(folder.glob("*/*.jpg"), key=lambda path: path.name)
    table = tmp_path / "labels.csv"
    table.write_text("path,label\n" + "".join(f"{path.relative_to(tmp_path)},{path.parent.name}\n" for path in files))
    values = []
    for path in (folder, table):
        benchmark = own_benchmark(path, {})
        data = benchmark.tasks[0].read(path, {})
        found = [
            row
            for task in benchmark.tasks
            if task.protocol != "attention"  # which runs where it is named, and trains for minutes
            for row in rows_of(task.protocol, benchmark, data, tmp_path / f"features of {path.stem}", small_encoder())
        ]
        values.append([(row.key, row.value, row.low, row.high) for row in found])
    assert values[0] == values[1]


def test_what_cannot_be_folded_is_said(tmp_path: Path) -> None:
    def classes(name: str, *counts: int) -> Path:
        for label, count in enumerate(counts):
            for number in range(count):
                save(pattern(label, 50 * label + number), tmp_path / name / "abcd"[label] / f"{number}.png", "PNG")
        return tmp_path / name

    def said(path: Path, **options: Any) -> list[str]:
        return own_benchmark(path, options).tasks[0].read(path, {}).extra["warnings"]

    assert said(classes("enough", 5, 6)) == []
    few, lone = said(classes("few", 9, 8, 3, 1))
    assert "fewer pictures than the 5 folds, which not every fold tests: c" in few
    assert "1 of 21 images are of classes of a single picture" in lone
    assert "when it is tested: d" in lone
    with pytest.raises(UserError, match="too few to test some: expected two pictures each of two classes"):
        own_benchmark(classes("short", 7, 1), {})
    for label in "ab":
        for number in range(6):
            save(
                Image.new("RGB", (32, 32), "red" if label == "a" else "blue"),
                tmp_path / "flat" / label / f"{number}.png",
                "PNG",
            )
    (warning,) = said(tmp_path / "flat")
    assert warning == "copies lie in several folds, as these classes are one picture only: a, b"
    with pytest.raises(UserError, match=r"own\.folds=5 and own\.test_share exclude each other"):
        own_benchmark(tmp_path / "enough", {"folds": 5, "test_share": 0.3})
    with pytest.raises(UserError, match=r"own\.folds=5: folds are for labelled images, .* holds masks"):
        own_benchmark(own.write_masks(tmp_path, per_class=2), {"folds": 5})
    assert own_benchmark(tmp_path / "enough", {}).splits == "11 in 5 folds"
    assert own_benchmark(tmp_path / "enough", {"test_share": 0.3}).splits == "7 / 4"


def test_resamples_draw_folds_and_pictures() -> None:
    plain = list(resample(9, samples=4, seed=3))
    rng = np.random.default_rng(3)
    assert [each.tolist() for each in plain] == [
        np.bincount(rng.integers(0, 9, size=9), minlength=9).tolist() for _ in range(4)
    ]
    pictures, folds = np.array([0, 0, 2, 3, 3, 3, 6, 7, 8]), np.array([0, 0, 0, 1, 1, 1, 1, 2, 2])
    counts = np.array(list(resample(9, samples=4000, seed=0, clusters=Clusters(pictures, folds))))
    assert (counts[:, 0] == counts[:, 1]).all()  # copies come together
    assert (counts[:, 3] == counts[:, 5]).all()
    drawn = np.stack([counts[:, [0, 2]].sum(1), counts[:, [3, 6]].sum(1), counts[:, [7, 8]].sum(1)]) // 2
    assert (drawn.sum(axis=0) == 2).all()  # two of the three folds, with as many pictures as they have
    assert counts.mean(axis=0) == pytest.approx(np.full(9, 2 / 3), abs=0.06)


def intervals(count: int, samples: int, datasets: int, classes: int, dim: int, apart: float) -> np.ndarray:
    """(datasets, 3): whether the accuracy that fresh training sets reach on average lies in the interval over folds,
    whether it does in that over test images alone, and the width of the former. A ridge regression on normal classes.
    """
    rng = np.random.default_rng(0)
    means = rng.normal(size=(classes, dim)) * apart / np.sqrt(2 * dim)

    def drawn(number: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.permutation(np.arange(number) % classes)
        return means[labels] + rng.normal(size=(number, dim)), labels

    def answers(x: np.ndarray, y: np.ndarray, test: np.ndarray) -> np.ndarray:
        centred, targets = x - x.mean(axis=0), np.eye(classes)[y]
        weights = np.linalg.solve(centred.T @ centred + 30 * np.eye(dim), centred.T @ targets)
        return ((test - x.mean(axis=0)) @ weights + targets.mean(axis=0)).argmax(axis=1)

    fresh = [(drawn(count * 4 // 5), drawn(2000)) for _ in range(30)]
    truth = np.mean([(answers(*learnt, x) == y).mean() for learnt, (x, y) in fresh])
    found = []
    for _ in range(datasets):
        x, y = drawn(count)
        folds = deal(y, 5, 0, alone(count))
        said = np.empty(count, dtype=np.int64)
        for fold in range(5):
            said[folds == fold] = answers(x[folds != fold], y[folds != fold], x[folds == fold])
        ours = draws_interval(said[None], y, "top-1", samples, clusters=Clusters(folds=folds))
        naive = draws_interval(said[None], y, "top-1", samples)
        found.append((ours.low <= truth <= ours.high, naive.low <= truth <= naive.high, ours.high - ours.low))
    return np.array(found, dtype=np.float64)


def test_the_interval_over_folds_covers_the_accuracy_of_fresh_training_sets() -> None:
    ours, naive, width = intervals(200, samples=100, datasets=80, classes=5, dim=32, apart=3.0).mean(axis=0)
    assert 0.90 <= ours <= 0.99
    assert naive < ours
    assert width < 0.22


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "classes", "dim", "apart"),
    [(200, 2, 32, 1.0), (200, 5, 64, 3.0), (300, 3, 384, 4.0), (300, 10, 128, 6.0), (400, 5, 64, 4.0)],
)
def test_the_interval_over_folds_covers_in_19_of_20_cases(count: int, classes: int, dim: int, apart: float) -> None:
    ours, naive, width = intervals(count, 400, 400, classes, dim, apart).mean(axis=0)
    print(f"{count} labels, {classes} classes, width {dim}: {ours:.1%}, images alone {naive:.1%}, width {width:.3f}")
    assert 0.90 <= ours <= 0.985


def test_figures_of_the_same_folds_compare_in_pairs() -> None:
    labels, folds = np.arange(60) % 3, np.arange(60) % 5
    one = np.where(np.arange(60) % 4 == 0, (labels + 1) % 3, labels)
    clusters = Clusters(folds=folds)
    first, again = (draws_interval(one[None], labels, "top-1", 50, 7, clusters) for _ in range(2))
    assert np.array_equal(first.replicates, again.replicates)
    weighed = bootstrap_statistic(60, lambda weights: float(weights @ (one == labels) / weights.sum()), 50, 7, clusters)
    np.testing.assert_allclose(first.replicates, weighed.replicates, rtol=1e-12)


@pytest.mark.slow
def test_nothing_is_mean_count_copies_of_noise(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        for number in range(20):
            noise = Image.fromarray(rng.integers(0, 255, (8, 8, 3)).astype(np.uint8)).resize((48, 48))
            for copy in range(3):
                save(noise, tmp_path / "copies" / label / f"{number:02d}_png.rf.{copy}.png", "PNG")
    torch.save(small_vit().state_dict(), tmp_path / "small.pth")
    options = [f"weights={tmp_path}/small.pth", f"out={tmp_path}/out", "workers=0", "examples=0", "report=false"]
    assert main(["eval", str(tmp_path / "copies"), *options, "protocols=knn,logistic", "knn.k=20"]) == 0
    (path,) = (tmp_path / "out").glob("eval/*/copies.json")
    found = json.loads(path.read_text())
    assert set(found["baseline_rows"]) == {"random init", "raw pixels"}
    for row in [*found["rows"], *(row for rows in found["baseline_rows"].values() for row in rows)]:
        assert row["n_test"] == 120
        assert row["low"] <= 0.5 <= row["high"]


def test_of_copies_of_noise_chance_is_in_the_interval_in_19_of_20_cases() -> None:
    rng = np.random.default_rng(1)
    pictures = np.repeat(np.arange(40), 3)
    labels = pictures // 20
    found = []
    for _ in range(60):
        x = torch.from_numpy(rng.normal(size=(40, 24))[pictures].astype(np.float32))
        folds = deal(labels, 5, 0, Copies(alone(120).digests, pictures * 3))
        said = np.empty(120, dtype=np.int64)
        for fold in range(5):
            learnt, rows = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
            votes = knn_predict(x[learnt], torch.from_numpy(labels[learnt]), x[rows], 2, [20], 0.07)
            said[rows] = votes[20].argmax(dim=-1).numpy()
        interval = draws_interval(said[None], labels, "top-1", 100, clusters=Clusters(pictures, folds))
        found.append((interval.low <= 0.5 <= interval.high, (said == labels).mean()))
    covered, mean = np.array(found, dtype=np.float64).mean(axis=0)
    assert 0.90 <= covered <= 0.99
    assert mean == pytest.approx(0.5, abs=3 * 0.1 / np.sqrt(60))
