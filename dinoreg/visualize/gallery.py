"""The files of one view: PNG pictures in `OUT/<view>/`, and a page `OUT/<view>.html` that holds them all."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dinoreg.checkpoint.atomic import write_atomic
from dinoreg.reports import html
from dinoreg.runtime.errors import RunError, UserError
from dinoreg.visualize.subject import Pictures, Subject

FORMAT = "dinoreg-view"
RECORD = "view.json"
_PICTURE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.png")


class Gallery:
    """Collects the pictures of one view as they are drawn, then writes the page around them.

    Pictures that the same view left in the same place before are removed, other files are not touched.
    """

    def __init__(self, view: str, out: Path) -> None:
        """Checks `out` and writes nothing; raises UserError when it cannot be a folder."""
        for path in (out, *out.parents):
            if path.exists() and not path.is_dir():
                raise UserError(f"out={out}: {path} is a file, expected a folder")
        self.view, self.out, self.folder = view, out, out / view
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"out={out}: {self.folder} is a file, expected a folder")
        self.pictures: list[str] = []

    def picture(self, stem: str, image: Image.Image, description: str, note: str = "") -> str:
        """Save a picture as `STEM.png`; returns the HTML that shows it."""
        try:
            if not self.pictures:
                self._begin()
            path = self.folder / f"{stem}.png"
            image.save(path)
        except OSError as error:
            raise RunError(f"out={self.out}: cannot be written ({error.strerror or error})") from None
        self.pictures.append(path.name)
        return html.picture(path, description, note)

    def finish(
        self,
        title: str,
        lead: str,
        facts: Iterable[tuple[str, str, str]],
        sections: Sequence[tuple[str, str, Sequence[str]]],
        record: Mapping[str, Any],
    ) -> Path:
        """Write the page and the record of numbers beside the pictures; returns the page's path.

        sections  (anchor, title, parts of HTML); those without parts are left out
        """
        shown = [(anchor, heading, parts) for anchor, heading, parts in sections if any(parts)]
        body = [
            f"<h1>{html.escape(title)}</h1>\n<p class='soft'>{html.escape(lead)}</p>",
            html.facts(facts),
            html.navigation([(anchor, heading) for anchor, heading, _ in shown]) if len(shown) > 1 else "",
            *(html.section(anchor, heading, *filter(None, parts)) for anchor, heading, parts in shown),
            f"<footer>Written {time.strftime('%Y-%m-%d %H:%M')} by dinoreg. This page needs no network.</footer>",
        ]
        written = {"format": FORMAT, "view": self.view, **record, "pictures": self.pictures}
        page = self.out / f"{self.view}.html"
        try:
            write_atomic(self.folder / RECORD, json.dumps(written, indent=1) + "\n")
            write_atomic(page, html.page(f"{title} · dinoreg", body))
        except OSError as error:
            raise RunError(f"out={self.out}: cannot be written ({error.strerror or error})") from None
        return page

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            before = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
            names = before["pictures"] if before["format"] == FORMAT else []
            for name in names:
                if _PICTURE.fullmatch(name):
                    (self.folder / name).unlink(missing_ok=True)
        except (OSError, ValueError, KeyError, TypeError):
            return  # no record, or none of ours: nothing is removed


def about(subject: Subject, size: tuple[int, int], pictures: Pictures) -> list[tuple[str, str, str]]:
    """The facts that every view states: model, resolution, images."""
    model = subject.model
    rows, columns = size[0] // model.patch_size, size[1] // model.patch_size
    registers = f"{model.num_registers} register{'s' * (model.num_registers != 1)}"
    skipped = f"{len(pictures.skipped)} could not be read" if pictures.skipped else ""
    return [
        ("model", subject.name, f"{model.depth} blocks of {model.heads} heads, width {model.dim}, {registers}"),
        ("images", str(len(pictures.names)), skipped),
        ("resolution", f"{size[0]} x {size[1]} px", f"{rows} x {columns} patches of {model.patch_size} px"),
    ]


def unreadable(pictures: Pictures) -> tuple[str, str, Sequence[str]]:
    """The section that lists images left out; empty when there are none."""
    table = html.table(("image", "reason"), pictures.skipped) if pictures.skipped else ""
    return "skipped", "Images left out", [f'<div class="card">{table}</div>' if table else ""]


def in_gallery(parts: Iterable[str]) -> str:
    kept = [part for part in parts if part]
    return f'<div class="gallery">{"".join(kept)}</div>' if kept else ""
