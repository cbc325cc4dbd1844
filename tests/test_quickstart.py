"""`dinoreg quickstart`: its three probes, and a whole one in small."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training import loss_trace, tiny_config

from dinoreg.checkpoint.run_folder import Run
from dinoreg.commands import quickstart as module
from dinoreg.commands.quickstart import PretrainedEncoder, probe_run, quickstart
from dinoreg.config.load import Config
from dinoreg.data.source import Source
from dinoreg.evaluation.backbones.encoder import Encoder, NativeEncoder
from dinoreg.evaluation.context import Context
from dinoreg.evaluation.features.cache import extract_features
from dinoreg.evaluation.result import Result, Row
from dinoreg.reports.verdict import verdict
from dinoreg.runtime.errors import UserError
from dinoreg.scenes.render import NUM_CLASSES
from dinoreg.train.loop import pretrain
from dinoreg.train.state import build_networks


def result(low: float, high: float) -> Result:
    row = Row("logistic regression", "top-1", (low + high) / 2, low, high, n_train=9, n_test=9)
    return Result("scenes", "", (row,), {"random init": (row,), "raw pixels": (row,)})


@pytest.fixture
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_run, "__defaults__", (90, 50, True))


@pytest.mark.slow
@pytest.mark.usefixtures("few_scenes")
def test_the_three_probes_have_the_same_images_and_differ_in_their_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features: list[tuple[str, int, int]] = []
    inner = extract_features

    def extract(context: Context, encoder: Encoder, source: Source, *args: Any, **options: Any) -> np.ndarray:
        found = inner(context, encoder, source, *args, **options)
        features.append((source.fingerprint(), len(found), found.shape[1] * found.shape[2]))
        return found

    monkeypatch.setattr("dinoreg.evaluation.protocols.classification.extract_features", extract)
    config = tiny_config(tmp_path / "run", steps=2, data__workers=0)
    found = probe_run(config, pretrain(config))
    assert list(found.baselines) == ["random init", "raw pixels"]
    for row in (found.rows[0], *(rows[0] for rows in found.baselines.values())):
        assert (row.metric, row.n_train, row.n_test, row.chance) == ("top-1", 90, 50, 1 / NUM_CLASSES)
        assert 0 <= row.low <= row.value <= row.high <= 1
        assert row.value * 50 == pytest.approx(round(row.value * 50))
        assert row.settings["C"] > 0
        assert row.hours > 0
    assert len({source for source, _, _ in features}) == 2
    assert [count for _, count, _ in features] == [90, 50] * 3
    # Class token beside mean patch token; 32 pixels of three channels.
    assert [width for _, _, width in features] == [64] * 4 + [3 * 32 * 32] * 2
    assert not (tmp_path / "run" / "eval" / "features").exists()


@pytest.mark.usefixtures("few_scenes")
def test_random_init_is_the_network_that_the_run_started_from(tmp_path: Path) -> None:
    """A run that does not learn has the features of its own start, and so its very row."""
    config = tiny_config(tmp_path / "run", steps=1, seed=4, optim__lr=0.0, data__workers=0)
    found = probe_run(config, pretrain(config))
    own, start = found.rows[0], found.baselines["random init"][0]
    assert replace(start, hours=own.hours, details=own.details, against=own.against) == own


def test_other_seeds_give_other_random_weights(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", steps=1, seed=4, data__workers=0)
    encoder = PretrainedEncoder(config, pretrain(config))
    one, two, own = (encoder.random_init(seed) for seed in (0, 1, 4))
    assert len({one.identity, two.identity, own.identity}) == 3
    assert all("random weights" in each.name for each in (one, two, own))
    started = NativeEncoder(build_networks(config)[0]["backbone"], "start", own.preprocessing)
    assert started.identity == own.identity


@pytest.fixture
def tiny_quickstart(monkeypatch: pytest.MonkeyPatch, few_scenes: None) -> None:
    def tiny(name: str, overrides: dict[str, Any]) -> Config:
        assert name == "quickstart"
        return tiny_config(steps=4, data__workers=0, probe__every=2, probe__num_images=20, **overrides_of(overrides))

    def overrides_of(overrides: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in overrides.items() if value is not False}

    monkeypatch.setattr(module, "load_config", tiny)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_quickstart")
def test_a_whole_quickstart_trains_probes_prints_and_writes_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = quickstart(tmp_path / "run", seed=3)
    assert out == tmp_path / "run"
    assert len(loss_trace(out)) == 4
    record = json.loads((out / "eval" / "0000004" / "scenes.json").read_text())
    assert record["dataset"] == "scenes"
    assert record["chance"] == pytest.approx(1 / NUM_CLASSES)
    assert set(record["baselines"]) == {"random init", "raw pixels"}
    shown = capsys.readouterr().out
    page = (out / "report.html").read_text()
    for name, each in {"pretrained": record, **record["baselines"]}.items():
        (line,) = [line for line in shown.splitlines() if line.strip().startswith(f"{name}:")]
        for number in (each["value"], each["low"], each["high"]):
            assert f"{100 * number:.1f}" in line
        assert f"{100 * each['value']:.1f}" in page
    assert "minutes in all" in shown
    assert "report.html" in shown.replace("\n", "")
    assert verdict(Run(out)).headline in shown

    # Once more on the finished run: it is not trained again, and nothing differs.
    before = loss_trace(out)
    assert quickstart(tmp_path / "run", seed=3) == out
    assert loss_trace(out) == before
    again = json.loads((out / "eval" / "0000004" / "scenes.json").read_text())
    assert (again["value"], again["low"]) == (record["value"], record["low"])


@pytest.mark.usefixtures("tiny_quickstart")
def test_a_folder_of_something_else_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="out="):
            quickstart(tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["letter.txt"]


@pytest.mark.usefixtures("tiny_quickstart")
def test_a_quickstart_that_was_stopped_goes_on_and_overwrite_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Probes and report are left out here: what matters is how the run is taken up."""
    given: list[tuple[bool, bool]] = []

    def note(config: Config) -> Path:
        given.append((config.resume, config.overwrite))
        assert config.out is not None
        out = Path(config.out)
        out.mkdir(exist_ok=True)
        (out / "config.yaml").write_text("seed: 0\n")
        (out / "status.json").write_text('{"step": 4}')
        return out

    monkeypatch.setattr(module, "pretrain", note)
    monkeypatch.setattr(module, "probe_run", lambda config, out: result(0.1, 0.2))
    monkeypatch.setattr(module, "report_run", lambda out: out / "report.html")
    for overwrite in (False, False, True):
        quickstart(tmp_path / "run", overwrite=overwrite)
    assert given == [(False, False), (True, False), (False, True)]


def test_the_scenes_of_the_probe_are_none_of_those_trained_on() -> None:
    from dinoreg.config.load import load_config
    from dinoreg.data.open import open_source
    from dinoreg.data.source import ScenesSource
    from dinoreg.train.probes import FIRST_PROBE_SCENE

    config = load_config("quickstart")
    assert config.data.source is not None
    source = open_source(config.data.source)
    assert isinstance(source, ScenesSource)
    trained = np.array([source.first, source.first + len(source)])
    in_run = np.array([FIRST_PROBE_SCENE, FIRST_PROBE_SCENE + config.probe.num_images])
    at_end = np.array([module.FIRST_PROBE_SCENE, module.FIRST_PROBE_SCENE + module.NUM_TRAIN + module.NUM_TEST])
    assert trained[1] <= in_run[0]
    assert in_run[1] <= at_end[0]
