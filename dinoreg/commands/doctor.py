"""`dinoreg doctor`: what this machine has, what is missing for what, and what happened to a run.

Nothing here needs a working PyTorch: an installation that cannot be imported is what one asks a doctor about.
"""

import importlib
from pathlib import Path
from typing import Any

from dinoreg.runtime.dependencies import DEPENDENCIES, find, install
from dinoreg.runtime.environment import environment, version
from dinoreg.runtime.errors import RunError
from dinoreg.runtime.json_files import read_json, read_json_lines, read_text

# Importing one of these takes seconds: that it is installed has to do.
SLOW_IMPORTS = ("timm", "transformers")


def doctor(run: Path | None = None) -> None:
    """Print the state of the machine, or of one run folder."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    for title, rows in examine_run(run) if run is not None else examine_machine():
        console.print(f"[bold]{title}[/bold]")
        width = max((len(name) for name, _, _ in rows), default=0)
        for name, mark, text in rows:
            style = {"ok": "green", "missing": "yellow", "problem": "bold red"}.get(mark, "")
            console.print(f"  {name:<{width}}  ", end="")
            console.print(f"{mark:<7}" if mark else " " * 7, style=style, end="  ")
            console.print(text, markup=False)
        console.print()


# Each section: a title and rows of (name, "ok" | "missing" | "problem" | "", text).
Section = tuple[str, list[tuple[str, str, str]]]


# ------------------------------------------------------------------------------------------------------------
# The machine


def examine_machine() -> list[Section]:
    """What is here and what is missing for what."""
    found = environment()
    return [
        ("machine", _machine_rows(found)),
        ("packages", _package_rows(found)),
        ("optional packages", _optional_rows()),
        ("acceleration", _acceleration_rows(found)),
    ]


def _machine_rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    bf16 = {True: "with bf16", False: "without bf16 (precision=auto means fp32)", None: ""}[found["cpu_bf16"]]
    commit = f", commit {found['commit']}" if found["commit"] else ""
    rows = [
        ("dinoreg", "ok", f"{found['dinoreg']}{commit}"),
        ("python", "ok", f"{found['python']} ({found['executable']})"),
        ("system", "", found["platform"]),
        ("processor", "", f"{found['cpu']}, {found['cores']} usable cores {bf16}".rstrip()),
        ("memory", "", f"{found['memory_gib']} GiB"),
        ("free disk", "problem" if found["free_disk_gib"] < 1 else "", f"{found['free_disk_gib']} GiB here"),
    ]
    malloc = {name: value for name, value in found["variables"].items() if name.startswith(("MALLOC", "DINOREG"))}
    shown = ", ".join(f"{name}={value}" for name, value in malloc.items())
    rows.append(("allocator", "", shown or "freed memory is kept by runs on the CPU (DINOREG_MALLOC=0 turns it off)"))
    return rows


def _package_rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    for name, installed in found["packages"].items():
        if name == "xformers":
            rows.append((name, *_xformers(installed)))
        elif installed is None:
            rows.append((name, "problem", f"not installed: {install(name)}"))
        else:
            rows.append((name, *_imported(name, installed)))
    return rows


def _xformers(installed: str | None) -> tuple[str, str]:
    """Mark and text: whether its compiled part loads, and why not. Everything works without it."""
    if installed is None:
        return "missing", "attention then runs through PyTorch (same numbers)"
    try:
        from dinoreg.runtime.xformers_check import load_problem

        problem = load_problem()
    except Exception as error:  # no PyTorch either
        problem = _in_words(error)
    if problem is None:
        return "ok", f"{installed}, its kernels load"
    return "missing", f"{installed} does not load ({problem}): attention runs through PyTorch (same numbers)"


def _optional_rows() -> list[tuple[str, str, str]]:
    rows = []
    for row in DEPENDENCIES:
        if row.extra in ("core", "test"):
            continue
        installed = version(row.name)
        if installed is None:
            rows.append((row.name, "missing", f"for {row.purpose}: {install(row.name)}"))
        elif row.name in SLOW_IMPORTS:
            rows.append((row.name, "ok", f"{installed} (not tried: its import takes seconds), for {row.purpose}"))
        else:
            mark, text = _imported(row.name, installed)
            rows.append((row.name, mark, f"{text}, for {row.purpose}"))
    absent = [row.name for row in DEPENDENCIES if row.extra == "test" and version(row.name) is None]
    missing = f"{', '.join(absent)}: {install(absent[0])}" if absent else ""
    return [*rows, ("the tests", "missing" if absent else "ok", missing or "everything that they need")]


def _imported(name: str, installed: str) -> tuple[str, str]:
    """Mark and text for an installed package: whether it can be imported."""
    row = find(name)
    problem = import_problem(row.imported if row is not None else name)
    return ("problem", f"{installed}: {problem}") if problem else ("ok", installed)


def _acceleration_rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = [
        (
            f"cuda:{index}",
            "ok",
            f"{device['name']}, {device['memory_gib']} GiB, compute capability {device['capability']}, "
            + ("bf16" if device["bf16"] else "no bf16 (precision=auto means fp16)"),
        )
        for index, device in enumerate(found["cuda"])
    ]
    if not rows:
        rows.append(("cuda", "missing", "no CUDA device: runs use the CPU (everything works, slowly)"))
    attention = found["attention"]
    if attention is None:
        rows.append(("attention", "", "runs through PyTorch; xformers' kernels need CUDA"))
    elif attention["reason"] is None:
        rows.append(("attention", "ok", f"runs through {attention['backend']}: tried, forward and backward"))
    else:
        why = f"xformers does not run here: {attention['reason']}"
        rows.append(("attention", "missing", f"runs through {attention['backend']} (same numbers); {why}"))
    return rows


def import_problem(package: str) -> str | None:
    """Why a package cannot be imported, with the remedy, or None if it can."""
    try:
        importlib.import_module(package)
    except Exception as error:
        return explain(error) or f"cannot be imported ({_in_words(error)})"
    return None


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def explain(error: BaseException) -> str | None:
    """A known failure of an installation in one line with its remedy, or None for an unknown one."""
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
    return None


# ------------------------------------------------------------------------------------------------------------
# A run


def examine_run(run: Path) -> list[Section]:
    """How far a run got, whether its checkpoints are whole, and what went wrong on the way."""
    return [
        (f"run {run}", _progress_rows(run)),
        ("checkpoints", _checkpoint_rows(run)),
        ("health", _health_rows(run)),
        ("images", _image_rows(run)),
    ]


def _progress_rows(run: Path) -> list[tuple[str, str, str]]:
    metrics = read_json_lines(run / "metrics.jsonl")
    last = metrics[-1] if metrics else {}
    status = read_json(run / "status.json")
    step, num_steps = status.get("step", last.get("step", 0)), status.get("num_steps", "?")
    rows = []
    if status.get("phase") == "finished":
        rows.append(("finished", "ok", f"{step} of {num_steps} steps"))
    else:
        rows.append(("finished", "missing", f"no: {step} of {num_steps} steps are saved"))
        rows.append(("go on", "", f"dinoreg pretrain {run} resume=true"))
    if last:
        names = ("step", "total_loss", "images_per_second", "data_time", "step_time")
        shown = ", ".join(f"{name} {_short(last[name])}" for name in names if name in last)
        rows.append(("last line", "", shown))
    else:
        rows.append(("last line", "missing", "metrics.jsonl is empty: the run ended before its first line"))
    probes = read_json_lines(run / "probe.jsonl")
    if probes:
        shown = ", ".join(f"{key} {_short(value)}" for key, value in probes[-1].items() if key != "probe_time")
        rows.append(("last probe", "", shown))
    failure = _last_traceback(run / "train.log")
    if failure:
        rows.append(("failure", "problem", f"{failure} (traceback in {run / 'train.log'})"))
    return rows


def _checkpoint_rows(run: Path) -> list[tuple[str, str, str]]:
    from dinoreg.checkpoint.format import read_pointer, verify

    folder = run / "checkpoints"
    rows = []
    pointed = {name: read_pointer(folder, name) for name in ("last", "best")}
    for path in sorted(folder.glob("step_*")):
        roles = [name for name, target in pointed.items() if target == path.name]
        role = f" ({', '.join(roles)})" if roles else ""
        teacher = run / "teacher" / f"{path.name}.safetensors"
        without = "" if teacher.is_file() else "; its teacher file is missing"
        try:
            verify(path)
        except RunError as error:
            rows.append((path.name, "problem", f"{error}{role}; resuming uses the one before it"))
        else:
            rows.append((path.name, "missing" if without else "ok", f"whole{role}{without}"))
    for name, target in pointed.items():
        if target is not None and not (folder / target).is_dir():
            rows.append((name, "problem", f"points to {target}, which is not there"))
    if not rows:
        rows.append(("none", "missing", "nothing was saved yet; resuming starts at step 0"))
    return rows


def _health_rows(run: Path) -> list[tuple[str, str, str]]:
    events = read_json_lines(run / "health" / "events.jsonl")
    latest: dict[str, dict[str, Any]] = {}
    counts: dict[str, int] = {}
    for event in events:
        name = str(event.get("name", "event"))
        latest[name] = event
        counts[name] = counts.get(name, 0) + 1
    rows = []
    for name, event in latest.items():
        times = f" ({counts[name]} times)" if counts[name] > 1 else ""
        said = ". ".join(str(event[key]) for key in ("message", "remedy") if event.get(key))
        rows.append((name, "problem", f"step {event.get('step', '?')}{times}: {said}"))
    rejected = read_json_lines(run / "health" / "nonfinite.jsonl")
    if rejected:
        steps = ", ".join(str(line.get("step")) for line in rejected[-5:])
        rows.append(("non-finite steps", "problem", f"{len(rejected)} were left out, the last at {steps}"))
    return rows or [("events", "ok", "none")]


def _image_rows(run: Path) -> list[tuple[str, str, str]]:
    skipped = read_json_lines(run / "skipped.jsonl")
    if not skipped:
        return [("unreadable", "ok", "none met")]
    rows = [("unreadable", "problem", f"{len(skipped)} skipped, listed in {run / 'skipped.jsonl'}")]
    rows += [("", "", f"{line.get('name')}: {line.get('reason')}") for line in skipped[:5]]
    return rows


def _last_traceback(path: Path) -> str | None:
    """The last line of the last traceback in a log, if nothing was logged after it."""
    lines = read_text(path).splitlines()
    starts = [index for index, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    return lines[-1] if starts and lines[-1][:1].isalpha() else None


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
