"""The embedded data set: small procedural scenes with exact ground truth, a pure function of (seed, index).

A scene is a textured background and one to three objects. As in nature, a class is a combination of material,
parts, form and usual surroundings, each with variation inside the class. Light and pose carry almost no information;
colours go with the surroundings, so that they distinguish a third of the classes from the rest. The crops of one
picture therefore share information about the class, which DINO-style pretraining can learn within minutes on a CPU.

First a plan is drawn, before any pixel: objects, poses, colours, surroundings and light. Its lengths are in units of
1/64 of the picture's side, so a scene is the same at every size. `shapes` has the forms, `textures` materials and
backgrounds.
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
    background = KINDS[label].background if draw() < 0.85 else int(draw(0, len(BACKGROUNDS)))
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


# ------------------------------------------------------------------------------------------------------------
# Pixels


CLASS_NAMES: tuple[str, ...] = tuple(kind.name for kind in KINDS)
REACH = 1.2  # nothing of an object lies farther than this many radii from its centre


@lru_cache(maxsize=16)
def _centres(size: int) -> Array:
    """Pixel centres along one side, in units."""
    if size < 1:
        raise UserError(f"scenes: size must be at least 1 pixel, got {size}")
    return (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(UNITS / size)


def _coverage(distance: Array, pixels: float) -> Array:
    """Share of a pixel inside an outline, from its centre's distance; `pixels` in a unit of distance."""
    return np.clip(distance * np.float32(-pixels) + np.float32(0.5), 0.0, 1.0)


def _paint_background(scene: Plan, size: int) -> Array:
    """(3, S, S) float32, lit."""
    x, y = _centres(size)[None, :], _centres(size)[:, None]
    cos, sin = (np.float32(f(scene.turn) * scene.frequency) for f in (np.cos, np.sin))
    edge = size / (UNITS * scene.frequency)
    pattern = BACKGROUNDS[scene.background](x * cos + y * sin, y * cos - x * sin, edge, scene.style)
    level, slope_x, slope_y = scene.gradient
    unit = _centres(size) * np.float32(1.0 / UNITS) - np.float32(0.5)
    light = (unit * np.float32(slope_x) + np.float32(level))[None, :] + (unit * np.float32(slope_y))[:, None]
    ground, other = scene.colours
    return (ground[:, None, None] + pattern * (other - ground)[:, None, None]) * light


def _window(centre: float, reach: float, size: int) -> tuple[int, int]:
    scale = size / UNITS
    low, high = int(np.floor((centre - reach) * scale)), int(np.ceil((centre + reach) * scale))
    return max(low, 0), min(high, size)


def _shift(start: int, stop: int, move: int, size: int) -> tuple[slice, slice]:
    """The part of a window that stays inside when it moves, and where it goes."""
    low, high = max(start + move, 0), min(stop + move, size)
    return slice(low - move - start, max(high - move - start, low - move - start)), slice(low, max(high, low))


def _paint(canvas: Array, scene: Plan, thing: Thing, size: int) -> tuple[slice, slice, Array, Array] | None:
    """Shade and blend one object into `canvas`; None if it is out of the picture.

    returns the rows and columns of its window and, in it, where it covers the pixel centres and its relief: 1
    on the outline, 0 where the object bulges most towards the camera
    """
    pose = thing.pose
    reach = REACH * pose.radius + 1.0
    x0, x1 = _window(pose.x, reach, size)
    y0, y1 = _window(pose.y, reach, size)
    if x0 >= x1 or y0 >= y1:
        return None
    kind = KINDS[thing.label]
    pixels = pose.radius * size / UNITS
    column, row = _centres(size)[None, x0:x1], _centres(size)[y0:y1, None]
    x, y = pose.to_body(column, row)
    outline = kind.form(x, y, thing.style)
    extent = outline.body if outline.parts is None else np.minimum(outline.body, outline.parts)

    soft = _coverage(extent, 0.3 * pixels)
    move = [round(part * 0.16 * pixels) for part in scene.light]
    take_y, put_y = _shift(y0, y1, -move[1], size)
    take_x, put_x = _shift(x0, x1, -move[0], size)
    canvas[:, put_y, put_x] *= 1.0 - np.float32(scene.shadow) * soft[take_y, take_x]

    frequency = np.float32(thing.frequency)
    pattern = kind.material(x * frequency, y * frequency, pixels / thing.frequency, thing.style[3:])
    ground, other, parts, detail = thing.colours[:, :, None, None]
    colour = ground + pattern * (other - ground)
    if outline.parts is not None:
        colour += _coverage(-outline.body, pixels) * (parts - colour)
    if outline.detail is not None:
        colour += _coverage(outline.detail, pixels) * (detail - colour)

    relief = np.square(np.clip(extent * np.float32(2.5) + np.float32(1.0), 0.0, 1.0))
    strength = np.float32(0.3 / pose.radius)
    light = (column - np.float32(pose.x)) * (strength * np.float32(scene.light[0])) + np.float32(1.08)
    light = light + (row - np.float32(pose.y)) * (strength * np.float32(scene.light[1])) - np.float32(0.28) * relief
    window = canvas[:, y0:y1, x0:x1]
    window += (colour * light - window) * _coverage(extent, pixels)
    return slice(y0, y1), slice(x0, x1), extent < 0.0, relief


def _expose(canvas: Array, scene: Plan, index: int, seed: int) -> Array:
    """Sensor gain and noise, then 8 bits: (3, S, S) float32 to (S, S, 3) uint8."""
    noise = generator(seed, NOISE_STREAM, index).standard_normal(canvas.shape[1:], dtype=np.float32)
    canvas *= (scene.gain * np.float32(255.0))[:, None, None]
    canvas += noise * np.float32(255.0 * scene.noise)
    np.clip(canvas, 0.0, 255.0, out=canvas)
    return np.ascontiguousarray(canvas.astype(np.uint8).transpose(1, 2, 0))


def _boxes(instances: Array, count: int) -> tuple[Array, list[int]]:
    """Tight boxes (O, 4) of the instances that have a visible pixel, and which ones these are."""
    boxes, visible_ones = [], []
    for k in range(count):
        visible = instances == k + 1
        columns, rows = np.flatnonzero(visible.any(axis=0)), np.flatnonzero(visible.any(axis=1))
        if len(rows):
            boxes.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
            visible_ones.append(k)
    return np.array(boxes, np.float32).reshape(-1, 4), visible_ones


class Scene:
    """One picture with its ground truth; S pixels a side, O visible objects (the main object first).

    image         (S, S, 3) uint8
    label         class of the main object, the largest one
    labels        (NUM_CLASSES,) bool: the classes of all visible objects
    boxes         (O, 4) float32: x0, y0, x1, y1 around the visible pixels, ends exclusive
    box_labels    (O,) int64
    segmentation  (S, S) uint8: 0 background, 1 + class
    instances     (S, S) uint8: 0 background, 1 + row in `boxes`
    depth         (S, S) float32: metres, > 0
    """

    def __init__(self, scene: Plan, index: int, size: int, seed: int) -> None:
        canvas = _paint_background(scene, size)
        instances = np.zeros((size, size), np.uint8)
        unit = _centres(size) * np.float32(1.0 / UNITS)
        behind = np.float32(scene.far) * (np.float32(1.6) - np.float32(0.6) * unit)
        self.depth = np.repeat(behind[:, None], size, axis=1)
        for k in reversed(range(len(scene.things))):
            thing = scene.things[k]
            painted = _paint(canvas, scene, thing, size)
            if painted is not None:
                rows, columns, covered, relief = painted
                np.copyto(instances[rows, columns], np.uint8(k + 1), where=covered)
                surface = relief * np.float32(thing.bulge) + np.float32(thing.near)
                np.copyto(self.depth[rows, columns], surface, where=covered)
        self.boxes, visible = _boxes(instances, len(scene.things))
        renumber = np.zeros(len(scene.things) + 1, np.uint8)
        renumber[[k + 1 for k in visible]] = np.arange(1, len(visible) + 1)
        classes = np.array([0, *(1 + thing.label for thing in scene.things)], np.uint8)
        self.box_labels = np.array([scene.things[k].label for k in visible], np.int64)
        self.image, self.label = _expose(canvas, scene, index, seed), scene.label
        self.labels = np.isin(np.arange(NUM_CLASSES), self.box_labels)
        self.segmentation, self.instances = classes[instances], renumber[instances]


def render(index: int, size: int = 64, seed: int = 0) -> Scene:
    """Scene `index` of the endless data set `seed`, `size` pixels a side.

    raises  UserError for size < 1 and for a negative index or seed
    """
    return Scene(plan(index, seed), index, size, seed)


def render_image(index: int, size: int = 64, seed: int = 0) -> np.ndarray:
    """The picture of `render` alone, (S, S, 3) uint8, bit for bit the same; arguments and errors are the same, too."""
    scene = plan(index, seed)
    canvas = _paint_background(scene, size)
    for thing in reversed(scene.things):
        _paint(canvas, scene, thing, size)
    return _expose(canvas, scene, index, seed)
