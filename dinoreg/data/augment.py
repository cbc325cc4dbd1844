"""Photometric augmentation and normalisation of whole batches of crops on the device (BYOL's, as DINO uses them).

The numbers are drawn per crop on the CPU (`draw_photometric`) and applied to all crops together (`augment`),
in this order: mirror, turn, window, stains, colour jitter (its four changes in a random order), grayscale, blur,
solarise, normalise, lose channels. Each change that torchvision has equals its functional of the same name on float
pixels in 0..1.

Two things make it quick. Brightness, contrast and saturation are all a blend of the crop with something
derived from its grey version, so the three run as three blends over all rows whatever each row's order is;
and the rows are sorted by the slot in which hue comes, so that hue runs on slices. Which rows take part is
known on the CPU before anything is sent, so nothing here waits for the device.
"""

import itertools
from collections.abc import Callable
from enum import IntEnum

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinoreg.config.view_settings import AugmentSettings
from dinoreg.runtime.device import per_channel

NUMBERS_PER_VIEW = 12  # uniform numbers that the photometric changes of one view take
SENSOR_NUMBERS = 10  # that those of a sensor take besides, and one for each channel


class P(IntEnum):
    """Columns of the parameter array (n, END or more) float32; at 0 a change does nothing.

    Behind them there may be one for each channel: 1 where it is lost.
    """

    HFLIP = 0  # 0 or 1
    VFLIP = 1  # 0 or 1
    JITTER = 2  # 0 or 1: whether the next five apply
    BRIGHTNESS = 3  # factor
    CONTRAST = 4  # factor
    SATURATION = 5  # factor
    HUE = 6  # turns, -0.5 .. 0.5
    ORDER = 7  # 0..23, row of ORDERS
    GRAY = 8  # 0 or 1
    SIGMA = 9  # blur in pixels, 0 for none
    SOLARIZE = 10  # 0 or 1
    TURN = 11  # 0 .. 3 quarter turns
    LOW = 12  # share of the range cut off at the dark end
    HIGH = 13  # and at the bright one
    STAIN = 14  # what each of three stains is multiplied with, less 1
    SHIFT = 17  # what is added to each of three stains, in optical density
    END = 20


# All orders of (0 brightness, 1 contrast, 2 saturation, 3 hue).
ORDERS = np.array(list(itertools.permutations(range(4))), dtype=np.int64)
_HUE_SLOT = np.argmax(ORDERS == 3, axis=1)  # (24,) how many blends come before hue
_BLENDS = np.array([[op for op in order if op != 3] for order in ORDERS.tolist()])  # (24, 3)
_GRAY = (0.2989, 0.587, 0.114)
# Optical density in red, green and blue of haematoxylin, eosin and DAB (Ruifrok & Johnston 2001).
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_STAIN_MATRICES = np.linalg.inv(_STAINS), _STAINS
_DARKEST = 1e-6  # below which a pixel's density is not told apart
# Elements worked on at once: on a CPU so many that calling the kernels costs little and its caches still help (best
# of 80,000 to 2.5 million on a Zen 4), elsewhere what memory allows.
_CHUNK_CPU = 640_000
_CHUNK_DEVICE = 1 << 28


def draw_photometric(numbers: np.ndarray, settings: AugmentSettings, of_sensor: np.ndarray | None = None) -> np.ndarray:
    """The photometric parameters of every view of every image.

    numbers    (B, V, NUMBERS_PER_VIEW) uniform in [0, 1)
    of_sensor  (B, V, SENSOR_NUMBERS + C) the same, for changes that only `settings.of_sensor` asks for
    returns    (B, V, P.END) float32, with `of_sensor` (B, V, P.END + C)
    """
    batch, views, _ = numbers.shape
    # Probabilities by view; views 0 and 1 are global.
    blur, solarize = np.full(views, settings.blur_local), np.zeros(views)
    blur[:2] = (settings.blur_global1, settings.blur_global2)[:views]
    if settings.reference_blur:
        blur = 1 - blur
    solarize[1:2] = settings.solarize_global2
    u = np.moveaxis(numbers, -1, 0)
    lost = 0 if of_sensor is None else of_sensor.shape[-1] - SENSOR_NUMBERS
    out = np.zeros((batch, views, P.END + lost), dtype=np.float32)
    if of_sensor is not None:
        _draw_sensor(out, of_sensor, settings)
    out[..., P.HFLIP] = u[0] < settings.hflip
    out[..., P.VFLIP] = u[1] < settings.vflip
    out[..., P.JITTER] = u[2] < settings.jitter_probability
    strengths = (settings.brightness, settings.contrast, settings.saturation)
    for column, (number, strength) in enumerate(zip(u[3:6], strengths), P.BRIGHTNESS):
        low = max(0.0, 1 - strength)
        out[..., column] = low + (1 + strength - low) * number
    out[..., P.HUE] = settings.hue * (2 * u[6] - 1)
    out[..., P.ORDER] = np.floor(u[7] * len(ORDERS))
    out[..., P.GRAY] = u[8] < settings.grayscale
    sigma = settings.blur_sigma[0] + (settings.blur_sigma[1] - settings.blur_sigma[0]) * u[10]
    out[..., P.SIGMA] = np.where(u[9] < blur, sigma, 0.0)
    out[..., P.SOLARIZE] = u[11] < solarize
    return out


def _draw_sensor(out: np.ndarray, numbers: np.ndarray, settings: AugmentSettings) -> None:
    turns, cuts, stains, channels = np.split(numbers, (2, 4, SENSOR_NUMBERS), axis=-1)
    out[..., P.TURN] = np.where(turns[..., 0] < settings.turn, 1 + np.floor(3 * turns[..., 1]), 0)
    out[..., P.LOW : P.STAIN] = settings.window * cuts
    out[..., P.STAIN : P.END] = settings.stain * (2 * stains - 1)
    # The one with the largest number always stays.
    out[..., P.END :] = (channels < settings.channel_drop) & (channels < channels.max(axis=-1, keepdims=True))


def orientations(params: np.ndarray) -> np.ndarray:
    """How the drawn mirrors and turns move places in a crop, (x, y) from its centre, to where they are seen.

    params   (..., P.END or more)
    returns  (..., 2, 2) matrices of 0, 1 and -1
    """
    quarter = np.array([[0, 1], [-1, 0]])
    turns = np.stack([np.linalg.matrix_power(quarter, count) for count in range(4)])[params[..., P.TURN].astype(int)]
    return turns * (1 - 2 * params[..., None, [P.HFLIP, P.VFLIP]])


def left_out(settings: AugmentSettings, in_channels: int) -> str:
    """In words which of the changes asked for are not made, as they need three channels; "" for none."""
    strengths = {"saturation": settings.saturation, "hue": settings.hue, "grayscale": settings.grayscale}
    strengths["stain"] = settings.stain
    names = [name for name, strength in strengths.items() if strength > 0]
    if in_channels == 3 or not names:
        return ""
    return f"{in_channels} channel{'s' * (in_channels > 1)}: left out {', '.join(names)}, which need three"


def augment(
    crops: Tensor,
    params: np.ndarray,
    settings: AugmentSettings,
    out: Tensor | None = None,
    rows: np.ndarray | None = None,
) -> Tensor:
    """Apply the drawn changes and normalise.

    crops    (n, C, h, w) uint8, or float32 in 0..255, on the device, in any memory layout
    params   (n, P.END or P.END + C) float32, one row a crop, on the CPU
    out      (n, C, h, w) float32 to write to; allocated when missing
    rows     the rows to work on; all of them when missing
    returns  (n, C, h, w) float32, contiguous; colour changes (saturation, hue, grayscale) only where C is 3
    """
    channels, height, width = crops.shape[1:]
    if out is None:
        out = torch.empty(crops.shape, dtype=torch.float32, device=crops.device)
    slot = np.where(params[:, P.JITTER] > 0, _HUE_SLOT[params[:, P.ORDER].astype(np.int64)], 4)
    rows = np.arange(len(params)) if rows is None else rows
    rows = rows[np.argsort(slot[rows], kind="stable")]
    budget = _CHUNK_CPU if crops.device.type == "cpu" else _CHUNK_DEVICE
    together = max(1, budget // (channels * height * width))
    mean, std = per_channel(settings.mean, crops.device), per_channel(settings.std, crops.device)
    for start in range(0, len(rows), together):
        picked = rows[start : start + together]
        where = _to(picked, crops.device)
        x = _load(crops, where, params[picked])
        if params[picked, P.LOW : P.END].any():
            _window_and_stain(x, params[picked])
        _jitter(x, params[picked], slot[picked])
        _gray_blur_solarize(x, params[picked], settings)
        x.sub_(mean).div_(std)
        if params.shape[1] > P.END:
            kept = torch.from_numpy(1 - params[picked, P.END :]).to(x.device, non_blocking=True)
            x.mul_(kept[..., None, None])
        out.index_copy_(0, where, x)
    return out


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)


def _change(x: Tensor, flags: np.ndarray, change: Callable[[Tensor, np.ndarray], Tensor]) -> None:
    """Replace the rows of x where `flags` (n,) holds by `change(rows, their numbers)`, in place."""
    numbers = np.flatnonzero(flags)
    if len(numbers):
        where = _to(numbers, x.device)
        x.index_copy_(0, where, change(x.index_select(0, where), numbers))


def _load(crops: Tensor, where: Tensor, params: np.ndarray) -> Tensor:
    """The crops in the rows `where`, mirrored as their parameters say, as float pixels in 0..1, contiguous."""
    x = torch.empty((len(where), *crops.shape[1:]), dtype=torch.float32, device=crops.device)
    x.copy_(crops.index_select(0, where)).mul_(1 / 255)
    for column, axis in ((P.HFLIP, 3), (P.VFLIP, 2)):
        _change(x, params[:, column] > 0, lambda rows, _, axis=axis: rows.flip(axis))  # type: ignore[misc]
    for turns in (1, 2, 3):
        _change(x, params[:, P.TURN] == turns, lambda rows, _, turns=turns: rows.rot90(turns, (2, 3)))  # type: ignore[misc]
    return x


def _window_and_stain(x: Tensor, params: np.ndarray) -> None:
    """Spread what lies between the two ends that are cut off, and give the stains of RGB other strengths; in place."""
    low, high = _to(params[:, P.LOW : P.STAIN].T, x.device)[..., None, None, None]
    x.sub_(low).div_(1 - low - high).clamp_(0, 1)
    if x.shape[1] != 3 or not params[:, P.STAIN : P.END].any():
        return
    factor = _to(1 + params[:, P.STAIN : P.SHIFT], x.device)[:, None]  # (n, 1, 3)
    shift = _to(params[:, P.SHIFT : P.END], x.device)[:, None]
    to_stains, to_density = (
        torch.from_numpy(matrix).float().to(x.device, non_blocking=True) for matrix in _STAIN_MATRICES
    )
    density = x.clamp_min(_DARKEST).log_().neg_().flatten(2).mT  # (n, h * w, 3)
    x.copy_(((density @ to_stains * factor + shift) @ to_density).neg_().exp_().clamp_(0, 1).mT.view_as(x))


def _gray(x: Tensor) -> Tensor:
    """(n, C, h, w) -> (n, 1, h, w): luma of three channels, else the mean over channels."""
    if x.shape[1] != 3:
        return x.mean(dim=1, keepdim=True)
    gray = x[:, 0:1] * _GRAY[0]
    return gray.add_(x[:, 1:2], alpha=_GRAY[1]).add_(x[:, 2:3], alpha=_GRAY[2])


def _jitter(x: Tensor, params: np.ndarray, slot: np.ndarray) -> None:
    """Colour jitter in place. Rows are sorted by `slot` (n,): the blends that come before hue, 4 for none."""
    ends = np.searchsorted(slot, np.arange(5), side="right")  # rows below ends[k] have a slot up to k
    active = int(ends[3])
    if active == 0:
        return
    params, colour = params[:active], x.shape[1] == 3
    blends = _BLENDS[params[:, P.ORDER].astype(np.int64)]  # (active, 3)
    factors = np.take_along_axis(params[:, P.BRIGHTNESS : P.SATURATION + 1], blends, axis=1)
    if not colour:
        factors = np.where(blends == 2, 1.0, factors)
    # Per row and blend: its factor, the weight of the grey pixel (saturation) and of the mean grey
    # (contrast).
    table = np.stack([factors, blends == 2, blends == 1]).astype(np.float32)  # (3, active, 3)
    scalars = _to(table, x.device)[..., None, None, None]
    hue = _to(params[:, P.HUE], x.device)[:, None, None] if colour else None
    x = x[:active]
    for k in range(4):
        first, last = int(ends[k - 1]) if k else 0, int(ends[k])
        if hue is not None and last > first:
            _shift_hue(x[first:last], hue[first:last])
        if k < 3:
            _blend(x, scalars[:, :, k], blends[:, k], colour)


def _blend(x: Tensor, scalars: Tensor, kinds: np.ndarray, colour: bool) -> None:
    """x <- clamp(factor * x + (1 - factor) * other) in place, `other` black, the mean grey or the grey pixel.

    scalars  (3, n, 1, 1, 1) factor, weight of the grey pixel, weight of the mean grey
    kinds    (n,) 0 brightness, 1 contrast, 2 saturation
    """
    factor, pixel_weight, mean_weight = scalars
    if not kinds.any():
        x.mul_(factor)
    else:
        gray = _gray(x)
        mean = gray.mean(dim=(1, 2, 3), keepdim=True).mul_(mean_weight)
        if colour and (kinds == 2).any():
            other = gray.mul_(pixel_weight).add_(mean)
        else:
            other = mean
        x.mul_(factor).add_(other.mul_(1 - factor))
    x.clamp_(0, 1)


def _shift_hue(x: Tensor, shift: Tensor) -> None:
    """Turn the hue of x (n, 3, h, w) in place by shift (n, 1, 1) turns, through HSV.

    With value v, chroma c and hue h in sextants, HSV's way back is r = v - c + c * clamp(|h - 3| - 1, 0, 1),
    g = v - c * clamp(|h - 2| - 1, 0, 1) and b = v - c * clamp(|h - 4| - 1, 0, 1): no pixel needs its sextant.
    """
    red, green, blue = x.unbind(1)  # (n, h, w) views
    top = torch.maximum(red, green)
    torch.maximum(top, blue, out=top)
    low = torch.minimum(red, green)
    torch.minimum(low, blue, out=low)
    chroma = top - low
    # The hue's numerator in sextants; where the chroma is 0 so is it. Selecting by interpolation with
    # weights of exactly 0 and 1 is many times quicker than torch.where on a CPU.
    hue = (red - green).add_(chroma, alpha=4)
    weight = torch.empty_like(hue)
    torch.lerp(hue, (blue - red).add_(chroma, alpha=2), torch.ge(green, top, out=weight), out=hue)
    torch.lerp(hue, green - blue, torch.ge(red, top, out=weight), out=hue)
    hue.div_(torch.clamp_min(chroma, 1e-12, out=weight)).mul_(1 / 6).add_(shift + 1).frac_().mul_(6)  # 0..6
    for channel, centre in ((red, 3.0), (green, 2.0), (blue, 4.0)):
        ramp = torch.sub(hue, centre, out=weight).abs_().sub_(1).clamp_(0, 1)
        if channel is red:
            torch.addcmul(low, chroma, ramp, out=channel)
        else:
            torch.addcmul(top, chroma, ramp, value=-1, out=channel)


def _gray_blur_solarize(x: Tensor, params: np.ndarray, settings: AugmentSettings) -> None:
    """The last three changes, in place."""
    threshold = settings.solarize_threshold / 255

    def blur(rows: Tensor, numbers: np.ndarray) -> Tensor:
        return gaussian_blur(rows, params[numbers, P.SIGMA], settings.blur_kernel)

    def solarize(rows: Tensor, _: np.ndarray) -> Tensor:
        bright = torch.ge(rows, threshold, out=torch.empty_like(rows))
        return torch.lerp(rows, 1 - rows, bright, out=bright)

    if x.shape[1] == 3:
        _change(x, params[:, P.GRAY] > 0, lambda rows, _: _gray(rows).expand_as(rows))
    _change(x, params[:, P.SIGMA] > 0, blur)
    _change(x, params[:, P.SOLARIZE] > 0, solarize)


def gaussian_blur(x: Tensor, sigmas: np.ndarray, kernel: int) -> Tensor:
    """Blur every row with its own sigma, reflecting at the borders, as two passes of `kernel` taps.

    x        (n, C, h, w) float, sides longer than kernel // 2
    sigmas   (n,) pixels, above 0, on the CPU
    returns  (n, C, h, w)
    """
    half = kernel // 2
    offsets = np.arange(-half, half + 1, dtype=np.float32)
    taps = np.exp(-0.5 * (offsets / sigmas[:, None].astype(np.float32)) ** 2)
    taps /= taps.sum(axis=1, keepdims=True)
    padded = F.pad(x, (half, half, half, half), mode="reflect")
    if x.device.type == "cpu":
        return _blur_by_shifts(padded, torch.from_numpy(taps))
    count, channels, height, width = x.shape
    weight = _to(taps.repeat(channels, axis=0), x.device)  # (n*C, kernel)
    planes = padded.view(1, count * channels, height + 2 * half, width + 2 * half)
    planes = F.conv2d(planes, weight[:, None, :, None], groups=count * channels)
    planes = F.conv2d(planes, weight[:, None, None, :], groups=count * channels)
    return planes.view(count, channels, height, width)


def _blur_by_shifts(padded: Tensor, taps: Tensor) -> Tensor:
    """Padded rows (n, C, ., .) under symmetric taps (n, kernel): sums of shifted views, quicker than conv2d."""
    kernel = taps.shape[1]
    half = kernel // 2
    weights = taps.T[:, :, None, None, None]  # (kernel, n, 1, 1, 1)
    for axis in (2, 3):
        length = padded.shape[axis] - kernel + 1
        total = padded.narrow(axis, half, length) * weights[half]
        pair = torch.empty_like(total)
        for k in range(half):
            torch.add(padded.narrow(axis, k, length), padded.narrow(axis, 2 * half - k, length), out=pair)
            total.addcmul_(pair, weights[k])
        padded = total
    return padded
