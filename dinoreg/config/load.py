"""A run's config: the sections of `schema.py` together, read from YAML and `key=value`, saved as YAML.

A value comes from, in order of precedence: `key=value` overrides, the YAML file (which states only what
differs), the default. Derived values (steps of a run, scaled learning rate) are methods: printed and logged,
never written back.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinoreg.config.option import (
    Options,
    build,
    check,
    flat,
    flatten,
    keys_of,
    nearest,
    nested,
    option,
    refuse_interpolation,
    section,
)
from dinoreg.config.schema import (
    DEVICE,
    MAX_SEED,
    PRECISIONS,
    AdaptConfig,
    CheckpointConfig,
    DataConfig,
    HeadConfig,
    HealthConfig,
    LogConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ProbeConfig,
    ScheduleConfig,
)
from dinoreg.config.view_settings import AugmentSettings, CropSettings, MaskSettings
from dinoreg.runtime.errors import UserError, one_line

logger = logging.getLogger(__name__)

BUDGETS = ("steps", "images", "epochs")
# Of one command, not of the run.
COMMAND_ONLY = ("resume", "overwrite")
# Of each group at most one is given; one of a later layer replaces one of an earlier layer.
EXCLUSIVE = (BUDGETS, ("optim.base_lr", "optim.lr"), COMMAND_ONLY)


@dataclass(frozen=True)
class Config(Options):
    out: str | None = option(None, "the run folder", shapes_weights=False)
    init: str | None = option(None, "weights to start from: a run, a teacher file, a Meta .pth or a model name")
    steps: int | None = option(None, "length of the run in optimizer steps; excludes images and epochs", low=1)
    images: int | None = option(None, "length of the run in images", low=1)
    epochs: float | None = option(None, "length of the run in passes over the data", above=0)
    batch_size: int = option(64, "images a step, per process", low=1, high=2**20)
    seed: int = option(0, "of weights, data order, crops, masks and drop path", low=0, high=MAX_SEED)
    device: str = option("auto", DEVICE, shapes_weights=False)
    precision: str = option("auto", "auto: bf16 where the hardware has it", choices=PRECISIONS)
    threads: int | None = option(
        None, "CPU threads of the step; none: PyTorch's choice", low=1, high=1024, shapes_weights=False
    )
    resume: bool = option(False, "go on with the run in `out`", shapes_weights=False)
    overwrite: bool = option(False, "delete what is in `out` first", shapes_weights=False)
    model: ModelConfig = section(ModelConfig)
    head: HeadConfig = section(HeadConfig)
    crops: CropSettings = section(CropSettings)
    augment: AugmentSettings = section(AugmentSettings)
    mask: MaskSettings = section(MaskSettings)
    loss: LossConfig = section(LossConfig)
    optim: OptimConfig = section(OptimConfig)
    schedule: ScheduleConfig = section(ScheduleConfig)
    adapt: AdaptConfig = section(AdaptConfig)
    data: DataConfig = section(DataConfig)
    parallel: ParallelConfig = section(ParallelConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig, shapes_weights=False)
    log: LogConfig = section(LogConfig, shapes_weights=False)
    probe: ProbeConfig = section(ProbeConfig, shapes_weights=False)
    health: HealthConfig = section(HealthConfig, shapes_weights=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        accumulate, divisor = self.optim.accumulate, f"a divisor of batch_size={self.batch_size}"
        check(self.batch_size % accumulate == 0, "optim.accumulate", accumulate, divisor)
        given = [key for key in BUDGETS if getattr(self, key) is not None]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)}: give exactly one of steps, images and epochs")
        if self.resume and self.overwrite:
            raise UserError("resume and overwrite: give one of the two")
        _check_model(self)

    def num_steps(self, num_images: int, world_size: int = 1) -> int:
        """Length of the run in optimizer steps, for a data set of `num_images`; at least 1."""
        global_batch = self.batch_size * world_size
        if self.steps is not None:
            return self.steps
        if self.images is not None:
            return max(1, round(self.images / global_batch))
        if self.epochs is not None:
            return max(1, round(self.epochs * num_images / global_batch))
        raise UserError("no budget: give one of steps=, images= or epochs=")

    def peak_lr(self, world_size: int = 1) -> float:
        """`optim.lr` as given, or `optim.base_lr` times sqrt(global batch / 1024)."""
        if self.optim.lr is not None:
            return self.optim.lr
        assert self.optim.base_lr is not None
        return self.optim.base_lr * math.sqrt(self.batch_size * world_size / 1024)

    def layer_decay(self) -> float:
        """Rate multiplier per block: `optim.layer_decay`, with `init=` at most `adapt.layer_decay`."""
        if self.init is None:
            return self.optim.layer_decay
        return min(self.optim.layer_decay, self.adapt.layer_decay)

    def explain_lr(self, world_size: int = 1) -> str:
        """How the peak learning rate came about, in one line."""
        rate = f"learning rate {self.peak_lr(world_size):.3g}"
        if self.optim.lr is not None:
            return f"{rate} as given"
        return f"{rate} = {self.optim.base_lr:.3g} · √({self.batch_size * world_size}/1024)"

    def explain_start(self, num_steps: int, world_size: int = 1) -> str:
        """What a run with `init=` does with the backbone, in one line."""
        frozen = round(self.adapt.heads * num_steps)
        rate = self.peak_lr(world_size) * self.adapt.lr
        first = f"heads alone for {frozen} steps, then " if frozen else ""
        return (
            f"{first}backbone at {rate:.3g} ({self.adapt.lr:.3g} of the heads' rate), {self.layer_decay():.3g} a block"
        )

    def shaping(self) -> dict[str, Any]:
        """Every option that shapes the weights, by its dotted key; what only watches or places the run is left out."""
        return flat(self, of_weights=True)

    def hash(self) -> str:
        """Twelve hexadecimal digits over what shapes the weights (`shaping`) and nothing else."""
        return hashlib.sha256(json.dumps(self.shaping()).encode()).hexdigest()[:12]


def _check_model(config: Config) -> None:
    """The model's name is known, the crops divide into its patches, its heads divide its width."""
    from dinoreg.models.registry import parse_name

    try:
        named = parse_name(config.model.name)
    except ValueError as error:
        raise UserError(f"model.name={config.model.name}: {one_line(error, 200)}") from None
    patch = int(named["patch_size"])
    sizes = {"crops.global_size": config.crops.global_size}
    if config.crops.num_local:
        sizes["crops.local_size"] = config.crops.local_size
    for key, size in sizes.items():
        below = size // patch * patch
        nearest = f"{below} or {below + patch}" if below > 0 else str(patch)
        check(
            size > 0 and size % patch == 0,
            key,
            size,
            f"a multiple of the patch size {patch} of {config.model.name}, for example {nearest}",
        )
    dim, heads = config.model.dim or named["dim"], config.model.heads or named["heads"]
    check(dim % heads == 0, "model.heads", heads, f"a divisor of the width model.dim={dim}")
    for key in ("mean", "std"):
        values = getattr(config.augment, key)
        check(
            len(values) in (1, config.model.in_channels),
            f"augment.{key}",
            list(values),
            f"one number, or one for each of the {config.model.in_channels} channels (model.in_channels)",
        )


def require_complete(config: Config) -> None:
    """Refuse, before anything is written, a config that a run cannot start from.

    raises  UserError where `out`, `data` or the budget is missing
    """
    if config.out is None:
        raise UserError("out: missing; say where the run folder goes, for example out=runs/first")
    if config.data.source is None:
        raise UserError("data: missing; name a folder of images (data=photos/), a list of paths, or data=scenes")
    if all(getattr(config, key) is None for key in BUDGETS):
        raise UserError("no budget: give one of steps=, images= or epochs=")


# ------------------------------------------------------------------------------------------------------------
# Reading and writing


def load_config(
    source: str | Path | None = None,
    overrides: Mapping[str, Any] | Iterable[str] = (),
) -> Config:
    """The config of a run: defaults, then a YAML file or the name of a shipped one, then overrides.

    source     a name in `configs/` ("vits14_reg4"), a YAML file (ours or dinov2's own), a run folder, or None
    overrides  {"optim.lr": 1e-3} or ["optim.lr=1e-3", …]; `data=PATH` is short for `data.source=PATH`
    raises     UserError for a missing file, an unknown key (naming the nearest) or a value of the wrong type
    """
    layers: list[tuple[str, dict[str, Any]]] = []
    if source is not None:
        path = find_config(source)
        layers.append((str(path), _read_yaml(path)))
    layers.append(("command line", nested(overrides, {"data": "data.source"})))
    values: dict[str, Any] = {}
    for where, layer in layers:
        if "data" in layer and not isinstance(layer["data"], Mapping):
            layer["data"] = {"source": layer["data"]}
        given = flatten(layer, Config, where)
        for group in EXCLUSIVE:
            if any(given.get(key) is not None and given[key] is not False for key in group):  # 0 is a value
                unset = False if group == COMMAND_ONLY else None
                values.update(dict.fromkeys(group, unset))
        values.update(given)
    return build(Config, values)


def to_yaml(config: Config) -> str:
    """The resolved config, every key written out; `load_config` reads it back to an equal config.

    Left out are resume and overwrite: they belong to one command, and a run folder's config must not delete
    the run when it is used again.
    """
    from omegaconf import OmegaConf

    values = _plain(dataclasses.asdict(config))
    return OmegaConf.to_yaml(OmegaConf.create({key: values[key] for key in values if key not in COMMAND_ONLY}))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def find_config(source: str | Path) -> Path:
    """Path of a shipped config by name, of a YAML file by path, or of the config that a run folder holds."""
    from dinoreg.config.bundled import bundled

    folder = bundled("configs")
    known = sorted(file.stem for file in folder.glob("*.yaml"))
    if str(source) in known:
        return folder / f"{source}.yaml"
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"config {path}: no such file")
        return path
    if path.is_dir():
        if not (path / "config.yaml").is_file():
            raise UserError(
                f"config {path}: a folder without config.yaml; expected a run folder, a YAML file or a name"
            )
        return path / "config.yaml"
    raise UserError(f"config {source}: unknown{nearest(str(source), known)}; known: {', '.join(known)}")


def _read_yaml(path: Path) -> dict[str, Any]:
    from omegaconf import DictConfig, OmegaConf  # here, so that help does not wait for it

    try:
        loaded = OmegaConf.load(path)
        plain = OmegaConf.to_container(loaded, resolve=False)
    except Exception as error:  # a YAML error has no common base with those of OmegaConf
        raise UserError(f"config {path}: not valid YAML ({one_line(error, 200)})") from None
    if not isinstance(loaded, DictConfig) or not isinstance(plain, dict):
        raise UserError(f"config {path}: expected keys and values")
    content: dict[str, Any] = {str(key): value for key, value in plain.items()}
    refuse_interpolation(content, str(path))
    from dinoreg.config.dinov2 import from_dinov2, is_dinov2

    if not is_dinov2(content, keys_of(Config)):
        return content
    translation = from_dinov2(content)
    logger.warning("%s is a config of dinov2; read as\n%s", path, translation)
    return translation.config
