"""The README is true: its commands parse, its names exist, its code compiles, and CI runs what it says."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

import dinoreg
from dinoreg.commands.options import ACTIONS
from dinoreg.commands.registry import VERBS
from dinoreg.config.bundled import bundled
from dinoreg.config.load import load_config, require_complete
from dinoreg.evaluation.benchmark import find_benchmark
from dinoreg.jobs.job_type import find_job
from dinoreg.jobs.options import split_options

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def shell_lines() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


def dinoreg_commands() -> list[list[str]]:
    """The arguments of every dinoreg command in the README's blocks and in the configs' comments."""
    found = []
    comments = [
        match[1].partition("  ")[0]
        for path in bundled("configs").glob("*.yaml")
        if (match := re.search(r"^# command:\s+(.+)$", path.read_text(), re.MULTILINE))
    ]
    for line in [*shell_lines(), *comments]:
        for part in line.split("&&"):
            words = shlex.split(part)
            if words and words[0].rpartition("/")[2] == "dinoreg":
                found.append(words[1:])
    return found


def test_two_commands_set_everything_up() -> None:
    setup = [line for line in shell_lines() if "venv" in line]
    assert len(setup) == 2
    assert all(line.startswith("python3 -m venv .venv && .venv/bin/pip install -e ") for line in setup)
    assert setup[0].endswith("&& .venv/bin/dinoreg quickstart")
    assert setup[1].endswith("&& .venv/bin/python -m pytest --slow")


def test_continuous_integration_runs_the_test_command_verbatim() -> None:
    command = next(line for line in shell_lines() if " -m pytest " in line)
    script = (ROOT / ".ci" / "run").read_text()
    assert f'\ntests="{command}"\n' in script
    assert '\nbash -c "${tests//.venv/$venv}"\n' in script
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_there_are_commands_for_every_verb_that_takes_images_or_runs() -> None:
    verbs = {"quickstart", "pretrain", "inspect", "report", "eval", "view", "registers", "export", "embed"}
    verbs |= {"launch", "plan", "verdict"}
    assert {words[0] for words in dinoreg_commands()} >= verbs


@pytest.mark.parametrize("words", dinoreg_commands(), ids=" ".join)
def test_every_command_parses(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/photos").mkdir(parents=True)
    Path("runs/photos/config.yaml").write_text("data: photos/\nout: runs/photos\nsteps: 5\n")
    verb, *arguments = words
    assert verb in VERBS
    if "--help" in arguments:
        return
    if verb == "launch" and arguments[0] not in ACTIONS:
        job, *rest = arguments
        keys = [each for each in rest if "=" in each]
        options, overrides, _ = split_options(keys)
        assert find_job(job).name == job
        if "partition=gpu" in keys:
            assert options.partition == "gpu"
        verb, arguments = ("pretrain" if job == "pretrain" else "eval"), [rest[0], *overrides]
    parsed = VERBS[verb].parse(arguments)
    if verb == "eval" and "--list" not in arguments:
        names, request = parsed
        assert request.options.weights
        for name in names.split(","):
            # Own data are called something with a slash or an extension here.
            assert name == "all" or "/" in name or "." in name or find_benchmark(name)


def test_commands_in_the_text_use_known_verbs_and_configs() -> None:
    configs = {path.stem for path in bundled("configs").glob("*.yaml")}
    for verb, source in re.findall(r"`dinoreg (\w+) ?([\w.]*)", README):
        assert verb in VERBS
        if verb == "pretrain" and not source.endswith(".yaml"):
            assert source in configs


def test_every_shipped_config_is_in_the_table() -> None:
    for path in bundled("configs").glob("*.yaml"):
        assert f"`{path.stem}`" in README


@pytest.mark.parametrize("block", blocks("yaml"))
def test_every_yaml_block_is_a_config(block: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(block)
    require_complete(load_config(path, ["data=photos/", "out=runs/x"]))


@pytest.mark.parametrize("block", blocks("python"))
def test_every_python_block_compiles_and_names_what_exists(block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dinoreg":
            assert node.attr in dinoreg.__all__
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tokens":
            assert node.attr in dinoreg.Tokens._fields
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "model":
            assert hasattr(dinoreg.RegisterViT, node.attr)


def test_every_file_that_the_readme_points_to_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
    for target in re.findall(r"`((?:dinoreg|configs|docs|tests|benchmarks|\.ci)/[\w./]*)`", README):
        assert (ROOT / target).exists(), target


def test_the_results_name_command_hardware_commit_and_figure() -> None:
    section = README.partition("## Results")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 3
    for row in rows:
        what, command, hardware, commit, result = (cell.strip() for cell in row)
        assert re.match(r"`(dinoreg|python benchmarks/)", command)
        assert what
        assert hardware
        assert re.fullmatch(r"[0-9a-f]{7}", commit)
        assert re.search(r"\d", result)
