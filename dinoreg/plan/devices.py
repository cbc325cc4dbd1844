"""Devices and the links between them, as their makers state them, and assumptions where they state nothing.

Memory is what PyTorch finds on the device, a little less than the number in its name.
"""

import os
from dataclasses import dataclass, replace

from dinoreg.config.option import nearest
from dinoreg.runtime.environment import free_memory, total_memory
from dinoreg.runtime.errors import UserError

GIB = 2**30


def gib(count: float) -> str:
    """Bytes of memory in GiB or MiB (powers of two)."""
    return f"{count / GIB:.2f} GiB" if abs(count) >= GIB / 10 or not count else f"{count / 2**20:.1f} MiB"


# Share of a link's stated rate that collectives attain on large messages.
LINK_SHARE = 0.8
# Seconds of one hop of a collective; a tree over n processes has log2(n) of them.
HOP_SECONDS = 8e-6

# Besides the tensors: the CUDA context with its kernels, cuBLAS' workspaces, and NCCL's buffers where there are several
# processes. Then what the caching allocator cannot use of the memory that comes and goes within a step, with the masks
# of a run, of which every step has other ones. In segments that grow (`dinoreg/__init__.py`) 0.1 to 0.5 GiB: 35.09
# GiB reserved for 34.90 of tensors (ViT-L/16, 64 images), 12.70 for 12.22 with checkpointing; in segments of fixed size
# (`SEGMENTS_FIXED`) 43.03 for 39.45, 34 of them passing (on a CUDA runtime that computes nothing; 2026-11-28, -29).
CONTEXT_GIB = 0.7
NCCL_GIB = 0.8
FRAGMENTATION, GAPS_GIB, SEGMENTS_FIXED = 0.02, 0.5, 0.105

# On a CPU the peak of the process counts: Python with PyTorch and libraries after a few steps; each thread that decodes
# (photos of six megapixels); what a probe imports and computes besides the network; and of what comes and goes, a
# checkpoint's copies among it, the share that glibc keeps and cannot use. All are fitted to the peaks of real runs
# (docs/plan.md). Of the memory that is free a run should leave some to the rest of the machine.
PROCESS_GIB, WORKER_GIB = 0.88, 0.015
PROBE_GIB = 0.12
CPU_FRAGMENTATION, SMALL_GIB = 0.22, 0.12  # of small amounts another half, up to so much
FREE_SHARE = 0.9


def gaps(passing: float) -> float:
    """Bytes of a GPU that its allocator cannot use where `passing` bytes come and go, as the environment sets it."""
    chosen = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    grows = "expandable_segments:true" in chosen.lower().replace(" ", "")
    return FRAGMENTATION * passing + GAPS_GIB * GIB if grows else SEGMENTS_FIXED * passing


@dataclass(frozen=True)
class Device:
    """The device of one process.

    kind        "cuda" | "cpu"
    memory      bytes; of a CPU those that are free
    peaks       {"bf16", "fp16", "fp32", "tf32"}: dense TFLOP/s of matrix products with float32 sums; empty: unknown
    local_link  GB/s to the devices of the same machine, one way
    link        GB/s to devices of other machines, one way, per device
    """

    name: str
    kind: str
    memory: int
    peaks: dict[str, float]
    local_link: float
    link: float

    def peak(self, precision: str) -> float | None:
        """The peak in FLOP/s for "bf16" | "fp16" | "fp32" | "tf32"; None where it is unknown or not supported."""
        tflops = self.peaks.get(precision)
        return None if tflops is None else tflops * 1e12


def _gpu(name: str, gib: float, low: float, fp32: float, local: float, link: float, bf16: bool = True) -> Device:
    peaks = {"fp16": low, "fp32": fp32} | ({"bf16": low, "tf32": low / 2} if bf16 else {})
    return Device(name, "cuda", int(gib * GIB), peaks, local, link)


# Peaks: NVIDIA's data sheets ("Tensor Core" rows without sparsity; GeForce: the architecture white papers, with float32
# sums). float32 without TF32, whose peak is half of bf16's. Links: half of the stated two-way NVLink rate, or
# PCIe x16 of the device's generation; between machines what such machines are usually sold with, for each device.
DEVICES: dict[str, Device] = {
    # Tesla V100 data sheet (2020): 125 TFLOP/s tensor, NVLink 300 GB/s; DGX-1: 4 x 100 Gb/s for 8 devices
    "v100": _gpu("V100 32GB", 31.7, 125, 15.7, 150, 6.25, bf16=False),
    "v100-16": _gpu("V100 16GB", 15.7, 125, 15.7, 150, 6.25, bf16=False),
    # A100 data sheet (2021): 312 TFLOP/s, NVLink 600 GB/s; DGX A100: 200 Gb/s a device
    "a100-40": _gpu("A100 40GB", 39.4, 312, 19.5, 300, 25),
    "a100-80": _gpu("A100 80GB", 79.1, 312, 19.5, 300, 25),
    # H100 data sheet (SXM): 1,979 TFLOP/s with sparsity, NVLink 900 GB/s; DGX H100: 400 Gb/s a device
    "h100": _gpu("H100 80GB", 79.1, 989, 67, 450, 50),
    # H200 data sheet (SXM): as H100, 141 GB
    "h200": _gpu("H200 141GB", 139.7, 989, 67, 450, 50),
    # L4 data sheet: 242 TFLOP/s with sparsity; PCIe 4
    "l4": _gpu("L4 24GB", 22.0, 121, 30.3, 32, 3.1),
    # L40S data sheet: 362 TFLOP/s; PCIe 4
    "l40s": _gpu("L40S 48GB", 44.4, 362, 91.6, 32, 12.5),
    # A10 data sheet: 125 TFLOP/s; PCIe 4
    "a10": _gpu("A10 24GB", 22.0, 125, 31.2, 32, 3.1),
    # T4 data sheet: 65 TFLOP/s fp16; PCIe 3
    "t4": _gpu("T4 16GB", 14.6, 65, 8.1, 16, 3.1, bf16=False),
    # Ada white paper: RTX 4090, bf16 with float32 sums 165.2 TFLOP/s; PCIe 4
    "rtx4090": _gpu("RTX 4090 24GB", 23.5, 165, 82.6, 32, 1.25),
    # Ampere GA102 white paper: RTX 3090, bf16 with float32 sums 71 TFLOP/s; PCIe 4
    "rtx3090": _gpu("RTX 3090 24GB", 23.7, 71, 35.6, 32, 1.25),
}
ALIASES = {"a100": "a100-80", "v100-32": "v100", "a10g": "a10", "4090": "rtx4090", "3090": "rtx3090"}


def find_device(name: str) -> Device:
    """The device of a name such as "h100" or "a100-40"; UserError where it is not in the table."""
    key = name.lower().replace(" ", "").replace("_", "-")
    key = ALIASES.get(key, key)
    if key not in DEVICES:
        raise UserError(f"gpu={name}: unknown{nearest(key, DEVICES)}; known: {', '.join(DEVICES)}")
    return DEVICES[key]


def recognise(name: str, memory: int) -> Device | None:
    """The device that PyTorch calls `name` ("NVIDIA H100 80GB HBM3"), with `memory` bytes; None for unknown ones."""
    words = name.lower().replace("geforce ", "").replace("rtx ", "rtx").replace("-", " ").split()
    same = [device for key, device in DEVICES.items() if key.partition("-")[0] in words]
    if not same:
        return None
    closest = min(same, key=lambda device: abs(device.memory - memory))
    return replace(closest, name=name, memory=memory)


def local_device() -> Device:
    """The device that a run uses here by default: the current CUDA device, else the CPU."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        known = recognise(properties.name, properties.total_memory)
        return known or Device(properties.name, "cuda", properties.total_memory, {}, 16.0, 1.25)
    return cpu_device()


def cpu_device() -> Device:
    """The processor of this machine, with the main memory that is free now; its peaks are unknown."""
    return Device("this machine's CPU", "cpu", free_memory() or total_memory() or 0, {}, 10.0, 1.25)
