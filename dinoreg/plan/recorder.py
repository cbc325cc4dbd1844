"""Records the memory and the operations of a training step, operation by operation, below autograd.

Works on real and on fake tensors. A storage counts from the operation that makes it until it is freed; its purpose (its
part) follows from where in the step it was made. Operations are those of matrix products.
"""

import weakref
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from dinoreg.train.parallelize import local
from dinoreg.train.state import TrainState

aten = torch.ops.aten
Parts = dict[str, int]  # bytes by part

WORKING = "working memory"
# In the order in which they are shown.
PARTS = (
    "student weights",
    "teacher weights",
    "anchor weights",
    "tutor weights",
    "AdamW moments",
    "gradients",
    "weights in low precision",
    "gathered weights",
    "activations of the backbone",
    "activations of the heads",
    "logits and targets",
    "similarities for KoLeo",
    "crops",
    WORKING,
)
STATE = PARTS[:5]  # lives from step to step
# Moments: the phases of a step, in order. Within a phase the same tensors are alive, up to the number of blocks.
TEACHER, CLASS_TOKENS, KOLEO, STUDENT = "teacher", "class tokens", "KoLeo", "student and losses"
LAST_BLOCKS, BLOCKS, BACKWARD_END = "backward, last blocks", "backward, blocks", "backward, end"
UPDATE = "update"
MOMENTS = (TEACHER, CLASS_TOKENS, KOLEO, STUDENT, LAST_BLOCKS, BLOCKS, BACKWARD_END, UPDATE)

_ATTENTION = (
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
    aten.bmm,  # attention without a fused kernel, and positions as they are resampled, which are next to nothing
)


def count_operations(function: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    """Floating-point operations of a call of an ATen function: of a matrix product, else 0.

    The backward pass of fused attention counts as two forward passes: what a kernel recomputes is not counted.
    PyTorch's own counter has no formula for the CPU's kernel.
    """
    if function is aten._scaled_dot_product_flash_attention_for_cpu:
        return int(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))
    if function is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return 2 * int(sdpa_flop_count(*(tensor.shape for tensor in args[1:4])))
    formula = flop_registry.get(function)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


class Recorder(TorchDispatchMode):
    """A context that records storages and operations of a training step.

    operations  {"student" | "teacher" | "heads" | "again" | "tutor" | "KoLeo" | "attention": operations}; "heads" with
                losses but KoLeo, "again" are repeated or additional forward passes, "attention" is included in others
    """

    def __init__(self, prototypes: Collection[int], koleo_images: int) -> None:
        """
        prototypes    widths by which logits and targets are recognised
        koleo_images  number of images whose class tokens KoLeo compares
        """
        super().__init__()
        self.operations: Counter[str] = Counter()
        self._prototypes, self._koleo_images = frozenset(prototypes), koleo_images
        self._moment = TEACHER
        self._owners = ["step"]  # of what is computed: the innermost module that is watched
        self._between = "KoLeo"  # what computes outside of these modules
        self._parts: list[str] = []  # of every storage
        self._sizes: list[int] = []  # as they are now
        self._alive: dict[int, tuple[int, weakref.ref[Any]]] = {}  # by address: number of the storage
        self._events: list[tuple[str, int, int]] = []  # (moment, number, bytes more or less)

    # ---------------------------------------------------------------- storages

    def hold(self, tensor: Tensor, part: str) -> None:
        """Count a tensor's storage as `part`, one of `PARTS`, from now on, unless it is counted already."""
        storage = local(tensor).untyped_storage()
        address = storage._cdata
        if address not in self._alive:
            number = len(self._parts)
            self._parts.append(part)
            self._sizes.append(0)
            self._alive[address] = number, weakref.ref(storage, lambda _: self._freed(address))
            self._resized(number, storage.nbytes())

    def hold_state(self, state: TrainState, batch: Any) -> None:
        """Count the tensors of a training state and a batch, which exist before the step."""
        networks: dict[str, nn.Module | None] = {"student weights": state.student, "teacher weights": state.teacher}
        networks["anchor weights"] = state.anchor
        networks["tutor weights"] = None if state.tutor is None else state.tutor.network
        for part, network in networks.items():
            for parameter in network.parameters() if network is not None else ():
                self.hold(parameter, part)
        for moments in state.optimizer.state.values():
            for value in moments.values():
                self.hold(value, "AdamW moments")
        for center in state.centers.values():
            self.hold(center, "logits and targets")
        for value in vars(batch).values():
            if isinstance(value, Tensor):
                self.hold(value, "crops")

    def label_gradients(self, student: nn.Module) -> None:
        """After a step, label the storages of the student's gradients."""
        for parameter in student.parameters():
            if parameter.grad is not None:
                self._relabel(parameter.grad, "gradients")

    def _resized(self, number: int, size: int) -> None:
        self._events.append((self._moment, number, size - self._sizes[number]))
        self._sizes[number] = size

    def _freed(self, address: int) -> None:
        number, _ = self._alive.pop(address)
        self._resized(number, 0)

    def _part(self, tensor: Tensor) -> str | None:
        found = self._alive.get(_address(tensor))
        return None if found is None else self._parts[found[0]]

    def _relabel(self, tensor: Tensor, part: str) -> None:
        self._parts[self._alive[_address(tensor)][0]] = part

    @contextmanager
    def _following_resizes(self) -> Iterator[None]:
        """A context that records resized storages: FSDP2 frees gathered weights by shrinking their storage."""
        resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            found = self._alive.get(storage._cdata)
            resize(storage, size)
            if found is not None:
                self._parts[found[0]] = "gathered weights"
                self._resized(found[0], storage.nbytes())
            return storage

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]

    def peaks(self, without: Collection[str] = ()) -> dict[str, Parts]:
        """{moment: {part: bytes} at its peak}, without the parts in `without`."""
        held: Counter[str] = Counter()
        most: dict[str, int] = {}
        peaks: dict[str, Parts] = {}
        total = 0
        for moment, number, size in self._events:
            part = self._parts[number]
            if part not in without:
                held[part] += size
                total += size
            moment = KOLEO if held["similarities for KoLeo"] else moment
            if total > most.get(moment, -1):
                most[moment], peaks[moment] = total, {name: held[name] for name in PARTS if held[name]}
        return {name: peaks[name] for name in MOMENTS if name in peaks}

    # ---------------------------------------------------------------- where in the step

    @contextmanager
    def watching(self, state: TrainState) -> Iterator[None]:
        """A context with hooks on the networks of `state` that follow the current module and the backward pass."""
        blocks = state.student.backbone.blocks
        self._between = "KoLeo" if state.tutor is None else "tutor"
        owners = {
            state.teacher.backbone: "teacher",
            state.student.backbone: "student",
            **{head: "teacher's heads" for name, head in state.teacher.items() if name != "backbone"},
            **{head: "student's heads" for name, head in state.student.items() if name != "backbone"},
            **dict.fromkeys(blocks, "block"),
            **({} if state.anchor is None else {state.anchor: "again"}),
        }
        handles: list[Any] = []
        for module, owner in owners.items():
            handles.append(module.register_forward_pre_hook(partial(self._enter_module, owner)))
            handles.append(module.register_forward_hook(self._leave_module, always_call=True))
        # The gradient of a block's output comes just before its backward pass, that of the first one's input last.
        handles.append(blocks[0].register_forward_pre_hook(lambda _, args: self._mark(BACKWARD_END, args[0])))
        for index, block in enumerate(blocks):
            moment = LAST_BLOCKS if index >= len(blocks) - 2 else BLOCKS
            handles.append(block.register_forward_hook(partial(self._mark_output, moment)))
        try:
            with self._following_resizes():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter_module(self, owner: str, *_: Any) -> None:
        if owner == "student":
            self._enter(STUDENT if torch.is_grad_enabled() else CLASS_TOKENS)
            owner = "student" if torch.is_grad_enabled() else "again"
        elif owner == "block":
            owner = "again" if _in_backward() else self._owners[-1]
        self._owners.append(owner)

    def _leave_module(self, *_: Any) -> None:
        self._owners.pop()

    def _mark_output(self, moment: str, _: nn.Module, __: Any, out: Tensor) -> None:
        self._mark(moment, out)

    def _mark(self, moment: str, tensor: Tensor) -> None:
        """Begin a moment when the gradient of a tensor has been computed."""
        if tensor.requires_grad and not _in_backward():
            tensor.register_hook(lambda _: self._enter(moment))

    def _enter(self, moment: str) -> None:
        self._moment = moment
        self._resized(0, self._sizes[0])  # memory in use now is in use in this moment, too

    # ---------------------------------------------------------------- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # autograd reads the device of fake tensors all the time
            return func(*args)
        if self._moment in (LAST_BLOCKS, BLOCKS, BACKWARD_END) and not _in_backward():
            self._enter(UPDATE)
        out = func(*args, **kwargs)
        self._count(func.overloadpacket, count_operations(func.overloadpacket, args, kwargs, out), out)
        unknown = [each for each in tree_leaves(out) if isinstance(each, Tensor) and _address(each) not in self._alive]
        if unknown:
            # A view of what no step has made, such as what positions are resampled with, is no tensor of a step's.
            before = {_address(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
            for tensor in unknown:
                if _address(tensor) not in before:
                    self.hold(tensor, self._part_of(func, args, tensor))
        if func is aten._foreach_copy_.default and self._part(args[1][0]) in ("student weights", "gathered weights"):
            for tensor in args[0]:
                self._relabel(tensor, "weights in low precision")
        if func.namespace == "fsdp":
            part = "gradients" if "chunk_cat" in str(func) else "gathered weights"
            for tensor in tree_leaves((args[0], out, kwargs.get("out"))):
                if isinstance(tensor, Tensor) and self._part(tensor) == WORKING:
                    self._relabel(tensor, part)
        return out

    def _count(self, function: Any, operations: int, out: Any) -> None:
        if not operations:
            return
        owner = self._owners[-1]
        if owner == "step" and self._between == "KoLeo" and not self._compares(function, out):
            owner = "heads"  # products of another loss
        if _in_backward() and owner != "again":
            owner = "heads" if self._moment == STUDENT else "student"
        kind = {"teacher's heads": "heads", "student's heads": "heads", "step": self._between}.get(owner, owner)
        self.operations[kind] += operations
        if function in _ATTENTION and kind not in ("KoLeo", "heads"):
            self.operations["attention"] += operations

    def _compares(self, function: Any, out: Tensor) -> bool:
        """Whether a product is that of all pairs of class tokens, of KoLeo."""
        return function is aten.bmm and out.shape == (2, *(self._koleo_images,) * 2)

    def _part_of(self, func: Any, args: Sequence[Any], tensor: Tensor) -> str:
        """The part that a new tensor belongs to."""
        owner = self._owners[-1]
        if func is aten._to_copy.default and self._part(args[0]) in ("student weights", "gathered weights"):
            return "weights in low precision"
        if tensor.ndim > 1 and tensor.shape[-1] in self._prototypes:
            return "logits and targets"
        if _in_backward():
            return WORKING
        if owner == "step" and tensor.ndim == 4 and self._between == "KoLeo":
            return "crops"  # of a micro-batch
        if owner == "step" and self._compares(func.overloadpacket, tensor):
            return "similarities for KoLeo"
        return {"student": "activations of the backbone", "student's heads": "activations of the heads"}.get(
            owner, WORKING
        )


def _address(tensor: Tensor) -> int:
    return local(tensor).untyped_storage()._cdata


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
