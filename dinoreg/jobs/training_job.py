"""What kinds of job share: a training as one command that every start can use, and weights kept for later."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dinoreg.config.load import Config, load_config, require_complete, to_yaml
from dinoreg.config.overwrite import check_out, run_entries
from dinoreg.jobs.job_type import Arguments
from dinoreg.jobs.records import launch_folder
from dinoreg.runtime.errors import UserError


@dataclass(frozen=True)
class Training:
    """A run that a job is to train: its folder, its command, and the config that the command reads."""

    out: Path
    command: Arguments
    config_file: Path
    config_text: str
    clears: tuple[Path, ...]


def training(source: str, overrides: Sequence[str]) -> Training:
    """A training whose first start and every restart are the same command, whatever becomes of the user's files.

    The resolved config is kept in the run's `launch/`; `overwrite=true` is done at submission, once.
    raises UserError for whatever `dinoreg pretrain` would refuse before it opens the data
    """
    config = require_complete(load_config(source, overrides))
    out = Path(str(config.out))
    check_out(config, out)
    clears = (out,) if config.overwrite and run_entries(out) else ()
    _check_data(config)
    path = launch_folder(out) / "config.yaml"
    return Training(out, ("pretrain", str(path), "resume=true"), path, to_yaml(config), clears)


def _check_data(config: Config) -> None:
    """UserError for a missing path at submission, rather than after hours in a queue."""
    sources = config.data.source if isinstance(config.data.source, list) else [config.data.source]
    for source in sources:
        text = str(source)
        if text != "scenes" and ":" not in text and not Path(text).exists():
            raise UserError(f"data={text}: no such file or folder on this machine")


def kept_weights(run: Path, weights: Path) -> tuple[dict[Path, Path], dict[Path, str], Path]:
    """(links, files, path) that keep a teacher file of a run for jobs to come: training retires old ones.

    The kept weights lie in a small run folder of the same name, so that reports call them by it.
    """
    home = launch_folder(run) / "weights" / run.resolve().name
    target = home / "teacher" / weights.name
    links = {target: weights}
    description = weights.with_suffix(".json")
    if description.is_file():
        links[target.with_suffix(".json")] = description
    return links, {home / "config.yaml": (run / "config.yaml").read_text()}, target
