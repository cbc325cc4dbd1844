"""The prototype head that turns a token into logits over K prototypes (DINO §3; DINOv2 §4).

An MLP to a narrow bottleneck, L2 normalisation, then a weight-normalised product: each logit is the
prototype's learned length times the cosine between token and prototype.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoreg.errors import UserError


class WeightNormLinear(nn.Module):
    """A linear map without bias whose rows are g * v / |v|; both are plain parameters, under the names they
    have in published checkpoints. `g` starts at 1 and is trained."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(out_dim, 1))
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        self.init_weights()

    def init_weights(self) -> None:
        nn.init.ones_(self.weight_g)
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))  # nn.Linear's own start

    def weight(self) -> Tensor:
        """The rows themselves, (K, in_dim), in the parameters' precision."""
        return self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        """x (n, in_dim) -> (n, out_dim)."""
        return F.linear(x, self.weight())


class PrototypeHead(nn.Module):
    """`layers` linear layers with exact GELU between them, L2 normalisation, `WeightNormLinear` to the
    prototypes.

    With layers=1 the MLP is a single linear layer (key `mlp.weight`), and hidden_dim has no effect.
    Parameters are meant to stay float32; under autocast the products run in the low precision and so do the
    logits.
    """

    def __init__(
        self,
        in_dim: int,
        num_prototypes: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        layers: int = 3,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise UserError(f"head layers={layers}; expected at least 1")
        widths = [in_dim] + [hidden_dim] * (layers - 1) + [bottleneck_dim]
        steps: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            steps += [nn.Linear(fan_in, fan_out), nn.GELU()]
        self.mlp: nn.Module = steps[0] if layers == 1 else nn.Sequential(*steps[:-1])
        self.init_std = init_std
        self.last_layer = WeightNormLinear(bottleneck_dim, num_prototypes)
        self.init_weights()

    def init_weights(self) -> None:
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=self.init_std)
                nn.init.zeros_(module.bias)
        self.last_layer.init_weights()

    def bottleneck(self, tokens: Tensor) -> Tensor:
        """tokens (n, D) -> unit vectors (n, bottleneck_dim), float32 or wider."""
        x = self.mlp(tokens)
        eps = 1e-6 if x.dtype == torch.float16 else 1e-12
        return F.normalize(x.float(), dim=-1, eps=eps).to(self.last_layer.weight_v.dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (n, D) -> logits (n, K)."""
        return self.last_layer(self.bottleneck(tokens))
