from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dinoreg.config.schema import OptimConfig
from dinoreg.models.heads import PrototypeHead
from dinoreg.models.registry import build
from dinoreg.train.optimizer import (
    GroupsAdamW,
    build_optimizer,
    clip_gradients,
    lr_multiplier,
    parameter_groups,
    set_rates,
    update_teacher,
)
from dinoreg.train.schedules import Now


def tiny_student() -> nn.ModuleDict:
    torch.manual_seed(0)
    backbone = build("vitt8_reg2", dim=16, depth=2, heads=2, image_size=16)
    return nn.ModuleDict({"backbone": backbone, "dino_head": PrototypeHead(16, 12, 20, 8)})


def optimizer_of(student: nn.ModuleDict) -> GroupsAdamW:
    return build_optimizer(student, 2, 0.9, OptimConfig(patch_embed_lr=0.2, beta1=0.9, beta2=0.999, eps=1e-8))


NOW = Now(lr=1e-2, last_layer_lr=0.0, weight_decay=0.1, momentum=0.9, teacher_temp=0.04)


def test_layer_decay_has_the_multipliers_of_a_24_block_network_in_the_reference() -> None:
    def of(name: str) -> float:
        return lr_multiplier(name, 24, 0.9, 0.2)

    for token in ("pos_embed", "cls_token", "mask_token", "register_tokens"):
        assert of(token) == pytest.approx(0.0718, abs=5e-5)
    assert of("patch_embed.proj.weight") == pytest.approx(0.01436, abs=5e-6)
    assert of("blocks.23.attn.qkv.weight") == pytest.approx(0.9)
    assert of("blocks.0.mlp.fc1.bias") == pytest.approx(0.9**24)
    assert of("norm.weight") == 1.0


def test_registers_and_prototypes_decay_but_norms_biases_and_layerscale_do_not() -> None:
    decay = {}
    for group in parameter_groups(tiny_student(), 2, 0.9, 0.2):
        decay |= dict.fromkeys(group["names"], group["wd_multiplier"])
    for name in (
        "backbone.register_tokens",
        "backbone.cls_token",
        "backbone.pos_embed",
        "backbone.mask_token",
        "backbone.blocks.0.attn.qkv.weight",
        "dino_head.last_layer.weight_g",
        "dino_head.last_layer.weight_v",
    ):
        assert decay[name] == 1.0, name
    for name in (
        "backbone.norm.weight",
        "backbone.blocks.1.norm1.weight",
        "backbone.blocks.1.ls1.gamma",
        "backbone.blocks.0.mlp.fc1.bias",
        "dino_head.mlp.0.bias",
    ):
        assert decay[name] == 0.0, name


def test_every_parameter_is_in_exactly_one_group() -> None:
    student = tiny_student()
    grouped = [id(p) for group in parameter_groups(student, 2, 0.9, 0.2) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in student.parameters())


def test_last_layer_stays_while_frozen_although_its_moments_accumulate() -> None:
    student = tiny_student()
    optimizer = optimizer_of(student)
    prototypes = student["dino_head"].last_layer.weight_v
    before = prototypes.detach().clone()
    student["dino_head"](torch.randn(5, 16)).square().sum().backward()
    set_rates(optimizer, NOW)
    optimizer.step()
    assert torch.equal(prototypes, before)
    assert optimizer.state[prototypes]["exp_avg"].abs().sum() > 0


def test_gradients_are_clipped_for_each_submodule_on_its_own() -> None:
    student = tiny_student()
    for parameter in student["backbone"].parameters():
        parameter.grad = torch.full_like(parameter, 10.0)
    for parameter in student["dino_head"].parameters():
        parameter.grad = torch.full_like(parameter, 1e-4)
    small = [p.grad.clone() for p in student["dino_head"].parameters()]
    optimizer = optimizer_of(student)
    norms = clip_gradients(student, 3.0, optimizer, torch.ones(()))
    optimizer.step()
    after = torch.stack([p.grad.norm() for p in student["backbone"].parameters()]).norm()
    count = sum(p.numel() for p in student["backbone"].parameters())
    assert norms["grad_norm_backbone"].item() == pytest.approx(10.0 * count**0.5, rel=1e-5)
    assert after.item() == pytest.approx(3.0, rel=1e-4)
    for parameter, gradient in zip(student["dino_head"].parameters(), small):
        assert torch.equal(parameter.grad, gradient)


def test_teacher_copies_at_momentum_0_stays_at_1_and_averages_between() -> None:
    student, one = tiny_student(), torch.ones(())
    teacher = copy.deepcopy(student)
    for parameter in student.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    started = [p.detach().clone() for p in teacher.parameters()]

    update_teacher(teacher, student, 1.0, one)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), started))

    update_teacher(teacher, student, 0.9, one)
    for average, old, current in zip(teacher.parameters(), started, student.parameters()):
        torch.testing.assert_close(average, 0.9 * old + 0.1 * current)

    update_teacher(teacher, student, 0.0, one)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), student.parameters()))


def test_a_rejected_step_leaves_the_teacher_as_it_is() -> None:
    student = tiny_student()
    teacher = copy.deepcopy(student)
    for parameter in student.parameters():
        parameter.data.add_(1.0)
    started = [p.detach().clone() for p in teacher.parameters()]
    update_teacher(teacher, student, 0.5, torch.zeros(()))
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), started))
