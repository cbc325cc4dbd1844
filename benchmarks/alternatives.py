"""What others put in the place of KoLeo and of Sinkhorn-Knopp over one batch, for `small.py` to compare with.

None of them is an option of dinoreg: they would become one by a gain shown on real pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoreg.distributed.process_group import ALONE, Ranks
from dinoreg.losses.centering import sinkhorn_knopp


def kernel_density(features: Tensor, concentration: float = 5.0) -> Tensor:
    """The mean log density that a von Mises-Fisher kernel on the other features gives each feature, (): low is spread.

    The uniformity of Wang and Isola (arXiv 2005.10242) as a sum of logarithms instead of the logarithm of a sum.

    features       (B, D)  B >= 2
    concentration  of the kernel, > 0
    """
    x = F.normalize(features.float(), dim=-1)
    similarity = concentration * (x @ x.mT)
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    return (similarity.masked_fill(itself, -torch.inf).logsumexp(dim=1) - concentration).mean()


def sigreg(features: Tensor, directions: int = 256) -> Tensor:
    """How far features are from an isotropic normal distribution, () >= 0 (SIGReg, LeJEPA, arXiv 2511.08544).

    The statistic of Epps and Pulley of the features along random directions, new ones at each call: the squared
    distance between their characteristic function and exp(-t^2/2), weighted by the latter, over |t| <= 5.

    features    (B, D)
    directions  number of directions
    """
    x = features.float()
    x = x @ F.normalize(torch.randn(x.shape[1], directions, device=x.device), dim=0)  # (B, directions)
    t = torch.linspace(-5, 5, 17, device=x.device)
    normal = torch.exp(-(t**2) / 2)
    angles = x[..., None] * t  # (B, directions, 17)
    distance = (angles.cos().mean(dim=0) - normal) ** 2 + angles.sin().mean(dim=0) ** 2
    return len(x) * torch.trapezoid(distance * normal, t, dim=-1).mean()


class SinkhornQueue:
    """Sinkhorn-Knopp over this batch and the class tokens of the batches before it (SwAV, arXiv 2006.09882).

    size  the most rows of class tokens, this batch's included

    A step calls twice, for class tokens and for patches, of which a batch of any size has enough. The logits are kept
    as they were: the teacher that made them has moved a little since.
    """

    def __init__(self, size: int = 512):
        self.size = size
        self.rows: Tensor | None = None
        self.calls = 0

    def __call__(
        self, logits: Tensor, teacher_temp: float | Tensor, iterations: int = 3, ranks: Ranks = ALONE
    ) -> Tensor:
        self.calls += 1
        if self.calls % 2 == 0:
            return sinkhorn_knopp(logits, teacher_temp, iterations, ranks)
        together = logits if self.rows is None else torch.cat([logits, self.rows.to(logits.dtype)])
        self.rows = together[: self.size].detach().clone()
        return sinkhorn_knopp(together, teacher_temp, iterations, ranks)[: len(logits)]


# What each puts in the place of a function of the training step.
ALTERNATIVES: dict[str, Callable[[], tuple[str, Callable[..., Any]]]] = {
    "KDE": lambda: ("koleo_loss", kernel_density),
    "SIGReg": lambda: ("koleo_loss", sigreg),
    "Sinkhorn queue": lambda: ("sinkhorn_knopp", SinkhornQueue()),
}


@contextmanager
def replaced(name: str | None) -> Iterator[None]:
    """Training inside uses the alternative of this name; None: everything as it is."""
    if name is None:
        yield
        return
    function, alternative = ALTERNATIVES[name]()
    with mock.patch(f"dinoreg.train.step.{function}", alternative):
        yield
