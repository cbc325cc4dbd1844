"""Where a run may be written, and what `overwrite=true` may delete: a run of ours, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinoreg.commands.main import main
from dinoreg.config.load import Config, to_yaml
from dinoreg.config.overwrite import delete_run, put_back, run_entries, set_aside
from dinoreg.runtime.errors import UserError


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def a_run(folder: Path, **more: str) -> Path:
    files = {"config.yaml": to_yaml(Config()), "checkpoints/step_0000001/state.json": "{}", "launch/jobs.jsonl": ""}
    return fill(folder, {**files, **more})


HYDRA = "defaults:\n - db: mysql\n"
LEASE = json.dumps({"token": "1", "host": "h", "pid": 1})
REFUSED = {
    "a project with a config of Hydra's": ({"config.yaml": HYDRA, "thesis.tex": "x"}, "its config.yaml is not one"),
    "a config of Hydra's alone": ({"config.yaml": HYDRA}, "its config.yaml is not one"),
    "a user's own config": ({"config.yaml": "seed: 1\n"}, "its config.yaml is not one"),
    "photographs": ({"me.jpg": "x"}, "no config.yaml"),
    "another's owner.json": ({"owner.json": "[1]", "status.json": "{}"}, "no config.yaml"),
    "a run with something to keep": ({"config.yaml": to_yaml(Config()), "thesis.tex": "x"}, "holds thesis.tex, which"),
    "a run with something to keep inside": (
        {"config.yaml": to_yaml(Config()), "checkpoints/step_0000001/thesis.tex": "x"},
        "holds checkpoints/step_0000001/thesis.tex, which",
    ),
    "a run in a repository": ({"owner.json": LEASE, ".git/HEAD": "x", "notes": ""}, "holds .git and 1 more, which"),
}


@pytest.mark.parametrize(("files", "reason"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize(
    "command",
    [
        ["pretrain", "quickstart", "data=scenes", "out=project", "overwrite=true"],
        ["quickstart", "out=project", "overwrite=true"],
        ["launch", "pretrain", "quickstart", "data=scenes", "out=project", "overwrite=true", "cluster=local"],
    ],
    ids=["pretrain", "quickstart", "launch"],
)
def test_what_is_not_a_run_is_refused_in_one_line_and_stays_as_it_was(
    files: dict[str, str],
    reason: str,
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    project = fill(tmp_path / "project", files)
    before = contents(tmp_path)
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dinoreg: out=project: holds ")
    assert reason in line
    assert line.endswith("it is not overwritten")
    assert contents(tmp_path) == before
    assert project.is_dir()


@pytest.mark.parametrize(
    "files",
    [
        {"config.yaml": to_yaml(Config())},  # killed after its first file
        {"config.yaml": to_yaml(Config()), "init.json.part": "", "owner.json.ab12.part": ""},
        {"owner.json": LEASE, "train.log": "", "events.out.tfevents.1.host": ""},  # its deletion was interrupted
        {".overwritten-12/config.yaml": "", "config.yaml": to_yaml(Config())},
    ],
)
def test_runs_that_were_cut_short_can_be_overwritten(files: dict[str, str], tmp_path: Path) -> None:
    out = fill(tmp_path / "run", files)
    delete_run(out)
    assert list(out.iterdir()) == []


def test_the_marks_of_a_run_are_deleted_last(tmp_path: Path) -> None:
    names = [path.name for path in run_entries(a_run(tmp_path / "run", **{"owner.json": LEASE, "view/1/pca.png": ""}))]
    assert names == ["checkpoints", "launch", "view", "config.yaml", "owner.json"]


@pytest.fixture(params=[False, True], ids=["folder", "link"])
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    folder = a_run(tmp_path / "scratch")
    link = tmp_path / "run"
    link.symlink_to(folder, target_is_directory=True)
    yield link if request.param else folder
    assert link.is_symlink()


def test_a_deleted_run_leaves_its_folder(run: Path) -> None:
    delete_run(run)
    assert list(run.iterdir()) == []


def test_what_a_link_inside_a_run_leads_to_is_not_deleted(tmp_path: Path) -> None:
    run, elsewhere = a_run(tmp_path / "run"), fill(tmp_path / "elsewhere", {"kept": "x"})
    (run / "teacher").symlink_to(elsewhere, target_is_directory=True)
    delete_run(run)
    assert contents(elsewhere) == {"kept": b"x"}


def test_a_run_that_was_set_aside_can_be_put_back(run: Path) -> None:
    before = contents(run)
    aside = set_aside(run)
    assert [path.name for path in run.iterdir()] == [aside.name]
    put_back(aside)
    assert contents(run) == before


def test_setting_aside_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(tmp_path / "run")
    before = contents(run)
    from dinoreg.config import overwrite

    rename = overwrite.os.rename

    def refuse(source: Path, target: Path) -> None:
        if source.name == "launch" and source.parent == run:
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(overwrite.os, "rename", refuse)
    with pytest.raises(PermissionError):
        set_aside(run)
    assert contents(run) == before


def test_an_empty_folder_and_none_hold_no_run(tmp_path: Path) -> None:
    assert run_entries(tmp_path) == []
    assert run_entries(tmp_path / "none") == []
    delete_run(tmp_path / "none")
    with pytest.raises(UserError, match=r"no config\.yaml"):
        delete_run(fill(tmp_path, {"x": ""}))
