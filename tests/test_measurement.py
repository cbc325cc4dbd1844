"""The frame of every protocol: its splits, the choice among candidates, passes that go on where they were stopped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from encoders import context

from dinoreg.data.source import ScenesSource
from dinoreg.evaluation.backbones.encoder import PixelEncoder
from dinoreg.evaluation.benchmark import PROTOCOLS, Task
from dinoreg.evaluation.data import Data, Labelled, MultiLabelled
from dinoreg.evaluation.metrics.bootstrap import Interval
from dinoreg.evaluation.options import EvalOptions
from dinoreg.evaluation.protocols.measurement import OFFICIAL, REPORTED, Measurement, choose_best, resumable_map
from dinoreg.runtime.errors import UserError

TASK = Task("knn", lambda folder, options: Data({}), "top-1")
SOURCE = ScenesSource(count=3, size=16)
TRAIN = Labelled(SOURCE, np.zeros(3), 2)
MISSING = "the {name} split is missing, there are {splits}"


def made(folder: Path, data: Data, seed: int = 0) -> Measurement:
    return Measurement(PixelEncoder(8, (16, 16)), data, TASK, EvalOptions(), context(folder, seed=seed))


def test_the_best_candidate_is_chosen_where_the_scores_allow_and_the_words_say_where() -> None:
    reported = {"a": 0.5, "b": 0.7, "c": 0.7}
    assert choose_best(reported) == ("b", REPORTED)
    assert choose_best(reported, {"a": 0.9, "b": 0.1, "c": float("nan")}) == ("a", OFFICIAL)
    assert choose_best(reported, {"a": -0.9, "b": -0.1, "c": -0.2}, "a tenth") == ("b", "a tenth")
    assert choose_best({"a": -2.0, "b": float("nan")}) == ("a", REPORTED)
    assert choose_best({"only": float("nan")}) == ("only", "")


def test_splits_are_of_the_kind_that_the_protocol_takes(tmp_path: Path) -> None:
    data = Data({"train": TRAIN, "val": MultiLabelled(SOURCE, np.ones((3, 2)), 2)})
    measured = made(tmp_path, data)
    assert measured.split("train", Labelled, MISSING) is TRAIN
    for name in ("val", "test"):
        with pytest.raises(UserError, match=f"the {name} split is missing, there are train, val"):
            measured.split(name, Labelled, MISSING)
    with pytest.raises(UserError, match="the test split is missing"):
        measured.splits(Labelled, MISSING)
    whole = Data({"train": TRAIN, "test": TRAIN})
    assert made(tmp_path, whole).splits(Labelled, MISSING) == (TRAIN, TRAIN, None)
    with pytest.raises(UserError, match=r"metric 'top-1': depth has RMSE and AbsRel"):
        measured.check_metric("depth", ("RMSE", "AbsRel"))


def test_a_row_carries_what_all_rows_share_and_the_variant_of_the_data(tmp_path: Path) -> None:
    measured = made(tmp_path, Data({}, variant="split 1"), seed=4)
    row = measured.row(0.5, Interval(0.25, 0.75, np.array([0.25, 0.75])), variant="k = 20", n_test=7)
    assert (row.protocol, row.metric, row.variant) == (PROTOCOLS["knn"][1], "top-1", "k = 20, split 1")
    assert (row.value, row.low, row.high, row.seeds, row.n_test) == (0.5, 0.25, 0.75, (4,), 7)
    assert 0 <= row.hours < 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_that_was_stopped_does_nothing_twice_and_another_key_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr("dinoreg.evaluation.context.SAVE_SECONDS", -1.0)
    where = context(tmp_path)
    where.workers = workers
    calls: list[int] = []

    def compute(index: int, loaded: int) -> dict[str, torch.Tensor]:
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(index)
        return {"sum": torch.tensor(float(index + loaded))}

    def run(key: str) -> list[float]:
        found = resumable_map(where, "pass", key, 6, compute, "numbers", lambda index: 10 * index)
        return [float(each["sum"]) for each in found]

    with pytest.raises(KeyboardInterrupt):
        run("a")
    calls[:] = []
    with pytest.raises(KeyboardInterrupt):
        run("b")
    assert calls == [0, 1, 2, 3]
    calls[:] = []
    assert run("b") == [0.0, 11.0, 22.0, 33.0, 44.0, 55.0]
    assert calls == [4, 5]
    assert run("b") == [0.0, 11.0, 22.0, 33.0, 44.0, 55.0]
    assert calls == [4, 5]
