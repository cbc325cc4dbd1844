"""Templates: values are escaped for what they are put into, and every template travels with the package."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from dinoreg.reports.evaluation_report import COLUMNS, FORMAT, write_evaluation
from dinoreg.runtime import templates
from dinoreg.runtime.templates import escape_markdown, percent, position, render, score

HOSTILE = "=HYPERLINK(1)<b>*x*_y_`z`|[a](http://b)\n# c"


def test_markdown_shows_a_value_as_it_is_written_on_one_line() -> None:
    escaped = escape_markdown(HOSTILE)
    assert "\n" not in escaped
    assert re.sub(r"\\(.)", r"\1", escaped) == HOSTILE.replace("\n", " ")
    for mark in "<>*_`|[]#":
        assert not re.search(rf"(?<!\\){re.escape(mark)}", escaped), mark
    assert "](" not in escaped
    assert escape_markdown("1.5 to 2 % (k=20), a-b") == "1.5 to 2 % (k=20), a-b"


def test_a_hostile_name_is_text_in_the_table_of_an_evaluation(tmp_path: Path) -> None:
    row = {"protocol": "linear", "metric": HOSTILE, "value": 0.5, "low": 0.4, "high": 0.6}
    record = {"format": FORMAT, "dataset": HOSTILE, "value": 0.5, "rows": [row], "weights": {"name": HOSTILE}}
    (tmp_path / "record.json").write_text(json.dumps(record))
    write_evaluation(tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "<b>" not in table
    assert "](http" not in table
    title, _, head, rule, line = table.splitlines()
    cells = [re.split(r"(?<!\\)\|", each) for each in (head, rule, line)]
    assert [len(each) for each in cells] == [len(COLUMNS) + 2] * 3
    assert title.startswith("# Evaluation of ")
    assert "&lt;b&gt;" in (tmp_path / "report.html").read_text()


def test_what_a_terminal_would_obey_reaches_no_page() -> None:
    for kind in (".html", ".md", ".txt"):
        shown = templates._environment(kind).from_string("{{ name }}").render(name="a\x1b[2J\u202eb")
        assert shown.replace("\\[", "[").replace("\\\\", "\\") == "a\\x1b[2J\\u202eb"


def test_a_value_that_a_template_is_not_given_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="lead"):
        render("reports/templates/evaluation.md.j2", columns=["a"], records=[])


def test_every_template_is_found_and_can_be_parsed() -> None:
    found = sorted(path.relative_to(templates.PACKAGE) for path in templates.PACKAGE.rglob("templates/*.j2"))
    assert {path.suffixes[-2] for path in found} == {".html", ".md", ".py", ".txt"}
    for path in found:
        templates._environment(path.suffixes[-2]).get_template(str(path))


def test_numbers_are_written_for_people() -> None:
    assert [percent(share) for share in (0, 0.0237, 0.5, 1)] == ["0 %", "2.4 %", "50 %", "100 %"]
    assert [score(0.7123), score(1.5), score(3.14159, "px")] == ["71.2 %", "1.5", "3.14 px"]
    assert [position(value, 1, 5) for value in (0, 3, 9)] == ["0.00%", "50.00%", "100.00%"]
