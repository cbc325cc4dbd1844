"""Imports follow the design's arrow, and nothing is imported that is not declared."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dinoreg.runtime.dependencies import DEPENDENCIES

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "dinoreg").rglob("*.py"))

# From the ground up. A folder imports folders of floors below it, never of its own or a higher one.
FLOORS = (
    ("runtime",),
    ("models", "scenes", "distributed"),
    ("config", "losses"),
    ("data", "weights", "checkpoint", "jobs"),
    ("evaluation", "reports", "export"),
    ("train", "visualize"),
    ("registers", "plan"),
    ("commands",),
)
FLOOR = {folder: floor for floor, folders in enumerate(FLOORS) for folder in folders}


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


def folder_of(path: Path) -> str:
    return path.relative_to(ROOT / "dinoreg").parts[0]


def own_imports(path: Path) -> set[str]:
    """What a module imports of dinoreg, without the leading name."""
    names = {name.removeprefix("dinoreg.") for name in imported(path) if name.startswith("dinoreg.")}
    return names - {"__version__"}


def test_the_package_root_holds_the_public_face_and_nothing_else() -> None:
    assert {path.name for path in (ROOT / "dinoreg").glob("*.py")} == {"__init__.py", "__main__.py"}
    assert {folder_of(path) for path in MODULES} - {"__init__.py", "__main__.py"} == set(FLOOR)


def test_imports_go_down() -> None:
    for path in MODULES:
        folder = folder_of(path)
        if folder not in FLOOR:
            continue
        for name in own_imports(path):
            other = name.partition(".")[0]
            assert other == folder or FLOOR[other] < FLOOR[folder], f"{path} imports {name}, which is not below it"


def test_no_modules_import_each_other_in_a_circle() -> None:
    names = {
        ".".join(path.relative_to(ROOT / "dinoreg").with_suffix("").parts): path
        for path in MODULES
        if path.name != "__init__.py"
    }
    below = {name: {other for other in own_imports(path) if other in names} for name, path in names.items()}
    for name, path in names.items():
        for folder in own_imports(path) - below[name]:
            # "from dinoreg.evaluation.protocols import knn" names modules of a folder, as well as its __init__.
            tree = ast.walk(ast.parse(path.read_text()))
            froms = [n for n in tree if isinstance(n, ast.ImportFrom) and n.module == f"dinoreg.{folder}"]
            below[name] |= {f"{folder}.{alias.name}" for n in froms for alias in n.names} & set(names)
    while leaves := {name for name, others in below.items() if not others}:
        below = {name: others - leaves for name, others in below.items() if name not in leaves}
    assert not below


@pytest.mark.parametrize("folder", ["models", "losses"])
def test_models_and_losses_know_no_config_and_no_command_line(folder: str) -> None:
    for path in (ROOT / "dinoreg" / folder).glob("*.py"):
        assert not imported(path) & {"omegaconf", "yaml", "argparse", "sys", "rich"}, path
        assert {name.partition(".")[0] for name in own_imports(path)} <= {folder, "runtime", "distributed"}, path


def test_losses_read_and_write_no_files() -> None:
    for path in (ROOT / "dinoreg" / "losses").glob("*.py"):
        assert not imported(path) & {"os", "pathlib", "io", "json", "logging"}, path


def test_the_inside_never_imports_the_declarations_outside() -> None:
    for path in MODULES:
        roots = {name.partition(".")[0] for name in imported(path)}
        assert not roots & {"configs", "eval", "launch", "tests", "benchmarks"}, path


def test_what_is_imported_at_once_is_a_core_dependency() -> None:
    core = {row.imported.partition(".")[0] for row in DEPENDENCIES if row.extra == "core"}
    for path in MODULES:
        roots = {name.partition(".")[0] for name in imported(path, everywhere=False)}
        assert roots <= core | set(sys.stdlib_module_names) | {"dinoreg", "__future__"}, path


def test_importing_dinoreg_and_asking_for_help_load_no_torch() -> None:
    slow = {"torch", "omegaconf", "rich", "submitit", "numpy"}
    for code, absent in (
        ("import dinoreg, dinoreg.config.load", slow),
        ("from dinoreg.commands.main import main; main(['--version']); main(['pretrain', '--help'])", slow),
        ("from dinoreg.commands.main import main; main(['launch', '--help']); main(['eval', '--help'])", slow),
        ("from dinoreg.commands.main import main; main(['nonsense']); main(['embed', 'tokn=x'])", slow),
        ("from dinoreg.commands.main import main; main(['pretrain', 'vits14_reg4', '--help'])", slow - {"omegaconf"}),
        ("from dinoreg.commands.main import main; main(['pretrain', 'vits14_reg4', 'sed=1'])", slow - {"omegaconf"}),
    ):
        check = f"import sys; {code}; loaded = {absent} & set(sys.modules); assert not loaded, loaded"
        done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr


def test_threads_yield_to_a_busy_neighbour_unless_the_user_says_otherwise() -> None:
    shown = [sys.executable, "-c", "import dinoreg, os; print(os.environ.get('GOMP_SPINCOUNT'))"]
    plain = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    for given, kept in (({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")):
        done = subprocess.run(shown, capture_output=True, text=True, cwd=ROOT, env=plain | given)
        assert done.stdout.strip() == kept
    done = subprocess.run(shown, capture_output=True, text=True, cwd=ROOT, env=plain)
    assert 0 < int(done.stdout) < 300_000  # what GNU OpenMP has by itself


def test_gpu_memory_grows_in_segments_unless_the_user_says_otherwise() -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    shown = [sys.executable, "-c", f"import dinoreg, os; print([os.environ.get(name) for name in {names}])"]
    plain = {key: value for key, value in os.environ.items() if key not in names}
    mine = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
    ours = "expandable_segments:True" if sys.platform == "linux" else None
    for given, kept in (({}, [ours, None]), (mine, [None, "max_split_size_mb:64"])):
        done = subprocess.run(shown, capture_output=True, text=True, cwd=ROOT, env=plain | given)
        assert done.stdout.strip() == str(kept)


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
