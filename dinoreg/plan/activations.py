"""How many bytes the networks keep between their forward and their backward pass, in closed form.

What autograd saves follows from the layers as they are written (`layers.py`, `attention.py`, `vit.py`, `heads.py`):
under autocast the residual stream and the norms stay float32, and matrix products keep their inputs, and a copy of
their weights, in the low precision. `element` is the size of the latter: 2 bytes for bf16 and fp16, 4 for float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from dinoreg.models.attention import Shapes
from dinoreg.plan.flops import Encoder, head_widths

RESIDUAL = 4  # bytes of an entry of the residual stream, which autocast leaves in float32
_STATISTICS = 8  # mean and reciprocal deviation of a norm, for each token


def kept_images(images: int, rate: float) -> int:
    """How many of a group's images go through a residual branch, see `layers.draw_kept`."""
    return max(int(images * (1 - rate)), 1) if rate else images


def kept_groups(shapes: Shapes, rate: float) -> Shapes:
    """(images, tokens) of what stochastic depth leaves of each group."""
    return tuple((kept_images(images, rate), tokens) for images, tokens in shapes)


def num_tokens(shapes: Shapes) -> int:
    return sum(images * tokens for images, tokens in shapes)


def attention_bytes(encoder: Encoder, shapes: Shapes, element: int, backend: str) -> int:
    """Of one attention, between its norm and its residual: (images, tokens) of each group, as they take part.

    backend  "sdpa" | "xformers" | "plain", as `resolve_backend` returns it
    """
    tokens, dim = num_tokens(shapes), encoder.dim
    inputs = tokens * dim * element  # of the projection to queries, keys and values
    three = 3 * tokens * dim * element
    joined = tokens * dim * element  # all groups' outputs, the input of the output projection
    if backend == "plain":
        scores = sum(images * length**2 for images, length in shapes) * encoder.num_heads * element
        return inputs + three + scores + joined
    logsumexp = 4 * tokens * encoder.num_heads
    # One call for each group: its output is kept besides the joined one.
    apart = joined if backend == "sdpa" and len(shapes) > 1 else 0
    return inputs + three + logsumexp + apart + joined


def ffn_bytes(encoder: Encoder, tokens: int, element: int) -> int:
    """Of one FFN, between its norm and its residual."""
    # MLP: before and after GELU; SwiGLU: gate and value, the gate's SiLU, their product.
    widths = 4 if encoder.ffn == "swiglu" else 2
    return tokens * (encoder.dim + widths * encoder.hidden_dim) * element


def block_bytes(
    encoder: Encoder, shapes: Shapes, element: int, backend: str, rate: float = 0.0, chosen: int | None = None
) -> int:
    """Of one block, on (images, tokens) of each packed group.

    rate    of stochastic depth
    chosen  tokens that go through the FFN, stochastic depth or not; None: all
    """
    kept = kept_groups(shapes, rate)
    tokens = num_tokens(kept)
    norm = encoder.dim * RESIDUAL + _STATISTICS
    branch = encoder.dim * element if encoder.layerscale else 0  # its output, for gamma's gradient
    drawn = 8 * sum(images for images, _ in shapes) if rate else 0  # the permutation that the kept ones begin
    attention = tokens * (norm + branch) + drawn + attention_bytes(encoder, kept, element, backend)
    if chosen is None:
        return attention + tokens * (norm + branch) + drawn + ffn_bytes(encoder, tokens, element)
    if rate:  # an image's factor makes the branch float32, and stays
        branch = (encoder.dim if encoder.layerscale else 0) * RESIDUAL + RESIDUAL
    number = 8  # of the token
    return attention + chosen * (number + norm + branch) + ffn_bytes(encoder, chosen, element)


@dataclass(frozen=True)
class EncoderBytes:
    """What a backbone's forward pass leaves, in bytes.

    embedding  patches as rows of pixels, which the projection's weight gradient needs, and the mask
    blocks     inputs of the blocks' layers; with checkpointing the blocks' own inputs
    output     the residual stream before and after the final norm
    copies     the blocks' weight matrices in the low precision (the pixels' projection needs no gradient of its input)
    last       of the blocks' that of the last one, which goes first
    again      with checkpointing: the inputs of one block's layers, while its backward pass runs
    """

    embedding: int
    blocks: int
    output: int
    copies: int
    last: int = 0
    again: int = 0

    @property
    def total(self) -> int:
        return self.embedding + self.blocks + self.output + self.copies


def encoder_bytes(
    encoder: Encoder,
    groups: Sequence[tuple[int, int]],
    element: int,
    backend: str,
    rates: Sequence[float] = (),
    *,
    chosen: int | None = None,
    checkpointing: bool = False,
) -> EncoderBytes:
    """Of the student's backbone.

    groups   (crops, pixels a side) of each packed group; the first comes with a mask
    rates    of stochastic depth, one for each block; empty: none
    chosen   tokens of all groups that are asked for; None: all
    """
    shapes = tuple((count, encoder.tokens(size)) for count, size in groups)
    patches = sum(count * encoder.patches(size) for count, size in groups)
    row = encoder.in_channels * encoder.patch_size**2
    mask = groups[0][0] * encoder.patches(groups[0][1])
    stream = num_tokens(shapes) * encoder.dim * RESIDUAL
    rates = tuple(rates) or (0.0,) * encoder.depth
    each = [block_bytes(encoder, shapes, element, backend, rate) for rate in rates[:-1]]
    each.append(block_bytes(encoder, shapes, element, backend, rates[-1], chosen))
    asked = num_tokens(shapes) if chosen is None else chosen
    copied = encoder.depth * encoder.block_weights if element < RESIDUAL and not checkpointing else 0
    return EncoderBytes(
        embedding=patches * row * element + mask,
        blocks=encoder.depth * stream if checkpointing else sum(each),
        output=asked * (2 * encoder.dim * RESIDUAL + _STATISTICS),
        copies=copied * element,
        last=0 if checkpointing else each[-1],
        again=max(each) + encoder.block_weights * element * (element < RESIDUAL) if checkpointing else 0,
    )


def head_bytes(
    dim: int,
    tokens: int,
    prototypes: int,
    bottleneck_dim: int,
    element: int,
    hidden_dim: int = 2048,
    layers: int = 3,
) -> int:
    """Of a prototype head on `tokens` tokens, its weights' copies included, its logits not (see `loss_bytes`)."""
    widths = head_widths(dim, hidden_dim, bottleneck_dim, layers)
    inputs = tokens * (dim + 2 * sum(widths[1:-1])) * element  # of each linear layer, and before each GELU
    # The bottleneck in float32, its norm and the expanded norm's view; the unit vectors as the prototypes' input.
    unit = tokens * (bottleneck_dim * RESIDUAL + 2 * RESIDUAL) + tokens * bottleneck_dim * element
    copies = sum(fan_in * fan_out for fan_in, fan_out in pairwise(widths)) * element if element < RESIDUAL else 0
    rows = prototypes * bottleneck_dim * element + prototypes * RESIDUAL  # normalised prototypes, their lengths
    return inputs + unit + copies + rows


def loss_bytes(rows: int, prototypes: int, element: int, half: bool = False) -> int:
    """Of the cross-entropy on (rows, prototypes) logits: their gradient, in their precision (float32 for fp16)."""
    return rows * prototypes * (4 if half else element)
