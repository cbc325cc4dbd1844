"""`dinoreg report RUN`: the page of a run, with its pictures; of several runs, the page that compares them."""

from collections.abc import Sequence
from pathlib import Path


def report_run(run: Path) -> Path:
    """Draw missing pictures of the newest teacher, write `report.html` into the run folder, and return its path."""
    from dinoreg.reports.run_report import write_report
    from dinoreg.visualize.run_pictures import draw_missing

    return write_report(run, draw_missing(run))


def compare_runs(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write one page on several runs, with the differences of their newest results on the same images; its path.

    out  as for `compare_report`
    """
    from dinoreg.checkpoint.run_folder import Run
    from dinoreg.evaluation.comparison import between
    from dinoreg.evaluation.runner import read_result
    from dinoreg.reports.run_report import compare_report, run_names

    loaded, named = [Run(run) for run in runs], []
    for name, run in zip(run_names(loaded), loaded):
        newest = {path.stem: path for path in sorted(run.folder.glob("eval/[0-9]*/*.json"))}
        named += [(name, result) for path in newest.values() if (result := read_result(path)) is not None]
    return compare_report(loaded, out, between(named))
