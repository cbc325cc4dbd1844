"""How a dataset is declared: an `eval/NAME.py` with one `BENCHMARK`, the only place where its facts are written.

The library finds declarations by name or path and never imports them as packages; they import this module.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dinoreg.config.bundled import bundled
from dinoreg.config.option import describe_fields, nearest, read_value
from dinoreg.data.declared import load_declaration
from dinoreg.evaluation.readers.dataset_folder import DatasetFolder
from dinoreg.runtime.errors import UserError

if TYPE_CHECKING:
    from dinoreg.evaluation.data import Data

# protocol: (MODULE:FUNCTION, title); a function is `(measured: Measurement) -> list[Row]`.
PROTOCOLS: Mapping[str, tuple[str, str]] = {
    "linear": ("dinoreg.evaluation.protocols.linear:evaluate", "linear grid"),
    "attention": ("dinoreg.evaluation.protocols.linear:attention", "attention probe"),
    "knn": ("dinoreg.evaluation.protocols.classification:knn", "weighted k-NN"),
    "logistic": ("dinoreg.evaluation.protocols.classification:logistic", "logistic regression"),
    "multilabel": ("dinoreg.evaluation.protocols.multilabel:evaluate", "multi-label logistic regression"),
    "segmentation": ("dinoreg.evaluation.protocols.segmentation:evaluate", "linear segmentation"),
    "knn_segmentation": ("dinoreg.evaluation.protocols.knn_segmentation:evaluate", "k-NN segmentation"),
    "depth": ("dinoreg.evaluation.protocols.depth:evaluate", "linear depth"),
    "discovery": ("dinoreg.evaluation.protocols.discovery:evaluate", "object discovery (LOST)"),
    "detection": ("dinoreg.evaluation.protocols.detection:evaluate", "linear patch detection"),
    "retrieval": ("dinoreg.evaluation.protocols.retrieval:evaluate", "instance retrieval"),
    "flow": ("dinoreg.evaluation.protocols.flow:evaluate", "optical flow"),
    "few_shot": ("dinoreg.evaluation.protocols.few_shot:evaluate", "few-shot and label efficiency"),
}


Options = Mapping[str, Any]  # of a dataset: every one that it declares, with its value
Reader = Callable[[Path, Options], "Data"]


@dataclass(frozen=True)
class Need:
    """A path (or a pattern such as n*.tar) that must exist below the dataset's folder, and where it comes from."""

    path: str
    archive: str

    def met(self, folder: Path) -> bool:
        """Whether something below the dataset's folder matches `path`."""
        path = PurePosixPath(self.path)
        return any(True for _ in (folder / path.parent).glob(self.path[len(str(path)) - len(path.name) :]))

    def message(self, folder: Path) -> str:
        """A line for messages: `path` is missing below `folder`, and the archive it comes from."""
        return f"{folder / self.path} is missing; it comes from {self.archive}"


@dataclass(frozen=True)
class Published:
    """A number that others reported, in the metric's usual unit (percent, metres, pixels).

    model   its name, such as "DINOv2 ViT-S/14 (distilled)"
    source  paper and table
    differs what differs from our protocol, or ""
    """

    model: str
    value: float
    source: str
    differs: str = ""
    variant: str = ""  # of the protocol's rows, where several variants are published: "k = 20", "lin.4"
    metric: str = ""  # other than the task's


@dataclass(frozen=True)
class Task:
    """One protocol on a dataset.

    protocol  a key of PROTOCOLS
    read      (folder, options) -> Data with the splits this protocol uses; lists only, no pixels decoded;
              UserError in one line for what is wrong with a file
    metric    the headline: "top-1", "mean per class", "11-point mAP", "mIoU", "RMSE", "CorLoc", "AP50", "AP", "EPE"
    counts    images of each split in the official data; differing counts warn, or fail with strict=true
    options   protocol options that this dataset sets for itself, without the section: {"augment": False}
    needs     paths besides those of the dataset's layout; without them this task is left out, saying so
    asked     measured only where `protocols=` names it
    """

    protocol: str
    read: Reader
    metric: str
    counts: Mapping[str, int] = field(default_factory=dict)
    published: tuple[Published, ...] = ()
    options: Options = field(default_factory=dict)
    needs: tuple[Need, ...] = ()
    asked: bool = False


@dataclass(frozen=True)
class Benchmark:
    """A dataset.

    name      as in `dinoreg eval NAME`
    classes   their number, or None for tasks without classes
    folders   names that its folder may have below `root`; `root` itself is tried last
    layouts   each a set of paths that together make the dataset readable; messages name the most complete one
    download  where the files come from, in words: by default the archives of the first layout
    options   choices of how it is read, set as NAME.KEY=VALUE: {KEY: option(default, help, …)}
    splits    in words, for the list: by default the counts of the first task, "3,680 / 3,669"
    place     path of data of one's own
    longer    for those, a name with that of the folder above, where a result of other data has the short one
    """

    name: str
    title: str
    classes: int | None
    folders: tuple[str, ...]
    layouts: tuple[tuple[Need, ...], ...]
    tasks: tuple[Task, ...]
    licence: str
    download: str = ""
    task: str = "classification"
    splits: str = ""
    options: Mapping[str, Field] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    place: str = ""
    longer: str = ""

    def __post_init__(self) -> None:
        if self.tasks and not self.splits:
            object.__setattr__(self, "splits", counts_in_words(self.tasks[0].counts))
        if self.layouts and not self.download:
            object.__setattr__(self, "download", " and ".join({need.archive: None for need in self.layouts[0]}))

    def find(self, root: str | Path, layouts: tuple[tuple[Need, ...], ...] | None = None) -> Path:
        """The dataset's folder below `root`, in which one of the layouts, by default its own, is complete.

        Archives below it may have been unpacked one folder too deep (DatasetFolder).
        Raises UserError naming the first missing path of the most complete layout, and the archive it comes from.
        """
        base, layouts = DatasetFolder(root), layouts or self.layouts
        pairs = [(folder, layout) for folder in (*(base / name for name in self.folders), base) for layout in layouts]
        for folder, layout in pairs:
            if all(need.met(folder) for need in layout):
                return folder
        # The one with the most of its paths present; the first of equals.
        named = pairs[: -len(layouts)]
        folder, layout = max(named, key=lambda pair: sum(need.met(pair[0]) for need in pair[1]))
        missing = next(need for need in layout if not need.met(folder))
        raise UserError(f"{self.name}: {missing.message(folder)}")

    def option_values(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Every option of the dataset with its value; UserError for an unknown one or a value that is not accepted."""
        for key in given:
            if key not in self.options:
                accepted = f"; accepted: {', '.join(self.options)}" if self.options else "; it has no options"
                raise UserError(f"{self.name}.{key}: unknown option{nearest(key, self.options)}{accepted}")
        return {
            name: read_value(f"{self.name}.{name}", given[name], item) if name in given else item.default
            for name, item in self.options.items()
        }

    def options_in_words(self) -> list[str]:
        """A line for each option: how it is set, its default and what it does."""
        rows = describe_fields(self.options, f"{self.name}.")
        return [f"{key}: {meaning}, default {kind.partition(' = ')[2] or 'empty'}" for key, kind, meaning in rows]

    def script(self) -> None:
        """What `python eval/NAME.py key=value …` does: the command `dinoreg eval eval/NAME.py key=value …`."""
        sys.argv[1:1] = ["eval", sys.argv[0]]
        runpy.run_module("dinoreg", run_name="__main__")


def needs(archive: str, *paths: str) -> tuple[Need, ...]:
    """The given paths, each a Need of one archive."""
    return tuple(Need(path, archive) for path in paths)


def classification_tasks(
    read: Reader,
    metric: str,
    counts: Mapping[str, int],
    published: tuple[Published, ...],
    *,
    validation_images: int | None = None,
    knn_metric: str = "top-1",
) -> tuple[Task, ...]:
    """Logistic regression on frozen features (DINOv2, Table 8) and weighted k-NN, over one reader.

    metric             the headline of the regression: "top-1" or "mean per class"; knn_metric: of k-NN
    counts             images of each split in the official data
    published          figures for the regression
    validation_images  how many of the training images are held out to choose the regularisation; None: the default
    """
    share = {} if validation_images is None else {"validation_share": validation_images / counts["train"]}
    return (Task("logistic", read, metric, counts, published, options=share), Task("knn", read, knn_metric, counts))


def linear_tasks(
    read: Reader,
    counts: Mapping[str, int] = MappingProxyType({}),
    linear: tuple[Published, ...] = (),
    knn: tuple[Published, ...] = (),
    attention: tuple[Published, ...] = (),
) -> tuple[Task, ...]:
    """DINOv2's grid of linear heads (App. B.3), weighted k-NN and, where it is asked for, the attention probe, over one
    reader, each with its published figures."""
    return (
        Task("linear", read, "top-1", counts, linear),
        Task("knn", read, "top-1", counts, knn),
        Task("attention", read, "top-1", counts, attention, asked=True),
    )


def counts_in_words(counts: Mapping[str, int]) -> str:
    """The sizes of splits, as lists of datasets have them: "3,680 / 3,669"."""
    return " / ".join(f"{counts[name]:,}" for name in ("train", "val", "test") if name in counts)


@lru_cache(maxsize=1)
def benchmarks() -> dict[str, Benchmark]:
    """Every shipped declaration, by name, in the order of the names of their files."""
    return {each.name: each for each in map(load_benchmark, sorted(bundled("eval").glob("*.py")))}


def named() -> dict[str, Benchmark]:
    """The shipped declarations by every name and alias."""
    return {name: each for each in benchmarks().values() for name in (each.name, *each.aliases)}


def is_shipped(name: str) -> bool:
    """Whether a name means shipped datasets, whatever is called so in the current folder."""
    return name == "all" or name.lower() in named()


def shadowed(names: Iterable[str]) -> list[str]:
    """A note for each name that means shipped datasets though a folder or file here has it, too."""
    both = [name for name in names if is_shipped(name) and Path(name).exists()]
    return [f"{name}: the shipped dataset is meant; the {name} in the current folder is ./{name}" for name in both]


def find_benchmark(name: str) -> Benchmark:
    """A shipped benchmark by name or alias, or one of the user's own by the path of its file.

    Raises UserError for an unknown name, and as `load_benchmark` does.
    """
    if name.endswith(".py"):
        return load_benchmark(Path(name))
    if name.lower() not in named():
        if "/" in name or "\\" in name or PurePosixPath(name).suffix:
            raise UserError(f"{name}: does not exist; expected a labelled folder, a table, or a dataset of eval --list")
        hint = nearest(name, benchmarks()) or nearest(name, named())
        raise UserError(f"{name}: unknown dataset{hint}; known: {', '.join(benchmarks())}")
    return named()[name.lower()]


def load_benchmark(path: Path) -> Benchmark:
    """The `BENCHMARK` of a Python file. The file is run: it is the user's own code, as a config is not.

    Raises UserError where the file cannot be loaded, has no such object, or names an unknown protocol.
    """
    benchmark = getattr(load_declaration(path), "BENCHMARK", None)
    if not isinstance(benchmark, Benchmark):
        raise UserError(f"{path}: has no BENCHMARK of type dinoreg.evaluation.benchmark.Benchmark")
    for task in benchmark.tasks:
        if task.protocol not in PROTOCOLS:
            hint = f"{nearest(task.protocol, PROTOCOLS)}; known: {', '.join(PROTOCOLS)}"
            raise UserError(f"{path}: unknown protocol {task.protocol}{hint}")
    return benchmark
