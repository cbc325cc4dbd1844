"""Names that a terminal would obey, in everything that is printed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from miniatures.pictures import pattern

from dinoreg.runtime.printable import in_markup, printable
from dinoreg.runtime.templates import escape_markdown

HOSTILE = "a\x1b[31mb\nFAKE \u202egnp\x9b\u2028"


def test_what_a_terminal_obeys_is_written_as_escapes() -> None:
    assert printable(HOSTILE) == r"a\x1b[31mb\nFAKE \u202egnp\x9b\u2028"
    assert printable("Größe 猫 🐈.png\t") == r"Größe 猫 🐈.png" + r"\t"
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"
    assert printable(b"\xff.png".decode(errors="surrogateescape")) == r"\udcff.png"
    assert in_markup("[red]\x1b") == r"\[red]\x1b"
    assert "\x1b" not in escape_markdown(HOSTILE)


def test_every_character_but_the_obeyed_ones_stays() -> None:
    for number in range(0x3000):
        text = printable(chr(number))
        assert text.isprintable() or text == chr(number), number  # no-break spaces and what has no name yet
        assert len(text) == 1 or text.startswith("\\"), number


SHORT = ["steps=1", "batch_size=2", "probe.every=0", "data.workers=1"]


@pytest.mark.parametrize(
    ("verb", "out"),
    [(["inspect"], []), (["pretrain", "quickstart", *SHORT], ["out"]), (["embed", "weights=missing\x1b"], ["out"])],
)
def test_no_verb_prints_what_a_file_is_called_raw(tmp_path: Path, verb: list[str], out: list[str]) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    image = pattern(0, 0)
    for name in ("one", "two"):
        image.save(folder / f"{name}\x1b]0;owned\x07\nFAKE.png", format="png")
    (folder / "bad\x1b[2J.png").write_bytes(b"no picture")
    done = subprocess.run(
        [sys.executable, "-m", "dinoreg", *verb, f"data={folder}", *(f"{key}={tmp_path / key}" for key in out)],
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1, 2)
    for text in (done.stdout, done.stderr):
        assert {"\x1b", "\x07"}.isdisjoint(text)
        assert not any(line.startswith("FAKE") for line in text.splitlines())
    if verb[0] == "inspect":
        assert r"one\x1b]0;owned\x07\nFAKE.png" in done.stdout
        assert r"bad\x1b[2J.png" in done.stdout


def test_jobs_of_a_foreign_folder_with_values_of_other_types_are_passed_over(tmp_path: Path) -> None:
    from dinoreg.jobs.records import JOBS, next_launch, read_events, read_records

    launch = tmp_path / "launch"
    launch.mkdir()
    whole = (
        '{"job": "1", "launch": 1, "kind": "pretrain", "group": "pretrain", "cluster": "local", "command": ["x"],'
        ' "nodes": 1, "tasks": 1, "run": "", "after": [], "runner": [1, 2], "code": "", "directory": "", "time": 1.5}'
    )
    wrong = [whole.replace('"launch": 1', '"launch": "7"'), whole.replace('["x"]', "[3]"), whole.replace("[1, 2]", "5")]
    wrong += [whole.replace("1.5", '"noon"'), whole.replace('"nodes": 1', '"nodes": true'), "[1]", "{"]
    (launch / JOBS).write_text("\n".join([*wrong, whole]))
    assert [record.job for record in read_records(tmp_path)] == ["1"]
    assert next_launch(launch) == 2
    events = ['{"event": "start", "time": "noon"}', '{"event": 3, "time": 1}', '{"event": "end", "time": 2}']
    (launch / "1_0_events.jsonl").write_text("\n".join(events))
    assert [event["event"] for event in read_events(launch, "1")] == ["end"]
    done = subprocess.run(
        [sys.executable, "-m", "dinoreg", "launch", "status", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
