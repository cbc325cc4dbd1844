"""Operations of one image, in closed form and counted by fvcore on the real networks."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass

import torch
from torch import nn

from dinoreg.config.load import Config
from dinoreg.plan.flops import head as head_flops
from dinoreg.plan.job import Job
from dinoreg.train.state import build_networks

TOLERANCE = 0.01


@dataclass(frozen=True)
class Check:
    """One network's forward pass: floating-point operations by the formula and as fvcore counts them."""

    name: str
    formula: float
    counted: float

    @property
    def difference(self) -> float:
        """Relative, of the formula from the count."""
        return self.formula / self.counted - 1

    @property
    def agrees(self) -> bool:
        return abs(self.difference) <= TOLERANCE


def check_operations(job: Job) -> list[Check]:
    """The backbone on each kind of crop and each head on a token, by formula and by fvcore."""
    config, encoder = job.config, job.sizes.encoder
    # fvcore has no count for fused attention kernels: the networks are built anew with the plain one, without memory.
    plain = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="plain"))
    with torch.device("meta"):
        student, _ = build_networks(plain)
        student.eval()
        checks = []
        for name, size in _crops(config):
            images = torch.empty(1, encoder.in_channels, size, size)
            checks.append(Check(f"backbone, {name}", encoder.forward(size), _count(student.backbone, images)))
        for name, head in job.sizes.heads.items():
            formula = head_flops(
                encoder.dim, head.prototypes, head.bottleneck_dim, config.head.hidden_dim, config.head.layers
            )
            checks.append(Check(name, formula, _count(student[name], torch.empty(1, encoder.dim))))
    return checks


def _crops(config: Config) -> list[tuple[str, int]]:
    crops = [("global crop", config.crops.global_size)]
    return [*crops, ("local crop", config.crops.local_size)] if config.crops.num_local else crops


def _count(module: nn.Module, inputs: torch.Tensor) -> float:
    """fvcore counts a multiply-add once; norms, which it counts too, are no matrix products."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(module, inputs)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        counted = analysis.by_operator()
        return 2.0 * (sum(counted.values()) - counted.get("layer_norm", 0))
