"""Test-time registers: they find the planted unit, move it, and leave everything else alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from planted import BLOCK, UNIT, patchy_images, planted_vit
from torch import Tensor

from dinoreg.evaluation.backbones.encoder import NativeEncoder, wrap
from dinoreg.models.vit import RegisterViT
from dinoreg.registers.test_time import (
    RegisterNeuron,
    fit_test_time_register,
    register_neurons,
    with_test_time_register,
)
from dinoreg.runtime.errors import UserError

PLANTED = [RegisterNeuron(BLOCK, UNIT, 1.0)]


def prepared(model: RegisterViT, count: int = 6) -> tuple[NativeEncoder, Tensor, Tensor]:
    encoder = wrap(model, "planted")
    assert isinstance(encoder, NativeEncoder)
    images, flat = patchy_images(count)
    return encoder, encoder.prepare(images), flat


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_the_planted_unit_is_the_first_register_neuron(ffn: str) -> None:
    encoder, images, flat = prepared(planted_vit(ffn=ffn))
    found = register_neurons(encoder.module, [images[:4], images[4:]], [flat[:4], flat[4:]], BLOCK, 5)
    assert (found[0].block, found[0].unit) == (BLOCK, UNIT)
    assert len(found) == 5
    assert found[0].score > 5 * found[1].score > 0


def test_scores_equal_the_difference_of_mean_activations() -> None:
    encoder, images, flat = prepared(planted_vit())
    found = register_neurons(encoder.module, [images], [flat], 0, 48 * 4)
    block = encoder.module.blocks[0]
    with torch.no_grad():
        x = encoder.module.embed(images)
        shape = x.shape[:2]
        flat_x = x.flatten(0, 1)
        flat_x = flat_x + block.attn(block.norm1(flat_x), (tuple(shape),), ("plain",))
        hidden = F.gelu(block.mlp.fc1(block.norm2(flat_x))).unflatten(0, shape)[:, 1:]
    for neuron in found[:3]:
        values = hidden[..., neuron.unit].abs()
        assert neuron.score == pytest.approx(float(values[flat].mean() - values[~flat].mean()), abs=1e-5)


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_the_added_token_takes_the_norm_and_the_patches_are_clean(ffn: str) -> None:
    model = planted_vit(ffn=ffn)
    _, images, flat = prepared(model)
    before = model.prenorm(images)[:, 1:].norm(dim=-1)
    changed = with_test_time_register(model, PLANTED)
    after = changed.prenorm(images)
    assert type(changed) is RegisterViT
    assert float(before[flat].median()) > 3 * float(before[~flat].median())
    assert float(after[:, 2:].norm(dim=-1).max()) < 1.5 * float(before[~flat].median())
    assert float(after[:, 1].norm(dim=-1).min()) > 3 * float(before[~flat].median())


def test_the_model_given_is_left_as_it_is_and_shares_its_weights() -> None:
    model = planted_vit()
    _, images, _ = prepared(model)
    before = model(images)
    changed = with_test_time_register(model, PLANTED, num_registers=2)
    changed(images)
    torch.testing.assert_close(model(images).patches, before.patches, rtol=0, atol=0)
    assert model.num_registers == 0
    assert changed.num_registers == 2
    assert changed.blocks[0].mlp.fc1.weight.data_ptr() == model.blocks[0].mlp.fc1.weight.data_ptr()
    assert changed(images).registers.shape == (6, 2, 48)


def test_without_neurons_it_is_the_model_with_a_token_of_zeros() -> None:
    model = planted_vit(norm=0)
    _, images, _ = prepared(model)
    plain = RegisterViT(**(model.architecture() | {"num_registers": 1})).eval()
    plain.load_state_dict(model.state_dict() | {"register_tokens": torch.zeros(1, 1, 48)})
    changed = with_test_time_register(model, [])
    torch.testing.assert_close(changed(images).cls, plain(images).cls)


def test_every_view_of_the_changed_model_agrees() -> None:
    model = with_test_time_register(planted_vit(), PLANTED)
    _, images, _ = prepared(planted_vit(), 3)
    tokens = model(images)
    layer = model.intermediate_tokens(images, [model.depth - 1])[0]
    torch.testing.assert_close(layer.patches, tokens.patches)
    packed = model([images, images[:2, :, :32, :48]])
    torch.testing.assert_close(packed[0].patches, tokens.patches)
    torch.testing.assert_close(packed[1].cls, model(images[:2, :, :32, :48]).cls)
    weights = model.attention(images)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones_like(weights[..., 0]))


def test_attention_leaves_the_outliers_for_the_register() -> None:
    model = planted_vit()
    _, images, flat = prepared(model)
    before = model.attention(images).mean(dim=1)[:, 0]  # (B, T) of the class token
    after = with_test_time_register(model, PLANTED).attention(images).mean(dim=1)[:, 0]
    assert float(before[:, 1:][flat].sum()) / 6 > 0.5
    assert float(after[:, 2:][flat].sum()) / 6 < 0.25
    assert float(after[:, 1].mean()) > 0.2


def test_the_search_stops_at_the_fewest_neurons_that_clear_the_outliers() -> None:
    model = planted_vit()
    _, images, flat = prepared(model)
    _, found = fit_test_time_register(model, [images[:3], images[3:]], [flat[:3], flat[3:]], 16.0, BLOCK)
    (trial,) = found["trials"]
    assert trial["neurons"] == 1
    assert trial["share"] == 0
    assert trial["patch_cosine"] > 0.99
    assert found["before"] == pytest.approx(float(flat.float().mean()))
    assert [(neuron["block"], neuron["unit"]) for neuron in found["neurons"]] == [(BLOCK, UNIT)]


def test_a_search_that_fails_keeps_its_best_and_shows_all_it_tried() -> None:
    model = planted_vit()
    _, images, flat = prepared(model)
    _, found = fit_test_time_register(model, [images], [flat], 16.0, 0, counts=(1, 3))  # too early a block
    assert [trial["neurons"] for trial in found["trials"]] == [1, 3]
    assert min(trial["share"] for trial in found["trials"]) > 0.5 * found["before"]


def test_what_cannot_be_done_is_refused_in_words() -> None:
    model = planted_vit()
    _, images, flat = prepared(model)
    with pytest.raises(UserError, match="has 2 registers"):
        with_test_time_register(planted_vit(registers=2), PLANTED)
    with pytest.raises(UserError, match="block 9 is out of range"):
        with_test_time_register(model, [RegisterNeuron(9, 0, 1.0)])
    with pytest.raises(UserError, match="unit 500 is out of range"):
        with_test_time_register(model, [RegisterNeuron(0, 500, 1.0)])
    with pytest.raises(UserError, match="outlier patches"):
        register_neurons(model, [images], [torch.zeros_like(flat)], 1, 3)
