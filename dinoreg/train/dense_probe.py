"""Patch tokens inside a run: are they as good as the class token says the network is?

Where masks exist (`probe.dense`), patches are segmented by their nearest neighbours: a bank of patches with the class
that most of their pixels have, and the weighted vote of `class_probe` for those of other images. Without masks there is
the DSE (`dense_structure`), which needs none and is always measured. Images and patches are few, fixed, and the same at
every probe.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dinoreg.config.load import Config
from dinoreg.data.center_crop import center_crops, resized_shape
from dinoreg.data.open import is_scenes
from dinoreg.data.value_range import ValueRange
from dinoreg.distributed.process_group import ALONE, Ranks
from dinoreg.evaluation.custom.maps import segmented
from dinoreg.evaluation.custom.pairs import find_pairs, kinds_of_pairs
from dinoreg.evaluation.data import IGNORED, Segmented
from dinoreg.evaluation.metrics.bootstrap import bootstrap_statistic
from dinoreg.evaluation.metrics.dense_structure import structure
from dinoreg.evaluation.metrics.knn_rankme import knn_predict
from dinoreg.evaluation.metrics.miou import Confusion, count_pixels
from dinoreg.runtime.errors import UserError
from dinoreg.scenes.render import NUM_CLASSES, render
from dinoreg.train.class_probe import NEIGHBOURS, Measured, Probe, scenes_of

MOST_IMAGES = 512  # with masks, half of them the bank
MOST_PATCHES = 64  # of an image
STRUCTURE_IMAGES = 128  # that the DSE is measured on


@dataclass(frozen=True)
class DenseProbe:
    """Fixed images and patches to look at at every probe.

    pictures  the n images; with masks, the bank and then those that are segmented
    places    (n, P) int64, which patches of each image, in random order
    truth     (n, P, pixels of a patch) uint8: a class below pictures.num_classes, or 255 where ignored; None: no masks
    """

    pictures: Probe
    places: Tensor
    truth: Tensor | None = None

    @torch.no_grad()
    def measure(self, backbone: nn.Module, device: torch.device, dtype: torch.dtype, ranks: Ranks = ALONE) -> Measured:
        """Measure a backbone in eval mode; all `ranks` call together. Nothing random of PyTorch's is drawn.

        dtype    of autocast
        returns  dse with its 95 % interval, dse_low and _high (NaN for fewer than 16 images), and its parts
                 dse_separability and dse_dimension; with masks dense_miou (0 to 1) over pixels of the images behind
                 the bank, dense_miou_low and _high, its 95 % bootstrap interval over images, and _majority, the mIoU of
                 the most frequent class; dense_accuracy, the share of pixels that are right; probe_time in seconds
        """
        started = time.perf_counter()
        places = self.places[..., None].to(device)
        chosen = lambda tokens, part: tokens.patches.float().take_along_dim(places[part], dim=1)  # noqa: E731
        patches = self.pictures.read(chosen, backbone, device, dtype, ranks)  # (n, P, D)
        separability, dimension, interval = structure(patches[:STRUCTURE_IMAGES])
        values = {"dse": separability + dimension, "dse_separability": separability, "dse_dimension": dimension}
        intervals = {"dse": interval}
        if self.truth is not None:
            confusion = segment(patches, self.truth, self.pictures.in_bank, self.pictures.num_classes)
            intervals["dense_miou"] = bootstrap_statistic(confusion.num_images, confusion.miou)
            values |= {"dense_miou": confusion.miou(), "dense_miou_majority": confusion.constant()[1]}
            values["dense_accuracy"] = confusion.pixel_accuracy()
        for name, each in intervals.items():
            values |= {f"{name}_low": each.low, f"{name}_high": each.high}
        values["probe_time"] = time.perf_counter() - started
        return Measured(values, replicates={name: each.replicates for name, each in intervals.items()})


def segment(patches: Tensor, truth: Tensor, bank: int, num_classes: int) -> Confusion:
    """The pixels of patches whose class is that of their nearest neighbours, by image behind the bank.

    patches  (n, P, D) of any norm
    truth    (n, P, pixels of a patch) uint8 on the CPU, 255 where ignored; a patch is what most pixels are
    bank     how many of the n images, the first, are learnt from, without the patches that are mostly ignored
    """
    labels = truth[:bank].mode(dim=-1).values.long()  # (bank, P)
    learnt = labels != IGNORED
    features, queries = patches[:bank][learnt.to(patches.device)], patches[bank:].flatten(0, 1)
    votes = knn_predict(features, labels[learnt], queries, k=(NEIGHBOURS,), num_classes=num_classes)
    found = votes[NEIGHBOURS].argmax(dim=-1).view(*truth[bank:].shape[:2], 1).cpu().expand_as(truth[bank:])
    pairs = zip(truth[bank:].numpy(), found.numpy())
    return Confusion(num_classes, [count_pixels(*pair, num_classes) for pair in pairs])


def build_dense(config: Config, probe: Probe | None, patch_size: int) -> DenseProbe | None:
    """The dense probe of a run: on `probe.dense` if given, else without masks on images of the class tokens' `probe`.

    patch_size  pixels, of the model
    returns     None where there is no `probe`
    raises      UserError when probe.dense is no folder of images and masks or has too few of them, or when `best` is to
                follow it and it is not given
    """
    if probe is None:
        return None
    spec, size, rng = config.probe.dense, config.crops.global_size, np.random.default_rng(0)
    num_patches = (size // patch_size) ** 2

    def places(count: int) -> Tensor:
        return torch.from_numpy(rng.random((count, num_patches)).argsort(axis=1)[:, :MOST_PATCHES].copy())

    if spec is None:
        if config.probe.metric == "dense_miou":
            raise UserError("probe.metric=dense_miou: expected images with masks, as probe.dense=FOLDER or scenes")
        pictures = replace(probe, images=probe.images[:STRUCTURE_IMAGES], notes=())
        return DenseProbe(pictures, places(len(pictures.images)))
    parts, notes = _scenes(spec) if is_scenes(spec) else _own(config, spec)
    images, cuts, counts = [], [], []
    for part, rows in parts:
        chosen = rng.permutation(rows)[: MOST_IMAGES // 2].tolist()
        pixels, readable = center_crops(part.source, chosen, size, config.model.in_channels)
        images.append(pixels)
        cuts += [_cut(part.mask(index), size, patch_size) for index in readable]
        counts.append(len(readable))
    where = places(len(cuts))
    everywhere = torch.from_numpy(np.array(cuts, dtype=np.uint8).reshape(len(cuts), num_patches, patch_size**2))
    truth = everywhere.take_along_dim(where[..., None], dim=1)
    classes = truth.mode(dim=-1).values.split(counts)
    if any(len(each) < 2 or len(each[each != IGNORED].unique()) < 2 for each in classes):
        raise UserError(f"probe.dense={spec}: expected 2 or more images to learn from and to test, of 2 classes")
    pictures = replace(probe, images=torch.cat(images), labels=None, bank=counts[0], notes=notes)
    return DenseProbe(replace(pictures, num_classes=parts[0][0].num_classes), where, truth)


def _scenes(spec: str) -> tuple[list[tuple[Segmented, np.ndarray]], tuple[str, ...]]:
    """Scenes with masks: the numbers of those to learn from, and of others to test."""
    source = scenes_of(spec, MOST_IMAGES)
    mask = lambda index: render(source.first + index, source.size, source.seed).segmentation  # noqa: E731
    part = Segmented(source, mask, 1 + NUM_CLASSES)
    return [(part, rows) for rows in np.array_split(np.arange(len(source)), 2)], ()


def _own(config: Config, spec: str) -> tuple[list[tuple[Segmented, np.ndarray]], tuple[str, ...]]:
    """The images of train, and those of val or else of test, with masks and all their numbers; and warnings.

    Half of the images are held out where there are no splits.
    """
    root = Path(spec).expanduser()
    if "masks" not in kinds_of_pairs(root):
        raise UserError(f"probe.dense={spec}: expected a folder of images/ with masks/, or scenes")
    pairs, _, warnings = find_pairs(root, "masks", share=0.5, seed=0)
    try:
        data = segmented(root, pairs, "", {"values": config.probe.dense_values}, warnings)
    except UserError as error:
        raise UserError(str(error).replace("own.values", "probe.dense_values")) from None
    parts = [data.splits[name] for name in ("train", "val" if "val" in data.splits else "test")]
    for part in parts:
        part.source.value_range = ValueRange.of(config.data.range)
    notes = tuple(f"probe.dense: {line}" for line in data.extra["warnings"])
    return [(part, np.arange(len(part.source))) for part in parts], notes


def _cut(mask: np.ndarray, size: int, patch_size: int) -> np.ndarray:
    """A mask (H, W) where `center_crop` takes its picture, the nearest pixels, cut into patches: (N, pixels)."""
    shape = resized_shape((mask.shape[0], mask.shape[1]), (size, size))
    shares = (((np.arange(size) + (side - size) // 2 + 0.5) / side) for side in shape)
    rows, columns = ((share * length).astype(np.int64) for share, length in zip(shares, mask.shape))
    grid = mask[np.ix_(rows, columns)].reshape(size // patch_size, patch_size, -1, patch_size)
    return grid.swapaxes(1, 2).reshape(-1, patch_size**2)
