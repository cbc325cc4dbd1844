"""The README is short, sets everything up in two commands, and every result that it names was measured.

Its commands, links and code are tested with those of the guides, in test_guides.py.
"""

from __future__ import annotations

import re
import shlex

from test_guides import README, blocks

ROOT = README.parent
TEXT = README.read_text()


def shell_lines() -> list[str]:
    return [line for block in blocks(README, "bash") for line in block.splitlines() if line.strip()]


def test_it_can_be_read_in_one_go() -> None:
    assert len(TEXT.splitlines()) <= 150
    assert "Weights you train are yours" in TEXT


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


def test_the_results_name_command_hardware_commit_and_figure() -> None:
    section = TEXT.partition("## Results")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 3
    for row in rows:
        what, command, hardware, commit, result = (cell.strip() for cell in row)
        program = shlex.split(command.strip("`"))
        assert program[0] == "dinoreg" or (program[0] == "python" and (ROOT / program[1]).is_file())
        assert what
        assert hardware
        assert re.fullmatch(r"[0-9a-f]{7}", commit)
        assert re.search(r"\d", result)
        assert re.search(r"\]\(docs/results/\w+(-\w+)?\.md\)", result)
