"""The encoder interface: what every evaluator requires of a backbone, from whichever library it comes.
An encoder takes pixels in [0, 1], normalises them as its backbone was trained, and returns `Tokens`. `NativeEncoder`
wraps `RegisterViT`, `TimmEncoder` and `TransformersEncoder` the two libraries' ViTs, and `PixelEncoder` is the baseline
without a network, whose tokens are the pixels themselves. Register tokens are never counted among the patches.
"""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoreg.checkpoint.steps import Watched
from dinoreg.data.preprocess import PUBLISHED_SIZE, Preprocessing
from dinoreg.models.vit import RegisterViT, Tokens
from dinoreg.runtime.device import autocast
from dinoreg.runtime.errors import UserError
from dinoreg.weights.architecture import timm_preprocessing
from dinoreg.weights.load import select_channels

RANDOM_WEIGHTS = " (random weights)"  # behind the name of an encoder that has them
PIXEL_SIDE = 32  # pixels; the raw-pixel baseline's class token is the image at this side


class Encoder(ABC):
    """A frozen backbone in evaluation mode. Images are (B, C, H, W) in [0, 1], sides multiples of `patch_size`.

    name         display name
    identity     16 hexadecimal digits over architecture, preprocessing and weights
    dim, depth   width D, number of blocks
    patch_size   pixels
    image_size   (height, width) that it was trained or published at, in pixels
    preprocessing  what is done with a picture, as the weights state it
    dtype        of the matrix products (autocast); tokens come out in float32
    """

    name: str
    identity: str
    dim: int
    depth: int
    patch_size: int
    num_registers: int
    in_channels: int
    image_size: tuple[int, int]
    preprocessing: Preprocessing
    device: torch.device
    dtype: torch.dtype
    watched: Watched | None = None  # what the probe inside its run looked at
    pools: bool = True  # whether the mean patch token is as wide as the class token, so that it may be appended

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tokens:
        """Tokens after the final norm, float32: cls (B, D), registers (B, R, D), patches (B, N, D).

        images  (B, C, H, W) uint8, or float in [0, 1]; UserError as for `prepare`
        """
        return self.layers(images, (-1,))[0]

    @torch.no_grad()
    def layers(self, images: Tensor, blocks: Sequence[int], norm: bool = True) -> list[Tokens]:
        """Tokens after each of several blocks, in the order of `blocks`, float32.

        images   (B, C, H, W) uint8, or float in [0, 1]; UserError as for `prepare`
        blocks   from 0, or from the end if negative; UserError when one does not exist
        norm     apply the final norm to each
        returns  one Tokens per block: cls (B, D), registers (B, R, D), patches (B, N, D)
        """
        wanted = [self.block(each) for each in blocks]
        ascending = sorted(set(wanted))
        with autocast(self.device, self.dtype):
            found = self._layers(self.prepare(images), ascending, norm)
        return [Tokens(*(part.float() for part in found[ascending.index(each)])) for each in wanted]

    @torch.no_grad()
    def qkv(self, images: Tensor, block: int = -1) -> dict[str, Tensor]:
        """Query, key and value of the patches in one block's attention, heads concatenated.

        images   (B, C, H, W) uint8, or float in [0, 1]; UserError as for `prepare`
        block    from 0, or from the end if negative; UserError when it does not exist
        returns  {"query", "key", "value"}: (B, N, D) float32 each
        """
        with autocast(self.device, self.dtype):
            parts = self._qkv(self.prepare(images), self.block(block))
        return {name: part.float() for name, part in zip(("query", "key", "value"), parts)}

    def prepare(self, images: Tensor) -> Tensor:
        """Images normalised by the mean and std of `preprocessing`, float32 on the encoder's device.

        images   (B, C, H, W) uint8, or float in [0, 1]
        returns  (B, C, H, W); UserError for another shape, or for a side that the patch size does not divide
        """
        patch = self.patch_size
        if images.ndim != 4 or images.shape[1] != self.in_channels or any(side % patch for side in images.shape[2:]):
            expected = f"expected (B, {self.in_channels}, H, W) with H and W multiples of the patch size {patch}"
            raise UserError(f"{self.name}: images of shape {tuple(images.shape)}, {expected}")
        if self.device.type == "cuda" and images.device.type == "cpu":
            images = images.pin_memory()  # from other memory the copy would wait for the device
        return self.preprocessing.normalise(images.to(self.device, non_blocking=True))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of height x width pixels."""
        return height // self.patch_size, width // self.patch_size

    def block(self, index: int) -> int:
        """A block's number from 0, given it from 0 or from the end; UserError when there is no such block."""
        if not -self.depth <= index < self.depth:
            raise UserError(f"{self.name}: block {index} is out of range, it has {self.depth} blocks")
        return index % self.depth

    @property
    def default_size(self) -> int:
        """Side in pixels of the square crops of an evaluation by default: 224, or less for models trained on less."""
        side = min(PUBLISHED_SIZE, *self.image_size)
        return max(side // self.patch_size, 1) * self.patch_size

    @abstractmethod
    def random_init(self, seed: int = 0) -> Encoder:
        """The same architecture and preprocessing with random weights drawn from `seed`."""

    @abstractmethod
    def _layers(self, x: Tensor, blocks: Sequence[int], norm: bool) -> list[Tokens]:
        """Tokens after ascending, distinct blocks, of normalised images."""

    @abstractmethod
    def _qkv(self, x: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value (B, N, D) of the patches."""


class _ModuleEncoder(Encoder):
    """An encoder around an nn.Module: its device and precision, its identity, and copies with other weights."""

    module: Any

    def __init__(
        self,
        module: nn.Module,
        name: str,
        stated: Mapping[str, Any] | Preprocessing | None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.device, self.dtype, self.name = torch.device(device), dtype, name
        self.module = module.to(self.device).eval().requires_grad_(False)
        if not isinstance(stated, Preprocessing):
            stated = Preprocessing.of(stated, self.in_channels, self.image_size, self.patch_size, name)
        self.preprocessing = stated

    @cached_property
    def identity(self) -> str:  # type: ignore[override]  # computed once, from the weights at first access
        named = self.name if not list(self.module.parameters()) else ""
        neurons = getattr(self.module, "register_neurons", None) or ()  # of a test-time register, in no tensor
        digest = hashlib.sha256(repr((named, self.preprocessing.as_json(), *neurons)).encode())
        for key, value in sorted(self.module.state_dict().items()):
            digest.update(f"{key} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def _like(self, module: nn.Module) -> Encoder:
        name = f"{self.name.removesuffix(RANDOM_WEIGHTS)}{RANDOM_WEIGHTS}"
        return type(self)(module, name, self.preprocessing, self.device, self.dtype)


class NativeEncoder(_ModuleEncoder):
    """An encoder around a RegisterViT."""

    module: RegisterViT

    def __init__(self, module: RegisterViT, *arguments: Any, **options: Any) -> None:
        self.dim, self.depth, self.patch_size = module.width, module.depth, module.patch_size
        self.num_registers, self.in_channels = module.num_registers, module.in_channels
        self.image_size = module.image_size
        super().__init__(module, *arguments, **options)

    def _layers(self, x: Tensor, blocks: Sequence[int], norm: bool) -> list[Tokens]:
        return self.module.intermediate_tokens(x, blocks, norm)

    def _qkv(self, x: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
        first = 1 + self.num_registers
        q, k, v = (part.transpose(1, 2).flatten(2)[:, first:] for part in self.module.qkv(x, block))
        return q, k, v

    @cached_property
    def of_one_channel(self) -> NativeEncoder:
        """Of a bag of channels the encoder of any of them; else itself."""
        if self.module.channels == "joint":
            return self
        alone = replace(self.preprocessing, mean=self.preprocessing.mean[:1], std=self.preprocessing.std[:1])
        return NativeEncoder(select_channels(self.module, [0]), self.name, alone, self.device, self.dtype)

    def random_init(self, seed: int = 0) -> Encoder:
        """A RegisterViT of the same architecture with random weights, LayerScale starting at 1."""
        # LayerScale at 1: at training's initial 1e-5 the class token would be constant, a baseline that anything beats.
        options = self.module.architecture()
        options["layerscale"] = 1.0 if options["layerscale"] else None
        with seeded(seed):
            return self._like(RegisterViT(**options))


class TimmEncoder(_ModuleEncoder):
    """An encoder around a ViT of timm: any with `forward_intermediates` and a class token; UserError for others.

    Sizes other than the model's own need `dynamic_img_size=True` when it is created.
    """

    def __init__(self, module: Any, *arguments: Any, **options: Any) -> None:
        if not hasattr(module, "forward_intermediates") or getattr(module, "cls_token", None) is None:
            raise UserError(f"{type(module).__name__}: expected a ViT of timm with a class token")
        self.dim, self.depth = module.embed_dim, len(module.blocks)
        self.patch_size = int(module.patch_embed.patch_size[0])
        self.num_registers = int(module.num_prefix_tokens) - 1
        self.in_channels = int(module.patch_embed.proj.in_channels)
        self.image_size = (int(module.patch_embed.img_size[0]), int(module.patch_embed.img_size[1]))
        super().__init__(module, *arguments, **options)

    def _layers(self, x: Tensor, blocks: Sequence[int], norm: bool) -> list[Tokens]:
        found = self.module.forward_intermediates(
            x, indices=list(blocks), return_prefix_tokens=True, norm=norm, output_fmt="NLC", intermediates_only=True
        )
        return [Tokens(prefix[:, 0], prefix[:, 1:], patches) for patches, prefix in found]

    def _qkv(self, x: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
        with _captured(self.module.blocks[block].attn.qkv) as outputs:
            self.module.forward_features(x)
        q, k, v = outputs[0][:, 1 + self.num_registers :].chunk(3, dim=-1)
        return q, k, v

    def random_init(self, seed: int = 0) -> Encoder:
        """timm's own initialisation; class token, registers and positions truncated normal with deviation 0.02."""
        with seeded(seed):
            model = copy.deepcopy(self.module)
            model.init_weights()
            for key in ("reg_token", "cls_token", "pos_embed"):  # which `init_weights` leaves alone
                value = getattr(model, key, None)
                if isinstance(value, nn.Parameter):
                    nn.init.trunc_normal_(value.data, std=0.02)
            return self._like(model)


class TransformersEncoder(_ModuleEncoder):
    """An encoder around transformers' Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel or ViTModel."""

    def __init__(self, module: Any, *arguments: Any, **options: Any) -> None:
        settings: Any = getattr(module, "config", None)
        self._norm: Any = getattr(module, "layernorm", getattr(module, "norm", None))
        if self._norm is None or not hasattr(settings, "patch_size"):
            raise UserError(f"{type(module).__name__}: expected a ViT of transformers with a final `layernorm`")
        self.dim, self.depth = settings.hidden_size, settings.num_hidden_layers
        self.patch_size, self.in_channels = int(settings.patch_size), int(settings.num_channels)
        self.num_registers = int(getattr(settings, "num_register_tokens", 0) or 0)
        self.image_size = (int(settings.image_size), int(settings.image_size))
        super().__init__(module, *arguments, **options)

    def _forward(self, x: Tensor, **options: Any) -> Any:
        if self.module.config.model_type == "vit":
            options["interpolate_pos_encoding"] = True
        return self.module(pixel_values=x, **options)

    def _layers(self, x: Tensor, blocks: Sequence[int], norm: bool) -> list[Tokens]:
        if list(blocks) == [self.depth - 1] and norm:
            return [_split(self._forward(x).last_hidden_state, self.num_registers)]
        states = self._forward(x, output_hidden_states=True).hidden_states[1:]
        chosen = (self._norm(states[each]) if norm else states[each] for each in blocks)
        return [_split(each, self.num_registers) for each in chosen]

    def _qkv(self, x: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
        lists = (each for each in self.module.modules() if isinstance(each, nn.ModuleList) and len(each) == self.depth)
        blocks = next(lists, None)  # its name differs between versions
        if blocks is None:
            raise UserError(f"{type(self.module).__name__}: its list of blocks was not found")
        layer = dict(blocks[block].named_modules())
        # The names before and after transformers 5.
        endings = (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))
        parts = [next(layer[name] for name in layer if name.endswith(pair)) for pair in endings]
        with _captured(*parts) as outputs:
            self._forward(x)
        q, k, v = (outputs[place][:, 1 + self.num_registers :] for place in range(3))
        return q, k, v

    def random_init(self, seed: int = 0) -> Encoder:
        """The library's own initialisation of the same config."""
        with seeded(seed):
            return self._like(type(self.module)(copy.deepcopy(self.module.config)))


class PixelEncoder(Encoder):
    """The baseline without a network: patch tokens are the patch's pixels, the class token the entire image, small.

    patch_size  pixels, of the encoder that it is compared with; a patch token has C patch_size² numbers, a class token
                those of the image resampled to PIXEL_SIDE
    """

    pools = False  # the widths differ

    def __init__(
        self, patch_size: int, image_size: tuple[int, int], in_channels: int = 3, device: torch.device | str = "cpu"
    ) -> None:
        self.name, self.patch_size, self.image_size = "raw pixels", patch_size, image_size
        self.dim, self.depth, self.num_registers, self.in_channels = in_channels * patch_size**2, 1, 0, in_channels
        stated = {"mean": [0.5], "std": [0.25]}
        self.preprocessing = Preprocessing.of(stated, in_channels, image_size, patch_size, self.name)
        self.device, self.dtype = torch.device(device), torch.float32
        self.identity = hashlib.sha256(f"pixels {patch_size} {in_channels} {PIXEL_SIDE}".encode()).hexdigest()[:16]

    def random_init(self, seed: int = 0) -> Encoder:
        """The encoder itself: it has no weights."""
        return self

    def _layers(self, x: Tensor, blocks: Sequence[int], norm: bool) -> list[Tokens]:
        # A fixed size, so that class tokens of images of different sizes have one width.
        small = F.interpolate(x, size=(PIXEL_SIDE, PIXEL_SIDE), mode="bilinear", antialias=True, align_corners=False)
        patches = F.unfold(x, self.patch_size, stride=self.patch_size).mT
        return [Tokens(small.flatten(1), x.new_empty(len(x), 0, patches.shape[2]), patches)] * len(blocks)

    def _qkv(self, x: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
        patches = self._layers(x, (block,), True)[0].patches
        return patches, patches, patches


def wrap(
    model: Any,
    name: str | None = None,
    stated: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Encoder:
    """An Encoder around a RegisterViT, a ViT of timm or of transformers; an Encoder is returned as it is.

    name    by default the class's name
    stated  what is done with pictures, as JSON has it (`Preprocessing.of`); by default what the model itself states: a
            RegisterViT the weights that it was loaded from, timm's its `pretrained_cfg`
    dtype   of the matrix products
    raises  UserError for any other kind of model, and for a preprocessing that does not fit it
    """
    if isinstance(model, Encoder):
        return model
    kind: type[_ModuleEncoder]
    own: Mapping[str, Any] | None
    if isinstance(model, RegisterViT):
        kind, own = NativeEncoder, model.preprocessing
    elif hasattr(getattr(model, "config", None), "model_type"):
        kind, own = TransformersEncoder, None
    elif hasattr(model, "forward_intermediates"):
        config = getattr(model, "pretrained_cfg", None)
        kind, own = TimmEncoder, timm_preprocessing(config) if isinstance(config, dict) else None
    else:
        raise UserError(f"{type(model).__name__}: expected a RegisterViT, or a ViT of timm or transformers")
    return kind(model, name or type(model).__name__, own if stated is None else stated, device, dtype)


def _split(tokens: Tensor, num_registers: int) -> Tokens:
    return Tokens(tokens[:, 0], tokens[:, 1 : 1 + num_registers], tokens[:, 1 + num_registers :])


@contextmanager
def _captured(*modules: nn.Module) -> Iterator[dict[int, Tensor]]:
    """{place: output} of some modules in the forward pass that happens inside."""
    outputs: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for place, module in enumerate(modules):
            handle = module.register_forward_hook(lambda _m, _i, output, at=place: outputs.__setitem__(at, output))
            hooks.callback(handle.remove)
        yield outputs


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Context with PyTorch's global generator at `seed`; the CPU generator's state is restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
