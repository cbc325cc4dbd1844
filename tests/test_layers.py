"""The parts of a block, against their literal forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoreg.models.layers import (
    Attention,
    Block,
    LayerScale,
    Mlp,
    PatchEmbed,
    SwiGLU,
    swiglu_hidden_dim,
)
from dinoreg.models.stochastic_depth import Kept, add_samples, draw_kept, gather_samples, token_rows
from dinoreg.runtime.errors import UserError

CPU = torch.device("cpu")


def drawn(shapes: tuple[tuple[int, int], ...], rate: float) -> Kept:
    """The kept images of each group in one branch of one block."""
    (kept,) = draw_kept(shapes, [rate], CPU)
    return kept


def test_patch_embedding_equals_the_convolution_whose_weights_it_holds() -> None:
    torch.manual_seed(0)
    embed = PatchEmbed(patch_size=4, in_channels=5, dim=7)
    images = torch.randn(2, 5, 12, 20)
    expected = embed.proj(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(images), expected, rtol=1e-5, atol=1e-5)
    layout = images.to(memory_format=torch.channels_last)
    torch.testing.assert_close(embed(layout), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 12, 21), "image size 12x21 is not a multiple of the patch size 4"),
        ((2, 4, 12, 20), r"images have shape \(2, 4, 12, 20\); expected \(B, 3, H, W\)"),
        ((3, 12, 20), r"expected \(B, 3, H, W\)"),
    ],
)
def test_images_that_do_not_fit_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PatchEmbed(4, 3, 7)(torch.zeros(shape))


def test_swiglu_widths_are_those_of_the_published_models() -> None:
    assert [swiglu_hidden_dim(4 * dim) for dim in (1536, 1024, 768, 384)] == [4096, 2736, 2048, 1024]


def test_swiglu_gates_with_the_first_half() -> None:
    torch.manual_seed(0)
    ffn = SwiGLU(6, 24)
    x = torch.randn(5, 6)
    both = x @ ffn.w12.weight.T + ffn.w12.bias
    gate, value = both[:, :16], both[:, 16:]
    expected = (gate * torch.sigmoid(gate) * value) @ ffn.w3.weight.T + ffn.w3.bias
    torch.testing.assert_close(ffn(x), expected)


def test_mlp_uses_the_exact_gelu() -> None:
    torch.manual_seed(0)
    mlp = Mlp(6, 10)
    x = torch.randn(5, 6)
    hidden = mlp.fc1(x)
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(mlp(x), mlp.fc2(gelu))


@pytest.mark.parametrize("value", [None, 0.0])
def test_a_falsy_layerscale_leaves_no_key(value: float | None) -> None:
    block = Block(8, 2, layerscale=value)
    assert isinstance(block.ls1, nn.Identity)
    assert not [key for key in block.state_dict() if "ls" in key]
    assert "ls1.gamma" in Block(8, 2, layerscale=1e-5).state_dict()


def literal_block(block: Block, x: Tensor) -> Tensor:
    """One image (T, D), no stochastic depth."""
    attn = block.attn
    normed = F.layer_norm(x, x.shape[-1:], block.norm1.weight, block.norm1.bias, 1e-6)
    q, k, v = (normed @ attn.qkv.weight.T + attn.qkv.bias).chunk(3, dim=-1)
    heads = []
    for h in range(attn.heads):
        part = slice(h * attn.head_dim, (h + 1) * attn.head_dim)
        weights = (q[:, part] @ k[:, part].T / attn.head_dim**0.5).softmax(-1)
        heads.append(weights @ v[:, part])
    x = x + block.ls1(torch.cat(heads, -1) @ attn.proj.weight.T + attn.proj.bias)
    return x + block.ls2(block.mlp(F.layer_norm(x, x.shape[-1:], block.norm2.weight, block.norm2.bias, 1e-6)))


def random_block(**options: object) -> Block:
    torch.manual_seed(0)
    block = Block(12, 3, layerscale=0.5, **options)  # type: ignore[arg-type]
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


@pytest.mark.parametrize("options", [{}, {"ffn": "swiglu"}, {"head_dim": 5}])
def test_block_equals_its_formula(options: dict[str, object]) -> None:
    block = random_block(**options)
    x = torch.randn(2, 5, 12)
    packed = block(x.flatten(0, 1), ((2, 5),), ("plain",)).unflatten(0, (2, 5))
    torch.testing.assert_close(packed, torch.stack([literal_block(block, image) for image in x]))


def test_kept_counts_follow_the_rule() -> None:
    for images, rate, count in ((128, 0.3, 89), (5, 0.3, 3), (1, 0.9, 1), (3, 0.99, 1), (10, 0.1, 9)):
        (kept,) = drawn(((images, 7),), rate).images
        assert len(kept) == count == max(int(images * (1 - rate)), 1)
        assert len(set(kept.tolist())) == count
        assert set(kept.tolist()) <= set(range(images))


@pytest.mark.parametrize("by_token", [False, True])  # True: as on CUDA
@pytest.mark.parametrize("images", [(4, 5), (4, 8)])  # 2 of 4 and 3 of 5, or 4 of 8: another factor, or the same
def test_gather_and_add_equal_plain_indexing_with_the_same_gradients(images: tuple[int, int], by_token: bool) -> None:
    torch.manual_seed(0)
    shapes = ((images[0], 3), (images[1], 2))
    kept = drawn(shapes, 0.4)
    if by_token:
        kept = kept._replace(tokens=token_rows(shapes, [index[None] for index in kept.images])[0])
    start = torch.randn(12 + 2 * images[1], 6)
    weight, gamma0 = torch.randn(6, 6), torch.randn(6)

    def ours(x: Tensor, gamma: Tensor | None) -> Tensor:
        part, stream = gather_samples(x, shapes, kept)
        return add_samples(stream, (part @ weight).tanh(), gamma, shapes, kept)

    def literal(x: Tensor, gamma: Tensor | None) -> Tensor:
        groups = [x[:12].unflatten(0, (4, 3)), x[12:].unflatten(0, (images[1], 2))]
        out = []
        for group, index in zip(groups, kept.images):
            rows = list(group.unbind(0))
            for i in index.tolist():
                branch = (group[i] @ weight).tanh()
                branch = branch if gamma is None else branch * gamma
                rows[i] = rows[i] + branch * (len(rows) / len(index))
            out.append(torch.cat(rows))
        return torch.cat(out)

    for use_gamma in (True, False):
        results = []
        for function in (ours, literal):
            x = start.clone().requires_grad_()
            gamma = gamma0.clone().requires_grad_() if use_gamma else None
            out = function(x, gamma)
            (out * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
            results.append([out, x.grad] + ([gamma.grad] if gamma is not None else []))
        torch.testing.assert_close(results[0], results[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gathers_and_adds_the_same_samples() -> None:
    shapes, device = ((16, 9), (64, 5)), torch.device("cuda")
    (kept,) = draw_kept(shapes, [0.4], device)
    assert kept.tokens is not None
    start, weight, gamma = torch.randn(464, 64), torch.randn(64, 64), torch.randn(64)
    results = []
    for there in (device, CPU):
        tensors = [tensor.to(there).requires_grad_() for tensor in (start, weight, gamma)]
        images = [index.to(there) for index in kept.images]
        same = Kept(images, kept.tokens if there == device else None, kept.zero.to(there))
        part, stream = gather_samples(tensors[0], shapes, same)
        out = add_samples(stream, (part @ tensors[1]).tanh(), tensors[2], shapes, same)
        (out * torch.arange(out.numel(), device=there).view_as(out).cos()).sum().backward()
        results.append([out.cpu(), *(tensor.grad.cpu() for tensor in tensors)])
    torch.testing.assert_close(*results, atol=1e-3, rtol=1e-3)


def test_subset_gradients_agree_with_finite_differences() -> None:
    torch.manual_seed(0)
    shapes = ((3, 2), (2, 1))
    kept = drawn(shapes, 0.4)
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    gamma = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, gamma: Tensor) -> Tensor:
        part, stream = gather_samples(x, shapes, kept)
        return add_samples(stream, part.sin(), gamma, shapes, kept)

    assert torch.autograd.gradcheck(function, (x, gamma))


def zero_ffn(block: Block) -> Block:
    """Leave only the attention residual, which alone is linear in the draw."""
    nn.init.zeros_(block.ls2.gamma)  # type: ignore[arg-type]
    return block


@pytest.mark.parametrize(("rate", "packed"), [(0.3, True), (0.05, True), (0.3, False), (0.1, False)])
def test_stochastic_depth_keeps_the_expected_output(rate: float, packed: bool) -> None:
    # b (1 - rate) is fractional, so the factor must be b / kept, not 1 / (1 - rate)
    block = zero_ffn(random_block(drop_path=rate))
    groups = 2000  # of the same five images: as many independent draws in one call
    x = torch.randn(5 * 4, 12)
    many, shapes, backends = x.repeat(groups, 1), ((5, 4),) * groups, ("plain",) * groups
    full = block.eval()(x, ((5, 4),), ("plain",), packed) - x
    mean = (block.train()(many, shapes, backends, packed) - many).view(groups, 20, 12).mean(0)
    assert (mean - full).norm() < 0.06 * full.norm()


def count_images(block: Block, shapes: tuple[tuple[int, int], ...], packed: bool) -> list[int]:
    """How many tokens enter the attention and the FFN."""
    seen = []
    hooks = [m.register_forward_pre_hook(lambda m, args: seen.append(len(args[0]))) for m in (block.attn, block.mlp)]
    block(torch.randn(sum(b * t for b, t in shapes), 12), shapes, ("plain",) * len(shapes), packed)
    for hook in hooks:
        hook.remove()
    return seen


def test_stochastic_depth_computes_only_the_kept_samples_of_each_group() -> None:
    shapes = ((10, 5), (6, 3))
    block = random_block(drop_path=0.3).train()
    assert count_images(block, shapes, packed=True) == [7 * 5 + 4 * 3] * 2
    block.drop_path = 0.1
    assert count_images(block, shapes, packed=True) == [9 * 5 + 5 * 3] * 2
    assert count_images(block, ((10, 5),), packed=False) == [50, 50]  # up to 0.1 a plain batch scales samples
    block.eval()
    assert count_images(block, shapes, packed=True) == [68, 68]


def test_attention_and_ffn_draw_independent_samples() -> None:
    shapes = ((40, 1),)
    block = random_block(drop_path=0.5).train()
    seen: list[Tensor] = []
    for module in (block.norm1, block.norm2):
        module.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    x = torch.arange(40.0).view(40, 1).expand(40, 12).contiguous()
    nn.init.zeros_(block.ls1.gamma)  # type: ignore[arg-type]  # so that the FFN sees the same rows
    block(x, shapes, ("plain",), True)
    first, second = ({int(v) for v in rows[:, 0]} for rows in seen)
    assert len(first) == len(second) == 20
    assert first != second


def test_per_sample_stochastic_depth_drops_whole_images() -> None:
    block = zero_ffn(random_block(drop_path=0.1)).train()
    x = torch.randn(200 * 3, 12)
    change = (block(x, ((200, 3),), ("plain",)) - x).view(200, 3, 12).abs().amax(-1) > 0
    per_image = change.sum(1)
    assert set(per_image.tolist()) == {0, 3}
    assert 5 <= int((per_image == 0).sum()) <= 40


def test_head_dim_may_differ_from_the_width() -> None:
    attention = Attention(12, heads=3, head_dim=5)
    assert attention.qkv.weight.shape == (45, 12)
    assert attention.proj.weight.shape == (12, 15)


def test_dropout_acts_in_training_only() -> None:
    block = random_block(dropout=0.5)
    x = torch.randn(8, 12)
    torch.testing.assert_close(
        block.eval()(x, ((2, 4),), ("plain",)),
        torch.cat([literal_block(block, image) for image in x.view(2, 4, 12)]),
    )
    assert not torch.equal(block.train()(x, ((2, 4),), ("plain",)), block(x, ((2, 4),), ("plain",)))


def test_layerscale_multiplies_by_channel() -> None:
    scale = LayerScale(3, 0.5)
    torch.testing.assert_close(scale(torch.tensor([[2.0, 4.0, 6.0]])), torch.tensor([[1.0, 2.0, 3.0]]))
