"""Imports follow the design's arrow, and nothing is imported that is not declared."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "dinoreg").rglob("*.py"))

# cli -> train, eval, view, launch, export -> models, losses, data, checkpoint, config -> distributed, errors
GROUND = ("errors", "peers", "distributed", "runtime", "rows", "metrics", "values", "keys", "bundled")
PARTS = (
    *("models", "losses", "data", "checkpoint", "checkpoint_writer"),
    *("options", "config", "config_dinov2", "environment"),
)
WORK = ("train", "eval", "view", "launch", "export")
TOP = (
    *("quickstart", "embed", "feature_file", "evaluation", "registers", "doctor", "plan"),
    *("jobs", "launching"),
    *("arguments", "cli", "__main__", "__init__"),
)
TIER = {name: tier for tier, names in enumerate((GROUND, PARTS, WORK, TOP)) for name in names}

# What a part may use of its neighbours; a part not named here uses none.
NEIGHBOURS = {
    "keys": {"values"},
    "distributed": {"peers"},
    "checkpoint_writer": {"checkpoint"},
    "config": {"options", "config_dinov2", "data.settings", "models.zoo"},
    "options": {"data.settings"},
    "config_dinov2": {"config"},
}


def imported(path: Path, everywhere: bool = True) -> set[str]:
    """Dotted names that a module imports; with everywhere=False only those at module level, run on import."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(str(node.module))
            if node.module == "dinoreg":
                found.update(f"dinoreg.{alias.name}" for alias in node.names)
    return found


def part_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "dinoreg").with_suffix("").parts
    return parts[0]


def own_imports(path: Path) -> set[str]:
    """What a module imports of dinoreg, without the leading name."""
    names = {name.removeprefix("dinoreg.") for name in imported(path) if name.startswith("dinoreg.")}
    return names - {"__version__"}


def test_every_module_has_a_place_in_the_arrow() -> None:
    assert {part_of(path) for path in MODULES} <= set(TIER)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_right_and_never_sideways(path: Path) -> None:
    part = part_of(path)
    for name in own_imports(path):
        other = name.partition(".")[0]
        assert TIER[other] <= TIER[part], f"{part} imports {name}, which is above it"
        if other == part or TIER[other] < TIER[part] or part in TOP:
            continue
        if TIER[part] == 0:
            assert name in {"errors"} | NEIGHBOURS.get(part, set()), f"{part} imports {name}"
        else:
            allowed = NEIGHBOURS.get(part, set())
            assert name in allowed or other in allowed, f"{part} imports {name}, its neighbour"


@pytest.mark.parametrize("part", ["models", "losses"])
def test_models_and_losses_know_no_config_and_no_command_line(part: str) -> None:
    for path in (ROOT / "dinoreg" / part).glob("*.py"):
        assert not imported(path) & {"omegaconf", "yaml", "argparse", "sys", "rich"}, path
        assert not {name.partition(".")[0] for name in own_imports(path)} - {part, *GROUND}, path


def test_losses_read_and_write_no_files() -> None:
    for path in (ROOT / "dinoreg" / "losses").glob("*.py"):
        assert not imported(path) & {"os", "pathlib", "io", "json", "logging"}, path


def test_the_inside_never_imports_the_declarations_outside() -> None:
    for path in MODULES:
        roots = {name.partition(".")[0] for name in imported(path)}
        assert not roots & {"configs", "eval", "launch", "tests", "benchmarks"}, path


def requirements(block: str) -> set[str]:
    """Names of the distributions in one list of setup.py."""
    text = (ROOT / "setup.py").read_text()
    found = re.search(rf"^{block} = [\[{{](.*?)^[\]}}]", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return set(re.findall(r'"([A-Za-z][A-Za-z0-9_-]*)>=', found[1]))


def test_what_is_imported_at_once_is_a_core_dependency() -> None:
    names = {"pillow": "PIL"}
    core = {names.get(name, name.replace("-", "_")) for name in requirements("CORE")}
    for path in MODULES:
        roots = {name.partition(".")[0] for name in imported(path, everywhere=False)}
        assert roots <= core | set(sys.stdlib_module_names) | {"dinoreg", "__future__"}, path


def test_every_dependency_has_one_reason_in_the_documentation() -> None:
    text = (ROOT / "docs" / "dependencies.md").read_text()
    told = re.findall(r"^\| `([A-Za-z0-9_-]+)` \| (.+) \|$", text, re.MULTILINE)
    reasons = dict(told)
    assert len(reasons) == len(told)
    assert set(reasons) == requirements("CORE") | requirements("EXTRAS") | requirements("TEST")
    assert all(len(reason) > 10 for reason in reasons.values())


def test_importing_dinoreg_and_asking_for_help_load_no_torch() -> None:
    for code in (
        "import dinoreg, dinoreg.config",
        "from dinoreg.cli import main; main(['pretrain', '--help']); main(['nonsense'])",
    ):
        check = f"import sys; {code}; assert 'torch' not in sys.modules, 'torch was imported'"
        done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr


def test_the_public_names_are_there() -> None:
    import dinoreg

    for name in dinoreg.__all__:
        assert getattr(dinoreg, name) is not None
        assert name in dir(dinoreg)
    with pytest.raises(AttributeError, match="no attribute 'evaluat'"):
        dinoreg.evaluat  # noqa: B018


def test_no_module_is_a_drawer_for_odds_and_ends() -> None:
    assert not {path.stem for path in MODULES} & {"utils", "util", "helpers", "common", "misc"}


def test_every_module_says_what_it_holds() -> None:
    for path in MODULES:
        if path.read_text().strip():
            docstring = ast.get_docstring(ast.parse(path.read_text()))
            assert docstring is not None, path
            assert len(docstring) > 20, path
