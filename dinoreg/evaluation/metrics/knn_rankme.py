"""Two label-light measures of a set of features, used inside a run and by the evaluators.

`rankme` is the effective rank of Garrido et al. (RankMe, arXiv 2210.02885, eq. 1), which needs no labels;
`knn_predict` is DINO's weighted nearest-neighbour vote (Wu et al., arXiv 1805.01978).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TRAIN_CHUNK, TEST_CHUNK = 65_536, 256  # rows that are compared at once


@torch.no_grad()
def rankme(features: Tensor, eps: float = 1e-7) -> float:
    """Effective rank (RankMe, eq. 1): the exponential of the entropy of the normalised singular values.

    features  (n, D), not centred, as in the paper; ValueError for any other shape and for n = 0
    eps       added to every normalised singular value
    returns   1 for features on one line, min(n, D) when all directions carry the same;
              0 when every feature is zero, NaN when one is not finite
    """
    with torch.autocast(features.device.type, enabled=False):
        x = features.float() if features.device.type == "mps" else features.double()
        if not torch.isfinite(x).all():
            return float("nan")
        # From the Gram matrix, on the CPU: a decomposition on a GPU waits for the host at every sweep. In doubles
        # a value is exact to a hundred-millionth of the largest.
        gram = x @ x.mT if x.shape[0] < x.shape[1] else x.mT @ x
        singular = torch.linalg.eigvalsh(gram.cpu()).clamp(min=0).sqrt()  # (min(n, D),)
        total = singular.sum()
        if total == 0:
            return 0.0
        p = singular / total + eps
        return float((-(p * p.log()).sum()).exp())


@torch.no_grad()
def knn_predict(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    num_classes: int,
    k: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
) -> dict[int, Tensor]:
    """Weighted k-NN on the unit sphere, for several k in one pass (Wu et al., arXiv 1805.01978, as in DINO).

    The cosine similarities of the max(k) nearest training features go through one softmax(similarity /
    temperature); for each k the votes are sums of the first k weights by class. A k above n takes all n.

    train_features (n, D), train_labels (n,) integers in [0, num_classes), test_features (m, D), of any norm
    returns        {k: votes (m, num_classes)} float32 on the features' device; `votes.argmax(-1)` predicts
    """
    device = train_features.device
    labels = train_labels.to(device=device, dtype=torch.long)
    with torch.autocast(device.type, enabled=False):
        similarity, index = nearest_neighbours(train_features, test_features, min(max(k), len(labels)))
        weights = (similarity / temperature).softmax(dim=-1)  # (m, most), best first
        votes = {}
        for each in k:
            scores = weights.new_zeros(len(weights), num_classes)
            votes[each] = scores.scatter_add_(1, labels[index[:, :each]], weights[:, :each])
    return votes


@torch.no_grad()
def nearest_neighbours(train_features: Tensor, test_features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k training features of greatest cosine to each test feature, best first.

    train_features (n, D), test_features (m, D); either may be memory-mapped: chunks of rows are read, never all
    returns        cosines (m, k) float32 and rows (m, k) int64, on the training features' device
    """
    device, m = train_features.device, len(test_features)
    best = torch.empty(m, 0, device=device)
    index = torch.empty(m, 0, dtype=torch.long, device=device)
    for first in range(0, len(train_features), TRAIN_CHUNK):
        bank = F.normalize(train_features[first : first + TRAIN_CHUNK].to(device).float(), dim=-1)
        values, rows = [], []
        for queries in test_features.split(TEST_CHUNK):
            found = (F.normalize(queries.to(device).float(), dim=-1) @ bank.mT).topk(min(k, len(bank)), dim=1)
            values.append(found.values)
            rows.append(found.indices + first)
        if not values:
            break
        best, index = torch.cat([best, torch.cat(values)], 1), torch.cat([index, torch.cat(rows)], 1)
        best, order = best.topk(min(k, best.shape[1]), dim=1)
        index = index.gather(1, order)
    return best, index
