"""How many floating-point operations a step of DINOv2 takes on paper, and what a device owes us for them.

    python benchmarks/flops.py [--peak 790]

The formulas are those of `dinoreg.plan.flops`: the student on all crops, the teacher on the global ones, the heads on
class tokens and masked patches. Figures are per image: two global and `num_local` local crops.
"""

from __future__ import annotations

import argparse

import measure

from dinoreg.plan.flops import Encoder, Step, head, step

__all__ = ["HEADS", "WIDTHS", "Encoder", "Step", "head", "rows", "step"]

WIDTHS = {"S": (384, 12, "mlp"), "B": (768, 12, "mlp"), "L": (1024, 24, "mlp"), "g": (1536, 40, "swiglu")}
HEADS = {"short": (65536, 256, False), "long": (131072, 384, True)}


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
