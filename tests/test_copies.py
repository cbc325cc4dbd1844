"""Copies are found whatever was done to the file, and different pictures are not taken for copies."""

import io
from pathlib import Path

import numpy as np
import skimage.data
import tifffile
import torch
import torch.nn.functional as F
from PIL import Image

from dinoreg.data.copies import find_copies
from dinoreg.data.open import open_source

NAMES = ("astronaut", "coffee", "chelsea", "rocket")


def groups_of(folder: Path) -> dict[str, int]:
    source = open_source(folder)
    groups = find_copies(source).groups
    return {Path(source.name(index)).name: int(groups[index]) for index in range(len(source))}


def test_equal_resaved_and_resized_pictures_are_one_and_others_are_not(tmp_path: Path) -> None:
    for name in NAMES:
        picture = Image.fromarray(getattr(skimage.data, name)())
        picture.save(tmp_path / f"{name}_0.png")
        (tmp_path / f"{name}_1.png").write_bytes((tmp_path / f"{name}_0.png").read_bytes())
        picture.save(tmp_path / f"{name}_2.jpg", quality=75)
        picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS).save(
            tmp_path / f"{name}_3.webp"
        )
        picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / f"{name}_mirrored.png")
    found = groups_of(tmp_path)
    for name in NAMES:
        alike = {found[file] for file in found if file.startswith(name) and "mirrored" not in file}
        assert len(alike) == 1
        assert found[f"{name}_mirrored.png"] not in alike
    assert len(set(found.values())) == 2 * len(NAMES)


def test_flat_pictures_and_unreadable_files_are_nobodys_copies(tmp_path: Path) -> None:
    for shade in (40, 41, 42):
        Image.new("RGB", (20, 20), (shade, shade, shade)).save(tmp_path / f"flat_{shade}.png")
    for name in ("a", "b"):
        (tmp_path / f"broken_{name}.png").write_bytes(b"no picture")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found = groups_of(tmp_path)
    assert len({found[f"flat_{shade}.png"] for shade in (40, 41, 42)}) == 3
    assert found["broken_a.png"] == found["broken_b.png"]  # equal files, though no pictures
    assert found["gone.png"] not in (found["broken_a.png"], found["flat_40.png"])


def test_noise_of_one_kind_is_not_one_picture(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (64, 64), dtype=np.uint8)).save(buffer, "PNG")
    for name in ("x", "y", "z"):
        (tmp_path / f"{name}.png").write_bytes(buffer.getvalue())
    assert len(set(groups_of(tmp_path).values())) == 13


def test_copies_are_found_among_pictures_of_twelve_bits_and_of_five_channels(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    for number in range(4):
        small = torch.from_numpy(rng.integers(0, 4096, (1, 5, 9, 9)).astype(np.float32))
        planes = F.interpolate(small, (64, 64), mode="bicubic").clamp(0, 4095).round()
        half = F.interpolate(planes, (32, 32), mode="area")
        for name, values in (("whole", planes), ("half", half)):
            array = values[0].numpy().astype(np.uint16)
            tifffile.imwrite(
                tmp_path / f"{number}_{name}.tif", array, photometric="minisblack", planarconfig="separate"
            )
            Image.fromarray(array[number]).save(tmp_path / f"{number}_{name}.png")
    found = groups_of(tmp_path)
    for number in range(4):
        for ending in ("tif", "png"):
            assert found[f"{number}_whole.{ending}"] == found[f"{number}_half.{ending}"]
    assert len(set(found.values())) == 8
