"""One HTML file that needs nothing else: pictures inside, no script, fit for phones, in light and dark."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from PIL import Image

from dinoreg.reports.plots import Chart, darkened, render

STYLE = """
:root { color-scheme: light dark;
  --ink: #1d2330; --soft: #5d6676; --line: #e1e5ec; --ground: #f5f6f9; --card: #fff; --accent: #3b7dd8;
  --good: #157f5b; --bad: #b3322b; --warn: #9a6200; --goodbg: #e8f5ef; --badbg: #fbeceb; --warnbg: #fdf4e2; }
@media (prefers-color-scheme: dark) { :root {
  --ink: #e4e8ef; --soft: #98a2b3; --line: #2b303a; --ground: #101216; --card: #181b21; --accent: #6ba3ee;
  --good: #5fcb9f; --bad: #f08a80; --warn: #e7b45a; --goodbg: #14261f; --badbg: #2c1817;
  --warnbg: #2a2213; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 18px 60px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 38px 0 10px; }
h3 { font-size: 14px; margin: 0; font-weight: 600; }
p { margin: 6px 0; }
.soft, .note { color: var(--soft); }
.note { font-size: 13px; margin: 1px 0 6px; }
nav { margin: 14px 0 0; font-size: 13px; display: flex; flex-wrap: wrap; gap: 2px 14px; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.card + .card, .card + .charts { margin-top: 12px; }
.verdict { margin: 18px 0 14px; border-left: 5px solid var(--soft); }
.verdict.good { border-left-color: var(--good); background: var(--goodbg); }
.verdict.bad { border-left-color: var(--bad); background: var(--badbg); }
.verdict.warn { border-left-color: var(--warn); background: var(--warnbg); }
.verdict p:first-child { font-size: 18px; font-weight: 600; line-height: 1.35; margin: 0 0 4px; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(46%, 220px), 1fr)); gap: 10px;
  margin: 0; }
.facts div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 9px 12px;
  min-width: 0; }
.facts dt { color: var(--soft); font-size: 12px; }
.facts dd { margin: 1px 0 0; font-size: 17px; font-weight: 600; overflow-wrap: anywhere; line-height: 1.25; }
.facts dd small { display: block; font-weight: 400; font-size: 12px; color: var(--soft); line-height: 1.35; }
.charts { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 12px; }
.charts.two { grid-template-columns: repeat(2, minmax(0, 1fr)); }
@media (max-width: 900px) { .charts { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
@media (max-width: 620px) { .charts, .charts.two { grid-template-columns: minmax(0, 1fr); } }
.charts .card { margin: 0; display: flex; flex-direction: column; }
.charts picture { margin-top: auto; }
figure { margin: 0; }
figure img { display: block; width: 100%; height: auto; }
figure.picture img { width: auto; max-width: 100%; }
.gallery { display: flex; flex-wrap: wrap; gap: 12px; align-items: flex-start; margin-top: 12px; }
.gallery .card { margin: 0; padding: 8px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; color: var(--soft); font-weight: 500; font-size: 12px; }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td:last-child, th:last-child { padding-right: 0; }
tr:last-child td { border-bottom: 0; }
.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.middle td { vertical-align: middle; }
tr.own td { font-weight: 600; }
.track { position: relative; height: 18px; min-width: 140px; margin: 0 6px; }
.track i, .track b, .track u, .track s { position: absolute; }
.track i { top: 8px; height: 2px; left: 0; right: 0; background: var(--line); }
.track b { top: 4px; height: 10px; border-radius: 5px; background: var(--soft); opacity: .4; min-width: 2px; }
.track u { top: 4px; width: 10px; height: 10px; margin-left: -5px; border-radius: 50%;
  background: var(--soft); }
.track s { top: 0; bottom: 0; width: 0; border-left: 1.5px dotted var(--soft); }
.own .track b, .own .track u { background: var(--accent); }
.mark { display: inline-block; border-radius: 5px; padding: 0 7px; font-size: 12px; font-weight: 600;
  white-space: nowrap; background: var(--warnbg); color: var(--warn); }
pre { margin: 0; overflow-x: auto; font: 12.5px/1.5 ui-monospace, Menlo, Consolas, monospace; }
summary { cursor: pointer; color: var(--accent); }
details[open] summary { margin-bottom: 8px; }
footer { margin-top: 40px; color: var(--soft); font-size: 12px; }
@media (max-width: 560px) { main { padding: 18px 12px 40px; } .card { padding: 11px 12px; }
  .track { min-width: 80px; } th, td { padding-right: 9px; } }
@media print { body { background: #fff; } .card, .facts div { break-inside: avoid; } }
"""


def escape(value: object) -> str:
    return html.escape(str(value), quote=True)


def page(title: str, body: Iterable[str]) -> str:
    """The whole document around already escaped parts."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(anchor: str, title: str, *parts: str) -> str:
    return f'<section id="{escape(anchor)}">\n<h2>{escape(title)}</h2>\n' + "\n".join(parts) + "\n</section>"


def navigation(sections: Sequence[tuple[str, str]]) -> str:
    links = (f'<a href="#{escape(anchor)}">{escape(title)}</a>' for anchor, title in sections)
    return "<nav>" + "\n".join(links) + "</nav>"


def facts(items: Iterable[tuple[str, str, str]]) -> str:
    """Tiles of (what, value, small print)."""
    tiles = []
    for what, value, small in items:
        below = f"<small>{escape(small)}</small>" if small else ""
        if value:
            tiles.append(f"<div><dt>{escape(what)}</dt><dd>{escape(value)}{below}</dd></div>")
    return '<dl class="facts">' + "\n".join(tiles) + "</dl>"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], numeric: Sequence[int] = ()) -> str:
    """A plain table; columns in `numeric` are set to the right."""

    def cells(tag: str, values: Sequence[object]) -> str:
        return "".join(
            f"<{tag}{' class=num' if column in numeric else ''}>{escape(value)}</{tag}>"
            for column, value in enumerate(values)
        )

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    top = f"<thead><tr>{cells('th', head)}</tr></thead>"
    return f'<div class="scroll"><table>{top}<tbody>\n{body}\n</tbody></table></div>'


def charts(items: Iterable[Chart]) -> str:
    """Charts in cards side by side, each drawn for light and for dark."""
    cards = []
    for chart in items:
        drawn = render(chart)
        light, dark = _data("image/svg+xml", drawn), _data("image/svg+xml", darkened(drawn))
        note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
        cards.append(
            f'<figure class="card"><h3>{escape(chart.title)}</h3>{note}<picture>'
            f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
            f'<img alt="{escape(chart.title)}" src="{light}"></picture></figure>'
        )
    kind = "charts two" if len(cards) in (1, 2, 4) else "charts"
    return f'<div class="{kind}">' + "\n".join(cards) + "</div>"


def picture(path: Path, description: str, note: str = "") -> str:
    """A picture file inside the page, or nothing when it cannot be read."""
    try:
        with Image.open(path) as image:
            image.load()
            width = image.width
            buffer = io.BytesIO()
            image.save(buffer, format="WEBP", quality=88, method=4)
    except (OSError, ValueError):
        return ""
    original = path.read_bytes()
    smaller = buffer.getvalue()
    source = _data("image/webp", smaller) if len(smaller) < len(original) else _data("image/png", original)
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    shown = f'<img alt="{escape(description)}" width="{width}" src="{source}">'
    return f'<figure class="card picture">{below}{shown}</figure>'


def interval_rows(
    rows: Sequence[tuple[str, float, float, float, bool]],
    written: Callable[[float], str],
    reference: float | None,
    low: float,
    high: float,
) -> str:
    """Values with their intervals, on a scale from `low` to `high`: rows of (name, value, low, high, own)."""

    def at(value: float) -> str:
        return f"{100 * (min(max(value, low), high) - low) / max(high - low, 1e-12):.2f}%"

    lines = []
    for name, value, start, end, own in rows:
        extent = 100 * (min(end, high) - max(start, low)) / max(high - low, 1e-12)
        dotted = "" if reference is None else f'<s style="left:{at(reference)}"></s>'
        lines.append(
            f'<tr class="middle{" own" if own else ""}"><td>{escape(name)}</td>'
            f'<td class="num">{escape(written(value))}</td>'
            f'<td class="num soft">{escape(written(start))} to {escape(written(end))}</td>'
            f'<td style="width:45%"><div class="track"><i></i>{dotted}'
            f'<b style="left:{at(start)};width:{max(extent, 0):.2f}%"></b>'
            f'<u style="left:{at(value)}"></u></div></td></tr>'
        )
    return "\n".join(lines)


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
