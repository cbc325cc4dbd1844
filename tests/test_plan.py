"""What `dinoreg plan` foretells, against the real step, the real networks and a real run folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from training import tiny_config

from dinoreg.cli import main
from dinoreg.config import Config, load_config
from dinoreg.errors import UserError
from dinoreg.plan import plan
from dinoreg.plan.advice import change
from dinoreg.plan.memory import memory_of
from dinoreg.train.loop import pretrain
from dinoreg.train.state import build_networks

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import memory as memory_benchmark

SMALL: dict[str, Any] = {
    "model.name": "vits14_reg4",
    "model.attention": "sdpa",
    "model.dim": 192,
    "model.depth": 4,
    "model.heads": 3,
    "crops.global_size": 112,
    "crops.local_size": 56,
    "head.prototypes": 2048,
    "batch_size": 8,
    "steps": 100,
    "probe.every": 0,
}


def config_with(**overrides: Any) -> Config:
    return load_config(None, {**SMALL, **{key.replace("__", "."): value for key, value in overrides.items()}})


@pytest.mark.parametrize(
    "overrides",
    [
        {"precision": "bf16"},
        {"precision": "fp32"},
        {"precision": "bf16", "model__checkpointing": True},
        {"precision": "bf16", "model__ffn": "swiglu", "model__drop_path": 0.0},
        {"precision": "bf16", "head__prototypes": 16384, "model__depth": 2},
        {"precision": "bf16", "head__separate": True, "crops__num_local": 2, "model__dim": 384, "model__heads": 6},
    ],
    ids=lambda overrides: " ".join(f"{key}={value}" for key, value in overrides.items()),
)
def test_memory_is_that_of_the_real_step_within_a_tenth(overrides: dict[str, Any]) -> None:
    """The step runs on tensors that have shapes and no memory; every one that it makes is counted while it lives."""
    config = config_with(**overrides)
    with memory_benchmark.pieces_as_on_a_device():
        traced = memory_benchmark.step_peak(config)
    told = plan(config, nodes=1, gpus=1, gpu="h100", probe=False).memory.allocated
    assert told == pytest.approx(traced, rel=0.1)


def test_parameters_and_checkpoints_are_those_of_a_real_run(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", steps=2, checkpoint__every=2)
    found = plan(config, probe=False)
    student, _ = build_networks(config)
    assert found.job.sizes.student == sum(p.numel() for p in student.parameters())
    assert found.job.sizes.backbone == sum(p.numel() for p in student.backbone.parameters())
    run = pretrain(config)
    written = sum(path.stat().st_size for path in (run / "checkpoints" / "step_0000002").glob("*.distcp"))
    # A zip entry beside each tensor: kilobytes, which count in a run as tiny as this.
    assert found.checkpoint.size < written < 1.6 * found.checkpoint.size
    teacher = (run / "teacher" / "step_0000002.safetensors").stat().st_size
    assert teacher == pytest.approx(found.checkpoint.teacher, rel=0.05)


def test_operations_agree_with_fvcore() -> None:
    found = plan(config_with(model__ffn="swiglu", head__separate=True), gpus=1, gpu="h100", probe=False)
    assert {check.name for check in found.checks} == {
        "backbone, global crop",
        "backbone, local crop",
        "dino_head",
        "ibot_head",
    }
    assert all(check.agrees for check in found.checks)


def test_what_is_sent_follows_from_the_strategy() -> None:
    def sent(**overrides: Any) -> dict[str, int]:
        found = plan(config_with(**overrides), nodes=2, gpus=4, gpu="h100", probe=False)
        return {each.name.partition(",")[0]: each.sent for each in found.exchanges}

    size = 4 * plan(config_with(), gpus=1, gpu="h100", probe=False).job.sizes.student
    ddp = sent(parallel__strategy="ddp")
    assert ddp["gradients"] == 2 * size * 7 // 8  # a ring's all-reduce
    fsdp = sent(parallel__strategy="fsdp")
    assert fsdp["student's weights"] == fsdp["teacher's weights"] == fsdp["gradients"]
    # Rows that do not divide by the processes are filled up.
    assert size * 7 // 8 <= fsdp["gradients"] < 1.03 * size * 7 // 8
    again = sent(parallel__strategy="fsdp", parallel__reshard=True)
    assert again["student's weights"] == 2 * fsdp["student's weights"]
    half = sent(parallel__strategy="fsdp", parallel__param_dtype="bf16")
    assert half["student's weights"] == pytest.approx(fsdp["student's weights"] / 2, abs=1)
    sinkhorn = sent(loss__centering="sinkhorn")
    assert sinkhorn["Sinkhorn"] == 2 * (4 * 3 * 2 * 2048) * 7 // 8  # three sums of K, of class tokens and of patches


def test_sharding_divides_the_state_and_hybrids_share_it_in_groups() -> None:
    def weights(**overrides: Any) -> int:
        found = plan(config_with(**overrides), nodes=2, gpus=4, gpu="h100", probe=False)
        return found.memory.peak.parts["student weights"]

    whole = weights(parallel__strategy="ddp")
    # Rows that do not divide are filled up.
    assert whole // 8 <= weights(parallel__strategy="fsdp") < 1.03 * whole / 8
    assert whole // 2 <= weights(parallel__strategy="fsdp", parallel__shard=2) < 1.03 * whole / 2


def test_what_does_not_fit_comes_with_the_fewest_changes_under_which_it_does() -> None:
    config = load_config("vitl16_short_reg4_in1k")
    found = plan(config, nodes=1, gpus=8, gpu="a100-40", probe=False)
    assert not found.fits
    assert found.advice
    for remedy in found.advice:
        assert remedy.overrides
        changed = change(found.job, remedy.overrides)
        assert memory_of(changed).fits
        assert memory_of(changed).needed < found.memory.needed
    assert found.as_dict()["fits"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpu=h1000"], "h1000"),
        (["gpus=0"], "gpus=0: expected at least 1"),
        (["nodes=none", "memory=-4"], "memory=-4: expected a positive number"),
        (["memory=0.5", "batch_size=2"], "does not fit"),
        (["utilisation=2"], "expected a share of the peak"),
        (["parallel.shard=3", "gpus=8"], "parallel.shard=3: expected a divisor of the 8 processes"),
        (["gpu=h100", "probe=true"], "probe=true: there is no"),
        (["nodez=2"], "nodez"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "plan.json"
    assert main(["plan", "vitb14_reg4", "steps=10", f"out={out}", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not out.exists()


def test_the_command_prints_a_screen_and_writes_every_figure(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "plan.json"
    keys = [f"{key}={value}" for key, value in SMALL.items() if key != "model.name"]
    assert main(["plan", "vits14_reg4", "gpu=h100", "nodes=2", "gpus=8", "probe=false", f"out={out}", *keys]) == 0
    printed = capsys.readouterr().out
    for part in ("parameters", "student weights", "gradients, all-reduce", "checkpoint", "It fits"):
        assert part in printed
    assert len(printed.splitlines()) < 70
    figures = json.loads(out.read_text())
    assert figures["fits"] is True
    assert figures["job"]["processes"] == 16
    assert figures["job"]["global_batch_size"] == 16 * 8


def test_a_plan_without_a_budget_or_with_the_data_elsewhere_says_what_to_give() -> None:
    with pytest.raises(UserError, match="no budget"):
        plan(config_with(steps=None), gpus=1, gpu="h100", probe=False)
    with pytest.raises(UserError, match="num_images="):
        plan(load_config(None, {**SMALL, "steps": None, "epochs": 3}), gpus=1, gpu="h100", probe=False)
    counted = plan(load_config(None, {**SMALL, "steps": None, "epochs": 3}), gpus=2, gpu="h100", num_images=1600)
    assert counted.num_steps == 300
    assert counted.epochs == pytest.approx(3)
