"""The other side of a certificate: load an artefact as its card says, run it, write the answers down.

The export copies this file into a folder of its own and runs it there, in a process in which dinoreg cannot be
imported: what it computes comes from the artefact and its library alone. One argument: a JSON file that names the
format, the artefact's folder, the code that loads it per dtype, the inputs and where the answers go.
"""

import json
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def main(request_path: str) -> None:
    block_dinoreg()
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    here = Path(request_path).resolve().parent

    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(request["threads"])
    cases = load_file(here / "cases.safetensors")
    os.chdir(request["folder"])
    answers, kind = {}, ""
    read = READ[request["format"]]
    for dtype, code in request["load"].items():
        scope: dict[str, Any] = {}
        exec(code, scope)
        model = scope["model"]
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        if isinstance(model, torch.nn.Module):
            model = model.to(getattr(torch, dtype)).eval()
        for name, images in cases.items():
            with torch.inference_mode():
                tokens = read(model, images.to(getattr(torch, dtype)), request["num_registers"])
            for output, value in zip(("cls", "registers", "patches"), tokens):
                answers[f"{dtype}/{name}/{output}"] = value.float().contiguous().clone()
    save_file(answers, here / "answers.safetensors")
    facts = {
        "library": request["peer"],
        "versions": {name: _version(name) for name in (*request["packages"], "torch")},
        "model": kind,
        "python": platform.python_version(),
        "dinoreg_importable": False,
    }
    (here / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def block_dinoreg() -> None:
    """From here on `import dinoreg` fails, wherever it is installed; ends the process if it does not."""
    sys.modules["dinoreg"] = None  # type: ignore[assignment]
    try:
        __import__("dinoreg")
    except ImportError:
        return
    raise SystemExit("dinoreg can be imported in the process that was to do without it")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def split_sequence(tokens: Any, num_registers: int) -> tuple[Any, Any, Any]:
    first = 1 + num_registers
    return tokens[:, 0], tokens[:, 1:first], tokens[:, first:]


def read_timm(model: Any, images: Any, num_registers: int) -> tuple[Any, Any, Any]:
    return split_sequence(model.forward_features(images), num_registers)


def read_transformers(model: Any, images: Any, num_registers: int) -> tuple[Any, Any, Any]:
    return split_sequence(model(images).last_hidden_state, num_registers)


def read_hub(model: Any, images: Any, num_registers: int) -> tuple[Any, Any, Any]:
    features = model.forward_features(images)
    return features["x_norm_clstoken"], features["x_norm_regtokens"], features["x_norm_patchtokens"]


def read_onnx(model: Any, images: Any, num_registers: int) -> tuple[Any, Any, Any]:
    import torch

    cls, registers, patches = model.run(["cls", "registers", "patches"], {"images": images.numpy()})
    return torch.from_numpy(cls), torch.from_numpy(registers), torch.from_numpy(patches)


READ: dict[str, Callable[[Any, Any, int], tuple[Any, Any, Any]]] = {
    "timm": read_timm,
    "transformers": read_transformers,
    "meta": read_hub,
    "safetensors": read_hub,
    "onnx": read_onnx,
}

if __name__ == "__main__":
    main(sys.argv[1])
