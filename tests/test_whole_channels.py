"""Whole runs of one, five and 48 channels: trained, probed, evaluated, embedded, viewed and exported."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from zoo import write_planes

from dinoreg.commands.main import main

SIDE = 48
TINY = [
    "model.name=vitt8_reg4", "model.dim=32", "model.depth=2", "model.heads=2", "model.layerscale=none",
    "model.init_std=0.05", "crops.global_size=32", "crops.local_size=16", "crops.num_local=2", "head.prototypes=24",
    "head.hidden_dim=40", "head.bottleneck_dim=16", "batch_size=6", "device=cpu", "precision=fp32",
]  # fmt: skip
SHORT = [
    "device=cpu", "precision=fp32", "workers=0", "knn.k=1", "logistic.num_c=5", "linear.epochs=1",
    "linear.epoch_steps=20",
    "linear.batch_size=16", "few_shot.repeats=1", "multilabel.num_c=5", "segmentation.steps=40", "segmentation.size=48",
    "segmentation.stride=32", "segmentation.batch_size=4", "segmentation.warmup_steps=4", "segmentation.lrs=0.03",
    "depth.steps=10", "depth.warmup_steps=2", "depth.batch_size=4",
]  # fmt: skip


def write_data(root: Path, channels: int) -> None:
    """Classes, several labels, masks and depth, all of which the last channel alone shows; the others are noise."""
    rng = np.random.default_rng(channels)

    def planes(last: np.ndarray) -> np.ndarray:
        noise = rng.integers(0, 4096, (channels, SIDE // 8, SIDE // 8)).repeat(8, 1).repeat(8, 2)
        return np.concatenate([noise[:-1], last[None]]).astype(np.uint16)

    lines, ending = ["path,label"], "png" if channels == 1 else "tif"
    for name, level in (("dark", 800), ("bright", 3200)):
        for number in range(20):
            write_planes(
                root / "classes" / name / f"{number:02d}", planes(level + rng.integers(-400, 400, (SIDE, SIDE)))
            )
            lines.append(f"{name}/{number:02d}.{ending},{name}{'|even' * (number % 2 == 0)}")
    (root / "classes" / "tags.csv").write_text("\n".join(lines) + "\n")
    for folder in ("masks", "depth"):
        (root / "pairs" / folder).mkdir(parents=True)
    for number in range(12):
        mask = np.zeros((SIDE, SIDE), np.uint8)
        top, left = rng.integers(0, SIDE // 8 - 3, 2) * 8
        mask[top : top + 24, left : left + 24] = 1
        write_planes(root / "pairs" / "images" / f"{number}", planes(400 + 3600 * mask.astype(int)))
        Image.fromarray(mask).save(root / "pairs" / "masks" / f"{number}.png")
        Image.fromarray((1000 + 3000 * mask.astype(int)).astype(np.uint16)).save(
            root / "pairs" / "depth" / f"{number}.png"
        )


def command(*arguments: object) -> None:
    assert main([str(each) for each in arguments]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channels", "formats"),
    [
        (1, ["timm", "onnx"]),
        (5, ["timm", "transformers", "meta", "safetensors", "onnx"]),
        (48, ["transformers", "meta"]),
    ],
)
def test_a_model_of_other_channels_goes_all_the_way(channels: int, formats: list[str], tmp_path: Path) -> None:
    data, run, out = tmp_path / "data", tmp_path / "run", tmp_path / "out"
    write_data(data, channels)
    command(
        "pretrain", "vits14_reg4", f"model.in_channels={channels}", f"data={data / 'classes'}", "data.range=0,4095",
        f"probe.data={data / 'classes'}", "steps=6", "probe.every=3", "checkpoint.every=3", f"out={run}", *TINY,
    )  # fmt: skip
    lines = [json.loads(line) for line in (run / "probe.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 6
    assert "knn_top1" in lines[-1]
    command("pretrain", run, "resume=true", "steps=8")
    found: dict[str, dict] = {}
    for place in ("classes", "classes/tags.csv", "pairs"):
        folder = out / place.replace("/", "_")
        own = "own.depth_unit=mm" if place == "pairs" else "own.folds=1"
        command("eval", data / place, f"weights={run}", f"out={folder}", "logistic.token=cls+mean", own, *SHORT)
        (path,) = folder.glob("eval/[0-9]*/*.json")
        for row in json.loads(path.read_text())["rows"]:
            found.setdefault(row["protocol"], row)
    names = ("logistic regression", "linear grid", "weighted k-NN", "linear segmentation", "linear depth")
    assert set(found) >= set(names)
    assert found["logistic regression"]["value"] > 0.9  # which the last channel alone says
    assert found["linear segmentation"]["value"] > 0.6  # a half where nothing of it is seen
    command("embed", f"data={data / 'classes'}", f"weights={run}", f"out={out / 'f.safetensors'}", "device=cpu")
    for view in ("attention", "pca", "norms"):
        command("view", view, f"weights={run}", f"images={data / 'classes'}", f"out={out / 'view'}", "device=cpu")
    command("view", "crops", run, f"out={out / 'view'}")
    command("registers", f"weights={run}", f"images={data / 'classes'}", f"out={out / 'registers'}", "device=cpu")
    for form in formats:
        command("export", f"weights={run}", f"format={form}", f"out={out / form}")
    assert (run / "report.html").exists()
