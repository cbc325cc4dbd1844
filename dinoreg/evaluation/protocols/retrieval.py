"""Instance retrieval: a query ranks the images of a database by the cosines of frozen features.

Queries and annotation are Revisited Oxford's and Paris' (Radenovic et al., CVPR 2018): Medium counts easy and hard
images as found, Hard only hard ones; what is easy there, and junk everywhere, counts neither way. A picture is seen
whole, at its own aspect ratio. Rows are those of the class token (DINOv2, section 7.3), and of the generalised mean of
the patches (GeM), of values above 0 as in networks that end in a ReLU.
"""

from types import MappingProxyType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinoreg.evaluation.data import Searched
from dinoreg.evaluation.dense.windows import fit_size, pad_to_patches
from dinoreg.evaluation.features.cache import require_finite
from dinoreg.evaluation.features.images import read_picture, resized, size_of, to_array
from dinoreg.evaluation.metrics.average_precision import Ranking
from dinoreg.evaluation.metrics.bootstrap import bootstrap_interval
from dinoreg.evaluation.protocols.measurement import Measurement, resumable_map
from dinoreg.evaluation.result import Row

LEVELS = MappingProxyType({"Medium": ((1, 2), (-1,)), "Hard": ((2,), (1, -1))})  # to be found, counted neither way
POWER, LEAST = 3.0, 1e-6  # of the generalised mean, and of the values that it is taken of
MISSING = "retrieval needs a {name} split of images; the dataset has {splits}"


def evaluate(measured: Measurement) -> list[Row]:
    """mAP in [0, 1] on Medium and Hard, by the class token and then by the generalised mean of the patches.

    raises  UserError for another metric, a missing split, and an image that cannot be read; RunError where a feature is
            not finite
    """
    measured.check_metric("retrieval", ("mAP",))
    queries, database = (measured.split(name, Searched, MISSING) for name in ("test", "database"))
    asked, known = _described(measured, queries, "queries"), _described(measured, database, "database")
    rows = []
    for kind, own, others in zip(("class token", "GeM"), asked, known):
        cosines = (own @ others.mT).numpy()
        for level, (wanted, neither) in LEVELS.items():
            precisions = average_precisions(cosines, queries.relevance, wanted, neither)
            found = precisions[np.isfinite(precisions)]  # a query that has nothing to find says nothing
            shared = {"n_test": len(found), "settings": {"size": measured.options.retrieval.size}}
            shared["details"] = {"AP": precisions.tolist(), "images": len(database)}
            interval = bootstrap_interval(found, seed=measured.context.seed)
            rows.append(measured.row(float(found.mean()), interval, variant=f"{kind}, {level}", **shared))
    return rows


def average_precisions(
    cosines: np.ndarray, relevance: np.ndarray, wanted: tuple[int, ...], neither: tuple[int, ...]
) -> np.ndarray:
    """The average precision of each query (q,) in [0, 1], by trapezoids as Oxford's; NaN where it has nothing to find.

    cosines, relevance  (q, n) of queries and images; equal cosines are one rank, whatever their order
    wanted, neither     values of `relevance` that are to be found, and that count neither way
    """
    rankings = map(Ranking, cosines, np.isin(relevance, wanted), np.isin(relevance, neither))
    return np.array([ranking.curve().average("trapezoid") for ranking in rankings])


def _described(measured: Measurement, split: Searched, name: str) -> list[Tensor]:
    """Class tokens and generalised means of patches of a split's images, of norm 1: two of (n, D) float32."""
    encoder, settings = measured.encoder, measured.options.retrieval

    def load(index: int) -> np.ndarray:
        picture = read_picture(split.source, index)
        return to_array(resized(picture, *fit_size(*size_of(picture), settings.size, settings.size)))

    def compute(index: int, pixels: np.ndarray) -> list[Tensor]:
        tokens = encoder.tokens(pad_to_patches(pixels, encoder.patch_size, encoder.preprocessing.mean)[None])
        require_finite(tokens.patches, [split.source.name(index)], encoder)
        mean = tokens.patches.clamp(min=LEAST).pow(POWER).mean(dim=1).pow(1 / POWER)
        return [F.normalize(each[0], dim=-1).cpu() for each in (tokens.cls, mean)]

    key = (encoder.identity, encoder.dtype, split.source.stamp(), settings)
    what = f"features of the {name} ({encoder.name})"
    found = resumable_map(measured.context, f"retrieval_{name}", key, len(split), compute, what, load)
    return [torch.stack(each) for each in zip(*found)]
