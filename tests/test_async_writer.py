"""Checkpoints written while training goes on: what they hold, what a kill or a full disk leaves, whose run it is."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mounts import mounted_disk
from processes import start_each
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from training import loss_trace, read_lines, tiny_config

from dinoreg.checkpoint import async_writer
from dinoreg.checkpoint import format as checkpoint
from dinoreg.checkpoint.async_writer import Writer
from dinoreg.config.schema import CheckpointConfig
from dinoreg.distributed.process_group import ALONE, Ranks
from dinoreg.runtime.digest import digest
from dinoreg.runtime.errors import RunError, UserError
from dinoreg.train.loop import pretrain

BOTH = pytest.mark.parametrize("asynchronous", [True, False], ids=["background", "foreground"])


def tensors(value: float, size: int = 5) -> dict[str, Any]:
    return {
        "student": {"a.weight": torch.full((2, 3), value), "b": torch.full((size,), -value)},
        "teacher": {"a.weight": torch.full((2, 3), value + 0.5), "b": torch.full((size,), value / 3)},
        "optimizer": {"a.weight": {"step": torch.tensor(value), "exp_avg": torch.full((2, 3), value / 7)}},
        "scale": torch.tensor(value),
    }


joined: list[Ranks] = [ALONE]  # the processes that this one is among; the last entry counts


def open_writer(run: Path, **options: Any) -> Writer:
    run.mkdir(exist_ok=True)
    timeout = options.pop("timeout", 30.0)
    config = CheckpointConfig(**{"keep": 9, **options})
    return Writer(run, config, {"architecture": {"dim": 8}, "config_hash": "abc"}, timeout, joined[-1])


def steps_of(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*"))


def leftovers(run: Path) -> list[str]:
    """Names that only an unfinished write leaves behind."""
    names = [path.name for folder in (run, run / "checkpoints", run / "teacher") for path in folder.glob("*")]
    names += [path.name for path in (run / "checkpoints").glob(".*")]
    return sorted(name for name in names if name.startswith(".") or name.endswith(".part"))


def assert_holds(run: Path, step: int, expected: dict[str, Any]) -> None:
    path, damaged = checkpoint.newest(run / "checkpoints")
    assert (path, damaged) == (run / "checkpoints" / checkpoint.step_name(step), [])
    target = tensors(0.0, expected["student"]["b"].numel())
    assert checkpoint.load(path, target)["step"] == step
    found = checkpoint.flatten(target)
    for name, value in checkpoint.flatten(expected).items():
        assert torch.equal(found[name], value), name


class Held:
    """Stands before `dcp.save`, which begins when it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        write = checkpoint.dcp.save

        def save(*args: Any, **kwargs: Any) -> Any:
            self.begun.set()
            assert self.go.wait(30)
            return write(*args, **kwargs)

        monkeypatch.setattr(checkpoint.dcp, "save", save)


def fail_at(steps: set[int], monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    write = checkpoint.dcp.save

    def save(*args: Any, **kwargs: Any) -> Any:
        if any(checkpoint.step_name(step) in str(kwargs["checkpoint_id"]) for step in steps):
            raise error
        return write(*args, **kwargs)

    monkeypatch.setattr(checkpoint.dcp, "save", save)


# ------------------------------------------------------------------------------------------------------------
# What is written, and when


@BOTH
def test_a_checkpoint_and_its_teacher_file_hold_the_state_of_the_call(tmp_path: Path, asynchronous: bool) -> None:
    with open_writer(tmp_path, asynchronous=asynchronous) as writer:
        for step in (1, 2, 3):
            state = tensors(float(step))
            writer.save(step, state, {"step": step}, best=step == 2)
        writer.wait()
        assert writer.saved == 3
        assert writer.poll() == []
    assert_holds(tmp_path, 3, tensors(3.0))
    assert checkpoint.read_pointer(tmp_path / "checkpoints", "last") == "step_0000003"
    assert checkpoint.read_pointer(tmp_path / "checkpoints", "best") == "step_0000002"
    for step in (1, 2, 3):
        file = tmp_path / "teacher" / f"{checkpoint.step_name(step)}.safetensors"
        description = json.loads(file.with_suffix(".json").read_text())
        assert (description["format"], description["step"]) == ("dinoreg-teacher", step)
        assert (description["architecture"], description["config_hash"]) == ({"dim": 8}, "abc")
        assert description["sha256"] == digest(file)
        found, expected = load_file(file), tensors(float(step))["teacher"]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert leftovers(tmp_path) == []


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    state, numbers = tensors(1.0), {"step": 1, "history": {"best": 0.5}}
    with open_writer(tmp_path) as writer:
        writer.save(1, state, numbers)
        assert held.begun.wait(30)
        for tensor in checkpoint.flatten(state).values():
            tensor.add_(100.0)
        numbers["history"]["best"] = 0.75  # type: ignore[index]
        assert steps_of(tmp_path) == []
        assert writer.saved is None
        held.go.set()
        writer.wait()
    assert_holds(tmp_path, 1, tensors(1.0))
    assert checkpoint.verify(tmp_path / "checkpoints" / "step_0000001")["history"] == {"best": 0.5}


def test_the_next_save_waits_for_the_one_before_and_says_how_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    with open_writer(tmp_path) as writer:
        writer.save(1, tensors(1.0), {"step": 1})
        assert writer.read_stall() > 0
        threading.Timer(0.4, held.go.set).start()
        writer.save(2, tensors(2.0), {"step": 2})
        assert writer.saved is not None  # the one before is whole
        assert writer.read_stall() > 0.3
        assert writer.read_stall() == 0
    assert_holds(tmp_path, 2, tensors(2.0))  # closing has finished it


def test_the_memory_of_the_copy_is_used_again(tmp_path: Path) -> None:
    state = tensors(1.0)
    addresses = []
    with open_writer(tmp_path) as writer:
        for step in (1, 2):
            for tensor in checkpoint.flatten(state).values():
                tensor.fill_(step)
            staged = writer._stage(checkpoint.flatten(state))
            assert all(bool((tensor == step).all()) for tensor in staged.values())
            addresses.append([tensor.data_ptr() for tensor in staged.values()])
    assert addresses[0] == addresses[1]
    assert not set(addresses[0]) & {tensor.data_ptr() for tensor in checkpoint.flatten(state).values()}


def test_the_teacher_file_is_there_before_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, seen = checkpoint.write_teacher, []

    def write_teacher(*args: Any) -> Path:
        seen.append(steps_of(tmp_path))
        return write(*args)

    monkeypatch.setattr(checkpoint, "write_teacher", write_teacher)
    with open_writer(tmp_path) as writer:
        writer.save(1, tensors(1.0), {"step": 1}, wait=True)
    assert seen == [[]]


@pytest.mark.slow
def test_a_run_has_the_same_losses_whether_and_however_checkpoints_are_written(tmp_path: Path) -> None:
    plain = loss_trace(pretrain(tiny_config(tmp_path / "plain", checkpoint__every=100)))
    for asynchronous in (True, False):
        out = tmp_path / f"asynchronous={asynchronous}"
        pretrain(tiny_config(out, checkpoint__every=1, checkpoint__asynchronous=asynchronous, checkpoint__keep=20))
        assert loss_trace(out) == plain
        assert steps_of(out) == list(range(1, 9))
        lines = read_lines(out / "metrics.jsonl")
        assert lines[0]["checkpoint_stall"] == 0
        assert all(line["checkpoint_stall"] > 0 for line in lines[1:])
    stalls = [
        sum(line["checkpoint_stall"] for line in read_lines(tmp_path / f"asynchronous={kind}" / "metrics.jsonl"))
        for kind in (True, False)
    ]
    assert min(stalls) > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_state_on_a_cuda_device_is_copied_through_pinned_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    state = tensors(1.0, size=1_000_000)
    for part in ("student", "teacher"):
        state[part] = {name: tensor.cuda() for name, tensor in state[part].items()}
    with open_writer(tmp_path) as writer:
        writer.save(1, state, {"step": 1})
        for tensor in checkpoint.flatten(state).values():
            tensor.add_(100.0)
        held.go.set()
        writer.wait()
        staged = writer._stage(checkpoint.flatten(state))
        assert staged["student.b"].device.type == "cpu"
        assert staged["student.b"].is_pinned()
    assert_holds(tmp_path, 1, tensors(1.0, size=1_000_000))


# ------------------------------------------------------------------------------------------------------------
# What is kept


def test_one_checkpoint_is_kept_for_every_so_many_hours_with_its_teacher_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1_000_000.0]
    monkeypatch.setattr(checkpoint.time, "time", lambda: now[0])
    with open_writer(tmp_path, keep=2, keep_hours=2.0) as writer:
        for step in range(1, 13):
            now[0] += 1800  # half an hour each; two hours are four steps
            writer.save(step, tensors(float(step)), {"step": step}, best=step == 6, wait=True)
    assert steps_of(tmp_path) == [1, 5, 6, 9, 11, 12]
    assert sorted(int(path.stem[5:]) for path in (tmp_path / "teacher").glob("*.json")) == [1, 5, 6, 9, 11, 12]
    assert sorted(int(path.stem[5:]) for path in (tmp_path / "teacher").glob("*.safetensors")) == [1, 5, 6, 9, 11, 12]


def test_a_clock_that_is_set_back_loses_no_checkpoint_that_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1_000_000.0]
    monkeypatch.setattr(checkpoint.time, "time", lambda: now[0])
    with open_writer(tmp_path, keep=1, keep_hours=1.0) as writer:
        for step, change in ((1, 3600), (2, 3600), (3, -500_000), (4, 60), (5, 3600), (6, 60)):
            now[0] += change
            writer.save(step, tensors(float(step)), {"step": step}, wait=True)
    assert steps_of(tmp_path) == [1, 2, 3, 5, 6]


def test_a_step_reached_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        writer.save(4, tensors(1.0), {"step": 4})
        writer.save(4, tensors(2.0), {"step": 4}, wait=True)
    assert_holds(tmp_path, 4, tensors(2.0))
    assert leftovers(tmp_path) == []


# ------------------------------------------------------------------------------------------------------------
# What goes wrong


@BOTH
def test_a_failure_is_told_once_with_a_remedy_and_the_one_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    fail_at({2, 3, 5, 6}, monkeypatch, OSError(28, "No space left on device"))
    with open_writer(tmp_path, asynchronous=asynchronous) as writer:
        told = []
        for step in range(1, 8):  # never three in a row
            writer.save(step, tensors(float(step)), {"step": step})
            while writer._thread is not None and writer._thread.is_alive():
                time.sleep(0.001)
            told.append([failure.step for failure in writer.poll()])
            assert writer.poll() == []
            assert leftovers(tmp_path) == []
        writer.wait()
    assert told == [[], [2], [3], [], [5], [6], []]
    assert steps_of(tmp_path) == [1, 4, 7]
    assert_holds(tmp_path, 7, tensors(7.0))


@BOTH
def test_too_many_failures_in_a_row_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    fail_at(set(range(2, 20)), monkeypatch, OSError(122, "Disk quota exceeded"))
    with open_writer(tmp_path, asynchronous=asynchronous, max_failures=2) as writer:
        for step in (1, 2) if asynchronous else (1,):
            writer.save(step, tensors(float(step)), {"step": step})
        writer.save(2 + asynchronous, tensors(0.0), {"step": 0})
        with pytest.raises(RunError, match=r"2 checkpoints in a row could not be written; .* Disk quota exceeded"):
            writer.save(3 + asynchronous, tensors(0.0), {"step": 0})
        failures = writer.poll()
    assert [failure.step for failure in failures] == [2, 3]
    assert "quota" in failures[0].remedy
    assert_holds(tmp_path, 1, tensors(1.0))


@BOTH
def test_the_last_checkpoint_of_a_run_has_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    fail_at({2}, monkeypatch, PermissionError(13, "Permission denied"))
    with open_writer(tmp_path, asynchronous=asynchronous) as writer:
        writer.save(1, tensors(1.0), {"step": 1})
        with pytest.raises(RunError, match="step_0000002 could not be written: Permission denied"):
            writer.save(2, tensors(2.0), {"step": 2}, wait=True)
        (failure,) = writer.poll()
    assert "right to write" in failure.remedy
    assert_holds(tmp_path, 1, tensors(1.0))


@BOTH
def test_the_last_checkpoint_is_tried_however_many_have_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    fail_at({2, 3}, monkeypatch, OSError(28, "No space left on device"))
    with open_writer(tmp_path, asynchronous=asynchronous, max_failures=2 if asynchronous else 3) as writer:
        for step in (1, 2, 3):
            writer.save(step, tensors(float(step)), {"step": step})
        writer.save(4, tensors(4.0), {"step": 4}, wait=True)
        assert writer.read_published() == [1, 4]
        assert writer.read_published() == []
    assert_holds(tmp_path, 4, tensors(4.0))


def test_a_checkpoint_that_cannot_be_removed_stays_and_nothing_else_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint, "retire", refuse)
    monkeypatch.setattr(checkpoint, "retire_teachers", refuse)
    with open_writer(tmp_path, keep=1) as writer:
        for step in (1, 2):
            writer.save(step, tensors(float(step)), {"step": step}, wait=True)
    assert steps_of(tmp_path) == [1, 2]


def test_a_programming_error_in_the_background_is_raised_where_training_can_see_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at({1}, monkeypatch, ZeroDivisionError("a bug"))
    with open_writer(tmp_path) as writer:
        writer.save(1, tensors(1.0), {"step": 1})
        with pytest.raises(ZeroDivisionError, match="a bug"):
            writer.save(2, tensors(2.0), {"step": 2})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB, mounted for this test."""
    with mounted_disk(tmp_path / "disk", "3m") as folder:
        yield folder


def test_on_a_disk_that_fills_up_every_cause_is_no_space_and_nothing_is_torn(small_disk: Path) -> None:
    """A checkpoint of 1.2 MB, of which 0.4 MB are the teacher file, with less and less room for it."""
    big = tensors(1.0, size=100_000)
    with open_writer(small_disk, max_failures=99) as writer:
        writer.save(1, big, {"step": 1}, wait=True)
        free = shutil.disk_usage(small_disk).free
        failed = []
        for step, room in enumerate((0, 4096, 200_000, 700_000, 810_000, 1_000_000, 1_190_000), 2):
            (small_disk / "filling").write_bytes(b"x" * (free - room))
            writer.save(step, big, {"step": step})
            while writer._thread is not None and writer._thread.is_alive():
                time.sleep(0.001)
            failed += writer.poll()
            assert leftovers(small_disk) == []
            assert_holds(small_disk, 1, big)
            (small_disk / "filling").unlink()
        assert [failure.step for failure in failed] == list(range(2, 9))
        assert {failure.message.rpartition(": ")[2] for failure in failed} == {"No space left on device"}
        assert all("Make room" in failure.remedy for failure in failed)
        assert any("teacher" in failure.message for failure in failed)
        assert any("checkpoints" in failure.message for failure in failed)
        writer.save(9, big, {"step": 9}, wait=True)
    assert_holds(small_disk, 9, big)


def test_a_disk_that_turns_read_only_is_told_and_what_is_there_can_still_be_read(small_disk: Path) -> None:
    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", small_disk], check=True)

    with open_writer(small_disk) as writer:
        writer.save(1, tensors(1.0), {"step": 1}, wait=True)
        remount("ro")
        writer.save(2, tensors(2.0), {"step": 2})
        with pytest.raises(RunError, match="Read-only file system"):
            writer.save(3, tensors(3.0), {"step": 3}, wait=True)
        assert ["mounted for writing" in failure.remedy for failure in writer.poll()] == [True, True]
        assert_holds(small_disk, 1, tensors(1.0))
        with pytest.raises(UserError, match="cannot be written"):
            open_writer(small_disk)
        remount("rw")
        writer.save(4, tensors(4.0), {"step": 4}, wait=True)
    assert_holds(small_disk, 4, tensors(4.0))


@pytest.mark.parametrize("damage", ["flipped byte", "truncated", "file missing", "no metadata", "teacher alone"])
def test_a_damaged_checkpoint_is_passed_over_when_resuming(tmp_path: Path, damage: str) -> None:
    with open_writer(tmp_path) as writer:
        for step in (1, 2):
            writer.save(step, tensors(float(step)), {"step": step})
    bad = tmp_path / "checkpoints" / "step_0000002"
    shard = next(bad.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    if damage == "flipped byte":
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif damage == "truncated":
        shard.write_bytes(content[:-1])
    elif damage == "file missing":
        shard.unlink()
    elif damage == "no metadata":
        (bad / ".metadata").unlink()
    else:
        shutil.rmtree(bad)
    path, damaged = checkpoint.newest(tmp_path / "checkpoints")
    assert path == tmp_path / "checkpoints" / "step_0000001"
    assert len(damaged) == (damage != "teacher alone")
    assert all("step_0000002" in message and "passed over" in message for message in damaged)


# ------------------------------------------------------------------------------------------------------------
# Kills

# Each child of this script dies by SIGKILL at one instant of writing step 2 over a whole step 1.
KILLS = """
    import os, signal, sys
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    sys.path.insert(0, sys.argv[2])
    from dinoreg.checkpoint import format as checkpoint
    import test_async_writer as t

    def kill(module, name, late=False, to=""):
        function = getattr(module, name)
        def run(*args, **kwargs):
            meant = all(to in str(arg) for arg in args[1:2]) if to else True
            if meant and not late:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if meant:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        setattr(module, name, run)

    INSTANTS = {
        "begun": (checkpoint.dcp, "save"),
        "files without metadata": (checkpoint.dcp.FileSystemWriter, "finish"),
        "files": (checkpoint.dcp, "save", True),
        "digests": (checkpoint, "_own_files", True),
        "teacher written aside": (checkpoint, "save_file", True),
        "teacher described": (os, "replace", False, "2.safetensors"),
        "teacher": (checkpoint, "write_teacher", True),
        "before the name": (os, "rename", False, "step_0000002"),
        "after the name": (os, "rename", True, "/step_0000002"),
        "before the pointer": (checkpoint, "write_pointer"),
        "half a pointer": (os, "replace", False, "last"),
        "before retiring": (checkpoint, "retire"),
        "while retiring": (os, "rename", True, "discarded"),
        "before retiring teachers": (checkpoint, "retire_teachers"),
    }

    for number, (name, instant) in enumerate(INSTANTS.items()):
        run = Path(sys.argv[1]) / str(number)
        child = os.fork()
        if child == 0:
            writer = t.open_writer(run, keep=1)
            writer.save(1, t.tensors(1.0), {"step": 1}, wait=True)
            kill(*instant)
            writer.save(2, t.tensors(2.0), {"step": 2}, wait=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(name, os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, sep=":")
"""
PUBLISHED = {
    "after the name",
    "before the pointer",
    "half a pointer",
    "before retiring",
    "while retiring",
    "before retiring teachers",
}


@pytest.mark.slow
def test_a_kill_at_any_instant_of_writing_leaves_a_whole_checkpoint_and_little_to_clear_away(tmp_path: Path) -> None:
    script = tmp_path / "kills.py"
    script.write_text(textwrap.dedent(KILLS))
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(here.parent)}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(here)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split(":") for line in done.stdout.splitlines()]
    assert [line for line in lines if line[1] != str(int(signal.SIGKILL))] == [], "a kill did not happen"
    assert len(lines) > 10
    assert {name for name, _ in lines} > PUBLISHED
    for number, (name, _) in enumerate(lines):
        run = tmp_path / str(number)
        whole = 2 if name in PUBLISHED else 1
        assert_holds(run, whole, tensors(float(whole)))
        teacher = run / "teacher" / f"{checkpoint.step_name(whole)}.safetensors"
        assert json.loads(teacher.with_suffix(".json").read_text())["sha256"] == digest(teacher), name
        with open_writer(run, keep=1) as writer:  # the run is started again
            assert leftovers(run) == [], name
            writer.save(3, tensors(3.0), {"step": 3}, wait=True)
        assert_holds(run, 3, tensors(3.0))
        assert steps_of(run) == [3], name
        assert {path.name for path in (run / "teacher").iterdir()} == {
            "step_0000003.json",
            "step_0000003.safetensors",
        }, name


# ------------------------------------------------------------------------------------------------------------
# Two copies of a job


@pytest.mark.parametrize("moment", ["between two saves", "during the writing", "just before the name"])
def test_a_copy_that_was_taken_over_publishes_nothing_more_and_names_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    held = Held(monkeypatch)
    held.go.set()
    old = open_writer(tmp_path)
    old.save(1, tensors(1.0), {"step": 1}, wait=True)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(async_writer.socket, "gethostname", lambda: "n2")
    others: list[Writer] = []
    if moment == "between two saves":
        others.append(open_writer(tmp_path))
        old.save(2, tensors(2.0), {"step": 2})
    elif moment == "during the writing":
        held.go.clear()
        old.save(2, tensors(2.0), {"step": 2})
        assert held.begun.wait(30)
        others.append(open_writer(tmp_path))
        held.go.set()
    else:
        write = checkpoint.write_teacher

        def take_over(*args: Any) -> Path:
            others.append(open_writer(tmp_path))
            monkeypatch.setattr(checkpoint, "write_teacher", write)
            return write(*args)

        monkeypatch.setattr(checkpoint, "write_teacher", take_over)
        old.save(2, tensors(2.0), {"step": 2})
    with pytest.raises(RunError, match=r"was taken over by job 12 \(restart 1\) on n2 at .*; this copy \(process \d+"):
        old.save(3, tensors(3.0), {"step": 3})
    assert old.poll() == []  # the run's list of events is the other's now
    old.close()
    assert steps_of(tmp_path) == [1]
    assert leftovers(tmp_path) == []

    (new,) = others
    new.save(2, tensors(2.5), {"step": 2}, wait=True)
    new.close()
    assert_holds(tmp_path, 2, tensors(2.5))


def test_the_owner_of_a_run_says_where_and_when_it_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    first = open_writer(tmp_path).lease
    assert json.loads((tmp_path / "owner.json").read_text())["pid"] == os.getpid()
    assert re.fullmatch(rf"process {os.getpid()} on \S+ at \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d", str(first))
    second = open_writer(tmp_path).lease
    assert async_writer.owner_of(tmp_path) == second
    assert second.token != first.token
    for content in ("", "[]", '{"token": "x", "extra": 1}'):
        (tmp_path / "owner.json").write_text(content)
        assert async_writer.owner_of(tmp_path) is None


# ------------------------------------------------------------------------------------------------------------
# Many processes

SHAPES = {"tokens": (1, 1, 6), "weight": (7, 5), "bias": (7,), "wide": (2, 50_000)}


def whole_values(seed: int) -> dict[str, dict[str, Tensor]]:
    """The state of a run as one process sees it: student and teacher (sharded below), the rest (equal everywhere)."""
    generator = torch.Generator().manual_seed(seed)
    sharded = {
        part: {k: torch.randn(v, generator=generator) for k, v in SHAPES.items()} for part in ("student", "teacher")
    }
    plain = {f"center{i}": torch.randn(10_000 * (i + 1), generator=generator) for i in range(4)}
    return {**sharded, "plain": {**plain, "step": torch.tensor(float(seed))}}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


def spread_values(seed: int | None, world_size: int, hybrid: bool = False) -> dict[str, Any]:
    """`whole_values` on this process: FSDP2's DTensors, and plain tensors; None: zeros to load into."""
    values = whole_values(seed or 0)
    if hybrid:  # copies of the shards on the second half of the processes
        mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("copies", "shards"))
    else:
        mesh = init_device_mesh("cpu", (world_size,))
    state: dict[str, Any] = {"plain": values["plain"]}
    for part in ("student", "teacher"):
        network = Network()
        network.load_state_dict(values[part])
        fully_shard(network, mesh=mesh)
        state[part] = network.state_dict()
        assert all(isinstance(tensor, DTensor) for tensor in state[part].values())
    if seed is None:
        with torch.no_grad():
            for tensor in checkpoint.flatten(state).values():
                (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()
    return state


def assert_whole(state: dict[str, Any], seed: int) -> None:
    expected = checkpoint.flatten(whole_values(seed))
    found = checkpoint.flatten(state)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        assert torch.equal(whole, expected[name]), name


def load_whole(run: Path, world_size: int, seed: int) -> None:
    """The newest checkpoint, by however many processes there are now, is the state of `seed`."""
    path, damaged = checkpoint.newest(run / "checkpoints", joined[-1])
    assert path is not None
    assert damaged == []
    state = spread_values(None, world_size)
    assert checkpoint.load(path, state, verified=True, ranks=joined[-1])["seed"] == seed
    assert_whole(state, seed)


def bytes_of(values: dict[str, Any]) -> int:
    return sum(tensor.nbytes for tensor in checkpoint.flatten(values).values())


def written_bytes(run: Path, step: int) -> dict[str, int]:
    files = (run / "checkpoints" / checkpoint.step_name(step)).glob("*.distcp")
    return {path.name: path.stat().st_size for path in files}


def _save_by_two(number: int, folder: Path) -> None:
    run = folder / "sharded"
    writer = open_writer(run)
    state = spread_values(1, 2)
    writer.save(1, state, {"step": 1, "seed": 1})
    with torch.no_grad():
        for tensor in checkpoint.flatten(state).values():
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).add_(1.0)  # training goes on
    for _ in range(50):  # with collectives on the default group meanwhile
        total = torch.ones(3)
        dist.all_reduce(total)
        assert total.tolist() == [2.0, 2.0, 2.0]
    writer.wait()
    assert writer.saved == 1
    assert sum(written_bytes(run, 1).values()) < 1.1 * bytes_of(whole_values(1)) + 30_000
    load_whole(run, 2, 1)

    # A disk that is full for one process is full for all.
    write = checkpoint.dcp.FileSystemWriter.write_data

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    if number == 1:
        checkpoint.dcp.FileSystemWriter.write_data = full
    writer.save(2, spread_values(2, 2), {"step": 2, "seed": 2})
    writer._settle(None)
    (failure,) = writer.poll()
    assert "No space left on device" in failure.message
    checkpoint.dcp.FileSystemWriter.write_data = write
    assert steps_of(run) == [1]

    # So is one that fails while files are summed up.
    own_files = checkpoint._own_files
    if number == 1:
        checkpoint._own_files = full
    writer.save(2, spread_values(2, 2), {"step": 2, "seed": 2})
    with pytest.raises(RunError, match="No space left on device") as caught:
        writer.wait()
    assert writer.ranks.is_common(caught.value)
    assert caught.value.reported == (number == 1)
    checkpoint._own_files = own_files
    assert [failure.step for failure in writer.poll()] == [2]

    # A flipped byte in the file of one process is found by all, whoever checks it.
    writer.save(2, spread_values(2, 2), {"step": 2, "seed": 2}, wait=True)
    load_whole(run, 2, 2)
    for name in written_bytes(run, 2):
        shard = run / "checkpoints" / "step_0000002" / name
        content = shard.read_bytes()
        dist.barrier()
        if number == 0:
            shard.write_bytes(content[:-200] + bytes([content[-200] ^ 1]) + content[-199:])
        dist.barrier()
        path, damaged = checkpoint.newest(run / "checkpoints", joined[-1])
        assert path == run / "checkpoints" / "step_0000001"
        assert len(damaged) == 1
        assert name in damaged[0]
        dist.barrier()
        if number == 0:
            shard.write_bytes(content)
        dist.barrier()
    load_whole(run, 2, 2)

    # Another architecture is refused by all.
    strange = spread_values(None, 2)
    strange["plain"]["center0"] = torch.zeros(3)
    with pytest.raises(UserError, match=r"plain.center0 is \(10000,\), this model has \(3,\)"):
        checkpoint.load(run / "checkpoints" / "step_0000002", strange, ranks=joined[-1])
    writer.close()

    # Two copies of everything: DDP's plain tensors, and HSDP's shards, are written once.
    for name, copied in (("plain", whole_values(5)), ("hybrid", spread_values(5, 2, hybrid=True))):
        with open_writer(folder / name) as writer:
            writer.save(1, copied, {"step": 1, "seed": 5}, wait=True)
        sizes = written_bytes(folder / name, 1)
        assert sum(sizes.values()) < 1.1 * bytes_of(whole_values(5)) + 30_000
        if name == "plain":
            assert len(sizes) == 2
            assert max(sizes.values()) < 0.7 * sum(sizes.values())  # and by both
        load_whole(folder / name, 2, 5)


def _load_and_save_by_three(number: int, folder: Path) -> None:
    for name, seed in (("sharded", 2), ("plain", 5), ("hybrid", 5)):
        load_whole(folder / name, 3, seed)
    with open_writer(folder / "sharded", asynchronous=False) as writer:
        writer.save(3, spread_values(3, 3), {"step": 3, "seed": 3}, wait=True)
    with open_writer(folder / "plain") as writer:
        writer.save(3, whole_values(6), {"step": 3, "seed": 6}, wait=True)


def _load_by_two(number: int, folder: Path) -> None:
    load_whole(folder / "sharded", 2, 3)
    load_whole(folder / "plain", 2, 6)


def _lose_one_of_two(number: int, folder: Path) -> None:
    """A process dies while both write: the other learns it at once, and does not wait for ever."""
    run = folder / "lost"
    writer = open_writer(run)
    writer.save(1, spread_values(1, 2), {"step": 1, "seed": 1}, wait=True)
    if number == 1:
        checkpoint._own_files = lambda *_: os._exit(0)
    writer.save(2, spread_values(2, 2), {"step": 2, "seed": 2})
    begun = time.monotonic()
    with pytest.raises(RuntimeError):
        writer.save(3, spread_values(3, 2), {"step": 3, "seed": 3})
    writer.close()
    assert time.monotonic() - begun < 10
    assert steps_of(run) == [1]
    (folder / "survived").touch()
    os._exit(0)  # as the group is broken, and its threads are not to be waited for


def _worker(number: int, folder: str) -> None:
    torch.set_num_threads(1)
    for phase, (world_size, work) in enumerate(
        ((2, _save_by_two), (3, _load_and_save_by_three), (2, _load_by_two), (2, _lose_one_of_two))
    ):
        if number < world_size:
            store = f"file://{folder}/store{phase}"
            dist.init_process_group("gloo", init_method=store, rank=number, world_size=world_size)
            joined.append(Ranks.of_default_group(30.0))
            work(number, Path(folder))
            dist.destroy_process_group()
        else:  # until the others are through
            after = f"{folder}/store{phase + 1}" if phase < 3 else folder
            while not Path(after).exists():
                time.sleep(0.05)


@pytest.mark.slow
def test_what_any_number_of_processes_wrote_any_other_reads_and_one_failure_is_everybodys(tmp_path: Path) -> None:
    start_each(3, _worker, str(tmp_path))
    assert (tmp_path / "survived").exists()

    for name, step, seed in (("sharded", 3, 3), ("plain", 3, 6), ("hybrid", 1, 5)):
        path = tmp_path / name / "checkpoints" / checkpoint.step_name(step)
        state = whole_values(0)
        checkpoint.load(path, state)
        assert_whole(state, seed)
        teacher = load_file(tmp_path / name / "teacher" / f"{checkpoint.step_name(step)}.safetensors")
        expected = whole_values(seed)["teacher"]
        assert teacher.keys() == expected.keys()
        assert all(torch.equal(teacher[key], value) for key, value in expected.items())
        assert leftovers(tmp_path / name) == []

    path, damaged = checkpoint.newest(tmp_path / "lost" / "checkpoints")
    assert (path, damaged) == (tmp_path / "lost" / "checkpoints" / "step_0000001", [])
