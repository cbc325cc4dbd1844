"""The folder in which the guides' commands run: a few small pictures of every kind that they name, and weights."""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet
import tifffile
import torch
from PIL import Image

from dinoreg.scenes.render import CLASS_NAMES, Scene, render

SIDE = 96


def save(folder: Path, name: str, pixels: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / name)


def labelled(folder: Path, start: int, count: int, classes: int = 3) -> list[tuple[str, str]]:
    """`count` pictures each of some classes, a subfolder for each; returns (path below `folder`, class)."""
    rows: list[tuple[str, str]] = []
    index = start
    while len(rows) < count * classes:
        scene = render(index, SIDE)
        name = CLASS_NAMES[scene.label]
        if scene.label < classes and sum(kind == name for _, kind in rows) < count:
            save(folder / name, f"{index}.png", scene.image)
            rows.append((f"{name}/{index}.png", name))
        index += 1
    return rows


def table(path: Path, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def own_pictures(root: Path) -> None:
    """Photographs, labels, masks, depth, 16 bits, other channels and a config of one's own, by the guides' names."""
    scenes: list[Scene] = [render(index, SIDE) for index in range(40)]
    for index, scene in enumerate(scenes):
        save(root / "photos", f"{index:02}.jpg", scene.image)
        save(root / "lesions" / "images", f"{index:02}.png", scene.image)
        save(root / "lesions" / "masks", f"{index:02}.png", np.where(scene.segmentation > 0, 255, 0).astype(np.uint8))
        save(root / "rooms" / "images", f"{index:02}.png", scene.image)
        save(root / "rooms" / "depth", f"{index:02}.png", (scene.depth * 1000).astype(np.uint16))
        save(root / "xrays", f"{index:02}.png", (321 + scene.image[..., 0] * 13.8).astype(np.uint16))
        (root / "cells").mkdir(exist_ok=True)
        planes = np.stack([np.roll(scene.image[..., 1], shift, 0).astype(np.uint16) * 16 for shift in range(5)])
        tifffile.imwrite(root / "cells" / f"{index:02}.tif", planes, photometric="minisblack")
        (root / "three").mkdir(exist_ok=True)
        tifffile.imwrite(root / "three" / f"{index:02}.tif", planes[[0, 2, 3]], photometric="minisblack")
        save(root / "slides", f"{index:02}.png", scene.image)
        save(root / "tiles", f"{index:02}.png", np.rot90(scene.image).copy())
        for band, plane in zip(("RED", "GREEN", "NIR"), planes[:3]):
            save(root / "fields" / band, f"{index:02}.png", plane)
    save(root / "photos", "a.jpg", scenes[0].image)
    shards(root, root / "photos")
    for index in range(40, 50):
        save(root / "scans", f"{index}.png", render(index, SIDE).image)
    rows = labelled(root / "labelled", 100, 14)
    labelled(root / "watched", 1000, 8)
    labelled(root / "general", 2000, 8)
    table(root / "labels.csv", ("path", "label"), [(f"labelled/{name}", kind) for name, kind in rows])
    table(root / "names.csv", ("path", "label"), [(f"{index:02}.jpg", "ab"[index % 2]) for index in range(40)])
    bands = [[f"{band}/{index:02}.png" for band in ("RED", "GREEN", "NIR")] for index in range(40)]
    fields = [(*row, ("barley", "maize")[index % 2]) for index, row in enumerate(bands)]
    table(root / "fields" / "list.csv", ("RED", "GREEN", "NIR", "crop"), fields)
    for index in range(40):
        save(root / "train_images", f"id{index}.png", scenes[index].image)
    table(root / "train.csv", ("id_code", "diagnosis"), [(f"id{index}", str(index % 3)) for index in range(40)])


def shards(root: Path, photos: Path) -> None:
    """The same photographs in tars with their classes beside them, and in parquet files."""
    files = sorted(photos.glob("[0-9]*.jpg"))
    for number, part in enumerate((files[:20], files[20:])):
        for folder in ("shards", "tables"):
            (root / folder).mkdir(exist_ok=True)
        with tarfile.open(root / "shards" / f"photos-{number:03}.tar", "w") as archive:
            for index, file in enumerate(part):
                archive.add(file, file.name)
                member = tarfile.TarInfo(f"{file.stem}.cls")
                member.size = 1
                archive.addfile(member, io.BytesIO(str(index % 2).encode()))
        cells = [{"bytes": file.read_bytes(), "path": file.name} for file in part]
        pyarrow.parquet.write_table(pyarrow.table({"image": cells}), root / "tables" / f"{number}.parquet")


def public_weights(folder: Path) -> None:
    """A folder as the hub has it, with random weights: DINOv2's small, which a reader downloads."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
