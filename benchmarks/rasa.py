"""RASA on real weights: do patch features segment better when what predicts their place is removed from them?

    python benchmarks/rasa.py WEIGHTS PHOTOGRAPHS

RASA (Franca, arXiv 2507.14137) predicts the row and the column of a patch from its token after the final norm, by a
linear head through a sigmoid; removes the plane that the head's two rows span; and begins again with what is left. What
comes of it is one projection (D, D). Here it is learned on photographs without labels and judged on the embedded
scenes, whose masks are exact: how well a place is still predicted, how much nearer than by chance the nearest patches
of other images lie, and three segmentations (nearest neighbours, logistic regression, clusters named by majority).
Differences are paired: the same scenes, patches, folds and cluster starts before and after.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import measure
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinoreg.data.center_crop import to_encoder
from dinoreg.data.decode import decode
from dinoreg.evaluation.backbones.encoder import Encoder
from dinoreg.evaluation.backbones.open import open_native
from dinoreg.evaluation.metrics.bootstrap import paired_difference, resample
from dinoreg.evaluation.metrics.knn_rankme import nearest_neighbours
from dinoreg.evaluation.metrics.miou import Confusion, count_pixels
from dinoreg.evaluation.protocols.knn_segmentation import class_shares
from dinoreg.evaluation.solvers.regularisation_path import select_and_fit
from dinoreg.scenes.render import NUM_CLASSES, render
from dinoreg.visualize.subject import crops_of, open_images

FIRST_SCENE = 70_000_000  # scenes that no other part of the program draws
CLASSES = 1 + NUM_CLASSES  # of pixels: background is one
WAYS = {"3 planes": 3, "10 planes": 10}  # 10 is the paper's: nine, and the head that was learned last
RIDGE = 1e-3  # of the mean eigenvalue, when a place is predicted after the fact
CS = (1e-4, 1e-3, 1e-2)  # inverse L2 strengths
K, TEMPERATURE, CLUSTERS = 30, 0.02, 64


def places(grid: tuple[int, int]) -> Tensor:
    """Row and column of every patch in [0, 1], (N, 2)."""
    axes = [torch.linspace(0, 1, count) for count in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)


def predicting_head(features: Tensor, targets: Tensor) -> Tensor:
    """The head (2, D) that predicts places from features (n, D) with the least squared error, through a sigmoid."""
    head = torch.zeros(2, features.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS([head], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.mse_loss(F.linear(features, head).sigmoid(), targets)
        value.backward()
        return value

    solver.step(loss)
    return head.detach()


def position_planes(features: Tensor, targets: Tensor, rounds: int) -> Tensor:
    """The directions that predict places, orthonormal (2 rounds, D), two by two.

    features  (n, D)
    targets   (n, 2) row and column in [0, 1]
    """
    basis = features.new_zeros(0, features.shape[1])
    for _ in range(rounds):
        for direction in predicting_head(features, targets):
            rest = direction - basis.T @ (basis @ direction)
            basis = torch.cat([basis, F.normalize(rest, dim=0)[None]])
        plane = basis[-2:]
        features = features - features @ plane.T @ plane
    return basis


def encode(encoder: Encoder, images: Tensor) -> Tensor:
    """Patch tokens after the final norm (n, N, D) of images (n, C, H, W)."""
    return torch.cat([encoder.tokens(batch).patches for batch in images.split(8)])


class Scenes:
    """Scenes with their patches, the shares of classes in them, and the masks."""

    def __init__(self, encoder: Encoder, first: int, count: int, size: int) -> None:
        scenes = [render(first + number, size) for number in range(count)]
        self.masks = np.stack([scene.segmentation for scene in scenes])
        self.patches = encode(encoder, torch.stack([decode(scene.image, 3) for scene in scenes]))  # (n, N, D)
        shares = class_shares(torch.from_numpy(self.masks)[:, None], encoder.patch_size, CLASSES)
        self.shares = shares.unflatten(0, self.patches.shape[:2])  # (n, N, K)
        self.grid = encoder.grid(size, size)


def segmented(test: Scenes, shares: Tensor) -> Confusion:
    """Counts of pixels of the test scenes, from shares of classes (n, N, K) at their patches."""
    maps = shares.mT.unflatten(2, test.grid)
    size = test.masks.shape[1:]
    found = (F.interpolate(each[None], size, mode="bilinear")[0].argmax(dim=0).numpy() for each in maps)
    return Confusion(CLASSES, [count_pixels(mask, label, CLASSES) for mask, label in zip(test.masks, found)])


def clusters(features: Tensor, generator: torch.Generator) -> Tensor:
    """Spherical k-means: centres of norm 1 (CLUSTERS, D) of features of norm 1."""
    centres = features[torch.randperm(len(features), generator=generator)[:CLUSTERS]]
    for _ in range(30):
        nearest = (features @ centres.T).argmax(dim=1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, features)
        centres = torch.where(sums.any(dim=1, keepdim=True), F.normalize(sums, dim=1), centres)
    return centres


def judge(train: Scenes, test: Scenes, projection: Tensor, rows: Tensor, seed: int) -> dict[str, Any]:
    """What patches know when they are multiplied by a projection (D, D).

    rows     which of the training scenes' patches are learned from
    returns  figures by name; segmentations as `Confusion`
    """
    known, asked = (each.patches.flatten(0, 1) @ projection for each in (train, test))
    where = places(train.grid)
    of_known, of_asked = (where.repeat(len(each.masks), 1) for each in (train, test))
    known, of_known, shares = known[rows], of_known[rows], train.shares.flatten(0, 1)[rows]

    mean, centre = known.mean(dim=0), of_known.mean(dim=0)
    gram = ((known - mean).T @ (known - mean)).double()
    ridge = RIDGE * gram.trace() / len(gram) * torch.eye(len(gram), dtype=torch.float64)
    weight = torch.linalg.solve(gram + ridge, ((known - mean).T @ (of_known - centre)).double()).float()
    errors = (asked - mean) @ weight + centre - of_asked
    position = 1 - errors.square().sum() / (of_asked - of_asked.mean(dim=0)).square().sum()

    cosines, nearest = nearest_neighbours(known, asked, K)
    weights = (cosines / TEMPERATURE).softmax(dim=1)[..., None]
    chance = torch.cdist(of_asked[:: max(len(of_asked) // 500, 1)], of_known).mean()
    distance = (of_known[nearest[:, :5]] - of_asked[:, None]).norm(dim=-1).mean() / chance

    probe = select_and_fit(known, shares.argmax(dim=1), CLASSES, CS, seed=seed, standardize=True).model
    unit = F.normalize(known, dim=1)
    centres = clusters(unit, torch.Generator().manual_seed(seed))
    names = torch.zeros(CLUSTERS, CLASSES).index_add_(0, (unit @ centres.T).argmax(dim=1), shares)
    of_cluster = F.one_hot(names.argmax(dim=1), CLASSES).float()[(F.normalize(asked, dim=1) @ centres.T).argmax(dim=1)]
    found = {
        "k-NN": (weights * shares[nearest]).sum(dim=1),
        "linear": probe.logits(asked).softmax(dim=1),
        "clusters": of_cluster,
    }
    shape = test.shares.shape[:2]
    maps = {name: segmented(test, each.unflatten(0, shape)) for name, each in found.items()}
    return {"position R2": float(position), "distance of neighbours": float(distance), **maps}


def compared(before: dict[str, Any], after: dict[str, Any], samples: int) -> dict[str, Any]:
    """Every figure before and after, and of segmentations the interval of the difference, in points of mIoU."""
    rows: dict[str, Any] = {}
    for name, one in before.items():
        other = after[name]
        if not isinstance(one, Confusion):
            rows[name] = {"before": one, "after": other}
            continue
        drawn = [*resample(one.num_images, samples)]
        replicates = ([100 * each.miou(weights) for weights in drawn] for each in (other, one))
        interval = paired_difference(*replicates)
        rows[name] = {"before": 100 * one.miou(), "after": 100 * other.miou(), "low": interval.low}
        rows[name]["high"] = interval.high
    return rows


def run(weights: str, photographs: str, seeds: Sequence[int], size: int, counts: Sequence[int], samples: int) -> Any:
    """Tables of `compared` by way and seed; counts are of photographs, training scenes, test scenes, and patches."""
    encoder = open_native(weights, "cpu").encoder
    num_photographs, num_train, num_test, num_patches = counts
    crops, _ = crops_of(open_images(photographs), encoder.preprocessing.at(size), num_photographs)
    unlabelled = encode(encoder, to_encoder([*crops.values()]))
    where = places(encoder.grid(size, size))
    tables: dict[str, Any] = {}
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(unlabelled.shape[0] * len(where), generator=generator)[:num_patches]
        targets = where.repeat(len(unlabelled), 1)[chosen]
        basis = position_planes(unlabelled.flatten(0, 1)[chosen], targets, max(WAYS.values()))
        first = FIRST_SCENE + seed * (num_train + num_test)
        train = Scenes(encoder, first, num_train, size)
        test = Scenes(encoder, first + num_train, num_test, size)
        rows = torch.randperm(train.patches.shape[0] * len(where), generator=generator)[:num_patches]
        before = judge(train, test, torch.eye(encoder.dim), rows, seed)
        for way, planes in WAYS.items():
            projection = torch.eye(encoder.dim) - basis[: 2 * planes].T @ basis[: 2 * planes]
            after = judge(train, test, projection, rows, seed)
            tables[f"{way}, seed {seed}"] = compared(before, after, samples)
            print(way, seed, tables[f"{way}, seed {seed}"], flush=True)
    return tables


def main() -> None:
    options = measure.parser(__doc__)
    options.add_argument("weights", nargs="?", help="a ViT without registers")
    options.add_argument("photographs", nargs="?", help="a folder of pictures to learn the planes from")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options.add_argument("--size", type=int, default=224)
    given = options.parse_args()
    if given.short:
        tables = run("random:vitt8_reg0", "scenes", [0], 64, (8, 8, 4, 256), 20)
    else:
        tables = run(given.weights, given.photographs, given.seeds, given.size, (300, 240, 160, 20_000), 500)
    lines = ["| planes removed | figure | before | after | difference |", "| --- | --- | --- | --- | --- |"]
    for way, rows in tables.items():
        for name, row in rows.items():
            change = f"{row['after'] - row['before']:+.2f}"
            change += f" [{row['low']:.2f}, {row['high']:.2f}]" if "low" in row else ""
            lines.append(f"| {way} | {name} | {row['before']:.2f} | {row['after']:.2f} | {change} |")
    measure.report(
        "rasa", {"weights": given.weights, "size": given.size, "seeds": given.seeds}, tables, "\n".join(lines)
    )


if __name__ == "__main__":
    main()
