"""The way from JPEG files to a batch of crops: images a second in one thread and through two workers, and fidelity.

    python benchmarks/data.py
    python benchmarks/data.py --peer lightly-train --peer-python PEER/bin/python

Files are 500x375 photographs, then 1600x1200 ones. The baseline, `reference`, is what dinov2's DataAugmentationDINO
does, written with Pillow and torchvision: each crop is cut from the decoded image with Pillow's bicubic filter, passes
colour jitter, grayscale, blur and solarise one after the other, and becomes a normalised float tensor; batches come
from a DataLoader. Two variants of dinoreg are compared with it: `uint8`, what the trainer gets where an accelerator
does the colour work, and `complete`, what it gets on a CPU: float crops with everything done.
"""

from __future__ import annotations

import io
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
from torch import Tensor

PEERS = ("lightly-train",)
BATCH_SIZE = 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ------------------------------------------------------------------------------------------------------------
# Variants, each in a process of its own


def rate_of(
    crops: Callable[[bytes], list[Tensor]], files: list[bytes], settings: dict[str, Any]
) -> Callable[[], measure.Measurement]:
    """A per-image transform as a variant: in process with no workers, else through a DataLoader."""
    workers, batch_size = settings["workers"], settings["batch_size"]
    # A pass gives every worker equally many batches, at least two, so that none waits for another.
    share = batch_size * max(1, workers)
    per_pass = max(2, -(-settings["images"] // share)) * share
    taken = 0

    def next_files(count: int) -> list[bytes]:
        nonlocal taken
        picked = [files[(taken + i) % len(files)] for i in range(count)]
        taken += count
        return picked

    torch.set_num_threads(1)
    if not workers:

        def one_by_one() -> measure.Measurement:
            picked = next_files(settings["images"])
            begun = time.perf_counter()
            for encoded in picked:
                crops(encoded)
            return {"images_per_s": len(picked) / (time.perf_counter() - begun)}

        for encoded in next_files(min(batch_size, len(files))):
            crops(encoded)
        return one_by_one

    loader = torch.utils.data.DataLoader(
        _Files(files, crops, per_pass),
        batch_size=batch_size,
        num_workers=workers,
        persistent_workers=True,
        collate_fn=_collate,
        multiprocessing_context="fork",
    )

    def through_loader() -> measure.Measurement:
        # One whole pass: the workers are there already, and nothing is left running afterwards.
        begun = time.perf_counter()
        count = sum(len(batch[0]) // 2 for batch in loader)
        return {"images_per_s": count / (time.perf_counter() - begun)}

    through_loader()
    return through_loader


class _Files(torch.utils.data.Dataset):
    def __init__(self, files: list[bytes], crops: Callable[[bytes], list[Tensor]], length: int) -> None:
        self.files, self.crops, self.length = files, crops, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.crops(self.files[index % len(self.files)])


def _collate(samples: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """Crop-major, as dinov2's collate function has them."""
    views = [torch.stack(view) for view in zip(*samples)]
    return torch.cat(views[:2]), torch.cat(views[2:])


class ReferenceAugmentation:
    """The transform of dinov2 from Pillow's and torchvision's parts: two global and eight local float crops.

    Blurred are, as the papers say, all first global crops, a tenth of the second and half of the local ones.
    """

    def __init__(self, local_size: int) -> None:
        from torchvision import transforms

        bicubic = transforms.InterpolationMode.BICUBIC

        def geometry(size: int, scale: tuple[float, float]) -> list[Any]:
            crop = transforms.RandomResizedCrop(size, scale, interpolation=bicubic)
            return [crop, transforms.RandomHorizontalFlip()]

        jitter = transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
        colour = [transforms.RandomApply([jitter], p=0.8), transforms.RandomGrayscale(p=0.2)]
        blur = transforms.GaussianBlur(kernel_size=9, sigma=(0.1, 2.0))
        solarize = transforms.RandomSolarize(threshold=128, p=0.2)
        finish = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        kinds = [
            (geometry(224, (0.32, 1.0)), [blur], 1),
            (geometry(224, (0.32, 1.0)), [transforms.RandomApply([blur], p=0.1), solarize], 1),
            (geometry(local_size, (0.05, 0.32)), [transforms.RandomApply([blur], p=0.5)], 8),
        ]
        self.views = [(transforms.Compose([*where, *colour, *extra, *finish]), count) for where, extra, count in kinds]

    def __call__(self, encoded: bytes) -> list[Tensor]:
        from PIL import Image

        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        return [view(image) for view, count in self.views for _ in range(count)]


def reference(settings: dict[str, Any]) -> Callable[[], measure.Measurement]:
    torch.manual_seed(0)
    random.seed(0)
    return rate_of(ReferenceAugmentation(settings["local_size"]), _read(settings["folder"]), settings)


def dinoreg_loader(settings: dict[str, Any]) -> Any:
    """dinoreg's loader; with `finish` False it hands over what would go to an accelerator."""
    from dinoreg.config.schema import DataConfig
    from dinoreg.config.view_settings import AugmentSettings, CropSettings, MaskSettings
    from dinoreg.data.loader import BatchLoader, Views
    from dinoreg.data.open import open_source
    from dinoreg.runtime.device import keep_freed_memory

    class Uint8Loader(BatchLoader):
        """Ends where the copy to the device would begin: masks, and crops in the memory it would read from."""

        def _deliver(self, job: Any, position: int) -> Any:
            job.augmented = job.groups
            return super()._deliver(job, position)

    keep_freed_memory()
    torch.set_num_threads(1)
    # Neither the CPU, where workers finish the crops, nor CUDA: "meta" takes what it is sent and does nothing.
    kind, device = (BatchLoader, "cpu") if settings["finish"] else (Uint8Loader, "meta")
    crops = CropSettings(local_size=settings["local_size"])
    return kind(
        open_source(settings["folder"], index_dir=settings["index_dir"]),
        Views(crops, AugmentSettings(), MaskSettings(), settings["patch_size"]),
        DataConfig(workers=settings["workers"], reduced_decode=settings.get("reduced_decode", True)),
        batch_size=settings["batch_size"],
        device=device,
    )


def ours(settings: dict[str, Any]) -> Callable[[], measure.Measurement]:
    loader = dinoreg_loader(settings)
    batches = max(1, settings["images"] // settings["batch_size"])

    def take() -> measure.Measurement:
        for _ in range(3 if settings["workers"] else 0):
            next(loader)  # those that were prepared in advance
        begun = time.perf_counter()
        for _ in range(batches):
            next(loader)
        rate = batches * settings["batch_size"] / (time.perf_counter() - begun)
        time.sleep(0.3 if settings["workers"] else 0.0)  # the workers fill their queue and rest
        return {"images_per_s": rate}

    next(loader)
    return take


def profile(settings: dict[str, Any]) -> Callable[[], measure.Measurement]:
    """Milliseconds an image that dinoreg spends in each stage, in one thread."""
    import numpy as np

    from dinoreg.config.view_settings import AugmentSettings, CropSettings, MaskSettings
    from dinoreg.data import augment, crops
    from dinoreg.data.decode import EncodedImage
    from dinoreg.data.masks import block_masks
    from dinoreg.data.rng import uniforms
    from dinoreg.runtime.device import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(1)
    files, batch_size = _read(settings["folder"]), settings["batch_size"]
    crop_settings, augment_settings = CropSettings(local_size=settings["local_size"]), AugmentSettings()
    views = 2 + crop_settings.num_local
    sizes = [224] * 2 + [crop_settings.local_size] * crop_settings.num_local
    buffers = [torch.empty(batch_size, size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2) for size in sizes]
    floats = [torch.empty(2 * batch_size, 3, 224, 224), torch.empty(8 * batch_size, 3, sizes[-1], sizes[-1])]
    grid = (224 // settings["patch_size"],) * 2
    position = 0

    def take() -> measure.Measurement:
        nonlocal position
        spent = dict.fromkeys(("plan", "masks", "decode", "crops", "colour and blur"), 0.0)
        last = time.perf_counter()

        def charge(stage: str) -> None:
            nonlocal last
            spent[stage] += time.perf_counter() - last
            last = time.perf_counter()

        ids = np.arange(position, position + batch_size)
        position += batch_size
        epochs = np.zeros_like(ids)
        boxes = crops.relative_boxes(uniforms(0, 1, epochs, ids, views, crops.NUMBERS_PER_VIEW), crop_settings)
        colours = augment.draw_photometric(
            uniforms(0, 2, epochs, ids, views, augment.NUMBERS_PER_VIEW), augment_settings
        ).swapaxes(0, 1)
        charge("plan")
        block_masks(0, position, 2 * batch_size, grid, MaskSettings())
        charge("masks")
        for row, number in enumerate(ids):
            image = EncodedImage(files[number % len(files)])
            placed = crops.place_boxes(boxes[row], image.height, image.width, crop_settings.ratio)
            reduction = crops.reduction_for(placed, sizes)
            pixels = image.pixels(reduction)
            charge("decode")
            for view, box in enumerate(placed):
                if reduction > 1:
                    box = crops.reduce_box(box, reduction, *pixels.shape[1:])
                crops.cut_crop(pixels, box, buffers[view][row : row + 1])
            charge("crops")
        for kind, (first, stop) in enumerate(((0, 2), (2, views))):
            params = colours[first:stop].reshape(-1, colours.shape[-1])
            augment.augment(torch.cat(buffers[first:stop]), params, augment_settings, floats[kind])
        charge("colour and blur")
        milliseconds = {stage: 1000 * value / batch_size for stage, value in spent.items()}
        return {**milliseconds, "images_per_s": 1000 / sum(milliseconds.values())}

    take()
    return take


def _read(folder: str) -> list[bytes]:
    return [file.read_bytes() for file in sorted(Path(folder).glob("*.jpg"))]


VARIANTS = {"reference": reference, "ours": ours, "profile": profile}


def build(settings: dict[str, Any]) -> Callable[[], measure.Measurement]:
    """A variant by its name; see `measure.serve`."""
    return VARIANTS[settings["variant"]](settings)


# ------------------------------------------------------------------------------------------------------------
# Fidelity


def fidelity(folder: Path, count: int, local_size: int) -> dict[str, float]:
    """PSNR in dB of dinoreg's uint8 crops against Pillow's decoder and bicubic filter, for the same boxes.

    Over all pixels of all crops of `count` files: with whole images decoded, and as the loader decodes them (reduced
    where no crop loses pixels by it).
    """
    import numpy as np
    from PIL import Image

    from dinoreg.config.view_settings import CropSettings
    from dinoreg.data import crops
    from dinoreg.data.decode import EncodedImage
    from dinoreg.data.rng import uniforms

    settings = CropSettings(local_size=local_size)
    sizes = [224] * 2 + [local_size] * settings.num_local
    ids = np.arange(count)
    numbers = uniforms(0, 1, np.zeros_like(ids), ids, len(sizes), crops.NUMBERS_PER_VIEW)
    relative = crops.relative_boxes(numbers, settings)
    error, error_reduced, pixels, reductions = 0.0, 0.0, 0, 0
    for row, file in enumerate(sorted(folder.glob("*.jpg"))[:count]):
        encoded = file.read_bytes()
        image = EncodedImage(encoded)
        boxes = crops.place_boxes(relative[row], image.height, image.width, settings.ratio)
        whole, reduction = image.pixels(), crops.reduction_for(boxes, sizes)
        small = image.pixels(reduction)
        reductions += reduction > 1
        pillow = Image.open(io.BytesIO(encoded)).convert("RGB")
        for (top, left, height, width), size in zip(boxes, sizes):
            wanted = np.asarray(
                pillow.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)
            ).astype(np.float64)
            box = (top, left, height, width)
            reduced = crops.reduce_box(box, reduction, *small.shape[1:]) if reduction > 1 else box
            out = torch.empty(2, size, size, 3, dtype=torch.uint8)
            crops.cut_crop(whole, box, out[:1].permute(0, 3, 1, 2))
            crops.cut_crop(small, reduced, out[1:].permute(0, 3, 1, 2))
            error += float(((out[0].numpy() - wanted) ** 2).sum())
            error_reduced += float(((out[1].numpy() - wanted) ** 2).sum())
            pixels += wanted.size

    def psnr(squares: float) -> float:
        return round(float(10 * np.log10(255**2 * pixels / max(squares, 1e-9))), 2)

    return {
        "whole_db": psnr(error),
        "as_decoded_db": psnr(error_reduced),
        "share_reduced": round(reductions / count, 3),
    }


# ------------------------------------------------------------------------------------------------------------


def main() -> None:
    options = measure.parser(__doc__, PEERS)
    options.add_argument("--photos", type=Path, help="where the photographs are kept; none: a temporary folder")
    options.add_argument("--parts", nargs="+", default=("single", "loader", "large", "fidelity", "profile"))
    options.add_argument("--workers", type=int, default=2, help="of the loader part")
    options.add_argument("--images", type=int, default=48, help="of one measurement (the slow variants take seconds)")
    options.add_argument("--patch-size", type=int, default=16)
    given = options.parse_args()
    if given.worker:
        measure.serve(build, given.worker)
        return
    with tempfile.TemporaryDirectory() as scratch:
        run(given, given.photos or Path(scratch), scratch)


def run(given: Any, photos: Path, index_dir: str) -> None:
    """Measure the parts asked for, and print."""
    from photos import write_photos

    count, large, images, batch_size = (300, 60, given.images, BATCH_SIZE)
    if given.short:
        count, large, images, batch_size, given.rounds = 6, 2, 4, 2, 1
    inline = build if given.short else None
    local_size = 96 if given.patch_size == 16 else 98
    results: dict[str, Any] = {}
    tables = []
    base = {"batch_size": batch_size, "local_size": local_size, "patch_size": given.patch_size, "index_dir": index_dir}

    def measured(title: str, folder: Path, workers: int, size: int) -> None:
        common = {**base, "folder": str(folder), "workers": workers}
        slow, quick = {**common, "images": size}, {**common, "images": size * 4}
        python = sys.executable
        variants: dict[str, Any] = {
            "reference": ("data.py", {**slow, "variant": "reference"}, python, None),
            "reference, malloc kept": ("data.py", {**slow, "variant": "reference"}, python, measure.KEEP_FREED),
            "dinoreg, uint8": ("data.py", {**quick, "variant": "ours", "finish": False}, python, None),
            "dinoreg, complete": ("data.py", {**slow, "variant": "ours", "finish": True}, python, None),
        }
        if title == "large":
            exact = {**quick, "variant": "ours", "finish": False, "reduced_decode": False}
            variants["dinoreg, uint8, whole decode"] = ("data.py", exact, python, None)
        if given.peer:
            variants[given.peer] = (
                measure.PEERS_SCRIPT,
                {**slow, "peer": given.peer, "what": "data"},
                given.peer_python,
                None,
            )
        with measure.workers_of(variants, inline) as workers_:
            rounds = measure.in_turn(workers_, given.rounds, given.budget)
        results[title] = measure.compare(rounds, "images_per_s", ("reference", *([given.peer] if given.peer else [])))
        tables.append(f"{title}\n" + measure.table(measure.comparison_rows(results[title], "images_per_s", "img/s")))

    small_folder, large_folder = photos / "small", photos / "large"
    write_photos(small_folder, count)
    if "large" in given.parts:
        write_photos(large_folder, large, 1200, 1600)
    if "single" in given.parts:
        measured("single", small_folder, 0, images)
    if "loader" in given.parts:
        measured("loader", small_folder, given.workers, images * 2)
    if "large" in given.parts:
        measured("large", large_folder, 0, max(2, images // 3 // batch_size * batch_size))
    if "fidelity" in given.parts:
        results["fidelity"] = {"small": fidelity(small_folder, min(count, 40), local_size)}
        if "large" in given.parts:
            results["fidelity"]["large"] = fidelity(large_folder, min(large, 12), local_size)
        tables.append("fidelity\n" + measure.table([{"files": k, **v} for k, v in results["fidelity"].items()]))
    if "profile" in given.parts:
        settings = {**base, "folder": str(small_folder), "variant": "profile"}
        with measure.workers_of({"profile": ("data.py", settings, sys.executable, None)}, inline) as workers_:
            rounds = measure.in_turn(workers_, given.rounds, given.budget)
        values = {key: measure.median(rounds, "profile", key) for key in rounds[0]["profile"]}
        results["profile"] = values
        whole = sum(value for key, value in values.items() if key != "images_per_s")
        tables.append(
            "profile\n"
            + measure.table(
                [
                    {"stage": key, "ms an image": f"{value:.3f}", "share": f"{100 * value / whole:.1f} %"}
                    for key, value in values.items()
                    if key != "images_per_s"
                ]
            )
        )
    settings = {**base, "rounds": given.rounds, "images": images, "workers": given.workers}
    del settings["index_dir"]
    measure.report("data", settings, results, *tables)


if __name__ == "__main__":
    main()
