"""xformers is tried, and where it does not work the reason is given in its loader's or its operator's words."""

from __future__ import annotations

import builtins
import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dinoreg.runtime import environment, packed_attention
from dinoreg.runtime.packed_attention import load_problem, reason

# Taken from xformers 0.0.35 beside PyTorch 2.14 for CUDA 13.
LOADER = """xFormers can't load C++/CUDA extensions. xFormers was built for:
    PyTorch 2.10.0+cu128 with CUDA 1208 (you have 2.14.1+cu130)
    Python  3.10.19 (you have 3.11.7)
  Please reinstall xformers (see https://github.com/facebookresearch/xformers#installing-xformers)
  Memory-efficient attention, SwiGLU, sparse and more won't be available."""
OPERATOR = """No operator found for `memory_efficient_attention_forward` with inputs:
     query       : shape=(1, 24, 2, 64) (torch.float32)
     attn_bias   : <class 'xformers.ops.fmha.attn_bias.BlockDiagonalMask'>
     p           : 0.0
`fa2F@2.5.7-pt` is not supported because:
    xFormers wasn't build with CUDA support
    dtype=torch.float32 (supported: {torch.bfloat16, torch.float16})
`cutlassF-pt` is not supported because:
    xFormers wasn't build with CUDA support"""


def test_an_operators_refusal_is_given_by_its_reasons() -> None:
    assert reason(NotImplementedError(OPERATOR)) == (
        "xFormers wasn't build with CUDA support; dtype=torch.float32 (supported: {torch.bfloat16, torch.float16})"
    )


def test_a_loaders_refusal_is_given_by_what_it_was_built_for_and_the_systems_error() -> None:
    error = RuntimeError(LOADER)
    error.__cause__ = OSError("libcudart.so.12: cannot open shared object file\nsecond line")
    assert reason(error) == (
        "PyTorch 2.10.0+cu128 with CUDA 1208 (you have 2.14.1+cu130); Python  3.10.19 (you have 3.11.7); "
        "libcudart.so.12: cannot open shared object file"
    )


def test_any_other_error_is_given_by_its_first_line_or_its_kind() -> None:
    assert reason(RuntimeError("CUDA error: no kernel image\nCUDA kernel errors might be reported later")) == (
        "CUDA error: no kernel image"
    )
    assert reason(NotImplementedError()) == "NotImplementedError"


def test_a_package_whose_extension_did_not_load_has_a_problem_though_it_imports(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = SimpleNamespace(_cpp_lib=SimpleNamespace(_cpp_library_load_exception=RuntimeError(LOADER)))
    monkeypatch.setitem(sys.modules, "xformers", broken)
    assert "you have 2.14.1+cu130" in str(load_problem())
    broken._cpp_lib._cpp_library_load_exception = None
    assert load_problem() is None


def test_a_package_that_does_not_import_has_a_problem_and_says_it_here_only(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def importing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "xformers":
            assert not logging.getLogger("xformers").isEnabledFor(logging.WARNING)
            raise AttributeError("module 'triton' has no attribute 'language'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importing)
    assert load_problem() == "module 'triton' has no attribute 'language'"
    assert logging.getLogger("xformers").isEnabledFor(logging.WARNING)


def test_the_environment_says_what_attention_runs_on_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        assert environment.environment()["attention"] is None
    properties = SimpleNamespace(name="GPU", major=9, minor=0, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr("dinoreg.runtime.device.cuda_has_bf16", lambda device: True)
    tried = []
    for problem, backend in ((None, "xformers"), ("no kernel", "varlen")):
        monkeypatch.setattr(
            packed_attention,
            "run_problem",
            lambda *given, problem=problem: tried.append(given) or (problem if given[2] == "xformers" else None),
        )
        reason = problem and f"xformers does not run here: {problem}"
        assert environment._torch()["attention"] == {"backend": backend, "reason": reason}
    where = (torch.device("cuda", 0), torch.bfloat16)
    assert tried == [(*where, "xformers"), (*where, "xformers"), (*where, "varlen")]


@pytest.mark.gpu
def test_on_a_gpu_xformers_loads_and_runs() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert packed_attention.run_problem(torch.device("cuda", 0), dtype, "xformers") is None
