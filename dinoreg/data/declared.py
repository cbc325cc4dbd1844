"""Datasets by name as sources without labels: `data=imagenet22k:root=/datasets` reads what `eval/` declares.

A declaration that can feed a pretraining has a `PRETRAINING` beside its `BENCHMARK`. Its file is found by name and
run when it is asked for; nothing here imports it, or the evaluators that it declares itself to.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dinoreg.config.bundled import bundled, run_file
from dinoreg.config.option import dotted, nearest
from dinoreg.runtime.errors import UserError

if TYPE_CHECKING:
    from dinoreg.data.source import Source

KINDS = (
    "a folder, shards (.tar, .parquet, shards-{000..099}.tar), a list of paths (.txt .csv .tsv .parquet), "
    "a URL of these (s3://…), scenes[:count=,size=,seed=], a dataset by name (imagenet22k:root=FOLDER)"
)
_OPTION = re.compile(r",(?=[a-z_]+=)")  # a comma inside a path stays one


@dataclass(frozen=True)
class Pretraining:
    """How a declared dataset is read without labels.

    open     (root, split, options, index_dir) -> Source; options are those of the benchmark that `options` names,
             converted, with their defaults; UserError naming the expected path and archive for what is missing
    splits   the published names of the splits that it can open, the default one first; empty: it has but one
    options  names of the benchmark's options that matter here
    """

    open: Callable[[Path, str, Mapping[str, Any], str | None], Source]
    splits: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


def known_names() -> dict[str, Path]:
    """Names and aliases of the datasets that can be a source, and where each is declared."""
    paths = {}
    for path in sorted(bundled("eval").glob("*.py")):
        # A look at the text first: running a file that declares no source would be for nothing.
        if re.search(r"^PRETRAINING\b", path.read_text(encoding="utf-8"), re.MULTILINE):
            benchmark = load_declaration(path).BENCHMARK
            paths.update(dict.fromkeys((benchmark.name, *benchmark.aliases), path))
    return paths


def find_named(name: str) -> Path:
    """Where the dataset of a name is declared; UserError, with the nearest, for an unknown one."""
    known = known_names()
    if name.lower() not in known:
        raise UserError(f"data: {name!r} is not a known kind of source, expected {KINDS}{nearest(name, known)}")
    return known[name.lower()]


def open_named(name: str, options: str, index_dir: str | None) -> Source:
    """The source `NAME:OPTIONS`, with OPTIONS like "root=/datasets,split=train".

    raises UserError for an unknown dataset or option, a missing root, and what the dataset itself lacks
    """
    declared = load_declaration(find_named(name))
    benchmark, pretraining = declared.BENCHMARK, declared.PRETRAINING
    name = benchmark.name
    accepted = ("root", *(("split",) if pretraining.splits else ()), *pretraining.options)
    values = dotted(filter(None, _OPTION.split(options)), f"data={name}:{options}")
    for key in values:
        if key not in accepted:
            raise UserError(
                f"data: {name} has no option {key!r}, expected {', '.join(accepted)}{nearest(key, accepted)}"
            )
    root = str(values.pop("root", ""))
    if not root:
        need = benchmark.layouts[0][0]
        raise UserError(
            f"data: {name} needs the folder that holds it, as {name}:root=FOLDER with {need.path} of {need.archive}"
        )
    split = str(values.pop("split", pretraining.splits[0] if pretraining.splits else ""))
    if pretraining.splits and split not in pretraining.splits:
        expected = " or ".join(pretraining.splits)
        raise UserError(f"data: {name}:split={split}: expected {expected}{nearest(split, pretraining.splits)}")
    path = Path(root).expanduser()
    if not path.is_dir():
        raise UserError(f"data: {name}:root={root} is not a folder; expected the one that holds {benchmark.title}")
    return pretraining.open(path, split, benchmark.option_values(values), index_dir)


def load_declaration(path: Path) -> ModuleType:
    """The module of a Python file in `eval/` or of a user's own, which is run once, as long as it does not change.

    Raises UserError for a file that is missing or fails.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a Python file with a BENCHMARK")
    return _run_declaration(path, path.stat().st_mtime_ns)


@cache
def _run_declaration(path: Path, _modified: int) -> ModuleType:
    return run_file(path, "dinoreg_declared")
