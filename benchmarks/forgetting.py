"""Does continuing on other images unlearn what a backbone could do? A quickstart run goes on with shifted scenes.

    dinoreg quickstart out=runs/quickstart
    python benchmarks/forgetting.py runs/quickstart --out runs/forgetting

The shifted scenes have the forms and poses of the embedded ones, as a night camera might see them: every object wears
the material of another class, every background is another one, and one hue is all there is. The same number of steps
is taken in several ways; k-NN on the original scenes (`probe.general`) and on shifted ones (`probe.data`) is followed
from step 0 on, and at the end both linear probes of `dinoreg quickstart` are taken.
"""

from __future__ import annotations

import argparse
import colorsys
import json
import tempfile
from pathlib import Path
from typing import Any

import measure
import numpy as np
from PIL import Image

from dinoreg.commands.quickstart import FIRST_PROBE_SCENE, probe
from dinoreg.config.load import load_config
from dinoreg.evaluation.backbones.encoder import wrap
from dinoreg.evaluation.data import Data, Labelled
from dinoreg.evaluation.readers.cifar import ArraySource
from dinoreg.scenes.render import CLASS_NAMES, NUM_CLASSES, UNITS, label_of, render, render_image
from dinoreg.scenes.shapes import KINDS
from dinoreg.scenes.textures import BACKGROUNDS
from dinoreg.train.loop import pretrain
from dinoreg.weights.load import load

SIZE = 64
# Scenes no other part of the program draws: those of the run, then those of its probes.
TRAIN_FIRST, PROBE_FIRST, LINEAR_FIRST = 30_000_000, 40_000_000, 50_000_000
OTHER_MATERIAL, OTHER_BACKGROUND = 5, 3  # how many places further in the list of kinds and of backgrounds
HUE = 0.33  # of everything a night camera sees

NAIVE: dict[str, Any] = {"adapt.heads": 0.0, "adapt.warmup": 0.0, "adapt.lr": 1.0, "adapt.layer_decay": 1.0}
WAYS: dict[str, dict[str, Any]] = {
    "naive": NAIVE,
    "staged": {},
    "staged, rate 0.3, anchor 1": {"adapt.lr": 0.3, "loss.anchor_weight": 1.0},
}


def two_colours(rng: np.random.Generator) -> np.ndarray:
    """(2, 3) RGB of one hue, light and dark."""
    light = colorsys.hsv_to_rgb(HUE, 0.6, rng.uniform(0.6, 1.0))
    dark = colorsys.hsv_to_rgb(HUE, 0.6, rng.uniform(0.1, 0.4))
    return np.array([light, dark], np.float32)


def shifted(index: int, size: int = SIZE) -> tuple[np.ndarray, int]:
    """Scene `index` in other materials and colours: (S, S, 3) uint8, and its class."""
    scene = render(index, size)
    rng = np.random.default_rng([7, index])
    unit = size / UNITS  # pixels
    place = np.arange(size, dtype=np.float32) + np.float32(0.5)

    def paint(texture: Any, period: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        pixels = period * unit
        plane_x, plane_y = (np.ascontiguousarray(plane) for plane in np.meshgrid(x / pixels, y / pixels))
        pattern = texture(plane_x, plane_y, pixels, rng.random(3).tolist())
        first, second = two_colours(rng)
        return first + pattern[..., None] * (second - first)

    around = (KINDS[scene.label].background + OTHER_BACKGROUND) % len(BACKGROUNDS)
    picture = paint(BACKGROUNDS[around], rng.uniform(5.5, 8.5), place, place)
    for row, (label, box) in enumerate(zip(scene.box_labels, scene.boxes)):
        x, y = place - (box[0] + box[2]) / 2, place - (box[1] + box[3]) / 2
        material = KINDS[(int(label) + OTHER_MATERIAL) % NUM_CLASSES].material
        picture = np.where((scene.instances == row + 1)[..., None], paint(material, 7.0, x, y), picture)
    light = np.linspace(rng.uniform(0.75, 1.1), rng.uniform(0.75, 1.1), size, dtype=np.float32)
    noisy = picture * light[None, :, None] + rng.normal(0.0, 0.02, (size, size, 1))
    return (np.clip(noisy, 0.0, 1.0) * 255).astype(np.uint8), scene.label


def write_folder(folder: Path, first: int, count: int) -> Path:
    """One PNG a shifted scene, in a subfolder for each class; those that are there already are kept."""
    for name in CLASS_NAMES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    if len(list(folder.glob("*/*.png"))) < count:
        for index in range(first, first + count):
            picture, label = shifted(index)
            Image.fromarray(picture).save(folder / CLASS_NAMES[label] / f"{index}.png")
    return folder


def labelled(kind: str, first: int, count: int, size: int) -> Labelled:
    """Original or shifted scenes, with their classes."""
    indices = range(first, first + count)
    if kind == "shifted":
        drawn = [shifted(index, size) for index in indices]
    else:
        drawn = [(render_image(index, size), label_of(index)) for index in indices]
    pixels, labels = np.stack([image for image, _ in drawn]), np.array([label for _, label in drawn])
    return Labelled(ArraySource(pixels, f"{kind} scenes"), labels, NUM_CLASSES)


def linear_scores(weights: Path, num_train: int, num_test: int) -> dict[str, list[float]]:
    """Linear probes of a run's last teacher: {"original", "shifted"} -> [top-1, low, high]."""
    config = load_config("quickstart")
    encoder = wrap(load(weights), weights.stem)
    scores = {}
    for kind, first in (("original", FIRST_PROBE_SCENE), ("shifted", LINEAR_FIRST)):
        size = config.crops.global_size
        train, test = labelled(kind, first, num_train, size), labelled(kind, first + num_train, num_test, size)
        with tempfile.TemporaryDirectory() as folder:
            row = probe(encoder, Data({"train": train, "test": test}), Path(folder), kind, baselines=False).headline
        scores[kind] = [row.value, row.low, row.high]
    return scores


def continue_run(given: argparse.Namespace, name: str, train: Path, probe: Path) -> dict[str, Any]:
    """Take the steps in one way; its curve, its warnings and its linear probes."""
    out = given.out / name.replace(", ", "_").replace(" ", "_")
    options: dict[str, Any] = {
        "init": str(given.weights),
        "data": str(train),
        "out": str(out),
        "steps": given.steps,
        "seed": given.seed,
        "probe.data": str(probe),
        "probe.general": "scenes",
        "probe.margin": given.margin,
        "probe.every": max(1, given.steps // 10),
        "probe.max_share": 1.0,
        "log.tensorboard": False,
        **WAYS[name],
    }
    print("dinoreg pretrain quickstart", *(f"{key}={value}" for key, value in options.items()), flush=True)
    finished = (out / "status.json").is_file() and '"finished"' in (out / "status.json").read_text()
    if not finished:
        pretrain(load_config("quickstart", {**options, "resume": out.is_dir()}))
    lines = [json.loads(line) for line in (out / "probe.jsonl").read_text().splitlines()]
    events = out / "health" / "events.jsonl"
    warnings = [json.loads(line) for line in events.read_text().splitlines()] if events.is_file() else []
    last = max((out / "teacher").glob("step_*.safetensors"))
    return {
        "curve": [[line["step"], line["general_knn_top1"], line["knn_top1"]] for line in lines],
        "warnings": [f"{event['name']} at step {event['step']}: {event['message']}" for event in warnings],
        "linear": linear_scores(last, given.linear, given.linear // 2),
    }


def show(results: dict[str, dict[str, Any]], before: dict[str, list[float]]) -> None:
    """The curves and the table, as Markdown."""
    for place, title in ((1, "k-NN top-1 on the original scenes, %"), (2, "k-NN top-1 on the shifted scenes, %")):
        steps = [row[0] for row in next(iter(results.values()))["curve"]]
        print(f"\n{title}\n\n| step | " + " | ".join(map(str, steps)) + " |")
        print("| --- |" + " ---: |" * len(steps))
        for name, result in results.items():
            print(f"| {name} | " + " | ".join(f"{100 * row[place]:.1f}" for row in result["curve"]) + " |")

    def cell(score: list[float]) -> str:
        return f"{100 * score[0]:.1f} [{100 * score[1]:.1f}, {100 * score[2]:.1f}]"

    print("\n| linear probe, % | original scenes | shifted scenes | warnings |\n| --- | --- | --- | --- |")
    print(f"| before | {cell(before['original'])} | {cell(before['shifted'])} | |")
    for name, result in results.items():
        linear = result["linear"]
        print(f"| {name} | {cell(linear['original'])} | {cell(linear['shifted'])} | {'; '.join(result['warnings'])} |")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("weights", type=Path, help="the run folder of dinoreg quickstart")
    options.add_argument("--out", type=Path, required=True, help="folder for the pictures and the runs")
    options.add_argument("--steps", type=int, default=120)
    options.add_argument("--images", type=int, default=3000, help="shifted scenes to train on")
    options.add_argument("--probes", type=int, default=2000, help="shifted scenes of the in-run probe")
    options.add_argument("--linear", type=int, default=2000, help="scenes a linear probe learns from; half to test")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--margin", type=float, default=0.03, help="probe.margin of the runs")
    options.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    given = options.parse_args()
    train = write_folder(given.out / "pictures" / "train", TRAIN_FIRST, given.images)
    probe = write_folder(given.out / "pictures" / "probe", PROBE_FIRST, given.probes)
    before = linear_scores(given.weights, given.linear, given.linear // 2)
    results = {name: continue_run(given, name, train, probe) for name in given.ways}
    show(results, before)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(given).items()}
    measure.report("forgetting", settings, {"before": before, **results})


if __name__ == "__main__":
    main()
