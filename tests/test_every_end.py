"""However a command ends, its state is saved, and its exit code tells what became of the work, not of the console."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from miniatures.pictures import numbered, pattern
from small_runs import tiny_model, write_run

DINOREG = [sys.executable, "-m", "dinoreg"]
STEPS = 60


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return numbered(tmp_path / "pictures", 12)


def training(data: Path, out: Path, steps: int = STEPS) -> list[str]:
    sizes = ["model.name=vitt8_reg4", "model.dim=32", "model.depth=1", "model.heads=2", "head.prototypes=16"]
    crops = ["crops.global_size=32", "crops.local_size=16", "crops.num_local=1", "threads=1", "data.workers=1"]
    every = ["checkpoint.every=100000", "log.every=1", "probe.every=0", "log.tensorboard=false", "batch_size=2"]
    return ["pretrain", "quickstart", f"data={data}", f"out={out}", f"steps={steps}", *sizes, *crops, *every]


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("console", ["2>/dev/full", ">/dev/full", ">&-", "2>&-", ">&- 2>&- <&-", "2>&1 | head -n 2"])
def test_a_run_outlives_its_console(pictures: Path, tmp_path: Path, console: str) -> None:
    command = " ".join([*DINOREG, *training(pictures, tmp_path / "run", 4)])
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command} {console}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert status(tmp_path / "run")["phase"] == "finished"
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize(("console", "code"), [(">/dev/full", 1), ("| head -n 1", 0), (">&-", 0)])
def test_what_is_printed_alone_is_missed(pictures: Path, console: str, code: int) -> None:
    command = " ".join([*DINOREG, "inspect", f"data={pictures}"])
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command} {console}"], capture_output=True, text=True)
    assert done.returncode == code
    assert ("dinoreg: " in done.stderr) == (code == 1)


@pytest.mark.slow
def test_data_that_vanish_leave_the_last_step(pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen([*DINOREG, *training(pictures, run, 100_000)], stderr=subprocess.PIPE, text=True)
    while not (run / "metrics.jsonl").is_file() or (run / "metrics.jsonl").read_text().count("\n") < 3:
        time.sleep(0.05)
    pictures.rename(tmp_path / "gone")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "data:" in errors.splitlines()[-1]
    ended = status(run)
    assert ended["phase"] == "failed"
    assert (run / "checkpoints" / "last").read_text().strip() == f"step_{ended['reached']:07d}"
    (tmp_path / "gone").rename(pictures)
    steps = ended["reached"] + 2
    again = subprocess.run([*DINOREG, *training(pictures, run, steps), "resume=true"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"resumed from {run}/checkpoints/step_{ended['reached']:07d}" in again.stderr


BLOCKED = textwrap.dedent("""
    import sys, time
    import dinoreg.runtime.regular_files as files
    from dinoreg.commands.main import entry

    opened, counts = files._without_waiting, {}
    name, most = sys.argv[1], int(sys.argv[2])

    def stuck(path, flags):
        counts[path] = counts.get(path, 0) + 1
        if str(path).endswith(name) and counts[path] > most:
            time.sleep(10_000)  # as a mount that does not answer
        return opened(path, flags)

    files._without_waiting = stuck
    del sys.argv[1:3]
    entry()
""")


def blocked(name: str, after: int, *arguments: str) -> subprocess.Popen[str]:
    """dinoreg, for which files whose names end so cannot be opened any more after some times."""
    command = [sys.executable, "-c", BLOCKED, name, str(after), *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_read_that_never_ends_is_named_and_signals_are_answered(
    pictures: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    process = blocked("07.png", 3, *training(pictures, run))
    assert process.stderr is not None
    begun = time.monotonic()
    for line in process.stderr:
        if "a batch is waited for" in line:
            break
    assert time.monotonic() - begun < 60
    assert "07.png is being read" in line
    process.send_signal(number)
    asked = time.monotonic()
    process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert time.monotonic() - asked < 8  # 2 to answer, 2 + 1 to give the readers up, and saving
    ended = status(run)
    assert (ended["phase"], ended["reason"]) == ("stopped", number.name)
    assert (run / "checkpoints" / "last").read_text().strip() == f"step_{ended['reached']:07d}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stuck", "after", "verb"),
    [
        ("5.png", 0, "inspect data={data}"),
        ("5.png", 1, "embed data={data} weights={run} out={out}/f.safetensors device=cpu"),
        ("5.png", 2, "eval {data} weights={run} out={out} protocols=[knn] device=cpu"),
        (
            "7.safetensors",
            0,
            "embed data={data} weights={run} out={out}/f.safetensors device=cpu",
        ),  # in the main thread
    ],
)
def test_a_file_that_is_never_read_is_named_and_ctrl_c_answered(
    stuck: str, after: int, verb: str, tmp_path: Path
) -> None:
    for number in range(12):
        (tmp_path / "data" / "abc"[number % 3]).mkdir(parents=True, exist_ok=True)
        pattern(number % 3, number).save(tmp_path / "data" / "abc"[number % 3] / f"{number}.png")
    run = write_run(tmp_path / "run", tiny_model(depth=1))
    words = [word.format(data=tmp_path / "data", run=run, out=tmp_path / "out") for word in verb.split()]
    process, begun = blocked(stuck, after, *words), time.monotonic()
    assert process.stderr is not None
    line = next((line for line in process.stderr if "is being read since" in line), "it ended")
    assert f"{stuck}: is being read since 1" in line
    assert time.monotonic() - begun > 10
    process.send_signal(signal.SIGINT)
    asked = time.monotonic()
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.monotonic() - asked < 15  # 2, and what a busy machine takes


def test_a_locale_without_the_characters_costs_no_help(tmp_path: Path) -> None:
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([*DINOREG, "pretrain", "--help"], capture_output=True, env=plain)
    assert done.returncode == 0, done.stderr
    assert b"crops.global_size" in done.stdout
