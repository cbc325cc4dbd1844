"""Feature matrices that linear models are fitted on: centred, in memory or read in chunks, with their principal axes.

The axes serve the solver: divided by the curvature along each, the Hessian of a logistic loss is nearly the identity.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

EXACT_AXES, LEADING_AXES = 1024, 256  # all principal axes up to the first, the leading ones of more dimensions
IN_MEMORY = 1 << 30  # bytes of centred features held; more are read again, chunk by chunk, in every evaluation
CHUNK_NUMBERS = 1 << 23  # features in flight: 32 MB in float32
LEAST_ROWS = 256  # of a chunk, however wide

Parts = Sequence[tuple[Tensor, Tensor | None]]


class Rows:
    """Rows of one or several feature matrices in a row, each whole or by an ascending index; nothing is copied."""

    def __init__(self, parts: Parts) -> None:
        for features, _ in parts:
            if features.ndim != 2 or features.shape[1] != parts[0][0].shape[1]:
                raise ValueError(f"features must be of shape (n, D), got {tuple(features.shape)}")
        self.parts = list(parts)
        self.dim = parts[0][0].shape[1]

    def __len__(self) -> int:
        return sum(len(features) if index is None else len(index) for features, index in self.parts)

    def chunks(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """(number of the first row, at most `size` rows as they are stored)."""
        first = 0
        for features, index in self.parts:
            count = len(features) if index is None else len(index)
            for start in range(0, count, size):
                stop = min(start + size, count)
                yield first + start, features[start:stop] if index is None else features[index[start:stop]]
            first += count


class CentredRows:
    """Rows minus their mean on the device, with the directions in which they vary.

    x            (row - mean) / scale; what `chunks` gives
    axes, power  orthonormal directions (D, r) and the variance along each (r,)
    rest         the mean variance of the directions that are left out
    """

    def __init__(
        self,
        parts: Parts,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        standardize: bool = False,
    ) -> None:
        """Read everything once or a few times. Raises ValueError for a feature that is not finite.

        standardize  divide each feature by its standard deviation
        """
        self._source = Rows(parts)
        self.n, self.dim = len(self._source), self._source.dim
        self.device = torch.device(device) if device is not None else parts[0][0].device
        self.dtype = dtype
        self.size = max(LEAST_ROWS, CHUNK_NUMBERS // self.dim)  # rows of a chunk
        self._held: Tensor | None = None
        total = torch.zeros(self.dim, dtype=torch.float64, device=self.device)
        self.scale = torch.ones_like(total)
        for _, raw in self._source.chunks(self.size):
            x = raw.to(self.device, dtype)
            if not torch.isfinite(x).all():
                raise ValueError(f"features must be finite, {self.n} rows hold a NaN or an infinity")
            total += x.sum(dim=0, dtype=torch.float64)
        self.mean = total / self.n
        if standardize:
            spread = (self.sum(lambda x: x.double().square().sum(dim=0)) / self.n).sqrt()
            self.scale = torch.where(spread > 1e-12 * (1 + self.mean.abs()), spread, self.scale)
        if self.n * self.dim * dtype.itemsize <= IN_MEMORY:
            self._held = torch.cat([x for _, x in self.chunks()])
        self.axes, self.power, self.rest = self._principal_axes()

    def chunks(self, size: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """(number of the first row, at most `size` centred and scaled rows (m, D))."""
        size = min(size or self.size, self.size)
        if self._held is not None:
            for start in range(0, self.n, size):
                yield start, self._held[start : start + size]
            return
        mean, scale = self.mean.to(self.dtype), self.scale.to(self.dtype)
        for start, raw in self._source.chunks(size):
            yield start, (raw.to(self.device, self.dtype) - mean) / scale

    def sum(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """The float64 sum of a function over chunks of rows."""
        total: Tensor | None = None
        for _, x in self.chunks():
            value = function(x).double()
            total = value if total is None else total + value
        assert total is not None
        return total

    def curvature(self, spread: Tensor, ridge: Tensor | float) -> tuple[Tensor, Tensor]:
        """Roots of the Hessian's eigenvalues for K classes: along the axes (r, K) and across them (K,).

        spread  (K,) mean of p (1 - p): with it, the Hessian along axis i is about spread * power + ridge
        """
        return (torch.outer(self.power, spread) + ridge).sqrt(), (self.rest * spread + ridge).sqrt()

    def stretch(self, weights: Tensor, along: Tensor, across: Tensor) -> Tensor:
        """Multiply weights (D, K) by `along` on the axes and by `across` off them; symmetric."""
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
