"""A run as far as its cost goes: its networks' sizes, its batch, its processes and what they compute on."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dinoreg.config.load import Config
from dinoreg.plan.devices import Device
from dinoreg.runtime.device import pick_precision
from dinoreg.runtime.errors import UserError
from dinoreg.train.parallelize import choose_strategy
from dinoreg.train.state import build_networks

ELEMENT = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Unit:
    """What FSDP gathers at a time: (rows, entries of a row) of each parameter. It shards rows."""

    shapes: tuple[tuple[int, int], ...]

    @property
    def parameters(self) -> int:
        return sum(rows * width for rows, width in self.shapes)

    def padded(self, shards: int) -> int:
        """Entries as they are gathered from `shards` processes, each of which sends equally many rows.

        A parameter of a single row, as the positions are, is sent by all of them.
        """
        return sum(-(-rows // shards) * shards * width for rows, width in self.shapes)


@dataclass(frozen=True)
class Head:
    """A prototype head: its prototypes and its parameters."""

    prototypes: int
    unit: Unit


@dataclass(frozen=True)
class Sizes:
    """What the networks are made of.

    units  each block, then the rest of the backbone
    heads  {"dino_head", "ibot_head"}; one for both when tied
    """

    dim: int
    depth: int
    patch_size: int
    num_registers: int
    units: tuple[Unit, ...]
    heads: dict[str, Head]

    def patches(self, size: int) -> int:
        """Patches of a square image of `size` pixels."""
        return (size // self.patch_size) ** 2

    def tokens(self, size: int) -> int:
        """Class token, registers and patches of a square image of `size` pixels."""
        return 1 + self.num_registers + self.patches(size)

    @property
    def backbone(self) -> int:
        return sum(unit.parameters for unit in self.units)

    @property
    def student(self) -> int:
        """Parameters of the backbone and its heads; the teacher has as many."""
        return self.backbone + sum(head.unit.parameters for head in self.heads.values())


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

    def padded(self, *, backbone: bool = True, heads: bool = True) -> int:
        """Entries of the backbone and the heads as they are gathered; without FSDP as many as there are parameters."""
        units = (*(self.sizes.units if backbone else ()), *(self.head_units if heads else ()))
        return sum(unit.padded(self.shard_size) for unit in units)

    @property
    def head_units(self) -> tuple[Unit, ...]:
        return tuple(head.unit for head in self.sizes.heads.values())

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
        student, _ = build_networks(config)
    backbone = student.backbone
    in_blocks = {id(parameter) for parameter in backbone.blocks.parameters()}
    rest = [parameter for parameter in backbone.parameters() if id(parameter) not in in_blocks]
    heads = {name: student[name] for name in student if name != "backbone"}
    return Sizes(
        dim=backbone.dim,
        depth=backbone.depth,
        patch_size=backbone.patch_size,
        num_registers=backbone.num_registers,
        units=(*(_unit(block.parameters()) for block in backbone.blocks), _unit(rest)),
        heads={
            name: Head(len(head.last_layer.weight_g), _unit(head.parameters()))  # type: ignore[union-attr, arg-type]
            for name, head in heads.items()
        },
    )


def _unit(parameters: Iterable[nn.Parameter]) -> Unit:
    return Unit(tuple((parameter.shape[0], parameter.numel() // parameter.shape[0]) for parameter in parameters))


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
    dtype = pick_precision("auto", torch.device("cpu"))
    return "bf16" if dtype == torch.bfloat16 else "fp32"
