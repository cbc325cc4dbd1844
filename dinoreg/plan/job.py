"""A run as far as its cost goes: its networks' sizes, its batch, its processes and what they compute on."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from dinoreg.config.load import Config
from dinoreg.config.schema import ParallelConfig
from dinoreg.plan.devices import Device
from dinoreg.runtime.device import pick_precision
from dinoreg.runtime.errors import UserError
from dinoreg.train.parallelize import choose_strategy
from dinoreg.train.state import Networks, build_networks


@dataclass(frozen=True)
class Sizes:
    """What the networks are made of: a student without weights, which takes no memory. The teacher is as large."""

    networks: Networks

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Of {"backbone", "dino_head"} and, untied, "ibot_head"."""
        return {name: sum(p.numel() for p in network.parameters()) for name, network in self.networks.items()}

    @property
    def student(self) -> int:
        """Parameters of the backbone and its heads."""
        return sum(self.parameters.values())

    @property
    def prototypes(self) -> dict[str, int]:
        """Of each head; one for both losses when tied."""
        heads = {name: self.networks[name] for name in self.networks if name != "backbone"}
        return {name: len(head.last_layer.weight_g) for name, head in heads.items()}  # type: ignore[union-attr, arg-type]

    @property
    def dim(self) -> int:
        return self.networks.backbone.dim

    @property
    def depth(self) -> int:
        return self.networks.backbone.depth

    def patches(self, size: int) -> int:
        """Patches of a square image of `size` pixels."""
        return (size // self.networks.backbone.patch_size) ** 2

    def tokens(self, size: int) -> int:
        """Class token, registers and patches of a square image of `size` pixels."""
        return 1 + self.networks.backbone.num_registers + self.patches(size)


def padded(network: nn.Module, shards: int) -> int:
    """Entries of a network as FSDP gathers them from `shards` processes, each of which sends equally many rows.

    A parameter of a single row, as the positions are, is sent by all of them.
    """
    return sum(-(-len(p) // shards) * shards * (p.numel() // len(p)) for p in network.parameters())


@dataclass(frozen=True)
class Job:
    """A config on `nodes` machines with `gpus` processes each.

    precision  "bf16" | "fp16" | "fp32" of matrix products    backend  of attention, as `resolve_backend` returns it
    """

    config: Config
    sizes: Sizes
    nodes: int
    gpus: int
    device: Device
    precision: str
    backend: str

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus

    @property
    def global_batch_size(self) -> int:
        return self.config.batch_size * self.world_size

    @property
    def micro_batch_size(self) -> int:
        """Images that one process sends through the student at a time."""
        return self.config.batch_size // self.config.optim.accumulate

    @property
    def strategy(self) -> str:
        """ "single" | "ddp" | "fsdp"."""
        return choose_strategy(self.config.parallel, self.sizes.student, self.world_size)

    @property
    def shard_size(self) -> int:
        """Processes that share one copy of the state."""
        return (self.config.parallel.shard or self.world_size) if self.strategy == "fsdp" else 1

    def padded(self, *names: str) -> int:
        """Entries of these networks, or all, as they are gathered; without FSDP as many as there are parameters."""
        networks = self.sizes.networks
        return sum(padded(networks[name], self.shard_size) for name in names or networks)

    @property
    def copies(self) -> int:
        """Copies of the state among the processes."""
        return self.world_size // self.shard_size

    @property
    def koleo_ranks(self) -> int:
        """Processes whose images KoLeo searches together."""
        return self.config.loss.koleo_ranks or self.world_size

    @property
    def has_anchor(self) -> bool:
        return self.config.loss.anchor_weight > 0

    def masked_patches(self, images: int, worst: bool = False) -> int:
        """Hidden patches of `images` images' global crops; with `worst`, three standard deviations above the mean.

        Masks are stratified over the batch of all processes, so that a part of it has more or fewer of them.
        """
        mask, crops = self.config.mask, 2 * images
        patches = self.sizes.patches(self.config.crops.global_size)
        masked = int(2 * self.global_batch_size * mask.probability) / (2 * self.global_batch_size)
        low, high = mask.ratio
        share = (low + high) / 2
        mean = crops * masked * share * patches
        if not worst:
            return round(mean)
        square = masked * (share**2 + (high - low) ** 2 / 12)
        variance = max(0.0, square - (masked * share) ** 2) * (1 - images / self.global_batch_size)
        return min(math.ceil(mean + 3 * patches * math.sqrt(crops * variance)), int(crops * high * patches))

    def koleo_operations(self) -> float:
        """Operations of one process's search for neighbours in a step: both views' products of all pairs."""
        if self.config.loss.koleo_weight == 0:
            return 0.0
        return 2 * 2 * (self.koleo_ranks * self.config.batch_size) ** 2 * self.sizes.dim

    def alone(self) -> "Job":
        """The same job on one process."""
        loss = replace(self.config.loss, koleo_ranks=None)
        return replace(self, config=replace(self.config, parallel=ParallelConfig(), loss=loss), nodes=1, gpus=1)

    def as_dict(self) -> dict[str, Any]:
        """What it is, fit for JSON."""
        config = self.config
        return {
            "model": config.model.name,
            "nodes": self.nodes,
            "gpus": self.gpus,
            "processes": self.world_size,
            "device": self.device.name,
            "strategy": self.strategy,
            "shard": self.shard_size,
            "precision": self.precision,
            "attention": self.backend,
            "batch_size": config.batch_size,
            "global_batch_size": self.global_batch_size,
            "accumulate": config.optim.accumulate,
            "checkpointing": config.model.checkpointing,
        }


def measure_sizes(config: Config) -> Sizes:
    """The sizes of a config's networks, from the networks themselves; no memory is taken."""
    with torch.device("meta"):
        return Sizes(build_networks(config)[0])


def describe(config: Config, nodes: int, gpus: int, device: Device, sizes: Sizes | None = None) -> Job:
    """A config's job on `nodes` machines with `gpus` processes each; UserError where it could not even start.

    sizes  of the config's networks where they are known
    """
    world_size = nodes * gpus
    precision = _precision(config, device)
    if config.model.attention == "xformers" and device.kind != "cuda":
        raise UserError(
            f"model.attention=xformers: runs on CUDA, and this is a plan for {device.name}; use auto or sdpa"
        )
    backend = config.model.attention
    if backend == "auto":
        backend = "plain" if device.kind == "cpu" and precision != "fp32" else "sdpa"
    if config.loss.anchor_weight > 0 and config.init is None:
        raise UserError(f"loss.anchor_weight={config.loss.anchor_weight}: expected 0 without init=")
    ranks = config.loss.koleo_ranks
    if ranks is not None and world_size % ranks:
        raise UserError(f"loss.koleo_ranks={ranks}: expected a divisor of the {world_size} processes")
    job = Job(config, sizes or measure_sizes(config), nodes, gpus, device, precision, backend)
    job.strategy  # noqa: B018 - refuses a shard size that does not divide the processes
    return job


def _precision(config: Config, device: Device) -> str:
    if config.precision != "auto":
        if device.kind == "cuda" and device.peaks and device.peak(config.precision) is None:
            raise UserError(
                f"precision={config.precision}: a {device.name} does not compute in it; "
                f"expected auto, {' or '.join(device.peaks)}"
            )
        return config.precision
    if device.kind == "cuda":
        return "fp16" if device.peaks and "bf16" not in device.peaks else "bf16"
    return "bf16" if pick_precision("auto", torch.device("cpu")) == torch.bfloat16 else "fp32"
