"""What is measured inside a run, on fixed, unaugmented images that are the same at every probe.

Class tokens: k-NN on labelled images, the DINO papers' weighted vote with half of them as the bank, and RankMe (arXiv
2210.02885), which needs no labels and is always measured; each process embeds its share. Patch tokens: are they as good
as the class token says the network is? Where masks exist (`probe.dense`), patches are segmented by the same vote: a
bank of patches with the class that most of their pixels have, and those of other images. Without masks there is the DSE
(`dense_structure`), which needs none and is always measured, on a few patches.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dinoreg.checkpoint.atomic import write_atomic
from dinoreg.checkpoint.steps import PROBED
from dinoreg.config.load import Config
from dinoreg.config.option import check
from dinoreg.data.center_crop import center_crops, resized_shape
from dinoreg.data.labelled import passed_over_in_words
from dinoreg.data.open import is_scenes, open_source, read_labelled
from dinoreg.data.source import ChosenSource, ScenesSource, Source
from dinoreg.data.statistics import survey
from dinoreg.data.value_range import ValueRange
from dinoreg.distributed.process_group import ALONE, Ranks
from dinoreg.evaluation.custom.maps import segmented
from dinoreg.evaluation.custom.pairs import find_pairs, kinds_of_pairs
from dinoreg.evaluation.data import IGNORED, Segmented
from dinoreg.evaluation.metrics.bootstrap import bootstrap_interval, bootstrap_statistic
from dinoreg.evaluation.metrics.dense_structure import structure
from dinoreg.evaluation.metrics.knn_rankme import knn_predict, rankme
from dinoreg.evaluation.metrics.miou import Confusion, count_pixels
from dinoreg.models.vit import RegisterViT, Tokens
from dinoreg.runtime.device import autocast, per_channel
from dinoreg.runtime.digest import content_digest
from dinoreg.runtime.environment import usable_cores
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.parallel import parallel
from dinoreg.runtime.printable import listed
from dinoreg.scenes.render import CLASS_NAMES, NUM_CLASSES, label_of, render

NEIGHBOURS = 20
BATCH_SIZE = 128
FIRST_PROBE_SCENE = 10_000_000  # far beyond the scenes that a run trains on
MOST_IMAGES = 512  # with masks, half of them the bank
STRUCTURE_IMAGES = 128  # that the DSE is measured on

Reading = Callable[[Tokens, Tensor], Tensor]
Labels = np.ndarray | None
Parts = tuple[np.ndarray, np.ndarray] | None


class Measured(NamedTuple):
    """What a probe found.

    values      by name, see `Probe.measure` and `DenseProbe.measure`
    right       (m,) bool, which of the tested images were classified correctly; None without labels
    replicates  of "dse" and "dense_miou": (samples,) of every resample of the images, to be paired with other probes'
    """

    values: dict[str, float]
    right: np.ndarray | None = None
    replicates: dict[str, np.ndarray] | None = None


def vote(bank: Tensor, labels: Tensor, queries: Tensor, num_classes: int) -> Tensor:
    """The classes (m,) int64, on the CPU, of queries (m, D) by their neighbours in a bank (n, D) with labels (n,)."""
    votes = knn_predict(bank, labels, queries, k=(NEIGHBOURS,), num_classes=num_classes)
    return votes[NEIGHBOURS].argmax(dim=-1).cpu()


@dataclass(frozen=True)
class Probe:
    """Fixed images to embed at every probe.

    images     (n, C, H, W) uint8
    labels     (n,) int64 below num_classes, or None: effective rank only
    mean, std  of the normalisation, C numbers each, for pixels in 0 to 1
    bank       how many of the images, the first, the others are classified by; None: half of them
    notes      lines for the log on how the labels were read
    source     the same images as files, or None
    """

    images: Tensor
    labels: Tensor | None
    num_classes: int
    mean: Sequence[float]
    std: Sequence[float]
    bank: int | None = None
    notes: tuple[str, ...] = ()
    source: Source | None = None

    @property
    def in_bank(self) -> int:
        """How many of the images, the first, are the bank."""
        return len(self.images) // 2 if self.bank is None else self.bank

    @torch.no_grad()
    def measure(self, backbone: nn.Module, device: torch.device, dtype: torch.dtype, ranks: Ranks = ALONE) -> Measured:
        """Measure a backbone in eval mode; all `ranks` call together. Nothing random of PyTorch's is drawn.

        dtype    of autocast
        returns  rankme, the effective rank of the centred class tokens (1 to D); with labels knn_top1, the share
                 (0 to 1) of the images behind the bank that 20 neighbours in the bank classify correctly,
                 knn_top1_low and _high, its 95 % bootstrap interval, and _chance and _majority, the shares that
                 guessing and always naming the most frequent class get right; probe_time in seconds
        """
        started = time.perf_counter()
        features = self.features(backbone, device, dtype, ranks)
        values = {"rankme": rankme(features - features.mean(dim=0))}
        right = None
        if self.labels is not None:
            half = self.in_bank
            known, tested = self.labels[:half], self.labels[half:]
            right = (vote(features[:half], known, features[half:], self.num_classes) == tested).numpy()
            interval = bootstrap_interval(right)
            values |= {"knn_top1": float(right.mean())}
            values |= {"knn_top1_low": interval.low, "knn_top1_high": interval.high}
            values["knn_top1_chance"] = 1 / self.num_classes
            values["knn_top1_majority"] = int(tested.bincount().max()) / len(tested)
        return Measured({**values, "probe_time": time.perf_counter() - started}, right)

    def features(self, backbone: nn.Module, device: torch.device, dtype: torch.dtype, ranks: Ranks = ALONE) -> Tensor:
        """Class tokens (n, D) of all images, float32, on `device`; all processes call together and get the same."""
        return self.read(lambda tokens, _: tokens.cls.float(), backbone, device, dtype, ranks)

    @torch.no_grad()
    def read(
        self, what: Reading, backbone: nn.Module, device: torch.device, dtype: torch.dtype, ranks: Ranks = ALONE
    ) -> Tensor:
        """What is read of the tokens of all images, (n, …), on `device`; all processes call together and get the same.

        what  (tokens of a batch, the B rows in `images`) -> (B, …)
        """
        size = min(BATCH_SIZE, len(self.images))
        share = -(-len(self.images) // (size * ranks.world_size))
        # The last batches are filled up: a sharded backbone has to be called equally often everywhere, and batches of
        # one size give the same numbers on any number of processes.
        rows = torch.arange(share * ranks.world_size * size).clamp(max=len(self.images) - 1)
        mean, std = per_channel(self.mean, device), per_channel(self.std, device)
        found = []
        for part in rows.view(share, ranks.world_size, size)[:, ranks.rank]:
            pixels = (self.images[part].to(device).float() / 255 - mean) / std
            with autocast(device, dtype):
                found.append(what(backbone(pixels), part))
        gathered = ranks.gather_rows(torch.stack(found)).unflatten(0, (ranks.world_size, share))
        return gathered.transpose(0, 1).flatten(0, 2)[: len(self.images)]


def build_probe(config: Config, source: Source) -> Probe | None:
    """The probe of a run's own domain: on `probe.data` if given, else without labels on images of `source`.

    returns  None for probe.every=0 and, without labels, for fewer than 4 readable images
    raises   UserError when probe.data has fewer than 4 readable images, or one class only
    """
    if config.probe.every == 0:
        return None
    if config.probe.data is not None:
        return _labelled_probe(config, "probe.data", config.probe.data)
    probe = _probe(config, source)
    return probe if len(probe.images) >= 4 else None


def class_tokens_of_all(
    config: Config, source: Source, backbone: RegisterViT, device: torch.device, dtype: torch.dtype, ranks: Ranks
) -> Tensor:
    """Class tokens (I, D) of all images of a source, float32, on `device`; 0 for those that cannot be read.

    backbone  in eval mode; all `ranks` call together and get the same
    """
    tokens = torch.zeros(len(source), backbone.dim, device=device)
    for part in torch.arange(len(source)).split(1024):  # images in memory
        pixels, readable = center_crops(source, part.tolist(), config.crops.global_size, config.model.in_channels)
        if readable:
            part_of_all = Probe(pixels, None, 0, config.augment.mean, config.augment.std)
            tokens[readable] = part_of_all.features(backbone, device, dtype, ranks)
    return tokens


def write_probed(out: Path, probe: Probe, config: Config) -> None:
    """Write `probe.json` into the run folder: what `best` follows, and which labelled images it is measured on.

    The images stand there by the contents of their files: an evaluation of the best step on them would be one on images
    that it was chosen by.
    """
    content: dict[str, Any] = {"data": config.probe.data, "metric": config.probe.metric}
    if probe.labels is not None and probe.source is not None:
        read, places = probe.source.read, range(len(probe.source))
        content["images"] = [*parallel(lambda each: content_digest(read(each)).hex()[:16], places, usable_cores())]
    write_atomic(out / PROBED, json.dumps(content) + "\n")


def build_general(config: Config) -> Probe | None:
    """The probe on `probe.general`, the images that a run must not forget; None without it and for probe.every=0.

    raises UserError when it has fewer than 4 readable images, or one class only
    """
    if config.probe.every == 0 or config.probe.general is None:
        return None
    return _labelled_probe(config, "probe.general", config.probe.general)


def _labelled_probe(config: Config, key: str, spec: str) -> Probe:
    if is_scenes(spec):
        source = scenes_of(spec, config.probe.num_images)
        labels = [label_of(source.first + index, source.seed) for index in range(len(source))]
        probe = _probe(config, source, np.array(labels), len(CLASS_NAMES))
    else:
        probe = _probe_of_own(config, key, spec)
    assert probe.labels is not None
    bank = probe.labels[: probe.in_bank]
    if len(probe.images) < 4 or len(bank.unique()) < 2 or len(bank) == len(probe.labels):
        raise UserError(f"{key}={spec}: expected at least 4 readable images of 2 classes")
    return probe


def _probe_of_own(config: Config, key: str, spec: str) -> Probe:
    """A probe on a folder or table: where it has splits, the bank is of train and the others are of val, or of test."""
    places = config.data.index_dir, config.probe.root
    found = read_labelled(spec, *places, config.probe.columns, "probe.columns", "probe.root")
    check(found.labels.ndim == 1, key, spec, "one label an image")
    source = found.source
    source.value_range = ValueRange.of(config.data.range)
    seen = survey(source, config.model.in_channels, what=key).warnings
    notes = tuple(f"{key}: {line}" for line in (*found.warnings, *passed_over_in_words(source.passed_over), *seen))
    words = np.array(found.words or [])
    queried = next((split for split in ("val", "test") if split in words), None)
    parts = None
    if "train" in words and queried is not None:
        parts = np.flatnonzero(words == "train"), np.flatnonzero(words == queried)
        unseen = np.setdiff1d(found.labels[parts[1]], found.labels[parts[0]])
        if len(unseen):
            names = listed(found.class_names[label] for label in unseen)
            notes += (f"{key}: classes of {queried} that train has not, and that cannot be right: {names}",)
    return replace(_probe(config, source, found.labels, len(found.class_names), parts), notes=notes)


def _probe(config: Config, source: Source, labels: Labels = None, classes: int = 0, parts: Parts = None) -> Probe:
    """A probe on some images of a source, always the same.

    labels  of all images
    parts   the images that the bank and those that are classified are taken from, half of them each; None: any
    """
    rng, count = np.random.default_rng(0), config.probe.num_images
    if parts is None:
        chosen = rng.permutation(len(source))[:count]
    else:
        chosen = np.concatenate([rng.permutation(part)[: count // 2] for part in parts])
    images, readable = center_crops(source, chosen.tolist(), config.crops.global_size, config.model.in_channels)
    bank = None if parts is None else int(np.isin(readable, parts[0]).sum())
    known = None if labels is None else torch.from_numpy(labels[readable])
    files = ChosenSource(source, np.array(readable, dtype=np.int64))
    return Probe(images, known, classes, config.augment.mean, config.augment.std, bank, source=files)


def scenes_of(spec: str, count: int) -> ScenesSource:
    """The scenes that `spec` names, or else `count` that no run trains on."""
    source = open_source(spec if spec.partition(":")[2] else f"scenes:count={count},first={FIRST_PROBE_SCENE}")
    assert isinstance(source, ScenesSource)
    return source


# ------------------------------------------------------------------------------------------------------------
# Patch tokens


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
    found = vote(features, labels[learnt], queries, num_classes).view(*truth[bank:].shape[:2], 1)
    pairs = zip(truth[bank:].numpy(), found.expand_as(truth[bank:]).numpy())
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
        return torch.from_numpy(rng.random((count, num_patches)).argsort(axis=1)[:, :64].copy())  # at most

    if spec is None:
        metric, masks = config.probe.metric, "images with masks, as probe.dense=FOLDER or scenes"
        check(metric != "dense_miou", "probe.metric", metric, masks)
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
    check("masks" in kinds_of_pairs(root), "probe.dense", spec, "a folder of images/ with masks/, or scenes")
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
