"""What the tests of exports share: a run folder without a run, and asking an artefact as a stranger would."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dinoreg.checkpoint import format as checkpoint
from dinoreg.models.vit import RegisterViT

# What a user would write to get (class token, registers, patches) out of what the card's code made.
READERS = {
    "timm": "t = model.forward_features(x); return t[:, 0], t[:, 1 : 1 + R], t[:, 1 + R :]",
    "transformers": "t = model(x).last_hidden_state; return t[:, 0], t[:, 1 : 1 + R], t[:, 1 + R :]",
    "meta": 'f = model(x, None, True); return [f[f"x_norm_{k}"] for k in ("clstoken", "regtokens", "patchtokens")]',
    "onnx": 'import torch; return [torch.from_numpy(a) for a in model.run(None, {"images": x.numpy()})]',
    "safetensors": "return model(x)",
}


ROPE: dict[str, Any] = {"rope_base": 100.0, "key_bias": False, "norm_eps": 1e-5}


def vit(seed: int = 0, **options: Any) -> RegisterViT:
    """A small encoder whose positions, registers and LayerScale all matter to its output."""
    torch.manual_seed(seed)
    arguments: dict[str, Any] = {
        "image_size": 40, "patch_size": 8, "dim": 48, "depth": 2, "heads": 3,
        "num_registers": 4, "layerscale": 1.0, "init_std": 0.08,
    }  # fmt: skip
    model = RegisterViT(**(arguments | options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("_token", "_tokens", "pos_embed", "bias")):
                parameter.normal_(std=0.5)
            elif "gamma" in name or "norm" in name:
                parameter.uniform_(0.5, 1.5)
        for block in model.blocks if not model.key_bias else ():
            block.attn.qkv.bias.chunk(3)[1].zero_()
    return model.eval()


def write_run(folder: Path, model: RegisterViT, step: int = 20, **preprocessing: Any) -> Path:
    """A run folder with a teacher file of `model`, a config, metrics, a probe and an evaluation."""
    channels = model.in_channels
    description = {
        "architecture": model.architecture(),
        "preprocessing": {
            "mean": [0.1 * (c + 1) for c in range(channels)],
            "std": [0.2 + 0.01 * c for c in range(channels)],
            "image_size": model.image_size[0],
        }
        | preprocessing,
        "config_hash": "abc123",
    }
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    checkpoint.write_teacher(folder, step, state, description)
    (folder / "config.yaml").write_text(
        "steps: 30\nbatch_size: 6\nseed: 3\ninit: null\noptim:\n  lr: 0.002\n"
        "data:\n  source: /home/somebody/secret/photos\n"
    )
    lines = [{"step": at, "images": 6 * at, "loss": 8 - at / 10} for at in (10, 20, 30)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4')
    (folder / "probe.jsonl").write_text('{"step": 20, "knn_top1": 0.25, "probe_time": 1.0}\n')
    record = {
        "dataset": "pets", "metric": "accuracy", "probe": "linear", "value": 0.874, "low": 0.861, "high": 0.888,
        "n_test": 3669, "baselines": {"random init": {"value": 0.111}},
    }  # fmt: skip
    place = folder / "eval" / f"{step:07d}"
    place.mkdir(parents=True, exist_ok=True)
    (place / "pets.json").write_text(json.dumps(record))
    return folder


def images(model: RegisterViT, batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, model.in_channels, height, width, generator=torch.Generator().manual_seed(7))


def card_code(folder: Path) -> str:
    """The Python block of the model card."""
    found = re.search(r"```python\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def ask_stranger(
    folder: Path,
    format: str,
    cases: dict[str, Tensor],
    place: Path,
    registers: int,
    block: bool = True,
    run: Any = subprocess.run,
) -> dict[str, list[Tensor]]:
    """Run the card's own code in a process without dinoreg, then the model on `cases`; {case: [cls, registers,
    patches]}.

    run  starts that process, as `subprocess.run` does
    """
    place.mkdir(exist_ok=True)
    save_file(cases, place / "in.safetensors")
    body = (
        "import sys\n"
        + ("sys.modules['dinoreg'] = None\n" if block else "")
        + card_code(folder)
        + "\nimport torch\nfrom safetensors.torch import load_file, save_file\n"
        + f"R = {registers}\ndef tokens(x):\n    {READERS[format]}\n"
        + "out = {}\nwith torch.inference_mode():\n"
        + f"    for name, x in load_file({str(place / 'in.safetensors')!r}).items():\n"
        + "        for i, t in enumerate(tokens(x)):\n            out[f'{name}/{i}'] = t.clone().contiguous()\n"
        + f"save_file(out, {str(place / 'out.safetensors')!r})\n"
    )
    environment = {key: value for key, value in os.environ.items() if not block or key != "PYTHONPATH"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    if not block:  # the card's code imports dinoreg, from where these tests do
        environment["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
    done = run([sys.executable, "-c", body], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = load_file(place / "out.safetensors")
    return {name: [answers[f"{name}/{i}"] for i in range(3)] for name in cases}


def assert_same_tokens(
    model: RegisterViT, cases: dict[str, Tensor], answers: dict[str, list[Tensor]], bound: float
) -> None:
    """Each output within `bound` of its largest value."""
    for name, x in cases.items():
        with torch.inference_mode():
            expected = model(x)
        for ours, theirs in zip(expected, answers[name]):
            assert ours.shape == theirs.shape
            if ours.numel():
                assert (ours - theirs).abs().max() <= bound * ours.abs().max()
