"""Test-time registers (arXiv 2506.08010, §5): hidden units whose activation goes to registers, none to patches.

A token of zeros so takes over the enormous norm that a few units would give to patches; no weight changes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dinoreg.models.attention import Shapes
from dinoreg.models.layers import Block, Mlp
from dinoreg.runtime.errors import UserError


def output_layer(block: nn.Module) -> nn.Linear:
    """The layer that reads a block's hidden units."""
    assert isinstance(block, Block)
    return block.mlp.fc2 if isinstance(block.mlp, Mlp) else block.mlp.w3


def move_to_registers(blocks: nn.ModuleList, neurons: Sequence[Sequence[int]], num_registers: int) -> None:
    """Have the blocks give the neurons' largest activation to the registers. For evaluation mode only.

    neurons  pairs of a block and one of its hidden units, both from 0
    raises   UserError for a pair that there is not, or without registers
    """
    if neurons and not num_registers:
        raise UserError("register_neurons: there is no register to which their activation could go")
    for number in sorted({block for block, _ in neurons}):
        if not 0 <= number < len(blocks):
            raise UserError(f"block {number} is out of range: the model has {len(blocks)} blocks")
        layer = output_layer(blocks[number])
        units = sorted({unit for block, unit in neurons if block == number})
        if not 0 <= units[0] <= units[-1] < layer.in_features:
            raise UserError(f"unit {units[-1]} is out of range: a block has {layer.in_features} hidden units")
        mover = _Mover(units, num_registers)
        blocks[number].register_forward_pre_hook(mover.remember)
        layer.register_forward_pre_hook(mover.move)


class _Mover:
    """Hooks of one block: record how its tokens are packed, then move the neurons' activation."""

    def __init__(self, units: Sequence[int], num_registers: int) -> None:
        self.units, self.num_registers = units, num_registers
        self.shapes: Shapes = ()

    def remember(self, _module: nn.Module, inputs: tuple) -> None:
        self.shapes = inputs[1]

    def move(self, _module: nn.Module, inputs: tuple) -> tuple[Tensor]:
        """hidden (S, hidden): for every image the largest activation goes to the registers, zero to the patches; the
        class token keeps its own."""
        hidden, first, start = inputs[0].clone(), 1 + self.num_registers, 0
        if sum(images * tokens for images, tokens in self.shapes) != len(hidden):
            raise RuntimeError("a test-time register works in evaluation mode, and with all patches, only")
        for images, tokens in self.shapes:
            group = hidden[start : start + images * tokens].view(images, tokens, -1)
            start += images * tokens
            values = group[..., self.units]
            high, low = values.amax(dim=1, keepdim=True), values.amin(dim=1, keepdim=True)
            group[:, 1:first, self.units] = torch.where(high >= -low, high, low)
            group[:, first:, self.units] = 0
        return (hidden,)
