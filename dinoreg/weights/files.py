"""Reading weight files: safetensors (in one file or in shards), torch's own format, and the JSON beside them.

Every file is untrusted. A header is checked against the file's size before it is used, nothing in a file is executed,
no name in it can point outside its folder, and a file of n bytes never becomes much more than n bytes of tensors. Every
problem is a UserError of one line.
"""

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dinoreg.runtime.errors import UserError, readable, reworded
from dinoreg.runtime.regular_files import open_regular, read_regular

INDEX_SUFFIX = ".safetensors.index.json"

MAX_JSON = 16 << 20  # bytes
MAX_SHARDS = 1000

# What training programs save beside the tensors. Nothing needs these values: each becomes a `_LeftOut`.
_HARMLESS = (
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    "numpy.dtype", "numpy.ndarray", "argparse.Namespace", "types.SimpleNamespace", "pathlib.PosixPath",
    "pathlib.WindowsPath", "datetime.datetime", "datetime.timedelta",
    *(f"builtins.{name}" for name in ("int", "float", "bool", "str", "list", "tuple", "dict")),
)  # fmt: skip


class _LeftOut:
    """Stands for a value of a class in `_HARMLESS`; that class itself is neither imported nor called."""

    def __init__(self, *_: Any) -> None:
        pass

    def __new__(cls, *_: Any) -> "_LeftOut":
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


def _plain_dict(*_: Any) -> dict[Any, Any]:
    """In place of a defaultdict, whose factory could be anything."""
    return {}


def read_file(path: Path) -> Any:
    """The content of a weight file, on the CPU: a dict of tensors for safetensors, tensors and plain values for torch.

    path    *.safetensors, *.safetensors.index.json (the list of a model's shards), or a file of torch.save
    raises  UserError for a file that is damaged, unsafe or larger in memory than on disk
    """
    with readable(f"weights {path}:"), open_regular(path):  # the libraries would wait for a pipe
        if path.name.endswith(INDEX_SUFFIX):
            return _read_shards(path)
        return read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; UserError for anything else and for more than `MAX_JSON` bytes."""
    with reworded(f"weights {path}: not JSON", OSError, ValueError, RecursionError):
        content = json.loads(read_regular(path, MAX_JSON).decode("utf-8"))
    if not isinstance(content, dict):
        raise UserError(f"weights {path}: holds a JSON {type(content).__name__}, expected an object")
    return content


# --------------------------------------------------------------------------------------------------- safetensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, by name, on the CPU; UserError for a damaged file and for repeated names.

    The library checks that the header describes exactly the file's bytes before it reads them; but of two entries of
    one name it would take the last.
    """
    damaged = SafetensorError, OSError, ValueError, RecursionError
    with reworded(f"weights {path}: not a whole safetensors file", *damaged):
        state = load_file(path)
        with path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
        json.loads(header, object_pairs_hook=_without_repeats)
    return state


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _read_shards(path: Path) -> dict[str, Tensor]:
    """All tensors of the files that an index names; they have to be in the index's own folder."""
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise UserError(f"weights {path}: no weight_map from tensors to files")
    names = sorted(set(where.values()))
    if len(names) > MAX_SHARDS:
        raise UserError(f"weights {path}: names {len(names)} files, expected at most {MAX_SHARDS}")
    for name in names:
        shard = path.parent / name
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"weights {path}: {name[:80]!r} is no safetensors file of this folder")
        if not shard.is_file():
            raise UserError(f"weights {path}: names {name}, which is missing")
    state: dict[str, Tensor] = {}
    for name in names:
        tensors = read_safetensors(path.parent / name)
        if set(tensors) != {key for key, file in where.items() if file == name}:
            raise UserError(f"weights {path}: {name} does not hold the tensors that the index says")
        state |= tensors
    return state


# --------------------------------------------------------------------------------------------------------- torch


def _read_torch(path: Path) -> Any:
    # Torn archives end in many kinds of exception, all with the same meaning here.
    with reworded(f"weights {path}: not a whole torch file", Exception):
        # torch.save stores without compression, so a file that swells as it is read was not written by it.
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                stored = sum(entry.file_size for entry in archive.infolist())
            if stored > path.stat().st_size:
                raise UserError(f"weights {path}: its entries are compressed or overlap, not as torch.save writes")
        stand_ins: list[Any] = [(_LeftOut, name) for name in _HARMLESS]
        with torch.serialization.safe_globals([*stand_ins, (_plain_dict, "collections.defaultdict")]):
            try:
                content = torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:
                what = "holds more than tensors, or is no weight file; nothing in it was executed"
                raise UserError(f"weights {path}: {what}") from None
    _check_extent(content, path)
    return content


def _check_extent(content: Any, path: Path) -> None:
    """UserError for a tensor larger than its storage or the file: strides of 0 make any size of a few bytes."""
    seen: list[Any] = [content]
    budget = path.stat().st_size
    while seen:
        value = seen.pop()
        if isinstance(value, Mapping):
            seen += value.values()
        elif isinstance(value, Tensor):
            whole = value.layout == torch.strided and value.device.type == "cpu"
            if not whole or value.numel() * value.element_size() > min(value.untyped_storage().nbytes(), budget):
                raise UserError(f"weights {path}: a tensor of shape {tuple(value.shape)} is more than the file holds")
