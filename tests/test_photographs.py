"""Whole runs on a folder as people have them: real photographs, mixed formats and sizes, and files that are none.

The photographs are those that scikit-image and scikit-learn carry in their packages.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from training import TINY, loss_trace, read_lines
from warm_interpreter import RUN_IMPORTS, WarmInterpreter, WarmProcess

import dinoreg
from dinoreg.checkpoint import format as checkpoint
from dinoreg.commands.main import main
from dinoreg.runtime.errors import UserError

# As a folder under the root, a file, and the longest side it is stored with.
PLACES = {
    "astronaut": ("people", "astronaut.JPG", 500),
    "camera": ("people", "camera.png", 320),
    "chelsea": ("animals/cats", "chelsea.webp", 451),
    "flower": ("animals/../plants", "flower.bmp", 260),
    "coffee": ("things/kitchen", "coffee.tif", 300),
    "coins": ("things", "coins.TIFF", 384),
    "page": ("things", "page.jpeg", 384),
    "rocket": ("things/far/away", "rocket.PNG", 400),
    "china": (".", "china.jpg", 640),
    "retina": ("things/medical", "retina.WebP", 333),
}
ODD = ("odd/cmyk.jpg", "odd/deep.png", "odd/deep.tiff", "odd/turned.jpg", "odd/palette.png", "odd/alpha.png")
BAD = {
    "people/cut.jpg": "",  # a decoder's own words
    "things/notes.jpg": "not an image in a known format",
    "things/dot.png": "1x1 pixels, the shorter side is below 2",
    "empty.jpeg": "the file is empty",
}


def photographs() -> dict[str, Image.Image]:
    china, flower = load_sample_images().images
    pictures = {"china": china, "flower": flower}
    for name in ("astronaut", "camera", "chelsea", "coffee", "coins", "page", "rocket", "retina"):
        pictures[name] = getattr(skimage.data, name)()
    return {name: Image.fromarray(pixels) for name, pixels in pictures.items()}


def small(image: Image.Image, longest: int) -> Image.Image:
    copy = image.copy()
    copy.thumbnail((longest, longest))
    return copy


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten photographs in nested folders, six odd files that can be used, four that cannot. Read only."""
    root = tmp_path_factory.mktemp("album")
    pictures = photographs()
    for name, (folder, file, longest) in PLACES.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        small(pictures[name], longest).save((root / folder / file).resolve())
    odd = root / "odd"
    odd.mkdir()
    pictures["rocket"].resize((320, 214)).convert("CMYK").save(odd / "cmyk.jpg")
    deep = np.asarray(small(pictures["camera"], 200)).astype(np.uint16) * 257
    Image.fromarray(deep).save(odd / "deep.png")
    Image.fromarray(deep[:, :150]).save(odd / "deep.tiff")
    turned = Image.Exif()
    turned[0x0112] = 6
    small(pictures["coffee"], 240).save(odd / "turned.jpg", exif=turned)
    small(pictures["chelsea"], 240).convert("P", palette=Image.Palette.ADAPTIVE).save(odd / "palette.png")
    cut_out = small(pictures["flower"], 240).convert("RGBA")
    cut_out.putalpha(small(pictures["flower"], 240).convert("L"))
    cut_out.save(odd / "alpha.png")

    whole = io.BytesIO()
    small(pictures["astronaut"], 300).save(whole, "JPEG")
    (root / "people" / "cut.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (root / "things" / "notes.jpg").write_text("a list of things to buy\n")
    Image.new("RGB", (1, 1), (10, 20, 30)).save(root / "things" / "dot.png")
    (root / "empty.jpeg").touch()
    (root / "README.md").write_text("not asked for\n")
    return root


NUM_FILES = len(PLACES) + len(ODD) + len(BAD)


def command(verb: str, *arguments: object, **overrides: object) -> list[str]:
    """The tiny run as it is typed; `overrides` by dotted key, with `__` for the dot."""
    keys: dict[str, object] = {}
    if verb == "pretrain":
        keys = {key: value for key, value in TINY.items() if key != "data.source"}
        keys |= {"steps": 12, "checkpoint.every": 4}
    keys |= {key.replace("__", "."): value for key, value in overrides.items()}
    spelled = [
        f"{key}={json.dumps(value) if not isinstance(value, (str, Path)) else value}" for key, value in keys.items()
    ]
    return [verb, *map(str, arguments), *(item.replace("=null", "=none") for item in spelled)]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A config of one's own that leaves everything to the command line."""
    path = tmp_path / "own.yaml"
    path.write_text("seed: 3\n")
    return path


@pytest.fixture(scope="module")
def interpreter() -> Iterator[WarmInterpreter]:
    with WarmInterpreter(*RUN_IMPORTS) as started:
        yield started


def start(interpreter: WarmInterpreter, arguments: list[str]) -> WarmProcess:
    return interpreter.start([sys.executable, "-m", "dinoreg", *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"})


def finish(run: WarmProcess) -> tuple[int, str, str]:
    return run.wait(600), run.output(), run.errors()


def steps_written(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def skipped(out: Path, root: Path) -> dict[str, str]:
    lines = read_lines(out / "skipped.jsonl")
    assert len({line["name"] for line in lines}) == len(lines), "a file is listed twice"
    return {os.path.relpath(line["name"], root): line["reason"] for line in lines}


def assert_names_the_bad_files(found: dict[str, str]) -> None:
    assert sorted(found) == sorted(BAD)
    for name, reason in BAD.items():
        assert found[name], name
        if reason:
            assert found[name] == reason


@pytest.mark.slow
def test_a_folder_of_photographs_trains_is_stopped_resumes_and_lists_what_it_skipped(
    album: Path, plain: Path, tmp_path: Path, interpreter: WarmInterpreter
) -> None:
    """Through the command line; the traces of an unbroken run and of one stopped by SIGTERM are the same."""
    # 60 steps of 6 are 18 passes over the files, bad ones included.
    steps = 60
    whole = command("pretrain", plain, data=album, out=tmp_path / "whole", steps=steps)
    code, printed, errors = finish(start(interpreter, whole))
    assert code == 0, errors
    assert f"report: {tmp_path / 'whole' / 'report.html'}" in printed
    assert len(loss_trace(tmp_path / "whole")) == steps
    assert all(np.isfinite(loss_trace(tmp_path / "whole")).ravel())
    assert_names_the_bad_files(skipped(tmp_path / "whole", album))
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "<html" in page

    out = tmp_path / "parts"
    arguments = command("pretrain", plain, data=album, out=out, steps=steps)
    first = start(interpreter, arguments)
    while first.poll() is None and steps_written(out) < 5:
        time.sleep(0.005)
    first.send_signal(signal.SIGTERM)
    code, _, errors = finish(first)
    assert code == 128 + signal.SIGTERM, errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith("dinoreg: stopped by SIGTERM after step")
    assert "resume=true" in last
    reached = steps_written(out)
    assert 5 <= reached < steps
    assert checkpoint.read_pointer(out / "checkpoints", "last") == checkpoint.step_name(reached)
    code, _, errors = finish(start(interpreter, arguments))
    assert (code, errors.count("\n")) == (2, 1)
    assert "resume=true" in errors

    code, _, errors = finish(start(interpreter, [*arguments, "resume=true"]))
    assert code == 0, errors
    assert f"resumed from {out / 'checkpoints' / checkpoint.step_name(reached)}" in errors
    assert loss_trace(out) == loss_trace(tmp_path / "whole")
    assert_names_the_bad_files(skipped(out, album))


@pytest.mark.slow
def test_a_run_stopped_before_the_second_pass_keeps_the_list_of_the_first(
    album: Path, plain: Path, tmp_path: Path
) -> None:
    """A resumed run starts with the list of its checkpoint: bad files of earlier passes stay on it."""
    out = tmp_path / "run"
    assert main(command("pretrain", plain, data=album, out=out, steps=8)) == 0  # 48 draws of 20 files
    assert_names_the_bad_files(skipped(out, album))
    (out / "skipped.jsonl").unlink()
    # One more step meets at most six files; the list is whole all the same.
    assert main(command("pretrain", plain, data=album, out=out, steps=9, resume=True)) == 0
    assert_names_the_bad_files(skipped(out, album))


def test_inspect_names_the_same_bad_files_and_uses_the_odd_ones(
    album: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", f"data={album}"]) == 0
    shown = capsys.readouterr().out
    assert f"{NUM_FILES} images, {NUM_FILES} looked at" in shown
    assert f"bad: {len(BAD)}\n" in shown
    rows = [line.strip() for line in shown.split(f"bad: {len(BAD)}\n")[1].splitlines()[: len(BAD)]]
    named = dict(row.split(": ", 1) for row in rows)
    assert_names_the_bad_files({os.path.relpath(name, album): reason for name, reason in named.items()})
    for kind in ("CMYK", "uint16 x 1", "RGBA", "P ", "JPEG", "PNG", "WEBP", "TIFF", "BMP"):
        assert kind in shown, kind


@pytest.mark.slow
def test_every_good_file_of_the_folder_trains(album: Path, plain: Path, tmp_path: Path) -> None:
    """Each as the only file of its folder: with no other to take its place, a bad one ends the run."""
    names = [str(Path(folder) / file) for folder, file, _ in PLACES.values()] + list(ODD)
    for number, name in enumerate(names):
        alone = tmp_path / f"alone{number}"
        alone.mkdir()
        file = alone / Path(name).name
        file.write_bytes((album / name).read_bytes())
        run = dinoreg.pretrain(
            None,
            **{**TINY, "data.source": str(alone), "steps": 1, "batch_size": 2, "out": str(tmp_path / f"run{number}")},
        )
        assert np.isfinite(loss_trace(run)).all(), name
        assert not (run / "skipped.jsonl").exists(), name


def test_the_first_bad_file_ends_a_run_that_allows_none(
    album: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(command("pretrain", plain, data=album, out=out, data__max_bad_fraction=0.0)) == 1
    last = capsys.readouterr().err.rstrip("\n").splitlines()[-1]
    assert last.startswith("dinoreg: data: ")
    assert "more than data.max_bad_fraction=0.0 allows" in last
    assert f"(log: {out / 'train.log'})" in last
    listed = skipped(out, album)
    assert set(listed) <= set(BAD)
    assert listed
    for name in listed:
        assert str(album / name) in last


@pytest.mark.slow
def test_too_large_a_share_of_bad_files_ends_the_run_with_one_line_and_the_list(
    album: Path, plain: Path, tmp_path: Path, interpreter: WarmInterpreter
) -> None:
    """In a process of its own: exit code, the last line on stderr and nothing else of an error there."""
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "good.jpg").write_bytes((album / "china.jpg").read_bytes())
    names = [f"bad_{number:02d}.jpg" for number in range(14)]
    for name in names:
        (photos / name).write_text("not a picture\n")
    out = tmp_path / "run"
    arguments = command("pretrain", plain, data=photos, out=out, data__max_bad_fraction=0.5)
    code, _, errors = finish(start(interpreter, arguments))
    assert code == 1
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith("dinoreg: ")]
    assert "bad images among" in line
    assert "data.max_bad_fraction=0.5" in line
    listed = skipped(out, photos)
    assert len(listed) > 10
    assert set(listed) <= set(names)
    assert set(listed.values()) == {"not an image in a known format"}
    # The same folder is fine for who allows it.
    again = command("pretrain", plain, data=photos, out=out, data__max_bad_fraction=1.0, overwrite=True, steps=3)
    assert main(again) == 0


def test_a_folder_without_one_usable_image_ends_in_words(plain: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "only.jpg").write_text("not a picture\n")
    values = {**TINY, "data.source": str(photos), "out": str(tmp_path / "run")}
    with pytest.raises(UserError, match=r"only\.jpg: not an image in a known format"):
        dinoreg.pretrain(plain, **values)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_several_folders_are_drawn_by_their_weights(album: Path, plain: Path, tmp_path: Path) -> None:
    """Through the command line; which files were drawn shows in the ids of rejected steps, here in the index."""
    out = tmp_path / "run"
    folders = f"[{album / 'people'}, {album / 'things'}, {album / 'plants'}]"
    assert main(command("pretrain", plain, data=folders, out=out, data__weights=[1, 1, 2])) == 0
    assert len(loss_trace(out)) == 12
    assert {name for name in BAD if name.startswith(("people", "things"))} == set(skipped(out, album))
    evenly = tmp_path / "evenly"
    assert main(command("pretrain", plain, data=folders, out=evenly)) == 0
    assert loss_trace(evenly) != loss_trace(out)
    assert main(command("pretrain", plain, data=folders, out=tmp_path / "x", data__weights=[1, 1])) == 2
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_list_of_paths_trains_on_the_files_it_names(album: Path, plain: Path, tmp_path: Path) -> None:
    names = ["china.jpg", "people/astronaut.JPG", "odd/cmyk.jpg", "odd/deep.tiff", "things/dot.png", "gone.jpg"]
    table = album / "list.csv"
    table.write_text("id,path\n" + "".join(f"{number},{name}\n" for number, name in enumerate(names)))
    try:
        out = tmp_path / "run"
        assert main(command("pretrain", plain, data=table, out=out)) == 0
        assert skipped(out, album) == {
            "things/dot.png": BAD["things/dot.png"],
            "gone.jpg": "cannot be read: No such file or directory",
        }
        assert f"{len(names)} images" in (out / "train.log").read_text()
        elsewhere = tmp_path / "list.csv"
        elsewhere.write_text(table.read_text())
        again = tmp_path / "again"
        assert main(command("pretrain", plain, data=elsewhere, out=again, data__root=album)) == 0
        assert loss_trace(again) == loss_trace(out)
    finally:
        table.unlink()


def test_the_python_api_trains_on_the_folder_and_loads_the_run(album: Path, tmp_path: Path) -> None:
    values = {key: value for key, value in TINY.items() if key not in ("data.source", "steps", "batch_size")}
    run = dinoreg.pretrain(data=str(album), out=str(tmp_path / "run"), steps=4, batch_size=5, **values)
    assert run == tmp_path / "run"
    assert set(skipped(run, album)) <= set(BAD)
    model = dinoreg.load(run)
    assert not model.training
    with torch.no_grad():
        tokens = model(torch.zeros(2, 3, 40, 24))
    assert tokens.cls.shape == (2, 32)
    assert tokens.registers.shape == (2, 4, 32)
    assert tokens.patches.shape == (2, 15, 32)
    # The same weights as in the teacher's file, by the name of the file as by that of the run.
    file = run / "teacher" / "step_0000004.safetensors"
    for name, value in dinoreg.load(file).state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.slow
def test_a_probe_on_labelled_photographs_reads_them_through_the_same_decoder(
    album: Path, plain: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = command("pretrain", plain, data=album, out=out, probe__every=6, probe__data=album)
    assert main(arguments) == 0
    lines = read_lines(out / "probe.jsonl")
    assert [line["step"] for line in lines] == [0, 6, 12]
    assert all(0.0 <= line["knn_top1"] <= 1.0 and line["rankme"] >= 1.0 for line in lines)
