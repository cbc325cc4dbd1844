"""Builds the fake CUDA runtime for the installed PyTorch: one library, which a process preloads.

Its `libcuda.so.1` stands for the driver as well. Functions of NVIDIA's libraries that PyTorch needs and `libraries.cpp`
does not define are generated from PyTorch's own lists of undefined symbols; they return 0.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SOURCES = Path(__file__).parent
# Read here, before a test moves the folder away from the user's own.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dinoreg" / "fake_cuda"
_LIBRARIES = re.compile(r"cuda[A-Z]|cu[A-Z]|cublas|cudnn|cusolver|cusparse|curand|cufft|nccl[A-Z]|cuFile")


def problem() -> str | None:
    """Why the runtime cannot be built here; None: it can."""
    if not sys.platform.startswith("linux"):
        return "it is made for Linux"
    missing = [name for name in ("g++", "nm") if shutil.which(name) is None]
    if missing:
        return f"no {' and no '.join(missing)}"
    if torch.version.cuda is None:
        return "PyTorch is built without CUDA"
    return None if _headers() else "the headers of CUDA that come with PyTorch's packages are not there"


def library() -> Path:
    """The library, built on first use into the user's cache folder."""
    digest = hashlib.sha256(f"{torch.__version__} {torch.version.cuda}".encode())
    for source in sorted(SOURCES.glob("*.[ch]*")):
        digest.update(source.read_bytes())
    built = CACHE / digest.hexdigest()[:16] / "libcuda.so.1"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            os.replace(_build(Path(folder)), built)  # at once: another process may build, too
    return built


def _build(folder: Path) -> Path:
    options = ["g++", "-std=c++17", "-O1", "-fPIC", "-w", *(f"-I{path}" for path in _headers()), "-c"]
    objects = []
    for name in ("runtime", "libraries"):
        objects.append(folder / f"{name}.o")
        subprocess.run([*options, str(SOURCES / f"{name}.cpp"), "-o", str(objects[-1])], check=True)
    defined = {symbol for path in objects for symbol in _symbols(path, "--defined-only")}
    needed = {symbol for path in _needing() for symbol in _symbols(path, "-D", "--undefined-only")}
    stubs = sorted(symbol for symbol in needed - defined if _LIBRARIES.match(symbol))
    source = folder / "stubs.cpp"
    source.write_text("".join(f'extern "C" int {symbol}() {{ return 0; }}\n' for symbol in stubs))
    objects.append(folder / "stubs.o")
    subprocess.run([*options, str(source), "-o", str(objects[-1])], check=True)
    made = folder / "libcuda.so.1"
    link = ["g++", "-shared", "-Wl,-soname,libcuda.so.1", "-o", str(made), *map(str, objects), "-lpthread", "-ldl"]
    subprocess.run(link, check=True)
    return made


def _headers() -> list[Path]:
    """The folders of cuda_runtime_api.h and of what it includes, which PyTorch's packages brought; [] without them.

    The wheel of the runtime lacks some of its own headers; Triton, which comes with PyTorch too, has them.
    """
    root = Path(torch.__file__).parent.parent
    folders = [*root.glob("nvidia/cuda_runtime/include"), *root.glob("nvidia/cu[0-9]*/include")]
    folders += root.glob("triton/backends/nvidia/include")
    needed = ("cuda_runtime_api.h", "crt/host_defines.h")
    return folders if all(any((folder / name).exists() for folder in folders) for name in needed) else []


def _needing() -> list[Path]:
    """The libraries that call CUDA."""
    found = list((Path(torch.__file__).parent / "lib").glob("lib*.so"))
    xformers = importlib.util.find_spec("xformers")
    for folder in xformers.submodule_search_locations or () if xformers else ():
        found += Path(folder).glob("_C*.so")
    return found


def _symbols(path: Path, *options: str) -> list[str]:
    listed = subprocess.run(["nm", *options, str(path)], check=True, capture_output=True, text=True).stdout
    return [line.split()[-1].split("@")[0] for line in listed.splitlines() if line.strip()]
