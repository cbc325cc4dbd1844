"""What evaluations and the health monitor say of a run, in words: better by how much, not shown, worse, not measured.

Every verdict is by the paired difference on the same test images, which a result states in "against"
(`evaluation.comparison`). Two intervals side by side decide nothing.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dinoreg.checkpoint.run_folder import Probe, Run
from dinoreg.checkpoint.steps import against_start, probe_in_words
from dinoreg.runtime.guide import after_training, next_commands
from dinoreg.runtime.json_files import flatten, is_number, number
from dinoreg.runtime.printable import enumerated
from dinoreg.runtime.templates import DASH, score

MAJORITY = "majority class"  # beside the baselines: the figure of always naming the largest class
SPOKEN = {"random init": "the untrained network", MAJORITY: "always naming the largest class"}  # in a sentence
TONES = {"worse": "bad", "not shown": "warn", "no difference": "warn", "better": "good"}  # the worst first


@dataclass(frozen=True)
class Verdict:
    """A judgement in words.

    tone       "good", "bad", "warn" or "plain"
    headline   one sentence
    sentences  further ones
    short      the verdict in a few words, for a cell of a table
    """

    tone: str
    headline: str
    sentences: tuple[str, ...] = ()
    short: str = DASH


def verdict(run: Run) -> Verdict:
    """A run's verdict by the first that exists of: probe against baselines, probe alone, in-run probe, progress."""
    judged = [judge(probe) for probe in run.newest_probes()]
    if judged:
        first = min(judged, key=lambda each: [*TONES.values(), "plain"].index(each.tone))
        others = [each for each in judged if each is not first]
        sentences = [*first.sentences, *(f"{each.headline} {' '.join(each.sentences)}" for each in others)]
        return Verdict(first.tone, first.headline, (*sentences, health(run)))
    values = after_training(run.folder, flatten(run.config))
    commands = f"Next: {'; '.join(next_commands('trained', values))}"
    if probed := [line for line in run.probe if is_number(line.get("knn_top1"))]:
        return judge_inside(probed[-1], commands, health(run))
    if run.metrics:
        headline = "Nothing has been measured on the features yet."
        return Verdict("plain", headline, (health(run), commands))
    return Verdict("plain", "The run has just begun: there are no metrics yet.")


def judge_inside(line: Mapping[str, Any], *sentences: str) -> Verdict:
    """The probe inside a run against its start, by a line of probe.jsonl; `sentences` stand behind its figures."""
    against, low = against_start(line), line.get("knn_top1_low")
    tone = {"better": "good", "worse": "bad", "not": "warn"}.get(against.partition(" ")[0], "plain")
    words = against.partition(":")[0] if against else "measured, but not yet compared with the start"
    figures = [f"Step {line['step']:,}, {probe_in_words(line)}."]
    if is_number(low) and is_number(line.get("knn_top1_majority")) and low <= line["knn_top1_majority"]:
        figures.append(f"Not shown to be better than {SPOKEN[MAJORITY]}.")
    return Verdict(tone, f"The probe inside the run: {words}.", (*figures, *sentences))


def judge(probe: Probe) -> Verdict:
    """One result against its baselines and against always naming the largest class, by its paired differences.

    returns  tone "bad" where one of them is better, else "warn" where a gain over one is not shown, "good" where the
             result is better than each, "plain" where nothing was compared; the largest class is spoken of first
    """
    details, unit = probe.details, probe.unit
    against = {name: found for name, found in differences(details).items() if found["verdict"] in TONES}
    sentences, count = (_figures(probe),), details.get("n_test")
    majority, unmeasured = against.pop(MAJORITY, None), "No baseline was measured."
    if majority is not None:
        level = f"{SPOKEN[MAJORITY]} ({score(number(details.get('majority')), unit)})"
        told, gain = in_words(majority, unit, count), number(majority["difference"]) > 0
        if majority["verdict"] != "better":
            tone = "bad" if "worse" in (each["verdict"] for each in (majority, *against.values())) else "warn"
            headline = f"{_capital(told)}: a gain over {level}." if gain else f"Not better than {level}: {told}."
            return Verdict(tone, headline, sentences, f"not {'shown to be ' * gain}better than the largest class")
        unmeasured = f"{_capital(told)} than {level}. {unmeasured}"
    if not against:
        later = "Not compared with its baselines: evaluate again."
        return Verdict("plain", later if probe.baselines else unmeasured, sentences)
    said = next(said for said in TONES if any(found["verdict"] == said for found in against.values()))
    names = [name for name, found in against.items() if found["verdict"] == said]
    words = [in_words(against[name], unit, count) for name in names]
    spoken, do = enumerated([SPOKEN.get(name, name) for name in names]), "do" if names[-1].endswith("s") else "does"
    if said == "better":
        gains = enumerated([f"{gain} than {SPOKEN.get(name, name)}" for name, gain in zip(names, words)])
        headline, short = f"Pretraining helps: {gains}.", said
    elif said == "worse":
        headline = f"{_capital(spoken)} {do} better here: the result is {enumerated(words)}."
        short = f"{enumerated(names)} {do} better"
    else:
        what = f"no difference to {spoken}" if said == "no difference" else f"{words[0]}: a gain over {spoken}"
        headline, short = f"{_capital(what)}.", words[0]
    return Verdict(TONES[said], headline, sentences, short)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def differences(details: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The comparisons of a row or result, {with what: one of `comparison.compare`}; broken ones are left out."""
    against = details.get("against")
    found = against.items() if isinstance(against, dict) else ()
    return {str(name): each for name, each in found if isinstance(each, dict) and _is_whole(each)}


def _is_whole(found: dict[str, Any]) -> bool:
    ends = all(is_number(found.get(key)) for key in ("low", "high"))
    return isinstance(found.get("verdict"), str) and (ends or found["verdict"] not in TONES)


def in_words(found: Mapping[str, Any], unit: str, count: Any) -> str:
    """A comparison: "better by 13.6 points [5.8, 22.3]", "not shown with 103 images", "no difference", "not compared".

    found  one of `differences`
    unit   of the difference, as for `score`; a share is told in points
    count  of test images
    """
    said = str(found["verdict"])
    if said == "not shown":
        return f"{said} with {count:,} images" if is_number(count) else said
    if said not in ("better", "worse"):
        return said
    low, high = sorted(abs(found[key]) for key in ("low", "high"))
    value = abs(found["difference"])
    if unit == "share":
        return f"{said} by {100 * value:.1f} points [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{said} by {value:.3g} {unit} [{low:.3g}, {high:.3g}]"


PAIRED = ("dataset", "measure", "weights", "on the same images", "against")


def paired_rows(paired: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Weights against others on the same test images (`comparison.between`), as rows of text under PAIRED."""
    rows = []
    for each in paired:
        pairs = zip((each["model"], each["other"]), each["values"])
        ours, theirs = (f"{name} {score(value, each['unit'])}" for name, value in pairs)
        measure, said = f"{each['protocol']}, {each['metric']}", in_words(each, each["unit"], each["n_test"])
        rows.append([str(each["dataset"]), measure, ours, said, theirs])
    return rows


def in_cell(found: Mapping[str, Any], unit: str, count: Any) -> str:
    """`in_words` on short lines."""
    return re.sub(r" \S+ \[", "\n[", in_words(found, unit, count)).replace(" with ", " with\n")


def balanced(row: Mapping[str, Any]) -> str:
    """The balanced accuracy, the mean over classes, of a row whose figure is top-1; "" for any other."""
    value = flatten(row).get("details.micro and macro.mean per class")
    return score(number(value)) if is_number(value) and row.get("metric") == "top-1" else ""


def _figures(probe: Probe) -> str:
    """A result's figure and those beside it, in a sentence."""
    details, unit = probe.details, probe.unit
    what = f"{details.get('probe', 'probe')} on {probe.dataset}"
    beside = [f"{SPOKEN.get(name, name)} {score(value, unit)}" for name, (value, *_) in probe.baselines.items()]
    levels = {"the largest class": details.get("majority"), "chance": details.get("chance")}
    beside += [f"{name} {score(number(value), unit)}" for name, value in levels.items() if is_number(value)]
    low, high = (score(each, unit) for each in (probe.low, probe.high))
    rows = details.get("rows")
    even = balanced(rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], dict) else details)
    more = f"; balanced {even}" if even else ""
    text = f"{_capital(what)}: {score(probe.value, unit)} {probe.metric} (95 % interval {low} to {high}{more})"
    return f"{text}, against {', '.join(beside)}." if beside else f"{text}."


def health(run: Run) -> str:
    """The problems that the health monitor found, in a sentence."""
    names = list(dict.fromkeys(str(event.get("name", "unnamed")) for event in run.events))
    if not names:
        return "The health monitor found nothing wrong."
    return f"The health monitor named {len(names)} problem{'s' * (len(names) > 1)}: {', '.join(names)}."
