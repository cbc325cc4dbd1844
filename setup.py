"""What the package is, what it needs, and how configs/, eval/ and launch/ travel inside the wheel."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
BUNDLED = ("configs", "eval", "launch")
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "dinoreg" / "__init__.py").read_text(), re.MULTILINE)
assert VERSION is not None

CORE = [
    "torch>=2.10",
    "torchvision>=0.25",
    "numpy>=1.26",
    "xformers>=0.0.35; sys_platform == 'linux' and platform_machine == 'x86_64'",
    "fvcore>=0.1.5",
    "submitit>=1.5",
    "omegaconf>=2.3",
    "safetensors>=0.4.3",
    "pillow>=10.3",
    "rich>=13",
    "tensorboard>=2.14",
    "matplotlib>=3.8",
    "jinja2>=3.1",
]
EXTRAS = {
    "eval": [
        "scikit-learn>=1.4",
        "torchmetrics>=1.4",
        "scipy>=1.11",
        "h5py>=3.10",
        "pycocotools>=2.0.8",
    ],
    "data": ["pyarrow>=15", "tifffile>=2024.1", "pydicom>=3"],
    "export": ["timm>=1.0.16", "transformers>=4.51", "onnx>=1.16", "onnxruntime>=1.18", "onnxscript>=0.3"],
    "log": ["wandb>=0.17", "mlflow>=2.14"],
}
TEST = [
    "pytest>=8",
    "pytest-xdist>=3.5",
    "ruff>=0.8",
    "mypy>=1.11",
    "setuptools>=77",
    "wheel>=0.43",
    "timm>=1.0.16",
    "transformers>=4.51",
    "onnx>=1.16",
    "onnxruntime>=1.18",
    "onnxscript>=0.3",
    "scikit-learn>=1.4",
    "scikit-image>=0.23",
    "scipy>=1.11",
    "torchmetrics>=1.4",
    "h5py>=3.10",
    "pycocotools>=2.0.8",
    "pyarrow>=15",
    "tifffile>=2024.1",
]
EXTRAS["all"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})
EXTRAS["test"] = TEST


class BuildWithDeclarations(build_py):
    """Copies configs/, eval/ and launch/ into dinoreg/_bundled, where `dinoreg.config.bundled` finds them.

    An editable install needs no copy: there the checkout's own folders are used.
    """

    def _declarations(self) -> dict[str, str]:
        """Source of each bundled file, by its place in the build."""
        target = Path(self.build_lib) / "dinoreg" / "_bundled"
        return {
            str(target / path.relative_to(HERE)): str(path)
            for folder in BUNDLED
            for path in sorted((HERE / folder).rglob("*"))
            if path.is_file() and "__pycache__" not in path.parts
        }

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for target, source in self._declarations().items():
                Path(target).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, *self._declarations()]


setup(
    name="dinoreg",
    version=VERSION[1],
    description="Self-supervised pretraining of register Vision Transformers, on anybody's images",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="dinoreg developers",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["dinoreg", "dinoreg.*"]),
    package_data={"": ["templates/*"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["dinoreg = dinoreg.commands.main:main"]},
    cmdclass={"build_py": BuildWithDeclarations},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
