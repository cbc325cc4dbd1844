"""Disks that fill up, turn read-only or hand back other bytes than were written."""

from __future__ import annotations

import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from harness import STEPS, Faults, Hook, assert_one_line, assert_sound
from hooks import KILL
from mounts import mount
from training import loss_trace

from dinoreg.checkpoint import format as checkpoint


def waiting_at(*steps: int, folder: Path) -> tuple[list[Path], list[Hook]]:
    """Hooks of a rank that waits at each of these steps, and the files by which it says so and goes on."""
    flags = [folder / f"step-{step}" for step in steps]
    return flags, [("at_step", {"step": step, "what": "wait", "flag": str(flag)}) for step, flag in zip(steps, flags)]


@pytest.mark.slow
@pytest.mark.parametrize("room", [0.0, 0.5])
def test_a_full_disk_ends_a_run_in_words_and_with_room_again_it_goes_on(
    room: float, faults: Faults, small_disk: Path, tmp_path: Path
) -> None:
    """Room for half a checkpoint, or none. What fails first is a matter of luck: a checkpoint, or a line of metrics."""
    out = small_disk / "run"
    flag = tmp_path / "flag"
    start = faults.start(
        out,
        processes=2,
        hooks={0: [("at_step", {"step": 3, "what": "wait", "flag": str(flag)})]},
        checkpoint__max_failures=2,
    )
    faults.until(Path(f"{flag}.reached"), start)
    filling = small_disk / "filling"
    faults.until(out / "checkpoints" / "last", start)
    checkpoint_size = sum(path.stat().st_size for path in (out / "checkpoints" / "step_0000002").iterdir())
    filling.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - round(room * checkpoint_size)))
    Path(f"{flag}.go").touch()
    assert faults.wait(start) == [1, 1], start.describe()
    said = start.ranks[0].said() + start.ranks[1].said()
    assert any("No space left on device" in line for line in said), start.describe()
    assert all(len(rank.said()) <= 1 for rank in start.ranks)
    assert_sound(out, 2)
    filling.unlink()
    faults.finish(out, processes=2)


@pytest.mark.slow
def test_a_disk_that_is_full_between_two_checkpoints_costs_no_line(
    faults: Faults, small_disk: Path, tmp_path: Path
) -> None:
    out = small_disk / "run"
    flags, hooks = waiting_at(3, 5, folder=tmp_path)
    start = faults.start(out, hooks={0: hooks}, checkpoint__every=STEPS, log__tensorboard=True)
    faults.until(Path(f"{flags[0]}.reached"), start)
    filling = small_disk / "filling"
    with filling.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    Path(f"{flags[0]}.go").touch()
    faults.until(Path(f"{flags[1]}.reached"), start)
    filling.unlink()
    Path(f"{flags[1]}.go").touch()
    assert faults.wait(start) == [0], start.describe()
    console = start.ranks[0].console()
    assert console.count("metrics.jsonl: cannot be written (No space left on device)") == 1
    assert "Traceback" not in console
    assert loss_trace(out) == faults.unbroken(1)
    assert_sound(out, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("mended", [True, False])
def test_a_run_goes_on_past_a_disk_that_is_read_only_for_a_while_and_stops_in_words_when_it_stays_so(
    mended: bool, faults: Faults, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    flags, hooks = waiting_at(3, 5, folder=tmp_path)
    options = {"checkpoint__max_failures": 2, "checkpoint__asynchronous": False}  # so that 2 and 4 are through by then
    start = faults.start(out, processes=2, hooks={0: hooks}, **options)
    faults.until(Path(f"{flags[0]}.reached"), start)
    # A folder in use refuses to be remounted; bound to itself, it refuses whatever is opened from now on.
    mount("--bind", out, out)
    try:
        mount("-o", "remount,bind,ro", out)
        Path(f"{flags[0]}.go").touch()
        faults.until(Path(f"{flags[1]}.reached"), start)
        if not mended:
            Path(f"{flags[1]}.go").touch()
            assert faults.wait(start) == [1, 1], start.describe()
    finally:
        subprocess.run(["umount", "-l", out], check=True)
    if mended:
        Path(f"{flags[1]}.go").touch()
        assert faults.wait(start) == [0, 0], start.describe()
        assert loss_trace(out) == faults.unbroken(2)
    else:
        assert_one_line(start.ranks[0], "2 checkpoints in a row could not be written", "Read-only file system")
        assert start.ranks[1].said() == []
    console = start.ranks[0].console()
    assert "step_0000004 could not be written: Read-only file system" in console
    assert "mounted for writing" in console
    assert_sound(out, STEPS if mended else 2)
    if not mended:
        faults.finish(out, processes=2)


@pytest.mark.slow
def test_damaged_shards_are_named_and_the_newest_whole_checkpoint_is_taken(faults: Faults, tmp_path: Path) -> None:
    strategy = "fsdp"
    out = tmp_path / "run"
    kept = {"checkpoint__keep": 9}
    hooks = {rank: [("in_writing", {"step": 10, "moment": "begun", **KILL})] for rank in range(2)}
    start = faults.start(out, processes=2, strategy=strategy, hooks=hooks, **kept)
    assert faults.wait(start) == [-signal.SIGKILL] * 2, start.describe()
    assert_sound(out)
    *_, before, third, second, newest = sorted((out / "checkpoints").glob("step_*"))
    flipped, truncated, missing = newest / "__1_0.distcp", second / "__0_0.distcp", third / "__1_0.distcp"
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    truncated.write_bytes(truncated.read_bytes()[:-1])
    missing.unlink()
    start = faults.finish(out, processes=2, strategy=strategy, **kept)
    console = start.ranks[0].console()
    for shard, words in ((flipped, "digest differs"), (truncated, "bytes"), (missing, "missing")):
        (line,) = [line for line in console.splitlines() if shard.parent.name in line and "passed over" in line]
        assert shard.name in line
        assert words in line
    assert f"resumed from {before}" in console
    assert checkpoint.newest(out / "checkpoints")[1] == []  # what was damaged has been written anew
