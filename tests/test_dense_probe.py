"""The probe of patches inside a run: its figures against literal forms, its images, its event, and what follows it."""

from __future__ import annotations

import json
import math
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import on_processes
from torch import Tensor
from training import read_lines, setup_of, tiny_config

from dinoreg.checkpoint import format as checkpoint
from dinoreg.checkpoint.run_folder import Run
from dinoreg.checkpoint.steps import dense_in_words, which_steps
from dinoreg.commands.doctor import examine_run
from dinoreg.config.load import Config
from dinoreg.data.open import open_source
from dinoreg.distributed.process_group import ALONE, session
from dinoreg.evaluation.metrics.bootstrap import bootstrap_interval
from dinoreg.evaluation.metrics.dense_structure import k_means, structure
from dinoreg.reports.html import run_charts
from dinoreg.runtime.errors import RunError, UserError
from dinoreg.scenes.render import NUM_CLASSES, render
from dinoreg.train import loop, metrics
from dinoreg.train.health import REMEDIES, Health
from dinoreg.train.logger import SilentLog
from dinoreg.train.metrics import ProbeRunner
from dinoreg.train.probes import DenseProbe, Measured, build_dense, build_probe, segment
from dinoreg.train.state import build_networks

CPU = torch.device("cpu")


def dense_of(config: Config) -> DenseProbe:
    assert config.data.source is not None
    dense = build_dense(config, build_probe(config, open_source(config.data.source)), patch_size=8)
    assert dense is not None
    return dense


# ----------------------------------------------------------------------------------------------------------------
# The label-free score


def literal_means(points: np.ndarray, k: int) -> np.ndarray:
    """Labels of one set of points: centres drawn by squared distance, then moved twenty times."""
    draws = np.random.default_rng(0).random(k)
    centres = [points[int(draws[0] * len(points))]]
    for draw in draws[1:]:
        squared = [min(((point - centre) ** 2).sum() for centre in centres) for point in points]
        total, chosen = squared[0], 0
        while total <= draw * sum(squared):
            chosen += 1
            total += squared[chosen]
        centres.append(points[chosen])
    for step in range(21):
        labels = np.array([int(np.argmin([((p - c) ** 2).sum() for c in centres])) for p in points])
        if step < 20:
            centres = [points[labels == i].mean(axis=0) if (labels == i).any() else c for i, c in enumerate(centres)]
    return labels


def literal_width(points: np.ndarray, labels: np.ndarray) -> float:
    """The mean over clusters of the nuclear norm of the centred points, scaled as in the paper."""
    widths = []
    for cluster in set(labels.tolist()):
        rows = points[labels == cluster]
        if len(rows) > 1:
            norm = np.linalg.norm(rows - rows.mean(axis=0), ord="nuc")
            widths.append(norm / math.sqrt(max(len(rows) - 1, points.shape[1])))
    return float(np.mean(widths)) if widths else 0.0


def literal_dse(patches: Tensor) -> tuple[float, float]:
    """Separability and dimension of 8k pictures, sum by sum."""
    x = patches.double().numpy()
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    n, count, dim = x.shape
    radius = np.mean([np.linalg.norm(row - x.mean(axis=(0, 1))) for row in x.reshape(-1, dim)])
    apart, of_groups, of_pictures = [], [], []
    for group in x.reshape(n // 8, 8, count, dim):
        points = group.reshape(-1, dim)
        labels, centres = (each[0].numpy() for each in k_means(torch.from_numpy(points)[None], 24))
        others = [[np.linalg.norm(p - c) for i, c in enumerate(centres) if i != own] for p, own in zip(points, labels)]
        apart.append(np.mean([min(distances) for distances in others]))
        of_groups.append(literal_width(points, labels))
        of_pictures += [literal_width(picture, literal_means(picture, 3)) for picture in group]
    ranks = []
    for patch in range(8):
        singular = np.linalg.svd(x[:, patch], compute_uv=False)
        share = singular / singular.sum()
        ranks.append(math.exp(-(share * np.log(share)).sum()) / min(n, dim))
    gap = np.mean(apart) - (np.mean(of_groups) + np.mean(of_pictures)) / 2
    return float(gap / radius), float(np.mean(ranks))


def planted(classes: Tensor, dim: int, noise: float) -> Tensor:
    """Features that are a corner for each class, and noise."""
    return torch.nn.functional.one_hot(classes, dim).float() + noise * torch.randn(*classes.shape, dim)


def test_clusters_are_those_of_a_literal_computation() -> None:
    torch.manual_seed(0)
    sets = torch.randn(3, 41, 5).double()
    labels, centres = k_means(sets, 7)
    for points, found, middles in zip(sets, labels, centres):
        assert found.tolist() == literal_means(points.numpy(), 7).tolist()
        assert torch.equal(torch.cdist(points, middles).argmin(dim=1), found)


def test_dse_is_its_formula_written_out() -> None:
    torch.manual_seed(0)
    patches = planted(torch.randint(0, 6, (24, 9)), 7, 0.3)
    separability, dimension, interval = structure(torch.cat([patches, torch.randn(3, 9, 7)]))  # a rest is left out
    assert (separability, dimension) == pytest.approx(literal_dse(patches), rel=1e-5)
    without = [sum(structure(torch.cat([patches[: 8 * g], patches[8 * g + 8 :]]))[:2]) for g in range(3)]
    assert interval.low < separability + dimension < interval.high
    # The jackknife; that the mean of all patches is kept where a group is left out, makes a little difference.
    assert interval.high - interval.low == pytest.approx(2 * np.ptp(without), rel=0.35)
    assert structure(patches)[:2] == (separability, dimension)


def test_dse_is_high_for_clusters_lower_for_noise_and_least_for_equal_patches() -> None:
    torch.manual_seed(0)
    kinds = {
        "clusters": planted(torch.randint(0, 20, (32, 16)), 32, 0.02),
        "noise": torch.randn(32, 16, 32),
        "nearly equal": torch.randn(32) + 0.1 * torch.randn(32, 16, 32),
        "equal": torch.ones(32, 16, 32) + 1e-9 * torch.randn(32, 16, 32),
    }
    found = {name: structure(patches) for name, patches in kinds.items()}
    scores = {name: separability + dimension for name, (separability, dimension, _) in found.items()}
    assert scores["clusters"] > scores["noise"] + 0.2 > scores["nearly equal"] + 0.8
    assert scores["equal"] == pytest.approx(1 / 32, abs=0.02)
    assert all(found[name][2].low < scores[name] < found[name][2].high for name in ("clusters", "noise"))


def test_a_broken_feature_makes_the_score_nan() -> None:
    patches = torch.randn(16, 9, 7)
    patches[3, 2, 1] = math.inf
    assert all(map(math.isnan, structure(patches)[:2]))


# ----------------------------------------------------------------------------------------------------------------
# Segmentation by neighbours


def literal_miou(patches: Tensor, truth: Tensor, bank: int, num_classes: int) -> tuple[float, float]:
    """mIoU and share of right pixels: every patch by its 20 nearest in the bank, every pixel counted on its own."""
    known = []
    for image, pixels in zip(patches[:bank], truth[:bank]):
        for patch, values in zip(image, pixels.tolist()):
            label, _ = min(Counter(values).items(), key=lambda item: (-item[1], item[0]))
            if label != 255:
                known.append((patch / patch.norm(), label))
    right, true, guessed = Counter[int](), Counter[int](), Counter[int]()
    for image, pixels in zip(patches[bank:], truth[bank:]):
        for patch, values in zip(image, pixels.tolist()):
            cosines = [float(other @ patch / patch.norm()) for other, _ in known]
            votes = np.zeros(num_classes)
            for i in sorted(range(len(known)), key=lambda i: -cosines[i])[:20]:
                votes[known[i][1]] += math.exp(cosines[i] / 0.07)
            found = int(votes.argmax())
            for value in values:
                if value != 255:
                    right[value] += value == found
                    true[value] += 1
                    guessed[found] += 1
    shares = [right[c] / (true[c] + guessed[c] - right[c]) for c in range(num_classes) if true[c] + guessed[c]]
    return sum(shares) / len(shares), sum(right.values()) / sum(true.values())


def test_segmentation_by_neighbours_is_a_literal_count_of_pixels() -> None:
    torch.manual_seed(0)
    truth = torch.randint(0, 4, (9, 6, 5)).byte()
    truth[torch.rand(9, 6, 5) < 0.3] = 255
    patches = planted(truth[:, :, 0].long().clamp(max=3), 7, 0.4)
    confusion = segment(patches, truth, 5, 4)
    expected = literal_miou(patches, truth, 5, 4)
    assert (confusion.miou(), confusion.pixel_accuracy()) == pytest.approx(expected, rel=1e-9)
    assert confusion.num_images == 4


@pytest.mark.parametrize(("kind", "expected"), [("perfect", 1.0), ("random", 1 / 7), ("collapsed", 1 / 16)])
def test_perfect_random_and_collapsed_patches_are_told_apart(kind: str, expected: float) -> None:
    """Four classes of equal share: guessing has an IoU of (1/16) / (2/4 - 1/16), one answer of 1/4 for one class."""
    torch.manual_seed(0)
    classes = torch.arange(40 * 32).view(40, 32).remainder(4)
    classes = classes.flatten()[torch.randperm(classes.numel())].view(40, 32)
    features = {
        "perfect": planted(classes, 8, 0.05),
        "random": torch.randn(40, 32, 8),
        "collapsed": torch.ones(40, 32, 8),
    }[kind]
    confusion = segment(features, classes[..., None].expand(-1, -1, 3).byte(), 20, 4)
    assert confusion.miou() == pytest.approx(expected, abs=0.025)


# ----------------------------------------------------------------------------------------------------------------
# Images and masks


def test_scenes_have_the_masks_that_they_are_drawn_with() -> None:
    config = tiny_config(probe__every=1, probe__dense="scenes:count=10,first=500,size=32")
    dense = dense_of(config)
    assert dense.truth is not None
    assert (dense.pictures.in_bank, dense.pictures.num_classes, len(dense.pictures.images)) == (5, 1 + NUM_CLASSES, 10)
    drawn = {render(i, 32).image.transpose(2, 0, 1).tobytes(): render(i, 32).segmentation for i in range(500, 510)}
    for image, places, truth in zip(dense.pictures.images, dense.places.tolist(), dense.truth):
        mask = drawn.pop(image.numpy().tobytes())
        assert sorted(places) == list(range(16))
        for place, pixels in zip(places, truth):
            top, left = 8 * (place // 4), 8 * (place % 4)
            assert np.array_equal(pixels.numpy().reshape(8, 8), mask[top : top + 8, left : left + 8])
    assert drawn == {}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Pictures of 40 x 70 and 90 x 50 whose blue tells the class of every pixel: 0, 1 or 255, in blocks."""
    for index in range(9):
        split, shape = "train" if index < 5 else "val" if index < 8 else "test", ((40, 70), (90, 50))[index % 2]
        rng = np.random.default_rng(index)
        mask = rng.choice(np.array([0, 1, 255], dtype=np.uint8), (4, 4), p=(0.4, 0.4, 0.2))
        mask = np.array(Image.fromarray(mask).resize(shape[::-1], Image.Resampling.NEAREST))
        image = rng.integers(0, 255, (*shape, 3), dtype=np.uint8)
        image[..., 2] = np.where(mask == 255, 120, 240 * mask)
        for kind, pixels in (("images", image), ("masks", mask)):
            (tmp_path / kind / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / kind / split / f"{index}.png")
    return tmp_path


def test_masks_of_a_folder_are_cut_as_its_pictures_are(pairs: Path) -> None:
    dense = dense_of(tiny_config(probe__every=1, probe__dense=str(pairs)))
    assert dense.truth is not None
    assert (dense.pictures.in_bank, len(dense.pictures.images), dense.pictures.num_classes) == (5, 8, 2)
    blue = (
        dense.pictures.images[:, 2].unflatten(1, (4, 8)).unflatten(3, (4, 8)).transpose(2, 3).flatten(3).flatten(1, 2)
    )
    blue = blue.take_along_dim(dense.places[..., None], dim=1)
    shown = torch.where(blue < 60, 0, torch.where(blue > 180, 1, 255))
    assert (shown == dense.truth).float().mean() > 0.93  # all but the mixed pixels of edges


def test_masks_of_other_numbers_need_to_be_told_and_say_so(pairs: Path) -> None:
    def refusal(**options: Any) -> str:
        with pytest.raises(UserError) as caught:
            dense_of(tiny_config(probe__every=1, **options))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    told = dense_of(tiny_config(probe__every=1, probe__dense=str(pairs), probe__dense_values="[255,1]"))
    assert told.truth is not None
    plain = dense_of(tiny_config(probe__every=1, probe__dense=str(pairs))).truth
    assert torch.equal(told.truth == 0, plain == 255)
    assert "no mask has a pixel of 7" in (line := refusal(probe__dense=str(pairs), probe__dense_values="[0,7]"))
    assert "probe.dense_values=[0,1] lists" in line
    assert "expected a folder of images/ with masks/" in refusal(probe__dense=str(pairs / "images"))
    assert "nowhere" in refusal(probe__dense=str(pairs / "nowhere"))
    assert "2 or more images" in refusal(probe__dense="scenes:count=3,size=32")
    assert "probe.dense=FOLDER" in refusal(probe__metric="dense_miou")


def test_without_masks_the_score_is_of_the_class_tokens_own_images() -> None:
    config = tiny_config(probe__every=1, probe__num_images=20)
    probe = build_probe(config, open_source("scenes:count=50,size=40"))
    dense = build_dense(config, probe, patch_size=8)
    assert probe is not None
    assert dense is not None
    assert torch.equal(dense.pictures.images, probe.images)
    measured = dense.measure(build_networks(config)[1]["backbone"], CPU, torch.float32).values
    assert set(measured) == {"dse", "dse_low", "dse_high", "dse_separability", "dse_dimension", "probe_time"}
    assert build_dense(config, None, patch_size=8) is None


# ----------------------------------------------------------------------------------------------------------------
# Within a run

Figures = tuple[float, float, float]  # k-NN accuracy, mIoU, DSE


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "bootstrap_interval", partial(bootstrap_interval, samples=200))


def follow(
    figures: list[Figures], metric: str = "knn_top1", masks: bool = True, grace: int = 0
) -> tuple[list[int], list[Any]]:
    """The best steps, and the events with their steps, of a run whose probes at steps 0, 1, … find these figures.

    100 images are tested; a difference of dense figures below 0.028 may be chance.
    """
    config = tiny_config(probe__every=1, probe__max_share=1.0, probe__dense="scenes", probe__metric=metric)
    rng = np.random.default_rng(0)

    def look(_: Any) -> Measured:
        top1, miou, dse = next(values)
        found = {"dse": dse} | ({"dense_miou": miou} if masks else {})
        replicates = {name: each + rng.normal(0, 0.01, 200) for name, each in found.items()}
        return Measured({"rankme": 3.0, "knn_top1": top1, **found, "probe_time": 1e-6}, top1 > RANKS, replicates)

    events: list[Any] = []
    monitor: Any = SimpleNamespace(ranks=ALONE, pause=lambda _: None, log=SilentLog(), health=Health(24, grace=grace))
    monitor.report = lambda step, found: events.extend((step, each) for each in found)
    probe: Any = SimpleNamespace(images=range(200), in_bank=100, source=None)
    runner = ProbeRunner(setup_of(config, len(figures)), probe, monitor)
    runner._measure = look  # type: ignore[method-assign]
    state: Any = SimpleNamespace(step=0, history={}, teacher=SimpleNamespace(backbone=None))
    best, values = [], iter(figures)
    for step in range(len(figures)):
        state.step, state.history = step, json.loads(json.dumps(state.history))  # as a checkpoint gives it back
        if runner.run(state):
            best.append(step)
    return best, events


RANKS = (np.arange(100) + 0.5) / 100
RISING = [(0.2 + 0.06 * step, 0.1 + 0.02 * step, 0.8 + 0.02 * step) for step in range(10)]
# The class token goes on, the patches are best at step 4.
DECAYING = [
    (top1, miou - 0.04 * max(s - 4, 0), dse - 0.04 * max(s - 4, 0)) for s, (top1, miou, dse) in enumerate(RISING)
]


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize(
    ("masks", "said"), [(True, "dense_miou 0.180 at step 4 to 0.100"), (False, "dse 0.880 at step 4")]
)
def test_patches_that_decay_while_the_class_token_improves_are_named_once(masks: bool, said: str) -> None:
    _, events = follow(DECAYING, masks=masks)
    assert [(step, event.name) for step, event in events] == [(8, "dense-decay")]  # by more than chance since step 6
    assert f"patches fell from {said}" in events[0][1].message
    assert events[0][1].remedy == REMEDIES["dense-decay"]


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize(
    "figures",
    [
        RISING,
        [(0.5, *dense) for _, *dense in DECAYING],  # the class token does not improve
        [(top1, 0.3 - 0.02 * (s % 2), 0.9) for s, (top1, *_) in enumerate(RISING)],  # up and down, as by chance
        [(top1, 0.3 - 0.1 * (s % 3 > 0), 0.9) for s, (top1, *_) in enumerate(RISING)],  # never three in a row
    ],
)
def test_other_courses_are_no_event(figures: list[Figures]) -> None:
    assert follow(figures)[1] == []


@pytest.mark.usefixtures("few_resamples")
def test_untrained_patches_are_no_base_of_a_score_without_masks() -> None:
    falling = [(top1, 0.3, 1.2 - 0.1 * min(s, 3) + 0.02 * max(s - 3, 0)) for s, (top1, *_) in enumerate(RISING)]
    assert [step for step, _ in follow(falling, masks=False)[1]] == [3]
    assert follow(falling, masks=False, grace=3)[1] == []
    assert follow(falling, "dse")[0] == []
    assert follow(falling, "dse", grace=3)[0] == [3, 5, 7, 9]


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize("metric", ["dense_miou", "dse"])
def test_best_can_follow_the_patches(metric: str) -> None:
    assert follow(DECAYING, metric)[0] == [2, 4]
    assert follow(DECAYING)[0][-1] > 6  # by the class token


def run(out: Path, on_checkpoint: Any = None, **options: Any) -> Path:
    given: dict[str, Any] = {
        "probe__every": 2,
        "probe__data": "scenes",
        "probe__num_images": 60,
        "probe__max_share": 1.0,
    }
    given |= {"probe__dense": "scenes:count=40,first=900,size=32"}
    return loop.pretrain(tiny_config(out, **{**given, **options}), on_checkpoint)


def probed(out: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "probe_time"} for line in read_lines(out / "probe.jsonl")]


def test_a_run_shows_its_patches_wherever_it_shows_its_probe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:

    out = run(tmp_path / "run", steps=2, probe__metric="dense_miou")
    first, last = read_lines(out / "probe.jsonl")
    assert last["dense_miou_start"] == first["dense_miou"]
    assert last["dense_miou_gain_low"] <= last["dense_miou_gain"] <= last["dense_miou_gain_high"]
    said = f"dense at step 2: {dense_in_words(last)}"
    assert said in capsys.readouterr().err
    assert len(said) <= 76  # the step may have four digits more
    assert dense_in_words(last) in which_steps(out)
    assert ("its patches", "", dense_in_words(last)) in [row for _, rows in examine_run(out) for row in rows]
    assert json.loads((out / "probe.json").read_text())["metric"] == "dense_miou"
    titles = [chart.title for chart in run_charts(Run(out))["probe"]]
    assert titles[-2:] == ["Segmentation by patches", "Order of patches"]
    assert not any(chart.title.startswith(("dense", "dse")) for chart in run_charts(Run(out))["other"])


@pytest.mark.slow
def test_a_resumed_run_measures_what_an_unbroken_one_does(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")

    def stop(step: int, _: Path) -> None:
        if step == 4:
            raise RunError("stopped")

    with pytest.raises(RunError, match="stopped"):
        run(tmp_path / "parts", stop, checkpoint__every=2)
    assert len(probed(tmp_path / "parts")) < 5
    parts = run(tmp_path / "parts", checkpoint__every=2, resume=True)
    assert probed(parts) == probed(whole)
    histories = [checkpoint.verify(out / "checkpoints" / checkpoint.step_name(8))["history"] for out in (parts, whole)]
    for history in histories:
        for probe in history.values():
            if isinstance(probe, dict):
                probe.pop("probe_time", None)
    assert histories[0] == histories[1]


@pytest.mark.slow
def test_healthy_runs_have_no_event(tmp_path: Path) -> None:
    for seed in range(3):
        out = run(tmp_path / str(seed), seed=seed, steps=24)
        assert len(probed(out)) == 13
        assert "dense-decay" not in (out / "health" / "events.jsonl").read_text()


def measure_together(out: str) -> None:
    with session("cpu", 60) as ranks:
        config = tiny_config(probe__every=1, probe__dense="scenes:count=150,size=32")
        measured = dense_of(config).measure(build_networks(config)[1]["backbone"], CPU, torch.float32, ranks)
        Path(f"{out}.{ranks.world_size}.{ranks.rank}").write_text(json.dumps({**measured.values, "probe_time": 0}))


@pytest.mark.slow
def test_any_number_of_processes_measures_the_same_to_the_bit(tmp_path: Path) -> None:
    for count in (1, 2, 3):
        on_processes(count, measure_together, str(tmp_path / "found"))
    found = [path.read_text() for path in tmp_path.glob("found.*")]
    assert len(found) == 6
    assert len(set(found)) == 1
