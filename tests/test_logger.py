"""What a run leaves to read: lines that are removed and kept on resume, numbers that JSON has not, console lines."""

from __future__ import annotations

import errno
import io
import itertools
import json
import logging
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from dinoreg.train import logger as log_module
from dinoreg.train.logger import LINES, LineFile, RunLog, TensorBoard, open_trackers


def values(step: int, **others: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 7.25,
        "total_loss": 5.5,
        "dino_global_crops_loss": 1.5,
        "dino_local_crops_loss": 2.5,
        "ibot_loss": 3.0,
        "koleo_loss": 0.25,
        "lr": 1.25e-3,
        "images_per_second": 99.96,
        "step_time": 2.0,
        **others,
    }


def open_log(out: Path, *, step: int = 0, num_steps: int = 80, tensorboard: bool = False) -> RunLog:
    out.mkdir(exist_ok=True)
    trackers = open_trackers(out, step, {}, tensorboard)
    return RunLog(out, step=step, num_steps=num_steps, trackers=trackers)


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def strict(line: str) -> dict[str, Any]:
    """JSON as the standard has it, without NaN and Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(line, parse_constant=refuse)


def test_lines_of_steps_that_will_be_taken_again_are_removed_on_resume(tmp_path: Path) -> None:
    (tmp_path / "health").mkdir()
    for name in LINES:
        (tmp_path / name).write_text("".join(json.dumps({"step": step, "x": name}) + "\n" for step in range(1, 9)))
    with open_log(tmp_path, step=5) as log:
        log.metrics(values(6))
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5, 6]
    for name in LINES[1:]:
        assert steps_in(tmp_path / name) == [1, 2, 3, 4, 5]
        assert all(json.loads(line)["x"] == name for line in (tmp_path / name).read_text().splitlines())


def test_a_new_run_in_the_folder_of_a_run_without_a_checkpoint_starts_with_empty_lists(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    with open_log(tmp_path, step=0):
        pass
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize(
    "torn", ['{"step": 3, "total_lo', '{"step": 3}'[:-1], "\0\0\0\0", "3\n", "[3]\n", '{"loss": 1.0}\n', "\xff\xfe"]
)
def test_a_last_line_that_a_kill_cut_short_is_removed(torn: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn.encode("latin-1"))
    with open_log(tmp_path, step=5) as log:
        log.metrics(values(6))
    assert steps_in(path) == [1, 2, 6]


def test_a_whole_last_line_without_its_newline_does_not_run_into_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    with open_log(tmp_path, step=5) as log:
        log.metrics(values(6))
    assert steps_in(path) == [1, 2, 6]


def test_numbers_that_are_not_finite_are_written_as_their_names(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.metrics(values(1, total_loss=math.nan, ibot_loss=math.inf, koleo_loss=-math.inf))
        log.append("probe.jsonl", {"step": 1, "rankme": math.nan})
    line = strict((tmp_path / "metrics.jsonl").read_text())
    assert (line["total_loss"], line["ibot_loss"], line["koleo_loss"]) == ("nan", "inf", "-inf")
    assert math.isnan(float(line["total_loss"]))
    assert strict((tmp_path / "probe.jsonl").read_text()) == {"step": 1, "rankme": "nan"}


def test_every_value_comes_back_exactly(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.metrics(values(1, total_loss=1 / 3, images=10**12, lr=1e-300))
    assert strict((tmp_path / "metrics.jsonl").read_text()) == values(1, total_loss=1 / 3, images=10**12, lr=1e-300)


def test_a_line_is_on_the_disk_before_the_run_ends(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.metrics(values(1))
        assert steps_in(tmp_path / "metrics.jsonl") == [1]
        log.append("health/events.jsonl", {"step": 1, "name": "x"})
        assert steps_in(tmp_path / "health" / "events.jsonl") == [1]
        log.flush()


class Disk:
    """What stands for a file on a disk with some bytes left."""

    def __init__(self, path: Path, room: int) -> None:
        self.file, self.room = open(path, "ab", buffering=0), room  # noqa: SIM115

    def write(self, data: bytes) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def fileno(self) -> int:
        return self.file.fileno()

    def close(self) -> None:
        self.file.close()


def test_lines_that_a_full_disk_refuses_are_kept_in_order_and_written_when_there_is_room(tmp_path: Path) -> None:
    lines = LineFile(tmp_path / "lines")
    disk = lines._file = Disk(tmp_path / "lines", room=17)  # type: ignore[assignment]
    assert lines.add({"step": 1}) is None  # 12 bytes
    for step in (2, 3):  # the first of them is cut
        error = lines.add({"step": step})
        assert error is not None
        assert error.errno == errno.ENOSPC
    with pytest.raises(OSError, match="No space left"):
        lines.flush()
    disk.room = 1000
    assert lines.add({"step": 4}) is None
    lines.flush()
    assert lines.close() == 0
    assert steps_in(tmp_path / "lines") == [1, 2, 3, 4]


def test_a_full_disk_is_named_once_and_the_lines_lost_to_it_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev/full is a disk without room; here it is metrics.jsonl, TensorBoard's events and train.log."""
    real = log_module._LogFile
    monkeypatch.setattr(log_module, "_LogFile", lambda _: real("/dev/full"))
    with open_log(tmp_path, num_steps=3, tensorboard=True) as log:
        log._lines["metrics.jsonl"] = LineFile(Path("/dev/full"))
        (events,) = log.trackers
        assert isinstance(events, TensorBoard)
        events.writer = NoRoom()
        for step in (1, 2, 3):
            log.metrics(values(step))
        log.append("probe.jsonl", {"step": 3, "rankme": 1.0})
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("step ")]
    path, why = tmp_path / "metrics.jsonl", "cannot be written (No space left on device)"
    assert said == [
        f"{path}: {why}; its lines are kept until it can be",
        "TensorBoard: its numbers end at step 1: [Errno 28] No space left on device",
        f"{path}: its last lines could not be written: 3",
    ]
    assert steps_in(tmp_path / "probe.jsonl") == [3]


class NoRoom:
    """TensorBoard's writer after its thread has met with a full disk."""

    def add_scalar(self, *_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    close = add_scalar


def test_a_copy_that_was_taken_over_does_not_write_into_its_successors_files(tmp_path: Path) -> None:
    with open_log(tmp_path) as first, open_log(tmp_path) as second:
        for log, step in ((second, 1), (first, 7)):
            log.metrics(values(step))
            for name in LINES[1:]:
                log.append(name, {"step": step})
        assert [steps_in(tmp_path / name) for name in LINES] == [[1]] * len(LINES)


def test_the_console_line_has_the_losses_the_wait_and_the_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_log(tmp_path, num_steps=80) as log:
        log.metrics(values(2, data_time=1.2))
        log.say("init: [bold]3 tensors[/bold] from a.pth")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "step 2/80  loss 7.250  dino 1.500  local 2.500  ibot 3.000  koleo 0.250  lr 1.25e-03  100.0 img/s  "
        "60% waiting for images  2:36 left",
        "init: [bold]3 tensors[/bold] from a.pth",
    ]
    written = (tmp_path / "train.log").read_text()
    for line in captured.err.splitlines():
        assert line.removesuffix("  2:36 left") in written


def test_time_left_is_shown_in_hours_once_there_are_any(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_log(tmp_path, num_steps=4000) as log:
        log.metrics(values(100, step_time=3.0))
    assert capsys.readouterr().err.rstrip().endswith("3:15:00 left")


def test_without_a_terminal_lines_come_soon_at_the_end_and_from_time_to_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(np.arange(0, 1e9, 2.0))  # each look at it is a step of two seconds
    monkeypatch.setattr(log_module.time, "monotonic", lambda: next(clock))
    num_steps = 40_000  # 22 hours
    with open_log(tmp_path, num_steps=num_steps) as log:
        for step in range(1, num_steps + 1):
            log._show(values(step), "x")
    lines = capsys.readouterr().err.splitlines()
    shown = [int(line.split("/")[0].removeprefix("step ")) for line in lines]
    assert (shown[0], shown[1], shown[-1]) == (1, 9, num_steps)
    gaps = [2 * (later - earlier) for earlier, later in itertools.pairwise(shown[:-1])]
    assert gaps == sorted(gaps)
    assert (gaps[0], gaps[-1]) == (16, 600)
    assert 2 * shown[100] / 100 < gaps[101] <= 2 * shown[101] / 100 + 2


def test_on_a_terminal_there_is_a_progress_bar_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()

    def terminal(**kwargs: Any) -> Console:
        return Console(file=screen, force_terminal=True, width=160)

    monkeypatch.setattr(log_module, "Console", terminal)
    with open_log(tmp_path, step=10, num_steps=80) as log:
        for step in range(11, 31):
            log.metrics(values(step))
        log.say("a word")
        assert log.bar is not None
        (task,) = log.bar.tasks
        assert (task.completed, task.total) == (30, 80)
        assert task.fields["losses"] == "loss 7.250  100 img/s"
    shown = screen.getvalue()
    assert "30/80" in shown
    assert "a word" in shown
    assert "total_loss" not in shown


def test_warnings_reach_the_file_with_their_level(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.say("fine")
        log.say("health: frozen-student", logging.WARNING)
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["I fine", "W health: frozen-student"]


def test_what_the_packages_modules_log_goes_to_the_same_file(tmp_path: Path) -> None:
    with open_log(tmp_path):
        logging.getLogger("dinoreg.anything").info("a note")
    logging.getLogger("dinoreg.anything").warning("after the run")
    written = (tmp_path / "train.log").read_text()
    assert "a note" in written
    assert "after the run" not in written


@pytest.mark.parametrize("how", ["ends", "fails"])
def test_files_are_closed_and_the_logger_is_as_before_when_a_run(how: str, tmp_path: Path) -> None:
    logger = logging.getLogger("dinoreg")
    before = (list(logger.handlers), logger.level)
    hook = threading.excepthook
    log = open_log(tmp_path, tensorboard=True)
    assert (logger.handlers, logger.level) != before
    try:
        with log:
            log.metrics(values(1))
            if how == "fails":
                raise RuntimeError("on purpose")
    except RuntimeError:
        pass
    assert all(lines._file.closed for lines in log._lines.values())
    assert threading.excepthook == hook
    assert log._handler.stream is None or log._handler.stream.closed
    assert (list(logger.handlers), logger.level) == before


def test_a_resumed_run_goes_on_in_the_same_log(tmp_path: Path) -> None:
    for word in ("first", "second"):
        with open_log(tmp_path) as log:
            log.say(word)
    assert [line.split()[-1] for line in (tmp_path / "train.log").read_text().splitlines()] == ["first", "second"]


def test_tensorboard_gets_every_number_of_metrics_and_probes(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_log(tmp_path, tensorboard=True) as log:
        for step in (1, 2, 3):
            log.metrics(values(step, total_loss=10.0 - step))
        log.append("probe.jsonl", {"step": 3, "rankme": 12.5})
        log.append("health/events.jsonl", {"step": 3, "name": "x", "weight": 1.0})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars["train/total_loss"] == [(1, 9.0), (2, 8.0), (3, 7.0)]
    assert scalars["probe/rankme"] == [(3, 12.5)]
    assert {tag.partition("/")[2] for tag in scalars} == {*values(1), "rankme"} - {"step"}
