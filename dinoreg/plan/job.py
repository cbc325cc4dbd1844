"""The properties of a run that its cost depends on: sizes of its networks, batch, processes and devices."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from dinoreg.config.load import Config
from dinoreg.config.schema import PRECISIONS, ParallelConfig
from dinoreg.models.heads import PrototypeHead
from dinoreg.plan.devices import Device
from dinoreg.runtime.device import pick_precision
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.packed_attention import PACKED
from dinoreg.train.parallelize import choose_strategy
from dinoreg.train.state import Networks, build_networks
from dinoreg.train.tutor import Tutor, load_tutor


@dataclass(frozen=True)
class Sizes:
    """The sizes of the networks, from a student on the meta device, without memory. The teacher is as large.

    tutor  the frozen network of `distill=`, with its weights; None without
    """

    networks: Networks
    tutor: Tutor | None = None

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Number of parameters of each network by name, see `Networks`."""
        return {name: sum(p.numel() for p in network.parameters()) for name, network in self.networks.items()}

    @property
    def student(self) -> int:
        """Number of parameters of the backbone and its heads."""
        return sum(self.parameters.values())

    @property
    def prototypes(self) -> dict[str, int]:
        """Number of prototypes of each head, by name; a tied head is listed once. {} with a tutor."""
        heads = {name: head for name, head in self.networks.items() if isinstance(head, PrototypeHead)}
        return {name: len(head.last_layer.weight_g) for name, head in heads.items()}

    @property
    def centers(self) -> int:
        """Numbers in the centres of class tokens and of patch tokens together."""
        widths = list(self.prototypes.values()) if self.tutor is None else [self.tutor.encoder.dim]
        return widths[0] + widths[-1]

    @property
    def dim(self) -> int:
        """Width of the backbone's tokens."""
        return self.networks.backbone.dim

    @property
    def depth(self) -> int:
        """Number of blocks of the backbone."""
        return self.networks.backbone.depth

    def patches(self, size: int) -> int:
        """Number of patches of a square image of `size` pixels a side."""
        return (size // self.networks.backbone.patch_size) ** 2

    def tokens(self, size: int) -> int:
        """Number of tokens (class, registers, patches) of a square image of `size` pixels a side."""
        return 1 + self.networks.backbone.num_registers + self.patches(size)


def padded(network: nn.Module, shards: int) -> int:
    """Number of elements of a network as FSDP gathers it from `shards` processes, each of which sends as many rows.

    A parameter with a single row, such as the positions, is padded to one row per process.
    """
    return sum(-(-len(p) // shards) * shards * (p.numel() // len(p)) for p in network.parameters())


@dataclass(frozen=True)
class Job:
    """A config on `nodes` machines with `gpus` processes each.

    precision  "bf16" | "fp16" | "fp32" of matrix products
    backend    of attention, as `resolve_backend` returns it
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
        """Number of processes."""
        return self.nodes * self.gpus

    @property
    def global_batch_size(self) -> int:
        """Images a step, over all processes."""
        return self.config.batch_size * self.world_size

    @property
    def micro_batch_size(self) -> int:
        """Images of a micro-batch on one process."""
        return self.config.batch_size // self.config.optim.accumulate

    @property
    def strategy(self) -> str:
        """ "single" | "ddp" | "fsdp"."""
        return choose_strategy(self.config.parallel, self.sizes.student, self.world_size)

    @property
    def shard_size(self) -> int:
        """Number of processes that share one replica of the training state; 1 without FSDP."""
        return (self.config.parallel.shard or self.world_size) if self.strategy == "fsdp" else 1

    def padded(self, *names: str) -> int:
        """Number of elements of these networks (none: all) as FSDP gathers them; without FSDP that of parameters."""
        networks = self.sizes.networks
        return sum(padded(networks[name], self.shard_size) for name in names or networks)

    @property
    def copies(self) -> int:
        """Number of replicas of the training state among the processes."""
        return self.world_size // self.shard_size

    @property
    def koleo_ranks(self) -> int:
        """Number of processes whose images KoLeo searches together."""
        return self.config.loss.koleo_ranks or self.world_size

    def masked_patches(self, images: int, worst: bool = False) -> int:
        """Expected number of masked patches in the global crops of `images` images.

        worst  three standard deviations above the mean, at most the possible maximum

        Masks are stratified over the batch of all processes, so that a part of it may have more or fewer of them.
        """
        mask, crops = self.config.mask, 2 * images
        patches = self.sizes.patches(self.config.crops.global_size)
        masked = int(2 * self.global_batch_size * mask.probability) / (2 * self.global_batch_size)
        low, high = mask.ratio
        share = (low + high) / 2
        mean = round(crops * masked * share * patches)
        if not worst:
            return mean
        square = masked * (share**2 + (high - low) ** 2 / 12)
        variance = max(0.0, square - (masked * share) ** 2) * (1 - images / self.global_batch_size)
        return min(mean + math.ceil(3 * patches * math.sqrt(crops * variance)), int(crops * high * patches))

    def koleo_operations(self) -> float:
        """Floating-point operations of KoLeo's search on one process in a step: products of all pairs of both views."""
        if self.config.loss.koleo_weight == 0:
            return 0.0
        return 2 * 2 * (self.koleo_ranks * self.config.batch_size) ** 2 * self.sizes.dim

    def alone(self) -> "Job":
        """The same job on one process."""
        loss = replace(self.config.loss, koleo_ranks=None)
        return replace(self, config=replace(self.config, parallel=ParallelConfig(), loss=loss), nodes=1, gpus=1)

    def as_dict(self) -> dict[str, Any]:
        """The job's main properties as JSON values."""
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
    """The sizes of a config's networks, which are built on the meta device, without memory; a tutor is loaded."""
    tutor = load_tutor(config, torch.device("cpu"), torch.float32)
    with torch.device("meta"):
        return Sizes(build_networks(config, tutor)[0], tutor)


def describe(config: Config, nodes: int, gpus: int, device: Device, sizes: Sizes | None = None) -> Job:
    """A config's job on `nodes` machines with `gpus` processes each.

    sizes   of the config's networks; None: measured
    raises  UserError where such a run would be refused at its start
    """
    config, world_size = config.as_trained(), nodes * gpus
    precision = _precision(config, device)
    backend = config.model.attention
    if backend in PACKED and device.kind != "cuda":
        raise UserError(
            f"model.attention={backend}: runs on CUDA, and this is a plan for {device.name}; use auto or sdpa"
        )
    if backend == "auto":
        backend = "plain" if device.kind == "cpu" and precision != "fp32" else "sdpa"
    config.check_start()
    ranks = config.loss.koleo_ranks
    if ranks is not None and world_size % ranks:
        raise UserError(f"loss.koleo_ranks={ranks}: expected a divisor of the {world_size} processes")
    job = Job(config, sizes or measure_sizes(config), nodes, gpus, device, precision, backend)
    job.strategy  # noqa: B018 - refuses a shard size that does not divide the processes
    return job


def _precision(config: Config, device: Device) -> str:
    if config.precision != "auto":
        refused = device.peaks if device.kind == "cuda" else config.precision == "tf32"
        if refused and device.peak(config.precision) is None:
            raise UserError(
                f"precision={config.precision}: a {device.name} does not compute in it; "
                f"expected auto, {' or '.join(device.peaks or PRECISIONS[1:])}"
            )
        return config.precision
    if device.kind == "cuda":
        return "fp16" if device.peaks and "bf16" not in device.peaks else "bf16"
    return "bf16" if pick_precision("auto", torch.device("cpu")) == torch.bfloat16 else "fp32"
