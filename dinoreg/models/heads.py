"""The prototype head that turns a token into logits over K prototypes (DINO §3; DINOv2 §4).

An MLP to a narrow bottleneck, L2 normalisation, then a weight-normalised product: each logit is the
prototype's learned length times the cosine between token and prototype.
"""

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoreg.models.attention import compute_dtype
from dinoreg.models.layers import init_linear_layers, low_precision
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.tiling import chunks, rows_per_chunk


class _ScaledRows(torch.autograd.Function):
    """Rows g * v / |v|, some at a time, in the dtype `dtype` of the matrix product that follows.

    With 65536 prototypes each elementwise pass over float32 rows is 67 MB: this makes two, where autograd's own
    composition makes nine, there and back.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
        rows = torch.empty(v.shape, dtype=dtype, device=v.device)
        lengths = torch.empty_like(g)
        for part in chunks(0, len(v), rows_per_chunk(v.shape[1], v.device)):
            torch.linalg.vector_norm(v[part], dim=1, keepdim=True, out=lengths[part])
            torch.mul(v[part], g[part] / lengths[part], out=rows[part])
        ctx.save_for_backward(v, g, lengths)
        return rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        v, g, lengths = ctx.saved_tensors
        grad_v, grad_g = torch.empty_like(v), torch.empty_like(g)
        for part in chunks(0, len(v), rows_per_chunk(v.shape[1], v.device)):
            grad = upstream[part].to(v.dtype)
            # The product's place is that of the result, which comes after it.
            along = torch.mul(grad, v[part], out=grad_v[part]).sum(dim=1, keepdim=True) / lengths[part]
            scale = g[part] / lengths[part]
            torch.mul(grad, scale, out=grad_v[part])
            grad_v[part].addcmul_(v[part], scale * along / lengths[part], value=-1)
            grad_g[part] = along
        return grad_v, grad_g, None


class WeightNormLinear(nn.Module):
    """A linear map without bias whose rows are g * v / |v| (weight normalisation).

    Both are plain parameters under the names of published checkpoints: `weight_g` (out_dim, 1), which starts at 1 and
    is trained, and `weight_v` (out_dim, in_dim).
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(out_dim, 1))
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        self.init_weights()

    def init_weights(self) -> None:
        """Set `weight_g` to 1 and draw `weight_v` from torch's global generator, as nn.Linear draws its weight."""
        nn.init.ones_(self.weight_g)
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))  # nn.Linear's own start

    def weight(self) -> Tensor:
        """The rows g * v / |v|, (out_dim, in_dim), in autocast's dtype where it is on, else that of the parameters."""
        rows: Tensor = _ScaledRows.apply(self.weight_v, self.weight_g, compute_dtype(self.weight_v))
        return rows

    def forward(self, x: Tensor) -> Tensor:
        """x (n, in_dim) -> (n, out_dim), the products with all rows."""
        return F.linear(x, self.weight())


class TokenProjection(nn.Module):
    """Two linear maps from a network's tokens to those of another one: of class tokens and of patch tokens.

    in_dim, out_dim  widths D and D' of the two networks. Both start as isometries (of the narrower side), so that
                     neighbours among the tokens are neighbours among their images
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.cls, self.patch = nn.Linear(in_dim, out_dim), nn.Linear(in_dim, out_dim)
        for layer in (self.cls, self.patch):
            nn.init.orthogonal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, cls_tokens: Tensor, patch_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """cls_tokens (n, D), patch_tokens (n, N, D) -> (n, D'), (n, N, D')."""
        return self.cls(cls_tokens), self.patch(patch_tokens)


class PrototypeHead(nn.Module):
    """The head of DINO (section 3) and iBOT: an MLP, L2 normalisation, then `WeightNormLinear` to the prototypes.

    in_dim          width D of the tokens
    num_prototypes  K
    hidden_dim      width of the MLP's hidden layers; without effect for layers=1
    bottleneck_dim  width of the MLP's output
    layers          linear layers of the MLP, with exact GELU between them; 1: a single layer (key `mlp.weight`)
    init_std        standard deviation of the MLP's initial weights
    raises          UserError for layers < 1

    Parameters are meant to stay float32; under autocast products and logits have the low precision.
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
        """Draw new weights of all layers from torch's global generator."""
        init_linear_layers(self.mlp, self.init_std)
        self.last_layer.init_weights()

    def bottleneck(self, tokens: Tensor) -> Tensor:
        """tokens (n, D) -> unit vectors (n, bottleneck_dim), in the dtype of the prototypes (float32)."""
        with low_precision(self.mlp, compute_dtype(tokens)):
            x = self.mlp(tokens)
        eps = 1e-6 if x.dtype == torch.float16 else 1e-12
        return F.normalize(x.float(), dim=-1, eps=eps).to(self.last_layer.weight_v.dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (n, D) -> logits (n, K)."""
        return self.last_layer(self.bottleneck(tokens))
