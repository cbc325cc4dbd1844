"""One HTML file that needs nothing else: pictures inside, no script, fit for phones, in light and dark.

The pages are templates (`templates/*.html.j2`); this module makes the pictures and scales in them.
"""

import base64
import html
import io
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dinoreg.checkpoint.run_folder import Probe
from dinoreg.reports.plots import Chart, darkened, draw_chart
from dinoreg.runtime.json_files import is_number, number
from dinoreg.runtime.regular_files import read_regular
from dinoreg.runtime.templates import render


@dataclass(frozen=True)
class Picture:
    """A picture as a `data:` address; `width` in pixels, `description` for those who cannot see it, `note` below it."""

    source: str
    width: int
    description: str
    note: str = ""


@dataclass(frozen=True, repr=False)
class WithPage:
    """A result that has a page, the path of an HTML file by which it is shown in a notebook."""

    page: Path

    def _repr_html_(self) -> str:
        shown = html.escape(self.page.read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{shown}" style="width: 100%; height: 40em; border: 0; resize: vertical"></iframe>'


@dataclass(frozen=True)
class Scale:
    """Values with their 95 % intervals on one axis.

    rows       (name, value, low, high, whether it is the model that the page is about)
    low, high  the ends of the axis
    unit       of the values, as for `score`
    chance     a level to compare with, or None
    level      what that is
    """

    rows: Sequence[tuple[str, float, float, float, bool]]
    low: float = 0.0
    high: float = 1.0
    unit: str = "share"
    chance: float | None = None
    level: str = "chance"


def probe_scale(name: str, probe: Probe) -> Scale:
    """A probe, called `name`, and its baselines: shares from 0 to 1, others up to the largest."""
    rows = [(name, probe.value, probe.low, probe.high, True)]
    rows += [(baseline, *numbers, False) for baseline, numbers in probe.baselines.items()]
    ends = [end for _, _, low, high, _ in rows for end in (low, high)]
    shares = probe.unit == "share" and min(ends) >= 0.0 and max(ends) <= 1.0
    low, high = (0.0, 1.0) if shares else (min(0.0, *ends), max(ends) or 1.0)
    levels = {"always naming the largest class": "majority", "chance": "chance"}
    known = [(number(probe.details[key]), name) for name, key in levels.items() if is_number(probe.details.get(key))]
    return Scale(rows, low, high, probe.unit, *(known[0] if known else ()))


def page(template: str, title: str, **values: Any) -> str:
    """The HTML of a page that extends `reports/templates/page.html.j2`.

    title   of the window; the heading as well, over the line `lead`, unless the template has a head of its own
    values  further variables of the template
    """
    return render(template, title=title, now=time.strftime("%Y-%m-%d %H:%M"), **values)


def charts(items: Iterable[Chart]) -> list[tuple[Chart, str, str]]:
    """Each chart with two `data:` addresses of its drawing, for a light and for a dark page."""
    drawn = [(chart, draw_chart(chart)) for chart in items]
    return [(chart, _data("image/svg+xml", svg), _data("image/svg+xml", darkened(svg))) for chart, svg in drawn]


def picture(path: Path, description: str, note: str = "") -> Picture | None:
    """A picture file, as WebP where that is smaller; None when it cannot be read."""
    try:
        original = read_regular(path)
        with Image.open(io.BytesIO(original)) as image:
            image.load()
            buffer = io.BytesIO()
            image.save(buffer, format="WEBP", quality=88, method=4)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    smaller = buffer.getvalue()
    source = _data("image/webp", smaller) if len(smaller) < len(original) else _data("image/png", original)
    return Picture(source, image.width, description, note)


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
