"""`dinoreg registers` and `dinoreg.registers`: artifact tokens, the effect of registers, the information in each token.

A backbone without registers in which outliers are found is measured a second time with a test-time register.
"""

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from dinoreg.commands.options import RegistersOptions
from dinoreg.config.option import read
from dinoreg.config.overwrite import check_folder
from dinoreg.data.center_crop import to_encoder
from dinoreg.data.decode import decode
from dinoreg.data.display import channels_shown
from dinoreg.data.open import is_scenes, read_labelled
from dinoreg.data.preprocess import Preprocessing, to_unit
from dinoreg.data.source import ScenesSource, Source
from dinoreg.evaluation.backbones.encoder import NativeEncoder
from dinoreg.evaluation.backbones.open import Opened
from dinoreg.registers.measure import SHOWN, Measured, Pictures, fit, measure
from dinoreg.registers.page import VIEW, console_table, judge, write_registers
from dinoreg.reports.html import WithPage
from dinoreg.reports.verdict import Verdict
from dinoreg.runtime.errors import RunError, UserError
from dinoreg.runtime.printable import print_status, printable
from dinoreg.scenes.render import CLASS_NAMES, render
from dinoreg.visualize.gallery import to_pixels
from dinoreg.visualize.subject import crops_of, open_images, open_subject, picture_size, safe_name

FIRST_SCENE = 30_000_000  # far beyond those that a run trains on or a probe is tested on


@dataclass(frozen=True, repr=False)
class RegisterReport(WithPage):
    """What `dinoreg.registers` found, and its `page`.

    measured  of each model, and of each with a test-time register: the figures `.record`, and the arrays behind them
    """

    measured: tuple[Measured, ...]

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """{model: its figures in words}"""
        return {each.record["name"]: judge(each.record) for each in self.measured}


def registers(weights: str | Path | Sequence[str], images: str | Path, **options: Any) -> RegisterReport:
    """What registers do in one model or several; the same as `dinoreg registers weights=… images=… key=value …`.

    weights  run folders, weight files or random:NAME, in a list or with commas between
    images   a folder (one with a subfolder a class adds probes), a list of paths, or scenes
    options  the command line's keys: out="registers", num_images=300, size=…, labels=False, test_time=False
    returns  `.measured`, `.verdicts` and the `.page`
    raises   UserError (a ValueError) for weights, images or sizes that do not fit, before anything is written; RunError
             where fewer than two images can be read or a norm is not finite
    """
    models = str(weights) if isinstance(weights, (str, Path)) else tuple(map(str, weights))
    return _report(read(RegistersOptions, {"weights": models, "images": images, **options})[0])


def registers_command(options: RegistersOptions) -> None:
    """Run `dinoreg registers`: print the table, the verdicts and the page's path."""
    found = _report(options)
    Console().print(console_table([each.record for each in found.measured]))
    for name, words in found.verdicts.items():
        print(f"{printable(name)}: {' '.join((words.headline, *words.sentences))}")
    print(f"report: {found.page}")


def _report(options: RegistersOptions) -> RegisterReport:
    """Measure every model and write the report.

    raises UserError, before anything is written, for weights, images or sizes that do not fit; RunError where fewer
    than two images can be read or a norm is not finite
    """
    subjects = [open_subject(each, options.device) for each in options.models]
    size = common_size(subjects, options.size)
    out = Path(options.out) if options.out else Path("runs") / VIEW / safe_name("-".join(s.name for s in subjects))
    check_folder(out, f"out={out}:")
    pictures, skipped = read_pictures(options, subjects[0].encoder.preprocessing.at(size))
    if subjects[0].own is not subjects[0].encoder:  # a probe would learn and test one picture in two channels
        pictures = Pictures(pictures.images.flatten(0, 1).unsqueeze(1), None, 0, None, f"{pictures.source}, by channel")
    measured: list[Measured] = []
    for encoder in encoders_of(subjects):
        first = measure(encoder, pictures, options.seed)
        measured.append(first)
        if options.test_time and not encoder.num_registers and first.record["outliers"]["kind"] != "none":
            print_status(f"{encoder.name}: looking for register neurons")
            changed, first.record["test_time"] = fit(encoder, pictures, first.norms)
            measured.append(measure(changed, pictures, options.seed))
    shown = to_unit(pictures.images[:SHOWN])
    channels = shown.shape[1]
    pixels = to_pixels(shown, (0.0,) * channels, (1.0,) * channels)
    page = write_registers(measured, pixels, out, skipped, channels_shown(channels))
    return RegisterReport(page, tuple(measured))


def read_pictures(options: RegistersOptions, preprocessing: Preprocessing) -> tuple[Pictures, list[tuple[str, str]]]:
    """The images of a request, with their classes and boxes where known, and (name, reason) of unreadable ones.

    preprocessing  of the first of the models, at the size of all
    raises    UserError for a source that cannot be opened, RunError where fewer than two images can be read

    Scenes are rendered at that size and have classes and boxes; a folder with a subfolder per class has classes.
    """
    if is_scenes(options.images):
        return _scenes(options, preprocessing.size[0], len(preprocessing.mean)), []
    source: Source = open_images(options.images, columns=options.columns)
    labels: np.ndarray | None = None
    names: Sequence[str] = ()
    if options.labels and Path(options.images).expanduser().is_dir():
        with suppress(UserError):  # fewer than two subfolders: images without classes
            found = read_labelled(options.images)
            source, labels, names = found.source, found.labels, found.class_names
    source.value_range = preprocessing.value_range
    crops, skipped = crops_of(source, preprocessing, options.num_images)
    if len(crops) < 2:
        tried = len(crops) + len(skipped)
        raise RunError(f"images={options.images}: {len(crops)} of {tried} could be read, expected at least 2")
    chosen = None if labels is None else torch.from_numpy(labels[[*crops]]).long()
    return Pictures(to_encoder(list(crops.values())), chosen, len(names), None, options.images), skipped


def _scenes(options: RegistersOptions, size: int, channels: int) -> Pictures:
    source = open_images(options.images)
    assert isinstance(source, ScenesSource)
    first = source.first if "first=" in options.images else FIRST_SCENE
    count = min(len(source), options.num_images)
    scenes = [render(first + number, size, source.seed) for number in range(count)]
    images = torch.stack([decode(scene.image, channels) for scene in scenes])
    labels = torch.tensor([scene.label for scene in scenes]) if options.labels else None
    name = f"scenes {first:,} to {first + count - 1:,}"
    return Pictures(images, labels, len(CLASS_NAMES), [np.asarray(scene.boxes) for scene in scenes], name)


def common_size(subjects: Sequence[Opened], size: int | None) -> int:
    """The side in pixels at which all are shown the same pictures: `size`, else about that of the first.

    raises  UserError for a model that does not take it, or other channels than the first
    """
    if size is None:
        patch = math.lcm(*(each.model.patch_size for each in subjects))
        size = max(min(picture_size(subjects[0].model)) // patch, 1) * patch
    channels = subjects[0].model.in_channels
    for subject in subjects:
        try:
            picture_size(subject.model, size)
            if subject.model.in_channels != channels:
                raise UserError(f"takes {subject.model.in_channels} channels, {subjects[0].name} {channels}")
        except UserError as error:
            raise UserError(f"{subject.name}: {error}; models are compared on the same pixels") from None
    return size


def encoders_of(subjects: Sequence[Opened]) -> list[NativeEncoder]:
    """Encoders with distinct names: of models that share one, the number of registers is added, then a number."""
    shared, seen = Counter(subject.name for subject in subjects), Counter[str]()
    encoders = []
    for subject in subjects:
        name, own = subject.name, subject.own
        name = name if shared[name] == 1 else f"{name}, {subject.model.num_registers} registers"
        seen[name] += 1
        name = name if seen[name] == 1 else f"{name} ({seen[name]})"
        encoders.append(NativeEncoder(own.module, name, own.preprocessing, own.device))
    return encoders
