"""The backbone among everything that a training program saved.

Programs nest their state dicts ({"model": ..., "optimizer": ...}), prefix the names in them (`teacher.backbone.`), and
leave wrappers in the middle of names (`_orig_mod.`). The backbone is found by the tensors that begin every ViT, its
class token and its patch projection: what stands before their names is the prefix. Of several networks an average is
taken before a plain copy, and that before a student; two of equal standing are refused.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinoreg.runtime.errors import UserError
from dinoreg.weights.convert import unique

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
_DEEPEST = 4  # of nested entries

# Words in the name of a network, between dots and underscores.
_AVERAGES = {"teacher", "ema", "swa", "averaged"}
_STUDENTS = {"student", "online"}


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
        return self.whole, 2 if words & _AVERAGES else 0 if words & _STUDENTS else 1

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
    if len(entries) < _DEEPEST:
        for key, value in content.items():
            if isinstance(key, str) and isinstance(value, Mapping):
                yield from _networks(value, (*entries, key))


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts are one network under two names."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
