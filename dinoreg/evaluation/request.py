"""An evaluation as the user requested it: options, and the datasets that are meant. Nothing here imports torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinoreg.config.option import dotted, nearest, read
from dinoreg.data.shards import is_place
from dinoreg.evaluation.benchmark import PROTOCOLS, Benchmark, benchmarks, find_benchmark, is_shipped, named, shadowed
from dinoreg.evaluation.options import EvalOptions
from dinoreg.runtime.errors import UserError


@dataclass(frozen=True)
class Request:
    """An evaluation as the user requested it.

    options    of the evaluation and of the protocols
    explicit   dotted keys that the user gave: they win over a dataset's own protocol options
    dataset    {dataset: {option: value}}
    """

    options: EvalOptions
    explicit: frozenset[str] = frozenset()
    dataset: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def read_request(overrides: Mapping[str, Any] | Iterable[str]) -> Request:
    """A request from `key=value`: options of EvalOptions, and NAME.KEY=VALUE for those of a dataset.

    raises UserError for an unknown key, naming the nearest, a value that is not accepted, or an unknown protocol
    """
    names = {name: each.name for name, each in named().items()} | {"own": "own"}
    general: dict[str, Any] = {}
    dataset: dict[str, dict[str, Any]] = {}
    for key, value in dotted(overrides).items():
        name, _, rest = key.partition(".")
        if rest and name in names:
            dataset.setdefault(names[name], {})[rest] = value
        else:
            general[key] = value
    request = Request(*read(EvalOptions, general), dataset)
    for name in request.options.protocols or ():
        if name not in PROTOCOLS:
            raise UserError(f"protocols={name}: unknown{nearest(name, PROTOCOLS)}; known: {', '.join(PROTOCOLS)}")
    return request


def is_own(name: str) -> bool:
    """Whether a name of `dinoreg eval` means labelled data of one's own."""
    return is_place(name) and not name.endswith(".py") and not is_shipped(name)


def split_names(names: str) -> list[str]:
    """The datasets of `dinoreg eval NAME,NAME`; an existing path may hold commas."""
    return [names] if is_place(names) else [name.strip() for name in names.split(",")]


def choose(names: Sequence[str], request: Request) -> list[Benchmark]:
    """The benchmarks of `dinoreg eval NAME,NAME | all | PATH`; UserError for an unknown or unreadable one."""
    chosen: dict[tuple[str, str], Benchmark] = {}
    for name in names:
        if name == "all":
            chosen |= {(each.name, each.place): each for each in benchmarks().values()}
            continue
        if is_own(name):
            from dinoreg.evaluation.custom.datasets import own_benchmark

            benchmark = own_benchmark(name, request.dataset.get("own", {}), request.options.columns)
        else:
            benchmark = find_benchmark(name)
        chosen[benchmark.name, benchmark.place] = benchmark
    return list(chosen.values())


def folder_of(benchmark: Benchmark, request: Request) -> Path:
    """Where a dataset is; UserError for an unknown option of it, without `root=`, and where it is not complete."""
    benchmark.option_values(request.dataset.get(benchmark.name, {}))
    root = request.options.root
    if root is None and benchmark.layouts:
        hint = f" ({shadowed([benchmark.name])[0]})" if Path(benchmark.name).exists() else ""
        raise UserError(f"{benchmark.name}: root= is missing, the folder that holds the datasets{hint}")
    return benchmark.find(root) if root is not None and benchmark.layouts else Path(root or ".")


def check_whole(names: str, request: Request) -> None:
    """UserError for what keeps a single named dataset from being measured, as far as no image tells it."""
    if request.options.weights is None:
        raise UserError("eval: weights= is missing: a run folder, a weight file, or random:NAME for random weights")
    shipped = [name for name in split_names(names) if name != "all" and not is_own(name)]
    for benchmark in [find_benchmark(name) for name in shipped]:
        if len(shipped) == 1:
            folder_of(benchmark, request)
