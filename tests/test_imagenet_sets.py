"""ImageNet-1k's other sets: each picture has its class, answers are among those that there are, features are shared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from encoders import context, small_encoder

from dinoreg.evaluation.benchmark import find_benchmark
from dinoreg.evaluation.data import Data
from dinoreg.evaluation.metrics.knn_rankme import knn_predict
from dinoreg.evaluation.options import EvalOptions, KnnOptions, LinearOptions
from dinoreg.evaluation.protocols import classification, few_shot, linear
from dinoreg.evaluation.protocols.classification import RESIZE, class_tokens, corruption_rows
from dinoreg.evaluation.protocols.measurement import Measurement
from tests.miniatures import imagenet1k, imagenet_c
from tests.miniatures.pictures import pattern, save
from tests.reading import pairs, read, write

OPTIONS = EvalOptions(
    knn=KnnOptions(k=(3,)),
    linear=LinearOptions(lrs=(0.01, 0.1), blocks=(1,), epochs=1, epoch_steps=4, batch_size=16, augment=False),
)
FACTS = {  # set: (classes, images, published figures)
    "imagenet_v2": (1000, 10_000, [70.9, 75.1, 78.0, 78.4, 71.0, 75.6, 78.5, 78.8]),
    "imagenet_sketch": (1000, 50_889, [41.2, 50.6, 59.3, 62.5]),
    "imagenet_a": (200, 7_500, [33.5, 55.1, 71.3, 75.9]),
    "imagenet_r": (200, 30_000, [53.7, 63.3, 74.4, 78.8]),
    "imagenet_c": (1000, 15 * 5 * 50_000, [54.4, 42.7, 31.5, 28.2]),
}


def measured(name: str, data: Data, where: Path, protocol: str = "knn") -> Measurement:
    task = next(task for task in find_benchmark(name).tasks if task.protocol == protocol)
    return Measurement(small_encoder(), data, task, OPTIONS, context(where))


@pytest.mark.parametrize("name", FACTS)
def test_declared_facts_are_those_of_the_papers(name: str) -> None:
    classes, images, published = FACTS[name]
    benchmark = find_benchmark(name)
    grid, neighbours = (task for task in benchmark.tasks if not task.asked)
    assert (grid.protocol, neighbours.protocol, grid.metric) == ("linear", "knn", "top-1")
    assert (benchmark.classes, grid.counts) == (classes, {"train": 1_281_167, "test": images})
    assert [each.value for each in grid.published] == published
    assert {each.metric for each in grid.published} == {"mCE" if name == "imagenet_c" else ""}


@pytest.mark.parametrize("name", FACTS)
def test_a_picture_has_the_class_of_its_folder_and_what_is_learnt_is_imagenets(name: str, tmp_path: Path) -> None:
    write(name, tmp_path)
    data, imagenet = read(name, tmp_path), read("imagenet1k", tmp_path)
    for path, label in pairs(data, "test"):
        said = Path(path).parent.name
        assert said == (str(label) if name == "imagenet_v2" else imagenet1k.WNIDS[label])
        assert Path(path).suffix == ".JPEG"
    assert pairs(data, "train") == pairs(imagenet, "train")
    assert data.splits["train"].source.stamp() == imagenet.splits["train"].source.stamp()
    assert data.class_names == imagenet.class_names
    elsewhere = tmp_path / "moved"
    (tmp_path / "imagenet1k").rename(elsewhere)
    assert len(read(name, tmp_path, imagenet=str(elsewhere)).splits["train"]) == 24


@pytest.mark.parametrize("name", ["imagenet_c", "imagenet_sketch"])
def test_archives_that_were_unpacked_beside_other_data_are_read_without_it(name: str, tmp_path: Path) -> None:
    folder = write(name, tmp_path)
    expected = [label for _, label in pairs(read(name, tmp_path), "test")]
    for path in folder.iterdir():
        path.rename(tmp_path / path.name)
    folder.rmdir()
    save(pattern(0, 0), tmp_path / "holidays" / "1.jpg")
    assert [label for _, label in pairs(read(name, tmp_path), "test")] == expected


def test_folders_of_v2_are_ranks_though_ten_sorts_before_two(tmp_path: Path) -> None:
    for label in range(12):
        for part in ("imagenet1k/train", "imagenet1k/val"):
            save(pattern(label, label), tmp_path / part / f"n{label:08d}" / "a.JPEG")
        save(pattern(label, label), tmp_path / "imagenet_v2" / str(label) / "b.jpeg")
    found = pairs(read("imagenet_v2", tmp_path), "test")
    assert {Path(path).parent.name: label for path, label in found} == {str(label): label for label in range(12)}


def test_training_features_of_imagenet_are_not_extracted_again(tmp_path: Path) -> None:
    for name in ("imagenet_v2", "imagenet_a"):
        write(name, tmp_path)
    for protocol, evaluate in (("linear", linear.evaluate), ("knn", classification.knn)):
        evaluate(measured("imagenet1k", read("imagenet1k", tmp_path), tmp_path, protocol))
        for name in ("imagenet_v2", "imagenet_a"):
            found = measured(name, read(name, tmp_path), tmp_path, protocol)
            inner, seen = found.encoder._layers, list[int]()
            found.encoder._layers = lambda x, *rest, inner=inner, seen=seen: seen.append(len(x)) or inner(x, *rest)  # type: ignore[method-assign,func-returns-value,misc]
            evaluate(found)
            assert sum(seen) == (len(found.data.splits["test"]) if protocol == "linear" else 0)


def test_an_answer_is_the_largest_logit_of_the_classes_that_there_are(tmp_path: Path) -> None:
    write("imagenet_a", tmp_path)
    data = read("imagenet_a", tmp_path)
    test = data.splits["test"]
    assert test.among.tolist() == [0, 2]
    train = data.splits["train"]
    said = {}
    for split in (train, replace(train, among=None)):
        grid = linear.Grid(small_encoder(), split, np.arange(len(train)), OPTIONS.linear, context(tmp_path))
        features = grid.features(test, "test")
        grid.start(features.shape[2])
        for kind in grid.maps:
            torch.nn.init.normal_(grid.maps[kind].weight, generator=torch.Generator().manual_seed(3))
        _, said[split.among is None], _ = grid.scores(features, test.labels, "top-1")
    with torch.no_grad():
        logits = grid.logits(torch.from_numpy(np.array(features)))
    for kind, each in logits.items():
        for place, name in enumerate(grid.names(kind)):
            expected = [max((0, 2), key=lambda label: float(row[place, label])) for row in each]
            assert said[False][name].tolist() == expected
    assert any(set(each.tolist()) - {0, 2} for each in said[True].values())
    row = linear.evaluate(measured("imagenet_a", data, tmp_path, "linear"))[0]
    assert (row.chance, row.majority) == (0.5, 0.5)


def test_only_training_images_of_the_classes_that_there_are_vote(tmp_path: Path) -> None:
    write("imagenet_a", tmp_path, per_class=8)
    data = read("imagenet_a", tmp_path)
    found = measured("imagenet_a", data, tmp_path)
    row = classification.knn(found)[0]
    bank, queries = (
        class_tokens(found, data.splits[split].source, split, resize=RESIZE) for split in ("train", "test")
    )
    kept = torch.from_numpy(np.isin(data.splits["train"].labels, [0, 2]))
    labels = torch.from_numpy(data.splits["train"].labels)[kept]
    votes = knn_predict(bank[kept], labels, queries, 4, (3,))[3]
    assert row.value == pytest.approx((votes.argmax(-1).numpy() == data.splits["test"].labels).mean())
    assert row.n_train == int(kept.sum()) == 12


def test_the_mean_corruption_error_is_its_literal_form(tmp_path: Path) -> None:
    write("imagenet_c", tmp_path)
    data = read("imagenet_c", tmp_path)
    test = data.splits["test"]
    predicted = np.where(np.random.default_rng(0).random(len(test)) < 0.6, test.labels, 3)
    (row,) = corruption_rows(measured("imagenet_c", data, tmp_path), test, predicted)
    reference = data.extra["reference_errors"]
    assert list(reference) == [kind for kinds in imagenet_c.GROUPS.values() for kind in kinds]
    ratios = []
    for corruption, alexnet in reference.items():
        paths = [number for number in range(len(test)) if f"/{corruption}/" in test.source.name(number)]
        assert len(paths) == 8
        error = sum(predicted[number] != test.labels[number] for number in paths) / 8
        assert row.details["errors"][corruption] == pytest.approx(error)
        ratios.append(error / alexnet)
    assert row.value == pytest.approx(sum(ratios) / 15)
    assert (row.metric, row.higher_is_better) == ("mCE", False)
    assert row.low < row.value < row.high
    alone = replace(data, extra={})
    assert corruption_rows(measured("imagenet_c", alone, tmp_path), test, predicted) == []


def test_corrupted_pictures_are_seen_whole_and_both_layouts_are_one(tmp_path: Path) -> None:
    imagenet_c.write(tmp_path / "flat")
    imagenet_c.write(tmp_path / "grouped", grouped=True)
    flat, grouped = (read("imagenet_c", tmp_path / kind) for kind in ("flat", "grouped"))
    test = flat.splits["test"]
    images = [test.source.read(number) for number in range(len(test))]
    assert sorted(images) == sorted(grouped.splits["test"].source.read(number) for number in range(len(test)))
    assert len(test) == 15 * 2 * 4
    where = context(tmp_path, image_size=32)
    assert repr(where.crop(test.source, RESIZE)) == repr(where.crop(flat.splits["train"].source))
    assert where.crop(flat.splits["train"].source, RESIZE).resize > 32


def test_regressions_choose_among_the_classes_that_there_are(tmp_path: Path) -> None:
    write("imagenet_a", tmp_path, per_class=8)
    data = read("imagenet_a", tmp_path)
    rows = classification.logistic(measured("imagenet_a", data, tmp_path))
    said = np.array(rows[0].details["confusion"]).sum(axis=0)
    assert said[[0, 2]].sum() == len(data.splits["test"])
    assert said.sum() == said[[0, 2]].sum()
    assert rows[0].chance == 0.5

    train = data.splits["train"]
    features = torch.randn(len(train), 6, generator=torch.Generator().manual_seed(1))
    asked = torch.randn(200, 6, generator=torch.Generator().manual_seed(2))
    given = {"seed": 0, "device": "cpu", "metric": "top-1"}
    *_, model = few_shot.fitted(features, train, few_shot.spread(features), OPTIONS.logistic, **given)
    found, everything = model.predict(asked, train.answers), model.predict(asked)
    assert set(found.tolist()) == {0, 2}
    assert set(everything.tolist()) == {0, 1, 2, 3}
    # What is an answer already stays one.
    kept = torch.isin(everything, torch.tensor([0, 2]))
    assert torch.equal(found[kept], everything[kept])
