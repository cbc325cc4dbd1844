"""The keys of the verbs, other than those of configs, evaluations and launches.

Nothing here imports torch, so that help and messages about wrong arguments appear at once.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinoreg.config.option import REQUIRED, Options, check, dotted, nearest, option, output, read
from dinoreg.config.schema import COLUMNS, DEVICE, MAX_SEED, PRECISIONS, VALUE_RANGE
from dinoreg.config.view_settings import MAX_SIDE
from dinoreg.evaluation.options import SharedOptions
from dinoreg.runtime.errors import UserError

TOKENS = ("cls", "mean", "cls+mean", "patches")
Kinds = dict[str, type[Options]]  # of one verb, by the word behind it


@dataclass(frozen=True)
class NoOptions(Options):
    """The options of a command without keys."""


@dataclass(frozen=True)
class QuickstartOptions(Options):
    """The run of `dinoreg quickstart`."""

    out: str | None = output(None, "the run folder; none: runs/quickstart")
    seed: int = option(0, "of weights, data order, crops and masks", low=0, high=MAX_SEED)
    overwrite: bool = option(False, "delete what is in `out` first")


@dataclass(frozen=True)
class ReportOptions(Options):
    """Where `dinoreg report` writes."""

    out: str | None = output(None, "the HTML file; none: report.html, in the run's folder if it is one run")


@dataclass(frozen=True)
class InspectOptions(Options):
    """The images that `dinoreg inspect` examines."""

    data: str | list[str] = option(REQUIRED, "a folder of images, [several], a list of paths, or scenes")
    sample: int = option(1000, "images that are opened and decoded", unit="image", low=1)
    columns: str = option("", COLUMNS)
    root: str | None = option(None, "folder that the paths of a list may not leave; none: the list's own folder")
    in_channels: int = option(3, "image channels of the model that is to see them", low=1, high=65536)
    range: list[float] | None = option(None, "LOW,HIGH as in data.range; none: each file's type says it", **VALUE_RANGE)
    prepare: str | None = option(None, "folder for a copy of smaller pictures; goes on where it was stopped")
    side: int = option(512, "of the copy's pictures at most, their short one", unit="pixel", low=16, high=MAX_SIDE)
    longest: bool = option(False, "side= is of the long side")


@dataclass(frozen=True)
class ExportOptions(Options):
    """The weights that `dinoreg export` writes for another library, and their format."""

    weights: str = option(REQUIRED, "a run folder, a weight file (ours or others'), or random:NAME")
    format: str = option(REQUIRED, "timm, transformers, meta (torch.hub), safetensors or onnx")
    out: str = output(REQUIRED, "folder to write; new or empty")
    size: int | tuple[int, int] | None = option(None, "pixels or [height,width] for positions", high=MAX_SIDE)
    channels: list[int] | None = option(None, "those that it shall take, as 0,2,3; none: all", low=0)
    registers: str | None = option(None, "test_time: add one for outliers in `images`; not timm, transformers")
    images: str | None = option(None, "a folder of images, a list of paths or scenes, for registers=test_time")


@dataclass(frozen=True)
class VerdictOptions(SharedOptions):
    """The weights that `dinoreg verdict` compares, and where it writes."""

    weights: str = option(REQUIRED, "your own, as weights= of eval: a run, RUN/best, a weight file")
    out: str | None = output(None, "folder of page and results; none: RUN/verdict/STEP/DATA, or in runs/verdict/")
    public: str | None = option(None, "a public backbone, as weights= of eval takes any")
    init: str | None = option(None, "what the own weights began with; none: what the run folder kept of it")
    repeats: int = option(3, "draws of each number of labels below all", low=1, high=1_000)


def read_verdict(overrides: Mapping[str, Any] | Iterable[str]) -> tuple[VerdictOptions, dict[str, Any]]:
    """The options, and those of own data (own.KEY=VALUE); UserError for an unknown key or a value not accepted."""
    given = dotted(overrides)
    own = {key.removeprefix("own."): given.pop(key) for key in [*given] if key.startswith("own.")}
    return read(VerdictOptions, given)[0], own


@dataclass(frozen=True)
class EmbedOptions(Options):
    """The images, the model and the feature file of `dinoreg embed`."""

    data: str | list[str] = option(REQUIRED, "a folder, an image, a list of paths, tars, scenes, or [several]")
    weights: str = option(REQUIRED, "as weights= of eval: a run folder, a weight file, random:NAME")
    out: str = output(REQUIRED, "the file to write, .safetensors or .parquet")
    columns: str = option("", COLUMNS)
    root: str | None = option(None, "folder that the paths of a list may not leave; none: the list's own folder")
    range: list[float] | None = option(None, "LOW,HIGH, as data.range; none: what the weights say", **VALUE_RANGE)
    token: str = option("cls", "mean: of the patches; cls+mean: one behind the other", choices=TOKENS)
    image_size: int | None = option(None, "of the crop; none: the weights'", unit="pixel", low=1, high=MAX_SIDE)
    batch_size: int = option(32, "images at a time", low=1, high=1_000_000)
    dtype: str = option("float32", "of the numbers in the file", choices=("float32", "float16"))
    device: str = option("auto", **DEVICE)
    precision: str = option("auto", "of the computation; auto: bf16 where the hardware has it", choices=PRECISIONS)
    workers: int | None = option(None, "decoding threads; none: a core each, at most 16", low=0, high=1024)
    overwrite: bool = option(False, "replace a finished file, drop an unfinished one that was begun with other keys")


@dataclass(frozen=True)
class CurateOptions(Options):
    """The features that `dinoreg curate` judges a set of images by, and how."""

    features: str = option(REQUIRED, "a file that `dinoreg embed` wrote, .safetensors or .parquet")
    out: str = output(REQUIRED, "folder of the list that data= takes, of the table of copies and of the page")
    threshold: float = option(0.95, "cosine, without the mean of all, from which on two are copies", above=0, high=1)
    clusters: int = option(0, "of k-means; 0: the root of the number of images, at most 1000", low=0, high=65536)
    balance: float = option(0.5, "1: every cluster is drawn as often; 0: every image", low=0, high=1)
    root: str | None = option(None, "folder or URL that the images lie below; none: those at URLs are not shown")
    seed: int = option(0, "of k-means", low=0, high=MAX_SEED)


@dataclass(frozen=True)
class RegistersOptions(Options):
    """The models and images that `dinoreg registers` compares, and its experiments."""

    weights: str | tuple[str, ...] = option(REQUIRED, "run folders, weight files or random:NAME, with commas between")
    images: str = option(REQUIRED, "a folder (one subfolder a class adds probes), a list of paths, scenes")
    columns: str = option("", COLUMNS)
    out: str | None = output(None, "folder for registers.html; none: runs/registers/NAMES")
    size: int | None = option(None, "pixels a side; none: the first model's, enlarged if small", high=MAX_SIDE)
    num_images: int = option(300, "images at most, from all over the source", low=2)
    labels: bool = option(True, "whether the subfolders of `images` are classes")
    test_time: bool = option(True, "try a test-time register on models that have outliers and no registers")
    seed: int = option(0, "of the probes' split, of patches drawn and of noise", low=0, high=MAX_SEED)
    device: str = option("auto", **DEVICE)

    def _check_relations(self) -> None:
        check(bool(self.models) and all(self.models), "weights", self.weights, "names with one comma between them")

    @property
    def models(self) -> tuple[str, ...]:
        """The models that `weights` names: a tuple, an existing path, or names with commas between."""
        if not isinstance(self.weights, str):
            return self.weights
        return (self.weights,) if Path(self.weights).exists() else tuple(self.weights.split(","))


@dataclass(frozen=True)
class ViewOptions(Options):
    """The model and images of every `dinoreg view` that needs weights."""

    weights: str = option(REQUIRED, "a run folder, a weight file, or random:NAME")
    images: str | list[str] | None = option(None, "an image, folder, list, tars, scenes or [several]; none: the run's")
    out: str | None = output(None, "folder to write to; none: RUN/view/<step>/, or view/<name>/")
    columns: str = option("", COLUMNS)
    num: int | None = option(None, "at most; none: 8, or every file that was named", unit="image", low=1, high=10_000)
    size: int | tuple[int, int] | None = option(None, "pixels or [height,width]; none: the model's", high=MAX_SIDE)
    device: str = option("auto", **DEVICE)


@dataclass(frozen=True)
class AttentionOptions(ViewOptions):
    """The blocks and heads of `dinoreg view attention`."""

    layer: str = option("-1", "blocks, as 11 or 0,5,11 or all; -1 is the last")
    head: str = option("all", "all: the mean and each", choices=("all", "mean"))


@dataclass(frozen=True)
class PcaOptions(ViewOptions):
    """The block of `dinoreg view pca`, and whether the foreground is set apart."""

    layer: str = option("-1", "the block; -1 is the last")
    foreground: bool = option(False, "set the foreground apart, and fit the colours on it alone")


@dataclass(frozen=True)
class CropsOptions(Options):
    """The output of `dinoreg view crops`; its other keys are those of the config."""

    out: str | None = output(None, "folder to write to; none: RUN/view/<step>/, or view/<name>/")
    num: int = option(8, "at most", unit="image", low=1, high=10_000)


VIEWS: Kinds = {"attention": AttentionOptions, "pca": PcaOptions, "norms": ViewOptions, "crops": CropsOptions}


def check_view(kind: str) -> None:
    """UserError for what is none of VIEWS."""
    if kind not in VIEWS:
        raise UserError(f"view: {kind or 'missing what to view'}: expected {', '.join(VIEWS)}{nearest(kind, VIEWS)}")


@dataclass(frozen=True)
class LogsOptions(Options):
    """The job whose log `dinoreg launch logs` prints, and how much of it."""

    job: str | None = option(None, "its number; none: one that runs, else one that failed, else the last")
    task: int = option(0, "process of the job")
    lines: int = option(40, "of its end", low=0, high=1_000_000)
    follow: bool = option(False, "and what is added until the job is over")


@dataclass(frozen=True)
class CancelOptions(Options):
    """The jobs that `dinoreg launch cancel` ends, and how."""

    job: str | None = option(None, "its number; none: all of the launch")
    save: bool = option(False, "ask trainings to save and end by themselves")


# The actions on submitted jobs, and the keys of each.
ACTIONS: Kinds = {"status": NoOptions, "logs": LogsOptions, "cancel": CancelOptions}
