"""Frozen features: images a second and memory of a ViT-S/14 with 4 registers, against timm and transformers.

    python benchmarks/features.py
    python benchmarks/features.py --precision bf16 --batch-size 32

All hold the same architecture with random weights at 224 pixels. timm and transformers are used as they are installed
beside dinoreg (`--peer-python` names another Python for them); one that is missing is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import measure
import torch
from torch import Tensor

VARIANTS = ("dinoreg", "timm", "transformers")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# dim, depth and heads of the short form; the models themselves are ViT-S/14.
TINY = (48, 2, 3)


def dinoreg_model(size: int, tiny: bool, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    from dinoreg.evaluation.backbones.encoder import wrap
    from dinoreg.models.registry import build as build_model

    shape = dict(zip(("dim", "depth", "heads"), TINY)) if tiny else {}
    model = build_model("vits14_reg4", image_size=size, **shape)
    encoder = wrap(model, stated={"mean": [0.0], "std": [1.0]}, dtype=dtype)  # it keeps to its own precision
    return _Features(model, lambda images: encoder.tokens(images).cls)


def timm_model(size: int, tiny: bool, _: torch.dtype) -> Callable[[Tensor], Tensor]:
    import timm

    shape = dict(zip(("embed_dim", "depth", "num_heads"), TINY)) if tiny else {}
    model = timm.create_model("vit_small_patch14_reg4_dinov2", pretrained=False, num_classes=0, img_size=size, **shape)
    return _Features(model, lambda images: model.forward_features(images)[:, 0])


def transformers_model(size: int, tiny: bool, _: torch.dtype) -> Callable[[Tensor], Tensor]:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    dim, depth, heads = TINY if tiny else (384, 12, 6)
    config = Dinov2WithRegistersConfig(
        hidden_size=dim,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        image_size=size,
        patch_size=14,
        num_register_tokens=4,
    )
    model = Dinov2WithRegistersModel(config)
    return _Features(model, lambda images: model(images).last_hidden_state[:, 0])


class _Features(torch.nn.Module):
    """A model and how its class token (B, D) is had."""

    def __init__(self, model: torch.nn.Module, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, images: Tensor) -> Tensor:
        return self.call(images)


MODELS = {"dinoreg": dinoreg_model, "timm": timm_model, "transformers": transformers_model}


def build(settings: dict[str, Any]) -> Callable[[], measure.Measurement]:
    """One variant, warmed up; see `measure.serve`."""
    device = torch.device(settings["device"])
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    if settings["variant"] == "dinoreg" and device.type == "cpu":
        from dinoreg.runtime.device import keep_freed_memory

        keep_freed_memory()
    dtype = DTYPES[settings["precision"]]
    model = MODELS[settings["variant"]](settings["image_size"], settings["tiny"], dtype).eval().to(device)
    images = torch.randn(settings["batch_size"], 3, settings["image_size"], settings["image_size"], device=device)
    loaded = measure.peak_gib(device)

    @torch.inference_mode()
    def work() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            model(images)

    def take() -> measure.Measurement:
        spent = measure.seconds(work, device, settings["batches"])
        return {"images_per_s": len(images) / spent, "over_model_mib": 1024 * (measure.peak_gib(device) - loaded)}

    work()
    return take


def main() -> None:
    options = measure.parser(__doc__)
    options.add_argument("--peer", choices=VARIANTS[1:], help="only this one besides dinoreg")
    options.add_argument("--peer-python", default=sys.executable, help="the Python that has the peers installed")
    options.add_argument("--precision", choices=tuple(DTYPES), default="fp32", help="autocast over float32 weights")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--threads", type=int)
    options.add_argument("--batch-size", type=int, default=32)
    options.add_argument("--image-size", type=int, default=224)
    options.add_argument("--batches", type=int, default=1, help="batches of one measurement")
    given = options.parse_args()
    if given.worker:
        measure.serve(build, given.worker)
        return
    keys = ("precision", "device", "threads", "batch_size", "image_size", "batches")
    settings = {**{key: getattr(given, key) for key in keys}, "tiny": given.short}
    if given.short:
        settings |= {"batch_size": 2, "image_size": 28}
        given.rounds = 1
    names = [name for name in VARIANTS if name in ("dinoreg", given.peer) or given.peer is None]
    variants = {}
    for name in names:
        python = sys.executable if name == "dinoreg" else given.peer_python
        # The peers get the allocator settings that dinoreg gives itself.
        env = None if name == "dinoreg" else measure.KEEP_FREED
        variants[name] = ("features.py", {**settings, "variant": name}, python, env)
    with measure.workers_of(variants, build if given.short else None) as workers:
        rounds = measure.in_turn(workers, given.rounds, given.budget)
    summary = measure.compare(rounds, "images_per_s", [name for name in names if name != "dinoreg"])
    table = measure.comparison_rows(summary, "images_per_s", "img/s")
    for row in table:
        row["MiB over the model"] = f"{summary[row['variant']]['over_model_mib']:.0f}"
    measure.report("features", {**settings, "rounds": len(rounds)}, summary, measure.table(table))


if __name__ == "__main__":
    main()
