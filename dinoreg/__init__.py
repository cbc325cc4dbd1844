"""Self-supervised pretraining of Vision Transformers with register tokens: the public Python API.

Names are looked up when they are first used, so that `import dinoreg` is quick.
"""

import importlib
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinoreg.commands.curate import curate
    from dinoreg.commands.embed import embed
    from dinoreg.commands.evaluate import evaluate
    from dinoreg.commands.export import export
    from dinoreg.commands.inspect import inspect
    from dinoreg.commands.registers import registers
    from dinoreg.commands.verdict import verdict
    from dinoreg.commands.view import view
    from dinoreg.evaluation.backbones.open import transform
    from dinoreg.models.classifier import VitRGTS
    from dinoreg.models.vit import RegisterViT, Tokens
    from dinoreg.plan.run import plan
    from dinoreg.reports.run_list import runs
    from dinoreg.weights.load import load, select_channels

# Threads of GNU OpenMP spin for milliseconds while they wait for each other, by default: beside another busy process a
# step then takes ten times as long. The library reads this when PyTorch is loaded, which is later.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Memory of a GPU in segments that grow: with the masks of a run, of which every step has other ones, segments of fixed
# size leave a tenth of it in gaps. PyTorch reads this when CUDA starts.
if sys.platform == "linux" and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

__version__ = "0.1.0"
__all__ = ["RegisterViT", "Tokens", "VitRGTS", "__version__", "evaluate", "export", "load", "pretrain"]
__all__ += ["curate", "embed", "inspect", "plan", "registers", "runs", "select_channels"]
__all__ += ["transform", "verdict", "view"]

_VERBS = ("curate", "embed", "evaluate", "export", "inspect", "registers", "verdict", "view")
_WHERE = {verb: f"dinoreg.commands.{verb}" for verb in _VERBS} | {
    "RegisterViT": "dinoreg.models.vit",
    "Tokens": "dinoreg.models.vit",
    "VitRGTS": "dinoreg.models.classifier",
    "load": "dinoreg.weights.load",
    "plan": "dinoreg.plan.run",
    "runs": "dinoreg.reports.run_list",
    "select_channels": "dinoreg.weights.load",
    "transform": "dinoreg.evaluation.backbones.open",
}
_PACKAGES = ("export", "plan", "registers")  # each is also called, as the function of its name


class CalledPackage(types.ModuleType):
    """A package that is called as the function of its name, `dinoreg.plan("small")`.

    Python binds a package's name in its parent as soon as anything inside it is imported, so a function of that name
    would be overwritten; a module that can be called keeps both meanings.
    """

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        name = self.__name__.rpartition(".")[2]
        return getattr(importlib.import_module(_WHERE[name]), name)

    def __call__(self, *values: Any, **named: Any) -> Any:
        """See the function that is called."""
        return self.__wrapped__(*values, **named)


def pretrain(config: str | Path | None = None, **overrides: Any) -> Path:
    """Train a register ViT; the same as `dinoreg pretrain CONFIG key=value …`.

    config     a name in `configs/` ("vits14_reg4"), a YAML file, a run folder to resume, or None
    overrides  the command line's keys: data="photos/", out="runs/a", steps=50_000; dotted ones as
               **{"optim.lr": 1e-3}
    returns    the run folder; `dinoreg.load` reads it
    raises     UserError (a ValueError) for a wrong key or value, before anything is written
    """
    from dinoreg.config.load import load_config, require_complete
    from dinoreg.train.loop import pretrain as run

    return Path(run(require_complete(load_config(config, overrides))))


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"dinoreg.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'dinoreg' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
