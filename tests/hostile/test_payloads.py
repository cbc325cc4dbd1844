"""No payload runs, whichever door it is put before; nothing but what a command writes has changed afterwards."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from miniatures.pictures import pattern

from dinoreg.commands.main import main
from tests.hostile.payloads import OWN, RUN, SCENES, TORCH, Trial, trials
from tests.small_runs import tiny_model, write_run

LEAST = 60
OWN_FILES = ("owner.json", "config.yaml", "train.log", "status.json")  # that a resume writes before it reads tensors


def contents(folder: Path) -> dict[Path, bytes]:
    """What the trial's folder holds, but for what is a command's own to write."""
    return {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.relative_to(folder).parts[0].startswith("out") and path.name not in OWN_FILES
    }


def problems(chosen: Iterable[Trial], whole: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for each trial that did not end well."""
    found = []
    for number, trial in enumerate(chosen):
        place = folder / str(number)
        shutil.copytree(whole, place / RUN)
        monkeypatch.chdir(place)
        arguments, before = trial.lay(place, place / "ran"), contents(place)
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
            code = main(arguments)
        text = out.getvalue() + errors.getvalue()
        said = [line for line in errors.getvalue().splitlines() if line.startswith("dinoreg: ")]
        ends = {
            "it ran": (place / "ran").exists(),
            f"exit code {code}": code not in trial.codes,
            f"{len(said)} lines": (code != 0) != (len(said) == 1),
            "a traceback": "Traceback" in text or "DINOREG_DEBUG" in text,
            "other files have changed": code != 0 and contents(place) != before,
        }
        found += [f"{trial.name}: {end}: {said}" for end, bad in ends.items() if bad]
        monkeypatch.chdir(folder)
        shutil.rmtree(place)
    return found


def test_there_are_enough_payloads_and_no_two_are_the_same() -> None:
    names = [trial.name for trial in trials()]
    assert len(names) == len(set(names))
    assert sum(trial.payloads for trial in trials() if not trial.slow) >= LEAST


def test_no_payload_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_run(tmp_path / "whole", tiny_model(depth=1))
    assert problems([trial for trial in trials() if not trial.slow], whole, tmp_path, monkeypatch) == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    small = ["model.dim=32", "model.depth=1", "model.heads=2", "head.prototypes=16", "checkpoint.every=1", "device=cpu"]
    assert main(["pretrain", "quickstart", *OWN, SCENES, f"out={run}", *small]) == 0
    return run


@pytest.mark.slow
def test_no_payload_runs_where_a_run_goes_on(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems([trial for trial in trials() if trial.slow], trained, tmp_path, monkeypatch) == []


@pytest.mark.slow
def test_no_payload_runs_from_a_cache(trained: Path, tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / "data" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        pattern(number % 2, number).save(tmp_path / "data" / "ab"[number % 2] / f"{number}.png")
    run, mark = shutil.copytree(trained, tmp_path / RUN), tmp_path / "ran"
    commands = [
        ["eval", str(tmp_path / "data"), f"weights={run}", "protocols=[knn]", "device=cpu", "overwrite=true"],
        ["inspect", f"data={tmp_path / 'data'}"],
    ]
    assert [main(command) for command in commands] == [0, 0]
    caches = [*(tmp_path / "cache").rglob("*.np?"), *(run / "eval").rglob("*.npy")]
    assert {path.suffix for path in caches} == {".npy", ".npz"}
    for write in TORCH.values():
        for path in caches:
            path.write_bytes(write(mark))
        assert [main(command) for command in commands] == [0, 0]
        assert not mark.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "code"),
    [
        ("doctor", 0),
        ("eval pets weights=random:vitt8_reg4 root=.", 2),
        ("launch pretrain quickstart data=scenes out=run dry_run=true cluster=local", 0),
        ("view crops quickstart data=scenes:count=4,size=64 out=crops", 0),
    ],
)
def test_modules_of_the_current_folder_are_not_imported(verb: str, code: int, tmp_path: Path) -> None:
    names = ("torch", "numpy", "json", "yaml", "PIL", "dinoreg", "timm", "rich", "antigravity", "sitecustomize")
    here, script = tmp_path / "here", tmp_path / "bin" / "command.py"  # as the installed command
    for path in (*(f"{name}.py" for name in names), "eval/pets.py", "launch/pretrain.py", "configs/quickstart.yaml"):
        (here / path).parent.mkdir(parents=True, exist_ok=True)
        (here / path).write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})\n")
    script.parent.mkdir()
    script.write_text("from dinoreg.commands.main import entry; entry()")
    known = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), *verb.split()]
    done = subprocess.run(command, cwd=here, env=known, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "ran").exists()
