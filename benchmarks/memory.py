"""The memory that `dinoreg plan` foretells, against that of the real step: traced without a device, measured on CUDA.

    python benchmarks/memory.py [--models vits14_reg4 vitb14_reg4 vitl16_short_reg4_in1k] [--batch-size 32]

Traced is the step itself on fake tensors, which have shapes and no memory: every tensor that it makes is counted while
it lives, so that the peak is exact for any size of model. What kernels take for themselves is in the measured figure
only, which needs a CUDA device that the run fits on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import measure
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 2**30
MODELS = ("vits14_reg4", "vitb14_reg4", "vitl16_short_reg4_in1k")


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that operations inside make, as long as they live.

    now   bytes alive         peak  most at any time since the last `reset`
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def note(self, tensor: object) -> None:
        """Count a tensor, which may have been there before."""
        if not isinstance(tensor, Tensor):
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen[key] = weakref.ref(storage, lambda _: self._forget(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        del self._seen[key]
        self.now -= size

    def reset(self) -> None:
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            self.note(leaf)
        return out


@contextlib.contextmanager
def pieces_as_on_a_device() -> Iterator[None]:
    """The losses' scratch memory as large as it is on an accelerator."""
    from dinoreg.runtime import tiling as rows

    with mock.patch.object(rows, "CPU_PIECE", rows.DEVICE_PIECE):
        yield


def step_peak(config: Any, fake: bool = True) -> int:
    """Most bytes of tensors alive in the second step of a run of one process, on the CPU.

    fake  nothing is computed and no memory taken; not with micro-batches, whose sizes hang on the masks' content
    """
    from dinoreg.plan.speed import random_batch
    from dinoreg.runtime.device import DTYPES
    from dinoreg.train.schedules import Now
    from dinoreg.train.state import Networks, build_networks, build_state
    from dinoreg.train.step import train_step

    class Placed(Networks):
        def to(self, *args: Any, **kwargs: Any) -> Any:  # fake parameters cannot be moved, and are there already
            return self

    cpu, live = torch.device("cpu"), Live()
    with torch.device("meta") if fake else contextlib.nullcontext():
        student, teacher = build_networks(config)
    batch = random_batch(config, student["backbone"].patch_size, cpu)
    mode = FakeTensorMode() if fake else None
    with mode or contextlib.nullcontext():
        if mode is not None:
            values = {name: mode.from_tensor(value) for name, value in vars(batch).items() if isinstance(value, Tensor)}
            batch = dataclasses.replace(batch, **values)
            student, teacher = (Placed(dict(_without_values(network).items())) for network in (student, teacher))
        state = build_state(config, student, teacher, cpu, DTYPES[config.precision])
        for tensor in (*student.parameters(), *teacher.parameters(), *state.centers.values(), *vars(batch).values()):
            live.note(tensor)
        now = Now(lr=1e-5, last_layer_lr=1e-5, weight_decay=0.04, momentum=0.99, teacher_temp=0.05)
        options = {"loss": config.loss, "clip_grad": config.optim.clip_grad, "accumulate": config.optim.accumulate}
        with live:
            for _ in range(2):  # the first makes the optimizer's moments
                live.reset()
                train_step(state, batch, now, dtype=DTYPES[config.precision], seed=0, **options)
    return live.peak


def _without_values(network: nn.Module) -> Any:
    """The same network with parameters of the same shapes, made under the mode that is on."""
    for module in network.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                empty = torch.empty(parameter.shape)
                module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    return network


def compare(config: Any) -> dict[str, Any]:
    """One row: what the plan says, what the trace finds, and what a CUDA device allocated, in GiB."""
    from dinoreg.plan import plan
    from dinoreg.plan.job import describe
    from dinoreg.plan.memory import memory_of
    from dinoreg.plan.speed import probe

    found = plan(config, gpus=1, gpu="h200", probe=False)
    told = found.memory.allocated
    begun = time.perf_counter()
    with pieces_as_on_a_device():
        traced = step_peak(config)
    row = {
        "model": config.model.name,
        "batch": config.batch_size,
        "plan": round(told / GIB, 2),
        "traced": round(traced / GIB, 2),
        "plan over traced": round(told / traced, 3),
        "seconds to trace": round(time.perf_counter() - begun, 1),
    }
    if torch.cuda.is_available():
        from dinoreg.plan.devices import local_device

        device = torch.device("cuda", torch.cuda.current_device())
        job = describe(config, 1, 1, local_device())
        measured = probe(job, device) if memory_of(job).fits else None
        if measured is not None and measured.peak_memory:
            row["measured"] = round(measured.peak_memory / GIB, 2)
            row["plan over measured"] = round(memory_of(job).allocated / measured.peak_memory, 3)
            row["images/s"] = round(measured.images_per_second, 1)
    return row


def main() -> None:
    options = measure.parser(__doc__)
    options.add_argument("--models", nargs="+", default=list(MODELS), help="names in configs/, or YAML files")
    options.add_argument("--batch-size", type=int, default=32)
    options.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    options.add_argument("overrides", nargs="*", metavar="key=value", help="of the config, after a --")
    given = options.parse_args()
    from dinoreg.config.load import load_config

    overrides = [
        f"batch_size={2 if given.short else given.batch_size}",
        f"precision={given.precision}",
        "model.attention=sdpa",
        *given.overrides,
    ]
    if given.short:
        given.models = given.models[:1]
        overrides += ["model.dim=64", "model.depth=2", "model.heads=1", "head.prototypes=64"]
    rows = [compare(load_config(name, overrides)) for name in given.models]
    settings = {"batch_size": given.batch_size, "precision": given.precision, "overrides": given.overrides}
    measure.report("memory", settings, {row["model"]: row for row in rows}, measure.table(rows))


if __name__ == "__main__":
    main()
