"""What `weights=` means where no such path exists: `random:NAME`, or a name that stands for no weights here.

Nothing is ever downloaded. A published model's name is therefore refused, with the file to fetch and how to name it:
random weights under the name of trained ones would be measured, shown and exported without anybody noticing.
"""

from pathlib import Path

from dinoreg.models.registry import split_name, stem
from dinoreg.runtime.errors import UserError

RANDOM = "random:"

# Meta's file of each published DINOv2 backbone, with four registers or none.
META_FILE = "https://dl.fbaipublicfiles.com/dinov2/dinov2_{model}/dinov2_{model}{registers}_pretrain.pth"


def random_name(source: str | Path) -> str | None:
    """NAME of `random:NAME`; None for anything else."""
    text = str(source)
    return text.removeprefix(RANDOM) if text.startswith(RANDOM) else None


def not_there(source: str | Path) -> UserError:
    """The error for weights that are neither a path nor `random:NAME`: what to fetch, where that is known."""
    text = str(source).strip()
    if random_name(text) is not None:
        return UserError(f"weights {text!r}: random weights are no file; without init= a run starts from random ones")
    try:
        published = _published(text.removeprefix("timm/"))
    except UserError:
        hint = ", or random:NAME for random weights" if "/" not in text else ""
        fetch = "nothing is downloaded: fetch the weights and give their path"
        return UserError(f"weights {text!r}: no such file or run folder; {fetch}{hint}")
    fetch = f"fetch {published} and give its path" if published else "no weights are published under it"
    fetch += f", or weights={RANDOM}{text.removeprefix('timm/')} for random weights"
    return UserError(f"weights {text!r}: names an architecture, not weights here; nothing is downloaded: {fetch}")


def _published(name: str) -> str | None:
    """Where the published weights are, whoever's name it is; None: there are none. UserError for an unknown name."""
    size, patch, registers, rope, _ = split_name(name)
    if rope and size not in ("t", "g") and (patch, registers) == (16, 4):
        return f"the folder huggingface.co/facebook/dinov3-{stem(size, 16)}-pretrain-lvd1689m"
    if rope or size not in ("s", "b", "l", "g") or patch != 14 or registers not in (0, 4):
        return None
    return META_FILE.format(model=f"vit{size}14", registers="_reg4" if registers else "")
