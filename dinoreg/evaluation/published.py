"""Papers that several datasets quote, and the rows that they have in common; the numbers stand in `eval/NAME.py`."""

from collections.abc import Sequence

from dinoreg.evaluation.benchmark import Published

REGISTERS = "DINOv2 with registers, arXiv 2309.16588v2"
DINOV2 = "DINOv2, arXiv 2304.07193v2"
CARD = "DINOv2's README and model card"
DINOV3 = "DINOv3, arXiv 2508.10104"
BASELINE = f"{DINOV3}, baseline row"
LOST = "LOST, arXiv 2109.14279, its repository"
DENOISING = "Denoising ViTs, arXiv 2401.02957"
CAPI = "CAPI, arXiv 2502.08769, its README"
TEST_TIME = "Vision Transformers Don't Need Trained Registers, arXiv 2506.08010"

Family = tuple[float, float, float, float]  # of ViT-S, B, L and g/14


def released(
    values: Family, source: str, note: str = "", *, registers: int | None = 0, ending: str = "", variant: str = ""
) -> tuple[Published, ...]:
    """Figures of the four released DINOv2 models: ViT-S, B and L/14, distilled from ViT-g/14, and itself.

    values     in the metric's usual unit (percent, metres)
    source     paper and table
    note       what differs from our protocol
    registers  0 or 4, stated in each row; None leaves it to the note
    ending     of the models' names, such as ", +ms"
    """
    suffix = " reg4" if registers else ""
    names = [*(f"DINOv2 ViT-{size}/14{suffix} (distilled)" for size in "SBL"), f"DINOv2 ViT-g/14{suffix}"]
    kinds = ["distilled from ViT-g on LVD-142M"] * 3 + ["LVD-142M"]
    rows = []
    for name, kind, value in zip(names, kinds, values, strict=True):
        training = "" if registers is None else f"{registers or 'no'} registers, {kind}"
        differs = "; ".join(filter(None, (training, note)))
        rows.append(Published(name + ending, value, source, differs, variant))
    return tuple(rows)


def with_registers(
    values: tuple[float, float, float, float, float, float], table: str, differs: tuple[str, str, str] = ("", "", "")
) -> tuple[Published, ...]:
    """Figures of Registers' three backbones (DINOv2, DeiT-III, OpenCLIP), each trained with 0 and with 4 registers.

    values   in the metric's usual unit, in that order
    table    of that paper
    differs  what differs from our protocol for each backbone
    """
    models = ("DINOv2 ViT-L/14 (ImageNet-22k)", "DeiT-III ViT-B (ImageNet-22k)", "OpenCLIP ViT-B/16")
    columns = [(f"{model}, {count} registers", each) for model, each in zip(models, differs) for count in (0, 4)]
    return tuple(
        Published(name, value, f"{REGISTERS}, {table}", each)
        for (name, each), value in zip(columns, values, strict=True)
    )


def at_test_time(values: Sequence[float], differs: str, spreads: Sequence[str] = ("",) * 4) -> tuple[Published, ...]:
    """Figures of arXiv 2506.08010: ViT-L/14 with 0, 4 trained and one test-time register, and OpenCLIP's ViT-B/16.

    values   means over three seeds in this order, as many as are published
    spreads  what is published of their spread, in words
    """
    names = [f"DINOv2 ViT-L/14 (released), {count}" for count in ("0 registers", "4 registers", "1 test-time register")]
    rows = zip([*names, "OpenCLIP ViT-B/16"], values, spreads)
    return tuple(Published(name, value, TEST_TIME, f"{differs}mean of 3 seeds{spread}") for name, value, spread in rows)


def denoised(values: tuple[float, float], differs: tuple[str, str]) -> tuple[Published, ...]:
    """Figures of the released ViT-B/14 with 0 and with 4 registers in the paper on denoising (arXiv 2401.02957).

    differs  what differs from our protocol for each
    """
    return tuple(
        Published(f"DINOv2 ViT-B/14 (released), {count} registers", value, DENOISING, each)
        for count, value, each in zip((0, 4), values, differs, strict=True)
    )


def capi(values: Family, differs: str) -> tuple[Published, ...]:
    """Figures of CAPI's ViT-L/14 (arXiv 2502.08769, its README) trained on Places205, LVD-142M, ImageNet-22k and -1k.

    differs  what differs from our protocol
    """
    data = ("Places205", "LVD-142M", "ImageNet-22k", "ImageNet-1k")
    return tuple(Published(f"CAPI ViT-L/14 ({each})", value, CAPI, differs) for each, value in zip(data, values))


def single_tokens(
    model: str,
    values: tuple[float, float, float],
    differs: str,
    source: str = f"{REGISTERS}, Table 1",
    last: str = "outlier patch token",
) -> tuple[Published, ...]:
    """Figures of one token alone, in percent: the class token, a normal patch token and the one called `last`.

    differs  what else differs from our protocol
    """
    return tuple(
        Published(model, value, source, f"the {token} alone; {differs}", "" if token == "class token" else token)
        for token, value in zip(("class token", "normal patch token", last), values, strict=True)
    )


def fine_grained(
    dinov2: Family, larger: float, tokens: tuple[float, float, float], note: str = ""
) -> tuple[Published, ...]:
    """A dataset's published logistic-regression figures, in percent, of the three tables that have a column for it.

    dinov2  ViT-S, B, L and g/14 at 224 px (DINOv2, Table 8)
    larger  ViT-g/14 at 448 px (DINOv3, Table 22)
    tokens  the class token, a normal and an outlier patch token of ViT-g/14 (Registers, Table 1)
    note    what else differs for this dataset, said with each
    """
    accuracy = "; ".join(filter(None, ("called accuracy, per image or per class not stated", note)))
    unverified = f"1,024 patch tokens; whether with registers was not verified; {accuracy}"
    return (
        *released(dinov2, f"{DINOV2}, Table 8", accuracy),
        Published("DINOv2 ViT-g/14 at 448 px", larger, f"{DINOV3}, Table 22", unverified),
        *single_tokens("DINOv2-g, 0 registers", tokens, accuracy),
    )


def corloc(
    registers: tuple[float, float, float, float, float, float],
    dino: tuple[float, float, float],
    test_time: tuple[float, float, float, float],
    denoising: tuple[float, float],
    token_cut: float,
) -> tuple[Published, ...]:
    """A dataset's published CorLoc, in percent.

    registers  DINOv2 ViT-L/14 on ImageNet-22k, DeiT-III and OpenCLIP, each with 0 and 4 (Registers, Table 3)
    dino       the original DINO's ViT-S/16, B/16 and S/8 (LOST)
    test_time  the released ViT-L/14 with none, 4 trained and one test-time register; OpenCLIP ViT-B/16
    denoising  the released ViT-B/14 with 0 and 4 registers (Denoising ViTs)
    token_cut  ViT-g/14 by TokenCut (DINOv3)
    """
    bias = "a manually chosen bias on the Gram matrix, its value and the block not published"
    swept = "bias swept in [-1, 0] over the last four blocks, the best quoted; "
    no_bias = "LOST without a bias"
    return (
        *with_registers(registers, "Table 3", (f"keys; {bias}", f"values; {bias}", f"values; {bias}")),
        *(Published(f"DINO ViT-{size}", value, LOST, no_bias) for size, value in zip(("S/16", "B/16", "S/8"), dino)),
        *at_test_time(test_time, swept),
        *denoised(denoising, (f"{no_bias}; the whole image's box scores as much", f"{no_bias}; not Registers' figure")),
        Published("DINOv2 ViT-g/14", token_cut, BASELINE, "TokenCut on output patch tokens, threshold swept; 448 px"),
    )
