"""The random plan of an embedded scene: objects, poses, colours, surroundings and light, before any pixel.

A plan is a pure function of (seed, index), independent of the picture's size. Lengths are in units of 1/64 of the
picture's side, so a scene is the same at every size.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from dinoreg.runtime.errors import UserError
from dinoreg.scenes.shapes import KINDS
from dinoreg.scenes.textures import BACKGROUNDS, Array

NUM_CLASSES = len(KINDS)
UNITS = 64.0  # units along one side of the picture
# Hue of each background, as surroundings have it: water and snow, meadow and foliage, sand and boards share one, so
# that colours distinguish a third of the classes from the rest, but not the four classes with the same hue.
PALETTES = (0.58, 0.30, 0.30, 0.10, 0.10, 0.58)
PLAN_STREAM, NOISE_STREAM, LABEL_STREAM = 0, 1, 2

Draw = Callable[..., Any]  # uniform numbers in [low, high), by default in [0, 1), the next ones of a stream


class Pose(NamedTuple):
    """An object's pose: picture = centre + radius * rotation(angle) * body, with body x mirrored first.

    x, y, radius  units, 64 of them a side
    angle         radians
    mirror        1 or -1, factor of body x
    """

    x: float
    y: float
    radius: float
    angle: float
    mirror: float

    def to_body(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Picture coordinates x (1, W) and y (H, 1), float32 in units, to body coordinates, both (H, W), in radii."""
        cos, sin = np.float32(np.cos(self.angle) / self.radius), np.float32(np.sin(self.angle) / self.radius)
        dx, dy, mirror = x - np.float32(self.x), y - np.float32(self.y), np.float32(self.mirror)
        return dx * (cos * mirror) + dy * (sin * mirror), dy * cos - dx * sin


class Thing(NamedTuple):
    """An object of a scene: its class, pose, style draws in [0, 1), colours (RGB in 0 to 1) and distance."""

    label: int
    pose: Pose
    style: list[float]
    frequency: float  # texture periods in one radius
    colours: Array  # (4, 3): ground, pattern, parts, detail
    near: float  # distance of its nearest point, metres
    bulge: float  # metres from the nearest point to the outline


class Plan(NamedTuple):
    """All random properties of a scene except the sensor noise; `things` from the nearest to the farthest object."""

    label: int
    things: list[Thing]
    background: int
    style: list[float]
    frequency: float  # background texture periods in one unit
    turn: float
    colours: Array  # (2, 3)
    far: float  # distance of the background at the picture's lower edge, metres
    light: tuple[float, float]
    gradient: tuple[float, float, float]
    shadow: float
    gain: Array  # (3,)
    noise: float


def generator(seed: int, stream: int, index: int) -> np.random.Generator:
    """The counter-based random stream of one scene; streams of different scenes or purposes never overlap.

    stream  PLAN_STREAM, NOISE_STREAM or LABEL_STREAM
    raises  UserError for a negative seed or index
    """
    if index < 0 or seed < 0:
        raise UserError(f"scenes: seed and index must be 0 or more, got seed {seed}, index {index}")
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, index]))


@lru_cache(maxsize=64)
def _label_block(seed: int, block: int) -> tuple[int, ...]:
    return tuple(generator(seed, LABEL_STREAM, block).permutation(NUM_CLASSES).tolist())


def label_of(index: int, seed: int = 0) -> int:
    """The class of scene `index`, 0 to NUM_CLASSES - 1; each block of NUM_CLASSES scenes has every class once.

    raises  UserError for a negative seed or index
    """
    return _label_block(seed, index // NUM_CLASSES)[index % NUM_CLASSES]


def _colour(hue: float, chroma: float, luma: float) -> list[float]:
    """RGB of a given luma (Rec. 601), whatever the hue: so the contrast of a texture survives any colours."""
    wave = [np.cos(2.0 * np.pi * (hue - shift)) for shift in (0.0, 1.0 / 3.0, 2.0 / 3.0)]
    grey = 0.299 * wave[0] + 0.587 * wave[1] + 0.114 * wave[2]
    return [luma + chroma * (value - grey) for value in wave]


def _two_tone(draw: Draw, hue: float, contrast: tuple[float, float]) -> list[list[float]]:
    """Two colours of a palette, of clearly different brightness, the second usually darker."""
    base = hue + draw(-0.06, 0.06)
    half = draw(*contrast) * (-1.0 if draw() < 0.1 else 1.0)  # in some textures light and dark change places
    middle = draw(0.40, 0.62)
    first = _colour(base, draw(0.08, 0.20), middle + half)
    return [first, _colour(base + draw(-0.08, 0.08), draw(0.08, 0.20), middle - half)]


def _place(draw: Draw, radius: float, things: list[Thing]) -> tuple[float, float] | None:
    """A centre for a smaller object, outside the middle of those in front of it; None if there is no room."""
    poses = [thing.pose for thing in things]
    for _ in range(6):
        x, y = draw(0.4 * radius, UNITS - 0.4 * radius), draw(0.4 * radius, UNITS - 0.4 * radius)
        if all((x - p.x) ** 2 + (y - p.y) ** 2 > (0.8 * p.radius + 0.3 * radius) ** 2 for p in poses):
            return x, y
    return None


def _thing(draw: Draw, label: int, x: float, y: float, radius: float, behind: float) -> Thing:
    kind = KINDS[label]
    pose = Pose(x, y, radius, draw(-kind.turn, kind.turn), 1.0 if draw() < 0.5 else -1.0)
    draw(size=4)  # unused, but without these draws all scenes would change
    period = draw(6.2, 9.2) * min(max(radius / 20.0, 0.55), 1.5) ** 0.5
    hue = PALETTES[kind.background] + 0.5  # the complement, so that the object stands out
    colours = _two_tone(draw, hue, (0.15, 0.30))  # ground and pattern; then parts and detail
    colours += [_colour(hue + draw(-0.1, 0.1), draw(0.0, 0.2), draw(0.12, 0.9))]
    colours += [_colour(hue + draw(-0.1, 0.1), draw(0.0, 0.2), draw(0.05, 0.35))]
    metres = kind.metres * draw(0.8, 1.25)
    bulge = 0.6 * metres  # how far its middle stands out
    near = max(metres * (1.2 * UNITS) / radius - bulge, behind)  # with a focal length of 1.2 sides
    return Thing(label, pose, draw(size=6).tolist(), radius / period, np.array(colours, np.float32), near, bulge)


def plan(index: int, seed: int = 0) -> Plan:
    """Draw everything about scene `index` that does not depend on the picture's size.

    raises  UserError for a negative seed or index
    """
    draw: Draw = generator(seed, PLAN_STREAM, index).uniform
    label = label_of(index, seed)
    usual = KINDS[label].background
    background = usual if draw() < 0.85 else int(draw(0, len(BACKGROUNDS)))
    radius = 0.5 * UNITS * draw(0.62, 0.98)
    spread = max(0.5 * UNITS - 0.85 * radius, 2.0)
    main = _thing(draw, label, 0.5 * UNITS + draw(-spread, spread), 0.5 * UNITS + draw(-spread, spread), radius, 0.05)
    things = [main]
    for _ in range((0, 1, 1, 2)[int(draw(0, 4))]):
        small = max(radius * draw(0.32, 0.55), 5.0)
        place = _place(draw, small, things)
        other = (label + 1 + int(draw(0, NUM_CLASSES - 1))) % NUM_CLASSES
        if place is not None:
            things.append(_thing(draw, other, *place, small, things[-1].near + things[-1].bulge + 0.02))
    deepest = things[-1].near + things[-1].bulge
    angle = draw(0.0, 2.0 * np.pi)
    style, frequency, turn = draw(size=3).tolist(), 1.0 / draw(5.5, 8.5), draw(-0.45, 0.45)
    colours = np.array(_two_tone(draw, PALETTES[background], (0.08, 0.18)), np.float32)
    draw(size=2)  # as in `_thing`
    return Plan(
        label=label,
        things=things,
        background=background,
        style=style,
        frequency=frequency,
        turn=turn,
        colours=colours,
        far=deepest * draw(1.1, 1.8),
        light=(float(np.cos(angle)), float(np.sin(angle))),
        gradient=(draw(0.8, 1.1), draw(-0.25, 0.25), draw(-0.25, 0.25)),
        shadow=draw(0.2, 0.5),
        gain=np.array([draw(0.92, 1.08) for _ in range(3)], np.float32) * np.float32(draw(0.78, 1.18)),
        noise=draw(0.005, 0.03),
    )
