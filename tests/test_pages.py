"""Every kind of page in a real browser: wide and narrow, light and dark, without an error and open to everyone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import AXE, CHROMIUM, Browser
from planted import planted_vit, write_images
from small_runs import tiny_model
from small_runs import write_run as write_tiny_run
from test_labelled_verdict import save, stripes
from test_report import write_run

from dinoreg.commands.main import main
from dinoreg.commands.report import compare_runs
from dinoreg.reports import html
from dinoreg.reports.html import Chart, Line
from dinoreg.reports.run_report import write_report

needs_browser = pytest.mark.skipif(
    CHROMIUM is None or not AXE.is_file(), reason="needs Chromium, and axe-core: npm install --no-save axe-core@4"
)
pytestmark = [needs_browser, pytest.mark.filterwarnings("ignore::ResourceWarning")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser") / "profile") as opened:
        yield opened


def check(browser: Browser, page: Path) -> None:
    """No scrolling sideways, no error, no violation, and no chart without its unit and what is good."""
    for width, theme in ((1400, "light"), (390, "dark"), (390, "light"), (1400, "dark")):
        browser.open(page, width, theme)
        assert browser.value("document.documentElement.scrollWidth") <= width, (page, width)
        assert browser.violations() == [], (page, width, theme)
        assert browser.errors == [], (page, width, theme)
    unsaid = "[...document.querySelectorAll('.charts figure')].filter(each => !each.querySelector('.note'))"
    assert browser.value(f"{unsaid}.map(each => each.innerText)") in ([], ["invented"]), page  # by a test's own metrics
    split = "[...document.querySelectorAll('td.num')].filter(each => getComputedStyle(each).whiteSpace != 'pre').length"
    assert browser.value(split) == 0, page


@pytest.mark.slow
def test_a_runs_report_and_a_comparison_hold_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in "ab"]
    pages = [write_report(run) for run in runs]
    check(browser, pages[0])
    check(browser, compare_runs(runs, tmp_path / "compare.html"))


def test_the_theme_is_the_systems_until_another_is_chosen(browser: Browser, tmp_path: Path) -> None:
    charts = html.charts([Chart("Loss", "In nats.", [Line("loss", [0, 1], [2.0, 1.0])])])
    page = tmp_path / "page.html"
    paired = {"paired_columns": (), "paired": (), "links": (), "apart": (), "differences": ()}
    compare = "reports/templates/compare.html.j2"
    page.write_text(html.page(compare, "a", lead="", names=[], columns=(), rows=(), charts=charts, **paired))

    def shown() -> tuple[str, bool]:
        dark_chart = "getComputedStyle(document.querySelector('.charts img.dark')).display == 'block'"
        return browser.value("getComputedStyle(document.body).backgroundColor"), browser.value(dark_chart)

    seen = {}
    for system in ("light", "dark"):
        browser.open(page, 1400, system)
        seen[system] = shown()
    assert [dark for _, dark in seen.values()] == [False, True]
    assert seen["light"][0] != seen["dark"][0]
    for system in ("light", "dark"):
        browser.open(page, 1400, system)
        for chosen in ("dark", "light"):
            browser.value(f"document.getElementById('theme-{chosen}').click()")
            assert shown() == seen[chosen], (system, chosen)
        browser.value("document.getElementById('theme-auto').click()")
        assert shown() == seen[system]


@pytest.mark.slow
def test_evaluations_verdicts_registers_and_views_hold_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    run, data = write_tiny_run(tmp_path / "run", tiny_model()), stripes(tmp_path / "stripes")
    planted, images = save(planted_vit(), tmp_path / "planted.safetensors"), write_images(tmp_path / "images")
    out, small = f"out={tmp_path / 'out'}", ("device=cpu", "precision=fp32")
    commands = [
        ["eval", str(data), f"weights={run}", "protocols=knn,logistic", f"out={tmp_path / 'results'}", *small],
        ["verdict", str(data), f"weights={run}", f"public={planted}", "repeats=1", out, *small],
        ["registers", f"weights={planted}", f"images={images}", "size=64", out],
        *(["view", kind, f"weights={run}", "num=2", out] for kind in ("attention", "pca", "norms")),
        ["view", "pca", f"weights={run}", "num=2", "foreground=true", f"out={tmp_path / 'foreground'}"],
        ["view", "crops", str(run), "num=3", out],
    ]
    assert [main(command) for command in commands] == [0] * len(commands)
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) == len(commands)
    for page in pages:
        check(browser, page)
