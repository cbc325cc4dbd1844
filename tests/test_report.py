"""The report of a run: complete when all is there, valid when almost nothing is, safe with any text."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image

from dinoreg.checkpoint.format import write_teacher
from dinoreg.checkpoint.run_folder import Run, logged_losses
from dinoreg.commands.report import compare_runs, report_run
from dinoreg.config.load import load_config, to_yaml
from dinoreg.models.vit import RegisterViT
from dinoreg.reports.evaluation_report import class_tables
from dinoreg.reports.html import Band, Line, run_charts
from dinoreg.reports.run_report import comparison, differences, run_names, write_report
from dinoreg.reports.verdict import verdict
from dinoreg.runtime.durations import duration
from dinoreg.runtime.templates import score

VOID = {"meta", "img", "input", "br"}


class Structure(HTMLParser):
    """Checks that tags close in order, and collects text, anchors and everything that would be loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.ids: set[str] = set()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        if "id" in values:
            self.ids.add(values["id"] or "")
        self.loads += [values[key] or "" for key in ("src", "srcset", "data", "poster") if key in values]
        if tag == "a":
            self.links.append(values.get("href") or "")
        elif "href" in values:
            self.loads.append(values["href"] or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data.replace("\u00a0", " "))  # which keeps a number with its unit


def parse(path: Path) -> Structure:
    content = path.read_text()
    structure = Structure()
    structure.feed(content)
    structure.close()
    assert structure.open == []
    assert all(load.startswith("data:") for load in structure.loads)
    for link in structure.links:  # to a section, or to the report of a run that is compared
        assert link[1:] in structure.ids if link.startswith("#") else (path.parent / unquote(link)).is_file()
    assert "script" not in structure.tags
    assert "url(" not in content
    assert "@import" not in content
    return structure


def row(value: float) -> dict[str, Any]:
    return {
        "metric": "accuracy",
        "value": value,
        "low": value - 0.02,
        "high": value + 0.02,
        "C": 0.1,
        "n_test": 900,
    }


def against(difference: float) -> dict[str, Any]:
    low, high = difference - 0.04, difference + 0.05
    said = "better" if low > 0 else "worse" if high < 0 else "not shown"
    return {"difference": difference, "low": low, "high": high, "verdict": said}


def write_run(folder: Path, value: float = 0.7, name: str = "vitt8_reg4", lr: float = 1e-3) -> Path:
    """A run folder with every piece a report can show."""
    for part in ("health", "eval/0000040", "view/0000040"):
        (folder / part).mkdir(parents=True)
    config = f"model:\n  name: {name}\ndata:\n  source: photos/cats\nsteps: 40\nbatch_size: 8\n"
    config += f"optim:\n  lr: {lr}\n"
    (folder / "config.yaml").write_text(config)
    (folder / "environment.json").write_text(json.dumps({"cpu": "Test CPU", "cores": 2, "cuda": []}))
    (folder / "status.json").write_text(
        json.dumps({"phase": "finished", "step": 40, "num_steps": 40, "num_images": 1000})
    )
    lines = [
        {
            **{
                "step": step,
                "images": 8 * step,
                "loss": 5 - step / 40,
                "total_loss": 4.0,
                "dino_global_crops_loss": 0.5,
            },
            **{
                "dino_local_crops_loss": 4.0,
                "ibot_loss": 2.0,
                "koleo_loss": 1.0,
                "lr": lr,
                "wd": 0.1,
                "mom": 0.99,
            },
            **{
                "teacher_temp": 0.05,
                "last_layer_lr": lr,
                "grad_norm_backbone": 1.5,
                "grad_norm_dino_head": 0.5,
            },
            **{
                "teacher_entropy": 3.0,
                "teacher_entropy_max": 4.8,
                "target_marginal_entropy": 4.5,
                "invented": 1.0,
            },
            **{"prototype_usage": 0.9, "feature_std": 0.8, "feature_rank": 20.0, "update_ratio": 1e-3},
            **{"step_time": 0.5, "data_time": 0.1, "images_per_second": 16.0, "max_memory": 2**30},
        }
        for step in range(2, 41, 2)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    probe = [{"step": step, "knn_top1": step / 100, "rankme": 10.0 + step} for step in (20, 40)]
    (folder / "probe.jsonl").write_text("".join(json.dumps(line) + "\n" for line in probe))
    event = {"step": 8, "name": "data-bound", "message": "slow disk", "remedy": "Raise data.workers."}
    (folder / "health/events.jsonl").write_text(json.dumps(event) + "\n")
    (folder / "skipped.jsonl").write_text(json.dumps({"name": "bad.jpg", "reason": "truncated"}) + "\n")
    record = {"dataset": "scenes", "probe": "logistic regression", "chance": 0.05, **row(value)}
    record["baselines"] = {"random init": row(0.4), "raw pixels": row(0.3)}
    record["against"] = {name: against(value - each["value"]) for name, each in record["baselines"].items()}
    (folder / "eval/0000040/scenes.json").write_text(json.dumps(record))
    for picture in ("pca", "attention", "crops"):
        noise = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"view/0000040/{picture}.png")
    return folder


def test_losses_are_logged_as_dinov2_logs_them() -> None:
    terms = {"dino_global_crops_loss": 0.7 * 0.5, "dino_local_crops_loss": 0.7 * 4.0}
    terms |= {"ibot_loss": 2 * 1.9 * 2.0, "koleo_loss": 2 * 1.0}
    found = logged_losses({**terms, "total_loss": sum(terms.values())}, 0.7, 1.9)
    assert found == pytest.approx(
        {"dino_global_crops_loss": 0.5, "dino_local_crops_loss": 4.0, "ibot_loss": 2.0, "koleo_loss": 1.0}
        | {"total_loss": 0.5 + 4.0 + 2.0 + 1.0, "loss": sum(terms.values())}
    )


def test_a_whole_run_gives_every_section_in_one_self_contained_file(tmp_path: Path) -> None:
    path = write_report(write_run(tmp_path / "a"))
    assert path == tmp_path / "a" / "report.html"
    structure = parse(path)
    sections = ("probe", "curve", "losses", "schedules", "health", "pca", "attention", "crops", "skipped")
    assert {*sections, "speed", "other", "config", "environment"} <= structure.ids
    text = " ".join(structure.text)
    for shown in (
        *(
            "Pretraining helps",
            "70.0 %",
            "68.0 % to 72.0 %",
            "random init",
            "40.0 %",
            "raw pixels",
            "chance, 5.0 %",
            "1,000 images, 0.3 passes",
            "1 skipped",
        ),
        *(
            "vitt8_reg4",
            "cats",
            "320",
            "20 s",
            "16 img/s",
            "2 CPU cores",
            "data-bound",
            "Raise data.workers.",
        ),
        *(
            "bad.jpg",
            "truncated",
            "Total loss",
            "Learning rate",
            "Weight decay",
            "Teacher momentum",
            "invented",
        ),
        *(
            "Teacher temperature",
            "Gradient norms",
            "Prototypes in use",
            "Accuracy of the probe",
            "batch_size: 8",
        ),
    ):
        assert shown in text, shown
    assert sum(load.startswith("data:image/svg+xml") for load in structure.loads) >= 2 * 15
    assert sum(load.startswith(("data:image/webp", "data:image/png")) for load in structure.loads) == 3


def test_an_empty_folder_gives_a_valid_report(tmp_path: Path) -> None:
    text = " ".join(parse(write_report(tmp_path)).text)
    assert "just begun" in text


@pytest.mark.parametrize(
    "name",
    ["config.yaml", "environment.json", "status.json", "metrics.jsonl", "probe.jsonl", "skipped.jsonl"],
)
@pytest.mark.parametrize("content", [None, "", "{cut sh", "[1, 2]\n", "null\n", '{"step": "x"}\n'])
def test_any_one_file_may_be_missing_or_broken(tmp_path: Path, name: str, content: str | None) -> None:
    run = write_run(tmp_path / "a")
    (run / name).unlink()
    if content is not None:
        (run / name).write_text(content)
    loaded = Run(run)
    assert verdict(loaded).tone == "good"
    assert loaded.events
    if content == "{cut sh":
        parse(write_report(run))


def test_broken_pictures_and_records_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    (run / "view/0000040/pca.png").write_bytes(b"not a picture")
    (run / "eval/0000040/cut.json").write_text('{"value": ')
    (run / "eval/0000040/odd.json").write_text('{"value": 0.5, "baselines": {"x": 3, "y": {"value": "nan"}}}')
    structure = parse(write_report(run))
    assert "pca" not in structure.ids
    assert "attention" in structure.ids
    assert [probe.baselines for probe in Run(run).probes if probe.dataset == "odd"] == [{}]


def test_text_from_files_cannot_become_markup(tmp_path: Path) -> None:
    attack = '"><script>alert(1)</script><img src=http://x/y onerror=z>'
    run = write_run(tmp_path / "<b>a", name=json.dumps(attack))
    (run / "skipped.jsonl").write_text(json.dumps({"name": attack, "reason": attack}) + "\n")
    event = {"step": attack, "name": attack, "message": attack, "remedy": attack}
    (run / "health/events.jsonl").write_text(json.dumps(event) + "\n")
    (run / "environment.json").write_text(json.dumps({attack: attack, "cpu": attack}))
    record = {**row(0.5), "dataset": attack, "metric": attack, "baselines": {attack: row(0.2)}}
    (run / "eval/0000040/attack.json").write_text(json.dumps(record))
    line = {"step": 41, attack: 1.0}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    structure = parse(write_report(run))
    assert structure.tags.count("script") == 0
    assert attack in " ".join(structure.text)
    compared = parse(compare_runs([run, write_run(tmp_path / "b")], tmp_path / "c.html"))
    assert compared.tags.count("script") == 0


@pytest.mark.parametrize(
    ("value", "tone", "words"),
    [
        (0.7, "good", "better by 30.0 points [26.0, 35.0] than the untrained network"),
        (0.42, "warn", "Not shown with 900 images"),
        (0.31, "bad", "worse by 9.0 points [4.0, 13.0]"),
    ],
)
def test_the_verdict_is_that_of_the_paired_differences(tmp_path: Path, value: float, tone: str, words: str) -> None:
    said = verdict(Run(write_run(tmp_path / "a", value)))
    assert said.tone == tone
    assert words in said.headline
    assert ("raw pixels" in said.headline) == (tone == "good")
    assert f"{100 * value:.1f} %" in said.sentences[0]
    assert "data-bound" in said.sentences[-1]


def changed(run: Path, **fields: Any) -> Run:
    path = run / "eval/0000040/scenes.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return Run(run)


def test_intervals_side_by_side_decide_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", value=0.41)  # its interval overlaps with that of 0.4
    pairs = {"difference": 0.01, "low": 0.004, "high": 0.016, "verdict": "better"}
    said = verdict(changed(run, against={"random init": pairs}))
    assert (said.tone, "1.0 points [0.4, 1.6]" in said.headline) == ("good", True)
    assert verdict(changed(run, value=0.9, low=0.89, high=0.91, against={})).tone == "plain"
    for broken in ([], {"random init": 3}, {"random init": {**pairs, "low": None}}, {"random init": {"verdict": []}}):
        assert verdict(changed(run, against=broken)).tone == "plain"


def test_where_lower_is_better_a_negative_difference_is_a_gain(tmp_path: Path) -> None:
    pairs = {"difference": -0.3, "low": -0.41, "high": -0.22, "verdict": "better"}
    run = changed(write_run(tmp_path / "a"), unit="m", higher_is_better=False, against={"raw pixels": pairs})
    assert "better by 0.3 m [0.22, 0.41] than raw pixels" in verdict(run).headline


def test_the_largest_class_is_spoken_of_first(tmp_path: Path) -> None:
    pairs = {"difference": -0.002, "low": -0.03, "high": 0.02, "verdict": "not shown"}
    better = against(0.4)
    run = changed(write_run(tmp_path / "a"), majority=0.887, against={"raw pixels": better, "majority class": pairs})
    assert verdict(run).headline.startswith("Not better than always naming the largest class (88.7 %)")
    said = verdict(changed(tmp_path / "a", against={"raw pixels": better, "majority class": better}))
    assert (said.tone, "largest" in said.headline) == ("good", False)
    alone = verdict(changed(tmp_path / "a", baselines={}, against={"majority class": better}))
    assert alone.tone == "plain"  # that pretraining helps is not said without a baseline
    assert "better by 40.0 points" in alone.headline.lower()
    worse = verdict(changed(tmp_path / "a", against={"raw pixels": against(-0.4), "majority class": pairs}))
    assert worse.tone == "bad"


def test_the_newest_step_speaks_for_the_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", value=0.3)
    (run / "eval/0000100").mkdir()
    newer = {
        "dataset": "scenes",
        **row(0.9),
        "baselines": {"raw pixels": row(0.3)},
        "against": {"raw pixels": against(0.6)},
    }
    (run / "eval/0000100/scenes.json").write_text(json.dumps(newer))
    loaded = Run(run)
    assert [probe.step for probe in loaded.probes] == [40, 100]
    assert loaded.newest_probes()[0].value == 0.9
    assert verdict(loaded).tone == "good"


@pytest.mark.parametrize(
    ("gain", "tone", "words"),
    [
        ((0.2, 0.1, 0.3), "good", "better than the start"),
        ((-0.02, -0.07, 0.03), "warn", "not better than the start so far"),
        ((-0.2, -0.3, -0.1), "bad", "worse than the start"),
        (None, "plain", "not yet compared"),
    ],
)
def test_without_an_evaluation_the_probe_inside_the_run_is_judged_by_its_start(
    gain: tuple[float, float, float] | None, tone: str, words: str, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "a")
    (run / "eval/0000040/scenes.json").unlink()
    line: dict[str, Any] = {"step": 40, "knn_top1": 0.16, "knn_top1_low": 0.11, "knn_top1_high": 0.21}
    line |= {"knn_top1_chance": 0.143, "knn_top1_majority": 0.18, "knn_top1_start": 0.17, "start_step": 0}
    if gain is not None:
        line |= {f"knn_top1_gain{end}": value for end, value in zip(("", "_low", "_high"), gain, strict=True)}
    (run / "probe.jsonl").write_text(json.dumps(line) + "\n")
    with (run / "config.yaml").open("a") as file:
        file.write("probe:\n  data: labelled\n")
    said = verdict(Run(run))
    assert (said.tone, words in said.headline) == (tone, True)
    assert "16.0 % [11.0, 21.0] (step 0: 17.0, chance 14.3, majority 18.0)" in said.sentences[0]
    assert "naming the largest class" in said.sentences[1]
    assert any(f"dinoreg verdict labelled weights={run}" in sentence for sentence in said.sentences)
    (accuracy, *_) = run_charts(Run(run))["probe"]
    assert sorted(accuracy.levels.values()) == [0.143, 0.18]
    assert not any("knn" in chart.title for chart in run_charts(Run(run))["other"])
    assert f"weights={run}: nothing was saved yet" in " ".join(parse(write_report(run)).text)


def test_values_that_are_not_finite_leave_a_gap_and_repeated_steps_count_once(tmp_path: Path) -> None:
    lines = [{"step": 1, "a": 1.0}, {"step": 2, "a": "nan"}, {"step": 3, "a": 5.0}, {"step": 3, "a": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "a"')
    assert Run(tmp_path).series("a") == ([1.0, 3.0], [1.0, 3.0])


def test_the_training_time_adds_up_the_steps_between_lines(tmp_path: Path) -> None:
    lines = [{"step": 10, "step_time": 0.5}, {"step": 30, "step_time": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    seconds = Run(tmp_path).seconds
    assert seconds is not None
    assert math.isclose(seconds, 10 * 0.5 + 20 * 2.0)
    assert [duration(each) for each in (45.0, 75, 7260, 180_000)] == [
        "45 s",
        "1 min 15 s",
        "2 h 1 min",
        "2 d 2 h",
    ]


def test_pictures_that_cannot_be_drawn_are_explained_in_the_report(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    (run / "teacher").mkdir()
    (run / "teacher/step_0000099.safetensors").write_bytes(b"torn")
    text = " ".join(parse(report_run(run)).text)
    assert "could not be drawn" in text
    assert "Attention of CLS and each register" in text  # those of the step before are still shown


def test_runs_are_compared_in_a_table_with_their_differences_and_curves(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", value=0.5, lr=5e-4)]
    path = compare_runs(runs, tmp_path / "deep" / "compare.html")
    structure = parse(path)
    text = " ".join(structure.text)
    for shown in (
        "2 runs compared",
        "70.0 % (68.0 % to 72.0 %)",
        "50.0 %",
        "optim.lr",
        "0.001",
        "0.0005",
        "Total loss",
    ):
        assert shown in text, shown
    loaded = [Run(run) for run in runs]
    assert differences(loaded) == {"optim.lr": ["0.001", "0.0005"]}
    columns, rows = comparison(loaded, ["a", "b"])
    assert rows[1][columns.index("scenes (95 %)")] == "50.0 % (48.0 % to 52.0 %)"


def test_runs_of_one_name_are_told_apart_by_their_path(tmp_path: Path) -> None:
    folders = [tmp_path / "x" / "run", tmp_path / "y" / "run"]
    for folder in folders:
        folder.mkdir(parents=True)
    assert run_names([Run(folder) for folder in folders]) == ["x/run", "y/run"]


def test_comparing_runs_that_have_nothing_yet_works(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    parse(compare_runs([tmp_path / "a", tmp_path / "b"], tmp_path))
    assert (tmp_path / "report.html").is_file()


def test_a_report_draws_the_pictures_of_the_newest_teacher_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = RegisterViT(image_size=32, patch_size=8, dim=12, depth=1, heads=3, num_registers=2)
    description = {
        "architecture": backbone.architecture(),
        "preprocessing": {"mean": [0.5] * 3, "std": [0.2] * 3, "image_size": 32},
        "config_hash": "0" * 12,
    }
    state = {f"backbone.{key}": value for key, value in backbone.state_dict().items()}
    write_teacher(tmp_path, 7, state, description)
    overrides = {"data": "scenes:count=9,size=32", "steps": 7, "batch_size": 4, "model.name": "vitt8_reg2"}
    overrides |= {"crops.global_size": 32, "crops.local_size": 16, "crops.num_local": 2}
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(None, overrides)))
    structure = parse(report_run(tmp_path))
    assert {"pca", "attention", "crops"} <= structure.ids
    files = sorted((tmp_path / "view" / "0000007").iterdir())
    assert [file.name for file in files] == ["attention.png", "crops.png", "pca.png"]
    before = [file.stat().st_mtime_ns for file in files]
    report_run(tmp_path)
    assert [file.stat().st_mtime_ns for file in files] == before


def test_tables_of_classes_are_whole_for_a_few_and_the_worst_of_many() -> None:
    few = [{"class": name, "n": 4, "recall": 0.5, "precision": "nan"} for name in "ab"]
    classes, confusion = class_tables({"details": {"classes": few, "confusion": [[2, 2], [2, 2]]}})
    assert classes.rows == [["a", "4", "50.0 %", "\u2013"], ["b", "4", "50.0 %", "\u2013"]]
    assert confusion.rows == [["a", "2", "2"], ["b", "2", "2"]]
    many = [{"class": f"c{place}", "n": 9, "recall": (place * 7 % 40) / 40, "precision": 0.1} for place in range(40)]
    worst, confused = class_tables({"details": {"classes": many, "confusions": [["c1", "c2", 5]]}})
    assert [row[2] for row in worst.rows] == [score(place / 40) for place in range(30)]
    assert confused.rows == [["c1", "c2", "5"]]
    (single,) = class_tables({"details": {"iou": {"sky": 0.75, "road": "nan"}}})
    assert single.rows == [["sky", "75.0 %"], ["road", "\u2013"]]
    for broken in ({}, {"details": []}, {"details": {"classes": [3]}}, {"details": {"iou": 4}}):
        assert class_tables(broken) == []


def test_a_band_counts_the_values_of_a_curve_that_lie_in_it_part_by_part() -> None:
    band = Band(np.array([0.0, 10.0, 20.0]), np.array([1.0, 3.0]), np.array([2.0, 4.0]))
    inside = Line("inside", [1, 10, 11, 20, 25], [1.5, 2.0, 3.0, 4.0, 3.5])
    outside = Line("outside", [1, 10, 11, 20], [2.5, 0.5, 2.0, 1.5])
    assert (band.share_within(inside), band.share_within(outside)) == (1.0, 0.0)
