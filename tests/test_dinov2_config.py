"""dinov2's own YAML: read as the run it describes, with every key either translated or named."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dinoreg.config.dinov2 import KEYS, from_dinov2, is_dinov2
from dinoreg.config.load import Config, load_config
from dinoreg.config.option import keys_of
from dinoreg.runtime.errors import UserError
from dinoreg.train.schedules import Schedules

# As dinov2 publishes its giant's config.
GIANT = """
dino:
  head_n_prototypes: 131072
  head_bottleneck_dim: 384
ibot:
  separate_head: true
  head_n_prototypes: 131072
train:
  batch_size_per_gpu: 12
  dataset_path: ImageNet22k
  centering: sinkhorn_knopp
student:
  arch: vit_giant2
  patch_size: 14
  drop_path_rate: 0.4
  ffn_layer: swiglufused
  block_chunks: 4
teacher:
  momentum_teacher: 0.994
optim:
  epochs: 500
  weight_decay_end: 0.2
  base_lr: 2.0e-04
  warmup_epochs: 80
  layerwise_decay: 1.0
crops:
  local_crops_size: 98
"""


def dotted(**values: Any) -> dict[str, Any]:
    """dotted(student__arch="x") is {"student.arch": "x"}."""
    return {key.replace("__", "."): value for key, value in values.items()}


OURS = list(keys_of(Config))


def test_the_references_defaults_are_our_parity_config() -> None:
    ours = load_config("dinov2_parity")
    theirs = load_config(None, from_dinov2({}).config)
    theirs = dataclasses.replace(
        theirs,
        model=dataclasses.replace(theirs.model, ffn=None),
        data=dataclasses.replace(theirs.data, workers=None),
    )
    assert theirs == ours


def test_the_published_giant_with_registers_is_ours_but_for_the_quirks(tmp_path: Path) -> None:
    path = tmp_path / "vitg14.yaml"
    registers = "  num_register_tokens: 4\n  interpolate_antialias: true\n  interpolate_offset: 0.0\n"
    path.write_text(GIANT.replace("  arch: vit_giant2\n", f"  arch: vit_giant2\n{registers}"))
    theirs, ours = load_config(path), load_config("vitg14_reg4_in22k")
    assert theirs.model == dataclasses.replace(ours.model, ffn="swiglu")
    assert theirs.head == dataclasses.replace(ours.head, ibot_prototypes=131072)
    assert theirs.loss == dataclasses.replace(ours.loss, center_by_process=True)
    assert theirs.optim == dataclasses.replace(ours.optim, move_on_skip=True)
    assert theirs.schedule == dataclasses.replace(ours.schedule, final_lr=1e-6)
    assert (theirs.crops, theirs.mask) == (ours.crops, dataclasses.replace(ours.mask, by_process=True))
    assert (theirs.steps, theirs.batch_size) == (ours.steps, ours.batch_size) == (625_000, 12)
    assert theirs.augment == dataclasses.replace(ours.augment, reference_blur=True)


def test_epochs_become_fractions_of_the_run() -> None:
    content = dotted(
        optim__epochs=20,
        optim__warmup_epochs=5,
        optim__freeze_last_layer_epochs=1,
        teacher__warmup_teacher_temp_epochs=10,
        train__OFFICIAL_EPOCH_LENGTH=100,
    )
    config = load_config(None, from_dinov2(content).config)
    assert config.steps == 2000
    assert config.schedule.warmup == 0.25
    assert config.schedule.freeze_last_layer == 0.05
    assert config.schedule.teacher_temp_warmup == 0.5
    assert config.checkpoint.every == 300


def literal(
    steps: int, base: float, final: float, total: int, warmup: int = 0, start: float = 0.0
) -> np.ndarray:  # (steps,)
    """dinov2's CosineScheduler of `total` iterations at each of `steps`; beyond them it has its final value."""
    decay = np.arange(total - warmup)
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * decay / len(decay)))
    table = np.concatenate((np.linspace(start, base, warmup), cosine))
    assert len(table) == total
    return np.concatenate((table, np.full(max(0, steps - total), final)))[:steps]


VARIANTS: dict[str, dict[str, Any]] = {
    "the defaults": {},
    "vitl14, vitg14": dotted(
        optim__epochs=500,
        optim__warmup_epochs=80,
        optim__weight_decay_end=0.2,
        optim__base_lr=2e-4,
        teacher__momentum_teacher=0.994,
    ),
    "ten epochs with the default warm-ups": dotted(optim__epochs=10),
    "temperature warm-up of one step less than the run": dotted(
        optim__epochs=30, optim__warmup_epochs=3, teacher__warmup_teacher_temp_epochs=29, train__OFFICIAL_EPOCH_LENGTH=1
    ),
    "temperature warm-up as long as the run": dotted(optim__epochs=30),
    "temperature warm-up of one step more than the run": dotted(
        optim__epochs=29, optim__warmup_epochs=3, teacher__warmup_teacher_temp_epochs=30, train__OFFICIAL_EPOCH_LENGTH=1
    ),
    "a run of warm-up alone": dotted(optim__epochs=12, optim__warmup_epochs=12),
    "no warm-up at all": dotted(optim__warmup_epochs=0, teacher__warmup_teacher_temp_epochs=0),
    "warm-ups of a single step": dotted(
        optim__epochs=9, optim__warmup_epochs=1, teacher__warmup_teacher_temp_epochs=1, train__OFFICIAL_EPOCH_LENGTH=1
    ),
    "a run of a single step": dotted(optim__epochs=1, optim__warmup_epochs=1, train__OFFICIAL_EPOCH_LENGTH=1),
    "a run of a single step, without warm-up": dotted(
        optim__epochs=1, optim__warmup_epochs=0, train__OFFICIAL_EPOCH_LENGTH=1
    ),
    "last layers frozen for longer than the run": dotted(optim__epochs=11, optim__freeze_last_layer_epochs=12),
    "last layers never frozen": dotted(optim__freeze_last_layer_epochs=0),
    "a peak below the final rate": dotted(optim__base_lr=1e-7),
    "momentum and decay that do not move": dotted(
        teacher__final_momentum_teacher=0.992, optim__weight_decay_end=0.04, optim__min_lr=0.0
    ),
}


def assert_schedules_of_the_reference(content: dict[str, Any], epoch_length: int) -> None:
    content = {"train.OFFICIAL_EPOCH_LENGTH": epoch_length, **content}
    value = {key: content.get(key, each.default) for key, each in KEYS.items()}
    length, batch = value["train.OFFICIAL_EPOCH_LENGTH"], value["train.batch_size_per_gpu"]
    steps, peak = value["optim.epochs"] * length, value["optim.base_lr"] * math.sqrt(batch / 1024)
    lr = literal(steps, peak, value["optim.min_lr"], steps, value["optim.warmup_epochs"] * length)
    warm, hot = value["teacher.warmup_teacher_temp"], value["teacher.teacher_temp"]
    heating = value["teacher.warmup_teacher_temp_epochs"] * length
    last_layer_lr = lr.copy()
    last_layer_lr[: value["optim.freeze_last_layer_epochs"] * length] = 0
    expected = {
        "lr": lr,
        "last_layer_lr": last_layer_lr,
        "weight_decay": literal(steps, value["optim.weight_decay"], value["optim.weight_decay_end"], steps),
        "momentum": literal(steps, value["teacher.momentum_teacher"], value["teacher.final_momentum_teacher"], steps),
        "teacher_temp": literal(steps, hot, hot, heating, heating, warm),
    }
    config = load_config(None, from_dinov2(content).config)
    schedules = Schedules(config.num_steps(1), config.peak_lr(), config.schedule)
    assert schedules.num_steps == steps
    found = [schedules.at(step) for step in range(steps)]
    for name, values in expected.items():
        np.testing.assert_allclose([getattr(now, name) for now in found], values, rtol=1e-12, atol=1e-16, err_msg=name)


@pytest.mark.parametrize("content", VARIANTS.values(), ids=list(VARIANTS))
def test_every_step_has_the_references_schedules(content: dict[str, Any]) -> None:
    assert_schedules_of_the_reference(content, epoch_length=3)


@pytest.mark.slow
@pytest.mark.parametrize("content", VARIANTS.values(), ids=list(VARIANTS))
def test_every_step_of_runs_of_published_length_has_the_references_schedules(content: dict[str, Any]) -> None:
    assert_schedules_of_the_reference(content, epoch_length=1250)


def test_a_temperature_warmup_longer_than_the_run_is_said() -> None:
    translation = from_dinov2(dotted(optim__epochs=20, optim__warmup_epochs=10))
    assert load_config(None, translation.config).schedule.teacher_temp_warmup == 1.5
    assert any("warmup_teacher_temp_epochs=30" in note for note in translation.notes)
    assert not any("warmup_teacher_temp_epochs" in note for note in from_dinov2({}).notes)


def test_the_quirks_are_kept_unless_the_file_says_otherwise() -> None:
    config = load_config(None, from_dinov2({}).config)
    assert config.augment.reference_blur
    assert (config.model.antialias, config.model.position_offset) == (False, 0.1)
    changed = dotted(student__interpolate_antialias=True, student__interpolate_offset=0.0)
    config = load_config(None, from_dinov2(changed).config)
    assert (config.model.antialias, config.model.position_offset) == (True, 0.0)


def test_the_ibot_heads_settings_count_only_when_it_is_separate() -> None:
    shared = from_dinov2(dotted(ibot__head_n_prototypes=512))
    assert "head.ibot_prototypes" not in shared.config
    assert any(line.startswith("ibot.head_n_prototypes") for line in shared.dead)
    separate = from_dinov2(dotted(ibot__head_n_prototypes=512, ibot__separate_head=True))
    assert separate.config["head.ibot_prototypes"] == 512
    assert separate.dead == []


def test_weights_are_taken_over() -> None:
    assert from_dinov2(dotted(student__pretrained_weights="a.pth")).config["init"] == "a.pth"
    assert from_dinov2(dotted(MODEL__WEIGHTS="b.pth")).config["init"] == "b.pth"
    assert "init" not in from_dinov2({}).config


def test_every_key_of_a_file_is_translated_or_listed() -> None:
    content = dotted(
        compute_precision__student__backbone__mixed_precision__param_dtype="fp16",
        compute_precision__grad_scaler=True,
        train__cache_dataset=True,
        train__saveckp_freq=20,
        train__dataset_path="ImageNet:split=TRAIN",
        train__output_dir="/y",
        student__block_chunks=4,
        student__qkv_bias=True,
        optim__lr=0.0,
        student__wings=2,
        hydra__run="x",
    )
    dead = from_dinov2(content).dead
    listed = [line.partition(":")[0] for line in dead]
    assert sorted(listed) == sorted(
        [
            "compute_precision.student.backbone.mixed_precision.param_dtype",
            "compute_precision.grad_scaler",
            "train.cache_dataset",
            "train.saveckp_freq",
            "train.dataset_path",
            "train.output_dir",
            "student.block_chunks",
            "student.qkv_bias",
            "optim.lr",
            "student.wings",
            "hydra.run",
        ]
    )
    assert all(len(line.partition(": ")[2]) > 5 for line in dead)
    assert any("unknown" in line for line in dead if line.startswith("student.wings"))


@pytest.mark.parametrize("key", sorted(KEYS))
def test_no_translated_key_is_read_in_vain(key: str) -> None:
    """Changing any key of the reference changes our config, or is refused by name."""
    changed = {
        "train.centering": "sinkhorn_knopp",
        "student.arch": "vit_small",
        "student.ffn_layer": "swiglu",
        "student.patch_size": 14,
        "MODEL.WEIGHTS": "w.pth",
        "student.pretrained_weights": "w.pth",
        "optim.scaling_rule": "linear_wrt_256",
    }
    default = KEYS[key].default
    if isinstance(default, bool):
        value: Any = not default
    elif isinstance(default, list):
        value = [default[0], default[1] / 2]
    elif isinstance(default, (int, float)) and key not in changed:
        value = default * 2 + 1
    else:
        value = changed[key]
    base = dotted(ibot__separate_head=True) if key.startswith("ibot.head") else {}
    content = {**base, key: value}
    try:
        assert from_dinov2(content).config != from_dinov2(base).config
    except UserError as error:
        assert str(error).startswith(key)  # noqa: PT017 - being refused by name is the other good outcome


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (dotted(student__arch="resnet50"), "student.arch=resnet50: expected vit_small"),
        (dotted(student__ffn_layer="identity"), "student.ffn_layer=identity: expected mlp"),
        (dotted(optim__scaling_rule="linear"), "optim.scaling_rule=linear: expected sqrt_wrt_1024"),
        (dotted(train__centering="none"), "train.centering=none: expected centering"),
        (dotted(student__qkv_bias=False), "student.qkv_bias=False: expected true"),
        (dotted(optim__epochs=0), "optim.epochs=0"),
        (dotted(optim__epochs=9), "optim.warmup_epochs=10: expected at most optim.epochs=9"),
        (dotted(optim__epochs="many"), "optim.epochs=many: expected a number"),
        (dotted(ibot__separate_head=True, ibot__head_nlayers=2), "ibot.head_nlayers=2"),
    ],
)
def test_what_has_no_counterpart_is_refused(content: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        from_dinov2(content)
    assert str(caught.value).startswith(expected)


def test_files_of_dinov2_and_of_ours_are_told_apart() -> None:
    assert is_dinov2({"student.arch": "vit_small"}, OURS)
    assert is_dinov2({"train.batch_size_per_gpu": 8, "crops.local_crops_size": 98}, OURS)
    assert is_dinov2({"crops.global_crops_size": 224}, OURS)
    assert is_dinov2({"optim.epochs": 3}, OURS)
    assert not is_dinov2({}, OURS)
    assert not is_dinov2({"optim.base_lr": 1e-3}, OURS)
    assert not is_dinov2({"crops.local_size": 98, "model.name": "vits14_reg4"}, OURS)
    assert not is_dinov2({"steps": 3, "train.typo": 1}, OURS)
    assert not is_dinov2({"train": "images/train", "val": "images/val"}, OURS)


# What tells other projects' files from ours, with more keys that dinov2's files have, too, or nobody's.
FOREIGN = {
    "dinov3": """
        [{student: {arch: vit_large, patch_size: 16, pos_embed_type: rope, pos_embed_rope_base: 100.0}},
         {student: {arch: vit_base, n_storage_tokens: 4}, optim: {epochs: 100}},
         {gram: {use_loss: false}, train: {batch_size_per_gpu: 64}},
         {schedules: {lr: {start: 0, peak: 1.0e-3, end: 1.0e-6, warmup_epochs: 10}}, optim: {epochs: 100}},
         {multidistillation: {enabled: true, global_batch_size: 64}},
         {distillation: {enabled: true, full_cfg_path: a.yaml}, dino: {head_n_prototypes: 65536}},
         {crops: {global_crops_size: 256, gram_teacher_crops_size: 512}}]
    """,
    "neither dinoreg's nor dinov2's": """
        [{Collections: [{Name: MAE}], Models: [{Name: mae_vit-base}], _base_: [a.py], default_scope: mm},
         {config: {VERBOSE: false, DATA: {TRAIN: {BATCHSIZE_PER_REPLICA: 64}}, OPTIMIZER: {num_epochs: 300}}},
         {path: coco, train: images/train, val: images/val, names: {0: person, 1: bicycle}},
         {name: env, channels: [pytorch], dependencies: [python, pip]},
         {train: {bs: 3, iterations: 7, amp: true, log: 3}}]
    """,
}


@pytest.mark.parametrize("whose", FOREIGN)
def test_the_files_of_other_projects_are_refused_in_one_line(whose: str, tmp_path: Path) -> None:
    for content in yaml.safe_load(FOREIGN[whose]):
        path = tmp_path / "theirs.yaml"
        path.write_text(yaml.safe_dump(content))
        with pytest.raises(UserError) as caught:
            load_config(path)
        said = str(caught.value)
        assert whose in said
        assert said.startswith(f"config {path}: ")
        assert "\n" not in said


def test_a_fork_of_dinov2_with_some_keys_of_its_own_is_still_read(tmp_path: Path) -> None:
    path = tmp_path / "fork.yaml"
    path.write_text(
        "train: {batch_size_per_gpu: 8, augmentation: cells, wandb: true}\n"
        "student: {arch: vit_large_memeff, patch_size: 14}\ncrops: {local_crops_size: 98}\n"
    )
    assert load_config(path).model.name == "vitl14_reg0"


@pytest.mark.parametrize(("text", "clip"), [("optim: {base_lr: 1.0e-3}", 3.0), ("optim: {clip_grad: null}", None)])
def test_a_file_of_shared_keys_alone_is_ours_and_said_to_be(
    text: str, clip: float | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "shared.yaml"
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        config = load_config(path, ["steps=10"])
    assert (config.model, config.optim.clip_grad) == (Config().model, clip)
    assert [path.name in record.getMessage() for record in caplog.records] == [True]


def test_reading_such_a_file_says_once_what_became_of_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text(
        "student:\n  arch: vit_small\n  patch_size: 14\n  block_chunks: 2\ncrops:\n  local_crops_size: 98\n"
    )
    with caplog.at_level(logging.WARNING):
        config = load_config(path, ["batch_size=8"])
    assert (config.model.name, config.batch_size) == ("vits14_reg0", 8)
    assert len(caplog.records) == 1
    said = caplog.records[0].getMessage()
    assert "model.name = vits14_reg0" in said
    assert "no effect: student.block_chunks" in said


def test_a_budget_of_the_command_line_replaces_the_epochs(tmp_path: Path) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text("optim:\n  epochs: 50\n")
    assert load_config(path).steps == 62_500
    assert load_config(path, ["images=1000"]).steps is None
