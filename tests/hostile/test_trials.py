"""Values, names, places and files that once ended badly, by kind: each ends with its exit code, in a line of words."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from miniatures.pictures import pattern

from dinoreg.commands.main import main
from dinoreg.config.load import load_config, to_yaml
from tests.small_runs import tiny_model, write_run

TINY = ["model.name=vitt8_reg4", "model.dim=32", "model.depth=1", "model.heads=2", "head.prototypes=16"]
TINY += ["crops.global_size=32", "crops.local_size=16", "crops.num_local=1", "data.workers=0", "log.tensorboard=false"]
PRETRAIN = "pretrain quickstart data=scenes:count=8,size=32 probe.every=0 device=cpu out=out"
EMBED = "embed data=scenes:count=2,size=32 weights=run out=out/f.safetensors device=cpu overwrite=true"
EVAL = "eval data weights=run protocols=[knn] device=cpu out=out"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run`, weights alone, and `data`, pictures of two classes."""
    folder = tmp_path_factory.mktemp("whole")
    write_run(folder / "run", tiny_model(depth=1))
    for number in range(6):
        (folder / "data" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        pattern(number % 2, number).save(folder / "data" / "ab"[number % 2] / f"{number}.png")
    return folder


@pytest.fixture
def here(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `whole` as the current folder."""
    folder = shutil.copytree(whole, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def ends(words: str | list[str], *codes: int) -> str:
    """What the command printed; it ends with one of `codes`, in at most one line, without what a terminal obeys."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
        code = main(words.split() if isinstance(words, str) else words)
    said = [line for line in errors.getvalue().splitlines() if line.startswith("dinoreg: ")]
    text = out.getvalue() + errors.getvalue()
    assert code in codes, text[-1000:]
    assert len(said) == (code != 0), text[-1000:]
    assert not {"\x1b", "\x07"}.intersection(text)
    assert "Traceback" not in text
    assert "DINOREG_DEBUG" not in text, said
    return text


VALUES = (
    *("threads=1000000", "data.workers=100000", "model.depth=100000", "seed=99999999999999999999999", "batch_size=0"),
    *("head.prototypes=100000000000", "head.prototypes=40000000", "model.dim=1000000", "crops.global_size=16000000"),
    *("batch_size=100000000", "data.prefetch=10000000", "head.hidden_dim=100000000", "crops.num_local=100000000"),
    *("optim.accumulate=1000000000000", "model.in_channels=100000000", "checkpoint.keep=0", "log.every=0"),
    *("data.max_pixels=99999999999999999999", "parallel.timeout=1e30", "steps=99999999999999999999", "images=1e30"),
    *("health.max_nonfinite=-1", "data.range=[nan,1]", "optim.lr=1e400", "model.name=vits16_reg99999999"),
)


@pytest.mark.parametrize("value", VALUES)
def test_a_value_that_no_machine_can_serve_is_refused_by_its_key(value: str, here: Path) -> None:
    key = value.partition("=")[0]
    budget = "" if key in ("steps", "images") else "steps=2"
    assert key.split(".")[0] in ends(f"{PRETRAIN} {budget} {value}", 2)
    assert not (here / "out").exists()


@pytest.mark.parametrize("count", ["scenes:count=100000000000", "scenes:size=1000000", "scenes:count=0", "scenes:x=1"])
def test_scenes_that_no_machine_can_draw_are_refused(count: str, here: Path) -> None:
    assert "scenes" in ends(["inspect", f"data={count}"], 2)


LOOPED = (
    *("inspect data=L", "embed data=L weights=run out=f.safetensors", "embed data=scenes weights=L out=f.safetensors"),
    *("eval L weights=run out=out", "pretrain quickstart data=L out=out", "pretrain quickstart data=scenes out=L"),
    *("doctor L", "report L", "pretrain L resume=true", "export weights=L format=timm out=out", "launch status L"),
    *("view pca weights=run images=L out=out", "registers weights=run images=L out=out", "plan L"),
)


@pytest.mark.slow
@pytest.mark.parametrize("verb", LOOPED)
def test_a_link_in_a_circle_is_one_line_wherever_it_is_named(verb: str, here: Path) -> None:
    os.symlink("M", "L")
    os.symlink("L", "M")
    ends(verb, 2)


def test_a_circle_of_links_among_pictures_is_a_bad_picture(here: Path) -> None:
    os.symlink("y.jpg", "data/a/x.jpg")
    os.symlink("x.jpg", "data/a/y.jpg")
    os.symlink(here / "data", "data/a/again")
    assert "bad: 2" in ends("inspect data=data", 0)


NOWHERE = (
    *(
        "embed data=scenes:count=2,size=32 weights=run out=/proc/f.safetensors device=cpu",
        "report run out=/proc/x.html",
    ),
    *(
        "view norms weights=run images=scenes:count=2,size=32 out=/proc/x",
        "plan quickstart data=scenes out=/proc/x.json",
    ),
    *(
        "eval data weights=run out=/proc/x protocols=[knn] device=cpu",
        "export weights=run format=safetensors out=/proc/x",
    ),
)


@pytest.mark.slow
@pytest.mark.parametrize("verb", NOWHERE)
def test_a_place_that_cannot_be_written_is_named(verb: str, here: Path) -> None:
    assert "/proc" in ends(verb, 1, 2)


RESUME = "pretrain run resume=true"
LINKED = (
    *("train.log", "config.yaml.part", "status.json.part", "environment.json.part", "metrics.jsonl", "report.html"),
    *("metrics.jsonl.part", "health/events.jsonl.part", "owner.json", "teacher/step_0000002.json.part", "probe.jsonl"),
    *("view/0000002/pca.png", "checkpoints/last", "report.html.part", "init.json.part"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", LINKED)
def test_a_link_in_a_run_does_not_lead_what_is_written_out_of_it(name: str, here: Path) -> None:
    (here / "mine").write_text("mine")
    config = load_config("quickstart", [*PRETRAIN.split()[2:], *TINY, "steps=2", "batch_size=2"])
    (here / "run" / "config.yaml").write_text(to_yaml(config))
    link = here / "run" / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(here / "mine")
    ends(RESUME, 2 if name == "train.log" else 0)
    assert (here / "mine").read_text() == "mine"


@pytest.mark.parametrize("name", ["checkpoints", "teacher"])
def test_a_run_that_is_linked_to_anothers_states_does_not_replace_them(name: str, here: Path) -> None:
    (here / "other" / name).mkdir(parents=True)
    (here / "other" / "owner.json").write_text("{}")
    shutil.rmtree(here / "run" / name, ignore_errors=True)
    (here / "run" / name).symlink_to(here / "other" / name)
    assert f"{name} is a link into the run {here / 'other'}" in ends(RESUME, 2)
    assert not any((here / "other" / name).iterdir())


def test_patches_without_a_length_are_said_to_be_so(here: Path) -> None:
    model = tiny_model(depth=1)
    for parameter in model.parameters():
        parameter.data.zero_()
    write_run(here / "zero", model)
    assert "not finite, or all zero" in ends("registers weights=zero images=data out=out device=cpu", 1)
    assert not (here / "out").exists()


POINTERS = [b"\xff\xfe\x00", b"step_99999999999999999999999999", b"../../x", b"", b"step_1\x1b[2J", None]


@pytest.mark.parametrize("name", ["last", "best"])
@pytest.mark.parametrize("content", POINTERS)
def test_a_pointer_to_nothing_is_passed_over_or_named(name: str, content: bytes | None, here: Path) -> None:
    path = here / "run" / "checkpoints" / name
    path.parent.mkdir()
    path.mkdir() if content is None else path.write_bytes(content)
    ends("doctor run", 0)
    ends(EMBED.replace("weights=run", f"weights=run/{name}"), 0, 2)


@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"a":' * 50_000, b"\xff\xfe", b"null", b"9" * 5000, None])
@pytest.mark.parametrize("name", ["environment.json", "status.json", "metrics.jsonl", "owner.json", "skipped.jsonl"])
def test_a_record_of_a_run_that_is_none_is_left_out(name: str, content: bytes | None, here: Path) -> None:
    (here / "run" / name).mkdir() if content is None else (here / "run" / name).write_bytes(content)
    ends("doctor run", 0)


TABLES = {
    "an open quote": 'path,label\n"a.png,1\nb.png,2\n',
    "a label of 5000 digits": "path,label\n"
    + "".join(f"data/{'ab'[n % 2]}/{n}.png,{'9' * 5000}{n % 2}\n" for n in range(6)),
    "a label of 30 digits": "path,label\n"
    + "".join(f"data/{'ab'[n % 2]}/{n}.png,{'9' * 30}{n % 2}\n" for n in range(6)),
    "a way out": "path,label\n../../../etc/passwd,1\n/etc/passwd,0\n",
    "no bytes": "",
    "NUL": "path,label\na\x00.png,1\nb.png,0\n",
    "a terminal's words": "path,label\n\x1b[2J.png,1\nb.png,0\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", TABLES)
def test_a_table_that_is_none_is_one_line(what: str, here: Path) -> None:
    (here / "t.csv").write_text(TABLES[what])
    ends(EVAL.replace("data", "t.csv"), 0, 2)
    ends("inspect data=t.csv", 0, 2)


def test_a_name_of_a_dataset_means_the_dataset(here: Path) -> None:
    for name in ("imagenet1k", "pets"):
        shutil.copytree("data", name)
        assert name in ends(f"eval {name} root=. weights=run out=out", 2)


@pytest.mark.slow
def test_a_link_as_out_stays_and_what_no_run_writes_as_well(here: Path) -> None:
    (here / "scratch").mkdir()
    (here / "out").symlink_to("scratch")
    command = [*PRETRAIN.split(), *TINY, "steps=2", "batch_size=2"]
    ends(command, 0)
    ends([*command, "overwrite=true"], 0)
    assert (here / "out").is_symlink()
    (here / "scratch" / "checkpoints" / "thesis.tex").write_text("x")
    assert "thesis.tex" in ends([*command, "overwrite=true"], 2)
    assert (here / "scratch" / "checkpoints" / "thesis.tex").read_text() == "x"


@pytest.mark.parametrize("values", [np.full(12, np.nan), np.full(12, np.inf)])
def test_weights_that_are_no_numbers_are_refused_where_they_are_read(values: np.ndarray, here: Path) -> None:
    import torch
    from safetensors.torch import save_file

    state = tiny_model(depth=1).state_dict()
    state["norm.weight"] = torch.from_numpy(values).float()
    save_file(state, here / "w.safetensors")
    for verb in (EMBED.replace("weights=run", "weights=w.safetensors"), f"{PRETRAIN} steps=2 init=w.safetensors"):
        assert "norm.weight is not finite" in ends(verb, 2)


NAMES = ["$\\frac{$_^{", "__b<i>|`", "=HYPERLINK(1)", "\x1b]0;owned\x07", "a\nFAKE", os.fsdecode(b"\xff"), "-rf", " "]


@pytest.mark.slow
def test_classes_of_any_name_are_measured_and_reported(here: Path) -> None:
    for number, name in enumerate(NAMES):
        (here / "odd" / name).mkdir(parents=True)
        for each in range(4):
            pattern(number % 3, 7 * number + each).save(here / "odd" / name / f"{each}.png")
    ends(EVAL.replace("eval data", "eval odd"), 0)
    pages = [path.read_text(encoding="utf-8") for path in (here / "out").rglob("*.html")]
    assert pages
    assert not any("<i>|`" in page for page in pages)
