"""Every file in configs/ is a run we stand behind: it loads, says what it is, and states only differences."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from dinoreg.config.bundled import bundled
from dinoreg.config.load import Config, load_config, require_complete

FILES = sorted(bundled("configs").glob("*.yaml"))
NAMES = [path.stem for path in FILES]


def flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found


def test_the_promised_runs_are_there() -> None:
    assert set(NAMES) >= {
        "quickstart",
        "small",
        "vits14_reg4",
        "vitb14_reg4",
        "vitl16_short_reg4_in1k",
        "vitl14_reg4_in22k",
        "vitg14_reg4_in22k",
        "dinov2_parity",
    }


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_run_needs_only_data_and_out(path: Path) -> None:
    require_complete(load_config(path, ["data=photos/", "out=runs/x"]))


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_only_what_differs_from_the_default_is_stated(path: Path) -> None:
    stated = flat(OmegaConf.to_container(OmegaConf.load(path)))  # type: ignore[arg-type]
    defaults = flat(dataclasses.asdict(Config()))
    for key, value in stated.items():
        value = tuple(value) if isinstance(value, list) else value
        assert value != defaults[key], f"{key} is the default already"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_begins_with_command_and_hardware_and_states_what_was_measured_or_published(path: Path) -> None:
    comment = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    for fact, least in (("command:", 1), ("hardware:", 1), ("time:", 0), ("result:", 0), ("published:", 0)):
        told = [line.partition(fact)[2].strip() for line in comment if line.startswith(fact)]
        assert least <= len(told) <= 1, fact
        assert all(told), fact
    assert len(comment[0]) > 30


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_the_command_in_the_comment_runs_this_file(path: Path) -> None:
    line = next(line for line in path.read_text().splitlines() if line.startswith("# command:"))
    commands = (f"dinoreg pretrain {path.stem} ", f"dinoreg launch pretrain {path.stem} ", f"dinoreg {path.stem}")
    assert any(command in line for command in commands)


def test_the_single_device_runs_keep_small_batches() -> None:
    for name in ("vits14_reg4", "vitb14_reg4"):
        config = load_config(name)
        assert config.batch_size <= 256
        assert config.loss.centering == "sinkhorn"
        assert config.optim.base_lr is not None
        assert config.optim.base_lr <= Config().optim.base_lr / 2  # type: ignore[operator]
        assert (config.model.drop_path, config.optim.beta2) == (0.1, 0.99)


def test_the_long_recipes_have_the_published_constants() -> None:
    for name, gpus in (("vitl14_reg4_in22k", 96), ("vitg14_reg4_in22k", 256)):
        config = load_config(name)
        assert config.batch_size * gpus == 3072
        assert config.peak_lr(world_size=gpus) == pytest.approx(3.464e-4, rel=1e-3)
        assert config.schedule.warmup * config.steps == 100_000  # type: ignore[operator]
        assert config.schedule.teacher_temp_warmup * config.steps == 37_500  # type: ignore[operator]
        assert config.schedule.freeze_last_layer * config.steps == 1250  # type: ignore[operator]
    short = load_config("vitl16_short_reg4_in1k")
    assert short.peak_lr(world_size=32) == pytest.approx(5.657e-3, rel=1e-3)
    assert short.schedule.warmup * short.steps == 12_500  # type: ignore[operator]
