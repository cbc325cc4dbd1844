"""What is said of a run's steps: which one weights are of, and how good the probe inside the run found them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinoreg.checkpoint.run_folder import by_step
from dinoreg.runtime.json_files import is_number, number, pointed_step, read_json, read_json_lines
from dinoreg.runtime.templates import with_interval

PROBED = "probe.json"  # on which images the probe inside the run compares its steps
ACCURACIES = ("knn_top1", "general_knn_top1")
DENSE = ("dense_miou", "dse")  # of patches: with masks, and without


def role_of(run: Path, step: int, total: int | None = None) -> str:
    """A step among those of its run: "step 40 of 200 (best by the probe, not the last)".

    total  steps of the run, where status.json does not say it
    """
    total = read_json(run / "status.json").get("num_steps", total)
    best, last = (pointed_step(run, name) for name in ("best", "last"))
    role = "the last" if step == last else "best by the probe, not the last" if step == best else ""
    return f"step {step:,}{f' of {total:,}' if is_number(total) else ''}{role and f' ({role})'}"


def which_steps(run: Path) -> str:
    """In a sentence: what `weights=RUN` and `weights=RUN/best` mean, with the figures of the probe inside the run."""
    probed = by_step(read_json_lines(run / "probe.jsonl"))
    last, best = pointed_step(run, "last"), pointed_step(run, "best")
    if last is None:
        return f"weights={run}: nothing was saved yet"
    if read_json(run / PROBED).get("metric") in DENSE:
        shown = {line["step"]: f", {dense_in_words(line)}" for line in probed}
    else:
        known = (line for line in probed if is_number(line.get("knn_top1")))
        shown = {line["step"]: f", k-NN {_interval(line, 'knn_top1')}" for line in known}
    text = f"weights={run} means step {last:,} (last{shown.get(last, '')})"
    if best is None:
        return f"{text}; no step is the best" + (": none was better than the start" if shown else "")
    same = "is the same" if best == last else f"step {best:,}{shown.get(best, '')}"
    return f"{text}; weights={run}/best {same}"


def probe_in_words(line: Mapping[str, Any]) -> str:
    """A line of probe.jsonl: "knn_top1: 16.0 % [11.2, 21.5] (step 0: 18.0, chance 14.3, majority 18.0), not better …".

    What the line does not have is left out.
    """
    parts = []
    for key in ACCURACIES:
        if is_number(line.get(key)):
            beside = {f"step {line.get('start_step')}:": line.get(f"{key}_start")}
            beside |= {name: line.get(f"{key}_{name}") for name in ("chance", "majority")}
            shown = ", ".join(f"{name} {100 * number(share):.1f}" for name, share in beside.items() if is_number(share))
            against = against_start(line) if key == "knn_top1" else ""
            parts.append(f"{key}: {_interval(line, key)}{shown and f' ({shown})'}{against and f', {against}'}")
    ranks = [key for key in ("rankme", "general_rankme") if is_number(line.get(key))]
    return "  ".join([*parts, *(f"{key}: {line[key]:.4g}" for key in ranks)])


def dense_in_words(line: Mapping[str, Any]) -> str:
    """The patches in a line of probe.jsonl: "mIoU 31.2 % [28.0, 34.4] (step 0: 20.1)  DSE 1.234"."""
    known = [key for key in DENSE if is_number(line.get(key))]
    parts = {"dense_miou": f"mIoU {_interval(line, 'dense_miou')}", "dse": f"DSE {number(line.get('dse')):.3f}"}
    if known and is_number(line.get(f"{known[0]}_start")):
        start = number(line[f"{known[0]}_start"]) * (100 if known[0] == "dense_miou" else 1)
        parts[known[0]] += f" (step {line.get('start_step')}: {start:.3g})"
    return "  ".join(parts[key] for key in known)


def against_start(line: Mapping[str, Any]) -> str:
    """Whether a line of probe.jsonl is better than the start, by the paired interval in points; "" where not known."""
    gain, low, high = (line.get(f"knn_top1_gain{end}") for end in ("", "_low", "_high"))
    if not all(map(is_number, (gain, low, high))):
        return ""
    by_ends = "better" if number(low) > 0 else "worse" if number(high) < 0 else ""
    said = line.get("knn_top1_gain_verdict", by_ends)  # which lines of earlier versions do not have
    verdict = said if said in ("better", "worse") else "not better"
    so_far = " so far" if verdict == "not better" else ""
    points = [100 * number(each) for each in (gain, low, high)]
    return "{} than the start{}: {:+.1f} points [{:.1f}, {:.1f}]".format(verdict, so_far, *points)


@dataclass(frozen=True)
class Watched:
    """The labelled images that the probe inside a run looks at, see `PROBED`.

    data    where they are
    images  16 hexadecimal digits over the content of each
    chosen  whether the step at hand was chosen by its accuracy on them: it is the best, and not the last
    """

    data: str
    images: frozenset[str]
    chosen: bool


def watched_in(run: Path, step: int) -> Watched | None:
    """What the probe inside a run looks at, for weights of one of its steps; None where there are no labels."""
    content = read_json(run / PROBED)
    images = content.get("images")
    if not isinstance(images, list):
        return None
    best, last = (pointed_step(run, name) for name in ("best", "last"))
    chosen = step == best != last and content.get("metric") == "knn_top1"
    return Watched(str(content.get("data")), frozenset(map(str, images)), chosen)


def _interval(line: Mapping[str, Any], key: str) -> str:
    """ "18.0 % [12.9, 23.7]" of an accuracy in a line of probe.jsonl, without the interval where there is none."""
    return with_interval(*(number(line.get(f"{key}{end}")) for end in ("", "_low", "_high")))
