"""What autograd keeps, by formula, against what it is seen to keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dinoreg.models.heads import PrototypeHead
from dinoreg.models.vit import RegisterViT
from dinoreg.plan.activations import RESIDUAL, encoder_bytes, head_bytes, num_tokens
from dinoreg.plan.flops import Encoder

FP32, BF16 = torch.float32, torch.bfloat16


def saved_bytes(work: Callable[[], Any], parameters: list[Tensor]) -> int:
    """Bytes of all storages that autograd saves while `work` runs, parameters left out."""
    known = {parameter.untyped_storage()._cdata for parameter in parameters}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = tensor  # holding it keeps its address from being used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = work()
        total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del out
    return total


# (dim, depth, heads, patch_size, num_registers, ffn, layerscale)
NETWORKS = [
    (64, 2, 2, 16, 4, "mlp", 1e-5),
    (96, 3, 3, 16, 4, "swiglu", 1e-5),
    (128, 1, 2, 8, 1, "mlp", None),
    (192, 4, 3, 16, 0, "mlp", 1.0),
]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["sdpa", "plain"])
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("asked", [None, ([0, 3, 7, 11, 90], [])], ids=["all", "some"])
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: "-".join(map(str, network)))
def test_a_backbone_keeps_what_the_formula_says(
    network: tuple[Any, ...],
    asked: tuple[list[int], ...] | None,
    checkpointing: bool,
    rate: float,
    attention: str,
    dtype: torch.dtype,
) -> None:
    dim, depth, heads, patch_size, num_registers, ffn, layerscale = network
    model = RegisterViT(
        image_size=64,
        patch_size=patch_size,
        dim=dim,
        depth=depth,
        heads=heads,
        num_registers=num_registers,
        ffn=ffn,
        layerscale=layerscale,
        drop_path=rate,
        attention=attention,
        checkpointing=checkpointing,
    ).train()
    images = [torch.randn(6, 3, 64, 64), torch.randn(12, 3, 32, 32)]
    masks = [torch.zeros(6, model.grid[0] ** 2, dtype=torch.bool), None]

    def forward() -> Any:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != FP32):
            return model(images, masks, patches)

    patches = None if asked is None else [torch.tensor(numbers, dtype=torch.long) for numbers in asked]
    encoder = Encoder(dim, depth, patch_size, num_registers, ffn, heads=heads, layerscale=layerscale is not None)
    groups = [(6, 64), (12, 32)]
    chosen = None if asked is None else 6 + 12 + 5
    found = encoder_bytes(
        encoder, groups, dtype.itemsize, attention, [rate] * depth, chosen=chosen, checkpointing=checkpointing
    )
    # The output lives because the tokens are views of it, not because autograd saves it.
    whole = num_tokens(tuple((count, encoder.tokens(size)) for count, size in groups))
    output = RESIDUAL * dim * (whole if chosen is None else chosen)
    assert found.total - output == saved_bytes(forward, list(model.parameters()))


def test_each_block_counts_with_its_own_rate_of_stochastic_depth() -> None:
    model = RegisterViT(image_size=32, patch_size=8, dim=64, depth=3, heads=2, drop_path=0.5, drop_path_uniform=False)
    rates = [block.drop_path for block in model.blocks]
    assert rates == [0.0, 0.25, 0.5]
    groups = [torch.randn(8, 3, 32, 32)]
    masks = [torch.zeros(8, 16, dtype=torch.bool)]
    encoder = Encoder(64, 3, 8, heads=2)
    found = encoder_bytes(encoder, [(8, 32)], 4, "sdpa", rates)
    output = RESIDUAL * 64 * 8 * encoder.tokens(32)
    kept = saved_bytes(lambda: model.train()(groups, masks), list(model.parameters()))
    # Of a block of rate 0 the residual stream itself is the norm's input, which the formula counts for each norm.
    assert found.total - output == kept


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("prototypes", "bottleneck_dim", "hidden_dim", "layers", "rows"),
    [(1000, 64, 128, 3, 40), (300, 32, 64, 2, 10), (5000, 256, 256, 3, 100), (100, 16, 32, 1, 50)],
)
def test_a_head_keeps_what_the_formula_says(
    prototypes: int, bottleneck_dim: int, hidden_dim: int, layers: int, rows: int, dtype: torch.dtype
) -> None:
    head = PrototypeHead(48, prototypes, hidden_dim, bottleneck_dim, layers)
    tokens = torch.randn(rows, 48, requires_grad=True)

    def forward() -> Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != FP32):
            return head(tokens * 1.0)

    found = head_bytes(48, rows, prototypes, bottleneck_dim, dtype.itemsize, hidden_dim, layers)
    assert found == saved_bytes(forward, [*head.parameters(), tokens])
