"""Ranks that drift apart, fail alone, do not fit together, or are there twice."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from harness import STEPS, Faults, assert_one_line, assert_sound

from dinoreg.checkpoint import format as checkpoint

WEIGHT = "student.backbone.patch_embed.proj.weight"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "named"),
    [({"strategy": "ddp"}, f"{WEIGHT} of rank 1"), ({"strategy": "fsdp", "parallel__shard": 1}, f"{WEIGHT} (shard 0)")],
)
def test_a_bit_that_flips_in_one_copy_of_the_weights_is_found_and_named_by_all(
    options: dict[str, Any], named: str, faults: Faults, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    hooks = {1: [("at_step", {"step": 5, "what": "flip", "tensor": WEIGHT})]}
    start = faults.start(out, processes=2, hooks=hooks, parallel__check_every=1, **options)
    assert faults.wait(start) == [1, 1], start.describe()
    for rank in start.ranks:
        line = assert_one_line(rank, "drifted apart at step 6", named, "of rank 1 differs")
        assert "of rank 0" not in line
    assert_sound(out, 4)  # what has drifted is not saved


@pytest.mark.slow
def test_a_worker_that_fails_ends_all_ranks_in_one_line_and_the_last_whole_step_is_saved(
    faults: Faults, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    hooks = {1: [("bad_picture", {"after": 25})]}
    start = faults.start(out, processes=2, hooks=hooks, checkpoint__every=STEPS)
    assert faults.wait(start) == [1, 1], start.describe()
    why = "the storage driver gave up"
    assert_one_line(start.ranks[1], "LookupError", why)
    assert start.ranks[0].said() == []
    ended = json.loads((out / "status.json").read_text())
    assert why in ended["reason"]
    assert ended["reached"] > 0
    assert_sound(out, ended["reached"])
    faults.finish(out, processes=2)


@pytest.mark.slow
def test_a_clock_that_jumps_moves_neither_losses_nor_retention_nor_the_time_left(
    faults: Faults, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    day = 86_400.0
    # Just before a checkpoint is dated; which one a step would hit would be a matter of luck.
    hooks = {
        0: [
            ("in_writing", {"step": 6, "moment": "begun", "what": "clock", "jump": 10 * day}),
            ("in_writing", {"step": 10, "moment": "begun", "what": "clock", "jump": -40 * day}),
        ],
        1: [("at_step", {"step": 7, "what": "clock", "jump": -3 * day})],
    }
    start = faults.start(out, processes=2, hooks=hooks, checkpoint__keep=2, checkpoint__keep_hours=1.0)
    assert faults.wait(start) == [0, 0], start.describe()
    # Of each day that the clock has shown one is kept, and the newest two besides.
    kept = [int(path.name[5:]) for path in sorted((out / "checkpoints").glob("step_*"))]
    assert kept == [2, 6, 8, 10]
    left = re.findall(r"(\S+) left", start.ranks[0].console())
    assert len(left) > 1
    assert all(re.fullmatch(r"\d?\d:\d\d", each) for each in left), left  # minutes and seconds
    faults.finish(out, processes=2, checkpoint__keep_hours=1.0)


@pytest.mark.slow
def test_processes_whose_folders_are_not_one_are_refused_in_one_line(faults: Faults, tmp_path: Path) -> None:
    folders = [tmp_path / "here", tmp_path / "there"]
    for folder in folders:
        folder.mkdir()
    hooks = {rank: [("shared_seconds", {"seconds": 0.5})] for rank in range(2)}
    start = faults.start("run", processes=2, folders=folders, hooks=hooks)
    assert faults.wait(start) == [2, 2], start.describe()
    said = [line for rank in start.ranks for line in rank.said()]
    assert len(said) == 1
    assert "out=run: expected a folder that all machines share" in said[0]
    assert list(folders[1].iterdir()) == []
    assert list(folders[0].iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "environment", "words"),
    [
        ({"strategy": "fsdp", "parallel__shard": 3}, {}, "parallel.shard=3: expected a divisor of the 2 processes"),
        ({"loss__koleo_ranks": 3}, {}, "loss.koleo_ranks=3: expected a divisor of the 2 processes"),
        ({"data__source": "/nowhere"}, {}, "/nowhere"),
    ],
)
def test_what_does_not_fit_the_processes_is_refused_in_one_line_before_anything_is_written(
    overrides: dict[str, Any], environment: dict[str, str], words: str, faults: Faults, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    start = faults.start(out, processes=2, environment=environment, **overrides)
    assert faults.wait(start) == [2, 2], start.describe()
    said = [line for rank in start.ranks for line in rank.said()]
    assert len(said) == 1, start.describe()
    assert words in said[0]
    assert not out.exists()


def test_a_place_that_is_told_by_halves_is_refused(faults: Faults, tmp_path: Path) -> None:
    start = faults.start(tmp_path / "run", environment={"WORLD_SIZE": "2", "RANK": "0"})
    assert faults.wait(start) == [2]
    assert_one_line(start.ranks[0], "WORLD_SIZE=2: MASTER_ADDR and MASTER_PORT missing")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_of_two_copies_of_a_run_the_older_stops_in_words_and_the_younger_is_left_alone(
    faults: Faults, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    flag = tmp_path / "flag"
    old = faults.start(
        out,
        processes=2,
        hooks={0: [("at_step", {"step": 5, "what": "wait", "flag": str(flag)})]},
        parallel__timeout=60,
    )
    faults.until(Path(f"{flag}.reached"), old)
    refused = faults.start(out, processes=2)
    assert faults.wait(refused) == [2, 2], refused.describe()
    owner = json.loads((out / "owner.json").read_text())
    del owner["started"]  # as a run whose process cannot be told from another of its number
    (out / "owner.json").write_text(json.dumps(owner))
    new = faults.start(out, processes=2)
    assert faults.wait(new) == [0, 0], new.describe()
    assert faults.poll(old)
    Path(f"{flag}.go").touch()
    assert faults.wait(old) == [1, 1], old.describe()
    assert_one_line(old.ranks[0], "was taken over by process", "stops writing there")
    assert old.ranks[1].said() == []
    assert_sound(out, STEPS)
    assert json.loads((out / "status.json").read_text())["phase"] == "finished"
    assert checkpoint.newest(out / "checkpoints")[0] == out / "checkpoints" / checkpoint.step_name(STEPS)
    faults.finish(out, processes=2)  # nothing is left to do, and its losses are the unbroken run's
