"""The mean and standard deviation with which pixels are normalised, from the JSON beside weights."""

from typing import Any

from dinoreg.config.schema import is_value_range
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.json_files import is_number

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def stated_preprocessing(
    stated: Any, channels: int, where: object, unknown: Statistics = ((0.5,), (0.25,))
) -> Statistics:
    """(mean, std), one number per channel, of pixels in 0 to 1.

    stated   {"mean": …, "std": …} from the JSON beside the weights; a missing entry is ImageNet's for 3 channels
    where    path of the weights, for messages
    unknown  the default for another number of channels
    raises   UserError for numbers that do not fit the channels, and for std <= 0
    """
    default = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else unknown
    stated = stated if isinstance(stated, dict) else {}
    mean, std = (
        _per_channel(stated.get(key) or value, channels, key, where) for key, value in zip(("mean", "std"), default)
    )
    return mean, std


def stated_range(stated: Any, where: object) -> list[float] | None:
    """The value range of the data that weights were trained on, as `data.range` is written; None where none is stated.

    raises UserError for what is no range
    """
    values = stated.get("range") if isinstance(stated, dict) else None
    if values is None:
        return None
    if not isinstance(values, list) or not all(map(is_number, values)) or not is_value_range(values):
        raise UserError(f"weights {where}: range={values!r}: expected LOW,HIGH with LOW below HIGH")
    return list(map(float, values))


def _per_channel(values: Any, channels: int, key: str, where: object) -> tuple[float, ...]:
    fits = isinstance(values, (list, tuple)) and len(values) in (1, channels)
    if not fits or not all(map(is_number, values)):
        raise UserError(
            f"weights {where}: {key}={values!r}: expected one number or one for each of {channels} channels"
        )
    if key == "std" and min(values) <= 0:
        raise UserError(f"weights {where}: std={values!r}: expected positive numbers")
    return tuple(map(float, values)) * (channels // len(values))
