"""The environment of a run, which `dinoreg doctor` prints, too: versions, processor, accelerators, memory, disk."""

import math
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from dinoreg.runtime.dependencies import DEPENDENCIES
from dinoreg.runtime.json_files import read_text

# Environment variables that change speed, numbers or devices.
VARIABLES = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "LD_PRELOAD", "MALLOC_TRIM_THRESHOLD_"),
    *("MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_ARENA_MAX", "DINOREG_MALLOC", "PYTORCH_CUDA_ALLOC_CONF"),
    *("PYTORCH_ALLOC_CONF", "XFORMERS_DISABLED", "SLURM_JOB_ID"),
)
DATA_THREADS = "dinoreg-data"  # with which the names of threads begin that read images for training


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
        "memory_gib": _gib(total_memory()),
        "free_memory_gib": _gib(free_memory()),
        "free_disk_gib": free_disk_gib(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        **_torch(),
    }


def version(package: str) -> str | None:
    """The installed version of a distribution, or None; the package is not imported."""
    from importlib import metadata  # not for help and messages

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def usable_cores(root: Path = Path("/")) -> int:
    """Number of CPU cores that this process may use; in a job or a container often fewer than there are."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _cgroups(root, "cpu"):
        first_version = f"{_text(group, 'cpu.cfs_quota_us')} {_text(group, 'cpu.cfs_period_us')}"
        share, _, period = (_text(group, "cpu.max") or first_version).partition(" ")
        if share.isdigit() and period.isdigit() and int(period):
            cores = min(cores, max(1, math.ceil(int(share) / int(period))))
    return cores


def busy() -> str:
    """ "load 9.1 on 2 cores" where more processes want to run than there are cores; else an empty text."""
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    return f"load {load:.1f} on {cores} cores" if load > cores + 0.5 else ""


def start_time(process: int) -> int | None:
    """The start of a process in clock ticks since boot; None for a dead or zombie process and without /proc."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def is_alive(process: object, started: object) -> bool:
    """Whether the process of that number and `start_time` lives; a later one with the number does not count.

    started  None: not known, so that any process of that number counts
    """
    now = start_time(process) if type(process) is int else None
    return now is not None and started in (None, now)


def total_memory() -> int | None:
    """Bytes of main memory of this machine; None: unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes of main memory that are free for this process: the machine's, or less where a cgroup limits it.

    What the system keeps of files counts as free. None: unknown.
    """
    free = [1024 * int(kib) for kib in re.findall(r"^MemAvailable:\s+(\d+)", read_text(root / "proc/meminfo"), re.M)]
    for group in _cgroups(root, "memory"):
        limit = _text(group, "memory.max") or _text(group, "memory.limit_in_bytes")
        used = _text(group, "memory.current") or _text(group, "memory.usage_in_bytes")
        if limit.isdigit() and used.isdigit():
            files = re.findall(r"^(?:total_)?inactive_file (\d+)", read_text(group / "memory.stat"), re.M)
            free.append(max(0, int(limit) - int(used) + max(map(int, files), default=0)))
    return min(free) if free else None


def _cgroups(root: Path, controller: str) -> list[Path]:
    """The folders of this process's control groups of "memory" or "cpu", from the innermost outwards."""
    found = []
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers == "" or controller in controllers.split(","):
            base = root / "sys/fs/cgroup" / (controller if controllers else "")
            inner = base / path.strip("/")
            found += [inner, *(folder for folder in inner.parents if folder.is_relative_to(base))]
    return [folder for folder in found if folder.is_dir()]


def _text(folder: Path, name: str) -> str:
    return read_text(folder / name).strip()


def _gib(count: int | None) -> float | None:
    return None if count is None else round(count / 2**30, 1)


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
        from dinoreg.runtime.packed_attention import best_backend
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
        attention = dict(zip(("backend", "reason"), best_backend(device, pick_precision("auto", device))))
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
