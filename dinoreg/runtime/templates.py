"""Jinja templates, in the folder `templates/` beside the code that renders them.

In `*.html.j2` every value is escaped for HTML and no line breaks between a number and its unit, in `*.md.j2` it is
escaped for Markdown; `| safe` marks trusted text. In all what a terminal would obey is written as escapes. A variable
without a value is an error.
"""

import math
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dinoreg.runtime.printable import printable

_UNIT = re.compile(r"(?<=\d) (?=(?:%|(?:px|points|images|steps|s|min|h|d|GiB|MB|M)\b))")
DASH = "\u2013"  # for what is not known
PACKAGE = Path(__file__).resolve().parent.parent


def render(template: str, **values: Any) -> str:
    """Render a template with `values` as its variables.

    template  path below `dinoreg/`, such as "reports/templates/run.html.j2"
    raises    jinja2.TemplateNotFound, or jinja2.UndefinedError for a variable without a value
    """
    return _environment(Path(template).suffixes[-2]).get_template(template).render(**values)


def escape_markdown(value: object) -> str:
    """A value on one line, with the special characters of Markdown and HTML escaped; text marked `| safe` as it is."""
    if hasattr(value, "__html__"):
        return str(value)
    return re.sub(r"([\\`*_{}\[\]<>#|!~]|(?<=\])\()", r"\\\1", printable(re.sub(r"\s+", " ", str(value))))


def _keep_units(value: object) -> object:
    """A text with no line break between a number and its unit; markup, which has been through this, as it is."""
    return _UNIT.sub("\u00a0", printable(value, keep="\n\t")) if type(value) is str else value


def _escape_text(value: object) -> object:
    return printable(value, keep="\n\t") if isinstance(value, str) else value


@lru_cache
def _environment(kind: str) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(PACKAGE),
        autoescape=kind == ".html",
        finalize={".md": escape_markdown, ".txt": _escape_text, ".html": _keep_units}.get(kind),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (percent, score, position, extent, printable)
    environment.filters |= {each.__name__: each for each in filters}
    return environment


def percent(share: float) -> str:
    """A share as a percentage: 0.0237 -> 2.4 %; two significant digits below 10 %, three from there on."""
    return "0 %" if share == 0 else f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.3g} %"


def score(value: float, unit: str = "share") -> str:
    """A value with its unit: a share in 0 to 1 as a percentage (0.7123 -> 71.2 %), other shares as plain numbers.

    NaN is a dash.
    """
    if math.isnan(value):
        return DASH
    if unit != "share":
        return f"{value:.3g} {unit}"
    return f"{100 * value:.1f} %" if 0.0 <= value <= 1.0 else f"{value:.4g}"


def with_interval(value: float, low: float = math.nan, high: float = math.nan) -> str:
    """A share with its interval, 0.18 -> 18.0 % [12.9, 23.7]; without one where an end is NaN."""
    return score(value) + ("" if math.isnan(low + high) else f" [{100 * low:.1f}, {100 * high:.1f}]")


def position(value: float, low: float, high: float) -> str:
    """The position of a value on a scale from `low` to `high`, clamped, as a CSS percentage: 3 from 1 to 5 -> 50.00%"""
    return f"{100 * (min(max(value, low), high) - low) / max(high - low, 1e-12):.2f}%"


def extent(start: float, end: float, low: float, high: float) -> str:
    """The part of the scale from `low` to `high` that lies between `start` and `end`, as a CSS percentage."""
    return f"{max(100 * (min(end, high) - max(start, low)) / max(high - low, 1e-12), 0):.2f}%"
