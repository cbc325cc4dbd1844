"""W&B and MLflow, offline, by their real libraries: every number arrives, and a resumed run goes on in the same one."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from test_logger import values
from training import TINY

from dinoreg.commands.main import main
from dinoreg.runtime.errors import UserError
from dinoreg.train import logger as trackers
from dinoreg.train.logger import RunLog, check_trackers


class Failing(trackers.TensorBoard):
    """A tracker whose server goes away after one line."""

    name = "Server"

    def __init__(self) -> None:
        self.lines: list[int] = []
        self.closed: list[bool] = []

    def add(self, kind: str, values: Mapping[str, float], step: int) -> None:
        if self.lines:
            raise ConnectionError("no route to host")
        self.lines.append(step)

    def close(self, ok: bool) -> None:
        self.closed.append(ok)


def test_a_tracker_that_fails_is_named_once_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Failing()
    with RunLog(tmp_path, step=0, num_steps=3, trackers=[server]) as log:
        for step in (1, 2, 3):
            log.metrics(values(step))
    assert (server.lines, server.closed) == ([1], [False])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Server")]
    assert said == ["Server: its numbers end at step 2: no route to host"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_package_that_is_missing_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"log.to=wandb: .*pip install 'dinoreg\[log\]'"):
        check_trackers(["wandb"])


class Unreachable:
    """A tracker that cannot be begun."""

    def __init__(self, *_: object) -> None:
        raise ConnectionError("no route to host")


def test_a_tracker_that_cannot_be_begun_costs_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda _: True)
    monkeypatch.setitem(trackers.REMOTE, "wandb", Unreachable)
    run = tmp_path / "run"
    keys = {**TINY, "log.to": "[wandb]", "out": str(run), "overwrite": "true"}
    tiny = [f"{key}={'none' if value is None else value}" for key, value in keys.items()]
    for files in ({}, {"owner.json": '{"token": "1", "host": "h", "pid": 1}', "train.log": "kept"}):
        for name, text in files.items():
            run.mkdir(exist_ok=True)
            (run / name).write_text(text)
        assert main(["pretrain", "quickstart", *tiny]) == 2
        assert "log.to=wandb: it cannot be begun: no route to host" in capsys.readouterr().err
        assert {path.name: path.read_text() for path in run.glob("*")} == files


@pytest.mark.slow
def test_both_get_every_number_offline_and_a_resumed_run_goes_on_in_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow, _ = pytest.importorskip("mlflow"), pytest.importorskip("wandb")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run = tmp_path / "run"
    keys = {**TINY, "log.every": 2, "steps": 4, "log.to": "[wandb,mlflow]", "out": str(run)}
    tiny = [f"{key}={'none' if value is None else value}" for key, value in keys.items()]
    assert main(["pretrain", "quickstart", *tiny]) == 0
    known = json.loads((run / "trackers.json").read_text())
    assert main(["pretrain", str(run), "steps=8", "resume=true"]) == 0
    assert json.loads((run / "trackers.json").read_text()) == known
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    wanted = {(line["step"], line["loss"]) for line in lines}
    assert len(wanted) == 4
    client = mlflow.MlflowClient()
    assert {(each.step, each.value) for each in client.get_metric_history(known["mlflow"], "train/loss")} == wanted
    found = client.get_run(known["mlflow"])
    assert (found.info.status, found.data.params["model.name"]) == ("FINISHED", "vitt8_reg4")
    assert {(line["step"], line["train/loss"]) for line in wandb_lines(tmp_path)} == wanted


def wandb_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of all offline runs."""
    from wandb.proto.wandb_internal_pb2 import Record

    lines = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for content in log_records(path.read_bytes()):
            record = Record()
            record.ParseFromString(content)
            items = record.history.item
            lines.append({each.key or "/".join(each.nested_key): json.loads(each.value_json) for each in items})
    return [line for line in lines if "train/loss" in line]


def log_records(content: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format: blocks of 32 KiB, records in parts with checksum, length and kind."""
    at, whole = 7, b""  # W&B's own header
    while at + 7 <= len(content):
        if -at % 32_768 < 7:  # no room for a part: the block ends in zeros
            at += -at % 32_768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""
