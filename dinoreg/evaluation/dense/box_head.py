"""The linear box head: BatchNorm and one linear map from a patch token to classes, a box and a centre-ness.

No published head is purely linear in the patch, so this one is FCOS (Tian et al., arXiv 1904.01355) without its towers
and pyramid: a patch is assigned the box that its centre lies in, the smallest where there are several.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image, generalized_box_iou_loss, sigmoid_focal_loss

BACKGROUND, IGNORED = -1, -2  # labels of patches without a class: negatives of the loss; left out of it
PRIOR = 0.01  # probability of every class at the start, so that the many background patches do not swamp the rest
CANDIDATES = 1000  # pairs of patch and class of an image that enter the suppression


class Answers(NamedTuple):
    """The head's outputs for M patches, float32."""

    logits: Tensor  # (M, C) of the classes, each on its own
    reach: Tensor  # (M, 4) left, top, right, bottom from the patch's centre to the box's sides, in patches, positive
    centredness: Tensor  # (M,) logit of how central the patch is in its box


class Targets(NamedTuple):
    """The training targets of M patches."""

    labels: Tensor  # (M,) int64: a class, BACKGROUND or IGNORED
    reach: Tensor  # (M, 4) float32 as in `Answers`; zeros without a class


class LinearBoxHead(nn.Module):
    """BatchNorm1d(dim) and Linear(dim, C + 5). Weights are drawn from `seed`.

    dim    D, width of the patch tokens
    reach  initial distance from a patch's centre to each side of its box, in patches
    """

    def __init__(self, dim: int, num_classes: int, reach: float = 3.0, seed: int = 0) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.norm = nn.BatchNorm1d(dim)
        self.linear = nn.Linear(dim, num_classes + 5)
        nn.init.normal_(self.linear.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.linear.bias)
        with torch.no_grad():
            self.linear.bias[:num_classes] = -math.log((1 - PRIOR) / PRIOR)
            self.linear.bias[num_classes : num_classes + 4] = math.log(math.expm1(reach))

    def forward(self, tokens: Tensor) -> Answers:
        """Patch tokens (M, D) float32, of any number of images one after the other -> Answers for each."""
        x = self.linear(self.norm(tokens))
        logits, reach, centredness = x.split([self.num_classes, 4, 1], dim=1)
        return Answers(logits, F.softplus(reach), centredness[:, 0])


def centres(grid: tuple[int, int], patch_size: int) -> Tensor:
    """(N, 2) float32 x and y of the patches' centres, in pixels of the padded image, row by row.

    grid        rows and columns of patches
    patch_size  pixels
    """
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return (torch.stack([x.flatten(), y.flatten()], dim=1) + 0.5) * patch_size


def assign(
    points: Tensor, patch_size: int, size: tuple[int, int], boxes: np.ndarray, labels: np.ndarray, ignored: np.ndarray
) -> Targets:
    """The targets of an image's patches, by FCOS §3.1: which box each is assigned to, if any.

    points   (N, 2) float32 x and y of the patches' centres, in pixels
    size     (height, width) of the image before padding; a patch whose centre is in the padding is ignored
    boxes    (k, 4) x0, y0, x1, y1 in pixels; those that are empty are left out
    labels   (k,) int64 classes
    ignored  (k,) bool: difficult objects and crowds: no patch is assigned to them, but one inside is no background
    returns  Targets of N patches, distances in patches
    """
    outside = (points[:, 0] >= size[1]) | (points[:, 1] >= size[0])
    targets = Targets(torch.full((len(points),), BACKGROUND), torch.zeros(len(points), 4))
    corners = torch.from_numpy(np.asarray(boxes, dtype=np.float32).reshape(-1, 4))
    if len(corners):
        # (N, k, 4): from the centre to the left, the top, the right and the bottom.
        reach = torch.cat([points[:, None] - corners[None, :, :2], corners[None, :, 2:] - points[:, None]], dim=2)
        inside = reach.min(dim=2).values > 0
        uncounted = torch.from_numpy(np.asarray(ignored, dtype=bool))
        targets.labels[(inside & uncounted).any(dim=1)] = IGNORED
        area = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
        smallest = torch.where(inside & ~uncounted, area, torch.inf).min(dim=1)
        owner = torch.isfinite(smallest.values)
        index = smallest.indices[owner]
        targets.labels[owner] = torch.from_numpy(np.asarray(labels, dtype=np.int64))[index]
        targets.reach[owner] = reach[owner, index] / patch_size
    targets.labels[outside] = IGNORED
    targets.reach[outside] = 0.0
    return targets


def centre_ness(reach: Tensor) -> Tensor:
    """FCOS eq. 3: 1 in the middle of the box, 0 on its edge.

    reach    (M, 4) distances to left, top, right and bottom, positive, in any unit
    returns  (M,) in [0, 1]
    """
    across, along = reach[:, [0, 2]], reach[:, [1, 3]]
    share = (across.amin(1) / across.amax(1)) * (along.amin(1) / along.amax(1))
    return share.clamp(0, 1).sqrt()


def around(points: Tensor | float, reach: Tensor) -> Tensor:
    """Boxes x0, y0, x1, y1 around points.

    points   (M, 2) x and y, or one number for both
    reach    (M, 4) distances to left, top, right and bottom, in the unit of `points`
    returns  (M, 4)
    """
    return torch.cat([points - reach[:, :2], points + reach[:, 2:]], dim=1)


def box_loss(answers: Answers, targets: Targets) -> Tensor:
    """FCOS's loss: focal loss over the patches; GIoU weighted by centre-ness, and centre-ness, over those in objects.

    Focal loss (arXiv 1708.02002) with alpha 0.25 and gamma 2; GIoU: arXiv 1902.09630. Patches with the label IGNORED
    must have been left out. Focal loss and centre-ness are divided by the number of patches in objects, GIoU by the sum
    of their centre-ness.

    answers, targets  of M patches
    returns           () float32; the focal part alone where no patch is in an object
    """
    with torch.autocast(answers.logits.device.type, enabled=False):
        positive = targets.labels >= 0
        count = positive.sum().clamp(min=1)
        one_hot = torch.zeros_like(answers.logits)
        one_hot[positive, targets.labels[positive]] = 1.0
        loss = sigmoid_focal_loss(answers.logits, one_hot, reduction="sum") / count
        if not bool(positive.any()):
            return loss
        reach = targets.reach[positive]
        central = centre_ness(reach)
        apart = generalized_box_iou_loss(around(0.0, answers.reach[positive]), around(0.0, reach))
        loss = loss + (apart * central).sum() / central.sum().clamp(min=1e-6)
        return loss + F.binary_cross_entropy_with_logits(answers.centredness[positive], central)


def detect(
    answers: Answers,
    points: Tensor,
    patch_size: int,
    size: tuple[int, int],
    scale: Sequence[float],
    nms: float,
    max_boxes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """An image's boxes from its patches' outputs, highest score first.

    answers  of M patches
    points   (M, 2) centres of these patches, in pixels of the resized image
    size     (height, width) of the resized image, to which boxes are clipped
    scale    resized over original pixels, along x and along y: boxes are returned in original pixels
    nms      overlap (IoU) in [0, 1] above which the lower scored of two boxes of a class goes
    returns  boxes (k, 4) float32, labels (k,) int64, scores (k,) float32 in [0, 1], k <= max_boxes, on the CPU
    """
    # Classes say what, centre-ness how well a patch is placed to say where: the geometric mean of both ranks the boxes.
    scores = (answers.logits.sigmoid() * answers.centredness.sigmoid()[:, None]).sqrt()
    best = scores.flatten().topk(min(CANDIDATES, scores.numel()))
    patch, labels = best.indices // scores.shape[1], best.indices % scores.shape[1]
    boxes = around(points.to(scores.device)[patch], answers.reach[patch] * patch_size)
    boxes = clip_boxes_to_image(boxes, size)
    boxes = boxes / boxes.new_tensor((*scale, *scale))
    remaining = batched_nms(boxes, best.values, labels, nms)[:max_boxes]
    return boxes[remaining].cpu(), labels[remaining].cpu(), best.values[remaining].cpu()
