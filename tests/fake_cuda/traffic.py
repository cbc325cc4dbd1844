"""Bytes that the operations of a step read and write: the memory traffic without any cache."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addmm_")
ATTENTION = ("flash", "efficient_attention")
# They move nothing: views of which the schema does not say so, and memory that is only reserved.
NOTHING = (
    *("detach", "alias", "split", "unbind", "_unsafe_view", "_reshape_alias", "lift_fresh", "set_"),
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"),
)
MADE = ("new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like")  # read nothing
OVERWRITING = ("fill_", "zero_", "copy_", "bernoulli_", "random_")  # do not read what they write to


def _size(tensor: torch.Tensor) -> int:
    """Bytes that a tensor covers; what is expanded counts once."""
    size = tensor.element_size()
    for extent, stride in zip(tensor.shape, tensor.stride()):
        size *= extent if stride else 1
    return size


def _sizes(values: Any) -> int:
    return sum(_size(value) for value in tree_leaves(values) if isinstance(value, torch.Tensor))


def kind_of(name: str) -> str:
    """An operation's name, or "products" or "attention"."""
    if name in PRODUCTS:
        return "products"
    return "attention" if any(kind in name for kind in ATTENTION) else name


class Traffic(TorchDispatchMode):
    """A context that adds up, by operation, the bytes of its inputs and outputs.

    Of a matrix product and of fused attention they are under "products" and "attention": what stays is the traffic
    that fewer passes would save.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if not func.is_view and name not in NOTHING:
            self.bytes[kind_of(name)] += self._moved(name, args, kwargs or {}, out)
        return out

    @staticmethod
    def _moved(name: str, args: Any, kwargs: Any, out: Any) -> int:
        given = 0 if name in MADE else _sizes((args, kwargs))
        if name == "index_select" or name == "index":
            return 2 * _sizes(out)
        if name in ("index_add_", "index_copy_"):  # rows are read and written, not all of the tensor
            return (3 if name == "index_add_" else 2) * _size(args[-1])
        if name.startswith("_fused_"):  # all is read, and written but for gradients that are not scaled
            kept = () if kwargs.get("grad_scale") is not None else (1,)
            return given + _sizes(
                [part for index, part in enumerate(args) if isinstance(part, list) and index not in kept]
            )
        if name.startswith("_foreach_") and name.endswith("_"):
            return given + _sizes(args[0]) - (_sizes(args[0]) if name == "_foreach_copy_" else 0)
        if name.endswith("_"):
            return given + (0 if name in OVERWRITING else _size(args[0]))
        return given + (0 if "out" in kwargs else _sizes(out))
