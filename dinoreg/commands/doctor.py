"""`dinoreg doctor`: the state of this machine and of the installation, or of a run.

Nothing here needs a working PyTorch, since an installation that cannot be imported is a case to diagnose.
"""

from __future__ import annotations

import errno
import importlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinoreg.runtime.dependencies import DEPENDENCIES, Dependency, install
from dinoreg.runtime.environment import busy, environment, version
from dinoreg.runtime.errors import RunError, one_line
from dinoreg.runtime.json_files import read_json_lines, read_text
from dinoreg.runtime.printable import printable

if TYPE_CHECKING:
    from dinoreg.checkpoint.run_folder import Run

# Importing one of these takes seconds: only its installation is checked.
SLOW_IMPORTS = ("timm", "transformers", "wandb", "mlflow-skinny")


# A line: name, "ok" | "missing" | "open" | "running" | "problem" | "", text. A section: its title and its lines.
Row = tuple[str, str, str]
Section = tuple[str, list[Row]]


def doctor(run: Path | None = None) -> None:
    """Print the state of the machine, or of the run folder `run`."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    styles = {"ok": "green", "problem": "bold red", "": ""}
    for title, rows in examine_run(run) if run is not None else examine_machine():
        console.print(Text(title, "bold"))
        width = max((len(name) for name, _, _ in rows), default=0)
        for name, mark, text in rows:
            shown = f"{mark:<7}", styles.get(mark, "yellow")
            console.print(Text.assemble(printable(f"  {name:<{width}}  "), shown, printable(f"  {text}")))
        console.print()


# ------------------------------------------------------------------------------------------------------------
# The machine


def examine_machine() -> list[Section]:
    """The sections on machine, packages and acceleration."""
    machine = environment()
    return [
        ("machine", _machine_rows(machine)),
        ("packages", _package_rows(machine)),
        ("optional packages", _optional_rows()),
        ("acceleration", _acceleration_rows(machine)),
    ]


def _machine_rows(machine: dict[str, Any]) -> list[Row]:
    bf16 = {True: "with bf16", False: "without bf16 (precision=auto means fp32)", None: ""}[machine["cpu_bf16"]]
    commit = f", commit {machine['commit']}" if machine["commit"] else ""
    cores = f"{machine['cores']} of {os.cpu_count()} cores usable"
    return [
        ("dinoreg", "ok", f"{machine['dinoreg']}{commit}"),
        ("python", "ok", f"{machine['python']} ({machine['executable']})"),
        ("system", "", machine["platform"]),
        ("processor", "", ", ".join(filter(None, [f"{machine['cpu']}, {cores} {bf16}".rstrip(), busy()]))),
        ("memory", "", f"{machine['memory_gib']} GiB, {machine['free_memory_gib']} GiB free for this process"),
        ("free disk", "problem" if machine["free_disk_gib"] < 1 else "", f"{machine['free_disk_gib']} GiB here"),
    ]


def _package_rows(machine: dict[str, Any]) -> list[Row]:
    core = [row for row in DEPENDENCIES if row.name in machine["packages"]]
    return [(row.name, *_package(row, machine["packages"][row.name])) for row in core]


def _optional_rows() -> list[Row]:
    optional = [row for row in DEPENDENCIES if row.extra not in ("core", "docs", "test")]
    return [(row.name, *_package(row, version(row.name))) for row in optional]


def _package(row: Dependency, installed: str | None) -> tuple[str, str]:
    """Mark and text: whether the package is installed and can be imported; of xformers, whether its kernels load."""
    purpose = "" if row.extra == "core" else f", for {row.purpose}"
    mark = "missing" if installed is None and purpose else "problem"
    if installed is None:
        found = f"not installed{purpose}: {install(row.name)}"
    elif row.name in SLOW_IMPORTS:
        return "ok", f"{installed} (not tried: its import takes seconds){purpose}"
    elif problem := _problem(row):
        found = f"{installed}: {problem}{purpose}"
    else:
        return "ok", f"{installed}{purpose}"
    if row.name == "xformers":  # without which everything works
        return "missing", f"{found}; attention runs through PyTorch (same numbers)"
    return mark, found


def _problem(row: Dependency) -> str | None:
    """Why a package cannot be imported, or xformers' kernels do not load, with the remedy; None if all is well."""
    try:
        if row.name == "xformers":
            from dinoreg.runtime.packed_attention import load_problem

            return load_problem()
        importlib.import_module(row.imported)
    except Exception as error:
        return explain(error) or f"cannot be imported ({type(error).__name__}: {one_line(error)})"
    return None


def _acceleration_rows(machine: dict[str, Any]) -> list[Row]:
    rows = []
    for index, device in enumerate(machine["cuda"]):
        bf16 = "bf16" if device["bf16"] else "no bf16 (precision=auto means fp16)"
        size = f"{device['memory_gib']} GiB, compute capability {device['capability']}"
        rows.append((f"cuda:{index}", "ok", f"{device['name']}, {size}, {bf16}"))
    if not rows:
        rows.append(("cuda", "missing", "no CUDA device: runs use the CPU (everything works, slowly)"))
    if (attention := machine["attention"]) is None:
        return [*rows, ("attention", "", "runs through PyTorch; xformers' kernels need CUDA")]
    through, reason = f"runs through {attention['backend']}", attention["reason"]
    found = ("missing", f"{through} (same numbers); {reason}") if reason else ("ok", f"{through}: tried both ways")
    return [*rows, ("attention", *found)]


# What PyTorch, the C++ library and the system say.
_NO_MEMORY = ("can't allocate memory", "annot allocate memory", "std::bad_alloc")


def explain(error: BaseException) -> str | None:
    """One line with the remedy for a known failure of an installation; None for an unknown one."""
    text = str(error)
    if "torchvision::nms" in text or "torchvision has been compiled" in text.lower():
        pair = [row for row in DEPENDENCIES if row.name in ("torch", "torchvision")]
        command = "pip install --force-reinstall " + " ".join(f"'{row.name}{row.pinned}'" for row in pair)
        return (
            f"torch {version('torch')} and torchvision {version('torchvision')} are not from the same build "
            f"(torchvision::nms is missing): install both from one index, with {command}, "
            f"or for the CPU build {command} --index-url https://download.pytorch.org/whl/cpu"
        )
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("dinoreg"):
        return f"the package {error.name} is not installed: {install(error.name)}"
    if type(error).__name__ == "OutOfMemoryError":
        return "out of device memory: use a smaller batch_size, optim.accumulate=2, or model.checkpointing=true"
    if "can't start new thread" in text or (isinstance(error, OSError) and error.errno == errno.EAGAIN):
        return (
            "no more threads or processes can be started here: lower data.workers (workers) and threads, or raise the "
            "limits of this account (ulimit -u) and of its memory (ulimit -v)"
        )
    if isinstance(error, MemoryError) or any(words in text for words in _NO_MEMORY):
        needed = re.search(r"allocate (\d+) bytes", text)
        size = f", {int(needed[1]) / 2**30:.3g} GiB at once were asked for" if needed else ""
        return (
            f"out of memory{size}: lower batch_size, the sizes of pictures and crops, data.prefetch, data.workers, "
            "model.dim or head.prototypes; dinoreg plan says what a run needs"
        )
    return None


def explain_error(error: BaseException, hint: str = "") -> str:
    """One line about an error: a known cause with its remedy, or a file and why; else type, text and `hint`."""
    if known := explain(error):
        return known
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {one_line(error)}{hint}"


# ------------------------------------------------------------------------------------------------------------
# A run


def examine_run(folder: Path) -> list[Section]:
    """The sections on a run's progress, checkpoints, health events and unreadable images."""
    from dinoreg.checkpoint.run_folder import Run

    run = Run(folder)
    return [
        (f"run {folder}", _progress_rows(run)),
        ("checkpoints", _checkpoint_rows(folder)),
        ("health", _health_rows(run)),
        ("images", _image_rows(run)),
    ]


def _progress_rows(run: Run) -> list[Row]:
    from dinoreg.checkpoint.steps import dense_in_words, probe_in_words, which_steps

    log = read_text(run.folder / "train.log")
    rows = [("state", *_state(run))]
    if header := re.findall(r" I (.+ M parameters, .+)$", log, re.MULTILINE):
        rows.append(("started as", "", header[-1]))  # with device, attention and images
    if run.metrics:
        last = run.metrics[-1]
        known = [name for name in ("step", "loss", "images_per_second", "data_time", "step_time") if name in last]
        told = (f"{last[name]:.4g}" if isinstance(last[name], float) else last[name] for name in known)
        rows.append(("last line", "", ", ".join(f"{name} {value}" for name, value in zip(known, told))))
    else:
        rows.append(("last line", "missing", "metrics.jsonl is empty: the run ended before its first line"))
    if run.probe:
        rows.append(("last probe", "", f"step {run.probe[-1]['step']}, {probe_in_words(run.probe[-1])}"))
        rows += [("its patches", "", text) for text in [dense_in_words(run.probe[-1])] if text]
    rows.append(("weights", "", which_steps(run.folder)))
    last_line = log.splitlines()[-1] if "Traceback (most recent call last)" in log else ""
    if last_line[:1].isalpha():  # nothing was logged after it
        rows.append(("failure", "problem", f"{last_line} (traceback in {run.folder / 'train.log'})"))
    return rows


def _state(run: Run) -> tuple[str, str]:
    """Mark and text: how the run stands, and how to go on."""
    from dinoreg.checkpoint.run_folder import MARKS, RunState

    state = RunState(run)
    whole, saved = state.num_steps or "?", f"saved at {state.saved}" if state.saved else "nothing saved"
    if state.phase == "finished":
        return "ok", f"finished: {state.saved} of {whole} steps"
    where = f"step {state.reached} of {whole}, {saved}"
    if state.phase == "running":
        return "running", f"{where} ({state.reason})"
    unsure = ", if it has ended" if state.phase == "unseen" else ""
    resume = f"resume with dinoreg pretrain {run.folder} resume=true{unsure}"
    return MARKS[state.phase], f"{state.in_words} at {where}: {resume}"


def _checkpoint_rows(run: Path) -> list[Row]:
    from dinoreg.checkpoint.format import read_pointer, verify

    folder = run / "checkpoints"
    rows = []
    pointed = {name: read_pointer(folder, name) for name in ("last", "best")}
    for path in sorted(folder.glob("step_*")):
        roles = ", ".join(name for name, target in pointed.items() if target == path.name)
        role = f" ({roles})" if roles else ""
        has_teacher = (run / "teacher" / f"{path.name}.safetensors").is_file()
        try:
            verify(path)
        except RunError as error:
            rows.append((path.name, "problem", f"{error}{role}; resuming uses the one before it"))
        else:
            without = ("missing", f"whole{role}; its teacher file is missing")
            rows.append((path.name, *(("ok", f"whole{role}") if has_teacher else without)))
    for name, target in pointed.items():
        if target is not None and not (folder / target).is_dir():
            rows.append((name, "problem", f"points to {target}, which is not there"))
    return rows or [("none", "missing", "nothing was saved yet; resuming starts at step 0")]


def _health_rows(run: Run) -> list[Row]:
    names = [str(event.get("name", "event")) for event in run.events]
    rows = []
    for name, event in dict(zip(names, run.events)).items():
        times = f" ({names.count(name)} times)" if names.count(name) > 1 else ""
        text = ". ".join(str(event[key]) for key in ("message", "remedy") if event.get(key))
        rows.append((name, "problem", f"step {event.get('step', '?')}{times}: {text}"))
    if rejected := read_json_lines(run.folder / "health" / "nonfinite.jsonl"):
        steps = ", ".join(str(line.get("step")) for line in rejected[-5:])
        rows.append(("non-finite steps", "problem", f"{len(rejected)} were left out, the last at {steps}"))
    return rows or [("events", "ok", "none")]


def _image_rows(run: Run) -> list[Row]:
    if not run.skipped:
        return [("unreadable", "ok", "none met")]
    first = [("", "", f"{line.get('name')}: {line.get('reason')}") for line in run.skipped[:5]]
    listing = run.folder / "skipped.jsonl"
    return [("unreadable", "problem", f"{len(run.skipped)} skipped, listed in {listing}"), *first]
