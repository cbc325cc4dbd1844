"""The list of runs: how each stands, by which figures, and what is not a run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from test_report import write_run

import dinoreg
from dinoreg.commands.main import main
from dinoreg.runtime.errors import UserError


def write(folder: Path, probes: list[dict[str, Any]], metric: str = "knn_top1", best: int | None = None) -> Path:
    write_run(folder)
    (folder / "probe.jsonl").write_text("".join(json.dumps(line) + "\n" for line in probes))
    (folder / "probe.json").write_text(json.dumps({"metric": metric}))
    (folder / "checkpoints").mkdir()
    if best is not None:
        (folder / "checkpoints/best").write_text(f"step_{best:07d}\n")
    return folder


def test_runs_are_listed_with_their_states_and_figures_the_newest_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probes = [
        {"step": 10, "knn_top1": 0.5, "knn_top1_low": 0.4, "knn_top1_high": 0.6, "rankme": 7.0},
        {"step": 20, "knn_top1": 0.3, "rankme": 9.0},
    ]
    labelled = write(tmp_path / "labelled", probes, best=10)
    unlabelled = write(tmp_path / "unlabelled", [{"step": 20, "rankme": 9.0}], "rankme")
    status = {"phase": "stopped", "reason": "SIGTERM", "step": 30, "reached": 36, "num_steps": 40}
    (unlabelled / "status.json").write_text(json.dumps(status))
    for name in ("metrics.jsonl", "status.json"):
        os.utime(labelled / name, (1e9, 1e9))
    (tmp_path / "notes").mkdir()
    first, second = dinoreg.runs(tmp_path)
    assert (first.folder, second.folder) == (unlabelled, labelled)
    assert (first.state.phase, first.state.reason, first.state.saved, first.state.reached) == (
        "stopped",
        "SIGTERM",
        30,
        40,  # of metrics.jsonl, which went further
    )
    assert first.last is not None
    assert (first.last.metric, first.last.value, first.best) == ("rankme", 9.0, None)
    assert (second.state.phase, second.state.num_steps, second.state.updated) == ("finished", 40, 1e9)
    assert second.last is not None
    assert second.best is not None
    assert (second.last.step, second.last.value) == (20, 0.3)
    assert (second.best.step, second.best.value, second.best.low, second.best.high) == (10, 0.5, 0.4, 0.6)
    assert second.results == {"scenes": 0.7}
    assert second.loss == pytest.approx(4.0)
    assert dinoreg.runs(labelled)[0].best == second.best
    assert main(["runs", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert all(word in shown.out for word in ("SIGTERM", "finished", "30.0 %", "50.0 %", "RankMe 9"))
    assert shown.err == f"next: dinoreg report {tmp_path}\n"
    assert main(["report", str(tmp_path), f"out={tmp_path / 'page.html'}"]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "stopped by SIGTERM" in page
    assert "[40.0, 60.0] at step 10" in page


def test_a_folder_without_runs_is_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        dinoreg.runs(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no run in it"):
        dinoreg.runs(tmp_path)


@pytest.mark.parametrize("content", ["", "{cut", "[]", '{"phase": 3, "step": "x", "num_steps": null, "time": "y"}'])
def test_a_broken_status_is_a_run_that_was_not_seen_to_end(content: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    (run / "status.json").write_text(content)
    (found,) = dinoreg.runs(tmp_path)
    assert (found.state.phase, found.state.saved, found.state.reached) == ("unseen", 0, 40)
    (run / "owner.json").write_text(
        json.dumps({"token": "a", "host": os.uname().nodename, "pid": 2**22 + 1, "job": None, "restarts": 0, "time": 1})
    )
    (found,) = dinoreg.runs(tmp_path)
    assert (found.state.phase, "is gone" in found.state.in_words) == ("lost", True)
