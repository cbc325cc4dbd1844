"""Where configs/, eval/ and launch/ are: beside the package in a checkout, inside it in a wheel."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from dinoreg.runtime.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]


def bundled(name: str) -> Path:
    """Path of the folder `configs`, `eval` or `launch`: in the checkout, or the copy in an installed wheel."""
    checkout = PACKAGE.parent / name
    if (PACKAGE.parent / "setup.py").is_file() and checkout.is_dir():
        return checkout
    return PACKAGE / "_bundled" / name


def run_file(path: Path, prefix: str) -> ModuleType:
    """Run a Python file as the module `<prefix>_<stem>`, which is in sys.modules then.

    raises  UserError for whatever the file raises, after removing the module again
    """
    name = f"{prefix}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look a module up by its name
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, UserError) or not isinstance(error, Exception):
            raise
        raise UserError(f"{path}: cannot be loaded ({type(error).__name__}: {error})") from error
    return module
