"""`dinoreg view` and `dinoreg.view`: pictures of what a model sees, or of the crops that a config makes."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinoreg.commands.options import VIEWS, check_view
from dinoreg.config.option import keys_of, read
from dinoreg.reports.html import WithPage
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.json_files import read_json


@dataclass(frozen=True, repr=False)
class View(WithPage):
    """What `dinoreg.view` drew, and its `page`.

    pictures  paths of the PNG files
    record    the numbers beside them, as in `view.json`
    """

    pictures: list[Path]
    record: dict[str, Any]


def view(kind: str, **options: Any) -> View:
    """Draw pictures; the same as `dinoreg view KIND key=value …`.

    kind     "attention", "pca" or "norms", of a model; "crops", of a config
    options  the command line's keys: weights="runs/a", images="photos/", out="pictures", layer="all"; for crops
             config="small" and the keys of `dinoreg.pretrain`
    returns  the paths of the `.pictures`, the numbers `.record` and the `.page`
    raises   UserError (a ValueError), before anything is written, for what is unknown, missing or does not fit
    """
    check_view(kind)
    own = {key: options.pop(key) for key in [*options] if kind != "crops" or key in keys_of(VIEWS[kind])}
    values = dict(vars(read(VIEWS[kind], own)[0]))
    if kind == "crops":
        if "config" not in options:
            raise UserError("view crops: config= is missing: a name in configs/ or a YAML file")
        values |= {"config": str(options.pop("config")), "overrides": options}
    page = draw(kind, values)
    record = read_json(page.with_suffix("") / "view.json")
    return View(page, [page.with_suffix("") / name for name in record["pictures"]], record)


def draw(kind: str, values: Mapping[str, Any]) -> Path:
    """Draw a view with the arguments of `dinoreg.visualize.KIND.view_KIND`, whose page's path is returned."""
    return getattr(importlib.import_module(f"dinoreg.visualize.{kind}"), f"view_{kind}")(**values)
