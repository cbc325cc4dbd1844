"""Reductions: the identity on one process, literal sums and maxima on two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import start_each

from dinoreg.distributed.process_group import ALONE, Ranks


def test_one_process_is_rank_zero_of_one() -> None:
    assert (ALONE.rank, ALONE.world_size, ALONE.is_main) == (0, 1, True)


@pytest.mark.parametrize("reduce", [ALONE.all_reduce_sum, ALONE.all_reduce_max, ALONE.all_reduce_mean])
def test_on_one_process_a_reduction_is_the_tensor_itself(reduce: object) -> None:
    tensor = torch.randn(3, 4)
    assert reduce(tensor) is tensor  # type: ignore[operator]


def _values(number: int) -> torch.Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(number))


def _one_of_two(number: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=2)
    ranks = Ranks.of_default_group(30.0)
    own = _values(number)
    results = {
        "place": torch.tensor([ranks.rank, ranks.world_size, int(ranks.is_main)]),
        "sum": ranks.all_reduce_sum(own),
        "max": ranks.all_reduce_max(own),
        "transposed": ranks.all_reduce_sum(own.T),
        "scalar": ranks.all_reduce_sum(torch.tensor(float(number + 1))),
        "count": ranks.all_reduce_sum(torch.tensor([2**40 + number])),
        "own": own,
    }
    torch.save(results, f"{folder}/{number}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_get_the_sum_and_the_maximum_and_keep_their_own(tmp_path: Path) -> None:
    start_each(2, _one_of_two, str(tmp_path))
    first, second = _values(0), _values(1)
    for number in range(2):
        results = torch.load(tmp_path / f"{number}.pt")
        assert results["place"].tolist() == [number, 2, int(number == 0)]
        assert torch.equal(results["sum"], first + second)
        assert torch.equal(results["max"], torch.where(first > second, first, second))
        assert torch.equal(results["transposed"], (first + second).T)
        assert float(results["scalar"]) == 3.0
        assert results["count"].tolist() == [2**41 + 1]
        assert torch.equal(results["own"], _values(number))  # the input is left as it was
