"""Frozen features on disk: extracted once, keyed by content, resumed, and bounded in memory."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from encoders import context, small_encoder, small_vit
from miniatures.pictures import pattern
from mounts import mounted_disk
from torch import Tensor

from dinoreg.data.open import open_source
from dinoreg.data.source import Source
from dinoreg.evaluation.backbones.encoder import PixelEncoder, wrap
from dinoreg.evaluation.context import Context
from dinoreg.evaluation.features import cache
from dinoreg.evaluation.features.cache import extract_features, feature_matrix
from dinoreg.evaluation.features.images import CentreCrop, read_picture
from dinoreg.runtime.errors import RunError, UserError
from dinoreg.runtime.parallel import parallel, show_progress

CROP = CentreCrop(32, 32)


def where(folder: Path, batch_size: int = 4, **changes: str) -> Context:
    return dataclasses.replace(context(folder), features=folder / "f", batch_size=batch_size, **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    root.mkdir()
    for index in range(11):
        pattern(index % 3, index, 40 + index, 50).save(root / f"{index:02d}.png")
    return root


class Counting:
    """A backbone that counts the images it sees, and can fail or misbehave at one of them."""

    def __init__(self, stop_at: int | None = None, nan_at: int | None = None) -> None:
        self.encoder, self.seen, self.stop_at, self.nan_at = small_encoder(), 0, stop_at, nan_at
        inner = self.encoder._layers

        def layers(x: Tensor, blocks: list[int], norm: bool) -> list:
            found = inner(x, blocks, norm)
            for row in range(len(x)):
                if self.seen + row == self.stop_at:
                    raise KeyboardInterrupt
                if self.seen + row == self.nan_at:
                    found[0].cls[row] = float("nan")
            self.seen += len(x)
            return found

        self.encoder._layers = layers  # type: ignore[method-assign]


def test_features_are_those_of_each_image_alone(folder: Path, tmp_path: Path) -> None:
    source, encoder = open_source(str(folder)), small_encoder()
    found = extract_features(where(tmp_path), encoder, source, CROP, (0, -1), mean_patch=True)
    for index in range(len(source)):
        picture = torch.from_numpy(CROP(read_picture(source, index)).copy()).permute(2, 0, 1)[None]
        first, last = encoder.layers(picture, (0, 1))
        expected = torch.stack([first.cls[0], last.cls[0], last.patches[0].mean(dim=0)])
        torch.testing.assert_close(torch.from_numpy(np.array(found[index])), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(feature_matrix(found), torch.from_numpy(np.array(found)).flatten(1))


def test_a_second_extraction_runs_the_backbone_never(folder: Path, tmp_path: Path) -> None:
    source, counting = open_source(str(folder)), Counting()
    first = extract_features(where(tmp_path), counting.encoder, source, CROP)
    assert counting.seen == 11
    second = extract_features(where(tmp_path), counting.encoder, source, CROP)
    assert counting.seen == 11
    assert np.array_equal(first, second)


def test_what_shapes_the_numbers_is_in_the_key(folder: Path, tmp_path: Path) -> None:
    def files(*arguments: object, **options: object) -> int:
        extract_features(where(tmp_path), *arguments, **options)  # type: ignore[arg-type]
        return len(list((tmp_path / "f").glob("*.npy")))

    source, encoder = open_source(str(folder)), small_encoder()
    assert files(encoder, source, CROP) == 1
    assert files(encoder, source, CentreCrop(40, 32)) == 2
    assert files(encoder, source, CROP, (0,)) == 3
    assert files(encoder, source, CROP, mean_patch=True) == 4
    assert files(wrap(small_vit(seed=5)), source, CROP) == 5
    pattern(0, 99).save(folder / "03.png")
    assert files(encoder, open_source(str(folder)), CROP) == 6
    assert files(encoder, source, CROP) == 6


@pytest.mark.parametrize(("limit", "value", "kept"), [("FLUSH_BYTES", 3 * 4 * 64, 4), ("SAVE_SECONDS", -1.0, 6)])
def test_an_extraction_that_was_stopped_goes_on_where_it_was(
    limit: str, value: float, kept: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"dinoreg.evaluation.features.cache.{limit}", value)
    source = open_source(str(folder))
    place = where(tmp_path, batch_size=2)
    stopped = Counting(stop_at=7)
    with pytest.raises(KeyboardInterrupt):
        extract_features(place, stopped.encoder, source, CROP)
    resumed = Counting()
    found = extract_features(place, resumed.encoder, source, CROP)
    assert resumed.seen == 11 - kept  # 6 rows were there, of which so many had been noted
    whole = extract_features(where(tmp_path / "other", batch_size=2), small_encoder(), source, CROP)
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stop_at", [None, 7])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_file_is_computed_anew_and_said(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stop_at: int | None,
    damage: str,
) -> None:
    monkeypatch.setattr("dinoreg.evaluation.features.cache.FLUSH_BYTES", 3 * 4 * 64)
    source, place = open_source(str(folder)), where(tmp_path, batch_size=2)
    with contextlib.suppress(KeyboardInterrupt):
        extract_features(place, Counting(stop_at=stop_at).encoder, source, CROP)
    (file,) = place.features.glob("*.npy" if stop_at is None else "*.part")
    content = bytearray(file.read_bytes())
    content[200] ^= 1
    file.write_bytes({"flip": bytes(content), "cut": content[:300], "empty": b""}[damage])
    again = Counting()
    found = extract_features(place, again.encoder, source, CROP)
    assert again.seen == 11
    assert "not as it was written" in capsys.readouterr().err
    whole = extract_features(where(tmp_path / "other", batch_size=2), small_encoder(), source, CROP)
    np.testing.assert_array_equal(found, whole)


def test_two_processes_that_extract_the_same_do_not_mix_their_rows(folder: Path, tmp_path: Path) -> None:
    source, place = open_source(str(folder)), where(tmp_path, batch_size=2)
    meeting, inner = Counting(), []
    layers = meeting.encoder._layers

    def meet(*arguments: Any) -> list:
        if meeting.seen == 4:
            inner.append(np.array(extract_features(place, small_encoder(), source, CROP)))
        return layers(*arguments)

    meeting.encoder._layers = meet  # type: ignore[method-assign]
    outer = extract_features(place, meeting.encoder, source, CROP)
    whole = extract_features(where(tmp_path / "other", batch_size=2), small_encoder(), source, CROP)
    np.testing.assert_array_equal(outer, whole)
    np.testing.assert_array_equal(inner[0], whole)
    assert not list(place.features.glob("*.part"))


def test_a_disk_that_fills_up_is_said_in_words(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=1 << 40))
    with mounted_disk(tmp_path / "disk", "4k") as disk:
        place = dataclasses.replace(where(tmp_path), features=disk)
        with pytest.raises(RunError, match=r"npy: the features cannot be written \(No space left on device\)"):
            extract_features(place, small_encoder(), open_source(str(folder)), CROP)


def test_a_feature_that_is_not_finite_names_its_image(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"06\.png: its feature is not finite"):
        extract_features(where(tmp_path), Counting(nan_at=6).encoder, open_source(str(folder)), CROP)


def test_a_broken_image_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "04.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"04\.png: cannot be read as an image"):
        extract_features(where(tmp_path), small_encoder(), open_source(str(folder)), CROP)


def test_half_precision_on_disk_is_half_the_size_and_close(folder: Path, tmp_path: Path) -> None:
    source = open_source(str(folder))
    full = extract_features(where(tmp_path), small_encoder(), source, CROP)
    half = extract_features(where(tmp_path, features_dtype="float16"), small_encoder(), source, CROP)
    assert half.dtype == np.float16
    assert half.nbytes * 2 == full.nbytes
    np.testing.assert_allclose(half, full, rtol=2**-10, atol=1e-3)


def test_pixels_have_no_mean_patch_beside_their_class_token(folder: Path, tmp_path: Path) -> None:
    pixels = PixelEncoder(8, (32, 32))
    found = extract_features(where(tmp_path), pixels, open_source(str(folder)), CROP, mean_patch=True)
    assert found.shape == (11, 1, 3 * 32 * 32)


def test_a_folder_that_cannot_be_written_is_said_in_words(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("a file")
    with pytest.raises(RunError, match=r"the features cannot be written"):
        extract_features(where(tmp_path), small_encoder(), open_source(str(folder)), CROP)


@pytest.mark.parametrize(("height", "width"), [(40, 50), (50, 41), (32, 32), (33, 97)])
def test_the_centre_crop_equals_torchvisions(height: int, width: int) -> None:
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    picture = pattern(1, 3, height, width)
    theirs = Compose([Resize(40, InterpolationMode.BICUBIC), CenterCrop(32)])(picture)
    assert np.array_equal(CentreCrop(40, 32)(picture), np.asarray(theirs))


@pytest.mark.parametrize("workers", [0, 3])
def test_images_keep_their_order_whatever_the_number_of_threads(folder: Path, workers: int) -> None:
    source: Source = open_source(str(folder))
    loaded = list(parallel(lambda index: CROP(read_picture(source, index)), range(2, len(source)), workers))
    assert len(loaded) == 9
    for index, image in enumerate(loaded, 2):
        assert np.array_equal(image, CROP(read_picture(source, index)))


@pytest.mark.parametrize("workers", [0, 3])
def test_batches_are_whole_but_for_the_last(folder: Path, tmp_path: Path, workers: int) -> None:
    sizes: list[int] = []
    encoder = small_encoder()
    inner = encoder._layers
    encoder._layers = lambda x, *rest: sizes.append(len(x)) or inner(x, *rest)  # type: ignore[method-assign,func-returns-value]
    place = dataclasses.replace(where(tmp_path), workers=workers)
    found = extract_features(place, encoder, open_source(str(folder)), CROP)
    assert sizes == [4, 4, 3]
    alone = extract_features(where(tmp_path / "alone", batch_size=1), encoder, open_source(str(folder)), CROP)
    np.testing.assert_allclose(found, alone, rtol=1e-5, atol=1e-6)


def test_progress_slower_than_one_in_ten_seconds_is_told_in_seconds_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 28))  # a batch every 28 seconds, as a ViT-S needs on a busy CPU
    monkeypatch.setattr("dinoreg.evaluation.context.time.monotonic", lambda: next(clock))
    assert list(show_progress("abc", 3, "features")) == ["a", "b", "c"]
    assert [line.split(" · ")[1] for line in capsys.readouterr().err.splitlines()] == ["28 s/it"] * 3


def test_a_whole_file_is_checked_once_while_it_is_as_it_was(folder: Path, tmp_path: Path) -> None:
    source, place = open_source(str(folder)), where(tmp_path)
    extract_features(place, small_encoder(), source, CROP)
    cache._checksum.cache_clear()
    for _ in range(3):
        extract_features(place, small_encoder(), source, CROP)
    assert cache._checksum.cache_info().misses == 1
