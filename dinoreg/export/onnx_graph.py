"""ONNX: a graph of the encoder with outputs `cls` (B, D), `registers` (B, R, D) and `patches` (B, N, D), for any B.

Either for one image size, whose positions are constants of the graph, or for any size that the patch size divides, up
to MAX_GRID patches an extent. There the positions are resampled in the graph: ONNX has no resize that reproduces
PyTorch's bicubic kernels, with antialias or with an offset in the scale. Both are linear and separable, so a row matrix
and a column matrix say them exactly; the matrices are computed from the target size, out of arithmetic that every
runtime has.
"""

import contextlib
import io
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinoreg.data.center_crop import ANTIALIASED_SLOPE, cubic_kernel
from dinoreg.export.hub_model import PlainViT
from dinoreg.models.vit import RegisterViT

OPSET = 18
MAX_GRID = 4096
INPUT = "images"
OUTPUTS = ("cls", "registers", "patches")
FILES = {"float32": "model.onnx", "float16": "model_float16.onnx"}

# One ONNX file is one protobuf message, which ends at 2 GiB; larger weights go beside it.
_MAX_INLINE = 3 * 2**29


class _Graph(PlainViT):
    """The plain encoder with its tokens by kind; unless `fixed`, with positions by matrix products in the graph."""

    fixed = False

    def resampled_positions(self, rows: int, columns: int) -> Tensor:
        if self.fixed:
            return super().resampled_positions(rows, columns)
        positions = self.pos_embed[0, 1:].float().reshape(*self.grid, self.embed_dim)
        moved = resample_in_graph(positions, (rows, columns), self.antialias, self.position_offset)
        return moved.to(self.pos_embed.dtype)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        features = self.forward_features(images)
        return features["x_norm_clstoken"], features["x_norm_regtokens"], features["x_norm_patchtokens"]


def write_onnx(folder: Path, model: RegisterViT, arguments: dict[str, Any], fixed: bool) -> dict[str, Any]:
    """Write one file per dtype; returns the graph's inputs, outputs and limits, fit for JSON.

    arguments  of the plain encoder that makes this model
    fixed      only the model's own image size, with its positions baked in; else any size
    """
    graph = _Graph(**arguments)
    graph.fixed = fixed
    graph.load_state_dict(model.state_dict())
    graph.eval().requires_grad_(False)
    for name, file in FILES.items():
        _capture(graph.to(getattr(torch, name)), model, folder / file)
    return {
        "format": "dinoreg-onnx",
        "version": 1,
        "opset": OPSET,
        "files": FILES,
        "inputs": {INPUT: ["batch", model.in_channels, *(model.image_size if fixed else ("height", "width"))]},
        "outputs": {
            "cls": ["batch", model.width],
            "registers": ["batch", model.num_registers, model.width],
            "patches": ["batch", "patches", model.width],
        },
        "image_size": list(model.image_size) if fixed else "any",
        "native_image_size": list(model.image_size),
        "patch_size": model.patch_size,
        "max_extent": None if fixed else MAX_GRID * model.patch_size,
    }


def drop_float16(folder: Path) -> None:
    """Remove the float16 graph of a model that overflows in that dtype, and its entry in `model.json`."""
    for path in folder.glob(f"{FILES['float16']}*"):  # and its weights, where they lie beside it
        path.unlink()
    facts = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    facts["files"].pop("float16")
    (folder / "model.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _capture(graph: _Graph, model: RegisterViT, path: Path) -> None:
    patch = graph.patch_size
    # An example whose extents and batch all differ, and are not 1, which a tracer would take for a constant.
    height, width = model.image_size if graph.fixed else (3 * patch, 5 * patch)
    images = torch.zeros(2, model.in_channels, height, width, dtype=graph.cls_token.dtype)
    dims: dict[int, Any] = {0: torch.export.Dim("batch")}
    if not graph.fixed:
        rows, columns = (torch.export.Dim(name, min=1, max=MAX_GRID) for name in ("rows", "columns"))
        dims |= {2: patch * rows, 3: patch * columns}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    # The exporter warns of its own deprecations and prints its progress.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph,
            (images,),
            dynamo=True,
            dynamic_shapes=(dims,),
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            verbose=False,
        )
    assert program is not None
    size = sum(value.numel() * value.element_size() for value in graph.state_dict().values())
    program.save(str(path), external_data=size > _MAX_INLINE)


# ------------------------------------------------------------------------------------------------------------
# Bicubic resampling as two matrix products


def resampling_matrix(target: int, grid: int, antialias: bool, offset: Tensor | float = 0.0) -> Tensor:
    """The weights (target, grid), float32, of `grid` samples in each of `target` resampled ones.

    target     may be symbolic while a graph is captured
    antialias  and offset: as in `dinoreg.models.vit.resample_positions`
    """
    places = torch.arange(target, dtype=torch.float32)[:, None] + 0.5  # (target, 1)
    sources = torch.arange(grid, dtype=torch.float32)[None, :]  # (1, grid)
    # PyTorch divides in double precision and rounds once; a scale that is off by a bit moves the far samples.
    scale = (grid / (torch.full((), target, dtype=torch.float64) + offset)).float()
    if antialias:
        # The kernel widens as the target shrinks; what falls outside the grid is left out and the rest sums to one.
        weights = cubic_kernel(((sources + 0.5 - places * scale) / scale.clamp(min=1.0)).abs(), ANTIALIASED_SLOPE)
        return weights / weights.sum(dim=1, keepdim=True)
    # Four taps around the sampling point; those outside the grid take the value at its border.
    point = places * scale - 0.5
    first = torch.floor(point)
    weights = torch.zeros_like(point * sources)
    for tap in (-1.0, 0.0, 1.0, 2.0):
        place = (first + tap).clamp(0, grid - 1)
        share = cubic_kernel((point - first - tap).abs(), -0.75)  # the slope of PyTorch's without antialiasing
        weights = weights + (sources == place).to(torch.float32) * share
    return weights


def resample_in_graph(positions: Tensor, target: tuple[int, int], antialias: bool, offset: float = 0.0) -> Tensor:
    """`resample_positions` out of operations that ONNX has.

    positions  (gh, gw, D) float32
    target     (h, w), may be symbolic
    returns    (1, h * w, D) float32
    """
    grid_rows, grid_columns, dim = positions.shape
    rows, columns = target
    shifts: list[Tensor | float] = [0.0, 0.0]
    if offset:  # at the native grid positions are used as they are; with antialias, each extent on its own
        same = [torch.full((), rows) == grid_rows, torch.full((), columns) == grid_columns]
        if not antialias:
            same = [same[0] & same[1]] * 2
        none, some = (torch.full((), value, dtype=torch.float64) for value in (0.0, offset))
        shifts = [torch.where(each, none, some) for each in same]
    down = resampling_matrix(rows, grid_rows, antialias, shifts[0])  # (h, gh)
    across = resampling_matrix(columns, grid_columns, antialias, shifts[1])  # (w, gw)
    moved = (down @ positions.reshape(grid_rows, grid_columns * dim)).reshape(rows, grid_columns, dim)
    return (across @ moved).reshape(1, rows * columns, dim)
