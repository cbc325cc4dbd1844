"""Attention: all backends compute the literal formula, image by image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinoreg.models import attention
from dinoreg.models.attention import PACKED, attend, attend_groups, attention_weights, resolve_backend
from dinoreg.runtime import packed_attention
from dinoreg.runtime.errors import UserError

CPU = torch.device("cpu")


def literal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query at a time, (B, T, heads, head_dim)."""
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for t in range(q.shape[1]):
                scores = torch.stack([q[b, t, h] @ k[b, s, h] for s in range(k.shape[1])])
                weights = (scores / q.shape[-1] ** 0.5).exp()
                weights = weights / weights.sum()
                out[b, t, h] = sum(w * v[b, s, h] for s, w in enumerate(weights))
    return out


def random_qkv(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (2 * torch.randn(*shape, generator=generator) for _ in range(3))
    return q, k, v


@pytest.mark.parametrize("backend", ["plain", "sdpa"])
def test_every_backend_equals_attention_computed_one_query_at_a_time(backend: str) -> None:
    q, k, v = random_qkv(2, 5, 3, 4)
    torch.testing.assert_close(attend(q, k, v, backend), literal(q, k, v))


def test_plain_and_sdpa_have_the_same_gradients() -> None:
    grads = {}
    for backend in ("plain", "sdpa"):
        inputs = [x.double().requires_grad_() for x in random_qkv(3, 17, 2, 8)]
        attend(*inputs, backend).square().sum().backward()
        grads[backend] = [x.grad for x in inputs]
    torch.testing.assert_close(grads["plain"], grads["sdpa"])


@pytest.mark.parametrize("backend", ["plain", "sdpa"])
def test_bfloat16_attention_is_as_close_to_float32_as_its_inputs_allow(backend: str) -> None:
    q, k, v = (x.bfloat16() for x in random_qkv(2, 33, 2, 16))
    exact = attend(q.float(), k.float(), v.float(), "plain")
    low = attend(q, k, v, backend)
    assert low.dtype == torch.bfloat16
    assert (low.float() - exact).norm() < 0.01 * exact.norm()


def test_weights_are_probabilities_and_reproduce_the_output() -> None:
    q, k, v = random_qkv(2, 6, 3, 4)
    weights = attention_weights(q.transpose(1, 2), k.transpose(1, 2))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 6))
    torch.testing.assert_close((weights @ v.transpose(1, 2)).transpose(1, 2), attend(q, k, v, "sdpa"))


@pytest.mark.parametrize("backend", ["plain", "sdpa"])
def test_packed_groups_do_not_see_one_another(backend: str) -> None:
    shapes = ((2, 5), (3, 4), (1, 7))
    qkv = torch.randn(2 * 5 + 3 * 4 + 7, 3, 2, 8, generator=torch.Generator().manual_seed(1))
    packed = attend_groups(qkv, shapes, (backend,) * 3)
    start = 0
    for images, tokens in shapes:
        for _ in range(images):
            one = qkv[start : start + tokens]
            q, k, v = (one[:, i].unsqueeze(0) for i in range(3))
            expected = literal(q, k, v).squeeze(0).flatten(1)
            torch.testing.assert_close(packed[start : start + tokens], expected)
            start += tokens


def test_groups_may_use_different_backends_on_a_cpu() -> None:
    shapes = ((2, 5), (3, 4))
    qkv = torch.randn(22, 3, 2, 8, generator=torch.Generator().manual_seed(2))
    mixed = attend_groups(qkv, shapes, ("plain", "sdpa"))
    torch.testing.assert_close(mixed, attend_groups(qkv, shapes, ("sdpa", "plain")))


def test_auto_chooses_by_precision_and_length_on_a_cpu() -> None:
    assert resolve_backend("auto", CPU, 261, torch.bfloat16) == "plain"
    assert resolve_backend("auto", CPU, 301, torch.bfloat16) == "sdpa"
    assert resolve_backend("auto", CPU, 50, torch.float32) == "sdpa"
    assert resolve_backend("plain", CPU, 1000) == "plain"
    assert resolve_backend("sdpa", CPU, 10, torch.bfloat16) == "sdpa"


def test_an_unknown_backend_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="attention='flash' is not a backend; expected one of auto"):
        resolve_backend("flash", CPU)


def test_xformers_without_cuda_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"xformers.*CUDA") as caught:
        resolve_backend("xformers", CPU)
    assert "\n" not in str(caught.value)


def test_where_a_better_backend_does_not_run_its_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    device, problems = torch.device("cuda"), {"xformers": "built for another PyTorch", "varlen": "no float32"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for module in (attention, packed_attention):
        monkeypatch.setattr(module, "run_problem", lambda device, dtype, backend: problems.get(backend))

    def said(name: str, device: torch.device = device) -> str:
        return attention.describe_backend(name, device, 50, torch.bfloat16)

    because = "xformers does not run here: built for another PyTorch"
    assert said("auto") == f"sdpa ({because}; varlen does not run here: no float32)"
    for backend in ("xformers", "varlen"):
        with pytest.raises(UserError, match=f"{backend}.*cannot run here: {problems[backend]}; use auto or sdpa"):
            resolve_backend(backend, device)
    del problems["varlen"]
    assert said("auto") == f"varlen ({because})"
    assert said("varlen") == resolve_backend("auto", device) == "varlen"
    del problems["xformers"]
    assert said("auto") == "xformers"
    assert said("sdpa") == "sdpa"
    assert said("auto", CPU) == "plain"


def test_varlen_is_given_the_boundaries_of_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import varlen

    def literally(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, same: Tensor, longest: int, again: int) -> Tensor:
        assert starts is same
        assert (starts.dtype, longest, again) == (torch.int32, max(tokens for _, tokens in some), longest)
        bounds = zip(starts.tolist(), starts.tolist()[1:], strict=False)
        return torch.cat([literal(*(x[None, start:stop] for x in (q, k, v)))[0] for start, stop in bounds])

    monkeypatch.setattr(varlen, "varlen_attn", literally)
    shapes = ((2, 5), (1, 7), (3, 4))
    qkv = torch.randn(29, 3, 2, 8, generator=torch.Generator().manual_seed(4))
    for some in (shapes, shapes[:1]):  # a single group, too
        part = qkv[: sum(images * tokens for images, tokens in some)]
        expected = attend_groups(part, some, ("sdpa",) * len(some))
        torch.testing.assert_close(attend_groups(part, some, ("varlen",) * len(some)), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("packed", PACKED)
def test_packed_backends_equal_sdpa_and_its_gradients(packed: str) -> None:
    device = torch.device("cuda")
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 2e-2)):
        if packed == "varlen" and dtype == torch.float32:
            continue  # it has no kernel for it
        resolve_backend(packed, device, dtype=dtype)  # raises, and so fails, where its kernels do not run
        shapes = ((3, 41), (5, 17))
        generator = torch.Generator().manual_seed(3)
        start = torch.randn(3 * 41 + 5 * 17, 3, 2, 64, generator=generator).to(device, dtype)
        results = []
        for backend in (packed, "sdpa"):
            qkv = start.clone().requires_grad_()
            out = attend_groups(qkv, shapes, (backend, backend))
            out.float().square().sum().backward()
            results.append((out, qkv.grad))
        torch.testing.assert_close(results[0], results[1], rtol=tolerance, atol=tolerance)
