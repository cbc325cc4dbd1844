"""Bytes that a step moves whose blocks torch.compile has fused: inductor plans its kernels, and none is compiled."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._inductor import config
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import BaseSchedulerNode, ExternKernelSchedulerNode
from torch.utils._python_dispatch import _disable_current_modes

from tests.fake_cuda.traffic import kind_of


@contextlib.contextmanager
def planned_kernels(found: Counter[str]) -> Iterator[None]:
    """A context in which compiled graphs run operation by operation, and add to `found` the bytes of their kernels.

    These are inductor's own reckoning: of a kernel every buffer that it reads or writes once, whole.
    """

    def plan(lowering: GraphLowering) -> SimpleNamespace:
        lowering._update_scheduler()
        moved: Counter[str] = Counter()
        for node in lowering.scheduler.nodes:
            moved[_kind(node)] += node.get_read_write_buffers_sizes()

        def call(arguments: list[Any]) -> Any:
            found.update(moved)
            given = list(arguments)
            arguments.clear()
            with _disable_current_modes():
                return torch.fx.Interpreter(lowering.module).run(*given)

        return SimpleNamespace(call=call)

    compiler = torch.compile

    def compile_(forward: Callable[..., Any]) -> Callable[..., Any]:
        compiled = compiler(forward)

        def run(*arguments: Any) -> Any:
            with _disable_current_modes():  # under one of them nothing compiled would run
                return compiled(*arguments)

        return run

    with (
        mock.patch.object(torch, "compile", compile_),
        mock.patch.object(GraphLowering, "_compile_to_module", plan),
        config.patch(force_disable_caches=True),
    ):
        yield


def _kind(node: BaseSchedulerNode) -> str:
    if not isinstance(node, ExternKernelSchedulerNode):
        return "fused"
    words = str(node.node.python_kernel_name or node.node.op_overload).split(".")
    return next((kind for kind in map(kind_of, words) if kind in ("products", "attention")), words[-1])
