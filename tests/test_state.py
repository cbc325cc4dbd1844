"""What training carries from step to step: where it starts, and that a checkpoint holds all of it bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training import tiny_config

from dinoreg.checkpoint import format as checkpoint
from dinoreg.config.load import Config
from dinoreg.data.loader import BatchLoader
from dinoreg.runtime.errors import UserError
from dinoreg.train.prepare import Setup
from dinoreg.train.state import LARGEST_LOSS_SCALE, TrainState, build_networks
from dinoreg.train.step import train_step

CPU = torch.device("cpu")


def fresh(config: Config, dtype: torch.dtype = torch.float32) -> TrainState:
    return TrainState(config, *build_networks(config), CPU, dtype)


def trained(config: Config, steps: int, dtype: torch.dtype = torch.float32) -> TrainState:
    """The state after some real steps, with everything in it away from its first value."""
    setup = Setup(config)
    state = TrainState(config, setup.student, setup.teacher, CPU, dtype)
    advance(setup, state, steps)
    return state


def advance(setup: Any, state: TrainState, steps: int) -> list[Tensor]:
    batches: BatchLoader = setup.batches(state)
    totals = []
    with batches:
        for _ in range(steps):
            result = train_step(state, next(batches), setup.schedules.at(state.step))
            totals.append(result.losses["total"])
    return totals


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    rows: dict[str, Tensor] = {}
    for name, value in values.items():
        rows |= flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return rows


def assert_same_tensors(one: dict[str, Any], two: dict[str, Any]) -> None:
    first, second = flat(one), flat(two)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value, second[name]), name


def test_equal_seeds_give_equal_networks_and_other_seeds_others() -> None:
    torch.manual_seed(1)
    one, _ = build_networks(tiny_config())
    torch.manual_seed(2)  # what else draws random numbers does not matter
    torch.randn(7)
    two, _ = build_networks(tiny_config())
    assert_same_tensors(one.state_dict(), two.state_dict())
    other, _ = build_networks(tiny_config(seed=1))
    drawn = [name for name, value in one.state_dict().items() if value.unique().numel() > 1]
    assert len(drawn) > 10
    for name in drawn:
        assert not torch.equal(one.state_dict()[name], other.state_dict()[name]), name


def test_building_networks_leaves_the_global_randomness_alone() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    build_networks(tiny_config())
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize("separate", [False, True])
def test_the_teacher_starts_as_a_copy_of_the_student_and_has_no_gradients(separate: bool) -> None:
    config = tiny_config(head__separate=separate, head__ibot_prototypes=20 if separate else None)
    student, teacher = build_networks(config)
    assert set(student) == {"backbone", "dino_head"} | ({"ibot_head"} if separate else set())
    assert_same_tensors(student.state_dict(), teacher.state_dict())
    pointers = {p.data_ptr() for p in student.parameters()}
    for name, parameter in teacher.named_parameters():
        assert not parameter.requires_grad, name
        assert parameter.data_ptr() not in pointers, name
    assert all(p.requires_grad for p in student.parameters())
    assert not any(module.training for module in teacher.modules())
    assert teacher.head_of_patches is (teacher["ibot_head"] if separate else teacher["dino_head"])


def test_the_optimizer_holds_every_parameter_of_the_student_once_and_none_of_the_teacher() -> None:
    state = fresh(tiny_config(head__separate=True))
    held = [id(p) for group in state.optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in state.student.parameters())


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 1.0), (torch.bfloat16, 1.0), (torch.float16, LARGEST_LOSS_SCALE)]
)
def test_a_state_starts_at_zero_and_only_fp16_scales_its_loss(dtype: torch.dtype, scale: float) -> None:
    state = fresh(tiny_config(head__separate=True, head__ibot_prototypes=20), dtype)
    assert (state.step, state.position, state.rollbacks, state.history) == (0, 0, 0, {})
    assert float(state.loss_scale) == scale
    assert {name: tuple(center.shape) for name, center in state.centers.items()} == {"dino": (1, 24), "ibot": (1, 20)}
    assert not any(center.any() for center in state.centers.values())
    assert float(state.rejected) == 0
    assert state.student.training
    assert not state.teacher.training


@pytest.mark.parametrize(
    "options",
    [
        {"loss__centering": "softmax"},
        {"loss__centering": "sinkhorn", "head__separate": True, "head__ibot_prototypes": 20},
    ],
)
def test_a_state_comes_back_from_a_checkpoint_bit_for_bit_and_trains_on_alike(
    options: dict[str, Any], tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "run", data__workers=0, **options)
    state = trained(config, 3)
    state.rejected += 2
    state.scale_age += 7
    state.loss_scale *= 0.5
    state.rollbacks = 1
    state.history = {"best": {"metric": "rankme", "value": 1 / 3, "step": 2}, "bad": {"a.jpg": "empty"}}
    names = set(flat(state.tensors()))
    for moment in ("exp_avg", "exp_avg_sq", "step"):
        assert any(name.startswith("optimizer/") and name.endswith(f"/{moment}") for name in names), moment
    assert all(
        float(v.abs().max()) > 0
        for k, v in flat(state.tensors()).items()
        if k.endswith("blocks.1.mlp.fc1.weight/exp_avg")
    )
    path = checkpoint.save(tmp_path / "checkpoints", state.step, state.tensors(), state.numbers(), keep=2)

    setup = Setup(tiny_config(tmp_path / "other", data__workers=0, seed=9, **options))  # other weights at first
    again = setup.new_state()
    before = flat(again.tensors())["student/backbone.cls_token"].clone()
    tensors = again.tensors()
    numbers = checkpoint.load(path, tensors)
    again.load(tensors, numbers)
    assert not torch.equal(before, again.student.state_dict()["backbone.cls_token"])
    assert_same_tensors(again.tensors(), state.tensors())
    assert again.numbers() == state.numbers()

    setups = Setup(config)
    state.rejected.zero_()
    again.rejected.zero_()
    ahead = advance(setups, state, 2)
    assert [float(x) for x in advance(setups, again, 2)] == [float(x) for x in ahead]
    assert_same_tensors(again.tensors(), state.tensors())


def test_rollbacks_are_never_forgotten_by_going_back(tmp_path: Path) -> None:
    state = fresh(tiny_config())
    numbers = state.numbers()
    state.rollbacks = 2
    state.load(state.tensors(), numbers)
    assert state.rollbacks == 2


def test_the_numbers_of_a_state_are_json(tmp_path: Path) -> None:
    state = trained(tiny_config(tmp_path / "run", data__workers=0), 1)
    state.history["best"] = {"metric": "knn_top1", "value": 0.25, "step": 1}
    numbers = state.numbers()
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers
    assert (numbers["step"], numbers["position"]) == (1, 6)


def test_a_checkpoint_of_another_architecture_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    state = fresh(tiny_config())
    path = checkpoint.save(tmp_path, 0, state.tensors(), state.numbers(), keep=1)
    wider = fresh(tiny_config(model__dim=48))
    before = {name: value.clone() for name, value in flat(wider.tensors()).items()}
    with pytest.raises(UserError, match="it belongs to another architecture"):
        checkpoint.load(path, wider.tensors())
    for name, value in flat(wider.tensors()).items():
        assert torch.equal(value, before[name]), name
