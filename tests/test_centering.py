"""Teacher targets against their literal forms, on one process and on two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import start_each
from torch import Tensor

from dinoreg.distributed.process_group import Ranks
from dinoreg.losses.centering import sinkhorn_knopp, softmax_center, update_center


def _logits(rows: int, prototypes: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random cosines: what a weight-normed last layer gives."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, prototypes, generator=generator, dtype=torch.float64) * 0.3).clamp(-1, 1).to(dtype)


def _literal_sinkhorn(logits: Tensor, teacher_temp: float, iterations: int) -> Tensor:
    """The published form, entry by entry, with all its constants and no subtraction."""
    rows, prototypes = logits.shape
    q = [[float(torch.exp(logits[i, k] / teacher_temp)) for i in range(rows)] for k in range(prototypes)]
    total = sum(sum(line) for line in q)
    q = [[value / total for value in line] for line in q]
    for _ in range(iterations):
        q = [[value / sum(line) / prototypes for value in line] for line in q]
        sums = [sum(line[i] for line in q) for i in range(rows)]
        q = [[line[i] / sums[i] / rows for i in range(rows)] for line in q]
    return torch.tensor([[line[i] * rows for line in q] for i in range(rows)], dtype=torch.float64)


@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
def test_sinkhorn_equals_its_published_form(iterations: int) -> None:
    logits = _logits(7, 5, dtype=torch.float64)
    torch.testing.assert_close(sinkhorn_knopp(logits, 0.05, iterations), _literal_sinkhorn(logits, 0.05, iterations))


def test_sinkhorn_in_float32_is_close_to_float64() -> None:
    logits = _logits(40, 300)
    targets = sinkhorn_knopp(logits, 0.04)
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets.double(), sinkhorn_knopp(logits.double(), 0.04), rtol=2e-5, atol=1e-9)


def test_sinkhorn_does_not_depend_on_how_many_rows_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = _logits(11, 6)
    whole = sinkhorn_knopp(logits, 0.05)
    monkeypatch.setattr("dinoreg.runtime.tiling.CPU_CHUNK", 4 * 6)  # pieces of 4, 4 and 3 rows
    torch.testing.assert_close(sinkhorn_knopp(logits, 0.05), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sinkhorn_computes_in_float32_whatever_the_logits(dtype: torch.dtype) -> None:
    logits = _logits(9, 30).to(dtype)
    torch.testing.assert_close(sinkhorn_knopp(logits, 0.04), sinkhorn_knopp(logits.float(), 0.04))


def test_sinkhorn_takes_the_temperature_as_a_tensor() -> None:
    logits = _logits(9, 30)
    torch.testing.assert_close(sinkhorn_knopp(logits, torch.tensor(0.05)), sinkhorn_knopp(logits, 0.05))


def test_sinkhorn_rows_sum_to_one_and_prototypes_get_nearly_equal_mass() -> None:
    logits = _logits(512, 16)
    targets = sinkhorn_knopp(logits, 0.1)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(512))
    errors = [(sinkhorn_knopp(logits, 0.1, n).sum(dim=0) / 32 - 1).abs().max().item() for n in (1, 3, 10)]
    assert errors[0] > 0.4  # these logits are far from balanced
    assert errors[1] < 0.1
    assert errors[2] < 1e-3  # and in the limit they are exactly


def test_sinkhorn_removes_a_preference_for_some_prototypes() -> None:
    logits = _logits(40, 16, dtype=torch.float64)
    biased = logits + torch.arange(16) * 0.02
    mass = torch.softmax(biased / 0.1, dim=1).sum(dim=0)
    assert mass.max() / mass.min() > 5
    torch.testing.assert_close(sinkhorn_knopp(biased, 0.1), sinkhorn_knopp(logits, 0.1))


def test_sinkhorn_is_unchanged_by_a_constant_added_to_all_logits() -> None:
    logits = _logits(6, 10, dtype=torch.float64)
    torch.testing.assert_close(sinkhorn_knopp(logits + 50.0, 0.04), sinkhorn_knopp(logits, 0.04))


def test_sinkhorn_of_one_row_balances_it_completely() -> None:
    torch.testing.assert_close(sinkhorn_knopp(_logits(1, 8), 0.05), torch.full((1, 8), 1 / 8))


def test_sinkhorn_of_no_rows_is_empty() -> None:
    targets = sinkhorn_knopp(_logits(0, 8), 0.05)
    assert targets.shape == (0, 8)
    assert targets.dtype == torch.float32


def test_sinkhorn_is_finite_where_a_prototype_or_a_row_underflows() -> None:
    logits = _logits(6, 9)
    logits[:, 4] = -30.0  # exp(-30 / 0.04) is 0: this prototype has no mass
    logits[2] -= 20.0  # and this row would have none
    targets = sinkhorn_knopp(logits, 0.04)
    assert targets.isfinite().all()
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(6))
    assert targets[:, 4].max() == 0


def test_sinkhorn_does_not_change_its_input_nor_follow_its_gradient() -> None:
    logits = _logits(6, 9).requires_grad_()
    before = logits.detach().clone()
    assert not sinkhorn_knopp(logits, 0.04).requires_grad
    torch.testing.assert_close(logits.detach(), before, rtol=0, atol=0)


def test_softmax_center_equals_the_softmax_of_centred_logits() -> None:
    logits, center = _logits(7, 5, dtype=torch.float64), _logits(1, 5, seed=1, dtype=torch.float64)
    expected = torch.empty(7, 5, dtype=torch.float64)
    for i in range(7):
        powers = [((logits[i, k] - center[0, k]) / 0.04).exp() for k in range(5)]
        for k in range(5):
            expected[i, k] = powers[k] / sum(powers)
    torch.testing.assert_close(softmax_center(logits, center, 0.04), expected)
    assert softmax_center(logits[:0], center, 0.04).shape == (0, 5)
    assert softmax_center(logits.bfloat16(), center.float(), 0.04).dtype == torch.float32


def test_center_moves_by_a_tenth_towards_the_mean() -> None:
    logits, center = _logits(7, 5), _logits(1, 5, seed=1)
    expected = torch.tensor([[0.9 * center[0, k] + 0.1 * sum(logits[:, k]) / 7 for k in range(5)]])
    torch.testing.assert_close(update_center(center, logits), expected)
    torch.testing.assert_close(update_center(center, logits, 0.0), logits.mean(dim=0, keepdim=True))
    torch.testing.assert_close(update_center(center, logits, 1.0), center)


def test_center_of_no_rows_is_unchanged() -> None:
    center = _logits(1, 5, seed=1)
    torch.testing.assert_close(update_center(center, _logits(0, 5)), center, rtol=0, atol=0)


def test_targets_of_a_step_do_not_depend_on_the_mean_of_that_step() -> None:
    center = torch.zeros(1, 5)
    first, second = _logits(7, 5), _logits(7, 5, seed=1) + 1.0
    targets = softmax_center(first, center, 0.04)
    new_center = update_center(center, first)
    assert center.abs().max() == 0  # the old center is not written to
    torch.testing.assert_close(softmax_center(first, center, 0.04), targets, rtol=0, atol=0)
    shifted = softmax_center(second, new_center, 0.04)
    torch.testing.assert_close(shifted, torch.softmax((second - 0.1 * first.mean(dim=0)) / 0.04, dim=1))


def test_the_mean_of_one_processs_means_is_the_mean_of_its_rows() -> None:
    center, logits = torch.ones(1, 6), _logits(5, 6)
    torch.testing.assert_close(update_center(center, logits, by_process=True), update_center(center, logits))
    torch.testing.assert_close(update_center(center, logits[:0], by_process=True), center, rtol=0, atol=0)


def _one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    ranks = Ranks.of_default_group(30.0)
    logits = _logits(9, 13)
    logits[5:] += 0.4  # the processes' own maxima differ
    for name, cut in (("uneven", 5), ("empty", 9)):
        rows = logits[:cut] if rank == 0 else logits[cut:]
        targets = sinkhorn_knopp(rows, 0.05, ranks=ranks)
        center = update_center(torch.ones(1, 13), rows, ranks=ranks)
        of_means = update_center(torch.ones(1, 13), rows, 0.7, ranks, by_process=True)
        torch.save((targets, center, of_means), f"{folder}/{name}{rank}.pt")
    no_rows = sinkhorn_knopp(logits[:0], 0.05, ranks=ranks), update_center(torch.ones(1, 13), logits[:0], ranks=ranks)
    torch.save(no_rows, f"{folder}/nobody{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_get_the_targets_and_the_center_of_one(tmp_path: Path) -> None:
    start_each(2, _one_of_two, str(tmp_path))
    logits = _logits(9, 13)
    logits[5:] += 0.4
    for name, cut in (("uneven", 5), ("empty", 9)):
        parts = [torch.load(tmp_path / f"{name}{rank}.pt") for rank in range(2)]
        assert [len(targets) for targets, _, _ in parts] == [cut, 9 - cut]
        torch.testing.assert_close(torch.cat([targets for targets, _, _ in parts]), sinkhorn_knopp(logits, 0.05))
        means = [rows.mean(dim=0) for rows in (logits[:cut], logits[cut:]) if len(rows)]
        for _, center, of_means in parts:
            torch.testing.assert_close(center, update_center(torch.ones(1, 13), logits))
            torch.testing.assert_close(of_means[0], 0.7 + 0.3 * sum(means) / len(means))
    for rank in range(2):
        targets, center = torch.load(tmp_path / f"nobody{rank}.pt")
        assert targets.shape == (0, 13)
        torch.testing.assert_close(center, torch.ones(1, 13), rtol=0, atol=0)
