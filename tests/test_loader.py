from __future__ import annotations

import collections
import dataclasses
import gc
import io
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photographs import photograph
from PIL import Image

from dinoreg.config.schema import DataConfig
from dinoreg.config.view_settings import AugmentSettings, CropSettings, MaskSettings
from dinoreg.data import loader as module
from dinoreg.data.decode import BadImage
from dinoreg.data.loader import Batch, BatchLoader, Views
from dinoreg.data.masks import block_masks
from dinoreg.data.open import open_source
from dinoreg.data.source import Source
from dinoreg.runtime.errors import RunError, UserError

CROPS = CropSettings(global_size=24, local_size=16, num_local=3)


def loader(source: Source, **options: Any) -> BatchLoader:
    """`options` of the views, of reading and of the loader itself, by name."""
    views: dict[str, Any] = {"crops": CROPS, "augment": AugmentSettings(), "mask": MaskSettings(), "patch_size": 8}
    reading: dict[str, Any] = {"workers": 0}
    own: dict[str, Any] = {"batch_size": 5, "seed": 1}
    for key, value in options.items():
        given = (
            views if key in Views.__dataclass_fields__ else reading if key in DataConfig.__dataclass_fields__ else own
        )
        given[key] = value
    return BatchLoader(source, Views(**views), DataConfig(**reading), **own)


def take(count: int, source: Source, **options: Any) -> list[Batch]:
    with loader(source, **options) as batches:
        return [next(batches) for _ in range(count)]


def equal(a: Batch, b: Batch) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Batch) if f.name != "data_time"]
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else bool(np.all(np.asarray(x) == np.asarray(y)))
        for x, y in pairs
    )


class Pixels(Source):
    """Images of one grey level each; indices in `bad` cannot be read."""

    def __init__(self, count: int, bad: set[int] | None = None, error: Exception | None = None) -> None:
        self.count, self.bad, self.error = count, bad or set(), error or BadImage("broken on purpose")
        self.reads = 0

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> np.ndarray:
        self.reads += 1
        if index in self.bad:
            raise self.error
        return np.full((20, 30, 3), index, dtype=np.uint8)

    def name(self, index: int) -> str:
        return f"pixels:{index}"

    def fingerprint(self) -> str:
        return f"{self.count:016x}"


@pytest.fixture
def photos(photo_folder: Path) -> Source:
    return open_source(photo_folder)


def test_a_batch_has_the_shapes_and_masks_of_its_settings(photos: Source) -> None:
    first, second = take(2, photos)
    assert first.global_crops.shape == (10, 3, 24, 24)
    assert first.local_crops is not None
    assert first.local_crops.shape == (15, 3, 16, 16)
    assert first.global_crops.dtype == torch.float32
    assert (first.position, second.position) == (5, 10)
    for step, batch in enumerate((first, second)):
        expected = torch.from_numpy(block_masks(1, step, 10, (3, 3), MaskSettings()))
        assert torch.equal(batch.mask, expected)
        assert torch.equal(batch.mask_indices, expected.flatten().nonzero()[:, 0])
        assert len(batch.mask_weights) == len(batch.mask_indices)
        assert batch.data_time > 0


@pytest.mark.parametrize("spec", ["photos", "scenes:count=11,size=32"])
def test_a_batch_is_the_same_for_any_number_of_workers(photo_folder: Path, spec: str) -> None:
    source = open_source(photo_folder if spec == "photos" else spec)
    expected = take(4, source, batch_size=7)
    for workers in (1, 3):
        assert all(equal(a, b) for a, b in zip(take(4, source, batch_size=7, workers=workers), expected))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_restart_at_a_position_replays_what_would_have_followed(photos: Source, workers: int) -> None:
    whole = take(6, photos)
    assert all(equal(a, b) for a, b in zip(take(3, photos, position=15, workers=workers), whole[3:]))
    with loader(photos, workers=workers) as first:
        for _ in range(2):
            next(first)
        position = first.position
    assert all(equal(a, b) for a, b in zip(take(4, photos, position=position, workers=workers), whole[2:]))


def test_two_processes_together_draw_what_one_draws(photos: Source) -> None:
    (whole,) = take(1, photos, batch_size=6)
    halves = [take(1, photos, batch_size=3, rank=rank, world_size=2)[0] for rank in (0, 1)]
    assert [half.position for half in halves] == [6, 6]
    assert whole.sample_ids.tolist() == [*halves[0].sample_ids, *halves[1].sample_ids]
    rows = whole.global_crops.view(2, 6, 3, 24, 24)
    for half, part in zip(halves, rows.split(3, dim=1)):
        torch.testing.assert_close(half.global_crops.view(2, 3, 3, 24, 24), part, atol=1e-6, rtol=0)
    masks = whole.mask.view(2, 6, -1)
    for half, part in zip(halves, masks.split(3, dim=1)):
        assert torch.equal(half.mask.view(2, 3, -1), part)


def test_crops_change_from_epoch_to_epoch_and_from_seed_to_seed() -> None:
    source = open_source("scenes:count=5,size=32")
    first, second = take(2, source)
    assert sorted(first.sample_ids) == sorted(second.sample_ids)
    image = first.sample_ids[0]
    again = second.global_crops[list(second.sample_ids).index(image)]
    assert not torch.equal(first.global_crops[0], again)
    (other,) = take(1, source, seed=2)
    assert not torch.equal(other.global_crops, first.global_crops)


def test_rows_are_crop_major_and_belong_to_their_sample() -> None:
    plain = AugmentSettings(
        jitter_probability=0, grayscale=0, blur_global1=0, blur_global2=0, blur_local=0, solarize_global2=0,
        mean=(0.0,), std=(1.0,),
    )  # fmt: skip
    (batch,) = take(1, Pixels(50), augment=plain)
    levels = torch.from_numpy(batch.sample_ids) / 255
    assert batch.local_crops is not None
    for crops, views in ((batch.global_crops, 2), (batch.local_crops, 3)):
        found = crops.view(views, 5, -1)
        torch.testing.assert_close(found, levels.view(1, 5, 1).float().expand_as(found), atol=1e-6, rtol=0)


def test_a_data_set_smaller_than_the_batch_wraps_over_epochs() -> None:
    (batch,) = take(1, Pixels(3), batch_size=7)
    assert sorted(batch.sample_ids[:3]) == [0, 1, 2]
    assert sorted(batch.sample_ids[3:6]) == [0, 1, 2]


def test_without_local_crops_there_are_none(photos: Source) -> None:
    (batch,) = take(1, photos, crops=CropSettings(global_size=24, num_local=0))
    assert batch.local_crops is None


def test_one_channel_images_make_one_channel_crops(photos: Source) -> None:
    (batch,) = take(1, photos, in_channels=1, augment=AugmentSettings(mean=(0.5,), std=(0.2,)))
    assert batch.global_crops.shape == (10, 1, 24, 24)
    with pytest.raises(UserError, match=r"augment\.mean has 3 values, expected 1 or 2"):
        loader(photos, in_channels=2)


def test_weights_of_several_folders_are_respected(photo_folder: Path) -> None:
    specs = [str(photo_folder / "a"), str(photo_folder / "b")]
    ids = np.concatenate([b.sample_ids for b in take(30, open_source(specs, weights=[0.9, 0.1]), batch_size=20)])
    assert abs((ids < 6).mean() - 0.9) < 0.03


def test_sizes_that_the_patch_does_not_divide_are_refused(photos: Source) -> None:
    with pytest.raises(UserError, match=r"crops\.global_size=25 is not divisible by the patch size 8"):
        loader(photos, crops=CropSettings(global_size=25, local_size=16))
    with pytest.raises(UserError, match=r"crops\.local_size=98"):
        loader(photos, crops=CropSettings(global_size=24))


@pytest.fixture
def mixed_folder(tmp_path: Path) -> Path:
    """Fourteen good images of every kind among three bad ones."""
    root = tmp_path / "mixed"
    root.mkdir()
    for index, name in enumerate(["a.jpg", "b.PNG", "c.webp", "d.tif", "e.bmp", "f.jpeg", "g.jpg", "h.png"]):
        photograph(index, 50 + index, 70).save(root / name)
    for index in range(3):
        photograph(index + 20, 40, 40).save(root / f"more{index}.jpg")
    photograph(30, 60, 50).convert("CMYK").save(root / "cmyk.jpg")
    deep = np.random.default_rng(0).integers(0, 65536, (45, 55), dtype=np.uint16)
    Image.fromarray(deep).save(root / "deep.png")
    photograph(31, 60, 50).save(root / "really_png.jpg", format="PNG")
    file = io.BytesIO()
    photograph(32, 200, 200).save(file, "JPEG")
    (root / "truncated.jpg").write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
    (root / "text.jpg").write_text("not a picture")
    Image.new("RGB", (1, 1)).save(root / "dot.png")
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mixed_folder_gives_its_good_images_and_lists_the_bad(mixed_folder: Path, workers: int) -> None:
    source = open_source(mixed_folder)
    with loader(source, workers=workers, batch_size=9) as batches:
        seen = {source.name(i) for _ in range(6) for i in next(batches).sample_ids}
        assert {Path(name).name for name in batches.bad} == {"truncated.jpg", "text.jpg", "dot.png"}
        reasons = {Path(name).name: reason for name, reason in batches.bad.items()}
    assert "truncated" in reasons["truncated.jpg"]
    assert reasons["text.jpg"] == "not an image in a known format"
    assert "1x1" in reasons["dot.png"]
    assert len(seen) == 14
    assert not seen & set(batches.bad)


def test_substitutes_for_bad_images_do_not_depend_on_workers_or_restarts() -> None:
    bad = {3, 4, 11}
    whole = take(6, Pixels(20, bad))
    assert all(equal(a, b) for a, b in zip(take(6, Pixels(20, bad), workers=3), whole))
    assert all(equal(a, b) for a, b in zip(take(3, Pixels(20, bad), position=15), whole[3:]))


def test_a_bad_image_is_read_once_only() -> None:
    source = Pixels(6, {2})
    with loader(source, batch_size=6) as batches:
        for _ in range(10):
            next(batches)
    assert source.reads == 61


def test_too_many_bad_images_end_the_run_with_their_list() -> None:
    with loader(Pixels(200, set(range(40))), batch_size=50) as batches:
        with pytest.raises(RunError, match=r"bad images among \d+ seen") as caught:
            collections.deque(batches, maxlen=0)
        assert str(caught.value).count("broken on purpose") > 10
        with pytest.raises(RunError, match="closed"):
            next(batches)
    # the same images are few enough under another limit, and one is too many under none
    assert len(take(8, Pixels(200, set(range(40))), batch_size=50, max_bad_fraction=0.3)) == 8
    with pytest.raises(RunError, match="1 bad images"):
        take(8, Pixels(50, {7}), batch_size=10, max_bad_fraction=0)


def test_a_few_bad_images_of_the_first_ones_do_not_end_a_run() -> None:
    assert len(take(4, Pixels(12, {0, 5, 6}), batch_size=4)) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_without_a_usable_image_ends_in_words(workers: int) -> None:
    with pytest.raises(RunError, match="no usable image"):
        take(1, Pixels(4, {0, 1, 2, 3}), workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_reaches_the_consumer(workers: int) -> None:
    with pytest.raises(ZeroDivisionError):
        take(3, Pixels(10, {4}, ZeroDivisionError("in the source")), workers=workers)


def test_closing_and_collecting_a_loader_end_its_threads(photos: Source) -> None:
    def workers() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t.name.startswith("dinoreg-data")]

    with loader(photos, workers=3) as batches:
        next(batches)
        assert len(workers()) == 3
    assert workers() == []
    abandoned = loader(photos, workers=2)
    next(abandoned)
    reference = weakref.ref(abandoned)
    del abandoned
    gc.collect()
    assert reference() is None
    assert workers() == []


def test_the_number_of_compute_threads_stays_as_it_was(photos: Source) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        take(1, photos, workers=2)
        take(1, photos, workers=0)
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert [torch.get_num_threads(), *found] == [2, 2]
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_an_interpreter_with_a_loader_left_open_exits() -> None:
    code = (
        "from dinoreg.data.loader import BatchLoader, Views; from dinoreg.data.open import open_source\n"
        "from dinoreg.config.schema import *\n"
        "views = Views(CropSettings(24, 16, 2), AugmentSettings(), MaskSettings(), 8)\n"
        "loader = BatchLoader(open_source('scenes:count=50,size=32'), views, DataConfig(workers=2), batch_size=8)\n"
        "next(loader); print('done')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout.strip()) == (0, "done"), result.stderr


def test_a_large_jpeg_is_decoded_small_and_its_crops_stay_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smooth = photograph(3, 60, 80).resize((800, 600), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "large.jpg", quality=95)
    source = open_source(tmp_path)
    plain = AugmentSettings(jitter_probability=0, grayscale=0, blur_global1=0, blur_local=0, solarize_global2=0)
    reduced = take(1, source, batch_size=2, augment=plain)[0].global_crops
    monkeypatch.setattr(module.geometry, "reduction_for", lambda boxes, sizes: 1)
    full = take(1, source, batch_size=2, augment=plain)[0].global_crops
    assert not torch.equal(reduced, full)
    assert (reduced - full).abs().mean() < 0.05


def test_masks_by_process_are_stratified_over_each_processs_crops(photos: Source) -> None:
    over_all = MaskSettings(ratio=(0.4, 0.9))
    by_process = dataclasses.replace(over_all, by_process=True)

    def masks(rank: int, world_size: int, mask: MaskSettings) -> list[torch.Tensor]:
        options = {"batch_size": 4, "patch_size": 4, "rank": rank, "world_size": world_size, "mask": mask}
        return [batch.mask for batch in take(6, photos, **options)]

    alone = masks(0, 1, by_process)
    assert all(map(torch.equal, alone, masks(0, 1, over_all)))  # one process: nothing to spread otherwise
    counts = {rank: [int(mask.any(dim=1).sum()) for mask in masks(rank, 2, by_process)] for rank in (0, 1)}
    assert counts == {0: [4] * 6, 1: [4] * 6}  # half of the eight global crops of each process
    assert not any(map(torch.equal, masks(0, 2, by_process), masks(1, 2, by_process)))
    together = [int(mask.any(dim=1).sum()) for mask in masks(0, 2, over_all)]
    assert set(together) != {4}


def test_pictures_as_the_reference_decodes_them_are_pillows_conversion(tmp_path: Path) -> None:
    """EXIF orientation, alpha, 16 bits, palettes and large JPEGs: what convert("RGB") of the whole file gives."""
    picture = photograph(3, 60, 80)
    exif = Image.Exif()
    exif[0x0112] = 6
    ramp = np.linspace(0, 65535, 60 * 80).reshape(60, 80).astype(np.uint16)
    alpha = Image.fromarray((ramp >> 8).astype(np.uint8))
    files = {
        "turned.jpg": (picture, {"exif": exif}),
        "large.jpg": (picture.resize((800, 600), Image.Resampling.BICUBIC), {"quality": 95}),
        "cmyk.jpg": (picture.convert("CMYK"), {}),
        "see-through.png": (Image.merge("RGBA", (*picture.split(), alpha)), {}),
        "deep.png": (Image.fromarray(ramp), {}),
        "palette.gif": (picture.quantize(16), {}),
    }
    for name, (image, options) in files.items():
        folders = [tmp_path / name / each for each in ("odd", "plain")]
        for folder in folders:
            folder.mkdir(parents=True)
        image.save(folders[0] / name, **options)
        with Image.open(folders[0] / name) as stored:
            stored.convert("RGB").save(folders[1] / "plain.png")
        odd, plain = (open_source(folder) for folder in folders)
        # The draws depend on the seed and the number of the image alone.
        (expected,) = take(1, plain, batch_size=2)
        (found,) = take(1, odd, batch_size=2, reference_decode=True)
        (own,) = take(1, odd, batch_size=2)
        assert torch.equal(found.global_crops, expected.global_crops), name
        assert torch.equal(found.local_crops, expected.local_crops), name
        assert torch.equal(own.global_crops, expected.global_crops) == (name in ("palette.gif", "cmyk.jpg")), name


def test_a_bad_file_is_bad_for_the_references_decoding_too(mixed_folder: Path) -> None:
    source = open_source(mixed_folder)
    for own in (False, True):
        with loader(source, batch_size=8, reference_decode=own) as batches:
            next(batches)
            assert batches.bad, own
    with pytest.raises(UserError, match=r"data\.range"):
        DataConfig(range=[0.0, 1.0], reference_decode=True)


def test_batches_already_handed_out_keep_their_values(photos: Source) -> None:
    with loader(photos, workers=2) as batches:
        kept = next(batches)
        copy = kept.global_crops.clone()
        for _ in range(4):
            next(batches)
        assert torch.equal(kept.global_crops, copy)


@pytest.fixture(autouse=True)
def _no_threads_left() -> Iterator[None]:
    yield
    assert module.BAD_ALLOWANCE == 10
    assert not [t for t in threading.enumerate() if t.name.startswith("dinoreg-data")]
