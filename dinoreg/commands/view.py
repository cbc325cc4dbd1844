"""`dinoreg view`: pictures of what a model sees, or of the crops that a config makes."""

import importlib
from typing import Any

from dinoreg.commands.arguments import is_key_value, read_options, source_and_overrides
from dinoreg.commands.options import VIEWS, CropsOptions
from dinoreg.config.option import nearest, split_texts
from dinoreg.runtime.errors import UserError


def read_view(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """(kind of view, arguments of `dinoreg.visualize.KIND.view_KIND`); UserError for what is wrong with them."""
    expected = f"expected {', '.join(VIEWS)}"
    if not arguments or is_key_value(arguments[0]):
        raise UserError(f"view: missing what to view; {expected}")
    kind, *rest = arguments
    if kind not in VIEWS:
        raise UserError(f"view: {kind}: unknown view{nearest(kind, VIEWS)}; {expected}")
    if kind != "crops":
        return kind, vars(read_options(VIEWS[kind], rest)[1])
    own, rest = split_texts(CropsOptions, rest)
    config, overrides = source_and_overrides("view crops", rest)
    return kind, {"config": config, "overrides": overrides, **vars(read_options(CropsOptions, own)[1])}


def view(kind: str, values: dict[str, Any]) -> None:
    """Draw, and say where the page is."""
    module = importlib.import_module(f"dinoreg.visualize.{kind}")
    print(f"view: {getattr(module, f'view_{kind}')(**values)}")
