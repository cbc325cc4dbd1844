"""What is refused before torch is imported, which takes seconds: paths, names and folders that cannot be meant."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinoreg.config.load import Config
from dinoreg.config.option import Options, flat
from dinoreg.config.overwrite import check_out
from dinoreg.models.registry import parse_name
from dinoreg.weights.names import not_there, random_name

_POINTERS = ("best", "last")  # of a run, which are no files of it
_MANY = ("WORLD_SIZE", "SLURM_PROCID")  # where another process may have begun with the folder already


def check_early(parsed: tuple[Any, ...]) -> None:
    """UserError, in the words of what would refuse it later, for sources, weights and folders among parsed arguments.

    parsed  arguments of a verb's function: classes of options, mappings of keys, or what has `.options`; others pass
    """
    for each in parsed:
        options, given = getattr(each, "options", each), given_by(each)
        for key in ("data", "images", "data.source"):
            if given.get(key) is not None:
                from dinoreg.data.open import check_source

                check_source(given[key], key.partition(".")[0])
        models = getattr(options, "models", ())
        for weights in (*models, *(given.get(key) for key in ("init", "distill", "public"))):
            check_weights(weights)
        if not models and isinstance(given.get("weights"), str):
            check_weights(given["weights"])
        if isinstance(options, Config) and options.out and not any(name in os.environ for name in _MANY):
            check_out(options, Path(options.out))


def given_by(parsed: Any) -> Mapping[str, Any]:
    """The values by key in one of the parsed arguments; {} where it has none."""
    options = getattr(parsed, "options", parsed)
    return flat(options) if isinstance(options, Options) else options if isinstance(options, Mapping) else {}


def check_weights(weights: str | None) -> None:
    """UserError for what is neither a path nor `random:NAME` or `timm:NAME`; None passes."""
    if weights is None or weights.startswith("timm:"):
        return
    if (name := random_name(weights)) is not None:
        parse_name(name)
        return
    path = Path(weights)
    try:
        is_there = path.exists() or (path.name in _POINTERS and path.parent.is_dir())
    except OSError:  # a name too long
        is_there = False
    if not is_there:
        raise not_there(weights)
