"""How many floating-point operations a step of DINOv2 takes on paper, and what a device owes us for them.

    python benchmarks/flops.py [--peak 790]

Counted are matrix products, a multiply-add as two, a backward pass as two forward passes: the student on all crops, the
teacher on the global ones, the heads on class tokens and masked patches. Figures are per image: two global and
`num_local` local crops. What a step of ours executes is less, `dinoreg plan` says it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import measure

from dinoreg.models.layers import swiglu_hidden_dim

WIDTHS = {"S": (384, 12, "mlp"), "B": (768, 12, "mlp"), "L": (1024, 24, "mlp"), "g": (1536, 40, "swiglu")}
HEADS = {"short": (65536, 256, False), "long": (131072, 384, True)}


@dataclass(frozen=True)
class Encoder:
    """The sizes of a ViT that decide its cost."""

    dim: int
    depth: int
    patch_size: int
    num_registers: int = 4
    ffn: str = "mlp"
    ffn_ratio: float = 4.0
    in_channels: int = 3

    @property
    def hidden_dim(self) -> int:
        """Width inside the FFN, after the gate's two-thirds rule."""
        hidden = int(self.dim * self.ffn_ratio)
        return swiglu_hidden_dim(hidden) if self.ffn == "swiglu" else hidden

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

    def forward(self, size: int) -> float:
        """One image of `size` pixels."""
        return self.blocks(size) + self.patch_embedding(size)


def head(dim: int, prototypes: int, bottleneck_dim: int, hidden_dim: int = 2048) -> float:
    """A head's three linear layers and the prototypes on one token, forward."""
    return 2 * (dim * hidden_dim + hidden_dim**2 + hidden_dim * bottleneck_dim + bottleneck_dim * prototypes)


@dataclass(frozen=True)
class Step:
    """One image's share of a training step, in floating-point operations.

    student    backbone on all crops, forward and backward, less what drop path skips
    teacher    backbone on the global crops
    heads      the student's and the teacher's
    attention  contained in student and teacher
    """

    student: float
    teacher: float
    heads: float
    attention: float

    @property
    def total(self) -> float:
        return self.student + self.teacher + self.heads


def step(
    encoder: Encoder,
    *,
    global_size: int = 224,
    local_size: int = 96,
    num_local: int = 8,
    prototypes: int = 65536,
    dino_bottleneck: int = 256,
    kept_share: float = 1.0,
) -> Step:
    """The operations of one image in a step as they are usually published: every token goes through every layer.

    kept_share  of the samples that go through a block of the student (batch-subset drop path)
    """
    masked = 2 * 0.5 * 0.3 * encoder.patches(global_size)  # half of the crops, with 0.3 of their patches
    crops = [(2, global_size), (num_local, local_size)]
    blocks = kept_share * sum(count * encoder.blocks(size) for count, size in crops)
    attention = kept_share * sum(count * encoder.attention(size) for count, size in crops)
    embedding = sum(count * encoder.patch_embedding(size) for count, size in crops)
    dino, ibot = (head(encoder.dim, prototypes, bottleneck) for bottleneck in (dino_bottleneck, 256))
    return Step(
        student=3 * (blocks + embedding),
        teacher=2 * encoder.forward(global_size),
        heads=3 * ((2 + num_local) * dino + masked * ibot) + 2 * dino + masked * ibot,
        attention=3 * attention + 2 * encoder.attention(global_size),
    )


def rows(peak_tflops: float) -> list[dict[str, str]]:
    """The table: sizes S, B, L and g, patches of 16 and 14 pixels, short and long heads."""
    found = []
    for patch_size, local_size in ((16, 96), (14, 98)):
        for name, (dim, depth, ffn) in WIDTHS.items():
            encoder = Encoder(dim, depth, patch_size, ffn=ffn)
            for recipe, (prototypes, dino_bottleneck, _) in HEADS.items():
                sizes = {"local_size": local_size, "prototypes": prototypes, "dino_bottleneck": dino_bottleneck}
                full, dropped = step(encoder, **sizes), step(encoder, **sizes, kept_share=0.7)
                parts = f"{full.student / 1e9:.0f} + {full.teacher / 1e9:.0f} + {full.heads / 1e9:.1f}"
                rate = peak_tflops * 1e12 / full.total
                found.append(
                    {
                        "model": f"{name}/{patch_size}",
                        "heads": recipe,
                        "GF/img (student + teacher + heads)": f"{full.total / 1e9:.0f} ({parts})",
                        "attention": f"{100 * full.attention / full.total:.0f} %",
                        "img/s at 100 %": f"{rate:.0f}",
                        "at 50 %": f"{rate / 2:.0f}",
                        "drop path 0.3: GF": f"{dropped.total / 1e9:.0f}",
                        "its img/s at 100 %": f"{peak_tflops * 1e12 / dropped.total:.0f}",
                    }
                )
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument(
        "--peak", type=float, default=790.0, help="TFLOP/s of the device; 790: an H200, measured, bf16"
    )
    options.add_argument("--short", action="store_true", help="the same: nothing is measured")
    given = options.parse_args()
    found = rows(given.peak)
    measure.report("flops", {"peak_tflops": given.peak}, {"rows": found}, measure.table(found))


if __name__ == "__main__":
    main()
