"""Textures of the embedded scenes: what objects and backgrounds are made of.

A texture is a function of plane coordinates measured in texture periods; it returns the share of the second
colour at each point, float32 in 0 to 1. Its arguments are the coordinates x and y, float32 (H, W),
`edge`, the number of pixels in a period, and the style draws s in [0, 1). Cellular and noise patterns are looked up in
small periodic tables that are computed once per process, so a texture costs a few array operations per picture and has
no borders.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np

TAU = 2.0 * np.pi
CELLS = 16  # cells along one side of a table, each of unit size
SAMPLES = 32  # table entries along one side of a cell
SIDE = CELLS * SAMPLES
FAR = 64.0 * CELLS  # whole tables added before truncation, so that coordinates are positive there

Array = np.ndarray
Texture = Callable[[Array, Array, float, Sequence[float]], Array]


class Cells(NamedTuple):
    """Flat periodic tables (SIDE * SIDE,) float32 of a jittered cell pattern; distances in periods."""

    nearest: Array  # distance to the nearest site
    border: Array  # how much farther the second nearest site is: 0 on the border between two cells
    value: Array  # one value per cell, 0 to 1


def _table_rng(stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[0x7E47, stream]))


def _table_axes() -> tuple[Array, Array]:
    axis = (np.arange(SIDE, dtype=np.float32) + 0.5) / SAMPLES
    return axis[None, :], axis[:, None]


def _sites(jitter: float) -> Iterator[tuple[Array, Array, Array, Array]]:
    """For each of the sites around a point: the offset to it at every table entry, and its row and column.

    Sites stand one per unit square, odd rows shifted by half, each moved by up to `jitter` / 2.
    """
    move_x, move_y = (_table_rng(round(jitter * 100)).random((2, CELLS, CELLS), np.float32) - 0.5) * jitter
    x, y = _table_axes()
    column, row = np.floor(x).astype(int), np.floor(y).astype(int)
    odd = (np.arange(CELLS) % 2)[:, None] * 0.5 - 0.25
    site_x, site_y = (0.5 + odd + move_x).astype(np.float32), (0.5 + move_y).astype(np.float32)
    left, above = (column - x).astype(np.float32), (row - y).astype(np.float32)
    for step_y, step_x in product((-1, 0, 1), (-2, -1, 0, 1, 2)):
        j, i = (row + step_y) % CELLS, (column + step_x) % CELLS
        yield site_x[j, i] + (left + np.float32(step_x)), site_y[j, i] + (above + np.float32(step_y)), j, i


@lru_cache(maxsize=4)
def cells(jitter: float) -> Cells:
    """Tables of cells around one site per unit square, from almost hexagonal (jitter 0.3) to irregular (0.9)."""
    values = _table_rng(500).permutation(CELLS * CELLS).reshape(CELLS, CELLS) / np.float32(CELLS * CELLS - 1)
    first = np.full((SIDE, SIDE), 9.0, np.float32)
    second, value = first.copy(), np.zeros_like(first)
    for dx, dy, j, i in _sites(jitter):
        square = dx * dx + dy * dy
        np.copyto(value, values[j, i], where=square < first)
        np.minimum(second, np.maximum(first, square), out=second)
        np.minimum(first, square, out=first)
    nearest = np.sqrt(first)
    return Cells(nearest.ravel(), (np.sqrt(second) - nearest).ravel(), value.ravel())


@lru_cache(maxsize=1)
def dash_table() -> Array:
    """Flat table of the distance to the nearest dash; a short dash of random direction crosses each site."""
    turn = _table_rng(600).random((CELLS, CELLS)) * np.pi
    cos, sin = np.cos(turn).astype(np.float32), np.sin(turn).astype(np.float32)
    nearest = np.full((SIDE, SIDE), 9.0, np.float32)
    for dx, dy, j, i in _sites(0.6):
        along_x, along_y = cos[j, i], sin[j, i]
        along = np.clip(dx * along_x + dy * along_y, -0.3, 0.3)
        dx -= along * along_x
        dy -= along * along_y
        np.minimum(nearest, dx * dx + dy * dy, out=nearest)
    return np.sqrt(nearest).ravel()


@lru_cache(maxsize=4)
def noise_table(slope: float) -> Array:
    """Flat periodic noise with wavelengths of half a cell to four cells, every level in 0 to 1 equally frequent.

    slope  exponent of the falling spectrum: 0 weighs every wavelength alike, larger values make the noise softer
    """
    frequency = np.fft.fftfreq(SIDE, 1.0 / SAMPLES)  # cycles per cell
    radius = np.hypot(frequency[:, None], frequency[None, :])
    band = (radius >= 0.25) & (radius <= 2.0)
    spectrum = np.fft.fft2(_table_rng(1000 + round(slope * 10)).standard_normal((SIDE, SIDE)))
    field = np.fft.ifft2(spectrum * band * np.maximum(radius, 0.25) ** -slope).real
    ranks = np.empty(SIDE * SIDE, np.float32)
    ranks[np.argsort(field, axis=None)] = np.linspace(0.0, 1.0, SIDE * SIDE, dtype=np.float32)
    return ranks


@lru_cache(maxsize=1)
def scale_table() -> Array:
    """Flat table of overlapping scales: 0 at the root of a scale, 1 at its free edge."""
    x, y = _table_axes()
    shade = np.zeros((SIDE, SIDE), np.float32)
    for step in range(2, -3, -1):  # rows half a unit apart; the lowest row that reaches a point lies on top
        row = np.floor(y * 2.0) + step
        centre_x = np.floor(x - 0.5 * (row % 2) + 0.5) + 0.5 * (row % 2)
        distance = np.hypot(x - centre_x, y - row * 0.5) / 0.62
        shade = np.where(distance <= 1.0, distance, shade)
    return shade.ravel()


def _positions(x: Array, y: Array) -> Array:
    column, row = (((axis + FAR) * SAMPLES).astype(np.int32) & (SIDE - 1) for axis in (x, y))
    return row * SIDE + column


def _noise(x: Array, y: Array, slope: float = 1.5) -> Array:
    return noise_table(slope).take(_positions(x, y))


def _step(field: Array, sharpness: float) -> Array:
    """0 where `field` is well below zero, 1 well above, a ramp of width 1 / sharpness between."""
    return np.clip(field * np.float32(sharpness) + np.float32(0.5), 0.0, 1.0)


# --- materials: x, y are body coordinates in periods, centred on the body; s holds three draws of [0, 1) ---
# `edge` is the number of pixels in a period: the widest useful sharpness of a distance measured in periods.


def stripes(x: Array, y: Array, edge: float, s: Sequence[float]) -> Array:
    """Wavy stripes across the body."""
    warp = _noise(x * 0.35 + 16 * s[0], y * 0.35 + 16 * s[1]) * (0.5 + 0.5 * s[2])
    return _step(np.sin((x + warp) * TAU), edge / 5.0)


def rosettes(x: Array, y: Array, edge: float, s: Sequence[float]) -> Array:
    """Round spots of the second colour with a fainter middle."""
    near = cells(0.3).nearest.take(_positions(x * 0.8 + 16 * s[0], y * 0.8 + 16 * s[1]))
    return _step(0.38 - near, edge) - (0.65 + 0.35 * s[2]) * _step(0.17 - near, edge)


def scales(x: Array, y: Array, edge: float, s: Sequence[float]) -> Array:
    """Overlapping scales, with the second colour at their free edges."""
    shade = scale_table().take(_positions(y * 0.75 + 16 * s[0], x * -0.75 + 16 * s[1]))
    return _step(shade * shade - (0.5 + 0.15 * s[2]), 1.9)


def rings(x: Array, y: Array, edge: float, s: Sequence[float]) -> Array:
    """Concentric rings around the centre."""
    return _step(np.sin((np.sqrt(x * x + y * y) + s[0]) * TAU) - 0.35, edge / 5.0)


def ribs(x: Array, y: Array, edge: float, s: Sequence[float]) -> Array:
    """Radial ribs; their number grows with the extent of the window x, y."""
    reach = float(np.abs(x[0, -1] - x[0, 0]) + np.abs(y[-1, 0] - y[0, 0])) * 0.5
    count = round(min(max(0.8 * TAU * 0.5 * reach, 9.0), 26.0))
    return _step(np.sin(np.arctan2(y, x) * count + TAU * s[0]) - 0.2, 1.4)


def dots(x: Array, y: Array, edge: float, s: Sequence[float]) -> Array:
    """Small round dots in an almost hexagonal grid."""
    near = cells(0.3).nearest.take(_positions(x * 1.25 + 16 * s[0], y * 1.25 + 16 * s[1]))
    return _step(0.24 + 0.06 * s[2] - near, 0.8 * edge)


def facets(x: Array, y: Array, edge: float, s: Sequence[float]) -> Array:
    """Irregular cells, each with its own share of the second colour, and outlined borders."""
    at = _positions(x * 0.62 + 16 * s[0], y * 0.62 + 16 * s[1])
    return np.clip(cells(0.9).value.take(at) + 0.25 * _step(0.06 - cells(0.9).border.take(at), 0.5 * edge), 0.0, 1.0)


def scutes(x: Array, y: Array, edge: float, s: Sequence[float]) -> Array:
    """The plates of a shell: borders in the second colour and shading towards them."""
    at = _positions(x * 0.6 + 16 * s[0], y * 0.6 + 16 * s[1])
    lines = _step(0.14 + 0.05 * s[2] - cells(0.6).border.take(at), edge)
    return np.minimum(lines + 0.35 * _step(cells(0.6).nearest.take(at) - 0.4, 2.0), 1.0)


def veins(x: Array, y: Array, edge: float, s: Sequence[float]) -> Array:
    """Slanted veins on both sides of the body's axis."""
    phase = (np.abs(y) * (-0.8 - 0.5 * s[1]) + x) * (TAU * 0.9)
    return _step(np.sin(phase + TAU * s[0]) - 0.45, edge / 4.0)


def sprinkles(x: Array, y: Array, edge: float, s: Sequence[float]) -> Array:
    """Short dashes of random direction."""
    dash = dash_table().take(_positions(x * 0.72 + 16 * s[0], y * 0.72 + 16 * s[1]))
    return _step(0.10 + 0.04 * s[2] - dash, 1.4 * edge)


def checker(x: Array, y: Array, edge: float, s: Sequence[float]) -> Array:
    """A soft checkerboard."""
    half = TAU * 0.55
    return _step(np.sin(x * half + TAU * s[0]) * np.sin(y * half + TAU * s[1]), edge / 3.0)


def panels(x: Array, y: Array, edge: float, s: Sequence[float]) -> Array:
    """Rows of shifted panels with seams between."""
    rows = y + s[1]
    level = np.floor(rows)
    columns = x * 0.55 + level * 0.5 + s[0]
    rows, columns = rows - level, columns - np.floor(columns)
    seam = np.minimum(np.minimum(rows, 1.0 - rows), np.minimum(columns, 1.0 - columns) * 1.8)
    return _step(0.11 + 0.05 * s[2] - seam, edge)


# --- backgrounds: x, y are picture coordinates in periods ---


def water(x: Array, y: Array, edge: float, s: Sequence[float]) -> Array:
    """Water: bright soft nets of light, wider than high."""
    warp = _noise(x * 0.3 + 16 * s[2], y * 0.3)
    at = _positions(x * 0.42 + 0.6 * warp + 16 * s[0], y * 0.75 + 0.6 * warp + 16 * s[1])
    return np.clip(1.0 - cells(0.9).border.take(at) * 1.7, 0.0, 1.0)


def meadow(x: Array, y: Array, edge: float, s: Sequence[float]) -> Array:
    """Grass: upright blades."""
    blades = _noise(x * 0.8 + y * (0.3 * s[2] - 0.15) + 16 * s[0], y * 0.16 + 16 * s[1], 0.0)
    return _step(blades - 0.5, 1.8)


def foliage(x: Array, y: Array, edge: float, s: Sequence[float]) -> Array:
    """Foliage: overlapping patches of even brightness that darken towards their edges."""
    at = _positions((x + y) * 0.55 + 16 * s[0], (x - y) * 0.38 + 16 * s[1])
    return np.clip(cells(0.9).value.take(at) + (0.45 - cells(0.9).nearest.take(at)), 0.0, 1.0)


def sand(x: Array, y: Array, edge: float, s: Sequence[float]) -> Array:
    """Sand: long ripples, steep on one side."""
    phase = y * 0.62 + x * (0.4 * s[2] - 0.2) + 1.3 * _noise(x * 0.16 + 16 * s[0], y * 0.16 + 16 * s[1])
    phase -= np.floor(phase)
    return np.minimum(phase, (1.0 - phase) * 4.0)


def boards(x: Array, y: Array, edge: float, s: Sequence[float]) -> Array:
    """Boards side by side: dark seams, each board of its own brightness, grain along it."""
    across = x * 0.5 + s[0]
    plank = np.floor(across)
    grain = _noise(x * 0.9 + 3.7 * plank + 64.0, y * 0.08 + 16 * s[1] + 5.3 * plank, 0.0)
    shade = 0.45 * grain + 0.55 * np.abs(np.sin(plank * 12.9898 + 6.0 * s[2]))
    return shade * _step(0.5 - np.abs(across - plank - 0.5) - 0.08, 0.8 * edge)


def snow(x: Array, y: Array, edge: float, s: Sequence[float]) -> Array:
    """Snow drifts: soft marble without a direction."""
    x, y = x * 0.3, y * 0.3
    warp = _noise(x + 16 * s[0], y + 16 * s[1]) * 1.2
    return _noise(x + warp, y - warp + 16 * s[2], 2.5)


BACKGROUNDS: tuple[Texture, ...] = (water, meadow, foliage, sand, boards, snow)
