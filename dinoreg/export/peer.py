"""The other side of a certificate: load an artefact as its card says, run it, write its outputs to a file.

The export copies this file into a folder of its own and runs it there, in a process in which dinoreg cannot be
imported: what it computes comes from the artefact and its library alone. One argument: a JSON file that names the
format, the artefact's folder, the code that loads it per dtype, that which reads image files, and these files.
"""

import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def main(request_path: str) -> None:
    """Run the request in a JSON file; writes `answers.safetensors` and `facts.json` beside it.

    An answer is called DTYPE/CASE/OUTPUT, or PICTURE/pixels and PICTURE/cls of a file, and is float32. Raises whatever
    loading or running the artefact raises.
    """
    block_dinoreg()
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    here = Path(request_path).resolve().parent

    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(request["threads"])
    cases = load_file(here / "cases.safetensors")
    os.chdir(request["folder"])
    answers = {}
    for dtype, code in request["load"].items():
        scope: dict[str, Any] = {}
        exec(code, scope)
        model = scope["model"]
        if isinstance(model, torch.nn.Module):
            model = model.to(getattr(torch, dtype)).eval()
        for name, images in cases.items():
            with torch.inference_mode():
                x = images.to(getattr(torch, dtype))
                tokens = read_tokens(request["format"], model, x, request["num_registers"])
            for output, value in zip(("cls", "registers", "patches"), tokens):
                answers[f"{dtype}/{name}/{output}"] = value.float().contiguous().clone()
        if dtype == "float32" and request["pictures"]:
            exec(request["prepare"], scope)
            for name, path in request["pictures"].items():
                pixels = torch.as_tensor(scope["prepare"](path))
                with torch.inference_mode():
                    cls = read_tokens(request["format"], model, pixels, request["num_registers"])[0]
                answers |= {f"{name}/pixels": pixels.contiguous().clone(), f"{name}/cls": cls.contiguous().clone()}
    save_file(answers, here / "answers.safetensors")
    facts = {
        "library": request["peer"],
        "versions": {name: _version(name) for name in (*request["packages"], "torch")},
        "dinoreg_importable": False,
    }
    (here / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def block_dinoreg() -> None:
    """Make `import dinoreg` fail from here on, wherever it is installed."""
    sys.modules["dinoreg"] = None  # type: ignore[assignment]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def read_tokens(name: str, model: Any, images: Any, num_registers: int) -> Sequence[Any]:
    """(cls (B, D), registers (B, R, D), patches (B, N, D)) of a model, as its library gives them.

    name    of the format
    images  (B, C, H, W) normalised
    """
    if name == "onnx":
        import torch

        answers = model.run(["cls", "registers", "patches"], {"images": images.numpy()})
        return [torch.from_numpy(answer) for answer in answers]
    if name in ("meta", "safetensors"):
        features = model.forward_features(images)
        return [features[f"x_norm_{kind}"] for kind in ("clstoken", "regtokens", "patchtokens")]
    tokens = model.forward_features(images) if name == "timm" else model(images).last_hidden_state
    return tokens[:, 0], tokens[:, 1 : 1 + num_registers], tokens[:, 1 + num_registers :]


if __name__ == "__main__":
    main(sys.argv[1])
