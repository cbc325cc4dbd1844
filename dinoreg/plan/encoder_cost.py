"""What one picture costs a frozen encoder: its size, its matrix products, and its speed on the machine at hand."""

import copy
import time
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from dinoreg.evaluation.backbones.encoder import Encoder

BATCH, SECONDS, PASSES = 8, 1.0, 3  # pictures at once; measured for so long at least, and so often


def encoder_cost(encoder: Encoder, side: int) -> dict[str, Any]:
    """The cost of the tokens of square pictures, `side` pixels a side.

    returns  "parameters", "dim" of the class token, "side" in pixels, "gflops" of one picture, and "images_per_second"
             in batches of BATCH: the median of some seconds; "on": device and precision
    """
    on_cpu = copy.copy(encoder)  # where attention is of operations that can be counted
    on_cpu.module = copy.deepcopy(encoder.module).cpu()  # type: ignore[attr-defined]
    on_cpu.device, on_cpu.dtype = torch.device("cpu"), torch.float32
    # PyTorch's counter has no formula for the CPU's fused attention.
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *qkv, **_: sdpa_flop_count(*qkv[:3])}
    with FlopCounterMode(display=False, custom_mapping=fused) as counter:
        on_cpu.tokens(torch.zeros(1, encoder.in_channels, side, side))
    images = torch.zeros(BATCH, encoder.in_channels, side, side, device=encoder.device)
    encoder.tokens(images)
    times: list[float] = []
    while len(times) < PASSES or sum(times) < SECONDS:
        started = time.perf_counter()
        encoder.tokens(images).cls.cpu()  # which waits for the device
        times.append(time.perf_counter() - started)
    return {
        "parameters": sum(each.numel() for each in on_cpu.module.parameters()),  # type: ignore[attr-defined]
        "dim": encoder.dim,
        "side": side,
        "gflops": counter.get_total_flops() / 1e9,
        "images_per_second": BATCH / sorted(times)[len(times) // 2],
        "on": f"{encoder.device.type}, {str(encoder.dtype).removeprefix('torch.')}",
    }
