"""How good are the features while the run goes on: k-NN on labelled images, effective rank without labels.

The teacher's class tokens are taken on fixed, unaugmented images, each process embedding its share of them.
k-NN is the DINO papers' weighted vote with half of the images as the bank; RankMe (arXiv 2210.02885)
needs no labels and is always there.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dinoreg.config.load import Config
from dinoreg.data.center_crop import center_crops
from dinoreg.data.open import labelled_folder, open_source
from dinoreg.data.source import Source
from dinoreg.data.sources import ScenesSource
from dinoreg.distributed import process_group as distributed
from dinoreg.evaluation.metrics.knn_rankme import knn_predict, rankme
from dinoreg.runtime.device import autocast
from dinoreg.runtime.errors import UserError

NEIGHBOURS = 20
BATCH_SIZE = 128
FIRST_PROBE_SCENE = 10_000_000  # far beyond the scenes that a run trains on


@dataclass(frozen=True)
class Probe:
    """Fixed images to embed at every probe.

    images  (n, C, H, W) uint8     labels  (n,) int64, or None: rank only
    """

    images: Tensor
    labels: Tensor | None
    num_classes: int
    mean: Tensor
    std: Tensor

    @torch.no_grad()
    def measure(self, backbone: nn.Module, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
        """{"rankme", ["knn_top1"], "probe_time"} of a backbone in eval mode; fractions in [0, 1], seconds."""
        started = time.perf_counter()
        features = self.features(backbone, device, dtype)
        result = {"rankme": rankme(features - features.mean(dim=0))}
        if self.labels is not None:
            half = len(features) // 2
            votes = knn_predict(
                features[:half],
                self.labels[:half].to(device),
                features[half:],
                k=(NEIGHBOURS,),
                num_classes=self.num_classes,
            )
            predicted = votes[NEIGHBOURS].argmax(dim=-1).cpu()
            result["knn_top1"] = float((predicted == self.labels[half:]).float().mean())
        return {**result, "probe_time": time.perf_counter() - started}

    @torch.no_grad()
    def features(self, backbone: nn.Module, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Class tokens (n, D), float32, on `device`; of all processes, which call together, the same on each."""
        share = -(-len(self.images) // distributed.world_size())
        first = distributed.rank() * share
        # The last shares are filled up: a sharded backbone has to be called equally often everywhere.
        mine = torch.arange(first, first + share).clamp(max=len(self.images) - 1)
        rows = []
        for some in mine.split(BATCH_SIZE):
            images = self.images[some]
            pixels = (images.to(device).float() / 255 - self.mean.to(device)) / self.std.to(device)
            with autocast(device, dtype):
                rows.append(backbone(pixels).cls.float())
        return distributed.gather_rows(torch.cat(rows))[: len(self.images)]


def build_probe(config: Config, source: Source) -> Probe | None:
    """The probe of a run's own domain: on `probe.data` if given, else label-free on images of the run's own source.

    raises UserError when the labelled images cannot be used
    """
    if config.probe.every == 0:
        return None
    if config.probe.data is not None:
        return _labelled_probe(config, "probe.data", config.probe.data)
    order = np.random.default_rng(0).permutation(len(source))[: config.probe.num_images]
    images, kept = center_crops(source, order.tolist(), config.crops.global_size, config.model.in_channels)
    return None if len(kept) < 4 else _probe(config, images, None, 0)


def build_general(config: Config) -> Probe | None:
    """The probe on `probe.general`, what a run must not forget; None where none is asked for.

    raises UserError when the labelled images cannot be used
    """
    if config.probe.every == 0 or config.probe.general is None:
        return None
    return _labelled_probe(config, "probe.general", config.probe.general)


def _labelled_probe(config: Config, key: str, spec: str) -> Probe:
    source, all_labels, class_names = _labelled(spec, config.probe.num_images)
    order = np.random.default_rng(0).permutation(len(all_labels))[: config.probe.num_images]
    images, kept = center_crops(source, order.tolist(), config.crops.global_size, config.model.in_channels)
    labels = np.asarray(all_labels)[kept]
    if len(kept) < 4 or len(set(labels[: len(kept) // 2])) < 2:
        raise UserError(f"{key}={spec}: expected at least 4 readable images of 2 classes")
    return _probe(config, images, labels, len(class_names))


def _probe(config: Config, images: Tensor, labels: np.ndarray | None, num_classes: int) -> Probe:
    shape = (1, -1, 1, 1)
    return Probe(
        images,
        None if labels is None else torch.from_numpy(labels).long(),
        num_classes,
        torch.tensor(config.augment.mean).view(shape),
        torch.tensor(config.augment.std).view(shape),
    )


def _labelled(spec: str, count: int) -> tuple[Source, np.ndarray, list[str]]:
    if spec == "scenes" or spec.startswith("scenes:"):
        from dinoreg.scenes.render import CLASS_NAMES, label_of

        source = open_source(spec if ":" in spec else f"scenes:count={count},first={FIRST_PROBE_SCENE}")
        assert isinstance(source, ScenesSource)
        labels = [label_of(source.first + i, source.seed) for i in range(len(source))]
        return source, np.array(labels), list(CLASS_NAMES)
    return labelled_folder(spec)
