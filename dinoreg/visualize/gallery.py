"""The files of one view: PNG pictures in `OUT/<view>/`, and a page `OUT/<view>.html` that holds them all."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from dinoreg.checkpoint.atomic import write_atomic
from dinoreg.reports import html
from dinoreg.runtime.errors import RunError, UserError
from dinoreg.runtime.json_files import read_json
from dinoreg.visualize.contact_sheet import to_pixels
from dinoreg.visualize.subject import open_subject, picture_size, read_pictures

FORMAT = "dinoreg-view"
RECORD = "view.json"
Images = str | Sequence[str] | None
Size = int | Sequence[int] | None
_PICTURE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.png")


class Gallery:
    """Collects the pictures of one view as they are drawn, then writes the page around them.

    Pictures that the same view left in the same place before are removed, other files are not touched.
    """

    def __init__(self, view: str, out: Path) -> None:
        """Checks `out` and writes nothing; raises UserError when it cannot be a folder."""
        self.view, self.out, self.folder = view, out, out / view
        for path in (*reversed(out.parents), out, self.folder):
            if path.exists() and not path.is_dir():
                raise UserError(f"out={out}: {path} is a file, expected a folder")
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

    def write_page(self, title: str, record: Mapping[str, Any], folder: str = "visualize", **values: Any) -> Path:
        """Write the page and the record of numbers beside the pictures; returns the page's path.

        folder  of `dinoreg/`, in which `templates/<view>.html.j2` is; it is given `values`
        """
        page = self.out / f"{self.view}.html"
        written = {"format": FORMAT, "view": self.view, **record, "pictures": self.saved}
        content = html.page(f"{folder}/templates/{self.view}.html.j2", title, **values)
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
        self, view: str, *, weights: str, images: Images, out: str | None, size: Size, num: int | None, device: str
    ) -> None:
        """The arguments are those of `dinoreg view`; writes nothing; raises UserError for what does not fit."""
        self.subject = open_subject(weights, device)
        self.model = self.subject.model
        self.size = picture_size(self.model, size)
        self.grid = (self.size[0] // self.model.patch_size, self.size[1] // self.model.patch_size)
        super().__init__(view, Path(out) if out else self.subject.folder)
        self.pictures = read_pictures(self.subject, images, num, self.size)
        self.pixels = to_pixels(self.pictures.images, self.subject.mean, self.subject.std)

    def finish(self, title: str, record: Mapping[str, Any], **values: Any) -> Path:
        """Write the page, which states the model, the resolution and the images, and those left out."""
        name, names = self.subject.name, self.pictures.names
        record = {"weights": name, "size": self.size, "images": names, **record}
        values |= {"gallery": self, "skipped": self.pictures.skipped}
        return self.write_page(f"{title} of {name}", record, **values)
