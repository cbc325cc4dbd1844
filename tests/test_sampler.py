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


def test_more_sources_than_a_block_can_share_out_are_refused() -> None:
    with pytest.raises(UserError, match="weighted sources"):
        Sampler([Group(i, 1, 1.0) for i in range(2000)], 0)
