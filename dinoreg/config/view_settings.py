"""The options of crops, photometric augmentation and block masks, with DINOv2's defaults (its code)."""

import re
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from dinoreg.config.option import Options, check, fraction, option

MAX_SIDE = 16384  # pixels
SHARES = {"above": 0, "high": 1, "ascending": True}


@dataclass(frozen=True)
class CropSettings(Options, section="crops"):
    """Geometry of the multi-crop views: two global crops and `num_local` local ones of every image."""

    global_size: int = option(224, "height and width of a global crop", unit="pixel", low=1, high=MAX_SIDE)
    local_size: int = option(98, "height and width of a local crop", unit="pixel", low=1, high=MAX_SIDE)
    num_local: int = option(8, "local crops per image; 0 trains on the two global crops alone", low=0, high=1000)
    global_scale: tuple[float, float] = option((0.32, 1.0), "share of the image's area", **SHARES)
    local_scale: tuple[float, float] = option((0.05, 0.32), "share of the image's area", **SHARES)
    ratio: tuple[float, float] = option((3 / 4, 4 / 3), "width over height of the box", above=0, ascending=True)
    stages: list[str] | None = option(
        None,
        "sizes before those above, as [0.75:112/42]: 112 and 42 pixels until 75 % of the run; none: no others",
        pattern=r"0?\.\d+:[1-9]\d{0,3}/[1-9]\d{0,3}",
        expected="UNTIL:GLOBAL/LOCAL, a share of the run and two sizes in pixels",
    )

    def _check_relations(self) -> None:
        ends = [0.0, *(until for until, *_ in self.in_stages)]
        check(ends == sorted(set(ends)), "crops.stages", self.stages, "rising shares of the run above 0")

    @property
    def in_stages(self) -> list[tuple[float, int, int]]:
        """(share of the run at its end, `global_size`, `local_size`) of every stage; the last one ends at 1."""
        parts = [re.split("[:/]", text) for text in self.stages or []]
        before = [(float(until), int(global_size), int(local_size)) for until, global_size, local_size in parts]
        return [*before, (1.0, self.global_size, self.local_size)]


# Of no preset: the normalisation, and what is the same for all pictures.
_NEVER = ("preset", "mean", "std", "blur_sigma", "blur_kernel", "reference_blur", "solarize_threshold")
_NO_COLOUR = {"saturation": 0.0, "hue": 0.0, "grayscale": 0.0, "solarize_global2": 0.0}
_NO_UP = {"hflip": 0.5, "vflip": 0.5, "turn": 0.75}
_MILD = {"brightness": 0.2, "contrast": 0.2, "blur_global1": 0.5, "blur_local": 0.2}


class Preset(NamedTuple):
    """Values by name in the section "augment", and why."""

    values: dict[str, Any]
    why: str


# Augmentation for kinds of pictures: `augment.preset`. A preset goes before the config's own values and behind those
# that are given beside it.
PRESETS = {
    "histology": Preset(
        {**_NO_UP, **_MILD, "saturation": 0.1, "hue": 0.02, "grayscale": 0.0, "solarize_global2": 0.0, "stain": 0.05},
        "a slide has no up; laboratories differ in how strongly they stain (arXiv 1902.06543), and colour is meaning",
    ),
    "satellite": Preset(
        {**_NO_UP, **_MILD, **_NO_COLOUR, "saturation": 0.1},
        "seen from above there is no up; the colour of a pixel is what it is made of, haze and season change contrast",
    ),
    "xray": Preset(
        {"hflip": 0.0, "vflip": 0.0, "turn": 0.0, **_MILD, **_NO_COLOUR, "window": 0.1},
        "left and right, up and down are anatomy; exposure and window differ from device to device",
    ),
    "microscopy": Preset(
        {**_NO_UP, **_MILD, **_NO_COLOUR, "window": 0.1, "channel_drop": 0.1},
        "cells have no up; channels are stains of their own, one of which may be weak or missing",
    ),
}


@dataclass(frozen=True)
class AugmentSettings(Options, section="augment"):
    """Colour, blur and normalisation of every crop. Probabilities are drawn per crop."""

    preset: str | None = option(None, "values for a kind of picture; others stay", choices=("natural", *PRESETS))
    hflip: float = fraction(0.5, "probability of a left-right mirror")
    vflip: float = fraction(0.0, "probability of an up-down mirror; for images without an up (satellite, microscopy)")
    turn: float = fraction(0.0, "probability of a turn by 90, 180 or 270 degrees; as vflip")
    window: float = option(0.0, "share of the range cut off at either end, at most; the rest spread", low=0, below=0.5)
    stain: float = fraction(0.0, "haematoxylin, eosin and DAB times 1 - x .. 1 + x, plus -x .. x; RGB alone")
    channel_drop: float = fraction(0.0, "probability of losing a channel, each for itself; one stays", below=1)
    jitter_probability: float = fraction(0.8, "probability of the four colour changes below, in a random order")
    brightness: float = option(0.4, "factor drawn from 1 - x .. 1 + x", low=0, high=100)
    contrast: float = option(0.4, "factor drawn from 1 - x .. 1 + x", low=0, high=100)
    saturation: float = option(0.2, "factor drawn from 1 - x .. 1 + x", low=0, high=100)
    hue: float = option(0.1, "shift drawn from -x .. x, in turns of the colour circle", low=0, high=0.5)
    grayscale: float = fraction(0.2, "probability of losing all colour")
    blur_global1: float = fraction(1.0, "probability of a Gaussian blur of the first global crop")
    blur_global2: float = fraction(0.1, "the same of the second global crop")
    blur_local: float = fraction(0.5, "the same of a local crop")
    blur_sigma: tuple[float, float] = option((0.1, 2.0), "in pixels", above=0, ascending=True, high=1_000)
    blur_kernel: int = option(9, "taps of the blur", low=1, high=1_001, fits=lambda n: n % 2, expected="odd, to 1001")
    reference_blur: bool = option(False, "blur with 1 - p, as the reference implementation runs (0.0, 0.9, 0.5)")
    solarize_global2: float = fraction(0.2, "probability of inverting the bright pixels of the second global crop")
    solarize_threshold: int = option(128, "grey level from which a pixel counts as bright", low=0, high=255)
    mean: tuple[float, ...] = option((0.485, 0.456, 0.406), "per channel, of pixels in 0..1; one value serves all")
    std: tuple[float, ...] = option((0.229, 0.224, 0.225), "as mean", above=0)

    @property
    def of_sensor(self) -> bool:
        """Whether crops are turned, windowed, stained anew or lose channels."""
        return self.turn + self.window + self.stain + self.channel_drop > 0


PRESETS["natural"] = Preset(
    {each.name: each.default for each in fields(AugmentSettings) if each.name not in _NEVER},
    "DINOv2's: photographs of things mean the same in another light and mirrored, not upside down",
)


def preset_values(name: str | None) -> dict[str, Any]:
    """The values of a preset by dotted key; {} without one, and for a name that the option will refuse."""
    return {f"augment.{key}": value for key, value in PRESETS[name].values.items()} if name in PRESETS else {}


@dataclass(frozen=True)
class MaskSettings(Options, section="mask"):
    """Block masks that hide patches of the student's global crops."""

    probability: float = fraction(0.5, "share of the global crops of a batch that are masked")
    ratio: tuple[float, float] = fraction((0.1, 0.5), "masked share of a crop, over the batch", ascending=True)
    by_process: bool = option(False, "`ratio` is spread over each process's crops, as the reference; not over all")
    min_patches: int = option(4, "patches of the smallest block", low=1, high=1_000_000)
    aspect: float = option(0.3, "the most elongated block: height over width in aspect .. 1 / aspect", above=0, high=1)
