"""`dinoreg verdict`: labels needed against a literal count, the advice for every outcome, a whole tiny comparison."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from small_runs import tiny_model, write_run
from torch.utils.flop_counter import FlopCounterMode

import dinoreg
from dinoreg.commands.main import main
from dinoreg.evaluation.backbones.encoder import wrap
from dinoreg.evaluation.comparison import curve, labels_needed, shares
from dinoreg.evaluation.result import Row
from dinoreg.models.vit import RegisterViT
from dinoreg.plan.encoder_cost import encoder_cost
from dinoreg.reports.labelled_verdict import GO_ON, LONGER, MORE, OWN, USE_PUBLIC, advise
from dinoreg.runtime.digest import digest
from dinoreg.runtime.errors import UserError


def point(labels: int, value: float, replicates: np.ndarray, protocol: str = "few-shot and label efficiency") -> Row:
    return Row(protocol, "top-1", value, 0.0, 1.0, n_train=labels, replicates=tuple(replicates.tolist()))


def test_labels_needed_are_those_of_a_search_along_the_curve_of_each_resample() -> None:
    rng = np.random.default_rng(0)
    counts, values = [20, 41, 80, 160], [0.3, 0.42, 0.4, 0.7]
    rows = [point(n, value, value + rng.normal(0, 0.08, 200)) for n, value in zip(counts, values, strict=True)]
    goal = point(160, 0.5, 0.5 + rng.normal(0, 0.1, 200))

    def literal(reached: list[float], wanted: float) -> float:
        best = -math.inf
        for place, accuracy in enumerate(reached):
            if accuracy >= wanted:
                if place == 0:
                    return counts[0]
                part = (wanted - best) / (accuracy - best)
                return counts[place - 1] ** (1 - part) * counts[place] ** part
            best = max(best, accuracy)
        return math.inf

    each = [literal([row.replicates[k] for row in rows], goal.replicates[k]) for k in range(200)]
    found = labels_needed(rows, goal)
    assert found["labels"] == pytest.approx(80 * 2 ** ((0.5 - 0.42) / (0.7 - 0.42)))
    assert (found["low"], found["high"]) == pytest.approx((sorted(each)[4], sorted(each)[194]))
    assert 20 in each
    assert math.inf in each


def test_what_is_never_reached_is_beyond_and_what_is_at_once_is_the_fewest() -> None:
    rows = [point(n, value, np.full(9, value)) for n, value in ((10, 0.2), (20, 0.3))]
    assert labels_needed(rows, point(20, 0.31, np.full(9, 0.31))) == dict.fromkeys(("labels", "low", "high"), math.inf)
    assert labels_needed(rows, point(20, 0.1, np.full(9, 0.1))) == dict.fromkeys(("labels", "low", "high"), 10)


def test_a_curve_halves_the_labels_down_to_two_a_class() -> None:
    assert shares(400, 10) == (0.5, 0.25, 0.125, 0.0625)
    assert shares(4, 2) == (0.5,)
    assert len(shares(10**6, 2)) == 6
    judge = point(100, 0.5, np.zeros(2), "logistic regression")
    rows = [
        judge,
        point(50, 0.4, np.zeros(2)),
        point(25, 0.3, np.zeros(2)),
        point(9, 0.9, np.zeros(2), "weighted k-NN"),
    ]
    assert [row.n_train for row in curve(rows, judge)] == [25, 50, 100]


def found(difference: float, half: float) -> dict[str, Any]:
    low, high = difference - half, difference + half
    said = "better" if low > 0 else "worse" if high < 0 else "not shown"
    return {"difference": difference, "low": low, "high": high, "verdict": said}


BETTER, WORSE, OPEN, LEVEL = found(0.1, 0.05), found(-0.1, 0.05), found(0.03, 0.06), found(0.001, 0.015)


def recorded(own_gflops: float = 1.0, **against: dict[str, Any]) -> dict[str, Any]:
    """A record of own accuracy 60 % and these differences to the others; random weights and pixels are worse."""
    against = {"random init": BETTER, "raw pixels": BETTER} | {key.replace("_", " "): v for key, v in against.items()}
    roles = {role: {"logistic": {"value": 0.6 - each["difference"]}} for role, each in against.items()}
    roles |= {"own": {"logistic": {"value": 0.6}, "cost": {"gflops": own_gflops}}}
    roles.get("public", {})["cost"] = {"gflops": 2.0}
    both = {role: {"logistic": each, "knn": each} for role, each in against.items()}
    return {"data": {"n_test": 400}, "contenders": roles, "against": both}


@pytest.mark.parametrize(
    ("record", "choice"),
    [
        (recorded(public=BETTER), OWN),
        (recorded(public=BETTER, start=BETTER), OWN),
        (recorded(public=BETTER, start=OPEN), MORE),
        (recorded(start=BETTER), OWN),
        (recorded(), OWN),
        (recorded(public=WORSE), GO_ON),  # from random weights at 50 % to 60, of 70: half of the way
        (recorded(public=found(-0.3, 0.05)), USE_PUBLIC),
        (recorded(public=WORSE, random_init=OPEN), USE_PUBLIC),
        (recorded(public=WORSE, start=BETTER), GO_ON),
        (recorded(public=WORSE, start=OPEN), USE_PUBLIC),
        (recorded(public=OPEN, start=WORSE), USE_PUBLIC),
        (recorded(start=WORSE), USE_PUBLIC),
        (recorded(public=OPEN), MORE),
        (recorded(start=OPEN), MORE),
        (recorded(start=LEVEL), LONGER),
        (recorded(public=LEVEL, own_gflops=1.0), OWN),
        (recorded(public=LEVEL, own_gflops=3.0), USE_PUBLIC),
        (recorded(raw_pixels=WORSE), LONGER),
        (recorded(raw_pixels=LEVEL), LONGER),
        (recorded(random_init=found(0.03, 0.1)), MORE),
    ],
)
def test_the_advice_follows_from_the_differences(record: dict[str, Any], choice: str) -> None:
    advice = advise(record)
    assert advice.choice == choice
    assert "None" not in advice.reason
    assert "not shown" not in advice.reason


def test_the_labels_wanted_shrink_the_interval_to_the_difference() -> None:
    # 3 points +- 6: four times as many labels halve the interval
    assert "about 1,600 would show the 3.0" in advise(recorded(public=OPEN)).reason


def test_what_another_method_shows_the_other_way_round_is_said() -> None:
    record = recorded(public=WORSE)
    record["against"]["public"]["knn"] = BETTER
    assert "k-NN shows the opposite" in advise(record).reason


@pytest.mark.parametrize("attention", ["sdpa", "plain"])
def test_the_cost_of_a_picture_is_that_of_its_matrix_products(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinoreg.plan.encoder_cost.SECONDS", 0.0)
    model = tiny_model(image_size=24, attention=attention)
    cost = encoder_cost(wrap(model), 24)
    model.attention_backend = "plain"
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 24, 24))
    assert cost["gflops"] * 1e9 == pytest.approx(counter.get_total_flops())
    assert cost["parameters"] == sum(each.numel() for each in model.parameters())
    assert (cost["dim"], cost["images_per_second"] > 0) == (12, True)


# The whole command


def save(model: RegisterViT, path: Path) -> Path:
    """A weight file with the JSON that states its architecture."""
    save_file({f"backbone.{key}": value for key, value in model.state_dict().items()}, path)
    described = {
        "format": "dinoreg-teacher",
        "version": 1,
        "architecture": model.architecture(),
        "sha256": digest(path),
    }
    path.with_suffix(".json").write_text(json.dumps(described))
    return path


def stripes(root: Path, count: int = 14) -> Path:
    """Pictures of stripes across and down, at any phase: random weights tell some of them."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:32, :32]
    for name, ramp in (("across", rows), ("down", columns)):
        (root / name).mkdir(parents=True)
        for number in range(count):
            wave = 0.5 + 0.4 * np.sin(ramp / 2 + rng.uniform(0, 6)) + rng.normal(0, 0.3, ramp.shape)
            Image.fromarray((255 * wave.clip(0, 1)).astype(np.uint8)).save(root / name / f"{number:02d}.png")
    return root


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that began with its own weights."""
    run = tmp_path_factory.mktemp("runs") / "run"
    run.mkdir()
    write_run(run, tiny_model())
    save(tiny_model(), run / "init.safetensors")
    return run


@pytest.mark.slow
def test_a_verdict_has_the_figures_of_an_evaluation_and_pictures_of_what_changed(
    begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, other = (
        stripes(tmp_path / "stripes"),
        save(tiny_model(init_std=0.05, depth=1), tmp_path / "other.safetensors"),
    )
    options = {"weights": str(begun), "public": str(other), "repeats": 1, "device": "cpu", "precision": "fp32"}
    assert main(["verdict", str(data), *(f"{key}={value}" for key, value in options.items())]) == 0
    folder = begun / "verdict/0000007/stripes"
    record = json.loads((folder / "verdict.json").read_text())
    assert f"verdict: {record['advice']['choice']}: {record['advice']['reason']}" in capsys.readouterr().out
    roles = record["contenders"]
    assert [*roles] == ["own", "start", "public", "random init", "raw pixels"]
    shared = {"device": "cpu", "precision": "fp32", "protocols": ["logistic", "knn"], "knn.k": [20], "examples": 0}
    measured = dinoreg.evaluate(begun, data, **shared, report=False, out=str(tmp_path / "eval"))
    for role, rows in {"own": measured.rows, **measured.baselines}.items():
        for kind, row in (("logistic", rows[0]), ("knn", rows[2])):
            assert (roles[role][kind]["value"], roles[role][kind]["low"]) == (row.value, row.low), (role, kind)
    for role, against in record["against"].items():
        gain = roles["own"]["logistic"]["value"] - roles[role]["logistic"]["value"]
        assert against["logistic"]["difference"] == pytest.approx(gain)
    assert {each["verdict"] for each in record["against"]["start"].values()} == {"no difference"}
    changed = record["changed"]
    net = (changed["won_count"] - changed["lost_count"]) / 28
    assert net == pytest.approx(record["against"]["public"]["logistic"]["difference"])
    assert all((folder / each["file"]).is_file() for side in ("won", "lost") for each in changed[side])
    page = (folder / "verdict.html").read_text()
    assert page.count('class="card picture"') == sum(min(changed[f"{side}_count"], 12) for side in ("won", "lost"))
    again = dinoreg.verdict(data, **options)
    assert (again.record["contenders"]["own"]["curve"], again.page) == (roles["own"]["curve"], folder / "verdict.html")
    assert 0 < len(repr(again)) < 300


def test_what_cannot_be_judged_is_refused_in_one_line_and_nothing_is_written(begun: Path, tmp_path: Path) -> None:
    data, out = stripes(tmp_path / "stripes", 3), tmp_path / "out"
    wide = save(tiny_model(patch_size=4), tmp_path / "wide.safetensors")
    (tmp_path / "several.csv").write_text("path,label\nacross/00.png,a|b\ndown/00.png,b\n")
    (tmp_path / "lone" / "one").mkdir(parents=True)
    (tmp_path / "lone/one/00.png").write_bytes((data / "across/00.png").read_bytes())
    for labelled, options, said in (
        (tmp_path / "several.csv", {"own.root": str(data)}, "one class a picture"),
        (tmp_path / "lone", {}, "two"),
        (tmp_path / "nowhere", {}, "nowhere"),
        (data, {"init": str(wide)}, "its patch_size is 4, expected 8"),
        (data, {"publik": "x"}, "did you mean public"),
        (data, {"own.fold": 3}, "did you mean"),
    ):
        with pytest.raises(UserError, match=said) as refused:
            dinoreg.verdict(labelled, weights=str(begun), out=str(out), **options)
        assert "\n" not in str(refused.value)
    assert not out.exists()
