"""Where CorLoc was published; the numbers themselves stand in `eval/NAME.py`."""

from __future__ import annotations

from dinoreg.evaluation.benchmark import Published

REGISTERS = "DINOv2 with registers, arXiv 2309.16588v2, Table 3"
LOST = "LOST, arXiv 2109.14279, its repository"
DENOISING = "Denoising ViTs, arXiv 2401.02957"
TEST_TIME = "test-time registers, arXiv 2506.08010"
DINOV3 = "DINOv3, arXiv 2508.10104, baseline row"
BIAS = "a manually chosen bias on the Gram matrix, its value and the block not published"
SWEPT = "bias swept in [-1, 0] over the last four blocks, the best quoted; 3 seeds"
NO_BIAS = "LOST without a bias"


def corloc(
    registers: tuple[float, float],
    others: tuple[float, float, float, float],
    dino: tuple[float, float, float],
    test_time: tuple[float, float, float, float],
    denoising: tuple[float, float],
    token_cut: float,
) -> tuple[Published, ...]:
    """A dataset's published CorLoc, in percent.

    registers  DINOv2 ViT-L/14 on ImageNet-22k with 0 and with 4 registers (Registers, Table 3)
    others     there: DeiT-III with 0 and 4, OpenCLIP with 0 and 4
    dino       the original DINO's ViT-S/16, B/16 and S/8 (LOST)
    test_time  the released ViT-L/14 with none, 4 trained and one test-time register; OpenCLIP ViT-B/16
    denoising  the released ViT-B/14 with 0 and 4 registers (Denoising ViTs)
    token_cut  ViT-g/14 by TokenCut (DINOv3)
    """
    large, base = "DINOv2 ViT-L/14 (released)", "DINOv2 ViT-B/14 (released)"
    return (
        Published("DINOv2 ViT-L/14 (ImageNet-22k), 0 registers", registers[0], REGISTERS, f"keys; {BIAS}"),
        Published("DINOv2 ViT-L/14 (ImageNet-22k), 4 registers", registers[1], REGISTERS, f"keys; {BIAS}"),
        Published("DeiT-III ViT-B, 0 registers", others[0], REGISTERS, f"values; {BIAS}"),
        Published("DeiT-III ViT-B, 4 registers", others[1], REGISTERS, f"values; {BIAS}"),
        Published("OpenCLIP ViT-B/16, 0 registers", others[2], REGISTERS, f"values; {BIAS}"),
        Published("OpenCLIP ViT-B/16, 4 registers", others[3], REGISTERS, f"values; {BIAS}"),
        Published("DINO ViT-S/16", dino[0], LOST, NO_BIAS),
        Published("DINO ViT-B/16", dino[1], LOST, NO_BIAS),
        Published("DINO ViT-S/8", dino[2], LOST, NO_BIAS),
        Published(f"{large}, 0 registers", test_time[0], TEST_TIME, SWEPT),
        Published(f"{large}, 4 registers", test_time[1], TEST_TIME, SWEPT),
        Published(f"{large}, 1 test-time register", test_time[2], TEST_TIME, SWEPT),
        Published("OpenCLIP ViT-B/16, 0 registers", test_time[3], TEST_TIME, SWEPT),
        Published(
            f"{base}, 0 registers", denoising[0], DENOISING, f"{NO_BIAS}; the whole image's box scores much this"
        ),
        Published(f"{base}, 4 registers", denoising[1], DENOISING, f"{NO_BIAS}; Registers' figure not reproduced"),
        Published("DINOv2 ViT-g/14", token_cut, DINOV3, "TokenCut on output patch tokens, threshold swept; 448 px"),
    )
