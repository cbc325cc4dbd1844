"""The files of one view: PNG pictures in `OUT/<view>/`, and a page `OUT/<view>.html` that holds them all."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from dinoreg.checkpoint.atomic import write_atomic
from dinoreg.config.overwrite import check_folder
from dinoreg.reports import html
from dinoreg.runtime.errors import RunError
from dinoreg.runtime.json_files import read_json
from dinoreg.visualize.contact_sheet import to_pixels
from dinoreg.visualize.subject import open_subject, picture_size, read_pictures

FORMAT = "dinoreg-view"
RECORD = "view.json"
_PICTURE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.png")


class Gallery:
    """Collects the pictures of one view as they are drawn, then writes the page around them.

    Pictures that the same view left in the same place before are removed, other files are not touched.
    """

    def __init__(self, view: str, out: Path) -> None:
        """Checks `out` and writes nothing; raises UserError when it cannot be a folder."""
        for path in (out / view, out, *out.parents):
            check_folder(path, f"out={out}: {path}")
        self.view, self.out, self.folder = view, out, out / view
        self.saved: list[str] = []  # names of the pictures

    def picture(self, stem: str, image: Image.Image, description: str, note: str = "") -> html.Picture | None:
        """Save a picture as `STEM.png`; returns what shows it on the page."""
        path = self.folder / f"{stem}.png"
        with self._writing():
            if not self.saved:
                self._remove_last()
            image.save(path)
        self.saved.append(path.name)
        return html.picture(path, description, note)

    def write_page(
        self,
        title: str,
        facts: Sequence[tuple[str, str, str]],
        record: Mapping[str, Any],
        folder: str = "visualize",
        **values: Any,
    ) -> Path:
        """Write the page and the record of numbers beside the pictures; returns the page's path.

        facts   (what, value, small print), in tiles below the title
        folder  of `dinoreg/`, in which `templates/<view>.html.j2` is; it is given `values`
        """
        page = self.out / f"{self.view}.html"
        written = {"format": FORMAT, "view": self.view, **record, "pictures": self.saved}
        content = html.page(f"{folder}/templates/{self.view}.html.j2", title, facts=facts, **values)
        with self._writing():
            write_atomic(self.folder / RECORD, json.dumps(written, indent=1) + "\n")
            write_atomic(page, content)
        return page

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(f"out={self.out}: cannot be written ({error.strerror or error})") from None

    def _remove_last(self) -> None:
        """Remove the pictures that a record of ours names; without one nothing is removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        before = read_json(self.folder / RECORD)
        names = before.get("pictures") if before.get("format") == FORMAT else None
        for name in names if isinstance(names, list) else []:
            if isinstance(name, str) and _PICTURE.fullmatch(name):
                (self.folder / name).unlink(missing_ok=True)


class ModelGallery(Gallery):
    """A view of a model on some images.

    size      (height, width) in pixels of the images; grid: in patches
    pictures  the images as the model gets them; pixels (B, H, W, 3) uint8: as they are shown
    """

    def __init__(
        self,
        view: str,
        weights: str,
        images: str | Sequence[str] | None,
        out: str | None,
        *,
        size: int | Sequence[int] | None,
        num: int | None,
        device: str,
    ) -> None:
        """The arguments are those of `dinoreg view`; writes nothing; raises UserError for what does not fit."""
        self.subject = open_subject(weights, device)
        self.model = self.subject.model
        self.size = picture_size(self.model, size)
        self.grid = (self.size[0] // self.model.patch_size, self.size[1] // self.model.patch_size)
        super().__init__(view, Path(out) if out else self.subject.folder)
        self.pictures = read_pictures(self.subject, images, num, self.size)
        self.pixels = to_pixels(self.pictures.images, self.subject.mean, self.subject.std)

    def finish(
        self, title: str, record: Mapping[str, Any], facts: Sequence[tuple[str, str, str]] = (), **values: Any
    ) -> Path:
        """Write the page, with what every view states: model, resolution, images, and those left out."""
        model, skipped = self.model, self.pictures.skipped
        (height, width), (rows, columns) = self.size, self.grid
        registers = f"{model.num_registers} register{'s' * (model.num_registers != 1)}"
        names = self.pictures.names
        about = [
            (
                "model",
                self.subject.name,
                f"{model.depth} blocks of {model.heads} heads, width {model.dim}, {registers}",
            ),
            ("images", str(len(names)), f"{len(skipped)} could not be read" if skipped else ""),
            ("resolution", f"{height} x {width} px", f"{rows} x {columns} patches of {model.patch_size} px"),
        ]
        record = {"weights": self.subject.name, "size": self.size, "images": names, **record}
        title = f"{title} of {self.subject.name}"
        return self.write_page(title, [*about, *facts], record, skipped=skipped, **values)
