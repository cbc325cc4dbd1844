"""The doctor: a machine and a run described in words, whatever is broken."""

from __future__ import annotations

import builtins
import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dinoreg.checkpoint import format as checkpoint
from dinoreg.commands import doctor
from dinoreg.runtime import environment, packed_attention
from dinoreg.runtime.dependencies import DEPENDENCIES, find
from dinoreg.runtime.errors import RunError

Rows = list[tuple[str, str, str]]
NAMES = [row.name for row in DEPENDENCIES if row.extra not in ("core", "docs", "test")]


def rows_of(sections: list[doctor.Section], title: str) -> Rows:
    return next(rows for name, rows in sections if name.startswith(title))


def row(rows: Rows, name: str) -> tuple[str, str]:
    return next((mark, text) for found, mark, text in rows if found == name)


def break_import(monkeypatch: pytest.MonkeyPatch, package: str, error: Exception) -> None:
    """Importing `package` raises `error`, as a broken installation does."""

    def failing(real: Any) -> Any:
        def importing(name: str, *args: Any, **kwargs: Any) -> Any:
            if name.partition(".")[0] == package:
                raise error
            return real(name, *args, **kwargs)

        return importing

    monkeypatch.setattr(builtins, "__import__", failing(builtins.__import__))
    monkeypatch.setattr(doctor.importlib, "import_module", failing(doctor.importlib.import_module))


# The environment


def test_the_environment_is_plain_values_that_name_what_a_result_depends_on() -> None:
    found = environment.environment()
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["torch"] == environment.version("torch")
    assert found["cores"] >= 1
    assert found["memory_gib"] > 0.1
    assert found["free_disk_gib"] >= 0
    assert len(found["cuda"]) == torch.cuda.device_count()
    assert found["threads"] == torch.get_num_threads()


def test_the_environment_notes_allocator_and_thread_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "8000000000")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    variables = environment.environment()["variables"]
    assert (variables["MALLOC_TRIM_THRESHOLD_"], variables["OMP_NUM_THREADS"]) == ("8000000000", "3")


def test_free_disk_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    here = environment.free_disk_gib(tmp_path)
    assert environment.free_disk_gib(tmp_path / "not" / "yet") == pytest.approx(here, abs=1)


def test_a_package_that_is_not_installed_has_no_version() -> None:
    assert environment.version("no-such-distribution-anywhere") is None


# The machine


def test_the_machine_is_described_section_by_section(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.doctor()
    shown = capsys.readouterr().out
    for heading in ("machine", "packages", "optional packages", "acceleration"):
        assert heading in shown
    assert f"torch        ok       {environment.version('torch')}" in shown


def test_a_missing_optional_package_is_named_with_its_purpose_and_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: None)
    rows = doctor._optional_rows()
    assert [name for name, _, _ in rows] == NAMES
    mark, text = row(rows, "pyarrow")
    assert mark == "missing"
    assert ".parquet" in text
    assert "pip install 'dinoreg[data]'" in text


def test_optional_packages_are_imported_and_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    break_import(monkeypatch, "h5py", OSError("libhdf5.so.310: cannot open shared object file"))
    rows = doctor._optional_rows()
    mark, text = row(rows, "h5py")
    assert mark == "problem"
    assert "cannot be imported (OSError: libhdf5.so.310" in text
    for name in set(NAMES) - {"h5py"}:
        assert row(rows, name)[0] == "ok", name
    assert "not tried" in row(rows, "transformers")[1]


@pytest.mark.parametrize("works", [True, False])
def test_xformers_is_ok_only_where_its_kernels_load(works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = None if works else "PyTorch 2.10.0+cu128 with CUDA 1208 (you have 2.14.1+cu130); libcudart.so.12: missing"
    monkeypatch.setattr(packed_attention, "load_problem", lambda: problem)
    mark, text = row(doctor._package_rows({"packages": {"xformers": "0.0.35"}}), "xformers")
    if works:
        assert (mark, text) == ("ok", "0.0.35")
    else:
        assert mark == "missing"
        assert f"0.0.35: {problem}" in text
        assert "same numbers" in text


def test_a_missing_core_package_is_a_problem_but_xformers_is_not() -> None:
    found = {"packages": {"rich": None, "xformers": None}}
    rows = doctor._package_rows(found)
    assert row(rows, "rich") == ("problem", "not installed: pip install rich")
    assert row(rows, "xformers")[0] == "missing"
    assert "same numbers" in row(rows, "xformers")[1]


def test_a_torchvision_of_another_build_is_a_problem_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment.environment()
    break_import(monkeypatch, "torchvision", RuntimeError("operator torchvision::nms does not exist"))
    mark, text = row(doctor._package_rows(found), "torchvision")
    assert mark == "problem"
    assert "torchvision::nms is missing" in text
    pair = [find(name) for name in ("torch", "torchvision")]
    assert f"pip install --force-reinstall 'torch{pair[0].pinned}' 'torchvision{pair[1].pinned}'" in text
    assert row(doctor._package_rows(found), "torch")[0] == "ok"


def test_a_torch_that_cannot_be_imported_is_a_problem_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    break_import(monkeypatch, "torch", OSError("libcudart.so.13: cannot open shared object file"))
    sections = doctor.examine_machine()
    mark, text = row(rows_of(sections, "packages"), "torch")
    assert mark == "problem"
    assert "libcudart" in text


def test_devices_are_listed_with_memory_and_precision() -> None:
    gpu = {"name": "H100", "memory_gib": 79.6, "capability": "9.0", "bf16": True}
    found = {"cuda": [gpu], "attention": {"backend": "xformers", "reason": None}}
    rows = doctor._acceleration_rows(found)
    assert row(rows, "cuda:0") == ("ok", "H100, 79.6 GiB, compute capability 9.0, bf16")
    assert row(rows, "attention") == ("ok", "runs through xformers: tried both ways")
    found["attention"] = {"backend": "sdpa", "reason": "xformers does not run here: no CUDA support"}
    mark, text = row(doctor._acceleration_rows(found), "attention")
    assert mark == "missing"
    assert text.startswith("runs through sdpa")
    assert "xformers does not run here: no CUDA support" in text
    without = doctor._acceleration_rows({"cuda": [], "attention": None})
    assert row(without, "cuda")[0] == "missing"
    assert "need CUDA" in row(without, "attention")[1]


def test_known_failures_are_explained_and_unknown_ones_are_not() -> None:
    assert "pip install pyarrow2" in str(doctor.explain(ModuleNotFoundError("no", name="pyarrow2")))
    assert "dinoreg[data]" in str(doctor.explain(ModuleNotFoundError("no", name="pyarrow")))
    assert "batch_size" in str(doctor.explain(torch.OutOfMemoryError("CUDA out of memory")))
    for error in (
        RuntimeError("unable to mmap 1334928 bytes from file <a.safetensors>: Cannot allocate memory (12)"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        RuntimeError("std::bad_alloc"),
    ):
        assert "out of memory" in str(doctor.explain(error))
    for error in (RuntimeError("can't start new thread"), BlockingIOError(errno.EAGAIN, "no process")):
        assert "data.workers" in str(doctor.explain(error))
    assert doctor.explain(KeyError("x")) is None
    assert doctor.explain(ModuleNotFoundError("no", name="dinoreg.models.nowhere")) is None


# A run


def make_run(folder: Path, *steps: int, num_steps: int = 20) -> Path:
    """A run folder with real, tiny checkpoints at `steps`."""
    run = folder / "run"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 1\n")
    (run / "teacher").mkdir()
    for step in steps:
        checkpoint.save(run / "checkpoints", step, {"w": torch.full((3,), float(step))}, {"step": step}, keep=9)
        (run / "teacher" / f"{checkpoint.step_name(step)}.safetensors").touch()
    lines = [{"step": step, "loss": 10.0 - step, "images_per_second": 3.25} for step in range(1, 8)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status = {"phase": "running", "step": steps[-1] if steps else 0, "num_steps": num_steps}
    (run / "status.json").write_text(json.dumps(status))
    return run


def test_a_whole_unfinished_run_says_how_far_it_got_and_how_to_go_on(tmp_path: Path) -> None:
    run = make_run(tmp_path, 3, 6)
    checkpoint.write_pointer(run / "checkpoints", "best", 3)
    sections = doctor.examine_run(run)
    progress = rows_of(sections, "run")
    mark, text = row(progress, "state")
    assert mark == "running"
    assert "step 7 of 20, saved at 6: resume with" in text
    assert f"dinoreg pretrain {run} resume=true" in text
    assert row(progress, "last line")[1] == "step 7, loss 3, images_per_second 3.25"
    assert row(progress, "weights")[1] == f"weights={run} means step 6 (last); weights={run}/best step 3"
    checkpoints = rows_of(sections, "checkpoints")
    assert checkpoints == [("step_0000003", "ok", "whole (best)"), ("step_0000006", "ok", "whole (last)")]
    assert rows_of(sections, "health") == [("events", "ok", "none")]
    assert rows_of(sections, "images") == [("unreadable", "ok", "none met")]


def test_a_finished_run_needs_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path, 20)
    (run / "status.json").write_text(json.dumps({"phase": "finished", "step": 20, "num_steps": 20}))
    progress = rows_of(doctor.examine_run(run), "run")
    assert row(progress, "state") == ("ok", "finished: 20 of 20 steps")
    assert not any("resume" in text for _, _, text in progress)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (
            {"phase": "stopped", "reason": "SIGTERM", "step": 6, "reached": 6},
            ("open", "stopped by SIGTERM at step 7"),
        ),
        (
            {"phase": "failed", "reason": "RunError: no", "step": 0, "reached": 9},
            ("problem", "failed by an error, RunError"),
        ),
    ],
    ids=("stopped", "failed"),
)
def test_a_run_that_ended_early_says_why_where_and_how_to_go_on(
    tmp_path: Path, status: dict[str, Any], expected: tuple[str, str]
) -> None:
    run = make_run(tmp_path, 3, 6)
    (run / "status.json").write_text(json.dumps({"num_steps": 20, **status}))
    mark, text = row(rows_of(doctor.examine_run(run), "run"), "state")
    assert (mark, text[: len(expected[1])]) == expected
    assert ("saved at 6" if status["step"] else "step 9 of 20, nothing saved") in text
    assert text.endswith(f"resume with dinoreg pretrain {run} resume=true")


def test_a_run_whose_process_is_gone_ended_without_a_word(tmp_path: Path) -> None:
    run = make_run(tmp_path, 3)
    lease = {"token": "a", "host": socket.gethostname(), "pid": os.getpid(), "job": None, "restarts": 0, "time": 0.0}
    (run / "owner.json").write_text(json.dumps(lease))
    assert row(rows_of(doctor.examine_run(run), "run"), "state")[0] == "running"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (run / "owner.json").write_text(json.dumps({**lease, "pid": ended.pid}))
    mark, text = row(rows_of(doctor.examine_run(run), "run"), "state")
    assert mark == "problem"
    assert f"process {ended.pid} is gone" in text


def test_a_run_says_what_it_was_started_as(tmp_path: Path) -> None:
    run = make_run(tmp_path, 3)
    (run / "train.log").write_text("2026 I vitt8_reg4: 0.03 M parameters, cpu float32, attention sdpa, 50 images\n")
    assert "attention sdpa" in row(rows_of(doctor.examine_run(run), "run"), "started as")[1]


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path, 3, 6)
    victim = max((run / "checkpoints" / "step_0000006").glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    with pytest.raises(RunError):
        checkpoint.verify(run / "checkpoints" / "step_0000006")
    checkpoints = rows_of(doctor.examine_run(run), "checkpoints")
    assert row(checkpoints, "step_0000003")[0] == "ok"
    mark, text = row(checkpoints, "step_0000006")
    assert mark == "problem"
    assert victim.name in text
    assert "the one before it" in text


def test_a_missing_teacher_file_and_a_pointer_into_nothing_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path, 3)
    (run / "teacher" / "step_0000003.safetensors").unlink()
    checkpoint.write_pointer(run / "checkpoints", "best", 5)
    checkpoints = rows_of(doctor.examine_run(run), "checkpoints")
    assert row(checkpoints, "step_0000003") == ("missing", "whole (last); its teacher file is missing")
    assert row(checkpoints, "best") == ("problem", "points to step_0000005, which is not there")


def test_health_events_are_told_once_each_with_their_remedy(tmp_path: Path) -> None:
    run = make_run(tmp_path, 3)
    (run / "health").mkdir()
    event = {"name": "collapse", "message": "targets have no entropy", "remedy": "Lower the learning rate"}
    lines = [json.dumps({"step": step, **event}) for step in (4, 5)]
    (run / "health" / "events.jsonl").write_text("\n".join([*lines, '{"step": 6, "na']))
    (run / "health" / "nonfinite.jsonl").write_text('{"step": 9, "sample_ids": [1]}\n')
    health = rows_of(doctor.examine_run(run), "health")
    assert row(health, "collapse") == (
        "problem",
        "step 5 (2 times): targets have no entropy. Lower the learning rate",
    )
    assert row(health, "non-finite steps") == ("problem", "1 were left out, the last at 9")


def test_unreadable_images_are_counted_and_the_first_ones_listed(tmp_path: Path) -> None:
    run = make_run(tmp_path, 3)
    lines = [json.dumps({"name": f"{index}.jpg", "reason": "truncated"}) for index in range(7)]
    (run / "skipped.jsonl").write_text("\n".join(lines) + "\n")
    images = rows_of(doctor.examine_run(run), "images")
    assert images[0][1:] == ("problem", f"7 skipped, listed in {run / 'skipped.jsonl'}")
    assert [text for _, _, text in images[1:]] == [f"{index}.jpg: truncated" for index in range(5)]


def test_a_run_that_died_with_a_traceback_shows_its_last_line(tmp_path: Path) -> None:
    run = make_run(tmp_path, 3)
    (run / "train.log").write_text('started\nTraceback (most recent call last)\n  File "x"\nKeyError: 1\n')
    mark, text = row(rows_of(doctor.examine_run(run), "run"), "failure")
    assert mark == "problem"
    assert text.startswith("KeyError: 1 (traceback in")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"step_1\x1b[2J", None])
def test_a_pointer_that_is_none_is_passed_over(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, 10)
    for name in ("last", "best"):
        (run / "checkpoints" / name).unlink(missing_ok=True)
        (run / "checkpoints" / name).mkdir() if content is None else (run / "checkpoints" / name).write_bytes(content)
    (run / "health").mkdir(exist_ok=True)
    (run / "health" / "events.jsonl").write_text(json.dumps({"step": "\x1b[2J", "name": "a\x1b"}) + "\n")
    doctor.doctor(run)
    assert "\x1b" not in capsys.readouterr().out


def test_an_empty_run_folder_is_described_without_a_crash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    doctor.doctor(tmp_path)
    shown = capsys.readouterr().out
    assert "nothing was saved yet" in shown
    assert "metrics.jsonl is empty" in shown
