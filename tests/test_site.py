"""The guides build into a site, without a warning, that asks nothing of other hosts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What a browser fetches by itself when it shows a page; links that a reader may follow are not among it.
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//|<link\b[^>]*\bhref=["']?(?:https?:)?//"""
    r"""|url\(\s*["']?(?:https?:)?//|@import\s+["'](?:https?:)?//"""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_the_guides_build_strictly_into_a_site_that_fetches_nothing(site: Path) -> None:
    pages = [page.relative_to(ROOT / "docs").with_suffix(".html") for page in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if not (site / page).is_file()] == []
    for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
        assert FETCHED.findall(path.read_text()) == [], path


@pytest.mark.slow
def test_pages_and_search_work_from_a_folder_on_a_desk_and_on_a_telephone(site: Path, tmp_path: Path) -> None:
    browser = pytest.importorskip("browser")
    if browser.CHROMIUM is None:
        pytest.skip("no Chromium on the PATH")
    with browser.Browser(tmp_path / "profile") as tab:
        for page in sorted(set(site.rglob("*.html")) - {site / "404.html"}):  # that one is for servers alone
            for width, theme in ((1400, "light"), (390, "dark")):
                tab.open(page, width, theme)
                assert tab.errors == [], page
                assert tab.value("document.documentElement.scrollWidth") <= width, page
        tab.open(site / "index.html", 1400, "light")
        found = tab.value(
            """(async () => {
              const field = document.querySelector(".md-search__input");
              field.focus();
              field.value = "Sinkhorn";
              field.dispatchEvent(new Event("input", {bubbles: true}));
              field.dispatchEvent(new KeyboardEvent("keyup", {bubbles: true}));
              const results = () => document.querySelectorAll(".md-search-result__item").length;
              for (let waited = 0; !results() && waited < 100; waited++)
                await new Promise(resolve => setTimeout(resolve, 100));
              return results();
            })()"""
        )
        assert found > 0
        assert tab.errors == []
