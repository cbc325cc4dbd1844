"""k-NN segmentation: patches take their classes from the nearest patches of the training images; nothing is trained.

Hummingbird's retrieval (Balazevic et al., arXiv 2306.01667): a memory holds patch tokens of norm 1, each with the share
of its pixels that every class has. A patch of a test image is the mean of its k nearest, weighted by a softmax of their
cosines; classes are upsampled as the logits of linear segmentation are, over the same windows. The memory is bounded:
it takes as many patches of every image, at random. Training images are not augmented.
"""

from dataclasses import asdict

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dinoreg.evaluation.data import IGNORED, Segmented
from dinoreg.evaluation.dense.windows import centre_pad
from dinoreg.evaluation.metrics.knn_rankme import nearest_neighbours
from dinoreg.evaluation.options import KnnSegmentationOptions
from dinoreg.evaluation.protocols.measurement import Measurement
from dinoreg.evaluation.protocols.segmentation import MISSING, Segmenter, miou_row
from dinoreg.evaluation.result import Row
from dinoreg.evaluation.solvers.train_heads import generator
from dinoreg.runtime.errors import UserError
from dinoreg.runtime.parallel import parallel


def evaluate(measured: Measurement) -> list[Row]:
    """mIoU in [0, 1].

    raises  UserError for a missing split, masks that do not fit their images, and masks without a class; RunError where
            a token is not finite
    """
    train, test, _ = measured.splits(Segmented, MISSING)
    chosen, context = measured.options.knn_segmentation, measured.context
    segmenter = Segmenter(measured.encoder, context, "knn_segmentation", chosen.size, chosen.stride)
    memory = remember(segmenter, train, chosen)
    counts = segmenter.count({"": memory}, test, "test")[""]
    segmenter.draw(memory, test)
    settings = {**asdict(chosen), "patches remembered": len(memory.features)}
    return [miou_row(measured, counts, {}, variant=f"k = {chosen.k}", n_train=len(train), settings=settings)]


class Memory(nn.Module):
    """What is known of patches.

    features  (n, D) of norm 1
    labels    (n, K) the share of a patch's pixels that each class has
    """

    def __init__(self, features: Tensor, labels: Tensor, k: int, temperature: float) -> None:
        super().__init__()
        self.features, self.labels, self.k, self.temperature = features, labels, min(k, len(labels)), temperature

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps of patch tokens (B, D, h, w) -> shares of the classes (B, K, h, w), float32."""
        cosines, rows = nearest_neighbours(self.features, tokens.flatten(2).mT.flatten(0, 1), self.k)
        weights = (cosines / self.temperature).softmax(dim=-1)
        shares = torch.einsum("qk,qkc->qc", weights, self.labels[rows].float())
        return shares.unflatten(0, (len(tokens), *tokens.shape[2:])).movedim(-1, 1)


@torch.no_grad()
def remember(segmenter: Segmenter, train: Segmented, chosen: KnnSegmentationOptions) -> Memory:
    """A memory of training images; raises as `evaluate`."""
    encoder, context = segmenter.encoder, segmenter.context
    images = np.linspace(0, len(train) - 1, min(len(train), chosen.memory)).astype(int).tolist()
    features, labels = [], []
    loaded = parallel(lambda index: segmenter.load(train, index), images, context.workers)
    for index, (pixels, mask) in zip(images, context.progress(loaded, len(images), f"memory ({encoder.name})")):
        windows, tokens = segmenter.tokens(pixels, train.source.name(index))
        shown = Image.fromarray(mask).resize((pixels.shape[1], pixels.shape[0]), Image.Resampling.NEAREST)
        shares = class_shares(
            windows.cut(torch.from_numpy(np.array(shown))[None]), encoder.patch_size, train.num_classes
        )
        known = shares.any(dim=1).nonzero()[:, 0].numpy()
        rows = torch.from_numpy(generator(context.seed, index).permutation(known)[: chosen.memory // len(images)])
        found = tokens.flatten(2).mT.flatten(0, 1)[rows.to(tokens.device)]
        features.append(F.normalize(found, dim=-1).half())  # a cosine is off by some 1e-5
        labels.append(shares[rows].half())
    if not sum(map(len, labels)):
        raise UserError("no training image has a pixel of a class")
    return Memory(torch.cat(features), torch.cat(labels).to(encoder.device), chosen.k, chosen.temperature)


def class_shares(masks: Tensor, patch_size: int, num_classes: int) -> Tensor:
    """The share of each class among the pixels of every patch that are not ignored; 0 where all are.

    masks    (B, 1, H, W) uint8, padded centrally to whole patches as their images are
    returns  (B N, K) float32
    """
    padded = centre_pad(masks, patch_size, (IGNORED,))[:, 0]
    patches = padded.unfold(1, patch_size, patch_size).unfold(2, patch_size, patch_size).flatten(3).flatten(0, 2).long()
    counts = torch.zeros(len(patches), IGNORED + 1).scatter_add_(1, patches, torch.ones(patches.shape))[:, :num_classes]
    return counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
