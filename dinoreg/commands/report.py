"""`dinoreg report RUN`: the page of a run, with its pictures."""

from pathlib import Path


def report_run(run: Path) -> Path:
    """Draw missing pictures of the newest teacher, write `report.html` into the run folder, and return its path."""
    from dinoreg.reports.run_report import write_report
    from dinoreg.visualize.run_pictures import draw_missing

    return write_report(run, draw_missing(run))
