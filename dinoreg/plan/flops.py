"""How many floating-point operations networks take, in closed form.

Counted are matrix products, a multiply-add as two: linear maps and attention. Norms, activations and losses are left
out (below one percent). A backward pass counts as two forward passes; the patch embedding, whose input needs no
gradient, as one. Sizes are those of one image or one token, so that a batch is a multiplication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from dinoreg.models.layers import swiglu_hidden_dim


@dataclass(frozen=True)
class Encoder:
    """The sizes of a ViT that decide its cost.

    heads       attention heads; None: of 64 channels each
    layerscale  whether residuals have channel factors
    """

    dim: int
    depth: int
    patch_size: int
    num_registers: int = 4
    ffn: str = "mlp"
    ffn_ratio: float = 4.0
    in_channels: int = 3
    heads: int | None = None
    layerscale: bool = True

    @property
    def hidden_dim(self) -> int:
        """Width inside the FFN, after the gate's two-thirds rule."""
        hidden = int(self.dim * self.ffn_ratio)
        return swiglu_hidden_dim(hidden) if self.ffn == "swiglu" else hidden

    @property
    def num_heads(self) -> int:
        return self.heads or max(1, self.dim // 64)

    @property
    def ffn_weights(self) -> int:
        """Entries of the weight matrices of one FFN."""
        return (3 if self.ffn == "swiglu" else 2) * self.dim * self.hidden_dim

    @property
    def block_weights(self) -> int:
        """Entries of the weight matrices of one block."""
        return 4 * self.dim**2 + self.ffn_weights

    def patches(self, size: int) -> int:
        """Patches of a square image of `size` pixels."""
        return (size // self.patch_size) ** 2

    def tokens(self, size: int) -> int:
        """Class token, registers and patches of a square image of `size` pixels."""
        return 1 + self.num_registers + self.patches(size)

    def patch_embedding(self, size: int) -> float:
        """Of one image of `size` pixels, forward."""
        return 2 * self.patches(size) * self.in_channels * self.patch_size**2 * self.dim

    def attention(self, size: int) -> float:
        """The two products with T x T matrices in all blocks, forward."""
        return self.depth * 4 * self.tokens(size) ** 2 * self.dim

    def blocks(self, size: int) -> float:
        """All blocks of one image of `size` pixels, forward."""
        return self.depth * self.tokens(size) * 2 * self.block_weights + self.attention(size)

    def ffn_of(self, tokens: float) -> float:
        """One block's FFN on so many tokens, forward."""
        return tokens * 2 * self.ffn_weights

    def forward(self, size: int) -> float:
        """One image of `size` pixels."""
        return self.blocks(size) + self.patch_embedding(size)


def head_widths(dim: int, hidden_dim: int, bottleneck_dim: int, layers: int = 3) -> list[int]:
    """The widths between a head's linear layers: input, hidden ones, bottleneck."""
    return [dim] + [hidden_dim] * (layers - 1) + [bottleneck_dim]


def head(dim: int, prototypes: int, bottleneck_dim: int, hidden_dim: int = 2048, layers: int = 3) -> float:
    """A head's `layers` linear layers and the prototypes on one token, forward."""
    widths = head_widths(dim, hidden_dim, bottleneck_dim, layers)
    products = sum(fan_in * fan_out for fan_in, fan_out in pairwise(widths))
    return 2 * (products + bottleneck_dim * prototypes)


@dataclass(frozen=True)
class Step:
    """One image's share of a training step, in floating-point operations.

    student    backbone on all crops, forward and backward, less what drop path skips
    teacher    backbone on the global crops
    heads      the student's and the teacher's
    attention  contained in student and teacher
    dropped    what drop path saves; not contained in the others
    again      forward passes that are repeated or added: recomputed blocks, an anchor, KoLeo's pass over micro-batches
    """

    student: float
    teacher: float
    heads: float
    attention: float
    dropped: float = 0.0
    again: float = 0.0

    @property
    def total(self) -> float:
        return self.student + self.teacher + self.heads + self.again


def step(
    encoder: Encoder,
    *,
    global_size: int = 224,
    local_size: int = 96,
    num_local: int = 8,
    prototypes: int = 65536,
    ibot_prototypes: int | None = None,
    dino_bottleneck: int = 256,
    ibot_bottleneck: int = 256,
    hidden_dim: int = 2048,
    head_layers: int = 3,
    masked_patches: float | None = None,
    kept_share: float | Sequence[float] = 1.0,
    last_kept_share: float | Sequence[float] | None = None,
    all_tokens: bool = True,
    patch_embedding_gradient: bool = True,
    checkpointing: bool = False,
    anchor: bool = False,
    class_tokens_first: bool = False,
) -> Step:
    """The operations of one image in a step.

    ibot_prototypes of the patches' head; None: as prototypes
    masked_patches  of both global crops together; by default half of the crops with 0.3 of their patches
    kept_share      of the samples that go through a block of the student (batch-subset drop path), of the global and of
                    the local crops, or one for both: a mean over the blocks
    last_kept_share of the last block alone; None: as kept_share
    all_tokens      the last FFN sees every token, as in published counts; False: only those that a loss looks at
    patch_embedding_gradient  count a gradient of the pixels, as "backward = 2x forward" does; nothing computes it
    checkpointing   the student's blocks run forward twice
    anchor          a third backbone sees the global crops, forward
    class_tokens_first  all crops go once more through the student, forward (KoLeo over several micro-batches)
    """
    masked = 2 * 0.5 * 0.3 * encoder.patches(global_size) if masked_patches is None else masked_patches
    shares = _of_both(kept_share)
    last = _of_both(kept_share if last_kept_share is None else last_kept_share)
    crops = [(2, global_size, shares[0], last[0]), (num_local, local_size, shares[1], last[1])]
    crops = [each for each in crops if each[0]]
    full = sum(count * encoder.blocks(size) for count, size, _, _ in crops)
    blocks = sum(count * share * encoder.blocks(size) for count, size, share, _ in crops)
    attention = sum(count * share * encoder.attention(size) for count, size, share, _ in crops)
    embedding = sum(count * encoder.patch_embedding(size) for count, size, _, _ in crops)
    both_views = 2 * encoder.forward(global_size)  # of a whole backbone, as the anchor is
    teacher = both_views
    if not all_tokens:
        chosen = encoder.ffn_of(2 + num_local + (2 * encoder.patches(global_size) if anchor else masked))
        full += chosen - sum(encoder.ffn_of(count * encoder.tokens(size)) for count, size, _, _ in crops)
        blocks += chosen - sum(encoder.ffn_of(count * share * encoder.tokens(size)) for count, size, _, share in crops)
        teacher += encoder.ffn_of(2 + masked - 2 * encoder.tokens(global_size))
    dino = head(encoder.dim, prototypes, dino_bottleneck, hidden_dim, head_layers)
    ibot = head(encoder.dim, ibot_prototypes or prototypes, ibot_bottleneck, hidden_dim, head_layers)
    again = blocks * checkpointing + both_views * anchor + (blocks + embedding) * class_tokens_first
    return Step(
        student=3 * blocks + (3 if patch_embedding_gradient else 2) * embedding,
        teacher=teacher,
        heads=3 * ((2 + num_local) * dino + masked * ibot) + 2 * dino + masked * ibot,
        attention=3 * attention + 2 * encoder.attention(global_size),
        dropped=3 * (full - blocks),
        again=again,
    )


def _of_both(share: float | Sequence[float]) -> tuple[float, float]:
    """(global crops', local crops')."""
    return (share, share) if isinstance(share, int | float) else (share[0], share[-1])
