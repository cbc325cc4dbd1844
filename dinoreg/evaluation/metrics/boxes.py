"""Boxes that discovery and detection share: their check, their overlap, padded pixels, pictures with boxes on them.

A box is x0, y0, x1, y1 in pixels, continuous, ends exclusive. Overlaps of VOC's inclusive coordinates from 1 with the
"+1 pixel" areas of its development kit are the same numbers, of (xmin - 1, ymin - 1, xmax, ymax).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dinoreg.evaluation.data import Boxed, Data
from dinoreg.runtime.errors import UserError

PANEL_WIDTH, PANEL_HEIGHT = 290, 400  # pixels of one panel of a picture at most; three stand side by side
TRUTH, PREDICTION = (70, 200, 120), (240, 90, 70)  # green and red
GROUND = (24, 27, 33)


def boxed(data: Data, name: str) -> Boxed:
    """A split with boxes; UserError when it is missing or empty, or its boxes are out of shape or range."""
    split = data.splits.get(name)
    if not isinstance(split, Boxed):
        raise UserError(f"the {name} split is missing, or its images have no boxes")
    count = len(split)
    told: dict[str, Sequence[np.ndarray]] = {"boxes": split.boxes, "labels": split.labels}
    told |= {"difficult flags": split.difficult, "crowd flags": split.crowd}
    if split.area is not None:
        told["areas"] = split.area
    if not count:
        raise UserError(f"the {name} split has no images")
    for what, values in told.items():
        if len(values) != count:
            raise UserError(f"the {name} split: {count} images came with {what} of {len(values)}")
    for index in range(count):
        boxes, labels = np.asarray(split.boxes[index]), np.asarray(split.labels[index])
        where = split.source.name(index)
        if boxes.shape != (len(labels), 4) or any(len(values[index]) != len(labels) for values in told.values()):
            raise UserError(f"{where}: boxes of shape {boxes.shape} came with {len(labels)} labels, expected (k, 4)")
        if len(labels) and (labels.min() < 0 or labels.max() >= split.num_classes):
            raise UserError(f"{where}: a box has a label out of range, expected 0..{split.num_classes - 1}")
        if not np.isfinite(boxes).all() or (boxes[:, 2:] < boxes[:, :2]).any():
            raise UserError(f"{where}: a box is not finite or ends before it starts, expected x0, y0, x1, y1")
    return split


def overlaps(a: np.ndarray, b: np.ndarray, crowd: np.ndarray | None = None) -> np.ndarray:
    """Intersection over union of all pairs.

    a, b     (n, 4) and (m, 4)
    crowd    (m,) bool: where true, COCO's rule for regions: the intersection over the area of `a`
    returns  (n, m) float64 in [0, 1]; 0 where the divisor is
    """
    a, b = np.asarray(a, dtype=np.float64).reshape(-1, 4), np.asarray(b, dtype=np.float64).reshape(-1, 4)
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    shared = sides.clip(min=0).prod(axis=2)
    area_a, area_b = areas(a)[:, None], areas(b)[None]
    union = area_a + area_b - shared
    if crowd is not None:
        union = np.where(np.asarray(crowd, dtype=bool)[None], area_a, union)
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def areas(boxes: np.ndarray) -> np.ndarray:
    """(n,) float64 square pixels."""
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def padded(pixels: np.ndarray, patch_size: int, mean: Sequence[float]) -> Tensor:
    """(h, w, 3) uint8 -> (3, H, W) float32 in [0, 1], filled up to multiples of the patch size at the bottom and right.

    The filling is the encoder's mean colour, which its normalisation turns into zeros.
    """
    height, width = pixels.shape[:2]
    full = (-(-height // patch_size) * patch_size, -(-width // patch_size) * patch_size)
    filling = torch.tensor([float(value) for value in mean])
    image = filling.view(-1, 1, 1).repeat(1, *full)
    image[:, :height, :width] = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 255
    return image


def draw_boxes(
    image: Image.Image,
    boxes: np.ndarray,
    colour: tuple[int, int, int],
    captions: Sequence[str] = (),
) -> Image.Image:
    """A copy of a picture, no larger than a panel, with the outlines of boxes that are in its own pixels."""
    scale = min(PANEL_WIDTH / image.width, PANEL_HEIGHT / image.height)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    canvas = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(canvas)
    for number, box in enumerate(np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * scale):
        x0, y0 = box[0], box[1]
        corners = (x0, y0, max(box[2] - 1, x0), max(box[3] - 1, y0))
        draw.rectangle(corners, outline=colour, width=2)
        if number < len(captions):
            place = (x0 + 3, max(y0 + 2, 0))
            draw.rectangle(draw.textbbox(place, captions[number]), fill=GROUND)
            draw.text(place, captions[number], fill=colour)
    return canvas


def side_by_side(panels: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """Panels in a row, each under its title."""
    gap, head = 6, 16
    width = sum(panel.width for panel in panels) + gap * (len(panels) + 1)
    canvas = Image.new("RGB", (width, max(panel.height for panel in panels) + head + gap), GROUND)
    draw = ImageDraw.Draw(canvas)
    left = gap
    for panel, title in zip(panels, titles, strict=True):
        draw.text((left, 2), title, fill=(228, 232, 239))
        canvas.paste(panel, (left, head))
        left += panel.width + gap
    return canvas
