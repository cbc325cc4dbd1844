"""`dinoreg completion SHELL`: the script with which a shell completes verbs, configs, datasets, keys, values, files."""

import glob
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dinoreg.commands.arguments import Verb
from dinoreg.commands.options import ACTIONS, VIEWS
from dinoreg.config.bundled import bundled
from dinoreg.config.load import shipped_configs
from dinoreg.jobs.job_type import job_files

SHELLS = ("bash", "zsh", "fish")


def script_of(shell: str) -> str:
    """The script for one of SHELLS, which asks `dinoreg completion words …` for what may be meant."""
    return (Path(__file__).with_name("templates") / f"completion.{shell}").read_text(encoding="utf-8")


def candidates(verbs: Mapping[str, Verb], typed: Sequence[str]) -> list[str]:
    """What the last of the words behind `dinoreg`, as far as it is typed, may become."""
    *before, current = typed or [""]
    if not before:
        return _starting(current, [*verbs, "--help", "--version"])
    keys = verbs[before[0]].keys() if before[0] in verbs else {}
    key, equals, value = current.partition("=")
    if equals:
        hint, declared = keys.get(key, (None, None))
        known = ("true", "false") if hint is bool else declared.choices if declared else ()
        known = ("auto", "cpu", "cuda", "mps") if key == "device" else known
        return [f"{key}={each}" for each in (_starting(value, known) if known else _files(value))]
    found = _starting(current, _first_words(before[0])) if len(before) == 1 else []
    return [*found, *_starting(current, [f"{each}=" for each in keys]), *_files(current)]


def _first_words(verb: str) -> Iterable[str]:
    datasets = ["all", "--list", *(path.stem for path in sorted(bundled("eval").glob("*.py")))]
    known = {"view": [*VIEWS], "launch": [*job_files(), *ACTIONS], "completion": [*SHELLS], "eval": datasets}
    return shipped_configs() if verb in ("pretrain", "plan") else known.get(verb, ())


def _starting(text: str, words: Iterable[str]) -> list[str]:
    return [word for word in words if word.startswith(text)]


def _files(text: str) -> list[str]:
    """Paths that begin so, behind the last comma; folders with a slash at their end."""
    first, comma, last = text.rpartition(",")
    found = sorted(glob.glob(glob.escape(os.path.expanduser(last)) + "*"))
    return [f"{first}{comma}{path}{'/' if os.path.isdir(path) else ''}" for path in found]
