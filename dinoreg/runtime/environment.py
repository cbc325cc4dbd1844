"""The environment of a run, which `dinoreg doctor` prints, too: versions, processor, accelerators, memory, disk."""

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from dinoreg.runtime.dependencies import DEPENDENCIES
from dinoreg.runtime.json_files import read_text

# Environment variables that change speed, numbers or devices.
VARIABLES = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "LD_PRELOAD", "MALLOC_TRIM_THRESHOLD_"),
    *("MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_ARENA_MAX", "DINOREG_MALLOC", "PYTORCH_CUDA_ALLOC_CONF"),
    *("XFORMERS_DISABLED", "SLURM_JOB_ID"),
)


def environment() -> dict[str, Any]:
    """Everything about this machine that a result may depend on, as JSON values; memory and disk in GiB."""
    import dinoreg

    return {
        "dinoreg": dinoreg.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "command": sys.argv,
        "packages": {row.name: version(row.name) for row in DEPENDENCIES if row.extra == "core"},
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "memory_gib": _memory_gib(),
        "free_disk_gib": free_disk_gib(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        **_torch(),
    }


def version(package: str) -> str | None:
    """The installed version of a distribution, or None; the package is not imported."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def usable_cores() -> int:
    """Number of CPU cores that this process may use; on a cluster often fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_disk_gib(folder: Path | None = None) -> float:
    """Free space in GiB on the disk of `folder` (None: the working directory) or of its nearest existing parent."""
    path = (folder or Path()).resolve()
    while not path.exists():
        path = path.parent
    return round(shutil.disk_usage(path).free / 2**30, 1)


def _torch() -> dict[str, Any]:
    """PyTorch's devices and versions; the error in words where it cannot be imported.

    attention  on CUDA: the backend that model.attention=auto means on this device in its default precision, and why it
               is not xformers where it is not
    """
    try:
        import torch

        from dinoreg.runtime.device import cpu_has_bf16, cuda_has_bf16, pick_precision
        from dinoreg.runtime.xformers_check import run_problem
    except Exception as error:
        return {"torch_error": f"{type(error).__name__}: {error}", "cuda": [], "attention": None, "cpu_bf16": None}
    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        memory, bf16 = round(properties.total_memory / 2**30, 1), cuda_has_bf16(torch.device("cuda", index))
        capability = f"{properties.major}.{properties.minor}"
        devices.append({"name": properties.name, "memory_gib": memory, "capability": capability, "bf16": bf16})
    attention = None
    if devices:
        device = torch.device("cuda", torch.cuda.current_device())
        problem = run_problem(device, pick_precision("auto", device))
        attention = {"backend": "sdpa" if problem else "xformers", "reason": problem}
    return {
        "cuda": devices,
        "attention": attention,
        "cuda_version": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if devices else None,
        "cpu_bf16": cpu_has_bf16(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """The checkout's commit, with "+changes" where files differ from it; None for an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_model() -> str:
    model = re.search(r"^model name\s*:\s*(.+)$", read_text(Path("/proc/cpuinfo")), re.MULTILINE)
    return model[1].strip() if model else platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None
