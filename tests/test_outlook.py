"""What is said at the start of a run about its images, passes and time, and that it is said soon, once and seldom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from training import tiny_config

from dinoreg.runtime.durations import about
from dinoreg.train import outlook
from dinoreg.train.logger import SilentLog
from dinoreg.train.outlook import Outlook, Pace, rounded
from dinoreg.train.prepare import Setup

DAY = 86_400.0


@pytest.mark.parametrize(
    ("run", "doubts"),
    [
        (Outlook(20_000, 64, 500, 180.0), []),  # the quickstart
        (Outlook(1_281_167, 2048, 125_000, 6.9 * DAY, "32 GPUs"), []),
        (Outlook(2560, 128, 1000), []),
        (Outlook(2559, 128, 1000), ["only 2,559 images in batches of 128"]),
        (Outlook(2559, 128, 1000, own=True), []),
        (Outlook(10_000, 1024, 1000), []),
        (Outlook(2047, 1024, 1000, own=True), ["only 2,047 images in batches of 1,024"]),
        (Outlook(10, 64, 10), ["only 10 images in batches of 64 (so each several times in one)"]),
        (Outlook(1000, 10, 200_000), []),
        (Outlook(1000, 10, 200_100), ["2,000 passes over 1,000 images"]),
        (Outlook(10**6, 64, 10, 7.1 * DAY), ["7 days on this CPU"]),
        (
            Outlook(544, 128, 100_000, 248 * DAY),
            ["248 days on this CPU", "23,500 passes over 544 images in batches of 128"],
        ),
    ],
    ids=str,
)
def test_a_run_is_doubted_by_its_time_its_passes_and_its_batch(run: Outlook, doubts: list[str]) -> None:
    assert run.doubts() == doubts
    assert bool(run.better()) == bool(doubts)


@pytest.mark.parametrize("images", [544, 3000, 50_000])
@pytest.mark.parametrize("batch", [16, 128, 192, 1024])
@pytest.mark.parametrize("step_seconds", [0.1, 4.0])
def test_the_steps_and_the_batch_that_are_advised_leave_no_doubt(images: int, batch: int, step_seconds: float) -> None:
    steps = 8_000_000
    better = Outlook(images, batch, steps, step_seconds * steps).better()
    found = {key: int(value) for key, value in re.findall(r"(steps|batch_size)=(\d+)", better)}
    fewer = found.get("batch_size", batch)
    seconds = found["steps"] * step_seconds * fewer / batch
    few = images < 20 * fewer  # for which other weights are advised, and not a smaller batch
    assert (
        Outlook(images, fewer, found["steps"], seconds).doubts()
        == [f"only {images:,} images in batches of {fewer:,}"] * few
    )
    assert 2 * fewer <= images
    assert seconds <= DAY


def test_public_weights_are_advised_for_few_images_only_and_not_twice() -> None:
    assert "continue_vits14_reg4" in Outlook(500, 128, 1000).better()
    assert "continue_vits14_reg4" not in Outlook(500, 128, 1000, own=True).better()
    assert "continue_vits14_reg4" not in Outlook(50_000, 128, 10**6, 9 * DAY).better()


def test_numbers_are_those_that_people_say() -> None:
    assert [rounded(value) for value in (1.6, 3.0, 47.06, 23529.4, 1_234_567)] == [
        "1.6",
        "3",
        "47.1",
        "23,500",
        "1,230,000",
    ]
    assert [about(value) for value in (9060, 248.2 * DAY, 2 * DAY)] == ["2 h 31 min", "248 days", "2 days"]


class Heard(SilentLog):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str, level: int = 0) -> None:
        self.lines.append(message)


def lines_of(monkeypatch: pytest.MonkeyPatch, run: Outlook, *ends: float, waits: float = 0.0) -> list[str]:
    """What is said when steps end at these seconds."""
    clock = iter(ends)
    monkeypatch.setattr(outlook.time, "perf_counter", lambda: next(clock))
    log = Heard()
    pace = Pace(run, run.steps, log, torch.device("cpu"), since=0.0)
    for step in range(1, len(ends) + 1):
        pace.after(step, waits)
    return log.lines


def test_the_time_to_the_end_is_said_after_two_steps_once_and_not_of_short_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Outlook(50_000, 64, 1002)
    (line,) = lines_of(monkeypatch, run, 30.0, 39.06, 48.0, 60.0, waits=4.53)
    assert line == "step 2/1002: 9.06 s a step, 50% of it waiting for images; about 2 h 31 min to the end"
    assert lines_of(monkeypatch, run, 0.5, 0.7) == []


def test_a_run_that_would_take_weeks_is_advised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = lines_of(monkeypatch, Outlook(50_000, 64, 100_002), 30.0, 60.0)
    assert first.endswith("about 35 days to the end")
    assert second.startswith("advice: 35 days on this CPU; better: ")
    (only,) = lines_of(monkeypatch, Outlook(500, 64, 100_002), 30.0, 60.0)  # was advised before the first step
    assert only == first


def test_a_start_counts_what_it_passes_over_and_advises(tmp_path: Path) -> None:
    for number in range(10):
        Image.new("RGB", (40, 40), (number, 9, 9)).save(tmp_path / f"{number}.jpg")
        (tmp_path / f"{number}.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "notes.txt").write_text("two\n")
    notes = Setup(tiny_config(tmp_path / "run", data__source=str(tmp_path))).notes
    assert "warning: data: files that are not read: 10 .heic" in notes
    assert sum(note.startswith("advice: only 10 images in batches of 6") for note in notes) == 1
    assert not any(
        note.startswith(("advice", "warning")) for note in Setup(tiny_config(tmp_path / "two", batch_size=2)).notes
    )
