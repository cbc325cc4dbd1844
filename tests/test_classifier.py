"""The supervised register ViT."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinoreg.models.classifier import VitRGTS
from dinoreg.runtime.errors import UserError


def tiny(**options: object) -> VitRGTS:
    torch.manual_seed(0)
    arguments = {
        "image_size": (12, 8),
        "patch_size": 4,
        "num_classes": 3,
        "dim": 20,
        "depth": 2,
        "heads": 2,
        "mlp_dim": 28,
        "dim_head": 12,
    }
    return VitRGTS(**(arguments | options))  # type: ignore[arg-type]


def test_the_documented_call_gives_a_logit_for_each_class() -> None:
    with torch.device("meta"):
        model = VitRGTS(
            image_size=256,
            patch_size=32,
            num_classes=1000,
            dim=1024,
            depth=6,
            heads=16,
            mlp_dim=2048,
            dropout=0.1,
            emb_dropout=0.1,
        )
        assert model(torch.empty(2, 3, 256, 256)).shape == (2, 1000)
    assert model.register_tokens.shape == (1, 4, 1024)


def stripes(count: int) -> tuple[Tensor, Tensor]:
    """Images of three kinds: bright top, bright bottom, bright left."""
    generator = torch.Generator().manual_seed(0)
    images = 0.3 * torch.randn(count, 3, 12, 8, generator=generator)
    labels = torch.arange(count) % 3
    images[labels == 0, :, :6] += 1
    images[labels == 1, :, 6:] += 1
    images[labels == 2, :, :, :4] += 1
    return images, labels


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_it_learns_a_separable_problem_and_its_registers_take_part(pool: str) -> None:
    model = tiny(pool=pool, dropout=0.05, emb_dropout=0.05).train()
    images, labels = stripes(48)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(240):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.9
    assert losses[-1] < 0.2
    assert model.register_tokens.grad is not None
    assert (model.register_tokens.grad.norm(dim=-1) > 0).all()
    model.eval()
    assert (model(images).argmax(1) == labels).float().mean() > 0.95


def test_pooling_reads_the_class_token_or_the_patches_but_never_the_registers() -> None:
    for pool, tokens in (("cls", slice(0, 1)), ("mean", slice(5, None))):
        model = tiny(pool=pool).eval()
        captured: list[Tensor] = []
        model.norm.register_forward_hook(lambda m, args, out, seen=captured: seen.append(out))
        logits = model(torch.randn(2, 3, 12, 8))
        sequence = captured[0].unflatten(0, (2, 1 + 4 + 6))
        torch.testing.assert_close(logits, model.head(sequence[:, tokens].mean(1)))


def test_dropout_acts_in_training_only() -> None:
    x = torch.randn(2, 3, 12, 8)
    for options in ({"dropout": 0.5}, {"emb_dropout": 0.5}):
        model = tiny(**options)
        assert not torch.equal(model.train()(x), model(x))
        torch.testing.assert_close(model.eval()(x), tiny().eval()(x))


def test_channels_and_registers_are_free() -> None:
    model = tiny(channels=5, num_register_tokens=0)
    assert model(torch.randn(2, 5, 12, 8)).shape == (2, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 13}, "image_size 13x13 is not a multiple of patch_size 4"),
        ({"pool": "max"}, "pool='max' is not known"),
        ({"num_register_tokens": -1}, "num_register_tokens=-1"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny(**options)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(UserError, match=r"images are \(8, 12\) pixels, the model is for \(12, 8\)"):
        tiny()(torch.randn(1, 3, 8, 12))
