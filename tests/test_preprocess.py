"""One preprocessing for each model: read back from whatever its weights were saved as, and used by everything."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exporting import vit, write_run
from PIL import Image
from safetensors.torch import load_file

import dinoreg
from dinoreg.commands.embed import embed_command
from dinoreg.commands.options import EmbedOptions
from dinoreg.data.center_crop import center_crop
from dinoreg.data.open import open_source
from dinoreg.data.preprocess import Preprocessing
from dinoreg.evaluation.backbones.open import open_encoder
from dinoreg.evaluation.context import Context
from dinoreg.evaluation.features.images import read_picture, stack_images
from dinoreg.export.formats import FORMATS
from dinoreg.export.source import Source
from dinoreg.runtime.errors import UserError
from dinoreg.weights.architecture import preprocessing_of, timm_preprocessing

SHAPES = ((48, 80), (80, 48), (9, 11), (40, 40), (31, 200), (47, 70))  # height, width


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (3 + seed) + y / 9), np.cos(y / (4 + seed)), np.sin((x + y) / 5)]
    return Image.fromarray((127 + 100 * np.stack(waves, -1)).clip(0, 255).astype(np.uint8))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for number, shape in enumerate(SHAPES):
        picture(*shape, number).save(tmp_path / "pictures" / f"{number}.png")
    return tmp_path / "pictures"


def written(form: str, run: Path, folder: Path) -> Path:
    """The artefact of an export, without its certificate."""
    folder.mkdir()
    FORMATS[form].write(folder, Source(run))
    return folder


# What was stated comes back: finding F2 of the comparison with dinov2's code. A width that is no multiple of 64 does
# not tell the heads, and positions are resampled in the way that is not the library's default.
RESAMPLING = {"reg4": {"antialias": False, "position_offset": 0.1}, "reg0": {"num_registers": 0}}


@pytest.mark.parametrize("kind", RESAMPLING)
@pytest.mark.parametrize("form", ["meta", "safetensors"])
def test_an_export_read_back_is_the_same_model_at_any_size(form: str, kind: str, tmp_path: Path) -> None:
    model = vit(**RESAMPLING[kind])  # type: ignore[arg-type]
    stated = {"mean": [0.1] * 3, "std": [0.05] * 3, "short_side": 46, "interpolation": "bilinear", "range": [0, 4095]}
    run = write_run(tmp_path / "run", model, **stated)
    folder = written(form, run, tmp_path / "out")
    file = folder / ("model.pth" if form == "meta" else "model.safetensors")
    for weights in (folder, file):
        back = dinoreg.load(weights)
        assert back.architecture() == model.architecture()
        for side in (40, 24, 64):
            images = torch.randn(2, 3, side, 64)
            for ours, theirs in zip(model(images), back(images)):
                assert torch.equal(ours, theirs)
        found = open_encoder(str(weights), "cpu", torch.float32).encoder.preprocessing
        assert found == open_encoder(str(run), "cpu", torch.float32).encoder.preprocessing
        assert {key: value for key, value in found.as_json().items() if key in stated} == stated
        assert found == dinoreg.transform(back)


@pytest.mark.parametrize("form", ["timm", "transformers"])
@pytest.mark.parametrize("short_side", [40, 46])
def test_a_librarys_folder_states_what_was_exported(form: str, short_side: int, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", vit(), short_side=short_side, interpolation="bilinear", range=[0, 4095])
    folder = written(form, run, tmp_path / "out")
    ours = dinoreg.transform(run)
    assert dinoreg.transform(folder) == ours
    assert json.loads((folder / "model.json").read_text())["preprocessing"] == ours.as_json()
    side = folder / ("config.json" if form == "timm" else "preprocessor_config.json")
    edited = json.loads(side.read_text())  # what a person changes there counts
    (edited["pretrained_cfg"] if form == "timm" else edited)["mean" if form == "timm" else "image_mean"] = [0.3] * 3
    side.write_text(json.dumps(edited))
    assert dinoreg.transform(folder).mean == (0.3, 0.3, 0.3)
    (folder / "model.json").write_text("{torn")
    assert dinoreg.transform(folder).value_range is None


def test_a_json_of_another_program_beside_a_pth_is_left_alone(tmp_path: Path) -> None:
    torch.save(vit(dim=64, heads=1).state_dict(), tmp_path / "model.pth")
    for text in ('{"class_name": "Functional"}', "[1]", "{torn"):
        (tmp_path / "model.json").write_text(text)
        assert dinoreg.load(tmp_path / "model.pth").preprocessing is None


def test_a_torn_pth_of_ours_is_found_out(tmp_path: Path) -> None:
    folder = written("meta", write_run(tmp_path / "run", vit()), tmp_path / "out")
    state = torch.load(folder / "model.pth")
    torch.save(state | {"cls_token": state["cls_token"] + 1}, folder / "model.pth")
    with pytest.raises(UserError, match=r"sha256 is not the one in model\.json"):
        dinoreg.load(folder)


# What the libraries write, and what it stands for: (crop, short side, interpolation, not followed).
PROCESSORS: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "dinov2": (
        {"crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 256}, "resample": 3},
        ((224, 224), 256, "bicubic", None),
    ),
    "whole numbers, as before": ({"crop_size": 224, "size": 256, "resample": 2}, ((224, 224), 256, "bilinear", None)),
    "stretched": (
        {"size": {"height": 224, "width": 224}, "resample": 2},
        ((224, 224), None, "bilinear", "stretches pictures or leaves them whole"),
    ),
    "not cropped": (
        {"size": {"shortest_edge": 196}, "do_center_crop": False, "crop_size": 168, "resample": 1},
        ((196, 196), 196, None, "stretches pictures or leaves them whole and resizes by Pillow's filter 1"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_of_transformers_are_read(name: str, tmp_path: Path) -> None:
    content, expected = PROCESSORS[name]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    found = preprocessing_of(tmp_path, "transformers")
    assert tuple(found.get(key) for key in ("image_size", "short_side", "interpolation", "not_followed")) == expected


def test_a_processor_that_does_not_rescale_or_normalise_gives_the_same_numbers(tmp_path: Path) -> None:
    image = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    for content, expected in (
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [50.0] * 3}, (image.float() - 127.5) / 50),
        ({"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}, image.float() / 127.5 - 1),
        ({"do_normalize": False, "image_mean": [0.4] * 3}, image.float() / 255),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
        stated = Preprocessing.of(preprocessing_of(tmp_path, "transformers"), 3, (8, 8), 8, "x")
        torch.testing.assert_close(stated.normalise(image), expected, atol=1e-5, rtol=0)


def test_timms_config_says_the_short_side_as_timm_computes_it() -> None:
    data = pytest.importorskip("timm.data")
    for size, share in ((224, 0.875), (518, 1.0), (40, None), (224, 0.9)):
        config = {"input_size": (3, size, size), "crop_pct": share}
        resize = data.create_transform(**data.resolve_data_config(pretrained_cfg=config)).transforms[0]
        assert timm_preprocessing(config)["short_side"] == resize.size
    assert "not_followed" in timm_preprocessing({"crop_mode": "squash", "input_size": [3, 28, 28]})


def test_without_a_word_the_crop_is_the_models_own_up_to_224() -> None:
    def size(native: int | tuple[int, int], patch: int) -> tuple[tuple[int, int], int]:
        pair = (native, native) if isinstance(native, int) else native
        found = Preprocessing.of({}, 3, pair, patch, "x")
        return found.size, found.short_side

    assert size(518, 14) == ((224, 224), 224)
    assert size(98, 14) == ((98, 98), 98)
    assert size((24, 40), 8) == ((24, 40), 24)
    assert size(512, 32) == ((224, 224), 224)


# ------------------------------------------------------------------ one function for everything


def test_transform_takes_a_path_bytes_a_pillow_image_and_an_array(tmp_path: Path) -> None:
    transform = dinoreg.transform(write_run(tmp_path / "run", vit(), short_side=46))
    image = picture(48, 80)
    image.save(tmp_path / "a.png")
    found = transform(tmp_path / "a.png")
    assert (found.shape, found.dtype) == ((3, 40, 40), torch.float32)
    for same in (str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes(), image, np.asarray(image)):
        assert torch.equal(transform(same), found)
    crop = center_crop(torch.from_numpy(np.array(image)).permute(2, 0, 1), 40, 46) / 255
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (transform.mean, transform.std))
    torch.testing.assert_close(found, (crop - mean) / std)
    for bad in (b"no picture", np.zeros((4, 4, 7), np.uint8)):
        with pytest.raises(UserError, match="cannot be read as an image"):
            transform(bad)
    with pytest.raises(UserError, match="not a multiple"):
        dinoreg.transform(tmp_path / "run", size=44)


def test_a_pillow_image_is_turned_flattened_and_keeps_its_levels(tmp_path: Path) -> None:
    transform = dinoreg.transform("random:vitt8_reg0")
    exif = Image.Exif()
    exif[0x0112] = 6
    veil = picture(60, 50).convert("RGBA")
    veil.putalpha(90)
    deep = Image.fromarray(np.linspace(0, 65535, 60 * 50).reshape(60, 50).astype(np.uint16))
    for image, options in ((picture(60, 50), {"exif": exif}), (veil, {}), (deep, {}), (veil.quantize(), {})):
        file = io.BytesIO()
        image.save(file, "PNG", **options)
        torch.testing.assert_close(transform(Image.open(file)), transform(file.getvalue()))


def test_embed_and_evaluation_see_what_transform_gives(pictures: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", vit(), short_side=46, interpolation="bilinear")
    model, source = dinoreg.load(run), open_source(str(pictures))
    source.as_trained = True
    for size in (None, 64):
        transform = dinoreg.transform(run, size)
        images = torch.stack([transform(source.name(index)) for index in range(len(source))])
        out = tmp_path / f"{size}.safetensors"
        embed_command(EmbedOptions(str(pictures), str(run), str(out), image_size=size, device="cpu", precision="fp32"))
        with torch.inference_mode():
            torch.testing.assert_close(load_file(out)["features"], model(images).cls, atol=1e-5, rtol=1e-5)
        own = Context(tmp_path, tmp_path, None, 0, size or 40, 4, 0, preprocessing=dinoreg.transform(run))
        crop = own.crop(source, published=256 / 224)
        seen = [crop(read_picture(source, index)) for index in range(len(source))]
        torch.testing.assert_close(transform.normalise(stack_images(seen)), images)
    source.as_trained = False  # a benchmark keeps its own
    assert own.crop(source, published=256 / 224).resize == round(64 * 256 / 224)
