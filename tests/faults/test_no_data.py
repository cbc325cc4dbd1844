"""Data that vanish, or a read that never ends, on one of two processes: all save the last step and end together."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest
from harness import STEPS, Faults, Start, assert_one_line, assert_sound
from miniatures.pictures import numbered
from training import loss_trace

RUNS = {"processes": 2, "checkpoint__every": STEPS, "data__prefetch": 1}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return numbered(tmp_path / "pictures", 48)


def reached(out: Path) -> int:
    """The step that a run ended after, which is its last checkpoint."""
    step: int = json.loads((out / "status.json").read_text())["reached"]
    assert 0 < step < STEPS
    assert_sound(out, step)
    return step


def assert_goes_on(start: Start, pictures: Path, faults: Faults) -> None:
    """The run in `start.out`, resumed, has the losses of one that nothing has happened to."""
    whole = start.out.with_name("whole")
    for out in (start.out, whole):
        again = faults.start(out, data__source=pictures, **RUNS)
        assert faults.wait(again) == [0, 0], again.describe()
    assert loss_trace(start.out) == loss_trace(whole)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_data_that_vanish_cost_no_step(strategy: str, faults: Faults, pictures: Path, tmp_path: Path) -> None:
    out, flag = tmp_path / "run", tmp_path / "flag"
    hooks = {1: [("at_step", {"step": 4, "what": "wait", "flag": str(flag)})]}
    start = faults.start(out, data__source=pictures, hooks=hooks, strategy=strategy, **RUNS)
    faults.until(Path(f"{flag}.reached"), start)
    pictures.rename(tmp_path / "gone")
    Path(f"{flag}.go").touch()
    assert faults.wait(start) == [1, 1], start.describe()
    lines = [line for rank in start.ranks for line in rank.said()]
    assert len(lines) == 1, start.describe()
    assert "no usable image found" in lines[0]
    assert reached(out) >= 5
    (tmp_path / "gone").rename(pictures)
    if strategy == "ddp":
        assert_goes_on(start, pictures, faults)


@pytest.mark.slow
@pytest.mark.parametrize("asked", [(0, 1), (0,), (1,)])
def test_a_signal_is_answered_while_a_read_of_another_process_hangs(
    asked: tuple[int, ...], faults: Faults, pictures: Path, tmp_path: Path
) -> None:
    out, flag = tmp_path / "run", tmp_path / "stuck"
    hooks = {1: [("stuck_read", {"after": 40, "flag": str(flag)})]}
    start = faults.start(out, data__source=pictures, hooks=hooks, parallel__timeout=60, **RUNS)
    faults.until(flag, start)
    time.sleep(1.0)
    for rank in asked:
        start.ranks[rank].send(signal.SIGTERM)
    begun = time.monotonic()
    assert faults.wait(start) == [128 + signal.SIGTERM] * 2, start.describe()
    assert time.monotonic() - begun < 30  # 2 to answer, 2 + 1 to give the readers up, saving, and a busy machine
    assert_one_line(start.ranks[0], f"SIGTERM after step {reached(out)} of {STEPS}", "resume=true")
    assert start.ranks[1].said() == []
    if asked == (0,):
        assert_goes_on(start, pictures, faults)


@pytest.mark.slow
def test_a_read_that_never_ends_is_named_and_ends_the_run_before_the_others_give_up(
    faults: Faults, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    hooks = {1: [("stuck_read", {"after": 40, "flag": str(tmp_path / "stuck")})]}
    start = faults.start(out, data__source=pictures, hooks=hooks, parallel__timeout=24, **RUNS)
    assert faults.wait(start, 90) == [1, 1], start.describe()
    assert_one_line(start.ranks[1], "data: a batch has not come for 1", ".png is being read")
    assert start.ranks[0].said() == []
    assert re.search(r"a batch is waited for since 1\d s, of which .*\.png is being read", start.ranks[1].console())
    assert reached(out) > 0
