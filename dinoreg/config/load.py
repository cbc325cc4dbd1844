"""A run's config, read from YAML and `key=value`, saved as YAML.

A value comes from, in order of precedence: `key=value` overrides, the YAML file (which states only what
differs), the default.
"""

import dataclasses
import io
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dinoreg.config.bundled import bundled
from dinoreg.config.dinov2 import from_dinov2, is_dinov2, is_dinov2_key, refuse_foreign
from dinoreg.config.option import build, dotted, keys_of, nearest, typed
from dinoreg.config.schema import BUDGETS, Config
from dinoreg.config.view_settings import preset_values
from dinoreg.runtime.errors import UserError, one_line
from dinoreg.runtime.regular_files import read_regular

logger = logging.getLogger(__name__)

# Of one command, not of the run.
COMMAND_ONLY = ("resume", "overwrite", "takeover")
# Of each group at most one is given; one of a later layer replaces one of an earlier layer.
EXCLUSIVE = (BUDGETS, ("optim.base_lr", "optim.lr"), COMMAND_ONLY)


def require_complete(config: Config) -> Config:
    """`config` itself, if a run can start from it.

    raises  UserError where `out`, `data` or the budget is missing
    """
    if not config.out:
        raise UserError("out: missing; say where the run folder goes, for example out=runs/first")
    if not config.data.source:
        raise UserError("data: missing; name a folder of images (data=photos/), a list of paths, or data=scenes")
    if all(getattr(config, key) is None for key in BUDGETS):
        raise UserError("no budget: give one of steps=, images= or epochs=")
    return config


# ------------------------------------------------------------------------------------------------------------
# Reading and writing


def load_config(source: str | Path | None = None, overrides: Mapping[str, Any] | Iterable[str] = ()) -> Config:
    """The config of a run: defaults, then a YAML file or the name of a shipped one, then overrides.

    source     a name in `configs/` ("vits14_reg4"), a YAML file (ours or dinov2's own), a run folder, or None
    overrides  {"optim.lr": 1e-3} or ["optim.lr=1e-3", …]; `data=PATH` is short for `data.source=PATH`
    raises     UserError for a missing or invalid file, an unknown key (naming the nearest) or a wrong value
    """
    layers = [("command line", dotted(overrides))]
    if source is not None:
        path = find_config(source)
        layers.insert(0, (str(path), _read_yaml(path)))
    values: dict[str, Any] = {}
    for where, layer in layers:
        if layer.get("data", {}) != {}:  # short for its source
            layer["data.source"] = layer.pop("data")
        given = typed(layer, Config, where)
        for group in EXCLUSIVE:
            if any(given.get(key) is not None and given[key] is not False for key in group):  # 0 is a value
                values.update(dict.fromkeys(group, False if group == COMMAND_ONLY else None))
        values.update(preset_values(given.get("augment.preset")) | given)
    if source is not None and path.name == "config.yaml" and "out" not in layers[-1][1]:
        again = values.get("resume") or values.get("overwrite")
        if path.parent == Path(source) or (again and (path.parent / "owner.json").is_file()):
            values["out"] = str(path.parent)  # a run lies where it is, wherever it was written
    return build(Config, values)


def to_yaml(config: Config) -> str:
    """The resolved config, every key written out; `load_config` reads it back to an equal config.

    Left out are resume and overwrite: they belong to one command, and a run folder's config must not delete
    the run when it is used again.
    """
    from omegaconf import OmegaConf

    values = {key: value for key, value in dataclasses.asdict(config).items() if key not in COMMAND_ONLY}
    return OmegaConf.to_yaml(OmegaConf.create(values))


def shipped_configs() -> dict[str, Path]:
    """The paths of the YAML files in `configs/`, by name without suffix."""
    return {path.stem: path for path in sorted(bundled("configs").glob("*.yaml"))}


def find_config(source: str | Path) -> Path:
    """Path of a shipped config by name, of a YAML file by path, or of config.yaml in a run folder; else UserError."""
    known = shipped_configs()
    path = known.get(str(source), Path(source))
    if path.is_dir() and not (path / "config.yaml").is_file():
        ways = f"expected a run, a YAML file or a name; images are named by data={path}"
        raise UserError(f"config {path}: a folder without config.yaml; {ways}")
    path = path / "config.yaml" if path.is_dir() else path
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        return path
    if "/" in str(source) or path.suffix in (".yaml", ".yml"):
        raise UserError(f"config {source}: no such file or folder; expected a run, a YAML file or a name")
    raise UserError(f"config {source}: unknown{nearest(str(source), known)}; known: {', '.join(known)}")


def _read_yaml(path: Path) -> dict[str, Any]:
    from omegaconf import DictConfig, OmegaConf  # here, so that help does not wait for it

    try:
        loaded = OmegaConf.load(io.StringIO(read_regular(path, 1 << 20).decode("utf-8-sig")))
        plain: Any = OmegaConf.to_container(loaded, resolve=False)
    except Exception as error:  # a YAML error has no common base with those of OmegaConf
        raise UserError(f"config {path}: not valid YAML ({one_line(error, 200)})") from None
    if not isinstance(loaded, DictConfig) or not isinstance(plain, dict):
        raise UserError(f"config {path}: expected keys and values")
    content, ours = dotted(plain, where=str(path)), keys_of(Config)
    refuse_foreign(content, ours, str(path))
    if not is_dinov2(content, ours):
        if content and all(is_dinov2_key(key) for key in content):
            both = ", ".join(content)
            logger.warning("%s: dinov2's files have %s, too; read as dinoreg's, with its defaults", path, both)
        return content
    translation = from_dinov2(content)
    logger.warning("%s is a config of dinov2; read as\n%s", path, translation)
    return translation.config
