"""A run as far as its cost goes: its networks' sizes, its batch, its processes and what they compute on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from dinoreg.config.load import Config
from dinoreg.models.heads import PrototypeHead
from dinoreg.models.vit import RegisterViT
from dinoreg.plan.activations import kept_images
from dinoreg.plan.devices import Device
from dinoreg.plan.flops import Encoder, Step, step
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
    """A prototype head: its sizes, its parameters, and what it sees ("cls", "patches")."""

    prototypes: int
    bottleneck_dim: int
    unit: Unit
    sees: tuple[str, ...]


@dataclass(frozen=True)
class Sizes:
    """What the networks are made of.

    units  each block, then the rest of the backbone
    heads  {"dino_head", "ibot_head"}; one for both when tied
    """

    encoder: Encoder
    rates: tuple[float, ...]
    units: tuple[Unit, ...]
    heads: dict[str, Head]

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
    def element(self) -> int:
        """Bytes of a number in a matrix product."""
        return ELEMENT[self.precision]

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

    def groups(self, images: int) -> list[tuple[int, int]]:
        """(crops, pixels a side) of the student's packed groups for `images` images."""
        crops = self.config.crops
        found = [(2 * images, crops.global_size), (crops.num_local * images, crops.local_size)]
        return [group for group in found if group[0]]

    def masked_patches(self, images: int, worst: bool = False) -> int:
        """Hidden patches of `images` images' global crops; with `worst`, three standard deviations above the mean.

        Masks are stratified over the batch of all processes, so that a part of it has more or fewer of them.
        """
        mask, crops = self.config.mask, 2 * images
        patches = self.sizes.encoder.patches(self.config.crops.global_size)
        masked = int(2 * self.global_batch_size * mask.probability) / (2 * self.global_batch_size)
        low, high = mask.ratio
        share = (low + high) / 2
        mean = crops * masked * share * patches
        if not worst:
            return round(mean)
        square = masked * (share**2 + (high - low) ** 2 / 12)
        variance = max(0.0, square - (masked * share) ** 2) * (1 - images / self.global_batch_size)
        return min(math.ceil(mean + 3 * patches * math.sqrt(crops * variance)), int(crops * high * patches))

    def rows(self, head: Head, images: int, masked: int, of_teacher: bool = False) -> int:
        """Tokens that go through a head for `images` images with `masked` hidden patches."""
        views = 2 if of_teacher else 2 + self.config.crops.num_local
        return views * images * ("cls" in head.sees) + masked * ("patches" in head.sees)

    def flops(self) -> Step:
        """Operations of one image in a step, those that drop path skips left out."""
        config, images = self.config, self.micro_batch_size
        heads = list(self.sizes.heads.values())
        counts, rates = [count for count, _ in self.groups(images)], self.sizes.rates
        shares = [sum(kept_images(count, rate) for rate in rates) / count / len(rates) for count in counts]
        return step(
            self.sizes.encoder,
            global_size=config.crops.global_size,
            local_size=config.crops.local_size,
            num_local=config.crops.num_local,
            prototypes=heads[0].prototypes,
            ibot_prototypes=heads[-1].prototypes,
            dino_bottleneck=heads[0].bottleneck_dim,
            ibot_bottleneck=heads[-1].bottleneck_dim,
            hidden_dim=config.head.hidden_dim,
            head_layers=config.head.layers,
            masked_patches=self.masked_patches(config.batch_size) / config.batch_size,
            kept_share=shares,
            last_kept_share=[kept_images(count, rates[-1]) / count for count in counts],
            all_tokens=False,
            patch_embedding_gradient=False,
            checkpointing=config.model.checkpointing,
            anchor=self.has_anchor,
            class_tokens_first=config.optim.accumulate > 1 and config.loss.koleo_weight > 0,
        )

    def koleo_flops(self) -> float:
        """Operations of one process's search for neighbours in a step: both views' products of all pairs."""
        if self.config.loss.koleo_weight == 0:
            return 0.0
        return 2 * 2 * (self.koleo_ranks * self.config.batch_size) ** 2 * self.sizes.encoder.dim


def measure_sizes(config: Config) -> Sizes:
    """The sizes of a config's networks, from the networks themselves; no memory is taken."""
    with torch.device("meta"):
        student, _ = build_networks(config)
    backbone: RegisterViT = student.backbone
    inside = {id(parameter) for parameter in backbone.blocks.parameters()}
    rest = [parameter for parameter in backbone.parameters() if id(parameter) not in inside]
    tied = "ibot_head" not in student
    heads = {}
    for name in ("dino_head", "ibot_head"):
        if name in student:
            sees = ("cls", "patches") if tied else ("cls",) if name == "dino_head" else ("patches",)
            head: PrototypeHead = getattr(student, name)
            prototypes, bottleneck = head.last_layer.weight_v.shape
            heads[name] = Head(prototypes, bottleneck, _unit(head.parameters()), sees)
    return Sizes(
        encoder=Encoder(
            dim=backbone.dim,
            depth=backbone.depth,
            patch_size=backbone.patch_size,
            num_registers=backbone.num_registers,
            ffn=backbone.ffn,
            ffn_ratio=backbone.ffn_ratio,
            in_channels=backbone.in_channels,
            heads=backbone.heads,
            layerscale=bool(backbone.layerscale),
        ),
        rates=tuple(block.drop_path for block in backbone.blocks),  # type: ignore[misc]
        units=(*(_unit(block.parameters()) for block in backbone.blocks), _unit(rest)),
        heads=heads,
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
