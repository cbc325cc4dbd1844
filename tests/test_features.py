"""Frozen features on disk: extracted once, keyed by content, resumed, and bounded in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from encoders import small_encoder, small_vit
from miniatures.pictures import pattern
from torch import Tensor

from dinoreg.data.open import open_source
from dinoreg.data.source import Source
from dinoreg.evaluation.backbones.encoder import PixelEncoder, wrap
from dinoreg.evaluation.features.cache import FeatureStore
from dinoreg.evaluation.features.images import CentreCrop, read_rgb, still_batches
from dinoreg.runtime.errors import RunError, UserError

CROP = CentreCrop(32, 32)


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
    found = FeatureStore(tmp_path / "f", batch_size=4).extract(encoder, source, CROP, (0, -1), mean_patch=True)
    assert found.slots == ("cls0", "cls1", "mean")
    for index in range(len(source)):
        picture = torch.from_numpy(CROP(read_rgb(source, index)).copy()).permute(2, 0, 1)[None]
        first, last = encoder.layers(picture, (0, 1))
        expected = torch.stack([first.cls[0], last.cls[0], last.patches[0].mean(dim=0)])
        torch.testing.assert_close(torch.from_numpy(np.array(found.rows[index])), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.cls(), torch.from_numpy(np.array(found.rows[:, 1])))
    assert torch.equal(found.cls(-2), torch.from_numpy(np.array(found.rows[:, 0])))
    assert torch.equal(found.tensor([0, 2]), torch.from_numpy(np.array(found.rows[:, [0, 2]])).flatten(1))
    assert torch.equal(found.tensor([0, 1, 2]), torch.from_numpy(np.array(found.rows)).flatten(1))


def test_a_second_extraction_runs_the_backbone_never(folder: Path, tmp_path: Path) -> None:
    source, counting = open_source(str(folder)), Counting()
    store = FeatureStore(tmp_path / "f", batch_size=4)
    first = store.extract(counting.encoder, source, CROP)
    assert counting.seen == 11
    second = store.extract(counting.encoder, source, CROP)
    assert counting.seen == 11
    assert np.array_equal(first.rows, second.rows)


def test_what_shapes_the_numbers_is_in_the_key(folder: Path, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "f", batch_size=4)

    def files(*arguments: object, **options: object) -> int:
        store.extract(*arguments, **options)  # type: ignore[arg-type]
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


def test_an_extraction_that_was_stopped_goes_on_where_it_was(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinoreg.evaluation.features.cache.FLUSH_ROWS", 3)
    source = open_source(str(folder))
    store = FeatureStore(tmp_path / "f", batch_size=2)
    stopped = Counting(stop_at=7)
    with pytest.raises(KeyboardInterrupt):
        store.extract(stopped.encoder, source, CROP)
    resumed = Counting()
    found = store.extract(resumed.encoder, source, CROP)
    assert resumed.seen == 11 - 4  # 6 rows were there, of which 4 had been noted
    whole = FeatureStore(tmp_path / "other", batch_size=2).extract(small_encoder(), source, CROP)
    np.testing.assert_allclose(found.rows, whole.rows, rtol=1e-5, atol=1e-6)


def test_a_feature_that_is_not_finite_names_its_image(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"06\.png: its feature is not finite"):
        FeatureStore(tmp_path / "f", batch_size=4).extract(Counting(nan_at=6).encoder, open_source(str(folder)), CROP)


def test_a_broken_image_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "04.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"04\.png: cannot be read as an image"):
        FeatureStore(tmp_path / "f", batch_size=4).extract(small_encoder(), open_source(str(folder)), CROP)


def test_half_precision_on_disk_is_half_the_size_and_close(folder: Path, tmp_path: Path) -> None:
    source = open_source(str(folder))
    full = FeatureStore(tmp_path / "f").extract(small_encoder(), source, CROP).rows
    half = FeatureStore(tmp_path / "h", "float16").extract(small_encoder(), source, CROP).rows
    assert half.dtype == np.float16
    assert half.nbytes * 2 == full.nbytes
    np.testing.assert_allclose(half, full, rtol=2**-10, atol=1e-3)


def test_pixels_have_no_mean_patch_beside_their_class_token(folder: Path, tmp_path: Path) -> None:
    found = FeatureStore(tmp_path / "f").extract(
        PixelEncoder(8, (32, 32)), open_source(str(folder)), CROP, mean_patch=True
    )
    assert found.slots == ("cls0",)
    assert found.rows.shape == (11, 1, 3 * 32 * 32)


def test_a_folder_that_cannot_be_written_is_said_in_words(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("a file")
    with pytest.raises(RunError, match=r"cannot keep 0\.0 GiB of features"):
        FeatureStore(tmp_path / "f").extract(small_encoder(), open_source(str(folder)), CROP)


@pytest.mark.parametrize(("height", "width"), [(40, 50), (50, 41), (32, 32), (33, 97)])
def test_the_centre_crop_equals_torchvisions(height: int, width: int) -> None:
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    picture = pattern(1, 3, height, width)
    theirs = Compose([Resize(40, InterpolationMode.BICUBIC), CenterCrop(32)])(picture)
    assert np.array_equal(CentreCrop(40, 32)(picture), np.asarray(theirs))


@pytest.mark.parametrize("workers", [0, 3])
def test_batches_keep_the_order_whatever_the_number_of_threads(folder: Path, workers: int) -> None:
    source: Source = open_source(str(folder))
    batches = list(still_batches(source, CROP, 4, workers, start=2))
    assert [len(batch) for batch in batches] == [4, 4, 1]
    for index, image in enumerate(torch.cat(batches), 2):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), CROP(read_rgb(source, index)))
