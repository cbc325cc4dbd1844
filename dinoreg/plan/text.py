"""A plan on one screen."""

from collections.abc import Iterable

from dinoreg.plan.devices import CONTEXT_GIB, FRAGMENTATION, GIB, LINK_SHARE, NCCL_GIB
from dinoreg.plan.recorder import PARTS
from dinoreg.plan.result import Plan

Row = tuple[str, str, str]  # name, figure, words


def show(plan: Plan) -> None:
    """Print a plan."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    console.print(_headline(plan), style="bold")
    for title, rows in _sections(plan):
        console.print(f"\n[bold]{title}[/bold]")
        names = max(len(name) for name, _, _ in rows)
        figures = max(len(figure) for _, figure, _ in rows)
        for name, figure, words in rows:
            style = "bold" if name in ("needed", "in all") else ""
            console.print(f"  {name:<{names}}  {figure:>{figures}}  {words}".rstrip(), style=style, markup=False)
    if plan.notes:
        console.print()
    for note in plan.notes:
        console.print(f"  {note}", style="yellow", markup=False)
    console.print()
    console.print(_verdict(plan), style="green" if plan.fits else "bold red", markup=False)
    for remedy in plan.advice:
        text = f"  {remedy}   {gib(remedy.memory.needed)}, {_slower(remedy.slower)}"
        if "batch_size" in remedy.overrides:
            text += f", a global batch of {remedy.overrides['batch_size'] * plan.job.world_size}"
        console.print(text, markup=False)


def _headline(plan: Plan) -> str:
    job = plan.job
    where = job.device.name if job.world_size == 1 else f"{job.nodes} x {job.gpus} {job.device.name}, {_strategy(plan)}"
    parts = f" in {job.config.optim.accumulate} parts" if job.config.optim.accumulate > 1 else ""
    batch = f"{job.config.batch_size} images a process{parts}"
    if job.world_size > 1:
        batch += f", {job.global_batch_size} in all"
    return f"{job.config.model.name} on {where}, {job.precision}, {batch}"


def _strategy(plan: Plan) -> str:
    job = plan.job
    if job.strategy != "fsdp":
        return job.strategy
    again = ", weights gathered twice" if job.config.parallel.reshard else ""
    return f"fsdp ({job.copies} copies of {job.shard_size} shards{again})" if job.copies > 1 else f"fsdp{again}"


def _sections(plan: Plan) -> Iterable[tuple[str, list[Row]]]:
    yield "networks", _networks(plan)
    yield f"memory of a device at its peak ({plan.memory.peak.name})", _memory(plan)
    yield "speed", _speed(plan)
    if plan.exchanges:
        yield "sent by one process in a step", _exchanges(plan)
    yield "run", _run(plan)


def _networks(plan: Plan) -> list[Row]:
    sizes, operations, crops = plan.job.sizes, plan.operations, plan.job.config.crops
    heads = sum(head.unit.parameters for head in sizes.heads.values())
    tokens = [f"{sizes.tokens(crops.global_size)} (global crop)"]
    if crops.num_local:
        tokens.append(f"{sizes.tokens(crops.local_size)} (local crop)")
    parts = [
        f"{name} {getattr(operations, name) / 1e9:.4g}"
        for name in ("student", "teacher", "heads", "again")
        if getattr(operations, name)
    ]
    counts = f"backbone {_millions(sizes.backbone)}, heads {_millions(heads)}; the teacher has as many"
    return [
        ("parameters", _millions(sizes.student), counts),
        ("tokens", "", ", ".join(tokens)),
        ("an image", f"{operations.total / 1e9:.4g} GFLOP", ", ".join(parts)),
        ("", "", f"attention {_share(operations.attention / operations.total)}"),
        ("a step", f"{plan.operations_per_step / 1e12:.4g} TFLOP", ""),
    ]


def _memory(plan: Plan) -> list[Row]:
    memory, config = plan.memory, plan.job.config
    peak = memory.peak
    most_gradients = max(moment.parts.get("gradients", 0) for moment in memory.moments)
    words = {
        "logits and targets": f"{', '.join(str(head.prototypes) for head in plan.job.sizes.heads.values())} prototypes",
        "weights in low precision": "copies that the backward pass needs",
        "gathered weights": f"in {config.parallel.param_dtype}",
    }
    if most_gradients > peak.parts.get("gradients", 0):
        words["gradients"] = f"at most {gib(most_gradients)}, when activations have gone"
    if config.optim.accumulate > 1:
        words["activations of the backbone"] = f"of one of {config.optim.accumulate} micro-batches"
    if config.model.checkpointing:
        words["activations of the backbone"] = "the blocks' inputs; the rest is computed again"
    rows = [
        (part, gib(peak.parts.get(part, 0)), words.get(part, ""))
        for part in PARTS
        if peak.parts.get(part, 0) or (part == "gradients" and most_gradients)
    ]
    if memory.context:
        several = f", {NCCL_GIB} GiB NCCL" if plan.job.world_size > 1 else ""
        share = f"assumed: {CONTEXT_GIB} GiB CUDA{several}, {FRAGMENTATION:.1%} of what comes and goes"
        rows.append(("context, fragments", gib(memory.context + memory.fragments), share))
    available = f"of {gib(memory.available)}" if memory.available else ""
    return [*rows, ("needed", gib(memory.needed), available)]


def _speed(plan: Plan) -> list[Row]:
    rows: list[Row] = []
    if plan.speed is None:
        return [("computing", "unknown", "nothing is known of this device's speed; give probe=true, or gpu= by name")]
    assert plan.computing is not None
    assert plan.step_seconds is not None
    rows.append(("one process", f"{_number(plan.speed.images_per_second)} img/s", plan.speed.source))
    rows.append(("a step computes", _seconds(plan.computing), ""))
    if plan.exchanges:
        device = plan.job.device
        links = f"{device.local_link:g} GB/s in a machine, {device.link:g} between, of which {LINK_SHARE:.0%}"
        rows.append(("and communicates", _seconds(plan.communicating), f"at {links}"))
        beside = f"{_seconds(plan.hidden)} of that beside the computing"
        rows.append(("together", _seconds(plan.step_seconds), beside))
    assert plan.images_per_second is not None
    assert plan.cores is not None
    cores = f"{plan.cores:.2g} CPU cores a process keep up (JPEG of 500 x 375)"
    rows.append(("in all", f"{_number(plan.images_per_second)} img/s", cores))
    return rows


def _exchanges(plan: Plan) -> list[Row]:
    rows = []
    for each in plan.exchanges:
        among = f"among {each.ranks}" + (f", {each.local} of them on a machine" if 1 < each.local < each.ranks else "")
        words = f"{_seconds(each.seconds(plan.job.device))} {among}"
        rows.append((each.name, size(each.sent), words))
    return [*rows, ("in all", size(plan.sent), "")]


def _run(plan: Plan) -> list[Row]:
    seen = f"{_number(plan.images_seen)} images"
    if plan.epochs is not None:
        seen += f", {plan.epochs:.3g} epochs of {plan.num_images}"
    wall = "unknown" if plan.wall_seconds is None else duration(plan.wall_seconds)
    estimate = "" if plan.speed is None or plan.speed.measured else ", an estimate"
    checkpoint = plan.checkpoint
    written = f"every {checkpoint.every} steps, {checkpoint.kept} kept; {_seconds(checkpoint.seconds)} to write; "
    return [
        ("steps", f"{plan.num_steps}", seen),
        ("time", wall, f"without probes and waiting for data{estimate}"),
        ("checkpoint", size(checkpoint.size), f"{written}teacher file {size(checkpoint.teacher)}"),
        ("CPU memory", size(plan.memory.host + checkpoint.copy), "a process: crops in advance, copy of the state"),
    ]


def _verdict(plan: Plan) -> str:
    memory = plan.memory
    if plan.fits:
        free = f", {gib(memory.available - memory.needed)} to spare" if memory.available else ""
        return f"It fits{free}."
    over = gib(memory.needed - memory.available)
    return f"It does not fit: {over} too much. It does with:"


# ---------------------------------------------------------------- numbers


def gib(count: float) -> str:
    """Memory, in powers of two."""
    return f"{count / GIB:.2f} GiB" if abs(count) >= GIB / 10 or not count else f"{count / 2**20:.1f} MiB"


def size(count: float) -> str:
    """Bytes as traffic and files are quoted, in powers of ten."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """1.9 days, 14.2 h, 12 min, 31 s."""
    for unit, scale in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= scale * (1 if unit == "min" else 2):
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds:.3g} s"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count / 1e3:.1f} k"


def _share(value: float) -> str:
    return f"{value:.0%}"


def _slower(share: float) -> str:
    return f"{abs(share):.0%} {'slower' if share >= 0 else 'quicker'}" if abs(share) >= 0.005 else "as quick"
