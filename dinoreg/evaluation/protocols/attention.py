"""The attention probe: a learnt query gathers patch tokens and the class token for a linear classifier.

It shows what is in the patches and not in the class token (as in CAPI, arXiv 2502.08769). Heads of several rates are
trained at once, as those of the linear grid are, and the best is chosen on held-out training images. The tokens of all
images are too many to be kept: they are encoded when they are needed, unless they are few.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinoreg.evaluation.backbones.encoder import seeded
from dinoreg.evaluation.data import Labelled
from dinoreg.evaluation.features.images import read_picture
from dinoreg.evaluation.protocols.knn import RESIZE
from dinoreg.evaluation.protocols.linear import Grid, grid_rows
from dinoreg.evaluation.protocols.measurement import Measurement
from dinoreg.evaluation.result import Row
from dinoreg.runtime.parallel import parallel

HEAD_DIM = 64  # of one of the query's heads, about
IN_MEMORY = 1 << 30  # bytes of a split's tokens that are kept


def evaluate(measured: Measurement) -> list[Row]:
    """The rows of the attention heads, as `grid_rows`."""
    return grid_rows(measured, "attention", AttentionGrid)


class AttentionHead(nn.Module):
    """One query's multi-head attention over tokens of width D, and a linear classifier of what it gathers.

    The query does not depend on the tokens, so that its product with the keys' map is one vector of width D for each of
    H heads, and values are mapped after they were gathered: what `nn.MultiheadAttention` computes, for less.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        heads = next(count for count in range(max(dim // HEAD_DIM, 1), 0, -1) if dim % count == 0)
        self.query = nn.Parameter(torch.randn(heads, dim) / math.sqrt(dim))
        self.value = nn.Parameter(torch.randn(heads, dim, dim // heads) / math.sqrt(dim))
        self.classify = nn.Linear(dim, num_classes)
        nn.init.zeros_(self.classify.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (b, T, D) -> logits (b, classes)."""
        weights = (tokens @ self.query.mT).softmax(dim=1)  # (b, T, H)
        return self.classify(torch.einsum("bhd,hdv->bhv", weights.mT @ tokens, self.value).flatten(1))


class Encoded:
    """The tokens of a split's centre crops, (n, T, D) float32, read and encoded as rows of them are asked for."""

    def __init__(self, grid: Grid, split: Labelled) -> None:
        self.grid, self.source, self.crop = grid, split.source, grid.context.crop(split.source, RESIZE)
        self.shape = (len(split), *self[np.arange(1)].shape[1:])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        load, workers = lambda index: self.crop(read_picture(self.source, index)), self.grid.context.workers
        return self.grid.encoded([*parallel(load, rows.tolist(), workers)]).cpu().numpy()


class AttentionGrid(Grid):
    """Attention heads on one encoder, one for each rate."""

    optimizer = "AdamW, cosine to 0"

    def inputs_of(self, options: Any) -> list[Any]:
        """All tokens are the only kind of input."""
        self.rates, self.chunk = [1.0] * len(options.lrs), self.context.batch_size
        return ["attention"]

    def features(self, split: Labelled, what: str) -> Any:
        """The tokens of a split: an array where they are few, else encoded again for every use."""
        encoded = Encoded(self, split)
        return encoded[np.arange(len(split))] if 4 * math.prod(encoded.shape) <= IN_MEMORY else encoded

    def tokens(self, images: Tensor) -> Tensor:
        """The class token, where it has the patches' width, and the patches (b, T, D)."""
        found = self.encoder.tokens(images)
        return torch.cat([found.cls[:, None], found.patches], dim=1) if self.encoder.pools else found.patches

    def start(self, width: int) -> None:
        """Fresh heads over tokens of width D, drawn from the seed."""
        with seeded(self.context.seed):
            heads = [AttentionHead(width, self.split.num_classes) for _ in self.options.lrs]
        self.maps = {"attention": nn.ModuleList(heads).to(self.encoder.device)}

    def optimize(self, heads: Any) -> torch.optim.Optimizer:
        """AdamW with a rate for each head."""
        groups = [{"params": head.parameters(), "lr": lr} for head, lr in zip(heads, self.options.lrs)]
        return torch.optim.AdamW(groups, weight_decay=self.options.weight_decay)

    def logits(self, x: Tensor) -> dict[Any, Tensor]:
        """{"attention": (b, rates, classes)} of tokens (b, T, D)."""
        return {kind: torch.stack([head(x) for head in heads], dim=1) for kind, heads in self.maps.items()}
