"""Every package that dinoreg declares: its versions, the extra that installs it, and what it is for.

`setup.py` runs this file by itself, so it imports nothing of dinoreg's and nothing that is installed. Upper bounds: the
next major version, or the one from which an API that we use is announced to go.
"""

import platform
import sys
from typing import NamedTuple

# xformers 0.0.35, the newest, is built for PyTorch 2.10 and CUDA 12.8: beside a newer one its kernels do not load.
LINUX_X86 = {"torch": "==2.10.*", "torchvision": "==0.25.*", "xformers": "==0.0.35"}
ON_LINUX_X86 = "sys_platform == 'linux' and platform_machine == 'x86_64'"
ELSEWHERE = "sys_platform != 'linux' or platform_machine != 'x86_64'"


class Dependency(NamedTuple):
    """A distribution.

    extra     "core", or the extra that installs it
    versions  pip's version specifier, unless LINUX_X86 has one for the machine; "": not installed
    purpose   what it is for, as a phrase that follows "for"
    module    the imported module, where its name differs from the distribution's
    """

    name: str
    extra: str
    versions: str
    purpose: str
    module: str = ""

    @property
    def imported(self) -> str:
        """The name of the imported module."""
        return self.module or self.name

    @property
    def pinned(self) -> str:
        """pip's version specifier for this machine."""
        linux_x86 = sys.platform == "linux" and platform.machine() == "x86_64"
        return LINUX_X86.get(self.name, self.versions) if linux_x86 else self.versions

    @property
    def requirements(self) -> list[str]:
        """Requirement lines for pip, with environment markers where machines differ."""
        if self.name not in LINUX_X86:
            return [f"{self.name}{self.versions}"]
        pinned = f"{self.name}{LINUX_X86[self.name]}; {ON_LINUX_X86}"
        return [pinned, f"{self.name}{self.versions}; {ELSEWHERE}"] if self.versions else [pinned]


DEPENDENCIES = (
    Dependency("torch", "core", ">=2.10,<3", "tensors, automatic differentiation, distributed checkpoints"),
    Dependency("torchvision", "core", ">=0.25,<0.30", "decoding JPEGs without the interpreter lock, and box overlaps"),
    Dependency("numpy", "core", ">=1.26,<3", "counter-based randomness (Philox) and the scene renderer"),
    Dependency("xformers", "core", "", "attention over packed crops; loaded only where there is a CUDA device"),
    Dependency("fvcore", "core", ">=0.1.5,<0.2", "parameter schedulers"),
    Dependency("submitit", "core", ">=1.5,<2", "jobs on Slurm"),
    Dependency("omegaconf", "core", ">=2.3,<3", "YAML and dotted overrides, with 1e-3 read as a number"),
    Dependency("safetensors", "core", ">=0.4.3,<1", "weight files that cannot carry code"),
    Dependency("pillow", "core", ">=10.3,<14", "image formats other than JPEG, and odd JPEGs", "PIL.Image"),
    Dependency("rich", "core", ">=13,<16", "progress bars and tables in the terminal"),
    Dependency("tensorboard", "core", ">=2.14,<3", "event files for those who watch their runs there"),
    Dependency("matplotlib", "core", ">=3.8,<4", "the figures of the reports"),
    Dependency("jinja2", "core", ">=3.1,<4", "templates of reports and model cards (torch needs it too)"),
    Dependency("scipy", "eval", ">=1.11,<2", "datasets that come as MATLAB files, and object discovery"),
    Dependency("h5py", "eval", ">=3.10,<4", "datasets that come as HDF5"),
    Dependency("pyarrow", "data", ">=15,<27", "lists, pictures and features in .parquet", "pyarrow.parquet"),
    Dependency("scikit-learn", "data", ">=1.4,<2", "copies and clusters of curate; tests compare with it", "sklearn"),
    Dependency("tifffile", "data", ">=2024.1", "TIFF images with more than 8 bits or an odd layout"),
    Dependency("pydicom", "data", ">=3,<4", "DICOM images"),
    Dependency("fsspec", "remote", ">=2024.2", "data at URLs: https://, hf://; with s3fs s3://, with gcsfs gs://"),
    Dependency("aiohttp", "remote", ">=3.9,<4", "https:// through fsspec"),
    Dependency("timm", "export", ">=1.0.16,<2", "its models, and the parity check of an export to it"),
    Dependency("transformers", "export", ">=4.51,<6", "transformers' models, and the parity check of an export to it"),
    Dependency("onnx", "export", ">=1.16,<2", "writing ONNX files"),
    Dependency("onnxruntime", "export", ">=1.18,<2", "checking an ONNX file against the model"),
    Dependency("onnxscript", "export", ">=0.3,<1", "PyTorch's ONNX exporter, which is built on it"),
    Dependency("wandb", "log", ">=0.18,<1", "runs in Weights & Biases, with log.to=wandb"),
    Dependency("mlflow-skinny", "log", ">=2.14,<4", "runs in MLflow, with log.to=mlflow", "mlflow"),
    Dependency("mkdocs-material", "docs", ">=9.5,<10", "the guides as a site", "material"),
    Dependency("mkdocstrings-python", "docs", ">=1.16,<3", "its Python reference", "mkdocstrings_handlers.python"),
    Dependency("pytest", "test", ">=8,<10", "running the tests"),
    Dependency("pytest-xdist", "test", ">=3.5,<4", "running them on several processes, a file at a time each", "xdist"),
    Dependency("ruff", "test", ">=0.8,<1", "linting and formatting"),
    Dependency("mypy", "test", ">=1.11,<3", "checking types"),
    Dependency("setuptools", "test", ">=77,<85", "building the wheel without a download, in a test"),
    Dependency("wheel", "test", ">=0.43,<1", "packing the wheel that setuptools builds"),
    Dependency("scikit-image", "test", ">=0.23,<1", "real photographs that come inside a package", "skimage"),
    Dependency("torchmetrics", "test", ">=1.4,<2", "the mIoU that ours is compared with"),
    Dependency("pycocotools", "test", ">=2.0.8,<3", "the official COCO metric, which ours is compared with"),
)


def requirements(extra: str) -> list[str]:
    """Requirement lines of "core" or an extra; "test" includes every extra, "all" those that a user needs."""
    extras = {row.extra for row in DEPENDENCIES} - {"core"}
    wanted = {"test": extras, "all": extras - {"test", "docs"}}.get(extra, {extra})
    return [line for row in DEPENDENCIES if row.extra in wanted for line in row.requirements]


def find(name: str) -> Dependency | None:
    """The dependency whose distribution or module (or parent package of `name`) is `name`; None for others."""
    root = name.partition(".")[0]
    return next((row for row in DEPENDENCIES if root in (row.name, row.imported.partition(".")[0])), None)


def install(name: str) -> str:
    """The command that installs a distribution or module: "pip install 'dinoreg[data]'"."""
    row = find(name)
    if row is None:
        return f"pip install {name}"
    return f"pip install {row.name}" if row.extra == "core" else f"pip install 'dinoreg[{row.extra}]'"
