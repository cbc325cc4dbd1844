"""Low-rank adapters (LoRA, arXiv 2106.09685): linear layers that learn by a narrow product beside a fixed weight."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoraLinear(nn.Linear):
    """A linear layer with the weight W + `lora_up` @ `lora_down`, of which only the two narrow matrices learn.

    plain  the layer that it replaces and whose parameters it takes over; they are frozen
    rank   rows of `lora_down` (rank, in), drawn from torch's global generator, and columns of `lora_up` (out, rank),
           which starts at 0: at first the layer computes what `plain` does

    The product has no factor of its own: the learning rate is that factor.
    """

    def __init__(self, plain: nn.Linear, rank: int) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None, device="meta")
        self.weight, self.bias = plain.weight, plain.bias
        self.requires_grad_(False)
        self.lora_down = nn.Parameter(self.weight.new_empty(rank, self.in_features))
        self.lora_up = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_down, a=math.sqrt(5))  # nn.Linear's own start

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        return super().forward(x) + F.linear(F.linear(x, self.lora_down), self.lora_up)


def freeze_but(backbone: nn.Module, blocks: int | None, rank: int | None, seed: int) -> None:
    """Leave of a backbone only its last blocks to learn, or adapters in them; in place.

    backbone  with `blocks` and `norm`, as RegisterViT
    blocks    the last that learn, with the final norm; None: all
    rank      of adapters in all linear layers of these blocks, which then learn instead; None: none
    seed      of the adapters

    With None twice everything learns.
    """
    if blocks is None and rank is None:
        return
    backbone.requires_grad_(False)
    chosen = list(backbone.blocks.children())[-blocks if blocks else None :]  # type: ignore[union-attr, operator]
    if rank is None:
        for module in (*chosen, backbone.norm):
            module.requires_grad_(True)  # type: ignore[operator]
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for block in chosen:
            for parent in list(block.modules()):
                for name, layer in list(parent.named_children()):
                    if isinstance(layer, nn.Linear):
                        setattr(parent, name, LoraLinear(layer, rank))
