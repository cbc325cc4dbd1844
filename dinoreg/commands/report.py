"""`dinoreg report`: the page of a run with its pictures, of several runs beside each other, or of an evaluation."""

from collections.abc import Sequence
from pathlib import Path


def report_run(run: Path) -> Path:
    """Draw what pictures of the newest teacher are missing, write `report.html`, and return its path."""
    from dinoreg.reports.run_report import write_report
    from dinoreg.visualize.run_pictures import draw_missing

    return write_report(run, draw_missing(run))


def report_runs(folders: Sequence[Path], out: Path | None) -> Path:
    """The report of one run in its own folder, or a comparison written to `out`."""
    from dinoreg.reports.compare import compare_report

    return report_run(folders[0]) if len(folders) == 1 and out is None else compare_report(folders, out)
