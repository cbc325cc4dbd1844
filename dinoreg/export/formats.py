"""The formats a model leaves in: what is written for each, and what its library does differently from ours.

Every writer fills a folder from a model whose state dict has Meta's names; `dinoreg.weights.convert` knows the names
of the others. Whether the library then computes the same is for the certificate to find out.
"""

import inspect
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dinoreg.checkpoint.atomic import replacing, share
from dinoreg.export import hub_model
from dinoreg.export.onnx_graph import write_onnx
from dinoreg.export.source import Source
from dinoreg.models.vit import RegisterViT
from dinoreg.runtime.digest import digest
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.templates import render
from dinoreg.weights.architecture import (
    INTERPOLATIONS,
    KINDS,
    PROCESSOR,
    TIMM_ARGUMENTS,
    TIMM_DINOV3_ARGUMENTS,
    hidden_dim_of,
)
from dinoreg.weights.convert import to_dinov3, to_meta, to_timm, to_transformers
from dinoreg.weights.resolve import PIXELS_FORMAT, TEACHER_FORMAT

# timm's register models by width; other widths are set by arguments over a named model.
TIMM_SIZES = {384: "small", 768: "base", 1024: "large"}
_UNFILLED = "ARCHITECTURE: dict[str, Any] = {}\n"


@dataclass(frozen=True)
class Format:
    """One kind of artefact.

    write     (folder, source) -> None
    packages  modules that reading it back takes
    peer      name of the library that is run for the certificate
    low       the second dtype of the certificate
    bound     the largest difference in float32, relative to the largest absolute value of the output
    """

    name: str
    write: Callable[[Path, Source], None]
    packages: tuple[str, ...]
    peer: str
    low: str = "bfloat16"
    bound: float = 1e-5

    def load(self, for_peer: bool = False) -> str:
        """Code that makes `model` in the artefact's folder, for the model card or for the certificate's peer."""
        return render("export/templates/load.py.j2", form=self.name, for_peer=for_peer)


# ------------------------------------------------------------------------------------------------------------ timm


def write_timm(folder: Path, source: Source) -> None:
    """`model.safetensors` under timm's names, and `config.json` as timm saves it for a hub.

    The config holds the model's name, its arguments and the preprocessing.
    """
    model = source.model
    gated, hidden, state = model.ffn == "swiglu", hidden_dim(model), to_meta(model.state_dict())
    if model.rope is not None:
        state, names = to_dinov3(state, "timm"), TIMM_DINOV3_ARGUMENTS
        name = f"vit_small_{'plus_' if gated else ''}patch16_dinov3_qkvb"
    else:
        state, names = to_timm(state), TIMM_ARGUMENTS
        # "giant" is the only name with a gated FFN, which arguments in JSON cannot set.
        size = "giant" if gated else TIMM_SIZES.get(model.dim, "small")
        name = f"vit_{size}_patch14_{'reg4_' if model.num_registers else ''}dinov2"
        hidden *= 2 if gated else 1
    architecture = model.architecture()
    _save(state, folder / "model.safetensors")
    arguments = {theirs: architecture[ours] for ours, theirs in names.items()} | {
        "mlp_ratio": _timm_ratio(model.dim, hidden),
        # The factors come with the weights; zero is timm's way of saying that there are none, where it can.
        "init_values": 1e-5 if model.layerscale or model.rope else 0.0,
        "num_classes": 0,
        "dynamic_img_size": True,
    }
    pixels, side = source.preprocessing, min(source.preprocessing.size)
    shares = (side / (pixels.short_side + more) for more in (0, 0.5))  # timm divides by it and rounds down
    pretrained = {
        "input_size": [model.in_channels, *pixels.size],
        "interpolation": pixels.interpolation,
        "crop_pct": next(share for share in shares if math.floor(side / share) == pixels.short_side),
        "crop_mode": "center",
        "mean": list(pixels.mean),
        "std": list(pixels.std),
        "num_classes": 0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "other",
    }
    config = {"architecture": name, "num_classes": 0, "num_features": model.dim, "global_pool": "token"}
    _write_json(folder / "config.json", config | {"model_args": arguments, "pretrained_cfg": pretrained})
    _write_model_json(folder, source, format=PIXELS_FORMAT, version=1)


def _timm_ratio(dim: int, hidden: int) -> float:
    """A ratio with int(dim * ratio) == hidden, whatever the rounding of the division."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else (hidden + 0.5) / dim


# ---------------------------------------------------------------------------------------------------- transformers


def write_transformers(folder: Path, source: Source) -> None:
    """`config.json`, `model.safetensors` and `preprocessor_config.json`, as AutoModel and AutoImageProcessor read them.

    raises  UserError for what transformers' models cannot express: a rectangular position grid or crop, and in Dinov2
            an FFN whose width is not a multiple of the model's
    """
    model = source.model
    rows, columns = model.grid
    if rows != columns:
        grids = f"its position grid is square, this model's is {rows}x{columns}"
        raise UserError(f"format=transformers: {grids}; export with size={min(rows, columns) * model.patch_size}")
    model_type = "dinov3_vit" if model.rope else "dinov2_with_registers" if model.num_registers else "dinov2"
    kind, gated, state = KINDS[model_type], model.ffn == "swiglu", to_meta(model.state_dict())
    if model.rope is not None:
        ffn = {"intermediate_size": hidden_dim(model), "hidden_act": kind.acts[gated]}
        state = to_dinov3(state, "transformers", model.key_bias)
    else:
        ffn, state = {"mlp_ratio": _transformers_ratio(model), "hidden_act": "gelu"}, to_transformers(state)
    architecture = model.architecture()
    config = {theirs: architecture[ours] for ours, (theirs, _) in kind.arguments.items()} | {
        "architectures": [kind.name],
        "model_type": model_type,
        kind.gate: gated,
        **kind.fixed,
        **ffn,
        "layerscale_value": 1.0,
        "image_size": model.image_size[0],
        "torch_dtype": "float32",
    }
    _write_json(folder / "config.json", config)
    pixels = source.preprocessing
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": model.in_channels == 3,
        "size": {"shortest_edge": pixels.short_side},
        "resample": next(number for number, name in INTERPOLATIONS.items() if name == pixels.interpolation),
        "crop_size": {"height": pixels.size[0], "width": pixels.size[1]},
        "rescale_factor": 1 / 255,
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
    }
    done = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    _write_json(folder / PROCESSOR, processor | dict.fromkeys(done, True))
    _write_model_json(folder, source, format=PIXELS_FORMAT, version=1)
    _save(state, folder / "model.safetensors")


def _transformers_ratio(model: RegisterViT) -> int:
    """The whole number that its config takes for the FFN's width over the model's."""
    hidden = hidden_dim(model)
    for ratio in range(1, 65):
        if hidden_dim_of(model.dim, model.ffn, ratio) == hidden:
            return ratio
    this = f"this one is {hidden} over {model.dim} (ffn={model.ffn}, ffn_ratio={model.ffn_ratio})"
    raise UserError(f"format=transformers: its FFN width is a whole multiple of the model's; {this}")


# ------------------------------------------------------------------------------------------------------------ Meta


def write_meta(folder: Path, source: Source) -> None:
    """`model.pth`, the flat state dict of a hub file, `model.json`, and a `hubconf.py` that needs PyTorch alone."""
    write_described(folder, source, "model.pth")
    (folder / "hubconf.py").write_text(hub_text(source.model), encoding="utf-8")


def hub_text(model: RegisterViT) -> str:
    """The text of `hub_model.py` with this model's architecture in it."""
    text = Path(hub_model.__file__).read_text(encoding="utf-8")
    lines = "".join(f"    {key!r}: {value!r},\n" for key, value in hub_arguments(model).items())
    return text.replace(_UNFILLED, f"{_UNFILLED[:-2]}\n{lines}}}\n".replace("'", '"'))


def hub_arguments(model: RegisterViT) -> dict[str, Any]:
    """The arguments of `PlainViT` that make this model."""
    derived = {"grid": list(model.grid), "hidden_dim": hidden_dim(model), "layerscale": bool(model.layerscale)}
    values = model.architecture() | derived
    return {name: values[name] for name in inspect.signature(hub_model.PlainViT).parameters}


# ----------------------------------------------------------------------------------------------- safetensors, ONNX


def write_described(folder: Path, source: Source, name: str = "model.safetensors") -> None:
    """The weights under Meta's names, and `model.json`, with which `dinoreg.load` reads them.

    The JSON holds architecture, preprocessing, origin and digest.
    """
    path = folder / name
    _save(to_meta(source.model.state_dict()), path)
    about = {"architecture": source.model.architecture(), "sha256": digest(path)}
    _write_model_json(folder, source, format=TEACHER_FORMAT, version=1, **about)


def write_onnx_files(folder: Path, source: Source) -> None:
    """`model.onnx` in float32, `model_float16.onnx`, and `model.json` with the inputs, outputs and preprocessing."""
    facts = write_onnx(folder, source.model, hub_arguments(source.model), source.size_given)
    _write_model_json(folder, source, **facts)


# ------------------------------------------------------------------------------------------------------ the table

_FORMATS = (
    Format("timm", write_timm, ("timm", "safetensors"), "timm"),
    Format("transformers", write_transformers, ("transformers", "safetensors"), "transformers"),
    Format("meta", write_meta, (), "torch.hub"),
    Format("safetensors", write_described, (), "safetensors"),
    Format("onnx", write_onnx_files, ("onnx", "onnxruntime", "onnxscript"), "onnxruntime", "float16", 1e-4),
)
FORMATS = {form.name: form for form in _FORMATS}
# Formats that carry code or a graph. A test-time register is in no weights: its hidden units give the largest of all
# tokens' activations to one token and keep the class token's own, and the FFN of a plain ViT sees one token at a time.
MOVING = ("meta", "safetensors", "onnx")


def hidden_dim(model: RegisterViT) -> int:
    """Width between the two matrices of the FFN; the gated half for SwiGLU."""
    return hidden_dim_of(model.dim, model.ffn, model.ffn_ratio)


def _save(state: dict[str, Tensor], path: Path) -> None:
    """Tensors that lie in memory of their own, as the file formats want them."""
    own = {key: value.detach().clone().contiguous() for key, value in state.items()}
    with replacing(path) as aside:
        if path.suffix == ".pth":
            torch.save(own, buffer := io.BytesIO())  # its own writer has no words for a full disk
            aside.write_bytes(buffer.getbuffer())
        else:
            save_file(own, aside, metadata={"format": "pt"})
            share(aside)


def _write_model_json(folder: Path, source: Source, **about: Any) -> None:
    """`model.json`: what is done with pictures, all of which no library's own files can say, and where it is from."""
    _write_json(folder / "model.json", about | {"preprocessing": source.preprocessing.as_json()} | source.origin)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
