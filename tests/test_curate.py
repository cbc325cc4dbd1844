"""Curation by features: planted copies are found, a planted rare kind is drawn by its weight, the page stays small."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import dinoreg
from dinoreg.commands.main import main
from dinoreg.data.open import open_source
from dinoreg.data.sampler import Sampler
from dinoreg.export.feature_file import RowFile
from dinoreg.runtime import places

KINDS, EACH, RARE, COPIES, DIM = 4, 60, 6, 9, 24


def features(path: Path, values: np.ndarray, names: list[str]) -> Path:
    rows = RowFile(path, {}, values.shape[1:], "float32", len(values), restart=False)
    rows.append(values)
    rows.reached(len(values))
    rows.finish(iter(names), {})
    return path


def planted(folder: Path) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Features around KINDS centres, the last of which is rare, and copies of the first COPIES images behind them."""
    rng = np.random.default_rng(0)
    kind = np.repeat(np.arange(KINDS), [EACH] * (KINDS - 1) + [RARE])
    centres = 4 * np.eye(KINDS, DIM)
    values = centres[kind] + rng.normal(size=(len(kind), DIM)) * 0.4
    values = np.concatenate([values, values[:COPIES] + rng.normal(size=(COPIES, DIM)) * 0.004]).astype(np.float32)
    kind = np.concatenate([kind, kind[:COPIES]])
    names = []
    for number, each in enumerate(kind):
        path = folder / f"kind {each}" / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 16), (60 * int(each), 9, 99)).save(path)
        names.append(str(path))
    return values, names, kind


@pytest.mark.parametrize(("suffix", "balance"), [(".parquet", 1.0), (".safetensors", 0.5)])
def test_planted_copies_are_left_out_and_the_rare_kind_is_drawn_by_its_weight(
    tmp_path: Path, suffix: str, balance: float
) -> None:
    values, names, kind = planted(tmp_path / "photos")
    file = features(tmp_path / f"f{suffix}", values, names)
    found = dinoreg.curate(file, tmp_path / "out", clusters=KINDS, balance=balance)
    with open(tmp_path / "out/copies.csv", newline="") as opened:
        copies = {row["path"]: row["copy_of"] for row in csv.DictReader(opened)}
    relative = [str(Path(name).relative_to(tmp_path / "photos")) for name in names]
    assert copies == {relative[len(kind) - COPIES + row]: relative[row] for row in range(COPIES)}
    assert (found.record["kept"], found.record["groups"]) == (len(kind) - COPIES, COPIES)
    assert [cluster[0] for cluster in found.record["clusters"]] == [RARE, EACH, EACH, EACH]
    drawn = open_source(found.list, root=found.root)
    sampler = Sampler(drawn.groups(), seed=0)
    ids = sampler.at(np.arange(8 * sampler.block))[0]
    rare = np.array([f"kind {KINDS - 1}" in drawn.name(int(index)) for index in range(len(drawn))])
    counts = np.array([RARE, EACH, EACH, EACH]) ** (1 - balance)
    assert rare[ids].mean() == pytest.approx(counts[0] / counts.sum(), abs=2e-3)
    page = found.page.read_text()
    for words in ("What is rare", "Copies", f"{len(kind):,}"):
        assert words in page
    assert {path.name for path in (tmp_path / "out/curation").glob("*.png")} == {"same.png", "rare.png", "common.png"}


def test_copies_are_those_that_a_search_over_all_pairs_finds(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=(400, 4)).astype(np.float32)
    names = [f"{tmp_path}/{number}.png" for number in range(400)]
    features(tmp_path / "f.parquet", values, names)
    found = dinoreg.curate(tmp_path / "f.parquet", tmp_path / "out", threshold=0.99, clusters=9)
    unit = values - values.mean(axis=0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    group = np.arange(400)
    for one, other in np.argwhere(unit @ unit.T >= 0.99):
        group[group == group[max(one, other)]] = group[min(one, other)]
    first = np.array([np.flatnonzero(group == each)[0] for each in group])
    with open(tmp_path / "out/copies.csv", newline="") as opened:
        copies = {row["path"]: row["copy_of"] for row in csv.DictReader(opened)}
    assert copies == {f"{row}.png": f"{first[row]}.png" for row in range(400) if first[row] != row}
    assert len(copies) > 20
    assert found.record["copies"] == len(copies)


@pytest.mark.slow
def test_a_hundred_thousand_rows_make_a_page_that_can_be_read(tmp_path: Path) -> None:
    values, names, _ = planted(tmp_path / "photos")
    rng = np.random.default_rng(2)
    many = np.concatenate([values, rng.normal(size=(100_000, DIM)).astype(np.float32) * 3])
    file = features(tmp_path / "f.parquet", many, names + [f"{tmp_path}/gone/{n}.png" for n in range(100_000)])
    found = dinoreg.curate(file, tmp_path / "out")
    assert len(found.page.read_bytes()) < 1 << 20
    assert COPIES <= found.record["copies"] < 1000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["features=photos"], "expected a file that embed wrote"),
        (["features=other.safetensors"], "is no whole file of features"),
        (["features=patches.parquet"], "expected one of an image"),
        (["features=scenes.parquet"], "cannot be listed"),
        (["features=nan.parquet"], "expected finite numbers, and a name for each of the 2 rows"),
        (["features=huge.parquet"], "expected finite numbers"),
        (["features=nameless.parquet"], "a name for each of the 2 rows"),
        (["features=two.parquet", "root=other"], "the images lie below /"),
        (["features=two.parquet", "clusters=9"], "clusters=9: more than the 2 images"),
    ],
)
def test_what_cannot_be_curated_is_said_before_anything_is_written(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    save_file({"x": np.zeros(3, np.float32)}, "other.safetensors")
    features(tmp_path / "patches.parquet", np.ones((2, 3, 4), np.float32), ["/a", "/b"])
    features(tmp_path / "scenes.parquet", np.ones((2, 4), np.float32), ["scenes:1", "scenes:2"])
    features(tmp_path / "nan.parquet", np.full((2, 4), np.nan, np.float32), ["/a.png", "/b.png"])
    features(tmp_path / "huge.parquet", np.full((2, 4), 3e38, np.float32), ["/a.png", "/b.png"])
    features(tmp_path / "nameless.parquet", np.eye(2, 4, dtype=np.float32), ["/a.png", ""])
    features(tmp_path / "two.parquet", np.eye(2, 4, dtype=np.float32), ["/a.png", "/b.png"])
    assert main(["curate", *arguments, "out=out"]) == 2
    assert words in capsys.readouterr().err
    assert not Path("out").exists()


def test_images_at_a_url_are_only_asked_for_where_the_user_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = fsspec.filesystem("memory")
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16)).save(buffer, "PNG")
    names = [f"memory://curated/{number}.png" for number in range(4)]
    for name in names:
        store.pipe(name, buffer.getvalue())
    file = features(tmp_path / "f.parquet", np.eye(4, 8, dtype=np.float32), names)
    with monkeypatch.context() as patched:
        patched.setattr(places, "filesystem", lambda url: pytest.fail(f"{url} was asked for"))
        assert main(["curate", f"features={file}", f"out={tmp_path}/out"]) == 0
    assert "root=memory://curated" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.png"))
    assert main(["curate", f"features={file}", f"out={tmp_path}/shown", "root=memory://curated"]) == 0
    assert list((tmp_path / "shown").rglob("*.png"))
    assert len(open_source(tmp_path / "out/curated.csv", root="memory://curated")) == 4
    store.rm("/curated", recursive=True)
