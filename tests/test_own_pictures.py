"""One's own labelled pictures are evaluated as they are trained on, and no copy of a training picture is tested."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_runs import tiny_model, write_run

from dinoreg.commands.main import main

KNN = ["device=cpu", "protocols=[knn]", "knn.k=[1]", "precision=fp32", "report=false", "examples=0", "baselines=false"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    write_run(out, tiny_model())
    return out


def knn_of(data: Path, run: Path, out: Path) -> tuple[float, dict]:
    """Top-1 of k-NN on a folder or table, and the whole record."""
    assert main(["eval", str(data), f"weights={run}", f"out={out}", *KNN]) == 0
    (path,) = out.glob("eval/[0-9]*/*.json")
    record = json.loads(path.read_text())
    return record["rows"][0]["value"], record


def write_stripes(root: Path, save: Callable[[Path, np.ndarray], None], splits: bool = True) -> None:
    """Two classes, stripes across and down, with a random phase; `save(path, values in 0..1)`."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:64, :64]
    for name, ramp in (("across", rows), ("down", columns)):
        for number in range(20):
            wave = 0.5 + 0.45 * np.sin(ramp / 3 + rng.uniform(0, 2 * np.pi)) * rng.uniform(0.5, 1)
            split = ("test" if number % 4 == 0 else "train") if splits else ""
            path = root / split / name / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            save(path, wave)


@pytest.mark.parametrize("splits", [True, False])
def test_sixteen_bits_are_as_good_as_eight(splits: bool, run: Path, tmp_path: Path) -> None:
    def eight(path: Path, values: np.ndarray) -> None:
        Image.fromarray((values * 255).round().astype(np.uint8)).save(path)

    def sixteen(path: Path, values: np.ndarray) -> None:
        Image.fromarray((values * 255).round().astype(np.uint16) * 257).save(path)

    write_stripes(tmp_path / "deep8", eight, splits)
    write_stripes(tmp_path / "deep16", sixteen, splits)
    first, _ = knn_of(tmp_path / "deep8", run, tmp_path / "a")
    second, _ = knn_of(tmp_path / "deep16", run, tmp_path / "b")
    assert first == second > 0.8


def test_turned_transparent_and_palette_pictures_are_seen_as_in_training(run: Path, tmp_path: Path) -> None:
    def plain(path: Path, values: np.ndarray) -> None:
        Image.fromarray((values * 255).round().astype(np.uint8)).convert("RGB").save(path)

    def odd(path: Path, values: np.ndarray) -> None:
        picture = Image.fromarray((values * 255).round().astype(np.uint8)).convert("RGB")
        if path.stem < "10":  # stored on its side, turned upright by its tag
            exif = Image.Exif()
            exif[0x0112] = 6
            picture.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
        else:  # what is hidden behind full transparency is white, not what lies there
            alpha = Image.new("L", picture.size, 255)
            alpha.paste(0, (0, 0, 8, 8))
            hidden = picture.copy()
            hidden.paste((255, 0, 0), (0, 0, 8, 8))
            hidden.putalpha(alpha)
            hidden.save(path)

    write_stripes(tmp_path / "plain", plain)
    write_stripes(tmp_path / "odd", odd)
    assert knn_of(tmp_path / "odd", run, tmp_path / "b")[0] >= knn_of(tmp_path / "plain", run, tmp_path / "a")[0] > 0.8


def write_noise_with_copies(root: Path) -> None:
    """Pictures of noise with meaningless labels, each three times."""
    rng = np.random.default_rng(1)
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for number in range(20):
            picture = Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8))
            for copy in range(3):
                picture.save(root / name / f"{number:02d}_{copy}.png")


def test_copies_stay_on_one_side_so_that_noise_is_chance(run: Path, tmp_path: Path) -> None:
    write_noise_with_copies(tmp_path / "copies")
    value, record = knn_of(tmp_path / "copies", run, tmp_path / "out")
    # 8 different pictures are tested, 3 times each: all right by luck in 1 of 256 cases, 100 % where copies leak.
    assert value < 0.9
    assert not [warning for warning in record["warnings"] if "copies" in warning]


def test_copies_across_given_splits_are_a_warning(run: Path, tmp_path: Path) -> None:
    root = tmp_path / "splits"
    write_noise_with_copies(root / "train")
    for name in ("a", "b"):
        (root / "test" / name).mkdir(parents=True)
        for number in range(4):
            data = (root / "train" / name / f"{number:02d}_0.png").read_bytes()
            (root / "test" / name / f"{number}.png").write_bytes(data)
    Image.fromarray(np.random.default_rng(9).integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(
        root / "test" / "a" / "new.png"
    )
    _, record = knn_of(root, run, tmp_path / "out")
    copies = [warning for warning in record["warnings"] if "copies" in warning]
    assert copies == ["8 of 9 images of test are copies of training images"]


def test_a_folder_and_a_table_of_the_same_pictures_are_split_alike(run: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    root, lines = tmp_path / "photos", ["path,label"]
    for name in ("x", "y", "z"):
        (root / name).mkdir(parents=True)
        for number in range(15):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(root / name / f"{number}.png")
            lines.append(f"photos/{name}/{number}.png,{name}")
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(reversed(lines[1:])).join(["path,label\n", "\n"]))
    assert knn_of(root, run, tmp_path / "a")[0] == knn_of(table, run, tmp_path / "b")[0]
