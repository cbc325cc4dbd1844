"""Memory of one device through a training step, by part.

A step is largest at one of a few moments: while the teacher's targets are made, when the student's losses have been
computed and nothing has been given up yet, in the search for KoLeo's neighbours, at the first block's backward pass,
or at the end of the backward pass, when all gradients are there. Each is added up from the code of `train/step.py`,
and the largest one is what a device must hold.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from dinoreg.plan.activations import (
    RESIDUAL,
    EncoderBytes,
    encoder_bytes,
    head_bytes,
    kept_groups,
    loss_bytes,
    num_tokens,
)
from dinoreg.plan.devices import CONTEXT_GIB, FRAGMENTATION, GIB, NCCL_GIB
from dinoreg.plan.job import ELEMENT, Head, Job
from dinoreg.runtime.tiling import rows_per_chunk

# In the order in which they are shown.
PARTS = (
    "student weights",
    "teacher weights",
    "anchor weights",
    "AdamW moments",
    "gradients",
    "weights in low precision",
    "gathered weights",
    "activations of the backbone",
    "activations of the heads",
    "logits and targets",
    "crops",
    "working memory",
)
# What stays from step to step: the rest comes and goes, and leaves gaps.
LASTING = ("student weights", "teacher weights", "anchor weights", "AdamW moments")


@dataclass(frozen=True)
class Moment:
    """One moment of a step: {part: bytes}."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Memory:
    """Of one device, in bytes.

    moments    of a step, in their order
    context    allowance for the CUDA context, libraries and NCCL
    fragments  allowance for what the allocator cannot use
    host       pinned (or plain) CPU memory of one process for crops that are prepared ahead
    available  what the device has; 0: not known
    """

    moments: tuple[Moment, ...]
    context: int
    fragments: int
    host: int
    available: int

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def allocated(self) -> int:
        """Tensors at the peak: what `max_memory` in metrics.jsonl shows."""
        return self.peak.total

    @property
    def needed(self) -> int:
        return self.allocated + self.context + self.fragments

    @property
    def fits(self) -> bool:
        return self.available == 0 or self.needed <= self.available


def memory_of(job: Job) -> Memory:
    """What a device holds through a step of this job."""
    moments = tuple(_Step(job).moments())
    peak = max(moments, key=lambda moment: moment.total)
    cuda = job.device.kind == "cuda"
    passing = sum(size for part, size in peak.parts.items() if part not in LASTING)
    crops, channels = job.config.crops, job.config.model.in_channels
    pixels = 2 * crops.global_size**2 + crops.num_local * crops.local_size**2
    slots = job.config.data.prefetch + 1
    return Memory(
        moments=moments,
        context=int(GIB * (CONTEXT_GIB + NCCL_GIB * (job.world_size > 1))) if cuda else 0,
        fragments=int(FRAGMENTATION * passing) if cuda else 0,
        host=slots * job.config.batch_size * pixels * channels,
        available=job.device.memory,
    )


class _Step:
    """The sizes of a step's tensors on one process."""

    def __init__(self, job: Job) -> None:
        self.job, config = job, job.config
        self.split = config.optim.accumulate > 1
        self.images, self.part_images = config.batch_size, job.micro_batch_size
        self.masked = job.masked_patches(self.images, worst=True)
        self.part_masked = job.masked_patches(self.part_images, worst=True)
        self.dim = job.sizes.encoder.dim
        self.groups = job.groups(self.part_images)
        encoder = job.sizes.encoder
        self.shapes = tuple((count, encoder.tokens(size)) for count, size in self.groups)
        self.stream = num_tokens(self.shapes) * self.dim * RESIDUAL
        self.gather = job.strategy == "fsdp"
        # Sharded weights that are gathered in a low precision are computed with as they are.
        self.param_bytes = ELEMENT[config.parallel.param_dtype] if self.gather else 4
        self.backbone = self._backbone()

    def moments(self) -> list[Moment]:
        found = [
            self._moment("teacher", self._gradients(4, 4), **self._teacher()),
            self._moment("losses", self._before_backward(), **self._losses()),
            self._moment("backward, first block", self._in_backward(), **self._first_block()),
            self._moment("backward, end", self._gradients(4, 8) + self._unsummed(self._two_blocks), **self._end()),
        ]
        if self.job.config.loss.koleo_weight > 0:
            found.insert(2, self._moment("KoLeo", self._before_backward(), **self._koleo()))
        return found

    def _moment(self, name: str, gradients: int, **others: int) -> Moment:
        job, share = self.job, self.job.shard_size
        student = 4 * job.padded() // share
        parts = {
            "student weights": student,
            "teacher weights": student,
            "anchor weights": 4 * job.padded(heads=False) // share if job.has_anchor else 0,
            "AdamW moments": 2 * student,
            "gradients": gradients,
            "crops": self._crops(),
            **{key.replace("_", " "): size for key, size in others.items()},
        }
        return Moment(name, {part: parts[part] for part in PARTS if parts.get(part)})

    # ---------------------------------------------------------------- parts

    def _crops(self) -> int:
        crops, channels = self.job.config.crops, self.job.config.model.in_channels
        pixels = 2 * crops.global_size**2 + crops.num_local * crops.local_size**2
        return 4 * self.images * channels * pixels * (2 if self.split else 1)  # micro-batches are copies

    def _backbone(self) -> EncoderBytes:
        job = self.job
        found = encoder_bytes(
            job.sizes.encoder,
            self.groups,
            job.element,
            job.backend,
            job.sizes.rates,
            chosen=self._chosen(),
            checkpointing=job.config.model.checkpointing,
        )
        if self.param_bytes < 4:
            copies = job.sizes.encoder.block_weights * job.element
            again = max(0, found.again - copies) if job.config.model.checkpointing else 0
            return dataclasses.replace(found, copies=0, again=again)
        return found

    def _chosen(self) -> int:
        """Tokens that the student's backbone is asked for: of class, and masked or, with an anchor, all patches."""
        crops = self.job.config.crops
        patches = 2 * self.part_images * self.job.sizes.encoder.patches(crops.global_size)
        return (2 + crops.num_local) * self.part_images + (patches if self.job.has_anchor else self.part_masked)

    def _heads(self) -> int:
        job, config = self.job, self.job.config
        return sum(
            head_bytes(
                self.dim,
                job.rows(head, self.part_images, self.part_masked),
                head.prototypes,
                head.bottleneck_dim,
                job.element,
                config.head.hidden_dim,
                config.head.layers,
            )
            for head in job.sizes.heads.values()
        )

    def _targets(self) -> int:
        """Float32 targets of the whole batch, and the teacher's class tokens."""
        rows = ((self.job.rows(h, self.images, self.masked, True), h.prototypes) for h in self.job.sizes.heads.values())
        return sum(4 * count * prototypes for count, prototypes in rows) + 2 * self.images * self.dim * 4

    def _logits(self, element: int) -> int:
        job = self.job
        heads = job.sizes.heads.values()
        return sum(job.rows(h, self.part_images, self.part_masked) * h.prototypes * element for h in heads)

    def _loss_gradients(self) -> int:
        job = self.job
        half = job.precision == "fp16"
        return sum(
            loss_bytes(job.rows(h, self.part_images, self.part_masked), h.prototypes, job.element, half)
            for h in job.sizes.heads.values()
        )

    def _gathered(self, unit: int, kept: bool) -> int:
        """FSDP's whole weights, in bytes.

        unit  parameters of what is gathered: it is there twice while it is copied out of what arrived
        kept  whether all that was gathered before is still there
        """
        if not self.gather:
            return 0
        keeps = kept and not self.job.config.parallel.reshard
        return self.param_bytes * (unit + (self.job.padded() if keeps else unit))

    @property
    def _largest_head(self) -> int:
        return max(unit.padded(self.job.shard_size) for unit in self.job.head_units)

    @property
    def _two_blocks(self) -> int:
        """One that computes and the next one, on its way."""
        return 2 * max(unit.padded(self.job.shard_size) for unit in self.job.sizes.units)

    def _gradients(self, plain: int, replicated: int) -> int:
        """Bytes of all gradients, `plain` for each parameter; under DDP with micro-batches `replicated`."""
        each = replicated if self.job.strategy == "ddp" and self.split else plain
        return each * self.job.padded() // self.job.shard_size

    def _before_backward(self) -> int:
        """DDP's buckets stay; others have gradients only from the second micro-batch on."""
        if self.job.strategy == "ddp" or self.split:
            return self._gradients(4, 8)
        return 0

    def _in_backward(self) -> int:
        """The heads' gradients besides; under FSDP whole ones as well, before and while they are summed."""
        before = self._before_backward()
        heads = 4 * self.job.padded(backbone=False) // self.job.shard_size
        return (before or heads) + self._unsummed(self._largest_head)

    def _unsummed(self, unit: int) -> int:
        """FSDP's gradients of `unit` whole parameters, as they were computed and as they are sent."""
        reduced = ELEMENT[self.job.config.parallel.reduce_dtype]
        return unit * (self.param_bytes + reduced) if self.gather else 0

    # ---------------------------------------------------------------- moments

    def _teacher(self) -> dict[str, int]:
        job, encoder = self.job, self.job.sizes.encoder
        tokens = 2 * self.part_images * encoder.tokens(job.config.crops.global_size)
        inside = (4 if encoder.ffn == "swiglu" else 2) * encoder.hidden_dim * job.element
        forward = tokens * (3 * self.dim * RESIDUAL + max(inside, 5 * self.dim * job.element))
        heads = job.sizes.heads.values()
        logits = sum(job.rows(h, self.images, self.masked, True) * h.prototypes * job.element for h in heads)
        # Logits stay until the targets are made from them; put in the order of the batch, they are there twice.
        targets = max(2 * logits if self.split else 0, logits + self._targets())
        return {
            "gathered_weights": max(self._gathered(unit, False) for unit in (self._largest_head, self._two_blocks)),
            "logits_and_targets": targets if targets > forward else 0,
            "working_memory": forward if forward >= targets else 0,
        }

    def _kept(self) -> dict[str, int]:
        """What the student's forward pass leaves."""
        return {
            "weights_in_low_precision": self.backbone.copies,
            "gathered_weights": self._gathered(self._largest_head, True),
            "activations_of_the_backbone": self.backbone.total - self.backbone.copies,
            "activations_of_the_heads": self._heads(),
        }

    def _losses(self) -> dict[str, int]:
        """Logits and their gradients are both there; the sum of both views' targets and two scratch tiles as well."""
        job, device = self.job, torch.device(self.job.device.kind)
        head = next(iter(job.sizes.heads.values()))
        both_views = 4 * self.part_images * head.prototypes if job.config.crops.num_local else 0
        scratch = max(_scratch(head, rows, repeats, device) for head, rows, repeats in self._tiles())
        selected = self._targets() * self.part_images // self.images if self.split else 0
        logits = self._logits(job.element) + self._loss_gradients()
        return {
            **self._kept(),
            "logits_and_targets": self._targets() + selected + both_views + logits,
            "working_memory": scratch,
        }

    def _tiles(self) -> list[tuple[Head, int, int]]:
        """(head, rows of targets, blocks of logits that face them) of the three cross-entropies."""
        heads = list(self.job.sizes.heads.values())
        num_local = self.job.config.crops.num_local
        found = [(heads[0], 2 * self.part_images, 1), (heads[-1], self.part_masked, 1)]
        return [*found, (heads[0], self.part_images, num_local)] if num_local else found

    def _koleo(self) -> dict[str, int]:
        """All pairs of one view, and the tokens that were gathered for it."""
        job = self.job
        images = job.koleo_ranks * self.images
        working = 4 * images**2 + 4 * self.dim * images * 6
        if self.split:  # before the student's passes with gradient
            return {
                "logits_and_targets": self._targets(),
                "gathered_weights": self._gathered(0, True),
                "working_memory": working,
            }
        return {
            **self._kept(),
            "logits_and_targets": self._targets() + self._loss_gradients(),
            "working_memory": working,
        }

    def _first_block(self) -> dict[str, int]:
        """The first whose FFN has seen all tokens: the last but one, with the last one's activations gone."""
        job, encoder = self.job, self.job.sizes.encoder
        if encoder.depth > 1:
            rate, gone = job.sizes.rates[-2], self.backbone.last
            width = (4 if encoder.ffn == "swiglu" else 2) * encoder.hidden_dim * job.element
        else:  # there is none: the attention of the only block has seen all
            rate, gone = job.sizes.rates[0], 0
            width = 6 * self.dim * job.element
        tokens = num_tokens(kept_groups(self.shapes, rate))
        # The residual's gradient, and either the FFN's hidden ones or those of the norm and of the gathered samples.
        working = self.stream + max(tokens * width, 2 * tokens * self.dim * RESIDUAL + self.stream)
        kept = self._kept()
        kept.pop("activations_of_the_heads")
        kept["activations_of_the_backbone"] -= gone
        kept["gathered_weights"] = self._gathered(self._two_blocks, True)
        return {**kept, "logits_and_targets": self._targets(), "working_memory": working + self.backbone.again}

    def _end(self) -> dict[str, int]:
        return {
            "gathered_weights": self._gathered(self._two_blocks, False),
            "logits_and_targets": self._targets(),
            "working_memory": 3 * self.stream,
        }


def _scratch(head: Head, rows: int, repeats: int, device: torch.device) -> int:
    """Two tiles of float32 scores, as `losses.dino` sizes them."""
    if rows == 0:
        return 0
    tile_rows = min(rows, rows_per_chunk(head.prototypes, device))
    tile_blocks = min(repeats, rows_per_chunk(head.prototypes * tile_rows, device))
    return 2 * 4 * tile_rows * tile_blocks * head.prototypes
