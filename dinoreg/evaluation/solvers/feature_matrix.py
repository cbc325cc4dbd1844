"""Feature matrices that linear models are fitted on: centred, in memory or read in chunks, with their principal axes.

The axes serve the solver: divided by the curvature along each, the Hessian of a logistic loss is nearly the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

EXACT_AXES, LEADING_AXES = 1024, 256  # all principal axes up to the first, the leading ones of more dimensions
IN_MEMORY = 1 << 30  # bytes of centred features held; more are read again, chunk by chunk, in every evaluation
CHUNK_NUMBERS = 1 << 23  # features in flight: 32 MB in float32
LEAST_ROWS = 256  # of a chunk, however wide


@dataclass(frozen=True)
class Rows:
    """Rows of one or several feature matrices one after the other; nothing is copied.

    parts   feature matrices (n, D), each with the ascending indices (m,) of the rows that are meant, or None for all;
            they may be memory-mapped and of any floating type
    labels  (n,) or (n, K) of all rows
    """

    parts: tuple[tuple[Tensor, Tensor | None], ...]
    labels: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, mask: Tensor | None = None) -> Rows:
        """All rows of a feature matrix (n, D) with labels (n,) or (n, K), or those where a mask (n,) bool is true."""
        if mask is None:
            return cls(((features, None),), labels)
        return cls(((features, mask.nonzero()[:, 0]),), labels[mask])

    def __add__(self, other: Rows) -> Rows:
        return Rows(self.parts + other.parts, torch.cat([self.labels, other.labels]))

    def __len__(self) -> int:
        return sum(len(features if index is None else index) for features, index in self.parts)

    def chunks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """The rows in chunks of at most `size`: which they are, and their features (m, D) as they are stored."""
        first = 0
        for features, index in self.parts:
            for each in (features if index is None else index).split(size):
                yield slice(first, first + len(each)), each if index is None else features[each]
                first += len(each)


class CentredRows:
    """Rows minus their mean on the device, with the directions in which they vary.

    n, dim       number and width D of the rows
    mean, scale  (D,) float64; scale is 1 unless `standardize`
    axes, power  orthonormal directions (D, r) and the variance along each (r,), float64
    rest         the mean variance of the directions that are left out
    """

    def __init__(
        self,
        rows: Rows,
        *,
        standardize: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Read everything once or a few times. ValueError for a feature that is not finite.

        standardize  divide each feature by its standard deviation first, which changes what a penalty means
        dtype        of the large products; sums are float64 either way
        """
        first = rows.parts[0][0]
        self._rows, self._centred = rows, False
        self.n, self.dim = len(rows), first.shape[1]
        self.device, self.dtype = torch.device(first.device if device is None else device), dtype
        self.size = max(LEAST_ROWS, CHUNK_NUMBERS // self.dim)  # rows of a chunk
        self.mean = torch.zeros(self.dim, dtype=torch.float64, device=self.device)
        self.scale = torch.ones_like(self.mean)
        self.mean = self.sum(lambda x: x.sum(dim=0, dtype=torch.float64)) / self.n
        if not torch.isfinite(self.mean).all():
            raise ValueError(f"features must be finite, {self.n} rows hold a NaN or an infinity")
        if standardize:
            spread = (self.sum(lambda x: x.double().square().sum(dim=0)) / self.n).sqrt()
            self.scale = torch.where(spread > 1e-12 * (1 + self.mean.abs()), spread, self.scale)
        if self.n * self.dim * dtype.itemsize <= IN_MEMORY:
            self._rows, self._centred = Rows.of(torch.cat([x for _, x in self.chunks()]), rows.labels), True
        self.axes, self.power, self.rest = self._principal_axes()

    def chunks(self, size: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """The rows in chunks of at most `size`: which they are, and (row - mean) / scale (m, D)."""
        mean, scale = self.mean.to(self.dtype), self.scale.to(self.dtype)
        for part, x in self._rows.chunks(min(size or self.size, self.size)):
            yield part, x if self._centred else (x.to(self.device, self.dtype) - mean) / scale

    def sum(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """The float64 sum over chunks of rows of a function of (m, D)."""
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        return sum((function(x).double() for _, x in self.chunks()), zero)

    def curvature(self, spread: Tensor, ridge: Tensor | float) -> tuple[Tensor, Tensor]:
        """Roots of the Hessian's eigenvalues for K classes: along the axes (r, K) and across them (K,).

        spread  (K,) mean of p (1 - p): with it, the Hessian along axis i is about spread * power + ridge
        ridge   (K,) or one number: what the penalty adds to the Hessian
        """
        return (torch.outer(self.power, spread) + ridge).sqrt(), (self.rest * spread + ridge).sqrt()

    def stretch(self, weights: Tensor, along: Tensor, across: Tensor) -> Tensor:
        """Multiply weights (D, K) by `along` (r, K) on the axes and by `across` (K,) off them; symmetric."""
        return weights * across + self.axes @ ((along - across) * (self.axes.mT @ weights))

    def _principal_axes(self) -> tuple[Tensor, Tensor, float]:
        """All D directions when that is cheap, else the leading ones by subspace iteration."""
        if self.dim <= EXACT_AXES:
            power, axes = torch.linalg.eigh(self.sum(lambda x: x.mT @ x) / self.n)
            return axes, power.clamp(min=0), 0.0
        generator = torch.Generator().manual_seed(0)
        block = torch.randn(self.dim, min(LEADING_AXES, self.n), generator=generator).to(self.device, self.dtype)
        for _ in range(4):
            turned = self.sum(lambda x, block=block: x.mT @ (x @ block))  # type: ignore[misc]
            block = torch.linalg.qr(turned).Q.to(self.dtype)
        axes = torch.linalg.qr(block.double()).Q

        def outer(x: Tensor) -> Tensor:
            projected = (x @ axes.to(x)).double()
            return projected.mT @ projected

        power, rotation = torch.linalg.eigh(self.sum(outer) / self.n)
        total = float(self.sum(lambda x: x.square().sum(dtype=torch.float64))) / self.n
        rest = max(total - float(power.sum()), 0.0) / max(self.dim - len(power), 1)
        return axes @ rotation, power.clamp(min=0), rest
