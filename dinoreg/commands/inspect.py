"""`dinoreg inspect` and `dinoreg.inspect`: what a source of images is like, what to make of it, and a smaller copy."""

import json
import os
import shlex
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dinoreg.checkpoint.atomic import replacing, write_atomic
from dinoreg.commands.options import InspectOptions
from dinoreg.data.open import open_source, read_labelled
from dinoreg.data.shards import has_pattern
from dinoreg.data.source import PathSource
from dinoreg.data.statistics import FEW_IMAGES, config_for, inspect_source, render_inspection
from dinoreg.data.value_range import BadImage
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.guide import Verbatim, next_lines, repeated
from dinoreg.runtime.json_files import read_json
from dinoreg.runtime.parallel import parallel, show_progress
from dinoreg.runtime.printable import listed, print_status

SETTINGS = "prepared.json"  # in a prepared folder: what it was made of, and how
SMALL_BATCH = 64  # of configs/small.yaml


def inspect(data: str | os.PathLike[str] | Sequence[str], **options: Any) -> dict[str, Any]:
    """What a source of images is like, as `dinoreg inspect` prints it; see `data.statistics.inspect_source`.

    data     as `data=`: a folder, several, a list of paths, scenes
    options  the command line's keys: sample=1000, in_channels=3, range=[0, 4095], root=…, columns=…
    raises   UserError (a ValueError) for wrong options, and as `open_source`
    """
    given = InspectOptions(str(data) if isinstance(data, (str, os.PathLike)) else list(data), **options)
    named = {key: getattr(given, key) for key in ("sample", "in_channels", "root", "columns")}
    return inspect_source(given.data, value_range=given.range, **named)


def inspect_command(options: InspectOptions) -> None:
    """Run `dinoreg inspect`: print what was found and the next command; with prepare= write a smaller copy instead.

    raises  UserError where no image can be read, and as `prepare`
    """
    if options.prepare is not None:
        print(f"prepared: {prepare(options)}")
        _say_next(options.prepare, len(open_source(options.prepare)), Verbatim(""))
        return
    found = inspect(**vars(options))
    print(render_inspection(found))
    if len(found["bad"]) == found["looked_at"]:
        name, reason = next(iter(found["bad"].items()))
        raise UserError(f"data: none of the {found['looked_at']:,} images can be read; the first, {name}, {reason}")
    large = found["large"] > 0.1 * found["looked_at"] and not found["shards"]
    keys = {"columns": "data.columns", "root": "data.root", "range": "data.range"}
    if options.in_channels != 3:
        keys["in_channels"] = "model.in_channels"
    _say_next(options.data, found["images"], repeated(vars(options), keys), options.side if large else None)


def _say_next(data: str | list[str], images: int, reading: Verbatim, side: int | None = None) -> None:
    """Print the command to go on with.

    reading  the keys that say how `data` is read
    side     of the pictures of a smaller copy that is to be made first
    """
    from dinoreg.train.outlook import batch_for  # which needs torch

    path = Path(first := data if isinstance(data, str) else data[0])
    more: list[str] = [reading] if reading else []
    if has_pattern(first):  # shards, called as their folder
        path = path.parent
    name = path.stem if path.is_file() else path.name.partition(":")[0]
    if is_folder := isinstance(data, str) and os.path.isdir(data):
        with suppress(UserError):  # no subfolders that are classes
            if len(read_labelled(data).class_names) > 1:
                more.append(f"probe.data={shlex.quote(data)}")
    if (batch := batch_for(images)) < SMALL_BATCH:
        more.append(f"batch_size={batch}")
    case = "large" if side and is_folder else "few" if images < FEW_IMAGES else ""
    values = {"data": data, "stem": name, "folder": f"{name}-{side}", "config": config_for(images), "reading": reading}
    print_status(*next_lines("inspected", {**values, "more": Verbatim(" ".join(more))}, case))


def prepare(options: InspectOptions) -> Path:
    """Write a copy of a folder of images in which none is larger than `side`; returns its path.

    Smaller files are copied as they are, as are those of more than eight bits; others are resized with antialiasing and
    keep their place below the folder, so that classes stay classes. What is there already is not written again: the
    same call goes on where it was stopped.

    raises  UserError for what is no folder, for one inside the other, and for a folder prepared in another way
    """
    root, target = Path(os.path.abspath(os.path.expanduser(str(options.data)))), Path(str(options.prepare))
    settings = {"data": str(root), "side": options.side, "longest": options.longest}
    is_full = target.is_file() or (target.is_dir() and any(target.iterdir()))
    has_truths = any((root / name).is_dir() for name in ("masks", "depth"))
    for wrong, why in (
        (not root.is_dir(), "data= has to be one folder"),
        (root in (target.absolute(), *target.absolute().parents), f"lies in data={options.data}"),
        (has_truths, f"{root} holds masks or depth, which it would spoil"),
        (is_full and read_json(target / SETTINGS) != settings, "not empty, and not prepared with these options"),
    ):
        if wrong:
            raise UserError(f"prepare={target}: {why}")
    source, bad = open_source(root), []
    if not isinstance(source, PathSource):
        raise UserError(f"prepare={target}: data={options.data} holds shards, expected a folder of files")
    target.mkdir(parents=True, exist_ok=True)
    write_atomic(target / SETTINGS, json.dumps(settings, indent=1) + "\n")

    def write(index: int) -> None:
        try:
            _write_smaller(source, index, target / source.paths[index], options)
        except BadImage as error:
            bad.append(f"{source.name(index)}: {error}")

    for _ in show_progress(parallel(write, range(len(source))), len(source), "prepare", "images"):
        pass
    print_status(f"prepare: {len(source) - len(bad):,} of {len(source):,} images; left out: {listed(bad) or 'none'}")
    return target


def _write_smaller(source: PathSource, index: int, path: Path, options: InspectOptions) -> None:
    """One file of a prepared folder, unless it is there; a resized one is JPEG where it was, else PNG."""
    from dinoreg.evaluation.features.images import resized, shown

    smaller = path if path.suffix.lower() in (".jpg", ".jpeg", ".png") else path.with_name(f"{path.name}.png")
    if path.is_file() or smaller.is_file():
        return
    image = source.image(index)
    pixels, limit = image.pixels(), (max if options.longest else min)(image.height, image.width)
    path.parent.mkdir(parents=True, exist_ok=True)
    if limit <= options.side or str(pixels.dtype) != "torch.uint8":
        with replacing(path) as aside:
            shutil.copyfile(source.name(index), aside)
        return
    height, width = (max(1, round(side * options.side / limit)) for side in (image.height, image.width))
    with replacing(smaller) as aside:
        kind = "PNG" if smaller.suffix.lower() == ".png" else "JPEG"
        shown(resized(pixels, height, width)).save(aside, kind, quality=95)
