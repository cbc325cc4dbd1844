"""What is refused before torch is imported, which takes seconds: paths, names and folders that cannot be meant."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinoreg.config.load import Config
from dinoreg.config.option import Options, flat
from dinoreg.config.overwrite import check_out
from dinoreg.models.registry import parse_name
from dinoreg.weights.names import not_there, random_name

_POINTER = re.compile(r"[/\\](best|last)$")  # of a run, which is no file of it
_ELSEWHERE = ("WORLD_SIZE", "SLURM_PROCID")  # another process may have begun with the folder already


def check_early(parsed: tuple[Any, ...]) -> None:
    """UserError, in the words of what would refuse it later, for sources, weights and folders among parsed arguments.

    parsed  arguments of a verb's function, of which `given_by` takes the values
    """
    alone = not any(name in os.environ for name in _ELSEWHERE)  # else the processes agree first, and one speaks
    for each in parsed if alone else ():
        given = given_by(each)
        for key in ("data", "images", "data.source"):
            if isinstance(given.get(key), (str, os.PathLike, list, tuple)):  # `images` may also be a number of them
                from dinoreg.data.open import check_source

                check_source(given[key], key.partition(".")[0])
        for key in ("weights", "init", "distill", "public"):
            check_weights(given.get(key) or ())
        if isinstance(each, Config) and each.out:
            check_out(each, Path(each.out))


def given_by(parsed: Any) -> Mapping[str, Any]:
    """The values by key of a class of options, of what has `.options`, or a mapping; {} of anything else."""
    options = getattr(parsed, "options", parsed)
    return flat(options) if isinstance(options, Options) else options if isinstance(options, Mapping) else {}


def check_weights(weights: Any) -> None:
    """UserError for what is neither a path nor random:NAME or timm:NAME; several stand in a tuple or with commas."""
    if not isinstance(weights, str):
        for each in weights:
            check_weights(each)
    elif (name := random_name(weights)) is not None and "," not in name:
        parse_name(name)
    elif "," in weights and not os.path.exists(weights):
        check_weights(weights.split(","))
    elif not (weights.startswith("timm:") or os.path.exists(_POINTER.sub("", weights))):
        raise not_there(weights)
