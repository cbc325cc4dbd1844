"""Forms and parts of the objects in the embedded scenes, as signed distances.

Every kind of object is a function of body coordinates x, y (H, W) float32 (x along the body, the object within about
one unit of the centre) and of style draws s in [0, 1). It returns signed distances (H, W) in the same unit, negative
inside: to the body, which has the material, to parts (legs, wings, wheels ...) and to details painted on the body.
Distances are close to Euclidean near the outline, which suffices for smooth edges.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dinoreg.scenes import textures
from dinoreg.scenes.textures import TAU, Array, Texture


class Outline(NamedTuple):
    """Signed distances in body units; `parts` and `detail` may be absent."""

    body: Array
    parts: Array | None = None
    detail: Array | None = None


Form = Callable[[Array, Array, Sequence[float]], Outline]


class Kind(NamedTuple):
    """One class of objects: form with parts, material, usual background, range of rotation, and size in metres."""

    name: str
    form: Form
    material: Texture
    background: int  # index into BACKGROUNDS
    turn: float  # radians; its angle lies within this of the upright
    metres: float  # half the length


def circle(x: Array, y: Array, cx: float, cy: float, radius: float) -> Array:
    """Distance to a circle around (cx, cy)."""
    dx, dy = x - np.float32(cx), y - np.float32(cy)
    return np.sqrt(dx * dx + dy * dy) - np.float32(radius)


def ellipse(x: Array, y: Array, cx: float, cy: float, a: float, b: float, angle: float = 0.0) -> Array:
    """Approximate distance to an ellipse around (cx, cy) with half axes a, b, turned by `angle` radians."""
    dx, dy = x - np.float32(cx), y - np.float32(cy)
    if angle:
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        dx, dy = dx * cos + dy * sin, dy * cos - dx * sin
    scale_x, scale_y = np.float32(1.0 / a), np.float32(1.0 / b)
    u, v = dx * scale_x, dy * scale_y
    level = np.sqrt(u * u + v * v)
    u, v = u * scale_x, v * scale_y
    slope = np.sqrt(u * u + v * v) + np.float32(1e-4)  # of `level`, up to the factor 1 / level
    return level * (level - 1.0) / slope


def rod(x: Array, y: Array, start: tuple[float, float], end: tuple[float, float], radius: float) -> Array:
    """Distance to a straight limb with round ends, from `start` to `end`, both (x, y)."""
    length_x, length_y = end[0] - start[0], end[1] - start[1]
    scale = 1.0 / (length_x**2 + length_y**2)
    dx, dy = x - np.float32(start[0]), y - np.float32(start[1])
    along = np.clip(dx * np.float32(length_x * scale) + dy * np.float32(length_y * scale), 0.0, 1.0)
    u, v = dx - along * np.float32(length_x), dy - along * np.float32(length_y)
    return np.sqrt(u * u + v * v) - np.float32(radius)


def box(x: Array, y: Array, cx: float, cy: float, a: float, b: float, radius: float) -> Array:
    """Distance to a rectangle around (cx, cy) with half sides a, b and rounded corners."""
    dx = np.abs(x - np.float32(cx)) - np.float32(a - radius)
    dy = np.abs(y - np.float32(cy)) - np.float32(b - radius)
    inside = np.minimum(np.maximum(dx, dy), 0.0)
    dx, dy = np.maximum(dx, 0.0), np.maximum(dy, 0.0)
    return np.sqrt(dx * dx + dy * dy) + inside - np.float32(radius)


def fold(x: Array, y: Array, count: int) -> tuple[Array, Array]:
    """The plane folded into one of `count` equal arms around the centre: coordinates along and across that arm."""
    turns = (np.arctan2(y, x) + np.float32(4.0 * TAU)) * np.float32(count / TAU)
    angle = (turns - np.floor(turns) - np.float32(0.5)) * np.float32(TAU / count)
    radius = np.sqrt(x * x + y * y)
    return radius * np.cos(angle), np.abs(radius * np.sin(angle))


def fish(x: Array, y: Array, s: Sequence[float]) -> Outline:
    """A fish: elliptic body, forked tail and back fin, an eye."""
    body = ellipse(x, y, 0.2, 0.0, 0.72, 0.38 + 0.14 * s[0])
    tail = np.maximum(np.abs(y) + (x + 0.3) * np.float32(0.55 + 0.3 * s[1]), -0.95 - x) * np.float32(0.8)
    fin = ellipse(x, y, 0.1 + 0.1 * s[2], -0.4 - 0.1 * s[0], 0.3, 0.17, 0.35)
    return Outline(body, np.minimum(tail, fin), circle(x, y, 0.6, -0.08, 0.08))


def wasp(x: Array, y: Array, s: Sequence[float]) -> Outline:
    """A wasp: elliptic body, two wings, two feelers, a round face."""
    side = np.abs(y)
    body = ellipse(x, y, -0.1, 0.0, 0.78, 0.38 + 0.12 * s[0])
    wings = ellipse(x, side, 0.05, 0.52, 0.46, 0.17 + 0.06 * s[1], 1.9 + 0.4 * s[2])
    feelers = rod(x, side, (0.6, 0.08), (0.95, 0.3 + 0.2 * s[3]), 0.04)
    return Outline(np.maximum(body, -wings), np.minimum(wings, feelers), circle(x, y, 0.62, 0.0, 0.2))


def ladybird(x: Array, y: Array, s: Sequence[float]) -> Outline:
    """A ladybird: round body, six legs and a head, the seam between its wing covers."""
    side = np.abs(y)
    body = ellipse(x, y, 0.0, 0.0, 0.72, 0.58 + 0.1 * s[0])
    legs = rod(x, side, (0.3, 0.4), (0.5 + 0.1 * s[1], 0.86), 0.055)
    for hip, foot in ((0.0, 0.06 * s[1]), (-0.3, -0.5)):
        legs = np.minimum(legs, rod(x, side, (hip, 0.4), (foot, 0.9), 0.055))
    head = circle(x, y, 0.7, 0.0, 0.22 + 0.06 * s[2])
    return Outline(body, np.minimum(legs, head), side - np.float32(0.03))


def starfish(x: Array, y: Array, s: Sequence[float]) -> Outline:
    """A starfish with five or six pointed arms, without parts."""
    count = 5 if s[0] < 0.7 else 6
    along, aside = fold(x, y, count)
    inner = 0.42 + 0.12 * s[1]
    valley_x, valley_y = inner * np.cos(np.pi / count), inner * np.sin(np.pi / count)
    normal = np.hypot(valley_y, 0.95 - valley_x)
    edge = (along - 0.95) * np.float32(valley_y / normal) + aside * np.float32((0.95 - valley_x) / normal)
    return Outline(edge - np.float32(0.05))


def urchin(x: Array, y: Array, s: Sequence[float]) -> Outline:
    """A sea urchin: round body with 12 to 19 spines."""
    along, aside = fold(x, y, 12 + int(8 * s[0]))
    body = circle(x, y, 0.0, 0.0, 0.64 + 0.08 * s[1])
    return Outline(body, aside + (along - 1.0) * np.float32(0.17 + 0.06 * s[2]))


def flower(x: Array, y: Array, s: Sequence[float]) -> Outline:
    """A flower of five to eight petals around a round centre."""
    count = 5 + int(4 * s[0])
    along, aside = fold(x, y, count)
    width = 0.62 * np.sin(np.pi / count) + 0.06
    petals = ellipse(along, aside, 0.56, 0.0, 0.4, width + 0.08 * s[1])
    centre = circle(x, y, 0.0, 0.0, 0.2 + 0.06 * s[2])
    return Outline(np.minimum(petals, centre - 0.2), None, centre)


def crystal(x: Array, y: Array, s: Sequence[float]) -> Outline:
    """A convex polygon of five to seven sides, without parts."""
    count = 5 + int(3 * s[0])
    planes = [circle(x, y, 0.0, 0.0, 1.1)]
    for k in range(count):
        angle = TAU * (k + 0.5 * s[1 + k % 5]) / count
        reach = 0.55 + 0.25 * s[(k * 2 + 3) % 6]
        planes.append(x * np.float32(np.cos(angle) * 0.85) + y * np.float32(np.sin(angle)) - np.float32(reach))
    return Outline(np.maximum.reduce(planes))


def turtle(x: Array, y: Array, s: Sequence[float]) -> Outline:
    """A turtle: oval shell, four flippers and a head."""
    side = np.abs(y)
    body = ellipse(x, y, -0.05, 0.0, 0.7, 0.56 + 0.1 * s[0])
    flippers = rod(x, side, (0.3, 0.35), (0.5 + 0.2 * s[1], 0.82), 0.13)
    hind = rod(x, side, (-0.45, 0.3), (-0.68 - 0.1 * s[2], 0.62), 0.11)
    head = ellipse(x, y, 0.8, 0.0, 0.22, 0.16)
    return Outline(body, np.minimum(np.minimum(flippers, hind), head))


def leaf(x: Array, y: Array, s: Sequence[float]) -> Outline:
    """A pointed leaf with its stalk and midrib."""
    length, width = 0.88, 0.48 + 0.18 * s[0]
    radius = (length**2 + width**2) / (2.0 * width)
    side = np.abs(y)
    low = side + np.float32(radius - width)
    body = np.sqrt(x * x + low * low) - np.float32(radius)
    return Outline(body, rod(x, y, (-0.75, 0.0), (-1.08, 0.3 * s[1] - 0.15), 0.05), side - np.float32(0.035))


def doughnut(x: Array, y: Array, s: Sequence[float]) -> Outline:
    """A slightly elliptic ring, without parts."""
    stretched = y * np.float32(1.0 + 0.3 * s[0])
    radius = np.sqrt(x * x + stretched * stretched) - np.float32(0.63)
    return Outline(np.abs(radius) - np.float32(0.29 + 0.05 * s[1]))


def kite(x: Array, y: Array, s: Sequence[float]) -> Outline:
    """A kite: quadrilateral body and a waving tail with bows."""
    front, back, half, widest = 0.95, 0.65 + 0.1 * s[0], 0.66 + 0.14 * s[1], 0.3
    side = np.abs(y)
    ahead = ((x - front) * half + side * (front - widest)) * np.float32(1.0 / np.hypot(half, front - widest))
    behind = (side * (back + widest) - (x + back) * half) * np.float32(1.0 / np.hypot(half, back + widest))
    body = np.maximum(ahead, behind)
    wave = y - 0.09 * np.sin(x * 14.0 + np.float32(TAU * s[2]))
    bow = np.abs(np.sin(x * np.float32(11.0))) * np.float32(0.1)
    tail = np.maximum(np.abs(wave) - 0.03 - bow, np.maximum(x + np.float32(back - 0.1), -1.12 - x))
    return Outline(body, tail)


def cart(x: Array, y: Array, s: Sequence[float]) -> Outline:
    """A cart: rounded body and cabin on two wheels."""
    low = 0.34 + 0.08 * s[0]
    body = box(x, y, 0.0, 0.1, 0.88, low, 0.1)
    cabin = box(x, y, -0.3 + 0.5 * s[1], -0.35, 0.36 + 0.1 * s[2], 0.4, 0.1)
    span = np.abs(x)
    wheels = circle(span, y, 0.5, 0.46, 0.24 + 0.05 * s[3])
    return Outline(np.maximum(np.minimum(body, cabin), -wheels), wheels, circle(span, y, 0.5, 0.46, 0.1))


ANY = np.pi  # turns freely
UPRIGHT = 0.7  # about 40 degrees to either side

KINDS: tuple[Kind, ...] = (
    Kind("fish", fish, textures.scales, 0, UPRIGHT, 0.30),
    Kind("urchin", urchin, textures.rings, 0, ANY, 0.12),
    Kind("wasp", wasp, textures.stripes, 1, ANY, 0.08),
    Kind("flower", flower, textures.ribs, 1, ANY, 0.15),
    Kind("ladybird", ladybird, textures.rosettes, 2, ANY, 0.06),
    Kind("leaf", leaf, textures.veins, 2, ANY, 0.14),
    Kind("starfish", starfish, textures.dots, 3, ANY, 0.16),
    Kind("turtle", turtle, textures.scutes, 3, ANY, 0.40),
    Kind("doughnut", doughnut, textures.sprinkles, 4, ANY, 0.10),
    Kind("cart", cart, textures.panels, 4, UPRIGHT, 0.60),
    Kind("kite", kite, textures.checker, 5, ANY, 0.50),
    Kind("crystal", crystal, textures.facets, 5, ANY, 0.20),
)
