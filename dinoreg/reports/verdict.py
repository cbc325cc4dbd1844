"""What the probe and the health monitor say about a run, in words: helps, no benefit, harms, not measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dinoreg.checkpoint.run_folder import Probe, Run
from dinoreg.checkpoint.steps import against_start, next_steps, probe_in_words
from dinoreg.runtime.json_files import flatten, is_number
from dinoreg.runtime.templates import score

SPOKEN = {"random init": "the untrained network"}  # names of baselines, as said in a sentence

HEADLINES = {
    "good": "Pretraining helps: better than {}, with the intervals apart.",
    "warn": "No benefit shown over {}: the intervals overlap.",
    "bad": "Pretraining does harm here: {} did better.",
    "plain": "No baseline was measured.",
}


@dataclass(frozen=True)
class Verdict:
    """A judgement in words.

    tone       "good", "bad", "warn" or "plain"
    headline   one sentence
    sentences  further ones
    """

    tone: str
    headline: str
    sentences: tuple[str, ...] = ()

    @property
    def short(self) -> str:
        """The verdict in a word or two, for a cell of a table; a dash for "plain"."""
        return {"good": "helps", "bad": "harms", "warn": "no benefit"}.get(self.tone, "\u2013")


def verdict(run: Run) -> Verdict:
    """A run's verdict by the first that exists of: probe against baselines, probe alone, in-run probe, progress."""
    probes = run.newest_probes()
    judged = [judge(probe) for probe in probes]
    compared = [each for each, probe in zip(judged, probes) if probe.baselines]
    if compared:
        order = ("bad", "warn", "good")
        first = min(compared, key=lambda each: order.index(each.tone))
        others = [each for each in judged if each is not first]
        sentences = [*first.sentences, *(f"{each.headline} {' '.join(each.sentences)}" for each in others)]
        return Verdict(first.tone, first.headline, (*sentences, health(run)))
    if judged:
        sentences = [" ".join(each.sentences) for each in judged]
        headline = "Measured, but with no baseline to compare with."
        return Verdict("plain", headline, (*sentences, health(run)))
    commands = next_steps(run.folder, flatten(run.config).get("probe.data"))
    if probed := [line for line in run.probe if is_number(line.get("knn_top1"))]:
        return judge_inside(probed[-1], commands, health(run))
    if run.metrics:
        headline = "Nothing has been measured on the features yet."
        return Verdict("plain", headline, (progress(run), health(run), commands))
    return Verdict("plain", "The run has just begun: there are no metrics yet.", (progress(run),))


def judge_inside(line: Mapping[str, Any], *sentences: str) -> Verdict:
    """The probe inside a run against its start, by a line of probe.jsonl; `sentences` stand behind its figures."""
    against, low = against_start(line), line.get("knn_top1_low")
    tone = {"better": "good", "worse": "bad", "not": "warn"}.get(against.partition(" ")[0], "plain")
    words = against.partition(":")[0] if against else "measured, but not yet compared with the start"
    figures = [f"Step {line['step']:,}, {probe_in_words(line)}."]
    if is_number(low) and is_number(line.get("knn_top1_majority")) and low <= line["knn_top1_majority"]:
        figures.append("Always naming the most frequent class is as good, as far as these images can tell.")
    return Verdict(tone, f"The probe inside the run: {words}.", (*figures, *sentences))


def judge(probe: Probe) -> Verdict:
    """One probe against its baselines, by 95 % intervals.

    returns  tone "bad" where a baseline is better with the intervals apart, else "warn" where intervals overlap, "good"
             where the probe is better than all with the intervals apart, "plain" without baselines
    """
    sign = 1.0 if probe.details.get("higher_is_better", True) else -1.0
    own = sorted((sign * probe.low, sign * probe.high))
    names: dict[str, list[str]] = {"bad": [], "warn": [], "good": []}  # of the baselines, the worst tone first
    figures = []
    for name, (value, low, high) in probe.baselines.items():
        spoken, other = SPOKEN.get(name, name), sorted((sign * low, sign * high))
        names["good" if own[0] > other[1] else "bad" if own[1] < other[0] else "warn"].append(spoken)
        low_and_high = f"({score(low, probe.unit)} to {score(high, probe.unit)})"
        figures.append(f"{spoken} {score(value, probe.unit)} {low_and_high}")
    what = f"{probe.details.get('probe', 'probe')} on {probe.dataset}"
    sentence = (
        f"{what[:1].upper()}{what[1:]}: {score(probe.value, probe.unit)} {probe.metric} "
        f"(95 % interval {score(probe.low, probe.unit)} to {score(probe.high, probe.unit)})"
    )
    sentence += f", against {', '.join(figures)}." if figures else "."
    tone = next((tone for tone, those in names.items() if those), "plain")
    return Verdict(tone, HEADLINES[tone].format(_and(names.get(tone, []))), (sentence,))


def health(run: Run) -> str:
    """The problems that the health monitor found, in a sentence."""
    names = list(dict.fromkeys(str(event.get("name", "unnamed")) for event in run.events))
    if not names:
        return "The health monitor found nothing wrong."
    return f"The health monitor named {len(names)} problem{'s' * (len(names) > 1)}: {', '.join(names)}."


def progress(run: Run) -> str:
    """How far the run is, in a sentence."""
    total = f" of {run.num_steps:,}" if run.num_steps else ""
    return f"The run is at step {run.step:,}{total}."


def _and(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), *names[-1:]] if len(names) > 1 else names)
