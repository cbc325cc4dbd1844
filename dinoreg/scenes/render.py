"""The embedded data set: small procedural scenes with exact ground truth, a pure function of (seed, index).

A scene is a textured background and one to three objects. As in nature, a class is a combination of material,
parts, form and usual surroundings, each with variation inside the class. Light and pose carry almost no information;
colours go with the surroundings, so that they distinguish a third of the classes from the rest. The crops of one
picture therefore share information about the class, which DINO-style pretraining can learn within minutes on a CPU.

`layout` draws the random properties, `shapes` has the forms, `textures` materials and backgrounds.
"""

from functools import lru_cache

import numpy as np

from dinoreg.runtime.errors import UserError
from dinoreg.scenes.layout import NOISE_STREAM, NUM_CLASSES, UNITS, Plan, Thing, generator, plan
from dinoreg.scenes.shapes import KINDS
from dinoreg.scenes.textures import BACKGROUNDS, Array

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
