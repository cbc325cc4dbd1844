"""The encoder contract: native, timm and transformers backbones with one face, and the pixels as a baseline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from encoders import small_encoder, small_vit
from peer_models import timm_model, transformers_model
from torch import Tensor
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from dinoreg.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from dinoreg.evaluation.backbones.encoder import Encoder, PixelEncoder, wrap
from dinoreg.models.vit import RegisterViT
from dinoreg.runtime.errors import UserError


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 32, 48)


def others() -> list[Encoder]:
    """A timm and a transformers backbone, patch 8."""
    torch.manual_seed(1)
    theirs = timm.create_model(
        "vit_small_patch14_reg4_dinov2",
        img_size=32,
        patch_size=8,
        embed_dim=64,
        depth=3,
        num_heads=2,
        dynamic_img_size=True,
        num_classes=0,
        init_values=1.0,
    )
    config = Dinov2WithRegistersConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8, num_register_tokens=4
    )
    return [wrap(theirs), wrap(Dinov2WithRegistersModel(config))]


@pytest.mark.parametrize("encoder", [small_encoder(), *others(), PixelEncoder(8, (32, 32))], ids=lambda e: e.name)
def test_every_encoder_keeps_the_contract(encoder: Encoder, images: Tensor) -> None:
    tokens = encoder.tokens(images)
    assert tokens.patches.shape[:2] == (3, 24)
    assert tokens.registers.shape[:2] == (3, encoder.num_registers)
    assert tokens.cls.ndim == 2
    assert all(part.dtype == torch.float32 for part in tokens)
    for name, part in encoder.qkv(images).items():
        assert name in ("query", "key", "value")
        assert part.shape[:2] == (3, 24)
    first, last = encoder.layers(images, (0, -1))
    torch.testing.assert_close(last.patches, tokens.patches)
    assert first.patches.shape == last.patches.shape
    assert encoder.grid(32, 48) == (4, 6)
    assert not any(part.requires_grad for part in tokens)
    repeated = encoder.layers(images, (-1, 0, -1))
    torch.testing.assert_close(repeated[0].cls, repeated[2].cls)


@pytest.mark.parametrize("encoder", [small_encoder(), *others()], ids=lambda e: type(e).__name__)
def test_a_random_twin_has_other_weights_that_depend_on_the_seed_alone(encoder: Encoder, images: Tensor) -> None:
    state = torch.random.get_rng_state()
    twin, same, other = encoder.random_init(1), encoder.random_init(1), encoder.random_init(2)
    assert torch.equal(state, torch.random.get_rng_state())
    assert len({encoder.identity, twin.identity, other.identity}) == 3
    assert twin.identity == same.identity
    torch.testing.assert_close(twin.tokens(images).cls, same.tokens(images).cls)
    assert not torch.allclose(twin.tokens(images).cls, encoder.tokens(images).cls)


def test_tokens_are_those_of_the_model_on_normalised_pixels(images: Tensor) -> None:
    model = small_vit()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        expected = model((images - mean) / std)
    found = wrap(model).tokens(images)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs)
    pixels = (images * 255).round().to(torch.uint8)
    torch.testing.assert_close(wrap(model).tokens(pixels).cls, wrap(model).tokens(pixels.float() / 255).cls)


def test_a_middle_block_equals_a_model_cut_there(images: Tensor) -> None:
    model = small_vit(depth=3)
    cut = RegisterViT(**(model.architecture() | {"depth": 2})).eval()
    cut.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("blocks.2.")})
    torch.testing.assert_close(wrap(model).layers(images, (1,))[0].patches, wrap(cut).tokens(images).patches)


def test_raw_keys_are_the_projections_of_the_normed_input_of_the_last_block(images: Tensor) -> None:
    model = small_vit()
    encoder = wrap(model)
    with torch.no_grad():
        before = model.blocks[1].norm1(
            torch.cat(model.intermediate_tokens(encoder.prepare(images), [0], False)[0][1:], 1)
        )
        weight, bias = model.blocks[1].attn.qkv.weight[64:128], model.blocks[1].attn.qkv.bias[64:128]
        expected = (before @ weight.T + bias)[:, 4:]
    torch.testing.assert_close(encoder.qkv(images)["key"], expected)


def test_pixel_tokens_are_the_pixels_of_their_patch(images: Tensor) -> None:
    encoder = PixelEncoder(8, (32, 32))
    normalised = (images - 0.5) / 0.25
    patches = encoder.tokens(images).patches
    torch.testing.assert_close(patches[1, 7].view(3, 8, 8), normalised[1, :, 8:16, 8:16])
    small = encoder.tokens(images[:, :, :, :32])
    torch.testing.assert_close(small.cls, normalised[:, :, :, :32].flatten(1))


def test_bad_images_blocks_and_models_are_refused_in_one_line(images: Tensor) -> None:
    encoder = small_encoder()
    with pytest.raises(UserError, match=r"32, 44\), expected .* multiples of the patch size 8"):
        encoder.tokens(images[:, :, :, :44])
    with pytest.raises(UserError, match=r"expected \(B, 3, H, W\)"):
        encoder.tokens(images[:, :2])
    with pytest.raises(UserError, match="block 5 is out of range"):
        encoder.layers(images, (5,))
    with pytest.raises(UserError, match="Linear: expected a RegisterViT"):
        wrap(torch.nn.Linear(2, 3))


def test_identity_follows_weights_and_preprocessing_only() -> None:
    model = small_vit()
    assert wrap(model).identity == wrap(model, "another name").identity
    assert wrap(model).identity != wrap(model, stated={"mean": [0.5]}).identity
    with torch.no_grad():
        model.cls_token[0, 0, 0] += 1e-3
    assert wrap(model).identity != wrap(small_vit()).identity


def test_the_default_size_is_224_or_what_the_model_saw() -> None:
    assert small_encoder().default_size == 32
    assert PixelEncoder(14, (518, 518)).default_size == 224
    assert PixelEncoder(16, (40, 60)).default_size == 32


def test_a_native_model_and_the_same_weights_elsewhere_give_the_same_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = RegisterViT(
        image_size=32, patch_size=8, dim=64, depth=2, heads=2, num_registers=4, layerscale=1.0, antialias=True
    ).eval()
    pictures = torch.from_numpy(np.random.default_rng(0).random((2, 3, 32, 32), np.float32))
    for theirs in (wrap(timm_model(ours)), wrap(transformers_model(ours, tmp_path))):
        for a, b in zip(wrap(ours).tokens(pictures), theirs.tokens(pictures)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        for block in (0, 1):
            for a, b in zip(wrap(ours).qkv(pictures, block).values(), theirs.qkv(pictures, block).values()):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            for norm in (True, False):
                (a,), (b,) = (each.layers(pictures, (block,), norm) for each in (wrap(ours), theirs))
                torch.testing.assert_close(a.patches, b.patches, rtol=1e-5, atol=1e-5)
