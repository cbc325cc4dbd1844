"""Other projects as variants of the benchmarks. Run by them in the peer's own Python; needs no dinoreg.

Known: lightly-train's DINOv2 method, as `lightly_train.pretrain(method="dinov2")` builds it (`step`: one optimizer
step on random crops, without its data loader and loggers) and its transform (`data`). `--train` is a whole run through
its public interface, for what it learns rather than for how fast.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch

# On a CPU lightly-train would call xformers wherever it can be imported, and fail: its kernels are for CUDA.
if not torch.cuda.is_available():
    os.environ["XFORMERS_DISABLED"] = "1"


def lightly_step(settings: dict[str, Any]) -> Callable[[], measure.Measurement]:
    """lightly-train's step: forward, backward, clipping, AdamW, schedules and moving average."""
    from lightly_train._methods.dinov2.dinov2 import DINOv2, DINOv2AdamWViTArgs, DINOv2Args
    from lightly_train._models.dinov2_vit.dinov2_vit_package import DINOV2_VIT_PACKAGE
    from lightly_train._models.embedding_model import EmbeddingModel
    from lightly_train._torch_helpers import update_momentum

    device = torch.device("cuda" if torch.cuda.is_available() and settings["device"] != "cpu" else "cpu")
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    size, patch_size = settings["model"][3], int(settings["model"][4:].partition("_")[0])
    batch_size = settings["batch_size"]
    model = DINOV2_VIT_PACKAGE.get_model(
        f"vit{size}14-notpretrained",
        model_args={
            "patch_size": patch_size,
            "img_size": settings["global_size"],
            "drop_path_rate": settings["drop_path"],
        },
        load_weights=False,
    )
    arguments, optimizer_arguments = DINOv2Args(output_dim=settings["prototypes"]), DINOv2AdamWViTArgs()
    wrapped = DINOV2_VIT_PACKAGE.get_model_wrapper(model)
    arguments.resolve_auto(None, optimizer_arguments, wrapped)  # type: ignore[arg-type]
    method = DINOv2(arguments, optimizer_arguments, EmbeddingModel(wrapped), batch_size, 3).to(device)
    method.train()
    for frozen in (method.teacher_embedding_model, method.teacher_head):
        frozen.eval()
    # What the step reads of Lightning's trainer. A middle of a run: the last layer is not frozen any more.
    trainer = types.SimpleNamespace(global_step=2000, estimated_stepping_batches=125_000, max_epochs=1)
    method._trainer = trainer
    (optimizer,), (schedule,) = method.configure_optimizers()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sizes = [settings["global_size"]] * 2 + [settings["local_size"]] * settings["num_local"]
    views = [torch.randn(batch_size, 3, size, size, device=device) for size in sizes]
    low = settings["precision"] == "bf16"

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            loss = method.training_step_impl({"views": views}, 0).loss
        optimizer.zero_grad()
        loss.backward()
        method.on_before_optimizer_step(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, arguments.gradient_clip_val)
        optimizer.step()
        schedule["scheduler"].step()
        update_momentum(method.student_embedding_model, method.teacher_embedding_model, m=0.992)
        update_momentum(method.student_head, method.teacher_head, m=0.992)
        trainer.global_step += 1

    def take() -> measure.Measurement:
        spent = measure.seconds(step, device, settings["steps"])
        return {"images_per_s": batch_size / spent, "peak_gib": measure.peak_gib(device)}

    step()
    return take


def lightly_data(settings: dict[str, Any]) -> Callable[[], measure.Measurement]:
    """lightly-train's transform for DINOv2, from encoded files to float crops: in process or through a loader."""
    import data
    import numpy as np
    from lightly_train._methods.dinov2.dinov2_transform import DINOv2ViTTransform, DINOv2ViTTransformArgs
    from PIL import Image

    arguments = DINOv2ViTTransformArgs()
    assert arguments.local_view is not None
    arguments.local_view.view_size = (settings["local_size"],) * 2
    arguments.resolve_auto()
    arguments.resolve_incompatible()
    transform = DINOv2ViTTransform(arguments)

    def crops(encoded: bytes) -> list[torch.Tensor]:
        image = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
        return [view["image"] for view in transform({"image": image})]

    files = sorted(Path(settings["folder"]).glob("*.jpg"))
    return data.rate_of(crops, [file.read_bytes() for file in files], settings)


def lightly_run(settings: dict[str, Any]) -> None:
    """A run of `lightly_train.pretrain` with the network and crops of `configs/small.yaml`, on a CPU.

    settings  data, out, method ("dino", "dinov2", or "constants": dinov2 with the constants of `small`), images, batch,
              seed, threads
    """
    from functools import partial

    import lightly_train
    from lightly_train._models.dinov2_vit.dinov2_vit_src.models import vision_transformer as vit

    torch.set_num_threads(settings["threads"])
    torch.manual_seed(settings["seed"])
    block = partial(vit.Block, attn_class=vit.MemEffAttention)
    sizes = {"img_size": 40, "patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 2, "mlp_ratio": 4}
    network = vit.DinoVisionTransformer(**sizes, num_register_tokens=4, init_values=None, block_fn=block)
    transform: dict[str, Any] = {"image_size": (40, 40), "random_resize": {"min_scale": 0.5, "max_scale": 1.0}}
    local = {"num_views": 2, "view_size": (24, 24), "random_resize": {"min_scale": 0.25, "max_scale": 0.5}}
    transform["local_view"] = local
    arguments: dict[str, Any] | None = None
    optimizer: dict[str, Any] | None = None
    if settings["method"] == "constants":
        jitter = {"prob": 0.8, "strength": 1.0, "brightness": 0.2, "contrast": 0.2, "saturation": 0.1, "hue": 0.02}
        transform |= {"gaussian_blur": None, "color_jitter": jitter, "random_gray_scale": 0.05}
        transform["global_view_1"] = {"gaussian_blur": None, "solarize": None}
        local["gaussian_blur"] = None
        steps = settings["images"] // settings["batch"]
        arguments = {
            **{"output_dim": 128, "hidden_dim": 512, "dino_bottleneck_dim": 64, "ibot_bottleneck_dim": 64},
            **{"center_method": "sinkhorn_knopp", "koleo_loss_weight": 0.02, "momentum_start": 0.95},
            **{"teacher_temp_start": 0.03, "teacher_temp_end": 0.04, "weight_decay_end": 0.1},
            **{"layerwise_decay": 1.0, "patch_embed_lr_multiplier": 1.0, "student_freeze_last_layer_steps": 0},
            **{"teacher_temp_warmup_steps": int(0.3 * steps), "warmup_steps": int(0.1 * steps)},
        }
        optimizer = {"lr": 2e-3 * (1024 / settings["batch"]) ** 0.5}  # which it scales by the batch again
    files = sum(1 for path in Path(settings["data"]).rglob("*") if path.is_file())
    lightly_train.pretrain(
        out=settings["out"],
        data=settings["data"],
        model=network,
        method="dino" if settings["method"] == "dino" else "dinov2",
        method_args=arguments,
        transform_args=transform,
        optim_args=optimizer,
        batch_size=settings["batch"],
        epochs=max(1, round(settings["images"] / files)),
        accelerator="cpu",
        precision="bf16-mixed",
        num_workers=1,
        seed=settings["seed"],
        overwrite=True,
    )


BUILDERS = {("lightly-train", "step"): lightly_step, ("lightly-train", "data"): lightly_data}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--worker", help="settings of a variant, as JSON")
    options.add_argument("--train", help="settings of `lightly_run`, as JSON")
    given = options.parse_args()
    if given.train:
        lightly_run(json.loads(given.train))
    else:
        measure.serve(lambda settings: BUILDERS[settings["peer"], settings["what"]](settings), given.worker)


if __name__ == "__main__":
    main()
