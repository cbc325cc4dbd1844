"""Each door through which untrusted files come in: nothing runs, nothing of others is touched, one line says why."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from miniatures.pictures import pattern
from safetensors.torch import save_file

from dinoreg.checkpoint.atomic import write_atomic
from dinoreg.commands.main import main
from dinoreg.config.load import Config, to_yaml
from dinoreg.config.overwrite import delete_run, refuse_live
from dinoreg.data.folder_index import load_index
from dinoreg.data.open import read_labelled
from dinoreg.data.shards import Shards
from dinoreg.data.statistics import inspect_source
from dinoreg.data.tar_index import index_tars
from dinoreg.evaluation.features.cache import _written
from dinoreg.runtime.environment import start_time
from dinoreg.runtime.errors import UserError
from dinoreg.weights.load import load
from tests.hostile import Payload
from tests.small_runs import STEP, tiny_model, write_run

# ------------------------------------------------------------------ weights that are not numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_file_and_tensor(value: float, tmp_path: Path) -> None:
    state = tiny_model().state_dict()
    state["blocks.1.attn.qkv.weight"][3, 2] = value
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"w\.safetensors: blocks\.1\.attn\.qkv\.weight is not finite"):
        load(tmp_path / "w.safetensors", heads=3)


@pytest.mark.parametrize("stated", [{"std": [0, 0, 0]}, {"mean": [float("inf")] * 3}, {"mean": "x"}, {"std": [-1]}])
def test_preprocessing_that_is_no_preprocessing_is_refused_by_file(
    stated: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", tiny_model(), **stated)
    out = tmp_path / "f.safetensors"
    assert main(["embed", "data=scenes:count=4,size=32", f"weights={run}", f"out={out}", "device=cpu"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dinoreg: ")]
    assert f"step_{STEP:07d}" in line
    assert not out.exists()


# ------------------------------------------------------------------ files with code in them


def test_caches_with_objects_in_them_are_computed_anew_and_run_nothing(tmp_path: Path) -> None:
    ran, objects = tmp_path / "ran", np.empty(1, object)
    objects[0] = Payload(ran)
    np.savez(tmp_path / "index.npz", evidence=objects, paths=objects)
    np.save(tmp_path / "rows.npy", objects)
    (tmp_path / "rows.json").write_text('{"done": 1, "size": 9, "crc32": 0}')
    assert load_index(tmp_path / "index.npz", "") is None
    assert _written(tmp_path / "rows.npy", tmp_path / "rows.json", 1) == (0, 0, 0)
    assert not ran.exists()


@pytest.mark.parametrize("name", ["x.pth", "x.pt", "x.bin", "x.ckpt", "x.safetensors"])
def test_weights_with_code_in_them_are_refused_and_run_nothing(name: str, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    torch.save({"model": Payload(ran)}, tmp_path / name)
    with pytest.raises(UserError, match=name):
        load(tmp_path / name)
    assert not ran.exists()


@pytest.mark.parametrize("headers", [{"GNU.sparse.size": "x"}, {"GNU.sparse.map": "a,b"}, {"size": "8" * 19}])
def test_headers_of_archives_that_lie_are_one_line(headers: dict[str, str], tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("x.jpg")
        member.pax_headers = headers
        archive.addfile(member, io.BytesIO(b""))
    with pytest.raises(UserError, match=r"a\.tar|no image files"):
        index_tars(Shards(str(tmp_path), ["a.tar"], ".tar"), tmp_path / "index")


def test_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        write_atomic(tmp_path / "pipe", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
    assert (tmp_path / "pipe").is_fifo()


def test_pictures_of_floats_and_of_complex_numbers_are_described(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    values = np.random.default_rng(0).random((20, 30))
    for name, picture in {"a": values, "b": np.stack([values] * 3, 2).astype("f4"), "c": values.astype("c8")}.items():
        tifffile.imwrite(tmp_path / f"{name}.tif", picture, photometric="rgb" if picture.ndim == 3 else "minisblack")
    found = inspect_source(tmp_path)
    assert found["looked_at"] == 3
    assert {Path(name).name: reason for name, reason in found["bad"].items()} == {
        "c.tif": "complex64 values, expected real numbers"
    }


def test_a_label_of_thousands_of_digits_is_a_name(tmp_path: Path) -> None:
    for number in range(4):
        pattern(number % 2, number).save(tmp_path / f"{number}.png")
    lines = "".join(f"{number}.png,{'9' * 5000}{number % 2}\n" for number in range(4))
    (tmp_path / "labels.csv").write_text(f"path,label\n{lines}")
    assert len(read_labelled(str(tmp_path / "labels.csv")).class_names) == 2


# ------------------------------------------------------------------ runs at work


def claimed(folder: Path, **owner: Any) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(Config()))
    lease = {"token": "1", "host": socket.gethostname(), "job": None, "restarts": 0, "time": time.time(), **owner}
    (folder / "owner.json").write_text(json.dumps(lease))
    (folder / "metrics.jsonl").touch()
    return folder


@pytest.mark.parametrize("word", ["overwrite=true", "resume=true", "seed=1"])
def test_a_run_at_work_is_neither_overwritten_nor_taken_over(
    word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        run = claimed(tmp_path / "run", pid=other.pid, started=start_time(other.pid))
        before = {path: path.read_bytes() for path in run.iterdir()}
        assert main(["pretrain", "quickstart", "data=scenes", f"out={run}", word]) == 2
        assert f"its run is at work (process {other.pid})" in capsys.readouterr().err
        other.kill()
        assert {path: path.read_bytes() for path in run.iterdir()} == before
    refuse_live(run, takeover=True)
    refuse_live(run)  # it is gone, though status.json does not say so
    delete_run(run)
    assert not any(run.iterdir())


def test_a_process_of_the_same_number_is_not_the_run(tmp_path: Path) -> None:
    refuse_live(claimed(tmp_path / "run", pid=os.getppid(), started=1))


def test_a_run_of_another_machine_is_at_work_while_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = claimed(tmp_path / "run", pid=1, host="elsewhere", job="7")
    with pytest.raises(UserError, match="at work on elsewhere"):
        refuse_live(run)
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # Slurm has started this job again
    refuse_live(run)
    monkeypatch.delenv("SLURM_JOB_ID")
    os.utime(run / "metrics.jsonl", (0, 0))
    refuse_live(run)


def test_a_run_that_noted_its_end_is_over_whatever_its_process_does(tmp_path: Path) -> None:
    run = claimed(tmp_path / "run", pid=os.getppid(), started=start_time(os.getppid()))
    with pytest.raises(UserError, match="at work"):
        refuse_live(run)
    (run / "status.json").write_text(json.dumps({"phase": "stopped", "time": time.time()}))
    refuse_live(run)


# ------------------------------------------------------------------ names that are no text


def test_a_file_name_that_is_no_utf8_breaks_no_report(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(8):
        pattern(index % 3, index).save(photos / f"{index}.png")
    Path(os.fsdecode(bytes(photos) + b"/bad\xff.jpg")).write_bytes(b"no picture")
    tiny = ["model.dim=32", "model.depth=1", "model.heads=2", "head.prototypes=16", "batch_size=4", "steps=4"]
    keys = [f"data={photos}", f"out={tmp_path / 'run'}", "data.max_bad_fraction=1", "probe.every=0", "device=cpu"]
    assert main(["pretrain", "quickstart", *tiny, *keys, "log.tensorboard=false"]) == 0
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "bad\\udcff.jpg" in report
