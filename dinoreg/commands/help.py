"""The help of the program and of each verb, as wide as the terminal. Nothing here imports torch."""

import shutil
import textwrap
from collections.abc import Mapping, Sequence

from dinoreg.commands.arguments import Verb, is_key_value
from dinoreg.config.option import describe
from dinoreg.runtime.guide import said_of

_GAP = 26  # columns of "  key=value" beside its meaning; a longer one has a line of its own


def overview(verbs: Mapping[str, Verb]) -> str:
    """The help of the program, with one line per verb."""
    lines = [_beside(f"  {name}", said_of(name, "summary")[0], max(map(len, verbs)) + 4) for name in verbs]
    parts = [*said_of("start", "usage"), "", *lines, "", "examples:", *said_of("start", "examples")]
    return "\n".join(parts)


def verb_help(verb: Verb, arguments: Sequence[str] = ()) -> str:
    """The help of one verb: usage, examples, and every key with its value and meaning, section by section.

    arguments  the other arguments; a section, or the start of keys, shows these alone; where they name a config, its
               values are shown in place of the defaults
    raises     UserError for a config that cannot be read
    """
    known = {*map(section_of, verb.keys())} - {""}
    words = [argument for argument in arguments if not argument.startswith("-")]
    wanted = [word for word in words if word in known]
    named = [word for word in words if word not in known]
    shown = verb.values(named) if verb.values and named and not is_key_value(named[0]) else verb.options
    usage = "\n       dinoreg ".join(said_of(verb.name, "usage"))
    lines = [_wrapped(f"usage: dinoreg {usage}", " " * 9), "", *map(_wrapped, said_of(verb.name, "summary"))]
    if not wanted:
        details = map(_wrapped, (*said_of(verb.name, "details"), *verb.lines()))
        lines += ["", "examples:", *said_of(verb.name, "examples"), "", *details]
    for kind, options in {"": shown, **verb.kinds}.items():
        rows = [row for row in describe(options) if not wanted or section_of(row[0]) in wanted]
        if rows:
            lines += ["", f"keys of {kind}:" if kind else "keys:", *_table(rows)]
    if known and not wanted:
        lines += ["", _wrapped(f"one section: dinoreg {verb.name} --help {' | '.join(sorted(known))}", "  ")]
    return "\n".join(lines)


def _table(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    lines: list[str] = []
    section = ""
    for key, kind, meaning in rows:
        if section_of(key) != section:
            section = section_of(key)
            lines += ["", f"{section}:"]
        of_type, _, value = kind.partition(" = ")
        text = f"{meaning} [{of_type}]" if value in ("", "none") else meaning
        lines.append(_beside(f"  {key}={value.replace(', ', ',')}", text, _GAP))
    return lines


def _beside(left: str, right: str, gap: int) -> str:
    """Two columns, the right one wrapped; below the left one where that is too wide."""
    indent = " " * gap
    first = f"{left:<{gap}}" if len(left) < gap else f"{_wrapped(left, indent)}\n{indent}"
    return first + textwrap.fill(right, _width(), initial_indent=indent, subsequent_indent=indent).lstrip()


def _wrapped(text: str, indent: str = "") -> str:
    """The lines of a text, each wrapped."""
    return "\n".join(textwrap.fill(line, _width(), subsequent_indent=indent) for line in text.split("\n"))


def section_of(key: str) -> str:
    """The section that a dotted key belongs to, "" for none."""
    return key.partition(".")[0] if "." in key else ""


def _width() -> int:
    return min(shutil.get_terminal_size((80, 24)).columns, 100)
