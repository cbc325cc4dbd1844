from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import TINY, loss_trace, read_lines, stopped_after, tiny_config
from warm_interpreter import RUN_IMPORTS, WarmInterpreter

import dinoreg
from dinoreg.checkpoint import format as checkpoint
from dinoreg.runtime.errors import RunError, UserError
from dinoreg.train import loop
from dinoreg.train.loop import pretrain
from dinoreg.train.prepare import Setup
from dinoreg.weights.load import load


def teacher_of(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(out / "teacher" / f"{checkpoint.step_name(step)}.safetensors")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unbroken tiny run. Read only."""
    return pretrain(tiny_config(tmp_path_factory.mktemp("plain") / "run"))


def test_losses_of_dinov2s_names_have_its_values_and_loss_is_what_is_optimised(tmp_path: Path) -> None:
    """dinov2 logs terms without their weights, KoLeo with its own, and of KoLeo and the patches' term half."""
    weights = {"loss__dino_weight": 0.7, "loss__ibot_weight": 1.9, "loss__koleo_weight": 0.3}
    first = read_lines(pretrain(tiny_config(tmp_path / "run", steps=2, **weights)) / "metrics.jsonl")[0]
    # The terms do not depend on their weights before the first update.
    plain = read_lines(pretrain(tiny_config(tmp_path / "plain", steps=2)) / "metrics.jsonl")[0]
    for name in ("dino_global_crops_loss", "dino_local_crops_loss", "ibot_loss"):
        assert first[name] == pytest.approx(plain[name], rel=1e-6)
    assert first["koleo_loss"] == pytest.approx(3 * plain["koleo_loss"], rel=1e-6)
    for line, dino, ibot in ((first, 0.7, 1.9), (plain, 1.0, 1.0)):
        terms = dino * (line["dino_global_crops_loss"] + line["dino_local_crops_loss"])
        assert line["loss"] == pytest.approx(terms + 2 * ibot * line["ibot_loss"] + 2 * line["koleo_loss"], rel=1e-6)


def test_a_run_leaves_the_folder_of_the_design(tmp_path: Path) -> None:
    out = pretrain(tiny_config(tmp_path / "run", log__tensorboard=True, probe__every=4, probe__num_images=20))
    assert not (out / "checkpoints" / "best").exists()  # without labels no step is better than another
    for name in ("config.yaml", "environment.json", "train.log", "metrics.jsonl", "probe.jsonl", "status.json"):
        assert (out / name).stat().st_size > 0, name
    assert list(out.glob("events.*"))
    assert checkpoint.read_pointer(out / "checkpoints", "last") == "step_0000008"
    assert checkpoint.verify(out / "checkpoints" / "step_0000008")["step"] == 8
    lines = read_lines(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    names = """images loss total_loss dino_global_crops_loss dino_local_crops_loss ibot_loss koleo_loss lr wd mom
        teacher_temp last_layer_lr grad_norm_backbone grad_norm_dino_head current_batch_size step_time data_time
        images_per_second max_memory"""
    for key in names.split():
        assert key in lines[0], key
    total = sum(lines[3][key] for key in lines[3] if key.endswith("_loss") and key != "total_loss")
    assert lines[3]["total_loss"] == pytest.approx(total, rel=1e-6)
    assert [line["step"] for line in read_lines(out / "probe.jsonl")] == [0, 4, 8]
    assert json.loads((out / "status.json").read_text())["phase"] == "finished"
    model = load(out)
    assert model(torch.zeros(1, 3, 32, 32)).registers.shape == (1, 4, 32)
    assert re.search(r"parameters, cpu float32, attention (sdpa|plain), \d+ images", (out / "train.log").read_text())


@pytest.mark.slow
def test_the_same_config_gives_the_same_run_and_another_seed_another(plain: Path, tmp_path: Path) -> None:
    again = pretrain(tiny_config(tmp_path / "again", data__workers=3))
    assert loss_trace(plain) == loss_trace(again)
    other = pretrain(tiny_config(tmp_path / "other", seed=1))
    assert loss_trace(other)[0] != loss_trace(plain)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"loss__centering": "softmax"}, {"loss__centering": "sinkhorn", "precision": "bf16"}]
)
def test_a_run_stopped_and_resumed_equals_the_unbroken_one_bit_for_bit(tmp_path: Path, options: dict[str, str]) -> None:
    whole = pretrain(tiny_config(tmp_path / "whole", **options))
    with stopped_after(5, tmp_path / "parts"):
        pretrain(tiny_config(tmp_path / "parts", **options))
    parts = pretrain(tiny_config(tmp_path / "parts", resume=True, **options))
    assert loss_trace(parts) == loss_trace(whole)
    for name, value in teacher_of(whole, 8).items():
        assert torch.equal(teacher_of(parts, 8)[name], value), name


def test_a_finished_run_resumed_does_nothing_more(plain: Path, tmp_path: Path) -> None:
    out = shutil.copytree(plain, tmp_path / "run", symlinks=True)
    before = loss_trace(out)
    pretrain(tiny_config(out, resume=True))
    assert loss_trace(out) == before


def test_a_longer_budget_goes_on_from_where_the_run_ended(plain: Path, tmp_path: Path) -> None:
    out = shutil.copytree(plain, tmp_path / "run", symlinks=True)
    before = loss_trace(out)
    pretrain(tiny_config(out, resume=True, steps=10))
    assert loss_trace(out)[:8] == before
    assert [line[0] for line in loss_trace(out)] == list(range(1, 11))


def test_resuming_in_an_empty_folder_starts_the_run(tmp_path: Path) -> None:
    out = pretrain(tiny_config(tmp_path / "run", resume=True))
    assert len(loss_trace(out)) == 8


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_passed_over_and_the_run_still_ends_the_same(
    plain: Path, tmp_path: Path
) -> None:
    out = pretrain(tiny_config(tmp_path / "run", steps=8, checkpoint__every=3))
    newest = out / "checkpoints" / "step_0000008"
    file = next(newest.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    pretrain(tiny_config(out, resume=True, checkpoint__every=3))
    assert "step_0000008" in (out / "train.log").read_text()
    assert loss_trace(out) == loss_trace(plain)


LIST_FILES = os.listdir


def everything_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def remove_manifest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "manifest.json").unlink()


def append_a_byte(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(folder / "state.json", "ab") as file:
        file.write(b" ")


def failing_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint, "digest", fail)


def no_permission(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> list[str]:
        if path == folder.parent:
            raise PermissionError(13, "Permission denied")
        return LIST_FILES(path)

    monkeypatch.setattr(checkpoint.os, "listdir", refuse)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (remove_manifest, r"step_0000002: unreadable \(No such file or directory\)"),
        (append_a_byte, r"step_0000002: state\.json has \d+ of \d+ bytes"),
        (failing_disk, r"step_0000002: unreadable \(Input/output error\)"),
        (no_permission, r"checkpoints: unreadable \(Permission denied\)"),
    ],
)
def test_a_run_whose_checkpoints_cannot_be_read_is_not_begun_anew_by_a_resume(
    tmp_path: Path,
    damage: Callable[[Path, pytest.MonkeyPatch], None],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = pretrain(tiny_config(tmp_path / "run", steps=2, checkpoint__every=1))
    for folder in list((out / "checkpoints").glob("step_*")):
        damage(folder, monkeypatch)
    with monkeypatch.context() as readable:
        readable.setattr(os, "listdir", LIST_FILES)
        before = everything_in(out)
    with pytest.raises(RunError, match=reason) as failure:
        pretrain(tiny_config(out, resume=True, steps=4))
    assert "\n" not in str(failure.value)
    monkeypatch.undo()
    assert everything_in(out) == before
    shutil.rmtree(out / "checkpoints")  # to save room, say; the weights in teacher/ would be retired by a new start
    before = everything_in(out)
    with pytest.raises(RunError, match="its checkpoints are gone, the last was of step 2"):
        pretrain(tiny_config(out, resume=True, steps=4))
    assert everything_in(out) == before
    pretrain(tiny_config(out, overwrite=True, steps=1))


def test_weights_of_a_run_start_another_in_student_and_teacher(plain: Path, tmp_path: Path) -> None:
    setup = Setup(tiny_config(tmp_path / "second", init=str(plain)))
    expected = load(plain).state_dict()
    for networks in (setup.student, setup.teacher):
        for name, value in networks.backbone.state_dict().items():
            assert torch.equal(value, expected[name]), name
    assert "init:" in " ".join(setup.notes)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model__dim": 64}, "model.dim"),
        ({"head__prototypes": 25}, "head.prototypes"),
    ],
)
def test_a_resumed_run_keeps_its_architecture(tmp_path: Path, overrides: dict[str, int], message: str) -> None:
    out = pretrain(tiny_config(tmp_path / "run", steps=1))
    with pytest.raises(UserError, match=message):
        pretrain(tiny_config(out, resume=True, **overrides))


@pytest.mark.slow
def test_a_run_resumed_with_other_options_or_other_code_says_so_in_a_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = pretrain(tiny_config(tmp_path / "run", steps=2))
    capsys.readouterr()
    pretrain(tiny_config(out, resume=True, steps=3))
    assert "resumed with" not in capsys.readouterr().err.replace("resumed with steps=3 (was 2)", "")
    path = out / "environment.json"
    found = json.loads(path.read_text())
    installed = found["packages"]["torch"]
    found["packages"]["torch"], found["dinoreg"] = "2.0.0", "0.0.9"
    path.write_text(json.dumps(found))
    pretrain(tiny_config(out, resume=True, steps=4, optim__lr=2e-3, log__every=2, data__workers=2))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("resumed with")]
    assert said == [
        "resumed with steps=4 (was 3), optim.lr=0.002 (was 0.001): losses differ from an unbroken run's",
        f"resumed with other code than before (dinoreg 0.0.9 -> {dinoreg.__version__}, torch 2.0.0 -> "
        f"{installed}): losses may differ from an unbroken run's",
    ]
    assert [line["step"] for line in read_lines(out / "metrics.jsonl")] == [1, 2, 3, 4]


def test_overwrite_starts_anew_but_never_deletes_what_is_not_a_run(tmp_path: Path) -> None:
    out = pretrain(tiny_config(tmp_path / "run", steps=2))
    (out / "report.html").write_text("of the first run")
    pretrain(tiny_config(out, steps=1, overwrite=True))
    assert not (out / "report.html").exists()
    assert len(loss_trace(out)) == 1
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "me.jpg").write_text("x")
    with pytest.raises(UserError, match="not overwritten"):
        pretrain(tiny_config(photos, overwrite=True))
    assert (photos / "me.jpg").exists()


def test_overwrite_works_through_a_link_to_a_folder(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    out = tmp_path / "run"
    out.symlink_to(tmp_path / "scratch", target_is_directory=True)
    pretrain(tiny_config(out, steps=2))
    pretrain(tiny_config(out, steps=1, overwrite=True))
    assert out.is_symlink()
    assert len(loss_trace(tmp_path / "scratch")) == 1


@pytest.mark.slow
def test_accumulated_runs_follow_the_whole_batch(tmp_path: Path) -> None:
    options = {"model__drop_path": 0.0, "steps": 4, "loss__centering": "sinkhorn"}
    whole = loss_trace(pretrain(tiny_config(tmp_path / "whole", **options)))
    parts = loss_trace(pretrain(tiny_config(tmp_path / "parts", optim__accumulate=3, **options)))
    for one, two in zip(whole, parts):
        assert two == pytest.approx(one, rel=2e-4, abs=1e-5)


def test_untied_heads_and_activation_checkpointing_train(tmp_path: Path) -> None:
    out = pretrain(
        tiny_config(tmp_path / "run", head__separate=True, head__ibot_prototypes=20, model__checkpointing=True, steps=2)
    )
    assert teacher_of(out, 2)["ibot_head.last_layer.weight_g"].shape == (20, 1)
    assert "grad_norm_ibot_head" in read_lines(out / "metrics.jsonl")[0]


def fill_disk_at(steps: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of these steps do not fit on the disk."""
    save = checkpoint.dcp.save

    def full(*args: object, **kwargs: object) -> object:
        if any(checkpoint.step_name(step) in str(kwargs["checkpoint_id"]) for step in steps):
            raise OSError(28, "No space left on device")
        return save(*args, **kwargs)

    monkeypatch.setattr(checkpoint.dcp, "save", full)


def test_a_disk_that_is_full_for_a_while_costs_a_checkpoint_and_the_run_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk_at({4}, monkeypatch)
    out = pretrain(tiny_config(tmp_path / "run", checkpoint__every=2, checkpoint__keep=9))
    names = sorted(path.name for path in (out / "checkpoints").glob("step_*"))
    assert names == ["step_0000002", "step_0000006", "step_0000008"]
    (event,) = read_lines(out / "health" / "events.jsonl")
    assert (event["step"], event["name"]) == (4, "checkpoint-failed")
    assert "No space left on device" in event["message"]
    assert "Make room" in event["remedy"]
    assert event["message"] in (out / "train.log").read_text()


@pytest.mark.parametrize(
    ("steps", "num_steps", "message"),
    [
        ({4, 6}, 10, "2 checkpoints in a row could not be written; the last: .*step_0000006.*No space left on device"),
        ({8}, 8, "step_0000008 could not be written: No space left on device"),  # the last of a run has to be written
    ],
)
def test_a_disk_that_stays_full_ends_the_run_in_words_and_leaves_the_last_checkpoint(
    steps: set[int], num_steps: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk_at(steps, monkeypatch)
    out = tmp_path / "run"
    with pytest.raises(RunError, match=message):  # the last checkpoint of a run is tried in any case
        pretrain(tiny_config(out, steps=num_steps, checkpoint__every=2, checkpoint__max_failures=2))
    assert checkpoint.newest(out / "checkpoints")[0] == out / "checkpoints" / checkpoint.step_name(min(steps) - 2)
    assert [event["step"] for event in read_lines(out / "health" / "events.jsonl")] == sorted(steps)
    assert not list((out / "checkpoints").glob(".unfinished-*"))


def command(out: Path, steps: int) -> list[str]:
    """The tiny run through the command line, with a checkpoint at every step."""
    keys = {**TINY, "steps": steps, "out": out, "checkpoint.every": 1, "resume": "true", "log.every": 1}
    arguments = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in keys.items()]
    arguments = [argument.replace("=None", "=none") for argument in arguments]
    path = out.parent / "plain.yaml"
    path.write_text("batch_size: 6\n")
    return [sys.executable, "-m", "dinoreg", "pretrain", str(path), *arguments]


def start(out: Path, steps: int) -> subprocess.Popen[bytes]:
    """That run as a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command(out, steps), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)


def steps_written(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


@pytest.mark.slow
def test_kill_9_at_random_instants_and_resume_leaves_the_unbroken_losses(tmp_path: Path) -> None:
    """20 kills, every second one while a checkpoint is being written (one is, at every step)."""
    num_steps, kills = 60, 20
    whole = start(tmp_path / "whole", num_steps)
    _, errors = whole.communicate(timeout=600)
    assert whole.returncode == 0, errors.decode()

    rng = random.Random(0)
    out = tmp_path / "killed"
    with WarmInterpreter(*RUN_IMPORTS) as interpreter:
        killed, torn = kill_until_through(out, num_steps, kills, rng, interpreter)
    assert killed >= kills
    assert torn >= 1, "no kill hit the writing of a checkpoint"
    assert loss_trace(out) == loss_trace(tmp_path / "whole")
    for name, value in teacher_of(tmp_path / "whole", num_steps).items():
        assert torch.equal(teacher_of(out, num_steps)[name], value), name


def kill_until_through(
    out: Path, num_steps: int, kills: int, rng: random.Random, interpreter: WarmInterpreter
) -> tuple[int, int]:
    """Start the run again after each kill; returns the kills, and how many hit the writing of a checkpoint."""
    torn = 0
    for killed in range(200):
        run = interpreter.start(command(out, num_steps), env={**os.environ, "OMP_NUM_THREADS": "1"})
        begun = steps_written(out)
        # Let it take a step or two before the blow, then strike at any instant of the next.
        while run.poll() is None and killed < kills and steps_written(out) < min(begun + 1, num_steps):
            time.sleep(0.005)
        if killed < kills and run.poll() is None:
            if killed % 2:
                while run.poll() is None and not list((out / "checkpoints").glob(".unfinished-*")):
                    time.sleep(0.0005)
            else:
                time.sleep(rng.uniform(0.0, 0.15))
            run.send_signal(signal.SIGKILL)
        code = run.wait(timeout=600)
        if code == 0:
            return killed, torn
        assert code == -signal.SIGKILL, run.errors()
        torn += bool(list((out / "checkpoints").glob(".unfinished-*")))
    raise AssertionError("the run did not end")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "run"
    run = start(out, 500)
    while run.poll() is None and steps_written(out) < 2:
        time.sleep(0.01)
    run.send_signal(number)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 128 + number
    assert b"resume=true" in errors
    last = checkpoint.read_pointer(out / "checkpoints", "last")
    assert last == checkpoint.step_name(steps_written(out))
    status = json.loads((out / "status.json").read_text())
    assert (status["phase"], status["reason"]) == ("stopped", number.name)
    assert status["step"] == status["reached"] == steps_written(out)


def test_a_run_that_fails_notes_why_and_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RunError("the disk is gone")

    monkeypatch.setattr(loop.Monitor, "report", fail)
    with pytest.raises(RunError):
        pretrain(tiny_config(tmp_path / "run", checkpoint__every=5))
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["phase"], status["reason"]) == ("failed", "RunError: the disk is gone")
    assert (status["step"], status["reached"], status["num_steps"]) == (0, 1, 8)


@pytest.mark.slow
def test_every_training_state_that_is_kept_has_its_teacher_file(tmp_path: Path) -> None:
    out = pretrain(
        tiny_config(tmp_path / "run", checkpoint__every=1, checkpoint__keep=1, probe__every=1, probe__metric="rankme")
    )
    states = {path.name for path in (out / "checkpoints").glob("step_*")}
    assert states == {path.stem for path in (out / "teacher").glob("*.safetensors")}
    assert checkpoint.read_pointer(out / "checkpoints", "best") in {None, *states}
    assert len(states) <= 2
