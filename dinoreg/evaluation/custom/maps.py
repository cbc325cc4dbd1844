"""Own masks and depth maps: what their pixels hold, which is looked at before anything is computed.

Masks: without a word the numbers are classes from 0, as many as `classes.txt` has lines or as occur, and 255 is not
counted. `own.values=[0,255]` or `own.values=[#000000,#ff0000]` lists what is a class, in order, and nothing else is
counted. Every mask is read before anything is computed, so that a class that is nowhere is not measured in silence.

Depth: the user says its unit, and its range is measured on the training part. Whole numbers say nothing of their unit
(millimetres, 1/256 m as in KITTI, …), so they need `own.depth_unit`; floats are metres unless it says otherwise. 0,
what is not finite, and the largest 16-bit number are unknown.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dinoreg.data.labelled import read_classes
from dinoreg.evaluation.custom.pairs import Pairs, Survey, survey, training_length, turned
from dinoreg.evaluation.data import IGNORED, Data, DepthMaps, Segmented, Split
from dinoreg.evaluation.options import DepthOptions, SegmentationOptions
from dinoreg.evaluation.readers.pixel_maps import NOT_DEPTH, UNREADABLE, PixelFile, read_depth, read_pixels
from dinoreg.runtime.errors import UserError, reworded
from dinoreg.runtime.printable import listed

PUBLISHED_MASKS = SegmentationOptions()
COLOUR = 1 << 24  # added to 0xRRGGBB, which is no class number then
BLURRED = ("JPEG", "MPO", "WEBP")  # formats that change numbers
MOST_VOID = 0.5  # of a split's pixels, above which it is said
MOST_LISTED = 6  # values that a message gives shares of
MOST_UNNAMED = 64  # classes without a classes.txt: more values sooner are shades
MOST_SUGGESTED = 12  # classes without a classes.txt that a message makes of the values
PUBLISHED_DEPTH = DepthOptions()
UNITS = {"m": 1.0, "cm": 0.01, "mm": 0.001}  # in metres
UNIT = "m, cm, mm, or a part of a metre such as 0.0002 or 1/256"
SAMPLED = 2_000_000  # depths of a split that its range is measured by, at most
PLAUSIBLE = (1.0, 1000.0)  # metres; largest depth of floats whose unit is not given
ONE_OUTLIER, FAR = 0.999, 2.0  # a largest depth beyond FAR times this quantile is no limit


def segmented(root: Path, pairs: Pairs, variant: str, options: Mapping[str, Any], warnings: Sequence[str] = ()) -> Data:
    """The pairs as images with masks, once all of them have been looked at.

    variant  how they were split, in words
    options   "values": the numbers or colours that are classes, as text; "" for numbers from 0
    warnings  that there are already
    raises   UserError for masks that cannot be read or do not fit their pictures, values that are no class, a class
             that no mask has, and a split of fewer than two classes
    """
    names, values = read_classes(root) or [], _values(options["values"])
    read = partial(read_numbers, colours=any(value >= COLOUR for value in values))
    seen = survey(pairs, read, _counted, "masks")
    totals = {split: _total(found) for split, found in seen.found.items()}
    classes, names = _classes(root, names, values, seen, sum(totals.values(), Counter()))
    shown = names or [str(each) for each in classes]
    warnings = [*warnings, *seen.warnings, *_doubts(root, shown, classes, totals)]
    kind = partial(Segmented, num_classes=len(classes))
    splits = _upright(pairs, seen, kind, lambda path: numbered(read(path).values, classes), str(classes))
    short = int(np.median(seen.sides))
    length = training_length(len(seen.found["train"]), PUBLISHED_MASKS.steps, PUBLISHED_MASKS.batch_size)

    def options_for(side: int) -> dict[str, int]:
        """Small pictures are not enlarged beyond what the encoder takes elsewhere."""
        return {**length, "size": min(max(short, side), PUBLISHED_MASKS.size)}

    return Data(splits, names, variant, {"warnings": warnings}, options=options_for)


def read_numbers(path: Path, colours: bool = False) -> PixelFile:
    """A mask's numbers (H, W) int32; of a picture in colour 0xRRGGBB + COLOUR, but grey where it has no colour.

    colours  everything is taken as a colour, palettes by their entries
    raises   UserError for a file that cannot be read, a lossy one, and numbers that are not whole
    """
    with reworded(f"{path}: cannot be read as a mask", *UNREADABLE):
        pixels = read_pixels(path, "RGB" if colours else None)
    values = pixels.values
    if pixels.format in BLURRED:
        what = f"is a {pixels.format} inside, which mixes the numbers of neighbouring pixels"
        raise UserError(f"{path}: {what}; expected a mask as PNG, TIFF, BMP or GIF")
    if len(parts := values[values != np.rint(values)]):
        raise UserError(f"{path}: has fractions, such as {parts[0]:g}; expected class numbers")
    if values.ndim == 3 and values.shape[2] >= 3:
        red, green, blue = values[..., :3].astype(np.int32).transpose(2, 0, 1)
        in_colour = colours or (red != green).any() or (red != blue).any()
        values = COLOUR + (red << 16) + (green << 8) + blue if in_colour else red
    elif values.ndim == 3:  # grey and alpha
        values = values[..., 0]
    return pixels._replace(values=values.astype(np.int32))


def numbered(values: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """Values of a file (H, W) as classes, uint8: the place of each in `classes`; IGNORED where it is none of them."""
    found = np.full(values.shape, IGNORED, dtype=np.uint8)
    for place, value in enumerate(classes):
        found[values == value] = place
    return found


def _values(text: str) -> list[int]:
    """The values of `own.values`: numbers as they are, #RRGGBB with COLOUR added; UserError unless two or more."""
    texts = re.split(r"[\s,]+", text.strip("[] ")) if text else []
    values = []
    for each in texts:
        match = re.fullmatch(r"#(?P<colour>[0-9a-f]{6})|(?P<number>\d{1,9})", each.strip("'\""), re.IGNORECASE)
        if match is None:
            raise UserError(f"own.values={text}: {each!r} is neither a number nor a colour such as #ff0000")
        colour = match["colour"]
        values.append(COLOUR + int(colour, 16) if colour else int(match["number"]))
    mixed = len({value >= COLOUR for value in values}) > 1
    if mixed or (texts and not 2 <= len(set(values)) == len(values) <= IGNORED):
        raise UserError(f"own.values={text}: expected 2 to {IGNORED} different numbers, or as many colours")
    return values


def _counted(path: Path, pixels: PixelFile) -> tuple[Path, np.ndarray, np.ndarray]:
    """(file, the values it has, how many pixels have each)"""
    return path, *np.unique(pixels.values, return_counts=True)


def _total(found: Sequence[tuple[Path, np.ndarray, np.ndarray]]) -> Counter[int]:
    """{value: pixels of all masks}"""
    total: Counter[int] = Counter()
    for _, values, counts in found:
        total.update(dict(zip(values.tolist(), counts.tolist())))
    return total


def _classes(
    root: Path, names: list[str], values: list[int], seen: Survey, total: Counter[int]
) -> tuple[list[int], list[str]]:
    """The values that are classes, in order, and their names; UserError where the masks do not have them."""
    numbers = [value for value in total if value != IGNORED]
    if values:
        if not names:
            names = [_shown(value) for value in values]
        elif len(names) > max(values):  # each name stands at the place of its number
            names = [names[value] for value in values]
        elif len(names) != len(values):
            raise UserError(f"{root}: classes.txt has {len(names)} names for the {len(values)} of own.values")
        classes = values
    else:
        if any(value >= COLOUR for value in numbers):
            raise UserError(f"{root}: masks are pictures in colour; {_suggestion(total, len(names))}")
        if not names and len(numbers) > MOST_UNNAMED:
            what = f"masks have {len(total)} different values; classes.txt names them if they are classes"
            raise UserError(f"{root}: {what}; {_suggestion(total, 0)}")
        count = len(names) or max(numbers, default=-1) + 1
        for path, present, _ in (each for found in seen.found.values() for each in found):
            wrong = present[(present != IGNORED) & ((present < 0) | (present >= min(count, IGNORED)))]
            if len(wrong):
                expected = f"0..{min(count, IGNORED) - 1} or {IGNORED}{', as classes.txt says' if names else ''}"
                what = f"has the value {wrong[0]}, expected {expected}"
                raise UserError(f"{path}: {what}; {_suggestion(total, len(names))}")
        classes = list(range(count))
    absent = [place for place, value in enumerate(classes) if not total[value]]
    if absent:
        which = listed([names[place] for place in absent]) if names else listed(map(str, absent))
        raise UserError(f"{root}: no mask has a pixel of {which}; {_suggestion(total, len(names))}")
    if len(classes) < 2:
        raise UserError(
            f"{root}: masks have {len(classes)} class(es), expected 2 or more; {_suggestion(total, len(names))}"
        )
    return classes, names


def _suggestion(total: Counter[int], num_names: int) -> str:
    """What the masks hold, and how the option would make classes of it."""
    shares = _shares(total, total.most_common(MOST_LISTED))
    more = f" and {len(total) - MOST_LISTED} other values" if len(total) > MOST_LISTED else ""
    void = f", of which {IGNORED} is not counted" if IGNORED in total else ""
    if any(value >= COLOUR for value in total):  # a mask without colours was read as grey
        total = Counter({each if each >= COLOUR else COLOUR + 0x010101 * each: total[each] for each in total})
    few = num_names or (len(total) if len(total) <= MOST_SUGGESTED else 2)  # others are edges, mixed from both
    chosen = {value for value, _ in total.most_common(few)}
    if few > 2 and not num_names:
        chosen.discard(IGNORED)
    example = f"[{','.join(map(_shown, sorted(chosen)))}]" if len(chosen) > 1 else "[0,255]"
    key = f"own.values={example} lists what is a class, in this order, and counts nothing else"
    return f"they hold {shares}{more}{void}; {key}"


def _shares(total: Counter[int], counts: Iterable[tuple[int, int]]) -> str:
    pixels = sum(total.values())
    return ", ".join(f"{_shown(value)} ({100 * count / pixels:.3g}%)" for value, count in counts)


def _shown(value: int) -> str:
    return f"#{value - COLOUR:06x}" if value >= COLOUR else str(value)


def _doubts(root: Path, names: list[str], classes: list[int], totals: Mapping[str, Counter[int]]) -> list[str]:
    """Warnings on what is not counted, and on classes of one side only; UserError for a split of one class."""
    warnings = []
    present = {split: np.array([total[value] > 0 for value in classes]) for split, total in totals.items()}
    for split, total in totals.items():
        if present[split].sum() < 2:
            which = listed(np.array(names)[present[split]]) or "no class"
            raise UserError(f"{root}: every pixel of {split} that is counted is of {which}, expected 2 or more classes")
        void = {value: count for value, count in total.most_common() if value not in classes}
        share = sum(void.values()) / sum(total.values())
        if share > MOST_VOID or set(void) - {IGNORED}:
            values = _shares(total, [*void.items()][:MOST_LISTED])
            much = f"{100 * share:.3g}% of the pixels of {split}"
            warnings.append(f"unused truth: {much} are not counted: those of {values}")
        if len(unseen := np.array(names)[present[split] & ~present["train"]]):
            which = f"some that are not in train, and cannot be right: {listed(unseen)}"
            warnings.append(f"unlearnt classes: {split} has {which}")
    if len(untested := np.array(names)[present["train"] & ~present["test"]]):
        warnings.append(f"untested classes: nothing is said about those without a pixel in test: {listed(untested)}")
    return warnings


def _upright(
    pairs: Pairs, seen: Survey, kind: Callable[..., Split], read: Callable[[Path], np.ndarray], said: str
) -> dict[str, Split]:
    """The splits, each of a kind, with truths that `read` gives of a file, turned upright; `said` is part of stamps."""

    def split(name: str) -> Split:
        images, truths = pairs[name]
        turns = seen.turns[name].tolist()
        stamp = f"{truths.stamp()} {said} {turns}"
        return kind(images, lambda index: turned(read(Path(truths.name(index))), turns[index]), stamp=stamp)

    return {name: split(name) for name in pairs}


class Known(NamedTuple):
    """What is known of one depth map, in the units of its file.

    whole   whether it holds whole numbers
    share   of its pixels that are known
    low, high  of the known ones; infinite the wrong way round where there are none
    sample  (k,) known ones, evenly spaced
    """

    whole: bool
    share: float
    low: float
    high: float
    sample: np.ndarray


def depths(root: Path, pairs: Pairs, variant: str, options: Mapping[str, Any], warnings: Sequence[str] = ()) -> Data:
    """The pairs as images with depth maps in metres, once all of them have been looked at.

    variant  how they were split, in words
    options   "depth_unit": of the files; "" where it is not known
    warnings  that there are already
    raises   UserError for maps that cannot be read or do not fit their pictures, whole numbers without a unit, negative
             depths, and a split in which nothing is known or all is equally far
    """
    unit = _unit(options["depth_unit"])
    each = max(SAMPLED // max(len(images) for images, _ in pairs.values()), 16)
    seen = survey(pairs, read_depth, partial(_known, sampled=each), "depth maps")
    low, high = _range(root, seen.found, unit)
    metres = unit or 1.0
    samples = {split: np.concatenate([one.sample for one in found]) * metres for split, found in seen.found.items()}
    limit, warnings = high * metres, [*warnings, *seen.warnings]
    usual = float(np.quantile(samples["train"], ONE_OUTLIER))
    if limit > FAR * usual:
        farthest = f"up to {limit:.3g} m; depth.max_depth={_above(limit):g} counts them"
        limit = usual
        warnings.append(
            f"stray depth: 0.1% of the known depths lie beyond {_above(limit):g} m and are not counted, {farthest}"
        )
    if unit is None and not PLAUSIBLE[0] < limit <= PLAUSIBLE[1]:
        what = f"{low:.3g} to {high:.3g}, were read as metres; own.depth_unit={UNIT} says what they are"
        warnings.append(f"unit of depth: floats, {what} ({NOT_DEPTH})")
    for split, found in seen.found.items():
        if empty := sum(one.share == 0 for one in found):
            warnings.append(f"unknown depth: in {empty:,} of {len(found):,} depth maps of {split} no pixel is known")

    def in_metres(path: Path) -> np.ndarray:
        return known_depth(read_depth(path).values) * np.float32(metres)

    splits = _upright(pairs, seen, DepthMaps, in_metres, str(metres))
    set_by_data: dict[str, float] = {
        "max_depth": _above(limit),
        "min_depth": min(PUBLISHED_DEPTH.min_depth, limit / 1000),
    }
    set_by_data |= training_length(len(seen.found["train"]), PUBLISHED_DEPTH.steps, PUBLISHED_DEPTH.batch_size)
    extra = {"warnings": warnings, "samples": samples}
    return Data(splits, (), variant, extra, options=lambda side: {**set_by_data, "min_size": side})


def known_depth(values: np.ndarray) -> np.ndarray:
    """Depths as float32, 0 where unknown: not finite, or the largest number of 16 and more bits."""
    if values.dtype.kind == "f":
        return np.where(np.isfinite(values), values, 0).astype(np.float32)
    largest = np.iinfo(values.dtype).max if values.dtype.itemsize > 1 else -1
    return np.where(values == largest, 0, values).astype(np.float32)


def _known(_path: Path, pixels: PixelFile, sampled: int) -> Known:
    depth = known_depth(pixels.values)
    known = depth[depth > 0]
    chosen = known[np.linspace(0, len(known) - 1, min(len(known), sampled)).astype(int)]
    low, high = float(known.min(initial=math.inf)), float(known.max(initial=-math.inf))
    return Known(pixels.values.dtype.kind != "f", len(known) / max(depth.size, 1), low, high, chosen)


def _range(root: Path, found: Mapping[str, Sequence[Known]], unit: float | None) -> tuple[float, float]:
    """Least and largest known depth of training, in the units of the files; UserError where they are no depth."""
    for split, maps in found.items():
        if not any(one.share for one in maps):
            raise UserError(f"{root}: no pixel of the depth maps of {split} is known (0 and NaN are unknown)")
    low, high = min(one.low for one in found["train"]), max(one.high for one in found["train"])
    if low == high:
        raise UserError(f"{root}: every known pixel of train has the depth {low:g}, so that there is nothing to learn")
    if unit is None and any(one.whole for maps in found.values() for one in maps):
        what = f"depth files hold whole numbers from {low:g} to {high:g}, whose unit they do not say"
        hint = "own.depth_unit=mm, or 1/256, as KITTI has it, or another part of a metre"
        raise UserError(f"{root}: {what}; expected {hint}; {NOT_DEPTH}")
    return low, high


def _unit(text: str) -> float | None:
    """Metres of `own.depth_unit`, None for ""; UserError for what is no unit."""
    if not text or text in UNITS:
        return UNITS.get(text)
    try:
        value = float(Fraction(text.replace(" ", "")))
    except (ValueError, ZeroDivisionError):
        value = 0.0
    if not 0 < value <= 1:
        raise UserError(f"own.depth_unit={text}: expected {UNIT}")
    return value


def _above(depth: float) -> float:
    """The next number of two digits above a depth."""
    step = 10.0 ** (math.floor(math.log10(depth)) - 1)
    return float(f"{(math.floor(depth / step * (1 + 1e-6)) + 1) * step:.3g}")
