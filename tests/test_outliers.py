"""Outliers, where they sit, what tokens hold: measurements against literal forms and planted cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from planted import BLOCK, patchy_images, planted_vit
from scipy.stats import median_abs_deviation
from sklearn.linear_model import LogisticRegression

from dinoreg.evaluation.backbones.encoder import wrap
from dinoreg.models.vit import RegisterViT
from dinoreg.registers.outliers import (
    border,
    find_outliers,
    low_information,
    mean_cosine,
    neighbour_cosine,
    onset,
    pick_patches,
    robust_limit,
)
from dinoreg.registers.token_probes import moments, probe_token, replaced, replacement
from dinoreg.visualize.norms import log_histogram


def lognormal(count: int, median: float, deviation: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return median * (deviation * torch.randn(count, generator=generator)).exp()


def test_the_limit_is_the_median_times_four_robust_deviations_of_the_logarithms() -> None:
    norms = lognormal(4001, 30.0, 0.3)
    limit = robust_limit(norms)
    logs = np.log(norms.double().numpy())
    deviation = 1.4826 * median_abs_deviation(logs)
    assert limit.median == pytest.approx(float(norms.median()), rel=1e-6)
    assert limit.deviation == pytest.approx(deviation, rel=1e-6)
    assert limit.value == pytest.approx(math.exp(np.median(logs) + 4 * deviation), rel=1e-5)


def test_a_narrow_bulk_has_its_limit_at_twice_the_median() -> None:
    assert robust_limit(lognormal(999, 40.0, 0.01)).value == pytest.approx(80.0, rel=0.01)
    assert robust_limit(torch.full((9,), 3.0)).value == pytest.approx(6.0)


def test_the_limit_does_not_care_about_the_scale_and_hardly_about_the_outliers() -> None:
    norms = lognormal(5000, 20.0, 0.2)
    assert robust_limit(norms * 7).value == pytest.approx(7 * robust_limit(norms).value, rel=1e-6)
    with_outliers = torch.cat([norms, lognormal(125, 300.0, 0.1, seed=1)])
    assert robust_limit(with_outliers).value < 1.1 * robust_limit(norms).value


# Scales read off the paper's figures: (median and log deviation of the bulk, of the outliers).
@pytest.mark.parametrize(
    ("bulk", "outliers"),
    [((50.0, 0.25), (450.0, 0.2)), ((55.0, 0.05), (290.0, 0.08)), ((440.0, 0.15), (1150.0, 0.09))],
    ids=["DINOv2-g", "OpenCLIP", "DeiT-III"],
)
def test_a_second_group_at_the_published_scales_is_found(
    bulk: tuple[float, float], outliers: tuple[float, float]
) -> None:
    norms = torch.cat([lognormal(20_000, *bulk), lognormal(480, *outliers, seed=1)])
    found = find_outliers(norms, robust_limit(norms))
    assert found.kind == "group"
    assert found.share == pytest.approx(480 / 20_480, rel=0.03)
    assert found.ratio == pytest.approx(outliers[0] / bulk[0], rel=0.1)


def test_a_clean_bulk_has_no_outliers_and_a_heavy_tail_is_called_a_tail() -> None:
    clean = lognormal(50_000, 20.0, 0.25)
    assert find_outliers(clean, robust_limit(clean)).kind == "none"
    falling = clean * (torch.empty(50_000).exponential_(1 / 0.35)).exp()  # ever rarer, without a gap
    found = find_outliers(falling, robust_limit(falling))
    assert found.share > 0.002
    assert found.valley > 0.7
    assert found.kind == "tail"


def test_a_handful_of_large_norms_among_many_is_chance() -> None:
    norms = torch.cat([lognormal(20_000, 20.0, 0.1), torch.full((4,), 500.0)])
    found = find_outliers(norms, robust_limit(norms))
    assert (found.kind, found.patches) == ("none", 4)


def test_neighbour_cosine_equals_a_loop_over_the_four_neighbours() -> None:
    patches = torch.randn(2, 12, 5)
    found = neighbour_cosine(patches, (3, 4)).unflatten(1, (3, 4))
    grid = patches.unflatten(1, (3, 4))
    for row in range(3):
        for column in range(4):
            beside = [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
            cosines = [
                F.cosine_similarity(grid[1, row, column], grid[1, r, c], dim=0)
                for r, c in beside
                if 0 <= r < 3 and 0 <= c < 4
            ]
            torch.testing.assert_close(found[1, row, column], torch.stack(cosines).mean())
    assert neighbour_cosine(torch.randn(1, 1, 3), (1, 1)).item() == 1.0


def test_low_information_patches_are_the_quarter_most_like_their_neighbours() -> None:
    cosine = torch.randperm(40).float().view(4, 10)
    chosen = low_information(cosine)
    assert int(chosen.sum()) == 10
    assert float(cosine[chosen].min()) > float(cosine[~chosen].max())


def test_the_border_is_all_but_the_inside() -> None:
    assert int(border((4, 5)).sum()) == 20 - 2 * 3


def test_the_onset_is_the_first_block_that_tells_the_outliers_apart() -> None:
    outliers = torch.zeros(2, 6, dtype=torch.bool)
    outliers[0, 3] = outliers[1, 1] = True
    norms = torch.ones(4, 2, 6)
    norms[2:, outliers] = 5.0
    norms[1, outliers] = 1.9
    assert onset(norms, outliers) == 2
    assert onset(norms, torch.zeros_like(outliers)) is None


def test_a_patch_is_drawn_among_the_candidates_and_missing_ones_are_told() -> None:
    candidates = torch.rand(50, 9) < 0.2
    candidates[4] = False
    index, present = pick_patches(candidates, seed=1)
    assert not present[4]
    assert candidates[present, index[present]].all()
    assert len(set(index[present].tolist())) > 3


def test_mean_cosine_equals_the_mean_over_pairs() -> None:
    tokens = torch.randn(3, 4, 6)
    pairs = [
        F.cosine_similarity(tokens[b, i], tokens[b, j], dim=0) for b in range(3) for i in range(4) for j in range(i)
    ]
    assert mean_cosine(tokens) == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-6)
    assert mean_cosine(torch.ones(2, 3, 5)) == pytest.approx(1.0)


def test_the_histogram_counts_every_norm_once() -> None:
    norms = torch.rand(3, 4, 5) * 9 + 0.5
    edges = torch.linspace(1, 9, 9)
    shares = log_histogram(norms, edges)
    expected = np.histogram(norms[1].clamp(1 + 1e-6, 9 - 1e-6).numpy(), edges.numpy())[0] / 20
    np.testing.assert_allclose(shares[1].numpy(), expected)
    np.testing.assert_allclose(shares.sum(dim=1).numpy(), 1.0)


# ------------------------------------------------------------------------------------------------------------
# What tokens hold


def test_a_token_that_knows_the_class_is_told_from_one_that_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    knowing = F.one_hot(labels, 5).float() * 2 + 0.5 * torch.randn(300, 5, generator=generator)
    ignorant = torch.randn(300, 5, generator=generator)
    test = torch.arange(300) % 10 < 3
    known, unknown = (probe_token(each, labels, 3, test) for each in (knowing, ignorant))
    assert known is not None
    assert unknown is not None
    figures = known.record()
    assert figures["accuracy"] > 0.9
    assert unknown.row.value < 0.5
    assert (figures["n_train"], figures["n_test"]) == (210, 90)
    assert figures["low"] <= figures["accuracy"] <= figures["high"]
    assert known.against(unknown)["verdict"] == "better"  # type: ignore[index]
    assert unknown.against(known)["verdict"] == "worse"  # type: ignore[index]
    assert known.against(unknown)["difference"] == pytest.approx(known.row.value - unknown.row.value)  # type: ignore[index]
    some = probe_token(ignorant, labels, 3, test, torch.arange(300) < 250)
    assert some is not None
    assert known.against(some) is None  # of other images
    peer = LogisticRegression(max_iter=1000).fit(knowing[~test], labels[~test])
    assert known.row.value == pytest.approx(peer.score(knowing[test], labels[test]), abs=0.03)


def test_a_probe_says_nothing_on_too_few_images_or_one_class() -> None:
    features, labels = torch.randn(60, 4), torch.arange(60) % 2
    test = torch.arange(60) % 3 == 0
    few = torch.arange(60) < 25
    assert probe_token(features, labels, 2, test, few) is None
    assert probe_token(features, torch.zeros(60).long(), 2, test) is None
    assert probe_token(features, labels, 2, test) is not None


def test_replacements_are_what_they_say() -> None:
    contents = torch.randn(3, 8, 2, 5) * 2 + 1  # three blocks, eight images, two registers
    known = moments([contents[:, :3], contents[:, 3:]])
    torch.testing.assert_close(known[0], contents.mean(dim=1))
    torch.testing.assert_close(known[1], contents.std(dim=1, correction=0))
    assert replacement("zero", contents, known).abs().max() == 0
    mean = replacement("mean", contents, known)
    assert mean.shape == contents.shape
    torch.testing.assert_close(mean[2, 5, 1], contents[2, :, 1].mean(dim=0))
    shuffled = replacement("shuffle", contents, known)
    assert torch.equal(shuffled[:, 0], contents[:, 4])
    assert not torch.equal(shuffled[:, 0], contents[:, 0])
    many = torch.randn(1, 4000, 1, 3) * 2 + 1
    noise = replacement("noise", many, moments([many]), torch.Generator().manual_seed(1))
    torch.testing.assert_close(noise.mean(dim=1), many.mean(dim=1), atol=0.15, rtol=0)
    torch.testing.assert_close(noise.std(dim=1), many.std(dim=1), atol=0.1, rtol=0)


def test_tokens_replaced_by_their_own_content_change_nothing_and_others_arrive_after_the_last_block() -> None:
    model = planted_vit(registers=2)
    encoder = wrap(model, "planted")
    images = patchy_images(3)[0]
    layers = encoder.layers(images, range(model.depth), norm=False)
    contents = torch.stack([each.registers for each in layers])  # (L, B, R, D)
    where = torch.zeros(3, 1 + 2 + 64, dtype=torch.bool)
    where[:, 1:3] = True
    before = encoder.tokens(images)
    with replaced(model, where, contents.flatten(1, 2)):
        same = encoder.tokens(images)
    torch.testing.assert_close(same.cls, before.cls)
    torch.testing.assert_close(same.patches, before.patches)
    other = torch.randn_like(contents)
    with replaced(model, where, other.flatten(1, 2)):
        changed = encoder.tokens(images)
        inside = model.prenorm(encoder.prepare(images))
    torch.testing.assert_close(inside[:, 1:3], other[-1])
    torch.testing.assert_close(changed.registers, model.norm(other[-1]))
    assert (changed.cls - before.cls).abs().max() > 1e-4
    torch.testing.assert_close(encoder.tokens(images).cls, before.cls)  # the hooks are gone


def test_replaced_contents_equal_a_forward_pass_written_out() -> None:
    torch.manual_seed(0)
    model = RegisterViT(image_size=16, patch_size=8, dim=12, depth=3, heads=2, num_registers=1, layerscale=None)
    model.eval()
    x = torch.randn(2, 3, 16, 16)
    where = torch.zeros(2, 6, dtype=torch.bool)
    where[0, 3] = where[1, 5] = True
    contents = torch.randn(3, 2, 12)
    with torch.no_grad(), replaced(model, where, contents, first_block=1):
        found = model.prenorm(x)
    with torch.no_grad():
        tokens = model.embed(x)
        for number, block in enumerate(model.blocks):
            tokens = block(tokens.flatten(0, 1), ((2, 6),), ("plain",)).unflatten(0, (2, 6))
            if number >= 1:
                tokens[0, 3], tokens[1, 5] = contents[number, 0], contents[number, 1]
    torch.testing.assert_close(found, tokens)


def test_planted_outliers_lie_where_they_were_planted() -> None:
    encoder = wrap(planted_vit(), "planted")
    images, flat = patchy_images(8)
    layers = encoder.layers(images, range(encoder.depth), norm=False)
    norms = torch.stack([each.patches.norm(dim=-1) for each in layers])
    limit = robust_limit(norms[-1])
    assert torch.equal(norms[-1] > limit.value, flat)
    assert find_outliers(norms[-1], limit).kind == "group"
    assert onset(norms, flat) == BLOCK
