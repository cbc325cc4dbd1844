"""Where the numbers of the fine-grained suite were published; the numbers themselves stand in `eval/NAME.py`.

Three tables hold one column for each of these datasets, so what they are and how they
differ from protocol P3 is said here once.
"""

from __future__ import annotations

from dinoreg.evaluation.benchmark import Published

REGISTERS = "DINOv2 with registers, arXiv 2309.16588v2"
DINOV2 = "DINOv2, arXiv 2304.07193v2"
DINOV3 = "DINOv3, arXiv 2508.10104"
_ACCURACY = "called accuracy, per image or per class not stated"


def fine_grained(
    dinov2: tuple[float, float, float, float], larger: float, tokens: tuple[float, float, float], note: str = ""
) -> tuple[Published, ...]:
    """A dataset's published logistic-regression figures, in percent.

    dinov2  ViT-S, B, L and g/14 at 224 px (DINOv2, Table 8)
    larger  ViT-g/14 at 448 px (DINOv3, Table 22)
    tokens  the class token, a normal and an outlier patch token of ViT-g/14 (Registers, Table 1)
    note    what else differs for this dataset, said with each
    """
    also = f"{_ACCURACY}; {note}" if note else _ACCURACY
    rows = [
        Published(f"DINOv2 ViT-{size}/14 (distilled)", value, f"{DINOV2}, Table 8", f"0 registers, LVD-142M; {also}")
        for size, value in zip("SBL", dinov2[:3], strict=True)
    ]
    rows.append(Published("DINOv2 ViT-g/14", dinov2[3], f"{DINOV2}, Table 8", f"0 registers, LVD-142M; {also}"))
    rows.append(
        Published(
            "DINOv2 ViT-g/14 at 448 px",
            larger,
            f"{DINOV3}, Table 22",
            f"1,024 patch tokens; whether with registers was not verified; {also}",
        )
    )
    rows.extend(
        Published("DINOv2-g, 0 registers", value, f"{REGISTERS}, Table 1", f"{token} alone; {also}", variant)
        for value, token, variant in (
            (tokens[0], "the class token", ""),
            (tokens[1], "a normal patch token", "normal patch token"),
            (tokens[2], "an outlier patch token", "outlier patch token"),
        )
    )
    return tuple(rows)
