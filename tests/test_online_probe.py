"""The probe inside a run: its two figures against literal computations, its images, its share of the time."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from photographs import photograph
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from training import given, read_lines, setup_of, tiny_config

from dinoreg.checkpoint import format as checkpoint
from dinoreg.checkpoint.steps import against_start, probe_in_words, role_of, watched_in, which_steps
from dinoreg.config.load import Config
from dinoreg.data.open import open_source
from dinoreg.distributed.process_group import ALONE
from dinoreg.evaluation.comparison import compare
from dinoreg.evaluation.metrics.bootstrap import bootstrap_interval
from dinoreg.evaluation.result import Row
from dinoreg.runtime.errors import UserError
from dinoreg.scenes import render as scenes
from dinoreg.scenes.render import label_of
from dinoreg.train import loop
from dinoreg.train.logger import SilentLog
from dinoreg.train.metrics import ProbeRunner
from dinoreg.train.probes import FIRST_PROBE_SCENE, Measured, Probe, build_probe
from dinoreg.train.state import build_networks
from dinoreg.weights.resolve import find_weights

CPU = torch.device("cpu")


def probe_of(config: Config) -> Probe:
    assert config.data.source is not None
    probe = build_probe(config, open_source(config.data.source))
    assert probe is not None
    return probe


def backbone_of(config: Config) -> torch.nn.Module:
    return build_networks(config)[1]["backbone"]


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Photographs of three classes, which differ in size; one of them cannot be read."""
    root = tmp_path / "classes"
    for name, count in (("cats", 9), ("dogs", 14), ("birds", 11)):
        (root / name).mkdir(parents=True)
        for number in range(count):
            photograph(17 * count + number, 33 + number, 60 - count).save(root / name / f"{number}.png")
    (root / "dogs" / "99.jpg").write_text("not a picture")
    (root / "beside.png").write_bytes((root / "cats" / "0.png").read_bytes())
    return root


def literal_top1(features: Tensor, labels: Tensor, k: int, temperature: float = 0.07) -> float:
    """The share of the second half whose nearest neighbours in the first vote for the right class."""
    half = len(features) // 2
    right = 0
    for query, label in zip(features[half:], labels[half:]):
        cosine = [float(row @ query / (row.norm() * query.norm())) for row in features[:half]]
        nearest = sorted(range(half), key=lambda i: -cosine[i])[:k]
        votes: Counter[int] = Counter()
        for i in nearest:
            votes[int(labels[i])] += math.exp(cosine[i] / temperature)  # type: ignore[assignment]
        right += votes.most_common(1)[0][0] == int(label)
    return right / (len(features) - half)


def literal_rank(features: Tensor) -> float:
    centred = (features - features.mean(dim=0)).double().numpy()
    singular = np.linalg.svd(centred, compute_uv=False)
    share = singular / singular.sum() + 1e-7
    return float(np.exp(-(share * np.log(share)).sum()))


def literal_features(probe: Probe, backbone: torch.nn.Module) -> Tensor:
    """One image at a time, normalised as the shipped mean and deviation say."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    rows = []
    for image in probe.images:
        pixels = ((image / 255).permute(1, 2, 0) - mean) / std
        with torch.no_grad():
            rows.append(backbone(pixels.permute(2, 0, 1)[None]).cls[0])
    return torch.stack(rows)


def assert_measures_are_literal(probe: Probe, backbone: torch.nn.Module) -> None:
    measured, right, _ = probe.measure(backbone, CPU, torch.float32)
    features = literal_features(probe, backbone)
    torch.testing.assert_close(probe.features(backbone, CPU, torch.float32), features, atol=1e-5, rtol=1e-4)
    assert probe.labels is not None
    assert measured["knn_top1"] == pytest.approx(literal_top1(features, probe.labels, k=20), abs=1e-6)
    assert measured["rankme"] == pytest.approx(literal_rank(features), rel=1e-4)
    assert right is not None
    tested = probe.labels[len(features) // 2 :].tolist()
    assert len(right) == len(tested)
    assert measured["knn_top1"] == pytest.approx(right.mean())
    assert measured["knn_top1_low"] < measured["knn_top1"] < measured["knn_top1_high"]
    assert measured["knn_top1_chance"] == pytest.approx(1 / probe.num_classes)
    assert measured["knn_top1_majority"] == pytest.approx(Counter(tested).most_common(1)[0][1] / len(tested))
    assert measured["probe_time"] > 0


def test_measures_on_scenes_equal_a_literal_computation_with_the_same_features() -> None:
    config = tiny_config(probe__every=1, probe__data="scenes", probe__num_images=150)
    probe = probe_of(config)
    assert probe.images.shape == (150, 3, 32, 32)
    assert_measures_are_literal(probe, backbone_of(config))


def test_measures_on_a_labelled_folder_equal_a_literal_computation_too(labelled: Path) -> None:
    config = tiny_config(probe__every=1, probe__data=str(labelled), probe__num_images=200)
    probe = probe_of(config)
    assert probe.num_classes == 3
    assert probe.labels is not None
    assert Counter(probe.labels.tolist()) == {0: 11, 1: 9, 2: 14}  # birds, cats, dogs; the unreadable one is not there
    assert_measures_are_literal(probe, backbone_of(config))


def test_scenes_have_their_own_labels_far_from_those_trained_on() -> None:
    config = tiny_config(probe__every=1, probe__data="scenes", probe__num_images=40)
    probe = probe_of(config)
    resize = v2.Resize(32, interpolation=InterpolationMode.BICUBIC, antialias=True)
    expected = {}
    for index in range(FIRST_PROBE_SCENE, FIRST_PROBE_SCENE + 40):
        image = torch.from_numpy(scenes.render_image(index).copy()).permute(2, 0, 1)
        expected[resize(image).numpy().tobytes()] = label_of(index, 0)
    assert probe.labels is not None
    found = {image.numpy().tobytes(): label for image, label in zip(probe.images, probe.labels.tolist())}
    assert found == expected


def test_a_network_that_sees_the_class_gets_every_vote() -> None:
    """An image filled with its class number and a backbone that reads it."""

    class Reader(torch.nn.Module):
        def forward(self, pixels: Tensor) -> Any:
            number = (pixels.mean(dim=(1, 2, 3)) * 255).round().long()
            cls = torch.nn.functional.one_hot(number, 5).float()
            return type("Tokens", (), {"cls": cls})

    labels = torch.arange(300) % 5
    images = labels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    probe = Probe(images, labels, 5, [0.0] * 3, [1.0] * 3)
    measured = probe.measure(Reader(), CPU, torch.float32).values
    assert measured["knn_top1"] == 1.0
    assert measured["rankme"] == pytest.approx(4.0, rel=1e-3)  # five equal corners around their mean


def test_without_labels_there_is_only_the_rank() -> None:
    config = tiny_config(probe__every=1, probe__num_images=30)
    probe = probe_of(config)
    assert probe.labels is None
    assert len(probe.images) == 30
    measured, right, _ = probe.measure(backbone_of(config), CPU, torch.float32)
    assert set(measured) == {"rankme", "probe_time"}
    assert right is None


def test_the_images_of_a_probe_are_the_same_at_every_start_and_for_every_seed(labelled: Path) -> None:
    options = {"probe__every": 1, "probe__data": str(labelled), "probe__num_images": 20}
    one, two = (probe_of(tiny_config(seed=seed, **options)) for seed in (0, 5))
    assert torch.equal(one.images, two.images)
    assert one.labels is not None
    assert two.labels is not None
    assert torch.equal(one.labels, two.labels)


def test_a_probe_that_is_never_to_run_is_not_built() -> None:
    assert build_probe(tiny_config(probe__every=0, probe__data="nowhere"), open_source("scenes:count=9")) is None


def test_a_source_too_small_for_a_rank_has_no_probe() -> None:
    config = tiny_config(probe__every=1)
    assert build_probe(config, open_source("scenes:count=3,size=32")) is None
    assert build_probe(config, open_source("scenes:count=4,size=32")) is not None


def test_what_cannot_be_probed_is_refused_in_one_line(tmp_path: Path) -> None:
    source = open_source("scenes:count=9,size=32")

    def refusal(folder: Path | str, **options: Any) -> str:
        with pytest.raises(UserError) as caught:
            build_probe(tiny_config(probe__every=1, probe__data=str(folder), **options), source)
        message = str(caught.value)
        assert "\n" not in message
        return message

    def pictures(name: str, **counts: int) -> Path:
        for folder, count in counts.items():
            (tmp_path / name / folder).mkdir(parents=True)
            for number in range(count):
                photograph(number, 30, 40).save(tmp_path / name / folder / f"{number}.png")
        return tmp_path / name

    assert "nowhere" in refusal(tmp_path / "nowhere")
    assert "at least two" in refusal(pictures("one_class", cats=8))
    assert "expected at least 4 readable images of 2 classes" in refusal(pictures("three", cats=1, dogs=2))
    broken = pictures("broken", cats=3, dogs=3)
    for number in range(3):
        (broken / "dogs" / f"{number}.png").write_text("not a picture")
    assert "expected at least 4 readable images of 2 classes" in refusal(broken)
    assert "scenes" in refusal("scenes:count=0")


# In a run


def run(out: Path, **overrides: Any) -> Path:
    options = {"steps": 8, "probe__every": 2, "probe__data": "scenes", "probe__num_images": 60}
    return loop.pretrain(tiny_config(out, **{**options, **overrides}))


def give(monkeypatch: pytest.MonkeyPatch, figures: Iterable[tuple[float, ...]]) -> None:
    """Let the probes of a run find these (see `given`), in turn."""
    values = iter(figures)

    def measure(self: Probe, *_: object) -> Measured:
        top1, *others = next(values)
        return given(top1, len(self.images) // 2, *others)

    monkeypatch.setattr(Probe, "measure", measure)


def test_best_and_last_outlive_the_rest_and_are_told_apart_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(monkeypatch, [(0.2,), (0.25,), (0.6,), (0.65,), (0.6,)])
    out = run(tmp_path / "run", probe__max_share=1.0, checkpoint__keep=1)
    folder = out / "checkpoints"
    kept = {checkpoint.step_name(step) for step in (4, 8)}
    assert {path.name for path in folder.glob("step_*")} == kept
    assert {path.stem for path in (out / "teacher").glob("*.safetensors")} == kept
    assert checkpoint.verify(folder / checkpoint.step_name(8))["history"]["best"]["step"] == 4
    assert find_weights(out) == out / "teacher" / "step_0000008.safetensors"
    assert find_weights(out / "best") == out / "teacher" / "step_0000004.safetensors"
    log = (out / "train.log").read_text()
    assert which_steps(out) in log
    assert f"weights={out} means step 8 (last, k-NN 60.0 % [" in log
    assert f"weights={out}/best step 4, k-NN 60.0 % [" in log
    lines = read_lines(out / "probe.jsonl")
    assert [line["step"] for line in lines] == [0, 2, 4, 6, 8]
    low, high = (100 * lines[2][f"knn_top1_{end}"] for end in ("low", "high"))
    beside = "(step 0: 20.0, chance 10.0, majority 20.0)"
    assert f"probe at step 4: knn_top1: 60.0 % [{low:.1f}, {high:.1f}] {beside}" in log


def test_every_later_probe_is_compared_with_the_start_image_by_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [(0.2,), (0.5, 3.0, 6), (0.9,), (0.1,), (0.3, 3.0, 15)]
    give(monkeypatch, found)
    out = run(tmp_path / "run", probe__max_share=1.0)
    first, *lines = read_lines(out / "probe.jsonl")
    assert not any("start" in key or "gain" in key for key in first)
    right = [given(top1, 30, *others).right for top1, *others in found]
    for line, now in zip(lines, right[1:], strict=True):
        difference = [int(one) - int(other) for one, other in zip(now, right[0], strict=True)]  # type: ignore[arg-type]
        assert (line["start_step"], line["knn_top1_start"]) == (0, 0.2)
        assert line["knn_top1_gain"] == pytest.approx(sum(difference) / 30)
        assert line["knn_top1_gain_low"] < line["knn_top1_gain"] < line["knn_top1_gain_high"]
    verdicts = [against_start(line).partition(":")[0] for line in lines]
    assert verdicts[1] == "better than the start"
    assert verdicts[3] == "not better than the start so far"
    assert against_start(first) == ""
    log = (out / "train.log").read_text()
    assert all(f"probe at step {line['step']}: {probe_in_words(line)}" in log for line in (first, *lines))
    assert f"dinoreg verdict LABELLED weights={out}" in log


@pytest.mark.parametrize(("gained", "lost", "said"), [(0, 0, "not better"), (4, 0, "not better"), (9, 1, "better")])
def test_a_probe_and_an_evaluation_say_the_same_of_the_same_answers(
    gained: int, lost: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers(of_gained: bool) -> np.ndarray:
        return np.repeat([of_gained, not of_gained, True, False], [gained, lost, 20, 30 - gained - lost])

    found, lines = iter([answers(False), answers(True)]), list[dict[str, Any]]()

    def measure(*_: object) -> Measured:
        right = next(found)
        return Measured({"rankme": 3.0, "probe_time": 1e-6, "knn_top1": float(right.mean())}, right)

    monkeypatch.setattr(Probe, "measure", measure)
    config = tiny_config(probe__every=1, probe__data="scenes", probe__num_images=100)
    log = SimpleNamespace(append=lambda _, line: lines.append(line), say=lambda _: None)
    monitor: Any = SimpleNamespace(ranks=ALONE, pause=lambda _: None, log=log)
    runner = ProbeRunner(setup_of(config, 1), probe_of(config), monitor)
    state: Any = SimpleNamespace(step=0, history={}, teacher=SimpleNamespace(backbone=None))
    runner.run(state)
    state.step = 1
    is_best = runner.run(state)
    rows = []
    for right in (answers(True), answers(False)):
        interval = bootstrap_interval(right)
        replicates = tuple(interval.replicates.tolist())
        rows.append(Row("k-NN", "top-1", right.mean(), interval.low, interval.high, n_test=50, replicates=replicates))
    expected = compare(*rows)
    assert [lines[1][f"knn_top1_gain{end}"] for end in ("", "_low", "_high", "_verdict")] == [*expected.values()]
    assert against_start(lines[1]).startswith(f"{said} than the start")
    assert is_best == (expected["verdict"] == "better")


def pointed(out: Path, lines: list[dict[str, Any]], **pointers: int) -> str:
    """What is said of a run folder with these probes and pointers."""
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    for name in ("last", "best"):
        (out / "checkpoints" / name).unlink(missing_ok=True)
    for name, step in pointers.items():
        (out / "checkpoints" / name).write_text(f"step_{step:07d}\n")
    (out / "probe.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return which_steps(out)


def test_it_is_said_which_step_is_the_last_and_the_best(tmp_path: Path) -> None:
    shares = {0: 0.15, 20: 0.155, 40: 0.18, 200: 0.16}
    lines = [
        {"step": step, "knn_top1": share, "knn_top1_low": share - 0.05, "knn_top1_high": share + 0.05}
        for step, share in shares.items()
    ]
    last = f"weights={tmp_path} means step 200 (last, k-NN 16.0 % [11.0, 21.0])"
    none = pointed(tmp_path, lines, last=200)
    assert none == f"{last}; no step is the best: none was better than the start"
    assert pointed(tmp_path, lines, last=200, best=200) == f"{last}; weights={tmp_path}/best is the same"
    best = pointed(tmp_path, lines, last=200, best=40)
    assert best == f"{last}; weights={tmp_path}/best step 40, k-NN 18.0 % [13.0, 23.0]"
    assert pointed(tmp_path, lines[:1], last=200).endswith("no step is the best: none was better than the start")
    assert "k-NN" not in pointed(tmp_path, [], last=200)
    assert "nothing was saved" in pointed(tmp_path, lines)
    pointed(tmp_path, lines, last=200, best=40)
    (tmp_path / "status.json").write_text('{"num_steps": 200}')
    roles = [role_of(tmp_path, step) for step in (200, 40, 20)]
    assert roles == ["step 200 of 200 (the last)", "step 40 of 200 (best by the probe, not the last)", "step 20 of 200"]


def bests(monkeypatch: pytest.MonkeyPatch, figures: list[tuple[float, ...]], metric: str) -> list[int]:
    """The steps that become the best of a run whose probes, of 30 tested images at steps 0, 1, ..., find these."""
    give(monkeypatch, figures)
    options: dict[str, Any] = {"probe__num_images": 60, "probe__metric": metric, "probe__max_share": 1.0}
    config = tiny_config(probe__every=1, probe__data="scenes", **options)
    monitor: Any = SimpleNamespace(ranks=ALONE, pause=lambda _: None, log=SilentLog())
    runner = ProbeRunner(setup_of(config, len(figures)), probe_of(config), monitor)
    state: Any = SimpleNamespace(step=0, history={}, teacher=SimpleNamespace(backbone=None))
    found = []
    for step in range(len(figures)):
        state.step, state.history = step, json.loads(json.dumps(state.history))  # as a checkpoint gives it back
        if runner.run(state):
            found.append(step)
    return found


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ([(0.2,), (0.25,), (0.6,), (0.65,), (0.6,)], [2]),
        ([(0.2,), (0.6,), (0.9,), (0.2,), (0.9,)], [1, 2]),
        ([(0.2,), (0.25,), (0.3,), (0.25,), (0.3,)], []),  # a tenth of 30 images
        ([(0.5, 3.0, 15), (0.6,), (0.7,)], []),  # more in all, but others: 15 gained and 12 or 9 lost
        ([(0.5,), (0.1,), (0.5,)], []),
        ([(0.9,), (1.0,), (1.0,)], []),
        ([(0.8,), (1.0,), (1.0,)], [1]),
    ],
)
def test_best_moves_only_to_a_step_that_is_better_by_more_than_chance(
    figures: list[tuple[float, ...]], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bests(monkeypatch, figures, "knn_top1") == expected


def test_best_by_rankme_has_no_interval_and_still_begins_above_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = (6.0, 5.0, 9.0, 7.0, 9.5, 9.5)
    assert bests(monkeypatch, [(0.2, rank) for rank in ranks], "rankme") == [2, 4]


def test_the_run_says_which_images_its_steps_are_compared_on(labelled: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"probe__data": str(labelled), "probe__num_images": 200}
    out = run(tmp_path / "run", steps=2, **options)
    content = json.loads((out / "probe.json").read_text())
    expected = [sha256(path.read_bytes()).hexdigest()[:16] for path in labelled.glob("*/*.png")]
    assert sorted(content["images"]) == sorted(expected)
    for best, chosen in ((2, False), (1, True)):  # the last is measured whether it is the best or not
        (out / "checkpoints" / "best").write_text(f"step_{best:07d}\n")
        watched = watched_in(out, best)
        assert watched is not None
        assert (watched.images, watched.chosen) == (set(content["images"]), chosen)
    assert watched_in(tmp_path, 1) is None


@pytest.mark.slow
@pytest.mark.parametrize(("max_share", "steps"), [(0.0, [0, 2, 8]), (1.0, [0, 2, 4, 6, 8])])
def test_probes_beyond_their_share_of_the_time_are_left_out_but_for_the_last(
    max_share: float, steps: list[int], tmp_path: Path
) -> None:
    out = run(tmp_path / "run", probe__max_share=max_share)
    assert [line["step"] for line in read_lines(out / "probe.jsonl")] == steps


@pytest.mark.slow
def test_a_probe_changes_nothing_in_the_run_it_looks_at(tmp_path: Path) -> None:
    from training import loss_trace

    looked_at = run(tmp_path / "a", probe__max_share=1.0, model__drop_path=0.2)
    alone = run(tmp_path / "b", probe__every=0, model__drop_path=0.2)
    assert loss_trace(looked_at) == loss_trace(alone)


@pytest.mark.slow
def test_an_interrupted_and_resumed_run_remembers_its_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, [(0.2,), (0.9,), (0.5,), (0.6,), (0.7,), (0.8,), (0.8,), (0.8,)])
    out = run(tmp_path / "run", steps=4, probe__max_share=1.0)
    run(out, steps=8, resume=True, probe__max_share=1.0)
    assert checkpoint.read_pointer(out / "checkpoints", "best") == checkpoint.step_name(2)
    assert (out / "checkpoints" / checkpoint.step_name(2)).is_dir()
    assert [line["step"] for line in read_lines(out / "probe.jsonl")] == [
        0,
        2,
        4,
        6,
        8,
    ]  # the start is not measured anew


@pytest.mark.slow
def test_with_other_images_the_comparison_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, [(0.2,), (0.9,), (0.5,), (0.5,), (0.9,)])
    out = run(tmp_path / "run", steps=4, probe__max_share=1.0)
    run(out, steps=8, resume=True, probe__max_share=1.0, probe__num_images=70)
    assert checkpoint.read_pointer(out / "checkpoints", "best") == checkpoint.step_name(8)
    assert "(step 6: 50" in (out / "train.log").read_text()
