"""What the package is, what it needs, and how configs/, eval/ and launch/ travel inside the wheel."""

from __future__ import annotations

import re
import runpy
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
BUNDLED = ("configs", "eval", "launch")
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "dinoreg" / "__init__.py").read_text(), re.MULTILINE)
assert VERSION is not None

# Run as a file: to import it as a part of dinoreg would need dinoreg's requirements to be there.
requirements = runpy.run_path(str(HERE / "dinoreg" / "runtime" / "dependencies.py"))["requirements"]


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
    package_data={"": ["templates/*", "py.typed"]},
    install_requires=requirements("core"),
    extras_require={
        extra: requirements(extra) for extra in ("eval", "data", "remote", "export", "log", "docs", "all", "test")
    },
    entry_points={"console_scripts": ["dinoreg = dinoreg.commands.main:entry"]},
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
