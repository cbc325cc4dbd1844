"""Other projects as variants of the benchmarks. Run by them in the peer's own Python; needs no dinoreg.

Known: lightly-train's DINOv2 method, as `lightly_train.pretrain(method="dinov2")` builds it (`step`: one optimizer
step on random crops, without its data loader and loggers) and its transform (`data`).
"""

from __future__ import annotations

import argparse
import io
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


BUILDERS = {("lightly-train", "step"): lightly_step, ("lightly-train", "data"): lightly_data}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--worker", required=True)
    measure.serve(lambda settings: BUILDERS[settings["peer"], settings["what"]](settings), options.parse_args().worker)


if __name__ == "__main__":
    main()
