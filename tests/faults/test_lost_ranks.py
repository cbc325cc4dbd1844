"""Ranks that are killed, stopped or told to stop: the others end in words, and the run goes on unharmed."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import pytest
from harness import RUN, STEPS, Faults, Hook, Rank, Start, assert_one_line, assert_sound
from hooks import KILL

from dinoreg.checkpoint import format as checkpoint

TIMEOUT = float(RUN["parallel.timeout"])
ASKING = 3.0  # dinoreg.distributed.failures: how long the others are asked
MARGIN = 10.0  # what a busy machine may take for anything


def at_step(step: int, **what: Any) -> Hook:
    return "at_step", {"step": step, **what}


def in_writing(step: int, moment: str, **what: Any) -> Hook:
    return "in_writing", {"step": step, "moment": moment, **what}


def name_of(start: Start, number: int) -> str:
    return f"rank {number} ("


def assert_found_dead(start: Start, victim: int) -> None:
    """The victim was killed; the other has ended within the time-out, in a line that names the victim."""
    survivor = 1 - victim
    assert start.ranks[victim].code == -signal.SIGKILL, start.describe()
    assert start.ranks[survivor].code == 1, start.describe()
    lost = start.ranks[victim]
    assert_one_line(
        start.ranks[survivor], name_of(start, victim), f"process {lost.pid}): has ended", "resume=true", "lost "
    )
    assert seconds_between(lost, start.ranks[survivor]) < TIMEOUT + ASKING + MARGIN


def seconds_between(first: Rank, second: Rank) -> float:
    assert first.ended is not None
    assert second.ended is not None
    return second.ended - first.ended


# Which rank is killed, and when; one after the other, each start going on where the one before was left.
KILLS: dict[str, list[tuple[int, Hook]]] = {
    "ddp": [
        (1, at_step(random.Random(1).randrange(1, 4), **KILL)),
        (0, in_writing(6, "named", **KILL)),
        (1, in_writing(8, "digests", **KILL)),
        (0, at_step(random.Random(2).randrange(8, STEPS), **KILL)),
    ],
    "fsdp": [
        (0, at_step(random.Random(3).randrange(1, 4), **KILL)),
        (1, in_writing(6, "files", **KILL)),
        (0, in_writing(8, "begun", **KILL)),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_rank_killed_in_a_step_or_in_writing_is_named_by_the_other_and_costs_nothing(
    strategy: str, faults: Faults, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for victim, hook in KILLS[strategy]:
        start = faults.start(out, processes=2, strategy=strategy, hooks={victim: [hook]})
        faults.wait(start)
        assert_found_dead(start, victim)
        assert_sound(out)
    faults.finish(out, processes=2, strategy=strategy)
    assert not list((out / "checkpoints").glob(".unfinished-*"))


@pytest.mark.slow
def test_a_rank_that_stands_still_is_named_and_stops_in_words_when_it_wakes_up(faults: Faults, tmp_path: Path) -> None:
    out = tmp_path / "run"
    hooks = {1: [at_step(5, what="signal", number=int(signal.SIGSTOP))]}
    start = faults.start(out, processes=2, strategy="fsdp", hooks=hooks, parallel__timeout=3)
    first, still = start.ranks
    faults.wait_for_rank(first)
    assert first.code == 1, start.describe()
    assert still.code is None
    assert_one_line(first, f"process {still.pid}): does not answer", "resume=true")
    assert_sound(out)
    still.send(signal.SIGCONT)
    faults.wait(start)
    assert still.code == 1, start.describe()
    assert_one_line(still, f"process {first.pid}): has ended", "resume=true")
    faults.finish(out, processes=2, strategy="fsdp")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "rank", "step", "number"), [("ddp", 1, 3, signal.SIGTERM), ("fsdp", 0, 6, signal.SIGUSR1)]
)
def test_a_signal_to_one_rank_saves_the_same_step_on_all_and_ends_with_its_code(
    strategy: str, rank: int, step: int, number: signal.Signals, faults: Faults, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    hooks = {rank: [at_step(step, what="signal", number=int(number))]}
    start = faults.start(out, processes=2, strategy=strategy, hooks=hooks)
    assert faults.wait(start) == [128 + number, 128 + number], start.describe()
    said = assert_one_line(start.ranks[0], number.name, "resume=true", str(out))
    assert start.ranks[1].said() == []
    # Agreeing takes a step, so that no step has to wait for it.
    stopped = checkpoint.read_pointer(out / "checkpoints", "last")
    assert stopped in (checkpoint.step_name(step + 1), checkpoint.step_name(step + 2))
    assert f"after step {int(stopped[5:])} of {STEPS}" in said
    assert_sound(out)
    faults.finish(out, processes=2, strategy=strategy)


@pytest.mark.slow
def test_all_ranks_killed_in_writing_resume(faults: Faults, tmp_path: Path) -> None:
    hooks = {rank: [in_writing(4, "files", **KILL)] for rank in range(2)}
    start = faults.start(tmp_path / "run", processes=2, hooks=hooks)
    assert faults.wait(start) == [-signal.SIGKILL] * 2, start.describe()
    assert_sound(tmp_path / "run", 2)
    faults.finish(tmp_path / "run", processes=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "victim"),
    [("dinoreg.train.loop:Setup", 1), ("dinoreg.train.loop:find_checkpoint", 0), ("dinoreg.train.loop:open_log", 1)],
)
def test_a_rank_that_dies_before_the_first_step_is_named_too(
    function: str, victim: int, faults: Faults, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    start = faults.start(out, processes=2, hooks={victim: [("at_call", {"function": function, **KILL})]})
    faults.wait(start)
    assert_found_dead(start, victim)
    assert_sound(out)
    if function.endswith("find_checkpoint"):
        faults.finish(out, processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("missing", [0, 1])
def test_a_rank_that_never_comes_is_waited_for_no_longer_than_the_time_out(
    missing: int, faults: Faults, tmp_path: Path
) -> None:
    hooks = {missing: [("at_call", {"function": "dinoreg.distributed.process_group:_join", **KILL})]}
    start = faults.start(tmp_path / "run", processes=2, hooks=hooks)
    faults.wait(start, TIMEOUT + ASKING + MARGIN)
    waiting = start.ranks[1 - missing]
    assert waiting.code == 1, start.describe()
    assert_one_line(waiting, f"rank {1 - missing} of 2 could not meet the others at 127.0.0.1:", "within 6 s")
    assert not (tmp_path / "run").exists()
