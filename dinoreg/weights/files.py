"""Reading weight files: safetensors (in one file or in shards), torch's own format and the JSON beside them; and the
backbone among everything that a training program saved.

Every file is untrusted. A header is checked against the file's size before it is used, nothing in a file is executed,
no name in it can point outside its folder, and a file of n bytes never becomes much more than n bytes of tensors. Every
problem is a UserError of one line.

Programs nest their state dicts ({"model": ..., "optimizer": ...}), prefix the names in them (`teacher.backbone.`), and
leave wrappers in the middle of names (`_orig_mod.`). The backbone is found by the tensors that begin every ViT, its
class token and its patch projection: what stands before their names is the prefix. Of several networks an average is
taken before a plain copy, and that before a student; two of equal standing are refused.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dinoreg.runtime.errors import UserError, readable, reworded
from dinoreg.runtime.regular_files import open_regular, read_regular
from dinoreg.weights.convert import unique

INDEX_SUFFIX = ".safetensors.index.json"

MAX_JSON = 16 << 20  # bytes

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
                shape = tuple(value.shape)
                raise UserError(f"weights {path}: a tensor of shape {shape} is more than the file has bytes for")


# ------------------------------------------------------------------------------------------------------------
# The backbone in a file


FLOATING_POINT = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2
}  # fmt: skip

# What DDP, torch.compile, FSDP and activation checkpointing put into names, anywhere.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPED = rf"(?:(?:{'|'.join(_WRAPPERS)})\.)*"
# The shortest beginning that leaves one of these: `embeddings.` is part of transformers' names, not of a prefix.
_FIRST_TENSORS = re.compile(
    rf"(|.+?\.)(?:(?:embeddings\.{_WRAPPED})?cls_token|patch_embed\.{_WRAPPED}proj\.weight"
    rf"|embeddings\.{_WRAPPED}patch_embeddings\.{_WRAPPED}(?:projection\.)?weight)"
)


class Found(NamedTuple):
    """A backbone's tensors, and where in the file's content they were.

    state     by name, without prefix and wrappers
    left_out  names of tensors and entries beside them
    where     the prefix, with the names of the entries that it is in ("model.teacher.backbone"); "" for a plain file
    others    the prefixes of other networks in the file
    """

    state: dict[str, Tensor]
    left_out: tuple[str, ...]
    where: str
    others: tuple[str, ...]


@dataclass(frozen=True)
class _Network:
    """A network in a file: the names of the entries around it, its state dict, the prefix, tensors known by name."""

    entries: tuple[str, ...]
    content: Mapping[str, Any]
    prefix: str
    whole: bool  # with class token and patch projection

    @property
    def where(self) -> str:
        return ".".join(filter(None, [*self.entries, _unwrapped(self.prefix.rstrip("."))]))

    @property
    def standing(self) -> tuple[bool, int]:
        words = set(re.split(r"[._]", self.where.lower()))
        rank = 2 if words & {"teacher", "ema", "swa", "averaged"} else 0 if words & {"student", "online"} else 1
        return self.whole, rank

    def state(self) -> dict[str, Tensor]:
        """The tensors by name; UserError where two names become one, and for tensors that are not floating point."""
        held = {key: value for key, value in self.content.items() if self._holds(key) and isinstance(value, Tensor)}
        for key, value in held.items():
            if value.dtype not in FLOATING_POINT:
                dtype = str(value.dtype).removeprefix("torch.")
                raise UserError(f"tensor {key[:80]!r} has dtype {dtype}, expected floating point")
        return unique((_unwrapped(key[len(self.prefix) :]), value) for key, value in held.items())

    def left_out(self, content: Any) -> tuple[str, ...]:
        """The names of what is not of this network: other entries of the file, other tensors beside it."""
        names: list[str] = []
        for entry in self.entries:
            names += [str(key)[:80] for key in content if key != entry]
            content = content[entry]
        beside = (key for key, value in content.items() if not (self._holds(key) and isinstance(value, Tensor)))
        return (*(str(key)[:80] for key in beside), *names)

    def _holds(self, key: Any) -> bool:
        return isinstance(key, str) and key.startswith(self.prefix)


def find_backbone(content: Any) -> Found:
    """The backbone in the content of a weight file.

    content  a state dict, or mappings in one another with state dicts in them; other values in them are left out
    raises   UserError where there is none or where several cannot be ranked, and as `_Network.state`
    """
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"holds a {type(content).__name__}, expected a state dict of tensors")
    networks = sorted(_networks(content), key=lambda each: each.standing, reverse=True)
    if not networks:
        raise UserError("holds no tensors of a ViT: none is called cls_token or patch_embed.proj.weight, prefix or not")
    best, *rest = networks
    state = best.state()
    rivals = [each for each in rest if not _same(each.state(), state)]
    if rivals and rivals[0].standing == best.standing:
        one, other = best.where or "the unprefixed tensors", rivals[0].where or "the unprefixed tensors"
        raise UserError(f"holds several networks, {one!r} and {other!r}; expected a file with the one to use")
    return Found(state, best.left_out(content), best.where, tuple(each.where for each in rivals))


def _networks(content: Mapping[Any, Any], entries: tuple[str, ...] = ()) -> Iterator[_Network]:
    """Every network in the content of a file."""
    found: dict[str, set[bool]] = {}
    for key, value in content.items():
        if isinstance(value, Tensor) and isinstance(key, str) and (match := _FIRST_TENSORS.fullmatch(key)):
            found.setdefault(match[1], set()).add(key.endswith("cls_token"))
    for prefix, kinds in found.items():
        yield _Network(entries, content, prefix, len(kinds) == 2)
    if len(entries) < 4:  # nested deeper, nobody keeps a network
        for key, value in content.items():
            if isinstance(key, str) and isinstance(value, Mapping):
                yield from _networks(value, (*entries, key))


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts are one network under two names."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
