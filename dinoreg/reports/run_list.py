"""The runs of a folder: how each stands, its last and best figures, and when it was last heard of."""

from pathlib import Path
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dinoreg.checkpoint.run_folder import Run, RunState
from dinoreg.checkpoint.steps import PROBED
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.json_files import is_number, number, pointed_step, read_json
from dinoreg.runtime.printable import in_markup
from dinoreg.runtime.templates import DASH, score, with_interval

NAMES = {"knn_top1": "k-NN", "rankme": "RankMe", "dense_miou": "mIoU", "dse": "DSE"}
SHARES = ("knn_top1", "dense_miou")


class Figure(NamedTuple):
    """What the probe inside a run measured at a step; `low` and `high` are NaN where it gave no interval."""

    metric: str  # one of NAMES
    value: float
    low: float
    high: float
    step: int

    @property
    def short(self) -> str:
        """ "k-NN 36.3 %", without the interval and the step."""
        return f"{NAMES[self.metric]} {score(self.value) if self.metric in SHARES else f'{self.value:.4g}'}"

    def __str__(self) -> str:
        whole = with_interval(self.value, self.low, self.high)
        told = f"{NAMES[self.metric]} {whole}" if self.metric in SHARES else self.short
        return f"{told} at step {self.step:,}"


def probed(run: Run) -> tuple[Figure | None, Figure | None]:
    """The newest figure of the probe inside a run, and that of the step that `best` points to; None without one.

    They are of the metric that the best step is chosen by, else of the first of NAMES that the run has.
    """
    wanted = read_json(run.folder / PROBED).get("metric")
    known = [name for name in NAMES if any(is_number(line.get(name)) for line in run.probe)]
    metric = wanted if wanted in known else next(iter(known), None)
    figures = {}
    for line in run.probe:
        if metric is not None and is_number(line.get(metric)):
            value, low, high = (number(line.get(f"{metric}{end}")) for end in ("", "_low", "_high"))
            figures[line["step"]] = Figure(metric, value, low, high, line["step"])
    return next(reversed(figures.values()), None), figures.get(pointed_step(run.folder, "best"))


class ListedRun(NamedTuple):
    """A run of a folder.

    folder      of the run
    state       how it stands: `state.phase`, `state.reason`, `state.reached` of `state.num_steps`, `state.updated`
    loss        the last one that was logged, in nats; None without any
    last, best  figures of the probe inside the run; None where there is none
    results     {dataset: headline value} of its newest evaluations
    """

    folder: Path
    state: RunState
    loss: float | None
    last: Figure | None
    best: Figure | None
    results: dict[str, float]

    def __repr__(self) -> str:
        return f"<run {self.folder}: {self.state.in_words}, step {self.state.reached:,}, {self.last or 'not probed'}>"


def runs(folder: str | Path = "runs") -> list[ListedRun]:
    """The runs in a folder, those that were heard of last first.

    folder   of run folders, or one of these itself
    returns  for each its `state`, `loss`, `last` and `best` figure and `results`, see `ListedRun`
    raises   UserError for a folder that is not there or has no run
    """
    place = Path(folder)
    if not place.is_dir():
        raise UserError(f"runs: {folder}: no such folder; expected one with run folders in it")
    configs = [place / "config.yaml"] if (place / "config.yaml").is_file() else place.glob("*/config.yaml")
    found = []
    for run in (Run(path.parent) for path in configs):
        results = {probe.dataset: probe.value for probe in run.newest_probes()}
        found.append(ListedRun(run.folder, RunState(run), run.last("loss"), *probed(run), results))
    if not found:
        raise UserError(f"runs: {folder}: no run in it (a run folder has a config.yaml)")
    return sorted(found, key=lambda each: (-each.state.updated, str(each.folder)))


def print_runs(folder: str) -> None:
    """Run `dinoreg runs`: print the runs of a folder as a table, of 80 columns or more."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("run", "state", "steps", "loss", "last", "best", "age"):
        table.add_column(name, justify="right" if name in ("steps", "loss", "age") else "left", overflow="fold")
    for each in runs(folder):
        state, whole = each.state, each.state.num_steps
        steps = f"{state.reached:,}\nof {whole:,}" if whole and whole != state.reached else f"{state.reached:,}"
        loss = DASH if each.loss is None else f"{each.loss:.3f}"
        figures = (figure.short if figure else DASH for figure in (each.last, each.best))
        table.add_row(in_markup(each.folder.name), in_markup(state.in_words), steps, loss, *figures, state.age)
    Console(highlight=False).print(table)
