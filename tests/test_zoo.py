"""Odd files have the pixels that they stand for, in every consumer."""

from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from small_runs import tiny_model, write_run
from torch import Tensor
from training import tiny_config
from zoo import Animal, zoo

from dinoreg.commands import embed as embedding
from dinoreg.commands.options import EmbedOptions, RegistersOptions
from dinoreg.commands.registers import read_pictures as read_for_registers
from dinoreg.data import crops
from dinoreg.data.center_crop import center_crop
from dinoreg.data.decode import decode
from dinoreg.data.open import open_source
from dinoreg.data.preprocess import Preprocessing
from dinoreg.data.source import Source
from dinoreg.data.value_range import ValueRange
from dinoreg.evaluation.features.images import CentreCrop, read_picture, size_of, to_array
from dinoreg.train.prepare import Setup
from dinoreg.visualize.subject import open_subject
from dinoreg.visualize.subject import read_pictures as read_for_views

ZOO = zoo()
SIDE = 16
Limits = tuple[float, float] | None


def value_range(limits: Limits) -> ValueRange | None:
    return None if limits is None else ValueRange((limits[0],), (limits[1],))


@pytest.mark.parametrize("name", ZOO)
def test_a_file_has_the_pixels_that_it_stands_for(name: str) -> None:
    animal = ZOO[name]
    pixels = decode(animal.data, animal.in_channels, value_range=value_range(animal.value_range))
    found = pixels.permute(1, 2, 0).double().numpy()
    assert found.shape == animal.pixels.shape
    assert np.abs(found - animal.pixels).max() <= animal.tolerance
    assert pixels.dtype in (torch.uint8, torch.float32)


class Cage(NamedTuple):
    """Files of one data set in a folder, a run that was trained on such, and the pixels that a model sees of each.

    whole    {name: (C, H, W)}
    cropped  {name: (C, SIDE, SIDE)} on the scale of bytes
    """

    folder: Path
    run: Path
    channels: int
    limits: Limits
    whole: dict[str, Tensor]
    cropped: dict[str, Tensor]

    @property
    def source(self) -> Source:
        limits = None if self.limits is None else list(self.limits)
        return open_source(self.folder, value_range=limits)

    @property
    def preprocessing(self) -> Preprocessing:
        return open_subject(str(self.run), "cpu").encoder.preprocessing

    def check(self, names: list[str], images: Tensor) -> None:
        """Images (n, C, SIDE, SIDE) on the scale of bytes are those of the files called so, and all are there."""
        assert sorted(Path(name).name for name in names) == sorted(self.cropped)
        for name, image in zip(names, images, strict=True):
            torch.testing.assert_close(image.float(), self.cropped[Path(name).name].float(), atol=1e-3, rtol=0)


def cages() -> dict[tuple[int, Limits], dict[str, Animal]]:
    found: dict[tuple[int, Limits], dict[str, Animal]] = defaultdict(dict)
    for name, animal in ZOO.items():
        found[animal.in_channels, animal.value_range][name] = animal
    return found


@pytest.fixture(params=cages(), ids=str)
def cage(request: pytest.FixtureRequest, tmp_path: Path) -> Cage:
    channels, limits = request.param
    (tmp_path / "zoo").mkdir()
    whole = {}
    for name, animal in cages()[request.param].items():
        (tmp_path / "zoo" / name).write_bytes(animal.data)
        whole[name] = decode(animal.data, channels, value_range=value_range(limits))
    model = tiny_model(1, depth=1, in_channels=channels, image_size=SIDE)
    stated = {"mean": [0.5], "std": [0.25], "range": limits and list(limits), "image_size": SIDE}
    run = write_run(tmp_path / "run", model, **stated)
    return Cage(tmp_path / "zoo", run, channels, limits, whole, {n: center_crop(x, SIDE) for n, x in whole.items()})


def test_training_and_its_probe_see_them(cage: Cage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, Tensor] = {}
    cut = crops.cut_crop

    def recorded(pixels: Tensor, box: Any, out: Tensor) -> None:
        seen[id(pixels)] = pixels
        cut(pixels, box, out)

    monkeypatch.setattr(crops, "cut_crop", recorded)
    count = len(cage.whole)
    config = tiny_config(
        tmp_path / "out", data__source=str(cage.folder), data__range=cage.limits and list(cage.limits),
        data__workers=0, batch_size=count, model__in_channels=cage.channels, augment__mean=[0.5], augment__std=[0.25],
        crops__global_size=SIDE, crops__local_size=8, probe__every=1,
    )  # fmt: skip
    setup = Setup(config)
    with setup.batches(setup.new_state()) as batches:
        ids = next(batches).sample_ids
    assert sorted(ids.tolist()) == list(range(count))
    assert len(seen) == count
    for index, pixels in zip(ids, seen.values(), strict=True):
        torch.testing.assert_close(pixels, cage.whole[Path(cage.source.name(int(index))).name])
    if count >= 4:  # fewer are not probed
        probe = setup.probe
        assert probe is not None
        assert probe.source is not None
        cage.check([probe.source.name(index) for index in range(count)], probe.images)


def test_embed_sees_them(cage: Cage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[Tensor] = []
    features = embedding.features

    def recorded(encoder: object, images: Tensor, *arguments: object) -> np.ndarray:
        batches.append(images if images.dtype == torch.uint8 else images * 255)
        return features(encoder, images, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(embedding, "features", recorded)
    out = str(tmp_path / "features.safetensors")
    options = EmbedOptions(data=str(cage.folder), weights=str(cage.run), out=out, device="cpu", workers=0)
    embedding.embed_command(options)
    cage.check([cage.source.name(index) for index in range(len(cage.whole))], torch.cat([x.float() for x in batches]))


def test_evaluation_sees_them(cage: Cage) -> None:
    source = cage.source
    source.as_trained, source.in_channels = True, cage.channels
    indices = range(len(source))
    for index in indices:
        picture, expected = read_picture(source, index), cage.whole[Path(source.name(index)).name]
        assert size_of(picture) == tuple(expected.shape[1:])
        torch.testing.assert_close(torch.from_numpy(to_array(picture)).permute(2, 0, 1), expected)
    arrays = [CentreCrop(SIDE, SIDE)(read_picture(source, index)) for index in indices]
    images = torch.stack([torch.from_numpy(array).permute(2, 0, 1).float() for array in arrays])
    cage.check([source.name(index) for index in indices], images)


def test_views_and_registers_see_them(cage: Cage) -> None:
    subject = open_subject(str(cage.run), "cpu")
    pictures = read_for_views(subject, str(cage.folder), len(cage.whole), (SIDE, SIDE))
    assert pictures.skipped == ()
    cage.check(list(pictures.names), (pictures.images * 0.25 + 0.5) * 255)
    if len(cage.whole) > 1:
        options = RegistersOptions(weights="x", images=str(cage.folder), labels=False)
        found, skipped = read_for_registers(options, cage.preprocessing.at(SIDE))
        assert skipped == []
        images = found.images if found.images.dtype == torch.uint8 else found.images * 255
        cage.check([cage.source.name(index) for index in range(len(cage.whole))], images)


def test_one_function_for_users_sees_them(cage: Cage) -> None:
    transform = cage.preprocessing
    for name, expected in cage.cropped.items():
        found = (transform(cage.folder / name) * 0.25 + 0.5) * 255
        torch.testing.assert_close(found, expected.float(), atol=1e-3, rtol=0)
