"""MPI Sintel in small: textured ground and a textured thing on it, both moved by a known flow, in the real tree.

Traps: one `invalid` mask more than there are flows, wrong flow under it, unknown flow (1e10) elsewhere, a wide picture
(so that swapped sides show), files of other kinds among the frames, scenes that are not made in alphabetical order.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tests.miniatures.pictures import save

HEIGHT, WIDTH = 126, 168
SCENES = ("temple_2", "alley_1", "market_2")
THING = 28  # pixels, the side of what moves on its own
DIRECTIONS = ((1, 0), (0, 1), (-1, 0), (0, -1))  # of (u, v); several, so that no constant flow explains them


def write(root: Path, *, per_class: int = 6, shuffled: bool = False, seed: int = 0, step: int = 28) -> Path:
    """Sintel/training with three scenes of `per_class` frames; shuffled: the flow told is a quarter turn off.

    step  pixels that everything moves by; a multiple of the patch (28 is one of 7 and of 14) is found most surely
    """
    folder = root / "Sintel" / "training"
    for number, scene in enumerate(SCENES):
        rng = np.random.default_rng([seed, number, 520])
        moves, thing_moves = _moves(rng, per_class - 1, step), _moves(rng, per_class - 1, step)
        told, thing_told = moves, thing_moves
        if shuffled:
            told, thing_told = (_turned(rng, each) for each in (moves, thing_moves))
        reach = step * per_class
        ground = _texture(rng, HEIGHT + 2 * reach, WIDTH + 2 * reach)
        thing = _texture(rng, THING, THING)
        ground_at = np.array([reach, reach])
        thing_at = np.array([2 * THING, THING])  # x, y
        for frame in range(per_class):
            name = f"frame_{frame + 1:04d}"
            image = ground[ground_at[1] : ground_at[1] + HEIGHT, ground_at[0] : ground_at[0] + WIDTH].copy()
            inside = _place(thing_at)
            image[inside] = thing[tuple((np.argwhere(inside) - thing_at[::-1]).T)]
            save(Image.fromarray(np.uint8(image)), folder / "clean" / scene / f"{name}.png", "PNG")
            hazy = 0.8 * image + 40
            save(Image.fromarray(np.uint8(hazy)), folder / "final" / scene / f"{name}.png", "PNG")
            invalid = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
            invalid[:4, 40:60] = 255
            save(Image.fromarray(invalid), folder / "invalid" / scene / f"{name}.png", "PNG")
            if frame == per_class - 1:
                break
            flow = np.empty((HEIGHT, WIDTH, 2), dtype=np.float32)
            flow[:] = told[frame]
            flow[inside] = thing_told[frame]
            hidden = _hidden(flow, inside, thing_at + thing_told[frame])
            flow[invalid > 0] = 300
            flow[-2:, :3] = 1e10
            _write_flow(folder / "flow" / scene / f"{name}.flo", flow)
            mask = Image.fromarray(np.uint8(255 * hidden))
            save(mask, folder / "occlusions" / scene / f"{name}.png", "PNG")
            ground_at = ground_at - moves[frame]
            thing_at = thing_at + thing_moves[frame]
    (folder / "clean" / SCENES[0] / "Thumbs.db").write_bytes(b"no picture")
    (folder / "clean" / ".DS_Store").write_bytes(b"no scene")
    return root / "Sintel"


def _moves(rng: np.random.Generator, count: int, step: int) -> np.ndarray:
    """(count, 2) of (u, v): there and back in one direction, then in another, so that the mean is nearly nothing."""
    there = np.array(DIRECTIONS)[rng.integers(0, len(DIRECTIONS), size=(count + 1) // 2)]
    return step * np.stack([there, -there], axis=1).reshape(-1, 2)[:count]


def _turned(rng: np.random.Generator, moves: np.ndarray) -> np.ndarray:
    """Each move a quarter turn to one side or the other: on average nothing of the true one is left."""
    sides = rng.choice([-1, 1], size=(len(moves), 1))
    return sides * np.stack([-moves[:, 1], moves[:, 0]], axis=1)


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(height, width, 3) in [0, 255]: soft coloured noise at two scales, that never repeats."""
    total = np.zeros((height, width, 3))
    for cell, strength in ((40, 1.0), (20, 0.7)):
        coarse = rng.uniform(0, 255, size=(height // cell + 2, width // cell + 2, 3))
        soft = Image.fromarray(np.uint8(coarse)).resize((width, height), Image.Resampling.BICUBIC)
        total += strength * (np.asarray(soft, dtype=np.float64) - 127.5)
    return np.clip(127.5 + total, 0, 255)


def _place(at: np.ndarray) -> np.ndarray:
    """(H, W) bool: the pixels of the frame that the thing covers when its corner is at (x, y)."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    return (x >= at[0]) & (x < at[0] + THING) & (y >= at[1]) & (y < at[1] + THING)


def _hidden(flow: np.ndarray, inside: np.ndarray, thing_at: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels that leave the frame, or whose ground the thing covers in the next one."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    x, y = x + flow[..., 0].astype(int), y + flow[..., 1].astype(int)
    gone = (x < 0) | (x >= WIDTH) | (y < 0) | (y >= HEIGHT)
    covered = _place(thing_at)[y.clip(0, HEIGHT - 1), x.clip(0, WIDTH - 1)] & ~inside
    return gone | covered


def _write_flow(path: Path, flow: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = b"PIEH" + np.array([flow.shape[1], flow.shape[0]], dtype="<i4").tobytes()
    path.write_bytes(header + flow.astype("<f4").tobytes())
