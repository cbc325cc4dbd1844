"""Augmentation for kinds of pictures: `augment.preset` and what each sets, with the reason.

A preset goes before the config's own values and behind those that are given beside it; those of the normalisation are
never a preset's.
"""

from typing import Any, NamedTuple

_NO_COLOUR = {"saturation": 0.0, "hue": 0.0, "grayscale": 0.0, "solarize_global2": 0.0}
_NO_UP = {"hflip": 0.5, "vflip": 0.5, "turn": 0.75}
_MILD = {"brightness": 0.2, "contrast": 0.2, "blur_global1": 0.5, "blur_local": 0.2}


class Preset(NamedTuple):
    """Values by name in the section "augment", and why."""

    values: dict[str, Any]
    why: str


PRESETS = {
    "natural": Preset(
        {"hflip": 0.5, "vflip": 0.0, "turn": 0.0, "window": 0.0, "stain": 0.0, "channel_drop": 0.0}
        | {"jitter_probability": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
        | {"grayscale": 0.2, "blur_global1": 1.0, "blur_global2": 0.1, "blur_local": 0.5, "solarize_global2": 0.2},
        "DINOv2's: photographs of things mean the same in another light and mirrored, not upside down",
    ),
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


def preset_values(name: str | None) -> dict[str, Any]:
    """The values of a preset by dotted key; {} without one, and for a name that the option will refuse."""
    return {f"augment.{key}": value for key, value in PRESETS[name].values.items()} if name in PRESETS else {}
