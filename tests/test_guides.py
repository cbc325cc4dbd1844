"""README and guides are true: every command parses, and runs word for word on a few small pictures of one's own.

A page's blocks of commands run one after the other in a folder of their own, as a reader would paste them. What the
text itself says is heeded: `# for a try: steps=4` behind a command gives it these keys, and a first line `# needs …`
says that the block needs what a test machine may lack; then its commands are parsed alone, as are those of
docs/results, which record what was run.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import guide_pictures
import pytest
from warm_interpreter import RUN_IMPORTS, WarmInterpreter

import dinoreg
from dinoreg.commands.options import ACTIONS
from dinoreg.commands.registry import VERBS
from dinoreg.config.bundled import bundled
from dinoreg.config.load import load_config, require_complete
from dinoreg.evaluation.benchmark import find_benchmark
from dinoreg.jobs.job_type import find_job
from dinoreg.jobs.options import split_options
from dinoreg.train.health import REMEDIES

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = sorted([README, ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
NEEDS = ("a GPU", "a cluster", "data", "Docker", "an environment of its own", "a network")
OTHERS = {"pip", "docker", "mkdocs", "hf", "git", "python", "python3"}  # programs whose arguments are not ours
SHORT = re.compile(r"for a try: (.+)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def blocks(page: Path, language: str) -> tuple[str, ...]:
    return tuple(re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))


class Line(NamedTuple):
    """A line of a block: its text, its words without the comment, and the keys that its comment gives for a try."""

    text: str
    words: list[str]
    short: list[str]

    @property
    def tried(self) -> list[str]:
        """The words with the keys for a try, which go before equal ones."""
        keys = [word.partition("=")[0] for word in self.short]
        return [word for word in self.words if word.partition("=")[0] not in keys] + self.short


def lines(block: str) -> Iterator[Line]:
    for text in block.replace("\\\n", " ").splitlines():
        if words := shlex.split(text, comments=True):
            match = SHORT.search(text.partition("#")[2])
            yield Line(text, words, match[1].split() if match else [])


def needs(block: str) -> str:
    first = block.splitlines()[0]
    return first.removeprefix("# needs ") if first.startswith("# needs ") else ""


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of every dinoreg command on a page; others have to be programs that are known here."""
    for block in blocks(page, "bash"):
        for line in lines(block):
            words: list[str] = []
            for word in [*line.tried, "&&"]:
                if word not in ("&&", "|"):
                    words.append(word)
                    continue
                programs = [at for at, each in enumerate(words) if each.rpartition("/")[2] == "dinoreg"]
                if programs and not words[0].startswith(("docker", "pip")):
                    yield words[programs[0] + 1 :]
                else:
                    assert words[0].rpartition("/")[2] in OTHERS, f"{name_of(page)}: {line.text}"
                words = []


def every_command() -> list[list[str]]:
    """Of all pages and of the configs' comments, each once."""
    found = {tuple(words): words for page in PAGES for words in commands(page)}
    for path in bundled("configs").glob("*.yaml"):
        if match := re.search(r"^# command:\s+dinoreg (.+)$", path.read_text(), re.MULTILINE):
            words = shlex.split(match[1].partition("  ")[0])
            found[tuple(words)] = words
    return list(found.values())


@pytest.mark.parametrize("words", every_command(), ids=" ".join)
def test_every_command_parses(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for run in ("photos", "open", "vits14", "long"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        text = "data: photos/\nout: runs/photos\nsteps: 5\nschedule: {shape: constant}\n"
        (tmp_path / "runs" / run / "config.yaml").write_text(text)
    verb, *arguments = words
    if verb.startswith("--"):
        return
    assert verb in VERBS
    if "--help" in arguments:
        return
    if verb == "launch" and arguments[0] not in ACTIONS:
        job, *rest = arguments
        options, overrides, _ = split_options([each for each in rest if "=" in each])
        assert find_job(job).name == job
        assert options.partition == ("gpu" if "partition=gpu" in rest else None)
        verb, arguments = ("pretrain" if job == "pretrain" else "eval"), [rest[0], *overrides]
    parsed = VERBS[verb].parse(arguments)
    if verb == "eval" and "--list" not in arguments:
        names, request = parsed
        assert request.options.weights
        for name in names.split(","):
            # Own data are called something with a slash or an extension here.
            assert name in ("all", "foods", "digits") or "/" in name or "." in name or find_benchmark(name)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_of_other_kinds_are_what_they_seem(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "bash"):
        assert not needs(block) or needs(block).startswith(NEEDS), needs(block)
    for block in blocks(page, "yaml"):
        (tmp_path / "own.yaml").write_text(block)
        require_complete(load_config(tmp_path / "own.yaml", ["data=photos/", "out=runs/x"]))
    holders = {"dinoreg": dinoreg, "model": dinoreg.RegisterViT}
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id in holders:
                assert hasattr(holders[called.value.id], called.attr), f"{name_of(page)}: {ast.unparse(node)}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target
    for target in re.findall(r"`((?:dinoreg|configs|docs|tests|benchmarks|eval|launch|\.ci)/[\w./]+\.\w+)`", text):
        if page.name != "changes.md" and "own_dataset" not in target:
            assert (ROOT / target).exists(), target


def test_every_verb_and_config_is_in_the_guides() -> None:
    text = "".join(page.read_text() for page in PAGES)
    assert {words[0] for page in PAGES for words in commands(page)} >= set(VERBS)
    for path in bundled("configs").glob("*.yaml"):
        assert f"`{path.stem}" in (ROOT / "docs" / "configs.md").read_text(), path.stem
    for verb, source in re.findall(r"`dinoreg (\w+) ?([\w.]*)", text):
        assert verb in VERBS
        if verb == "pretrain" and source.islower() and not source.endswith(".yaml") and source not in ("runs",):
            assert (bundled("configs") / f"{source}.yaml").exists(), source


def test_every_diagnosis_is_explained() -> None:
    text = (ROOT / "docs" / "reports.md").read_text()
    assert [name for name in REMEDIES if f"`{name}`" not in text] == []


@pytest.fixture(scope="module")
def interpreter() -> Iterator[WarmInterpreter]:
    with WarmInterpreter(*RUN_IMPORTS) as started:
        yield started


def run(interpreter: WarmInterpreter, folder: Path, words: list[str]) -> None:
    """Run one command in `folder`, as a shell would: it has to end well, and without a traceback."""
    programs = {"dinoreg": [sys.executable, "-m", "dinoreg"], "python": [sys.executable]}
    assert words[0] in programs
    assert not {"|", "&&", ">", ";"} & set(words), "write it so that each line is one command"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    done = interpreter.run([*programs[words[0]], *words[1:]], cwd=folder, env=environment, timeout=1800)
    said = f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert done.returncode == 0, said
    assert "Traceback" not in said


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory, interpreter: WarmInterpreter) -> Path:
    """What every page's folder begins with, made once."""
    root = tmp_path_factory.mktemp("furnished")
    guide_pictures.own_pictures(root)
    guide_pictures.public_weights(root / "weights" / "dinov2-small")
    for seed, name in enumerate(("photos", "other")):
        words = f"dinoreg pretrain small data=photos/ out=runs/{name} steps=4 batch_size=8 seed={seed}"
        run(interpreter, root, words.split())
    return root


def runs(page: Path) -> list[list[str]]:
    """The commands of a page that this machine runs, in order."""
    own = [line.tried for block in blocks(page, "bash") if not needs(block) for line in lines(block)]
    # Setting up an environment is what .ci/run does, in these very words.
    return [words for words in own if "venv" not in words]


READ = [page for page in PAGES if page.parent.name != "results" and runs(page)]


@pytest.mark.slow
@pytest.mark.skipif("not config.getoption('--guides')", reason="takes an hour; runs with --guides")
@pytest.mark.parametrize("page", READ, ids=name_of)
def test_a_page_runs_word_for_word(page: Path, furnished: Path, interpreter: WarmInterpreter, tmp_path: Path) -> None:
    for made in furnished.iterdir():
        if made.name != "runs":
            (tmp_path / made.name).symlink_to(made)
    for name in ("tests", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    for made in (furnished / "runs").iterdir():
        if f"out=runs/{made.name} " not in page.read_text():
            shutil.copytree(made, tmp_path / "runs" / made.name)
    for words in runs(page):
        run(interpreter, tmp_path, words)
