"""`dinoreg eval` from a user's seat: what it refuses, what it writes, and how it goes on after an interruption."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from encoders import small_vit
from miniatures import food101, own, pets
from peer_models import timm_model
from PIL import Image
from small_runs import tiny_model, write_run

import dinoreg
from dinoreg.commands.main import main
from dinoreg.config.bundled import bundled
from dinoreg.evaluation.benchmark import benchmarks, find_benchmark
from dinoreg.evaluation.custom.datasets import own_benchmark
from dinoreg.evaluation.protocols.measurement import Measurement
from dinoreg.evaluation.result import Result, Row
from dinoreg.evaluation.runner import read_result
from dinoreg.models.vit import RegisterViT
from dinoreg.runtime.errors import UserError

FAST = ["logistic.num_c=6", "batch_size=32", "workers=0", "precision=fp32", "examples=2"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("datasets")
    pets.write(folder)
    food101.write(folder)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save(small_vit().state_dict(), path)
    return path


def record(out: Path, dataset: str) -> dict:
    return json.loads((out / "eval" / "0000000" / f"{dataset}.json").read_text())


def test_two_datasets_give_records_tables_and_one_report(
    root: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "pets,food101", f"weights={weights}", f"root={root}", f"out={tmp_path}", *FAST]) == 0
    shown = capsys.readouterr()
    assert "pets" in shown.out
    assert "food101" in shown.out
    assert "warning: pets: train has" in shown.err
    found = record(tmp_path, "pets")
    assert found["metric"] == "mean per class"
    assert found["value"] > 0.8
    assert found["low"] <= found["value"] <= found["high"]
    assert set(found["baselines"]) == {"random init", "raw pixels"}
    assert {row["protocol"] for row in found["rows"]} == {"logistic regression", "weighted k-NN"}
    assert {each["source"] for each in found["published"]} != set()
    assert found["weights"]["name"] == "small"
    folder = tmp_path / "eval" / "0000000"
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert {row["dataset"] for row in rows} == {"pets", "food101"}
    by_hand = next(row for row in rows if row["dataset"] == "pets")
    assert float(by_hand["value"]) == found["value"]
    assert float(by_hand["raw pixels"]) == found["baselines"]["raw pixels"]["value"]
    assert (folder / "table.md").read_text().count("\n| ") == len(rows) + 2
    page = (folder / "report.html").read_text()
    for text in ("Oxford-IIIT Pets", "Food-101", "What differs".lower(), "data:image/", "raw pixels", "chosen on"):
        assert text in page.lower() or text in page, text
    assert not (folder / ".unfinished").exists() or not list((folder / ".unfinished").iterdir())


def test_the_same_command_again_measures_nothing(
    root: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["eval", "pets", f"weights={weights}", f"root={root}", f"out={tmp_path}", *FAST]
    assert main(command) == 0
    first = record(tmp_path, "pets")

    def never(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("dinoreg.evaluation.protocols.classification.logistic", never)
    assert main(command) == 0
    assert record(tmp_path, "pets") == first


def results(out: Path) -> dict[str, dict]:
    """The results of a folder by the names of their files."""
    return {path.stem: json.loads(path.read_text()) for path in out.glob("eval/0000000/*.json")}


def test_a_result_is_never_replaced_by_another_measurement_without_a_word(
    root: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.pth"
    torch.save(small_vit(seed=1).state_dict(), other)
    quick = ["protocols=[knn]", "baselines=false", "workers=0", "examples=1", f"root={root}", f"out={tmp_path}"]
    assert main(["eval", "pets", f"weights={weights}", *quick]) == 0
    assert "pets.json holds" not in capsys.readouterr().err
    for change in (["seed=1", f"weights={weights}"], [f"weights={other}"]):
        assert main(["eval", "pets", *quick, *change]) == 0
        assert "pets.json holds another measurement" in capsys.readouterr().err
    found = results(tmp_path)
    assert {(each["seed"], each["weights"]["name"]) for each in found.values()} == {
        (0, "small"),
        (1, "small"),
        (0, "other"),
    }
    assert found["pets"]["seed"] == 0
    folder = tmp_path / "eval" / "0000000"
    assert {path.name for path in (folder / "examples").iterdir()} == set(found)
    assert len({each["title"] for each in found.values()}) == 3
    lines = (folder / "table.md").read_text()
    assert all(f"**{each['title']}" in lines for each in found.values())
    assert "other" in next(line for line in lines.splitlines() if "other" in line and line.startswith("| "))
    assert main(["eval", "pets", f"weights={weights}", *quick, "seed=2", "overwrite=true"]) == 0
    now = results(tmp_path)
    assert now["pets"]["seed"] == 2
    assert {name: each for name, each in now.items() if name != "pets"} == {
        name: each for name, each in found.items() if name != "pets"
    }


def test_two_folders_of_one_name_are_two_results(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for site, colours in (("siteA", (60, 200)), ("siteB", (120, 130))):
        for name, colour in zip("xy", colours, strict=True):
            (tmp_path / site / "labelled" / name).mkdir(parents=True)
            for number in range(6):
                picture = Image.new("RGB", (40, 40), (colour, number, 0))
                picture.save(tmp_path / site / "labelled" / name / f"{number}.png")
    quick = [f"weights={weights}", "protocols=[knn]", "knn.k=[1]", "baselines=false", "workers=0", f"out={tmp_path}"]
    one, two = (str(tmp_path / site / "labelled") for site in ("siteA", "siteB"))
    assert main(["eval", one, *quick]) == 0
    first = results(tmp_path)
    assert main(["eval", two, *quick]) == 0
    found = results(tmp_path)
    assert set(found) == {"labelled", "siteB_labelled"}
    assert found["labelled"] == first["labelled"]
    assert {each["title"] for each in found.values()} == {"siteA/labelled", "siteB/labelled"}
    shown = capsys.readouterr().out
    assert "labelled" in shown
    assert "siteB" in shown
    assert main(["eval", f"{one},{two}", *quick]) == 0  # nothing new
    assert results(tmp_path) == found
    out = tmp_path / "at_once"
    assert main(["eval", f"{one},{two}", *quick[:-1], f"out={out}"]) == 0
    assert set(results(out)) == set(found)


def test_an_evaluation_that_was_stopped_keeps_what_was_done(
    root: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dinoreg.evaluation.protocols import classification

    calls = []
    inner = classification.logistic

    def counted(*arguments: object) -> list[Row]:
        calls.append(arguments)
        return inner(*arguments)  # type: ignore[arg-type]

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(classification, "logistic", counted)
    command = ["eval", "pets", f"weights={weights}", f"root={root}", f"out={tmp_path}", *FAST]
    with monkeypatch.context() as patch:
        patch.setattr(classification, "knn", stopped)
        assert main(command) == 130
    assert len(calls) == 1
    assert not (tmp_path / "eval" / "0000000" / "pets.json").exists()
    assert main(command) == 0
    assert len(calls) == 3  # the model's own was kept; the baselines' are new


def test_one_broken_dataset_does_not_take_the_others_along(
    root: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dinoreg.evaluation.protocols import classification
    from dinoreg.runtime.errors import RunError

    inner = classification.logistic

    def half(measured: Measurement) -> list[Row]:
        if "food" in str(measured.data.splits["train"].source.root):
            raise RunError("the disk went away")
        return inner(measured)

    monkeypatch.setattr(classification, "logistic", half)
    assert main(["eval", "pets,food101", f"weights={weights}", f"root={root}", f"out={tmp_path}", *FAST]) == 1
    assert record(tmp_path, "pets")["value"] > 0.5
    assert "food101 failed: food101, logistic: the disk went away" in capsys.readouterr().err
    assert "the disk went away" in (tmp_path / "eval" / "0000000" / "report.html").read_text()


def test_python_gives_the_same_numbers_for_a_model_and_its_twin_in_timm(root: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    native = RegisterViT(image_size=32, patch_size=8, dim=64, depth=2, heads=2, num_registers=4, layerscale=1.0).eval()
    options = {"root": str(root), "logistic.num_c": 6, "workers": 0, "baselines": False}
    ours, theirs = (
        dinoreg.evaluate(model, "pets", out=str(tmp_path / str(number)), **options)
        for number, model in enumerate((native, timm_model(native)))
    )
    assert isinstance(ours, Result)
    assert [row.value for row in ours.rows] == [row.value for row in theirs.rows]
    assert ours.headline.metric == "mean per class"
    assert read_result(tmp_path / "0" / "eval" / "0000000" / "pets.json") == ours


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pets"], "weights= is missing"),
        (["pest", "weights=random:vitt14_reg4"], "pest: unknown dataset; did you mean pets?"),
        (["pets", "weights=random:vitt14_reg4"], "pets: root= is missing"),
        (["pets", "weights=random:vitt14_reg4", "root=ROOT", "image_size=30"], "a multiple of the patch size 14"),
        (["pets", "weights=nothing.pth", "root=ROOT"], "nothing.pth"),
        (["pets", "weights=random:vitt14_reg4", "root=ROOT", "strict=true"], "(strict=true)"),
        (["pets", "weights=random:vitt14_reg4", "root=ROOT", "protocols=[knnn]"], "did you mean knn?"),
        (
            ["pets", "weights=random:vitt14_reg4", "root=ROOT", "protocols=[depth]"],
            "none of the datasets declares them",
        ),
        (["pets", "weights=random:vitt14_reg4", "root=ROOT", "logistic.num=3"], "did you mean logistic.num_c?"),
        (["pets", "weights=random:vitt14_reg4", "root=ROOT", "pets.crop=3"], "pets.crop: unknown option"),
        (
            ["pets", "weights=random:vitt14_reg4", "root=ROOT", "aircraft.crop_banner=false"],
            "aircraft: neither a key nor",
        ),
        (["pets", "weights=random:vitt14_reg4", "root=ROOT", "batch_size=0"], "batch_size=0: expected a number in"),
        (["pets", "food101", "weights=random:vitt14_reg4"], "expected key=value"),
        (["own.py", "weights=random:vitt14_reg4", "root=ROOT"], "no such file"),
        (["pets", "weights=timm:resnet_nothing", "root=ROOT"], "timm has no model"),
        ([], "missing NAME"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: list[str],
    expected: str,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    assert main(["eval", *(text.replace("ROOT", str(root)) for text in arguments)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
    assert len(lines) == 1
    assert expected in lines[0]
    assert set(tmp_path.rglob("*")) == before


def test_weights_of_another_architecture_are_one_line(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = small_vit().state_dict()
    del state["blocks.1.attn.qkv.weight"]
    torch.save(state, tmp_path / "torn.pth")
    assert main(["eval", "pets", f"weights={tmp_path / 'torn.pth'}", f"root={root}", f"out={tmp_path / 'out'}"]) == 2
    assert "blocks.1.attn.qkv.weight" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_dataset_names_the_path_and_the_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "pets", "weights=random:vitt14_reg4", f"root={tmp_path}"]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("dinoreg: pets: ")
    assert "annotations/trainval.txt" in line or "images" in line
    assert ".tar.gz" in line


def test_all_over_an_empty_root_says_what_is_expected_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "all", "weights=random:vitt14_reg4", f"root={tmp_path}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    for name in benchmarks():
        (line,) = [each for each in lines if each.startswith(f"dinoreg: {name}: ")]
        assert "missing" in line
        assert "comes from" in line
    assert len(lines) == len(benchmarks())


def test_all_measures_what_is_there_and_lists_what_is_not(
    root: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", "all", f"weights={weights}", f"root={root}", f"out={tmp_path}", "protocols=[knn]", *FAST]
    assert main([*command, "baselines=false"]) == 0
    assert "not evaluated: aircraft: " in capsys.readouterr().err
    page = (tmp_path / "eval" / "0000000" / "report.html").read_text()
    assert "Not evaluated" in page
    assert {path.stem for path in (tmp_path / "eval" / "0000000").glob("*.json")} == {"pets", "food101"}


def test_the_list_names_every_dataset_with_metric_and_licence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--list"]) == 0
    short = capsys.readouterr().out
    assert all(len(line) <= 80 for line in short.splitlines())
    assert main(["eval", "--list", ",".join(benchmarks())]) == 0
    shown = capsys.readouterr().out
    for benchmark in benchmarks().values():
        assert benchmark.name in short
        assert benchmark.licence in shown
        for task in benchmark.tasks:
            assert task.metric.split()[0] in shown
        for key, line in zip(benchmark.options, benchmark.options_in_words(), strict=True):
            assert line.startswith(f"{benchmark.name}.{key}: ")
            assert f"{benchmark.name}.{key}:" in shown


def test_a_declaration_of_ones_own_works_by_path(root: Path, weights: Path, tmp_path: Path) -> None:
    own = tmp_path / "mine.py"
    shipped = Path(find_benchmark("pets").find.__globals__["bundled"]("eval")) / "pets.py"
    own.write_text(shipped.read_text().replace('"pets"', '"mine"'))
    assert main(["eval", str(own), f"weights={weights}", f"root={root}", f"out={tmp_path}", *FAST]) == 0
    assert record(tmp_path, "mine")["value"] > 0.8
    (tmp_path / "wrong.py").write_text("BENCHMARK = 3\n")
    with pytest.raises(UserError, match="has no BENCHMARK"):
        find_benchmark(str(tmp_path / "wrong.py"))
    (tmp_path / "torn.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(UserError, match=r"torn\.py: cannot be loaded \(ModuleNotFoundError"):
        find_benchmark(str(tmp_path / "torn.py"))


def test_a_declaration_is_a_script_too(tmp_path: Path) -> None:
    script = [sys.executable, str(bundled("eval") / "pets.py"), "weights=random:vitt14_reg4", "image_size=30"]
    done = subprocess.run([*script, f"root={tmp_path}"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "pets: " in done.stderr
    assert "is missing; it comes from images.tar.gz" in done.stderr


def test_a_folder_here_does_not_take_the_name_of_a_shipped_dataset(
    root: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    own.write(tmp_path).rename(tmp_path / "pets")
    quick = [f"weights={weights}", "protocols=[knn]", "knn.k=[1]", "baselines=false", "workers=0", "report=false"]
    assert main(["eval", "pets", *quick, f"root={root}", "out=a"]) == 0
    assert "./pets" in capsys.readouterr().err
    assert results(tmp_path / "a")["pets"]["title"] == "Oxford-IIIT Pets"
    assert main(["eval", "pets", *quick]) == 2  # without root= nothing but the folder can be meant, and that is said
    assert "./pets" in capsys.readouterr().err
    for name in ("./pets", "pets/"):
        assert main(["eval", name, *quick, "out=b"]) == 0
        assert "shipped" not in capsys.readouterr().err
    assert set(results(tmp_path / "b")) == {"own_pets"}
    options = {"protocols": ["knn"], "baselines": False, "workers": 0, "out": "c"}
    assert dinoreg.evaluate(str(weights), Path("pets"), **options).dataset == "own_pets"


def test_images_that_the_probe_of_the_run_has_seen_are_said_when_they_are_tested(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labelled = own.write(tmp_path)
    looked_at = sorted(labelled.glob("*/*.jpg"))[:20]
    run = write_run(tmp_path / "run", tiny_model())
    digests = [sha256(path.read_bytes()).hexdigest()[:16] for path in looked_at]
    probed = {"data": str(labelled), "metric": "knn_top1", "images": digests}
    (run / "probe.json").write_text(json.dumps(probed))
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last").write_text("step_0000099\n")
    (tmp_path / "link").symlink_to(labelled)
    table = own.write_csv(tmp_path, seed=5)

    def warnings(data: Path) -> list[str]:
        command = ["eval", str(data), f"weights={run}/teacher/step_0000007.safetensors", "protocols=[knn]", "knn.k=[1]"]
        assert main([*command, "baselines=false", "workers=0", f"out={tmp_path / 'out'}", "overwrite=true"]) == 0
        said = capsys.readouterr().err
        (path,) = (tmp_path / "out" / "eval").glob(f"*/{'own_table_labels' if data == table else data.name}.json")
        told = [each for each in json.loads(path.read_text())["warnings"] if "probe" in each]
        assert all(f"warning: {each}" in said for each in told)
        assert all(each in (path.parent / "report.html").read_text() for each in told)
        return told

    (watched,) = warnings(labelled)
    data = own_benchmark(labelled, {}).tasks[0].read(tmp_path, {})
    tested = [data.splits["test"].source.name(index) for index in range(len(data.splits["test"]))]
    count = len({*tested} & {*map(str, looked_at)})
    assert f"{count} of {len(tested)} tested images" in watched
    assert watched.startswith("watched while training: ")
    (run / "checkpoints" / "best").write_text("step_0000007\n")
    for path in (labelled, tmp_path / "link"):
        (chosen,) = warnings(path)
        assert f"{count} of {len(tested)} tested images" in chosen
        assert chosen.startswith("chosen on tested images: ")
    assert warnings(table) == []


@pytest.mark.slow
def test_a_run_folder_is_evaluated_in_place_at_its_step(root: Path, tmp_path: Path) -> None:
    from training import tiny_config

    from dinoreg.train.loop import pretrain

    run = Path(pretrain(tiny_config(tmp_path / "run", steps=2)))
    assert main(["eval", "pets", f"weights={run}", f"root={root}", "baselines=false", *FAST]) == 0
    (path,) = (run / "eval").glob("*/pets.json")
    assert int(path.parent.name) == 2
    assert "pets" in (run / "report.html").read_text()


def test_a_record_reads_back_as_it_was() -> None:
    row = Row("k-NN", "top-1", 0.5, 0.25, 0.75, variant="k = 20", settings={"k": 20}, chance=0.1)
    result = Result("pets", "abc", (row,), {"random init": (row,)}, {"title": "Pets"})
    assert Result.from_dict(json.loads(json.dumps(result.as_dict()))) == result
    worse = Row("k-NN", "top-1", float("nan"), 0.0, 1.0, variant="k = 20")
    assert Row.from_dict(json.loads(json.dumps(worse.as_dict()))).value != worse.value
