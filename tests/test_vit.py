"""The encoder: against timm and transformers with the same random weights, and against its own definition."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peer_models import timm_model, transformers_model
from torch import Tensor, nn

from dinoreg.models.registry import SIZES
from dinoreg.models.vit import RegisterViT, resample_positions
from dinoreg.runtime.errors import UserError

os.environ["HF_HUB_OFFLINE"] = "1"

SMALL: dict[str, Any] = {"patch_size": 14, "dim": 384, "heads": 6, "image_size": 518}


def tiny(**options: Any) -> RegisterViT:
    """All dimensions different; every parameter far from its start value, so that none goes unnoticed."""
    arguments = {
        "image_size": (12, 20),
        "patch_size": 4,
        "dim": 24,
        "depth": 3,
        "heads": 2,
        "num_registers": 5,
        "in_channels": 2,
    }
    return randomised(RegisterViT(**(arguments | options)))


def randomised(model: RegisterViT, seed: int = 0) -> RegisterViT:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = model.dim**-0.5 if parameter.ndim > 1 and "token" not in name else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model.eval()


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("size", "ffn", "plain", "with_registers", "tensors"),
    [
        ("s", "mlp", 22_056_576, 22_058_112, 175),
        ("b", "mlp", 86_580_480, 86_583_552, 175),
        ("l", "mlp", 304_368_640, 304_372_736, 343),
        ("l", "swiglu", 304_794_880, 304_794_880 + 4 * 1024, 343),
        ("g", "swiglu", 1_136_480_768, 1_136_486_912, 567),
    ],
)
def test_parameter_and_tensor_counts_are_the_published_ones(
    size: str, ffn: str, plain: int, with_registers: int, tensors: int
) -> None:
    for registers, count, number in ((0, plain, tensors), (4, with_registers, tensors + 1)):
        options = SIZES[size] | {"ffn": ffn, "num_registers": registers, "image_size": 518, "patch_size": 14}
        with torch.device("meta"):
            model = RegisterViT(**options)
        assert sum(p.numel() for p in model.parameters()) == count
        assert len(model.state_dict()) == number


def test_large_at_patch_16_has_the_published_count() -> None:
    with torch.device("meta"):
        model = RegisterViT(**SIZES["l"], num_registers=0, image_size=224, patch_size=16)
    assert sum(p.numel() for p in model.parameters()) == 303_351_808


def test_shapes_can_be_worked_out_without_memory() -> None:
    with torch.device("meta"):
        model = RegisterViT(**SIZES["l"], checkpointing=True, drop_path=0.05).train()
        first, second = model([torch.empty(4, 3, 224, 224), torch.empty(3, 3, 98, 98)])
    assert (first.patches.shape, second.patches.shape) == ((4, 256, 1024), (3, 49, 1024))


# ------------------------------------------------------------------ independent implementations


def assert_equal_to_both(model: RegisterViT, sizes: list[tuple[int, int]], folder: Path) -> None:
    first, second = timm_model(model), transformers_model(model, folder)
    for size in sizes:
        x = images(1, 3, *size)
        with torch.no_grad():
            ours = torch.cat([part if part.ndim == 3 else part.unsqueeze(1) for part in model(x)], dim=1)
            assert ours.shape == (1, 1 + 4 + size[0] * size[1] // 196, model.dim)
            assert ours.std() > 0.3  # a comparison of something
            torch.testing.assert_close(first.forward_features(x), ours, rtol=0, atol=1e-5)
            torch.testing.assert_close(second(x).last_hidden_state, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_encoder_equals_timm_and_transformers(ffn: str, tmp_path: Path) -> None:
    model = randomised(RegisterViT(depth=2, ffn=ffn, **SMALL))
    assert_equal_to_both(model, [(224, 224), (98, 98), (224, 308), (518, 518)], tmp_path)


@pytest.mark.slow
def test_full_small_encoder_equals_timm_and_transformers(tmp_path: Path) -> None:
    assert_equal_to_both(randomised(RegisterViT(depth=12, **SMALL)), [(224, 308), (518, 518)], tmp_path)


def test_intermediate_layers_equal_timms() -> None:
    model = randomised(RegisterViT(depth=4, **SMALL))
    other = timm_model(model)
    x = images(2, 3, 56, 84)
    with torch.no_grad():
        for n in (1, 3, [0, 2], [2, 1]):
            ours = model.get_intermediate_layers(x, n, reshape=True, return_class_token=True)
            theirs = other.forward_intermediates(
                x,
                indices=n if isinstance(n, int) else sorted(n),
                norm=True,
                return_prefix_tokens=True,
                intermediates_only=True,
            )
            assert len(ours) == len(theirs) == (n if isinstance(n, int) else len(n))
            for (patches, cls), (their_patches, their_prefix) in zip(ours, theirs):
                assert patches.shape == (2, 384, 4, 6)
                torch.testing.assert_close(patches, their_patches, rtol=0, atol=1e-5)
                torch.testing.assert_close(cls, their_prefix[:, 0], rtol=0, atol=1e-5)


# ------------------------------------------------------------------ embedding


def test_masked_patches_carry_the_mask_token_and_their_position() -> None:
    model = tiny()
    x = images(2, 2, 12, 20)
    mask = torch.zeros(2, 15, dtype=torch.bool)
    mask[0, [3, 7]] = True
    clean, hidden = model.embed(x), model.embed(x, mask)
    assert hidden.shape == (2, 1 + 5 + 15, 24)
    for patch in range(15):
        for image in range(2):
            if mask[image, patch]:
                expected = model.mask_token[0] + model.pos_embed[0, 1 + patch]
            else:
                expected = clean[image, 6 + patch]
            torch.testing.assert_close(hidden[image, 6 + patch], expected)
    torch.testing.assert_close(hidden[1, 0], model.cls_token[0, 0] + model.pos_embed[0, 0])
    assert torch.equal(hidden[0, 1:6], model.register_tokens[0])  # type: ignore[index]
    torch.testing.assert_close(clean[:, 6:], model.patch_embed(x) + model.pos_embed[:, 1:])


def test_registers_take_part_and_zero_registers_leave_no_key() -> None:
    model = tiny()
    x = images(2, 2, 12, 20)
    before = model(x).cls
    with torch.no_grad():
        model.register_tokens.neg_()  # type: ignore[union-attr]
    assert not torch.allclose(before, model(x).cls, atol=1e-3)
    without = tiny(num_registers=0)
    assert "register_tokens" not in without.state_dict()
    assert without(x).registers.shape == (2, 0, 24)


@pytest.mark.parametrize(("antialias", "offset"), [(True, 0.0), (False, 0.1)])
def test_positions_at_the_native_grid_are_returned_untouched(antialias: bool, offset: float) -> None:
    positions = images(1, 15, 6)
    assert resample_positions(positions, (3, 5), (3, 5), antialias, offset) is positions
    turned = resample_positions(positions, (3, 5), (5, 3), antialias, offset)
    assert turned.shape == (1, 15, 6)  # as many patches, another shape: resampled
    assert not torch.allclose(turned, positions, atol=1e-2)


@pytest.mark.parametrize(("antialias", "offset"), [(True, 0.0), (False, 0.1)])
def test_positions_reach_every_grid_that_is_known_to_break(antialias: bool, offset: float) -> None:
    for side, patch, sizes in (
        (37, 14, (546, 602, 1092, 1204, 1610, 1722)),
        (14, 16, (976, 1840, 1952)),
    ):
        positions = images(1, side * side, 2)
        for size in sizes:
            target = (size // patch, size // patch)
            resampled = resample_positions(positions, (side, side), target, antialias, offset)
            assert resampled.shape == (1, target[0] * target[1], 2)


def test_both_resampling_behaviours_are_bicubic_interpolation_of_the_grid() -> None:
    positions = images(1, 16 * 16, 3)
    grid = positions.view(16, 16, 3).permute(2, 0, 1).unsqueeze(0)
    by_size = nn.functional.interpolate(grid, size=(7, 9), mode="bicubic", antialias=True)
    by_scale = nn.functional.interpolate(grid, scale_factor=(7.1 / 16, 9.1 / 16), mode="bicubic")
    for options, expected in (((True, 0.0), by_size), ((False, 0.1), by_scale)):
        ours = resample_positions(positions, (16, 16), (7, 9), *options)
        torch.testing.assert_close(ours, expected.flatten(2).transpose(1, 2))
    assert not torch.allclose(by_size, by_scale, atol=0.05)


@pytest.mark.parametrize(("antialias", "offset"), [(True, 0.0), (False, 0.1)])
def test_the_weights_of_resampling_and_its_gradient_are_those_of_pytorch_s_kernel(
    antialias: bool, offset: float
) -> None:
    for side, target in ((16, (7, 7)), (37, (16, 16)), (37, (7, 9)), (14, (6, 6)), (7, (16, 20)), (5, (5, 3))):
        identity = torch.eye(side * side)[None].requires_grad_()  # what comes out are the weights
        image = identity.view(side, side, -1).permute(2, 0, 1)[None]
        scale = [(new + offset) / side for new in target]
        size = {"scale_factor": scale} if offset else {"size": target}
        kernel = nn.functional.interpolate(image, mode="bicubic", antialias=antialias, **size)  # type: ignore[arg-type]
        expected = kernel.flatten(2).transpose(1, 2)
        weights = resample_positions(identity, (side, side), target, antialias, offset)
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)
        back = images(*expected.shape)
        ours, theirs = (torch.autograd.grad((out * back).sum(), identity)[0] for out in (weights, expected))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_model_that_has_seen_a_size_in_inference_mode_trains_on_it() -> None:
    model = tiny()
    with torch.inference_mode():
        model(images(1, 2, 4, 4))
    model(images(1, 2, 4, 4)).patches.sum().backward()
    assert model.pos_embed.grad is not None


def test_positions_are_resampled_in_float32_and_returned_in_their_dtype() -> None:
    positions = images(1, 16, 3)
    low = resample_positions(positions.bfloat16(), (4, 4), (6, 5))
    assert low.dtype == torch.bfloat16
    exact = resample_positions(positions.bfloat16().float(), (4, 4), (6, 5))
    assert torch.equal(low, exact.bfloat16())


def test_a_rectangular_position_grid_knows_rows_from_columns() -> None:
    model = tiny()
    assert model.grid == (3, 5)
    with torch.no_grad():  # positions that say their row; patches that say nothing
        model.patch_embed.proj.weight.zero_()
        model.patch_embed.proj.bias.zero_()  # type: ignore[union-attr]
        model.pos_embed[0, 1:] = torch.arange(15).div(5, rounding_mode="floor").float().unsqueeze(1)
    rows = model.embed(images(1, 2, 12, 40))[0, 6:, 0].view(3, 10)
    torch.testing.assert_close(rows, torch.arange(3.0).unsqueeze(1).expand(3, 10), rtol=0, atol=1e-5)


# ------------------------------------------------------------------ packed crops


@pytest.mark.parametrize("backend", ["auto", "plain", "sdpa"])
@pytest.mark.parametrize("training", [False, True])
def test_a_packed_list_equals_separate_forwards(backend: str, training: bool) -> None:
    model = tiny(attention=backend).train(training)
    groups = [images(4, 2, 12, 20), images(3, 2, 8, 8, seed=2), images(2, 2, 16, 4, seed=3)]
    mask = images(4, 15, seed=4) > 0.3
    for masks in (None, [mask, None, None]):
        packed = model(groups, masks)
        for i, group in enumerate(groups):
            alone = model(group, masks[i] if masks else None)
            for name, ours, theirs in zip(alone._fields, packed[i], alone):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=name)
    assert not torch.allclose(model(groups)[0].cls, packed[0].cls, atol=1e-3)  # the mask did something


def test_packed_gradients_equal_those_of_separate_forwards() -> None:
    model = tiny().train()
    groups = [images(4, 2, 12, 20), images(3, 2, 8, 8, seed=2)]
    mask = images(4, 15, seed=4) > 0.3

    def gradients(outputs: list[Any]) -> list[Tensor]:
        model.zero_grad()
        sum((o.cls.square().sum() + o.patches.cos().sum()) for o in outputs).backward()  # type: ignore[union-attr]
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    packed = gradients(model(groups, [mask, None]))
    separate = gradients([model(groups[0], mask), model(groups[1])])
    assert len(packed) == len(list(model.parameters()))
    torch.testing.assert_close(packed, separate, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.4])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_tokens_that_are_asked_for_are_those_of_the_whole_output_and_so_are_the_gradients(
    ffn: str, rate: float
) -> None:
    """In float64, so that the order of sums does not count; the same samples are dropped both times."""
    groups = [images(3, 2, 12, 20), images(7, 2, 8, 8, seed=2), images(2, 2, 4, 8, seed=3)]
    mask = torch.rand(3, 15, generator=torch.Generator().manual_seed(3)) < 0.5
    asked = [torch.tensor([44, 0, 17, 15, 3]), torch.tensor([], dtype=torch.long), torch.tensor([3])]
    found = []
    for chosen in (True, False):
        model = tiny(ffn=ffn, drop_path=rate).double().train()
        torch.manual_seed(5)
        inputs, masks = [group.double() for group in groups], [mask, None, None]
        if chosen:
            pairs = [(tokens.cls, tokens.patches) for tokens in model(inputs, masks, asked)]
        else:
            outputs = zip(model(inputs, masks), asked, strict=True)
            pairs = [(tokens.cls, tokens.patches.flatten(0, 1)[numbers]) for tokens, numbers in outputs]
        flat = [tensor for pair in pairs for tensor in pair]
        sum((i + 1) * tensor.sin().sum() for i, tensor in enumerate(flat)).backward()
        found.append((flat, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)
    assert [len(tensor) for tensor in found[0][0]] == [3, 5, 7, 0, 2, 1]


def test_the_last_ffn_runs_on_what_is_asked_for_and_no_other_does() -> None:
    model = tiny()
    seen: list[int] = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    model([images(3, 2, 12, 20), images(2, 2, 8, 8)], None, [torch.tensor([1, 40]), torch.tensor([7])])
    everything = 3 * 21 + 2 * 10
    assert seen == [everything, everything, 3 + 2 + 2 + 1]


def test_a_list_and_masks_of_different_lengths_are_refused() -> None:
    with pytest.raises(UserError, match="1 groups of images came with 2 masks"):
        tiny()([images(1, 2, 12, 20)], [None, None])


# ------------------------------------------------------------------ training options


@pytest.mark.parametrize("packed", [False, True])
def test_checkpointing_gives_the_same_outputs_and_gradients_under_stochastic_depth(packed: bool) -> None:
    results = []
    for checkpointing in (False, True):
        model = tiny(checkpointing=checkpointing, drop_path=0.4).train()
        torch.manual_seed(5)
        x = images(6, 2, 12, 20)
        output = model([x, x[:, :, :8, :8]])[0] if packed else model(x)
        (output.cls.square().sum() + output.patches.cos().sum()).backward()
        grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        results.append((output.cls, grads))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_stochastic_depth_rates_are_uniform_or_grow_linearly() -> None:
    assert [b.drop_path for b in tiny(drop_path=0.3).blocks] == [0.3, 0.3, 0.3]
    assert [b.drop_path for b in tiny(drop_path=0.3, drop_path_uniform=False).blocks] == [0.0, 0.15, 0.3]


def test_stochastic_depth_is_off_in_evaluation() -> None:
    x = images(4, 2, 12, 20)
    torch.testing.assert_close(tiny(drop_path=0.5)(x), tiny()(x))
    dropped = tiny(drop_path=0.5).train()
    assert not torch.allclose(dropped(x).cls, dropped(x).cls)


def test_bfloat16_autocast_trains_float32_parameters_on_a_cpu() -> None:
    model = tiny(drop_path=0.4).train()
    groups = [images(4, 2, 12, 20), images(3, 2, 8, 8)]
    mask = images(4, 15) > 0.3
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(groups, [mask, None])
    sum(o.cls.float().square().sum() + o.patches.float().cos().sum() for o in outputs).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()
    exact = tiny()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = exact(groups[0]).patches
    with torch.no_grad():
        full = exact(groups[0]).patches
    assert (low - full).norm() < 0.02 * full.norm()


def test_a_bfloat16_model_runs_as_it_is() -> None:
    model = tiny().bfloat16()
    output = model(images(2, 2, 8, 12))
    assert output.patches.dtype == torch.bfloat16
    reference = tiny()(images(2, 2, 8, 12)).patches
    assert (output.patches.float() - reference).norm() < 0.03 * reference.norm()


def test_start_values_follow_the_method() -> None:
    torch.manual_seed(0)
    model = RegisterViT(image_size=28, dim=192, depth=2, heads=3, init_std=0.05)
    state = model.state_dict()
    assert state["blocks.1.mlp.fc1.weight"].std().item() == pytest.approx(0.05, rel=0.02)
    assert state["blocks.0.attn.qkv.bias"].abs().max() == 0
    assert state["register_tokens"].std().item() == pytest.approx(1e-6, rel=0.2)
    assert state["cls_token"].std().item() == pytest.approx(1e-6, rel=0.2)
    assert state["pos_embed"].std().item() == pytest.approx(0.02, rel=0.1)
    assert state["mask_token"].abs().max() == 0
    bound = (3 * 14 * 14) ** -0.5  # a convolution's own start
    assert 0.99 * bound < state["patch_embed.proj.weight"].abs().max() <= bound
    assert set(state["blocks.0.ls1.gamma"].tolist()) == {torch.tensor(1e-5).item()}


def test_architecture_survives_json_and_rebuilds_the_model() -> None:
    model = tiny(ffn="swiglu", layerscale=None, antialias=False, position_offset=0.1, drop_path=0.2)
    described = json.loads(json.dumps(model.architecture()))
    rebuilt = RegisterViT(**described, drop_path=0.1, attention="sdpa", checkpointing=True)
    rebuilt.load_state_dict(model.state_dict())
    assert rebuilt.architecture() == described
    x = images(2, 2, 8, 12)
    torch.testing.assert_close(rebuilt.eval()(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 30}, "image_size 30x30 is not a multiple of patch_size 14"),
        ({"heads": 5}, "dim=384 does not divide into heads=5"),
        ({"ffn": "glu"}, "ffn='glu' is not known; expected one of mlp, swiglu"),
        ({"drop_path": 1.0}, "drop_path=1.0 is not a probability below 1"),
        ({"attention": "fast"}, "attention='fast' is not a backend"),
        ({"image_size": (28, 28, 28)}, "expected a positive integer or"),
        ({"num_registers": -1}, "num_registers=-1"),
    ],
)
def test_impossible_architectures_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        RegisterViT(**options)
    assert "\n" not in str(caught.value)


def test_image_sizes_that_do_not_divide_and_wrong_masks_are_refused() -> None:
    with pytest.raises(UserError, match="image size 12x22 is not a multiple of the patch size 4"):
        tiny()(images(1, 2, 12, 22))
    with pytest.raises(UserError, match=r"mask is torch.bool of shape \(1, 14\); expected bool \(1, 15\)"):
        tiny()(images(1, 2, 12, 20), torch.zeros(1, 14, dtype=torch.bool))


# ------------------------------------------------------------------ looking inside


@pytest.mark.parametrize("backend", ["plain", "sdpa"])
@pytest.mark.parametrize("layer", [0, 1, -1])
def test_attention_weights_sum_to_one_and_reproduce_the_blocks_output(backend: str, layer: int) -> None:
    model = tiny(attention=backend)
    x = images(2, 2, 8, 12)
    captured: list[Tensor] = []
    attn = model.blocks[layer].attn
    handle = attn.proj.register_forward_pre_hook(lambda m, args: captured.append(args[0]))  # type: ignore[union-attr]
    model(x)
    handle.remove()
    weights = model.attention(x, layer)
    assert weights.shape == (2, 2, 12, 12)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 12))
    _, _, v = model.qkv(x, layer)
    assert v.shape == (2, 2, 12, 12)
    mixed = (weights @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixed, captured[0].unflatten(0, (2, 12)), rtol=1e-5, atol=1e-5)


def test_keys_are_the_second_third_of_the_qkv_output() -> None:
    model = tiny()
    x = images(2, 2, 8, 12)
    captured: list[Tensor] = []
    qkv = model.blocks[-1].attn.qkv  # type: ignore[union-attr]
    handle = qkv.register_forward_hook(lambda m, args, output: captured.append(output))  # type: ignore[union-attr]
    model(x)
    handle.remove()
    flat = captured[0].unflatten(0, (2, 12))
    for part, tensor in enumerate(model.qkv(x)):
        joined = tensor.transpose(1, 2).flatten(2)
        torch.testing.assert_close(joined, flat[..., part * 24 : (part + 1) * 24])


def test_prenorm_tokens_give_the_output_after_the_final_norm() -> None:
    model = tiny()
    x = images(2, 2, 8, 12)
    tokens = model.prenorm(x)
    assert tokens.shape == (2, 12, 24)
    output = model(x)
    torch.testing.assert_close(
        model.norm(tokens), torch.cat([output.cls.unsqueeze(1), output.registers, output.patches], dim=1)
    )


def test_intermediate_layers_follow_metas_meaning() -> None:
    model = tiny()
    x = images(2, 2, 8, 12)
    (last,) = model.get_intermediate_layers(x)
    torch.testing.assert_close(last, model(x).patches)
    (patches, cls), *_ = model.get_intermediate_layers(x, [2], return_class_token=True)
    torch.testing.assert_close((patches, cls), (model(x).patches, model(x).cls))
    raw = model.get_intermediate_layers(x, [2, 0], norm=False)
    assert len(raw) == 2
    torch.testing.assert_close(raw[1], model.prenorm(x)[:, 6:])  # block order, whatever the list's
    (grid,) = model.get_intermediate_layers(x, 1, reshape=True)
    assert grid.shape == (2, 24, 2, 3)
    torch.testing.assert_close(grid[:, :, 1, 2], last[:, 5])
    for wrong in (0, 4, [3], []):
        with pytest.raises(UserError):
            model.get_intermediate_layers(x, wrong)
    with pytest.raises(UserError, match="layer 3 is out of range: the model has 3 blocks"):
        model.attention(x, 3)


def test_tokens_are_shown_by_their_shapes() -> None:
    model = RegisterViT(image_size=(16, 24), patch_size=8, dim=12, depth=1, heads=3, num_registers=2)
    shown = repr(model(torch.zeros(5, 3, 16, 24)))
    assert shown == "Tokens(cls=(5, 12), registers=(5, 2, 12), patches=(5, 6, 12))"
