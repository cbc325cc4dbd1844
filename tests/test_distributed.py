"""Reductions: the identity on one process, literal sums and maxima on two."""

from __future__ import annotations

import os
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import free_port, start_each

from dinoreg.distributed import waiting
from dinoreg.distributed.process_group import ALONE, Ranks, place_from_environment, session
from dinoreg.runtime.errors import RunError


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


def _wait_for_the_others(number: int, folder: str, environments: list[dict[str, str]]) -> None:
    os.environ.update(environments[number])
    waiting.FIRST_SECONDS = 2.0
    said = open(f"{folder}/{number}.txt", "w")  # noqa: SIM115 - closed with the process
    with redirect_stderr(said), pytest.raises(RunError), session("cpu", 5.0):
        raise AssertionError("nobody else is there")


def lines_of_waiting(folder: Path, *environments: dict[str, str]) -> list[str]:
    start_each(len(environments), _wait_for_the_others, str(folder), list(environments))
    return [line for number in range(len(environments)) for line in (folder / f"{number}.txt").read_text().splitlines()]


@pytest.mark.slow
def test_a_process_that_waits_says_once_for_whom(tmp_path: Path) -> None:
    slurm = {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_NODELIST": "localhost"}
    slurm |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    (line,) = lines_of_waiting(tmp_path, slurm)
    assert "rank 0 of 4 waits for rank 1, 2, 3 (SLURM_STEP_NUM_TASKS=4)" in line
    assert place_from_environment({**slurm, "WORLD_SIZE": "1"}) is None  # which is the way out that it names


@pytest.mark.slow
def test_of_several_waiting_processes_the_first_says_who_is_missing(tmp_path: Path) -> None:
    port = str(free_port())
    every = {"WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    (line,) = lines_of_waiting(tmp_path, {**every, "RANK": "0"}, {**every, "RANK": "2"})
    assert "rank 0 of 4 waits for rank 1, 3 (" in line
    (line,) = lines_of_waiting(tmp_path, {**every, "RANK": "1"})
    assert f"waits for rank 0, 2, 3 at localhost:{port}" in line
