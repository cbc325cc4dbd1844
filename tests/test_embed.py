"""`dinoreg embed`: features with their paths in one file, whatever happens on the way."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file
from small_runs import MEAN, STD, tiny_model, write_run

import dinoreg.commands.embed as verb
import dinoreg.export.feature_file as files
from dinoreg.commands.embed import embed_command
from dinoreg.commands.main import main
from dinoreg.commands.options import TOKENS, EmbedOptions
from dinoreg.data.statistics import LOOKED_AT
from dinoreg.export.feature_file import skipped_list
from dinoreg.runtime import parallel
from dinoreg.runtime.errors import Interrupted, RunError, UserError
from dinoreg.scenes.render import render_image

COUNT, SIZE = 11, 32


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", tiny_model(image_size=SIZE))


def options(run: Path, out: Path, **changes: Any) -> EmbedOptions:
    values = {"data": f"scenes:count={COUNT},size={SIZE}", "weights": str(run), "out": str(out), "batch_size": 4}
    return EmbedOptions(**{**values, "device": "cpu", "precision": "fp32", "workers": 0, **changes})


def read_features(path: Path) -> tuple[np.ndarray, list[str]]:
    """(features (n, ...), paths (n,)) as anybody reads them, with the library of the format."""
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        block, ends = tensors["paths"].tobytes(), [0, *tensors["path_ends"].tolist()]
        return tensors["features"], [os.fsdecode(block[a:b]) for a, b in itertools.pairwise(ends)]
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    shape = [int(side) for side in table.schema.metadata[b"shape"].decode().split("x")]
    flat = table.column("features").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(table), *shape), table.column("path").to_pylist()


def literal(token: str) -> np.ndarray:
    """The features of the scenes, one image at a time, straight from the model."""
    rows = []
    for index in range(COUNT):
        pixels = torch.from_numpy(render_image(index, SIZE, 0).copy()).permute(2, 0, 1).float() / 255
        image = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        with torch.no_grad():
            tokens = tiny_model(image_size=SIZE)(image[None])
        mean = tokens.patches[0].mean(dim=0)
        parts = {"cls": tokens.cls[0], "mean": mean, "patches": tokens.patches[0]}
        rows.append(torch.cat([tokens.cls[0], mean]) if token == "cls+mean" else parts[token])
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("suffix", [".safetensors", ".parquet"])
@pytest.mark.parametrize("token", TOKENS)
def test_features_are_the_models_tokens_beside_their_names(
    token: str, suffix: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_CHUNK", 200)  # several row groups
    out = embed_command(options(run, tmp_path / f"features{suffix}", token=token))
    features, names = read_features(out)
    np.testing.assert_allclose(features, literal(token), atol=2e-5)
    assert features.dtype == np.float32
    assert names == [f"scenes:{index}" for index in range(COUNT)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"features{suffix}", "run"]
    half = read_features(embed_command(options(run, tmp_path / f"half{suffix}", token=token, dtype="float16")))[0]
    assert half.dtype == np.float16
    assert (half == features.astype(np.float16)).all()


def test_the_file_is_plain_safetensors_that_says_how_it_was_made(run: Path, tmp_path: Path) -> None:
    out = embed_command(options(run, tmp_path / "f.safetensors", image_size=16, token="patches"))
    with safe_open(out, framework="numpy") as file:
        assert sorted(file.keys()) == ["features", "path_ends", "paths"]
        about = file.metadata()
        assert file.get_tensor("features").shape == (COUNT, 4, 12)
    assert (about["format"], about["token"], about["image_size"], about["patch_size"]) == (
        "dinoreg-features",
        "patches",
        "16",
        "8",
    )
    assert about["weights"] == "run at step 7"


def test_parquet_is_read_by_others(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet

    monkeypatch.setattr(files, "_CHUNK", 5 * 48)
    out = embed_command(options(run, tmp_path / "f.parquet"))
    file = pyarrow.parquet.ParquetFile(out)
    assert file.num_row_groups == 3  # 5 + 5 + 1 rows
    assert file.schema_arrow.names == ["path", "features"]
    row = file.read().to_pylist()[10]
    assert row["path"] == "scenes:10"
    np.testing.assert_allclose(row["features"], literal("cls")[10], atol=2e-5)


@pytest.mark.parametrize("suffix", [".safetensors", ".parquet"])
def test_bad_images_are_left_out_counted_and_listed(
    suffix: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(7):
        Image.new("RGB", (40 + number, 36), (30 * number, 9, 200)).save(photos / f"{number}.png")
    (photos / "1.png").write_bytes(b"")
    (photos / "4.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    out = tmp_path / f"f{suffix}"
    embed_command(options(run, out, data=str(photos), batch_size=2))
    features, names = read_features(out)
    assert names == [str(photos / f"{number}.png") for number in (0, 2, 3, 5, 6)]
    alone = read_features(embed_command(options(run, tmp_path / f"one{suffix}", data=str(photos / "5.png"))))[0]
    np.testing.assert_allclose(features[3], alone[0], atol=1e-5)
    listed = [json.loads(line) for line in skipped_list(out).read_text().splitlines()]
    assert [(each["index"], each["name"]) for each in listed] == [(i, str(photos / f"{i}.png")) for i in (1, 4)]
    assert listed[0]["reason"] == "the file is empty"
    assert f"5 images, 12 numbers each; 2 left out, listed in {out}.skipped.jsonl" in capsys.readouterr().err
    (photos / "1.png").unlink()
    (photos / "4.png").unlink()
    embed_command(options(run, out, data=str(photos), overwrite=True))
    assert not skipped_list(out).exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".parquet"])
def test_odd_names_come_back(suffix: str, run: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    names = ["line\nbreak.png", "uml\u00e4ut.png", os.fsdecode(b"\xff.png")]
    for name in names:
        Image.new("RGB", (20, 20)).save(photos / name, format="PNG")
    found = read_features(embed_command(options(run, tmp_path / f"f{suffix}", data=str(photos))))[1]
    shown = {str(photos / name) for name in names}
    if suffix == ".parquet":  # text only: the odd byte is written out
        shown = {name.replace("\udcff", "\\xff") for name in shown}
    assert set(found) == shown


class Stop(BaseException):
    """What a kill is to Python code: nothing runs after it."""


def stop_after(monkeypatch: pytest.MonkeyPatch, batches: int, error: BaseException) -> list[int]:
    """Have the computation of a later batch raise; returns the sizes of the batches that were computed."""
    whole, sizes = verb.features, []

    def features(encoder: Any, images: torch.Tensor, *arguments: Any) -> np.ndarray:
        if len(sizes) == batches:
            raise error
        sizes.append(len(images))
        return whole(encoder, images, *arguments)

    monkeypatch.setattr(verb, "features", features)
    return sizes


@pytest.mark.parametrize("suffix", [".safetensors", ".parquet"])
@pytest.mark.parametrize("note_seconds", [0.0, 1e9])
def test_a_killed_embed_goes_on_and_equals_an_unbroken_one(
    note_seconds: float, suffix: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(COUNT):
        Image.new("RGB", (40, 36), (20 * number, 9, 200)).save(photos / f"{number:02d}.png")
    for number in (2, 9):
        (photos / f"{number:02d}.png").write_bytes(b"torn")
    whole = embed_command(options(run, tmp_path / f"whole{suffix}", data=str(photos)))
    out = tmp_path / f"broken{suffix}"
    monkeypatch.setattr(files, "NOTE_SECONDS", note_seconds)
    with monkeypatch.context() as patch:
        stop_after(patch, 2, Stop())
        with pytest.raises(Stop):
            embed_command(options(run, out, data=str(photos)))
    assert not out.exists()
    part = tmp_path / f"broken{suffix}.part"
    with open(part / "rows.bin", "ab") as rows:
        rows.write(b"half a row")  # of the batch that the kill met
    sizes = stop_after(monkeypatch, 9, Stop())
    embed_command(options(run, out, data=str(photos)))
    assert sizes == ([2] if note_seconds == 0 else [3, 4, 2])
    assert out.read_bytes() == whole.read_bytes()
    assert skipped_list(out).read_bytes() == skipped_list(whole).read_bytes()
    assert not part.exists()


def test_control_c_says_how_to_go_on(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 1, KeyboardInterrupt())
        with pytest.raises(Interrupted, match="interrupted after 4 of 11 images; the same command goes on"):
            embed_command(options(run, tmp_path / "f.safetensors"))
    sizes = stop_after(monkeypatch, 9, Stop())
    embed_command(options(run, tmp_path / "f.safetensors"))
    assert sizes == [4, 3]


def test_a_finished_file_is_kept_unless_it_may_be_overwritten(run: Path, tmp_path: Path) -> None:
    out = embed_command(options(run, tmp_path / "f.safetensors"))
    before = out.read_bytes()
    with pytest.raises(UserError, match=r"is finished already; use overwrite=true"):
        embed_command(options(run, out))
    assert out.read_bytes() == before
    embed_command(options(run, out, token="mean", overwrite=True))
    np.testing.assert_allclose(read_features(out)[0], literal("mean"), atol=2e-5)


def test_an_unfinished_file_with_other_keys_is_not_mixed_up(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "f.safetensors"
    with monkeypatch.context() as patch:
        stop_after(patch, 1, Stop())
        with pytest.raises(Stop):
            embed_command(options(run, out))
    held = sorted((path.name, path.read_bytes()) for path in (tmp_path / "f.safetensors.part").iterdir())
    others = [
        ({"token": "mean"}, "token=cls, not mean"),
        ({"dtype": "float16"}, "dtype=float32, not float16"),
        ({"image_size": 16}, "image_size=32, not 16"),
        ({"data": "scenes:count=12,size=32"}, "data="),
        ({"weights": "random:vitt8_reg0"}, "weights=run at step 7, not"),
    ]
    for changes, words in others:
        with pytest.raises(UserError, match=words):
            embed_command(options(run, out, **changes))
    assert sorted((path.name, path.read_bytes()) for path in (tmp_path / "f.safetensors.part").iterdir()) == held
    embed_command(options(run, out, token="mean", overwrite=True))
    np.testing.assert_allclose(read_features(out)[0], literal("mean"), atol=2e-5)


@pytest.mark.parametrize("note", ["", "{}", "[1]", '{"settings": 1, "next": "x", "rows": 0, "skipped": 0}'])
def test_a_torn_note_begins_anew(note: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "f.safetensors"
    with monkeypatch.context() as patch:
        stop_after(patch, 1, Stop())
        with pytest.raises(Stop):
            embed_command(options(run, out))
    (tmp_path / "f.safetensors.part" / "note.json").write_text(note)
    embed_command(options(run, out, overwrite=note.startswith('{"s')))
    np.testing.assert_allclose(read_features(out)[0], literal("cls"), atol=2e-5)


@pytest.mark.parametrize("damage", ["a bit", "a note that goes too far"])
def test_rows_that_are_not_as_they_were_written_are_computed_anew(
    damage: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, part = tmp_path / "f.safetensors", tmp_path / "f.safetensors.part"
    with monkeypatch.context() as patch:
        patch.setattr("dinoreg.export.feature_file.NOTE_SECONDS", 0.0)
        stop_after(patch, 2, Stop())
        with pytest.raises(Stop):
            embed_command(options(run, out))
    if damage == "a bit":
        rows = bytearray((part / "rows.bin").read_bytes())
        rows[-3] ^= 1
        (part / "rows.bin").write_bytes(rows)
    else:
        note = json.loads((part / "note.json").read_text())
        (part / "note.json").write_text(json.dumps({**note, "next": note["next"] + 1}))
    embed_command(options(run, out))
    assert "not as it was written" in capsys.readouterr().err
    np.testing.assert_allclose(read_features(out)[0], literal("cls"), atol=2e-5)


def test_somebody_elses_folder_is_not_deleted(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "f.safetensors.part"
    other.mkdir()
    (other / "diary.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="is in the way"):
            embed_command(options(run, tmp_path / "f.safetensors", overwrite=overwrite))
    assert (other / "diary.txt").read_text() == "mine"


def test_only_a_few_images_are_read_ahead(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dinoreg.data import source

    read: list[int] = []
    inner = source.ScenesSource.read

    def counting(self: Any, index: int) -> np.ndarray:
        read.append(index)
        return inner(self, index)

    monkeypatch.setattr(source.ScenesSource, "read", counting)
    seen: list[int] = []
    inner_append = files.RowFile.append

    def append(self: files.RowFile, rows: np.ndarray) -> None:
        seen.append(len(read))
        inner_append(self, rows)

    monkeypatch.setattr(files.RowFile, "append", append)
    embed_command(options(run, tmp_path / "f.safetensors", data="scenes:count=100,size=32", workers=2, image_size=16))
    assert len(seen) == 25
    assert all(ahead <= LOOKED_AT + 4 * (number + 1) + 4 * 2 for number, ahead in enumerate(seen))


def test_archives_are_embedded_without_unpacking(run: Path, tmp_path: Path, photo_folder: Path) -> None:
    photos = sorted((photo_folder / "a").iterdir())
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "photos.tar", "w") as archive:
        for photo in photos:
            archive.add(photo, photo.name)
    plain = read_features(embed_command(options(run, tmp_path / "a.safetensors", data=str(photo_folder / "a"))))[0]
    for number, data in enumerate((tmp_path / "tars", tmp_path / "tars" / "photos.tar")):
        features, names = read_features(
            embed_command(options(run, tmp_path / f"b{number}.safetensors", data=str(data)))
        )
        assert (features == plain).all()
        assert names == [f"{tmp_path}/tars/photos.tar:{photo.name}" for photo in photos]


# Failures


def test_no_readable_image_is_a_failure_in_one_line(run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"the first: .*a\.png: not an image"):
        embed_command(options(run, tmp_path / "f.safetensors", data=str(tmp_path / "a.png")))
    assert not list(tmp_path.glob("f.*"))


def test_a_feature_that_is_not_finite_names_its_image(tmp_path: Path) -> None:
    model = tiny_model(image_size=SIZE)
    with torch.no_grad():
        model.norm.weight.fill_(1e6)
    run = write_run(tmp_path / "run", model)
    with pytest.raises(RunError, match="scenes:0: its feature is not finite; dtype=float32 holds larger numbers"):
        embed_command(options(run, tmp_path / "f.safetensors", dtype="float16"))


def test_a_full_disk_is_one_line_and_loses_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "f.safetensors"

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.RowFile, "reached", full)
        with pytest.raises(RunError, match="No space left on device"):
            embed_command(options(run, out))
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        with pytest.raises(RunError, match="No space left on device"):
            embed_command(options(run, out))
    embed_command(options(run, out))
    assert len(read_features(out)[1]) == COUNT


def test_a_disk_that_is_too_small_is_known_before_anything_is_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage._replace(free=COUNT * 16 * 12 * 4 - 1))
    with pytest.raises(UserError, match="11 rows need"):
        embed_command(options(run, tmp_path / "new" / "f.safetensors", token="patches"))
    assert not (tmp_path / "new").exists()
    embed_command(options(run, tmp_path / "new" / "f.safetensors", token="patches", dtype="float16"))


def test_parquet_without_pyarrow_names_the_extra(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'dinoreg\[data\]'"):
        embed_command(options(run, tmp_path / "f.parquet"))
    assert not (tmp_path / "f.parquet.part").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["data="], "data=: expected"),
        (["data=nowhere"], "data: nowhere does not exist"),
        (["weights=nowhere"], "weights 'nowhere'"),
        (["out=features.npz"], "out=features.npz: expected the name of a file that ends in .safetensors or .parquet"),
        (["out=a.png/f.safetensors"], "out=a.png/f.safetensors: a.png is a file, expected a folder"),
        (["out=d.safetensors"], "out=d.safetensors: is a folder"),
        (["token=clss"], "token=clss: expected cls, mean, cls+mean or patches; did you mean cls?"),
        (["dtype=float64"], "dtype=float64: expected float32 or float16"),
        (["precision=low"], "precision=low: expected auto"),
        (["image_size=30"], "image_size=30: expected a multiple of the patch size 8, as 24 or 32"),
        (["image_size=0"], "image_size=0: expected a number of pixels in"),
        (["batch_size=0"], "batch_size=0: expected a number in"),
        (["batch_size=x"], "batch_size=x: expected a whole number"),
        (["workers=-1"], "workers=-1: expected a number in [0, 1024]"),
        (["device=tpu"], "device=tpu: expected auto"),
        (["tokens=cls"], "tokens: unknown key (command line); did you mean token?"),
        (["photos"], "data: given twice"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_nothing_is_written(
    changes: list[str],
    expected: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 40)).save("a.png")
    Path("d.safetensors").mkdir()
    before = sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts)
    usual = ["data=scenes:count=3,size=32", "weights=run", "out=f.safetensors"]
    given = {each.partition("=")[0] for each in changes}
    assert main(["embed", *(each for each in usual if each.partition("=")[0] not in given), *changes]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"dinoreg: {expected}")
    assert captured.err.count("\n") == 1
    assert sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts) == before


@pytest.mark.parametrize("key", ["data", "weights", "out"])
def test_what_must_be_given_is_named(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embed", *(f"{each}=x" for each in ("data", "weights", "out") if each != key)]) == 2
    assert capsys.readouterr().err.startswith(f"dinoreg: {key}= is missing: ")


def test_the_command_line_writes_the_file_and_says_where(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "SHOW_SECONDS", 0.0)
    out = tmp_path / "f.safetensors"
    data = f"scenes:count={COUNT},size={SIZE}"
    assert main(["embed", f"data=[{data.replace(',', ';')}]", f"weights={run}", f"out={out}"]) == 2
    capsys.readouterr()
    assert main(["embed", f"data={data}", f"weights={run}", f"out={out}", "batch_size=4", "precision=fp32"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"features: {out}\n"
    assert "embed: 8/11 " in captured.err
    assert "images/s" in captured.err
    np.testing.assert_allclose(read_features(out)[0], literal("cls"), atol=2e-5)
