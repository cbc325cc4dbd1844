from __future__ import annotations

import numpy as np
import pytest

from dinoreg.data.sampler import Sampler
from dinoreg.data.source import Group
from dinoreg.runtime.errors import UserError


def test_every_epoch_holds_every_sample_once_in_another_order() -> None:
    ids, epochs = Sampler([Group(0, 37, 1.0)], seed=5).at(np.arange(3 * 37))
    assert epochs.tolist() == [0] * 37 + [1] * 37 + [2] * 37
    orders = ids.reshape(3, 37)
    assert all(sorted(order) == list(range(37)) for order in orders.tolist())
    assert len({tuple(order) for order in orders.tolist()}) == 3


def test_any_stretch_of_positions_can_be_asked_for_on_its_own() -> None:
    for groups in ([Group(0, 11, 1.0)], [Group(0, 7, 0.3), Group(7, 50, 0.7)]):
        whole = Sampler(groups, seed=2).at(np.arange(9000))
        part = Sampler(groups, seed=2).at(np.arange(4000, 4321))
        assert np.array_equal(part[0], whole[0][4000:4321])
        assert np.array_equal(part[1], whole[1][4000:4321])


def test_another_seed_gives_another_order() -> None:
    orders = [Sampler([Group(0, 100, 1.0)], seed).at(np.arange(100))[0].tolist() for seed in (0, 1)]
    assert orders[0] != orders[1]


def test_a_mixture_draws_by_weight_and_each_part_in_epochs_of_its_own() -> None:
    ids, epochs = Sampler([Group(0, 10, 0.75), Group(10, 1000, 0.25)], seed=0).at(np.arange(4096 * 3))
    small = ids < 10
    assert abs(small.mean() - 0.75) < 2e-3
    drawn, which = ids[small], epochs[small]
    for epoch in range(5):
        assert sorted(drawn[which == epoch].tolist()) == list(range(10))
    large, which = ids[~small], epochs[~small]
    assert sorted(large[which == 0].tolist()) == list(range(10, 1010))
    # and the two are mixed, not one after the other
    assert abs(small[:512].mean() - 0.75) < 0.08


def test_a_substitute_comes_from_the_same_group_and_depends_on_its_place_alone() -> None:
    sampler = Sampler([Group(0, 10, 0.5), Group(10, 40, 0.5)], seed=3)
    drawn = [sampler.substitute(2, 17, attempt) for attempt in range(60)]
    assert all(10 <= sample < 50 for sample in drawn)
    assert len(set(drawn)) > 20
    assert drawn == [Sampler(sampler.groups, 3).substitute(2, 17, attempt) for attempt in range(60)]


def test_the_only_image_of_a_weight_is_replaced_by_one_of_another() -> None:
    mixed, alone = Sampler([Group(0, 1, 0.5), Group(1, 40, 0.5)], 3), Sampler([Group(0, 41, 1.0)], 3)
    drawn = [mixed.substitute(0, 0, attempt) for attempt in range(200)]
    assert set(drawn[:64]) == {0}
    assert len(set(drawn[64:])) > 20
    assert drawn[64:] == [alone.substitute(0, 0, attempt) for attempt in range(64, 200)]


def test_ranks_in_a_block_count_the_draws_of_each_group() -> None:
    order = Sampler([Group(0, 10, 0.7), Group(10, 5, 0.1), Group(15, 9, 0.2)], 1)._block_order(2)
    seen = [0, 0, 0]
    for group, rank in order.T.tolist():
        assert rank == seen[group]
        seen[group] += 1


def test_eight_lists_of_all_weights_fit_and_more_are_counted_in_words() -> None:
    sampler = Sampler([Group(i, 1, 1.0 + i % 512) for i in range(8 * 512)], 0)
    order = sampler._block_order(0)
    assert np.bincount(order[0], minlength=8 * 512).min() >= 1
    with pytest.raises(UserError, match="5,000 different weights of sources and of the images"):
        Sampler([Group(i, 1, 1.0) for i in range(5000)], 0)
