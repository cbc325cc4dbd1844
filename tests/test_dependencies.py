"""What is declared as a dependency is used, documented and bounded; what is announced to go fails the tests."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinoreg.export.formats import FORMATS
from dinoreg.runtime.dependencies import DEPENDENCIES, LINUX_X86, find, install, requirements

ROOT = Path(__file__).resolve().parent.parent
NAMES = [row.name for row in DEPENDENCIES]
# What runs instead of being imported, by what shows it in .ci/run, pyproject.toml or mkdocs.yml.
TOOLS = {"pytest-xdist": "--dist loadfile", "ruff": "/ruff", "mypy": "/mypy", "wheel": 'pip" wheel'}
TOOLS |= {"mkdocs-material": "name: material", "mkdocstrings-python": "- mkdocstrings"}


def imports(*folders: str) -> Iterator[str]:
    """Every name that is imported in these folders or files, at whatever depth, importorskip included."""
    for folder in folders:
        for path in [ROOT / folder] if folder.endswith(".py") else (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    yield from (alias.name for alias in node.names)
                elif isinstance(node, ast.ImportFrom):
                    yield f"{node.module}"
                    yield from (f"{node.module}.{alias.name}" for alias in node.names)
                elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("importorskip"):
                    yield ast.literal_eval(node.args[0])


@pytest.mark.slow
def test_every_dependency_has_a_use_in_the_code() -> None:
    names = set(imports("dinoreg", "eval", "launch"))
    code = {name.partition(".")[0] for name in names}
    code |= {"tensorboard"} if "torch.utils.tensorboard" in names else set()
    code |= {"aiohttp"} if "fsspec.core" in names else set()  # what fsspec's https imports
    code |= {package for form in FORMATS.values() for package in form.packages}  # what torch.onnx.export imports
    tests = {name.partition(".")[0] for name in imports("tests", "benchmarks", "setup.py")}
    script = "".join((ROOT / name).read_text() for name in (".ci/run", "pyproject.toml", "mkdocs.yml"))
    for row in DEPENDENCIES:
        if row.name in TOOLS:
            assert TOOLS[row.name] in script, row.name
        else:
            assert row.imported.partition(".")[0] in (tests if row.extra == "test" else code), row.name


def test_every_dependency_is_in_the_documentation_with_its_versions_and_purpose() -> None:
    shown = []
    extra = ""
    for line in (ROOT / "docs" / "dependencies.md").read_text().splitlines():
        if match := re.fullmatch(r"## (?:Extra `(\w+)`|Core)", line):
            extra = match[1] or "core"
        elif match := re.fullmatch(r"\| `(\S+)` \| (.+) \| (.+) \|", line):
            shown.append((extra, *match.groups()))
    rows = []
    for row in DEPENDENCIES:
        versions = row.versions
        if row.name in LINUX_X86:
            elsewhere = f"{row.versions} elsewhere" if row.versions else "not elsewhere"
            versions = f"{LINUX_X86[row.name]} on Linux on x86-64, {elsewhere}"
        rows.append((row.extra, row.name, versions, row.purpose))
    assert shown == rows
    assert len(set(NAMES)) == len(NAMES)


def test_every_dependency_has_an_upper_bound_but_those_numbered_by_the_calendar() -> None:
    for row in DEPENDENCIES:
        if row.name not in ("tifffile", "fsspec"):
            assert "<" in row.versions or row.name in LINUX_X86, row.name


def test_setuptools_gets_the_requirements_without_importing_dinoreg() -> None:
    show = "import sys; sys.modules['dinoreg'] = None; import setuptools; setuptools.setup = lambda **given: print("
    code = show + "given['install_requires'], given['extras_require'], sep='\\n'); exec(open('setup.py').read())"
    done = subprocess.run([sys.executable, "-c", f"__file__ = 'setup.py'; {code}"], capture_output=True, cwd=ROOT)
    core, extras = done.stdout.decode().splitlines()
    assert ast.literal_eval(core) == requirements("core")
    assert ast.literal_eval(extras) == {
        extra: requirements(extra) for extra in ("eval", "data", "remote", "export", "log", "docs", "all", "test")
    }
    assert set(requirements("all")) < set(requirements("test"))
    assert not set(requirements("core")) & set(requirements("test"))


@pytest.mark.parametrize("python", ["3.10", "3.13"])
def test_on_linux_pytorch_is_the_one_that_xformers_is_compiled_for(python: str) -> None:
    markers = pytest.importorskip("packaging.requirements")
    chosen = {}
    for place in ("linux", "darwin"):
        environment = {"sys_platform": place, "platform_machine": "x86_64", "python_version": python}
        lines = [markers.Requirement(line) for line in requirements("core")]
        chosen[place] = {
            line.name: str(line.specifier) for line in lines if not line.marker or line.marker.evaluate(environment)
        }
    assert chosen["linux"]["torch"] == "==2.10.*"
    assert chosen["linux"]["torchvision"] == "==0.25.*"
    assert chosen["linux"]["xformers"] == "==0.0.35"
    assert "xformers" not in chosen["darwin"]
    assert set(chosen["darwin"]) | {"xformers"} == set(chosen["linux"])


def test_a_hint_names_the_extra_by_distribution_or_module() -> None:
    assert install("pyarrow") == install("pyarrow.parquet") == "pip install 'dinoreg[data]'"
    assert install("timm") == "pip install 'dinoreg[export]'"
    assert install("sklearn") == "pip install 'dinoreg[data]'"
    assert install("torchmetrics") == "pip install 'dinoreg[test]'"
    assert install("rich") == "pip install rich"
    assert install("PIL") == "pip install pillow"
    assert install("pyarrow2") == "pip install pyarrow2"
    assert find("pyarrow2") is None


@pytest.mark.parametrize("kind", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
def test_a_call_of_ours_that_is_announced_to_go_is_an_error(kind: type[Warning]) -> None:
    def warn(module: str) -> None:
        exec("import warnings; warnings.warn('old', kind)", {"__name__": module, "kind": kind})

    for module in ("dinoreg", "dinoreg.data.decode", "dinoreg_declared_pets"):
        with pytest.raises(kind, match="old"):
            warn(module)
    with pytest.warns(kind, match="old"):
        warn("another_package.module")
    with pytest.raises(Warning, match="deprecated since torchvision"):
        warnings.warn("decode_jpeg is deprecated since torchvision 0.29", stacklevel=1)
