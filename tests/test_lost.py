"""LOST: against a literal version of the paper, on planted objects, and where its assumptions fail."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dinoreg.evaluation.dense.lost import by_degree, component, expand, gram, lost


def literal(a: np.ndarray, rows: int, columns: int, k: int) -> tuple[int, list[int], set[int]]:
    """Seed, patches that join it, and connected component (paper §3)."""
    n = rows * columns
    degree = [sum(1 for q in range(n) if q != p and a[p, q] > 0) for p in range(n)]
    ranked = sorted(range(n), key=lambda p: (degree[p], p))
    seed = ranked[0]
    similar = [q for q in ranked[:k] if a[seed, q] > 0]
    inside = {p for p in range(n) if sum(a[q, p] for q in similar) > 0}
    if seed not in inside:
        return seed, similar, {seed}
    reached, edge = {seed}, [seed]
    while edge:
        row, column = divmod(edge.pop(), columns)
        for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            p = r * columns + c
            if 0 <= r < rows and 0 <= c < columns and p in inside and p not in reached:
                reached.add(p)
                edge.append(p)
    return seed, similar, reached


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("bias", [0.0, -0.6, 0.3])
def test_lost_equals_the_papers_steps_patch_by_patch(seed: int, bias: float) -> None:
    rows, columns, k = 5, 7, 9
    # Few dimensions and whole numbers: exact sums, and zeros among the products.
    features = torch.from_numpy(np.random.default_rng(seed).integers(-2, 3, (rows * columns, 3))).double()
    similarity = gram(features) + bias * 4
    found = lost(similarity, (rows, columns), k)
    start, similar, part = literal(similarity.numpy(), rows, columns, k)
    assert found.seed == start
    assert expand(similarity, by_degree(similarity), k).tolist() == similar
    assert set(np.flatnonzero(found.mask)) == part
    ys, xs = [p // columns for p in part], [p % columns for p in part]
    assert found.box == (min(xs), min(ys), max(xs) + 1, max(ys) + 1)


def planted(rows: int, columns: int, box: tuple[int, int, int, int], noise: float = 0.05) -> torch.Tensor:
    """Features (N, 6): the ground points one way, the object in `box` the opposite one."""
    generator = torch.Generator().manual_seed(0)
    ground, thing = torch.eye(6)[0], -0.5 * torch.eye(6)[0] + torch.eye(6)[1]
    features = ground.repeat(rows, columns, 1)
    x0, y0, x1, y1 = box
    features[y0:y1, x0:x1] = thing
    return (features + noise * torch.randn(features.shape, generator=generator)).flatten(0, 1)


@pytest.mark.parametrize("box", [(2, 1, 5, 4), (0, 0, 3, 2), (6, 3, 9, 8)])
@pytest.mark.parametrize("normalise", [False, True])
def test_a_planted_object_is_found_exactly(box: tuple[int, int, int, int], normalise: bool) -> None:
    found = lost(gram(planted(8, 9, box), normalise), (8, 9))
    assert found.box == box
    assert found.mask.sum() == (box[2] - box[0]) * (box[3] - box[1])


def test_of_two_like_objects_only_the_one_that_holds_the_seed_is_boxed() -> None:
    features = planted(6, 12, (1, 1, 3, 3))
    twin = planted(6, 12, (8, 2, 11, 5))
    both = torch.where((planted(6, 12, (8, 2, 11, 5), 0)[:, 1:2] > 0), twin, features)
    found = lost(gram(both), (6, 12))
    assert found.box in ((1, 1, 3, 3), (8, 2, 11, 5))
    assert len(expand(gram(both), by_degree(gram(both)))) == 4 + 9


def test_all_positive_similarities_give_the_whole_image_and_a_bias_brings_the_object_back() -> None:
    features = planted(8, 9, (2, 1, 5, 4)) + 3.0  # a shared direction, as of a model with artifacts
    similarity = gram(features, normalise=True)
    assert bool((similarity > 0).all())
    assert lost(similarity, (8, 9)).box == (0, 0, 9, 8)
    threshold = float(similarity.min() + similarity.max()) / 2
    assert lost(similarity - threshold, (8, 9)).box == (2, 1, 5, 4)


def test_a_bias_that_leaves_nothing_alike_falls_back_to_the_seed_patch() -> None:
    similarity = gram(planted(4, 5, (1, 1, 3, 3)), normalise=True) - 2.0
    found = lost(similarity, (4, 5))
    assert found.mask.sum() == 1
    assert found.box == (0, 0, 1, 1)  # all degrees are 0: the first patch is the seed
    assert len(expand(similarity, by_degree(similarity))) == 0


def test_a_patchs_similarity_to_itself_counts_for_joining_but_not_for_its_degree() -> None:
    similarity = torch.tensor([[5.0, 1.0, 1.0], [1.0, 5.0, -1.0], [1.0, -1.0, -5.0]])
    assert by_degree(similarity).tolist() == [1, 2, 0]  # degrees 2, 1, 1: the earlier first
    assert expand(similarity, torch.tensor([1, 2, 0])).tolist() == [1, 0]
    assert expand(similarity, torch.tensor([1, 2, 0]), k=2).tolist() == [1]
    assert expand(similarity, torch.tensor([2, 1, 0])).tolist() == [0]


def test_patches_that_touch_at_a_corner_are_not_connected() -> None:
    mask = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 1]], dtype=bool)
    assert np.argwhere(component(mask, (1, 1))).tolist() == [[1, 1], [1, 2], [2, 2]]
    assert np.argwhere(component(mask, (2, 0))).tolist() == [[2, 0]]


def test_gram_holds_inner_products_or_cosines() -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    products, cosines = gram(x), gram(x, normalise=True)
    for p in range(5):
        for q in range(5):
            assert products[p, q] == pytest.approx(float(x[p] @ x[q]), abs=1e-6)
            assert cosines[p, q] == pytest.approx(float(x[p] @ x[q] / (x[p].norm() * x[q].norm())), abs=1e-6)
