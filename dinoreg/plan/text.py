"""Printing a plan to the console, on one screen."""

import re

from dinoreg.plan import devices
from dinoreg.plan.devices import gib
from dinoreg.plan.recorder import PARTS
from dinoreg.plan.result import Plan
from dinoreg.runtime.durations import about
from dinoreg.runtime.templates import render
from dinoreg.train.class_probe import BATCH_SIZE as PROBE_BATCH
from dinoreg.train.outlook import rounded

ALLOWANCES = ("CONTEXT_GIB", "NCCL_GIB", "FREE_SHARE", "LINK_SHARE")


def show(plan: Plan) -> None:
    """Print a plan to the console: memory, speed, traffic, time, notes, and changes with which it fits."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    headline, *sections = re.split(r"\n{2,}", _text(plan))
    console.print(headline, style="bold")
    for section in sections:
        title, *lines = section.splitlines()
        rows = [[cell.strip() for cell in line.split("|")] for line in lines]
        names, figures = (max(len(row[column]) for row in rows) for column in (0, 1))
        console.print(f"\n[bold]{title}[/bold]")
        for name, figure, words in rows:
            style = "bold" if name in ("needed", "in all") else ""
            console.print(f"  {name:<{names}}  {figure:>{figures}}  {words}".rstrip(), style=style, markup=False)
    if plan.notes:
        console.print()
    for note in plan.notes:
        console.print(f"  {note}", style="yellow", markup=False)
    console.print()
    style = "bold red" if not plan.fits else "yellow" if plan.outlook.doubts() else "green"
    console.print(plan.verdict, style=style, markup=False, soft_wrap=not console.is_terminal)
    for remedy in plan.advice:
        text = f"  {remedy}   {gib(remedy.memory.needed)}, {_slower(remedy.slower)}"
        if "batch_size" in remedy.overrides:
            text += f", a global batch of {remedy.overrides['batch_size'] * plan.job.world_size}"
        console.print(text, markup=False)


def _text(plan: Plan) -> str:
    """The headline and the sections, with a blank line between."""
    held = plan.memory.moments[plan.memory.peak]
    most_gradients = max(parts.get("gradients", 0) for parts in plan.memory.moments.values())
    kinds = {name: getattr(plan.operations, name) for name in ("student", "teacher", "heads", "again", "tutor")}
    tutor = plan.job.sizes.tutor
    text = render(
        "plan/templates/plan.txt.j2",
        plan=plan,
        shares=[f"{name} {count / 1e9:.4g}" for name, count in kinds.items() if count],
        tutor_parameters=sum(p.numel() for p in tutor.network.parameters()) if tutor else 0,
        prototypes=plan.job.sizes.prototypes.values(),
        held={part: held.get(part, 0) for part in PARTS if part in held or (part == "gradients" and most_gradients)},
        most_gradients=most_gradients,
        PROBE_BATCH=PROBE_BATCH,
        **{name: getattr(devices, name) for name in ALLOWANCES},
        **{each.__name__: each for each in (gib, size, about, moment, number, millions, rounded)},
    )
    return text.strip()


# ---------------------------------------------------------------- numbers


def size(count: float) -> str:
    """Bytes of traffic or files in GB, MB, kB or B (powers of ten)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def moment(seconds: float) -> str:
    """A short duration in s or ms: 1.23 s, 45.6 ms."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def number(value: float) -> str:
    """A number with thousands separators, or with three digits below 100: 12,345 or 1.23."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def millions(count: int) -> str:
    """A count in millions or thousands: 1.2 M, 34.5 k."""
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count / 1e3:.1f} k"


def _slower(share: float) -> str:
    return f"{abs(share):.0%} {'slower' if share >= 0 else 'quicker'}" if abs(share) >= 0.005 else "as quick"
