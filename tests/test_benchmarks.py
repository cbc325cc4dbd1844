"""The benchmarks: their arithmetic, and that each runs. Nothing here depends on a time."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from warm_interpreter import WarmInterpreter

from dinoreg.models.heads import PrototypeHead
from dinoreg.models.vit import RegisterViT

ROWS = ("logistic regression", "weighted k-NN")
FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module(name)


def counted(work: torch.nn.Module, *inputs: object, backward: bool = False) -> int:
    with FlopCounterMode(display=False) as counter:
        out = work(*inputs)
        if backward:
            out = out.patches if hasattr(out, "patches") else out
            out.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("patch_size", "size", "ffn"), [(16, 224, "mlp"), (16, 96, "mlp"), (14, 98, "mlp"), (14, 224, "swiglu")]
)
def test_forward_flops_of_an_encoder_are_those_that_pytorch_counts(
    patch_size: int, size: int, ffn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flops = load("flops", monkeypatch)
    with torch.device("meta"):
        model = RegisterViT(image_size=size, patch_size=patch_size, ffn=ffn, attention="plain")
        images = torch.empty(3, 3, size, size)
    encoder = flops.Encoder(384, 12, patch_size, ffn=ffn)
    assert counted(model, images) == 3 * encoder.forward(size)


def test_backward_flops_are_twice_the_forward_ones_but_for_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    flops = load("flops", monkeypatch)
    with torch.device("meta"):
        model = RegisterViT(image_size=224, patch_size=16, attention="plain")
        images = torch.empty(2, 3, 224, 224)
    encoder = flops.Encoder(384, 12, 16)
    expected = 2 * (3 * encoder.forward(224) - encoder.patch_embedding(224))
    assert counted(model, images, backward=True) == expected


def test_flops_of_a_head_are_those_that_pytorch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    flops = load("flops", monkeypatch)
    with torch.device("meta"):
        head = PrototypeHead(384, 65536)
        tokens = torch.empty(5, 384, requires_grad=True)
    assert counted(head, tokens) == 5 * flops.head(384, 65536, 256)
    assert counted(head, tokens, backward=True) == 3 * 5 * flops.head(384, 65536, 256)


@pytest.mark.parametrize(
    ("size", "patch_size", "recipe", "student", "teacher", "heads", "rate"),
    [
        ("S", 16, "short", 99, 19, 11.9, 6071),
        ("B", 16, "long", 385, 72, 22.4, 1649),
        ("L", 16, "short", 1354, 251, 12.6, 488),
        ("g", 16, "long", 5034, 931, 23.2, 132),
        ("S", 14, "long", 132, 25, 27.6, 4291),
        ("g", 14, "short", 6605, 1217, 16.7, 101),
    ],
)
def test_a_step_costs_what_was_worked_out_on_paper(
    size: str,
    patch_size: int,
    recipe: str,
    student: float,
    teacher: float,
    heads: float,
    rate: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flops = load("flops", monkeypatch)
    dim, depth, ffn = flops.WIDTHS[size]
    prototypes, bottleneck, _ = flops.HEADS[recipe]
    step = flops.step(
        flops.Encoder(dim, depth, patch_size, ffn=ffn),
        local_size=96 if patch_size == 16 else 98,
        prototypes=prototypes,
        dino_bottleneck=bottleneck,
    )
    parts = (round(step.student / 1e9), round(step.teacher / 1e9), round(step.heads / 1e9, 1))
    assert parts == (student, teacher, heads)
    assert round(790e12 / step.total) == rate


def test_drop_path_saves_its_share_of_the_students_blocks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    flops = load("flops", monkeypatch)
    encoder = flops.Encoder(384, 12, 16)
    full, dropped = flops.step(encoder), flops.step(encoder, kept_share=0.7)
    blocks = 2 * encoder.blocks(224) + 8 * encoder.blocks(96)
    assert full.total - dropped.total == pytest.approx(0.3 * 3 * blocks)


def test_ratios_are_taken_within_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = load("measure", monkeypatch)
    # The machine is ten times slower in the last round; the ratio does not see it.
    rounds = [{"a": {"rate": 2 * speed}, "b": {"rate": speed}} for speed in (10.0, 12.0, 1.0)]
    summary = measure.compare(rounds, "rate", ("b",))
    assert summary["a"]["ratio"] == {"b": 2.0}
    assert summary["a"]["spread"] == [2.0, 24.0]
    assert summary["b"]["rate"] == 10.0


def test_a_variant_that_cannot_start_is_reported_with_its_last_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measure = load("measure", monkeypatch)
    script = tmp_path / "broken.py"
    script.write_text("raise SystemExit('nothing works here')\n")
    with pytest.raises(measure.WorkerError, match="nothing works here"):
        measure.Worker(str(script), {})


@pytest.mark.slow
def test_a_variant_answers_from_its_own_process_whatever_it_prints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measure = load("measure", monkeypatch)
    script = tmp_path / "variant.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.append({str(FOLDER)!r})\n"
        "import measure\n"
        "def build(settings):\n"
        "    print('noise of a library')\n"
        "    return lambda: {'pid': os.getpid(), 'twice': 2 * settings['value']}\n"
        "measure.serve(build, sys.argv[2])\n"
    )
    worker = measure.Worker(str(script), {"value": 21})
    try:
        answer = worker.measure()
    finally:
        worker.close()
    assert answer["twice"] == 42
    assert answer["pid"] != os.getpid()


def test_the_photographs_are_the_same_every_time_and_of_the_size_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    photos = load("photos", monkeypatch)
    for height, width in ((375, 500), (1200, 1600)):
        first, again = photos.photo(3, height, width), photos.photo(3, height, width)
        assert first.shape == (height, width, 3)
        assert (first == again).all()
        assert first.std() > 20  # a picture, not a plain
    (file,) = photos.write_photos(tmp_path, 1)
    assert file.read_bytes()[:2] == b"\xff\xd8"


@pytest.fixture(scope="module")
def interpreter() -> Iterator[WarmInterpreter]:
    """Processes for the benchmarks, with what most of them import."""
    with WarmInterpreter("torch", "dinoreg.commands.main", "dinoreg.train.loop") as started:
        yield started


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "results"),
    [
        ("flops", {"rows"}),
        ("data", {"single", "loader", "large", "fidelity", "profile"}),
        ("step", {"dinoreg", "dinoreg, no drop path", "dinoreg, 8192 prototypes"}),
        ("features", {"dinoreg", "timm", "transformers"}),
        ("end_to_end", {"as asked"}),
        ("logistic", {"dinoreg", "scikit-learn", "scikit-learn, tol 1e-5"}),
        ("entries", {f"{kind}, {when}" for kind in ("list", "tar", "parquet") for when in ("first", "again")}),
        ("large", {"logistic", "knn", "linear"}),
        ("scaling", {"variants"}),
        ("stages", {"rows"}),
        ("healthy", {"rows", "bands"}),
        ("rope", {"rows"}),
        ("rasa", {"3 planes, seed 0", "10 planes, seed 0"}),
        ("memory", {"vits14_reg4"}),
        ("startup", {"seconds", "cpu"}),
        ("kills", {"one process", "two, ddp", "two, fsdp"}),
        (
            "checkpoint_stall",
            {"foreground", "background, first", "background, following", "background write time", "step"},
        ),
    ],
)
def test_a_benchmark_runs_in_its_shortest_form_and_ends_with_one_line_of_json(
    name: str, results: set[str], interpreter: WarmInterpreter
) -> None:
    done = interpreter.run([sys.executable, "-W", "ignore", str(FOLDER / f"{name}.py"), "--short"])
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["benchmark"] == name
    assert set(line["results"]) == results
    assert {"cpu", "cores", "torch", "commit", "variables"} <= set(line["machine"])
    if name == "data":
        assert min(part["whole_db"] for part in line["results"]["fidelity"].values()) >= 55


@pytest.mark.slow
def test_real_pictures_are_evaluated_piece_by_piece_and_a_second_start_repeats_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    real = load("real", monkeypatch)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 224, "patch_size": 14}
    transformers.Dinov2Model(transformers.Dinov2Config(**small)).save_pretrained(tmp_path / "data" / "dinov2_s")
    assets = tmp_path / "data" / "packages" / "foods" / "package" / "assets"
    assets.mkdir(parents=True)
    for number in range(32):  # two groups of sixteen, dark and light, and one that is too small
        shade = np.random.default_rng(number).integers(0, 100, (20, 30, 3)) + 150 * (number % 2)
        Image.fromarray(shade.astype(np.uint8)).save(assets / f"{'AB'[number % 2]}{number:03d}.jpeg")
    Image.new("RGB", (30, 20)).save(assets / "C001.jpeg")
    words = ["real.py", str(tmp_path / "out"), "--data", str(tmp_path / "data"), "--only", "pictures", "foods"]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    real.main()
    found = json.loads((tmp_path / "out" / "foods.json").read_text())
    assert found["tested"] == 32
    protocols = [row["protocol"].partition(",")[0] for row in found["rows"]]
    assert len(set(protocols)) == 4
    assert protocols.count("few-shot") == 6
    assert all(row["raw pixels"] and row["random init"] for row in found["rows"])
    assert Image.open(tmp_path / "out" / "figures" / "real_attention.png").size[0] > 400

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("measured a second time")

    monkeypatch.setattr(real, "dinoreg", refuse)
    real.main()


@pytest.mark.slow
def test_small_trains_and_judges_each_way_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = load("small", monkeypatch)
    for number in range(40):  # dark and light: what random weights tell apart, too
        shade = np.random.default_rng(number).integers(0, 100, (48, 48, 3)) + 150 * (number % 2)
        path = tmp_path / "data" / "foods" / "AB"[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(shade.astype(np.uint8)).save(path)
    words = ["small.py", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--sets", "foods", "--images", "128"]
    monkeypatch.setattr(sys, "argv", [*words, "--ways", "small", "small, KoLeo 0.1", "--seeds", "3"])
    small.main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]["rows"]
    assert [row["way"] for row in rows] == ["small", "small, KoLeo 0.1"]
    for row in rows:
        assert all(row[f"{protocol} - {other}"] for protocol in ROWS for other in ("random init", "raw pixels"))
        assert row["logistic regression"].startswith("100.0")
    assert rows[1]["weighted k-NN - small"]
    assert not rows[0]["weighted k-NN - small"]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("trained a second time")

    monkeypatch.setattr(small, "pretrain", refuse)
    small.main()
