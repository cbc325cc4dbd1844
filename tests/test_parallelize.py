"""Many processes are one: DDP, FSDP2 and HSDP give the losses of a single process, and drifting copies are named."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import free_port, on_processes, pretrain_each
from torch import nn
from torch.distributed.fsdp import FSDPModule
from training import LOSSES, loss_trace, read_lines, tiny_config

from dinoreg.config.load import Config, load_config
from dinoreg.config.schema import LossConfig, ParallelConfig
from dinoreg.distributed.process_group import (
    ALONE,
    Ranks,
    _check_devices,
    is_main_process,
    place_from_environment,
    session,
)
from dinoreg.distributed.waiting import Place
from dinoreg.losses.anchor import anchor_loss
from dinoreg.models.vit import RegisterViT
from dinoreg.runtime.errors import RunError, UserError
from dinoreg.train.loop import pretrain
from dinoreg.train.parallelize import _learns, check_replicas, choose_strategy, find_drift, local, without_reduction
from dinoreg.train.prepare import Setup, changed_config
from dinoreg.train.step import koleo_of_processes, koleo_of_views, train_step

# Sums in another order move the last bits of float32; over 50 steps of AdamW that grows to some 1e-6 of the losses.
# A single process whose start weights differ by one unit in the last place drifts as far (tested below).
TOLERANCE = 2e-5
NORM_TOLERANCE = 2e-4


def run_config(out: Path, world_size: int, **overrides: Any) -> Config:
    """Twelve images a step, however many processes share them; no drop path, which each process draws for itself."""
    settings: dict[str, Any] = {"batch_size": 12 // world_size, "steps": 50, "model__drop_path": 0.0}
    return tiny_config(out, **{**settings, "checkpoint__every": 50, **overrides})


def furthest(one: Path, other: Path) -> tuple[float, float]:
    """Largest relative difference of any loss, and of any gradient norm, over all steps."""
    first, second = loss_trace(one), loss_trace(other)
    assert [line[0] for line in first] == [line[0] for line in second]
    pairs = [
        [abs(a - b) / max(abs(a), 1e-6) for a, b in zip(x[1:], y[1:], strict=True)]
        for x, y in zip(first, second, strict=True)
    ]
    worst = [max(column) for column in zip(*pairs)]
    return max(worst[: len(LOSSES)]), max(worst[len(LOSSES) :])


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tmp_path: Path) -> None:
    both = []
    for centering, accumulate in itertools.product(("softmax", "sinkhorn"), (1, 2)):
        options: dict[str, Any] = {"loss__centering": centering, "optim__accumulate": accumulate}
        if accumulate == 2:  # rotary positions, whose distortion each process would draw for itself
            options |= {"model__name": "vitt8_reg4_rope", "model__rope_rescale": 1.0, "loss__paka_weight": 1.0}
        pretrain(run_config(tmp_path / f"one-{centering}-{accumulate}", 1, **options))
        both += [
            run_config(tmp_path / f"{name}-{centering}-{accumulate}", 2, parallel__strategy=name, **options)
            for name in ("ddp", "fsdp")
        ]
    on_processes(2, pretrain_each, both)
    for config in both:
        assert config.out is not None
        out = Path(config.out)
        _, _, settings = out.name.partition("-")
        losses, norms = furthest(tmp_path / f"one-{settings}", out)
        assert losses < TOLERANCE, out.name
        assert norms < NORM_TOLERANCE, out.name
        # What is written is of all processes, the rank of features and the probe included.
        one, two = read_lines(tmp_path / f"one-{settings}" / "metrics.jsonl")[-1], read_lines(out / "metrics.jsonl")[-1]
        for key in ("teacher_entropy", "target_marginal_entropy", "feature_rank"):
            assert two[key] == pytest.approx(one[key], rel=1e-5), key
        assert two["images"] == one["images"] == 600


@pytest.mark.slow
def test_the_tolerance_is_that_of_rounding_itself(tmp_path: Path) -> None:
    def trace(nudge: float) -> list[float]:
        setup = Setup(run_config(tmp_path / "none", 1))
        with torch.no_grad():
            for parameter in setup.student.parameters():
                parameter.mul_(1 + nudge)
        state, losses = setup.new_state(), []
        with setup.batches(state) as batches:
            for step in range(50):
                result = train_step(state, next(batches), setup.schedules.at(step))
                losses.append(float(result.losses["total"]))
        return losses

    apart = max(abs(a - b) / abs(a) for a, b in zip(trace(0.0), trace(2**-23)))
    assert 0 < apart < TOLERANCE


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    """1 -> 2 -> 3 -> 1 processes, two kinds of sharding on the way, against one process all along."""
    unbroken, out = tmp_path / "unbroken", tmp_path / "run"
    options = {"steps": 24, "checkpoint__every": 6, "loss__centering": "sinkhorn"}
    pretrain(run_config(unbroken, 1, **options))

    for world_size, stop, strategy in ((1, 6, "auto"), (2, 12, "fsdp"), (3, 18, "ddp"), (1, 24, "auto")):
        config = run_config(out, world_size, resume=True, parallel__strategy=strategy, **options)
        if world_size == 1:
            _until(config, stop)
        else:
            on_processes(world_size, _until, config, stop)
    losses, norms = furthest(unbroken, out)
    assert losses < TOLERANCE
    assert norms < NORM_TOLERANCE
    assert [line["step"] for line in read_lines(out / "metrics.jsonl")] == list(range(1, 25))


def _until(config: Config, stop: int) -> None:
    """Train, and be stopped by a signal to this process alone once the checkpoint of step `stop` is due."""
    import signal

    from dinoreg.data.loader import BatchLoader
    from dinoreg.runtime.errors import Interrupted

    if stop == config.steps:
        pretrain(config)
        return
    original, asked = BatchLoader.__next__, []

    def counted(self: BatchLoader) -> Any:
        batch = original(self)
        if batch.position == 12 * (stop + 1) and is_main_process():
            os.kill(os.getpid(), signal.SIGUSR1)
        return batch

    BatchLoader.__next__ = counted  # type: ignore[method-assign]
    try:
        pretrain(config)
    except Interrupted as stopped:
        asked.append(stopped.signal_number)
    finally:
        BatchLoader.__next__ = original  # type: ignore[method-assign]
    assert asked == [signal.SIGUSR1]
    if is_main_process():
        assert json.loads((Path(str(config.out)) / "status.json").read_text())["step"] == stop


@pytest.mark.slow
def test_the_same_processes_repeat_a_run_bit_for_bit_and_hybrids_and_drop_path_work(tmp_path: Path) -> None:
    shapes = {
        "ddp": {"parallel__strategy": "ddp"},
        "fsdp": {"parallel__strategy": "fsdp", "parallel__reshard": True, "optim__accumulate": 2},
        "hybrid": {"parallel__strategy": "fsdp", "parallel__shard": 1},
    }
    common = {"steps": 10, "checkpoint__every": 5, "model__drop_path": 0.2, "probe__every": 5}
    common["parallel__check_every"] = 5
    runs = [
        run_config(tmp_path / f"{name}-{number}", 2, **common, **shape)
        for name, shape in shapes.items()
        for number in (1, 2)
    ]
    on_processes(2, pretrain_each, runs)
    for name in shapes:
        assert loss_trace(tmp_path / f"{name}-1") == loss_trace(tmp_path / f"{name}-2")
        assert len(loss_trace(tmp_path / f"{name}-1")) == 10
    # Copies and shards are the same run, whatever the sharding; drop path is drawn by rank and step alone.
    assert furthest(tmp_path / "ddp-1", tmp_path / "hybrid-1")[0] < TOLERANCE
    probes = [read_lines(tmp_path / f"{name}-1" / "probe.jsonl") for name in ("ddp", "hybrid")]
    assert probes[0][-1]["rankme"] == pytest.approx(probes[1][-1]["rankme"], rel=1e-4)


def _in_session(folder: str) -> None:
    """Everything that needs two processes and no run; what is found goes to `folder`."""
    with session("cpu", 30.0) as ranks:
        rank = ranks.rank
        found: dict[str, Any] = {"gathered": ranks.gather_objects(rank * 10), "main": ranks.from_main(rank)}
        rows = torch.arange(6.0).view(3, 2) + 100 * rank
        found["rows"] = ranks.gather_rows(rows).tolist()
        found["alone"] = ranks.gather_rows(rows, 1).tolist()
        found["agreed"] = [ranks.maximum(number) for number in ([0, 0, 7, 0] if rank else [0, 10, 3, 0])]
        found["asked"] = ranks.asked_to_stop()
        ranks.maximum(0)
        if rank == 1:
            ranks.ask_to_stop(15)
        ranks.maximum(0)
        found["asked"] = found["asked"], ranks.asked_to_stop()

        features = torch.randn(8, 5, generator=torch.Generator().manual_seed(rank), dtype=torch.float32)
        value, gradient = koleo_of_processes(features, 0.5, None, ranks)
        found["koleo"] = (float(value), gradient.tolist())
        value, gradient = koleo_of_processes(features, 0.5, 1, ranks)
        found["own koleo"] = (float(value), gradient.tolist())

        for name, work in {
            "fine": lambda: None,
            "user": lambda: _fail(UserError("no such folder"), rank == 1),
            "nested": lambda: _fail_early(ranks),
        }.items():
            try:
                with ranks.collective_errors():
                    work()
                found[name] = "fine"
            except (UserError, RunError) as error:
                found[name] = (type(error).__name__, str(error), error.reported, ranks.is_common(error))

        order = Path(folder) / "order"
        with ranks.main_first(), open(order, "a") as file:
            file.write(f"{rank}\n")

        same, other = torch.ones(3), torch.full((3,), 1.0 + 1e-7 * rank)
        check_replicas(4, 48, {"weights": same}, ranks)
        for name, call in {
            "weights": lambda: check_replicas(4, 48, {"weights": same, "bias": other}, ranks),
            "position": lambda: check_replicas(4, 48 + rank, {"weights": same}, ranks),
        }.items():
            try:
                call()
            except RunError as error:
                found[f"drift {name}"] = str(error)
        torch.save(found, Path(folder) / f"{rank}.pt")


def _fail(error: Exception, really: bool) -> None:
    if really:
        raise error


def _fail_early(ranks: Ranks) -> None:
    """Rank 1 fails before the inner agreement that rank 0 waits at."""
    _fail(RunError("early"), ranks.rank == 1)
    with ranks.main_first():
        pass


def test_processes_gather_agree_and_fail_together(tmp_path: Path) -> None:
    on_processes(2, _in_session, str(tmp_path))
    zero, one = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for found in (zero, one):
        assert found["gathered"] == [0, 10]
        assert found["main"] == 0
        assert found["rows"] == [[0, 1], [2, 3], [4, 5], [100, 101], [102, 103], [104, 105]]
        assert found["agreed"] == [0, 10, 7, 0]
        assert found["asked"] == (0, 15)
        assert found["fine"] == "fine"
        assert "drifted apart at step 4: bias of rank 1 differs from the other" in found["drift weights"]
        assert "position of rank 1 differs" in found["drift position"]
    assert one["alone"][0] == [100, 101]
    assert one["user"] == ("UserError", "no such folder", False, True)
    assert zero["user"] == ("UserError", "rank 1: no such folder", True, True)
    assert one["nested"] == ("RunError", "early", False, True)
    assert zero["nested"] == ("RunError", "rank 1: early", True, True)
    assert (tmp_path / "order").read_text() == "0\n1\n"

    # KoLeo of the processes together is that of their images side by side, view by view.
    each = [torch.randn(8, 5, generator=torch.Generator().manual_seed(rank)) for rank in (0, 1)]
    views = [torch.cat([part[4 * view : 4 * view + 4] for part in each]) for view in (0, 1)]
    whole = torch.cat(views).requires_grad_()
    value = 0.5 * koleo_of_views(whole)
    value.backward()
    value = value.detach()
    assert whole.grad is not None
    for rank, found in enumerate((zero, one)):
        assert found["koleo"][0] == pytest.approx(float(value), rel=1e-6)
        own = torch.cat([whole.grad[4 * rank : 4 * rank + 4], whole.grad[8 + 4 * rank : 12 + 4 * rank]])
        # The mean over two processes that follows halves it.
        torch.testing.assert_close(torch.tensor(found["koleo"][1]), 2 * own, rtol=1e-5, atol=1e-6)
        mine = each[rank].clone().requires_grad_()
        (0.5 * koleo_of_views(mine)).backward()
        torch.testing.assert_close(torch.tensor(found["own koleo"][1]), mine.grad, rtol=1e-5, atol=1e-6)


def _one_after_the_other(count: int) -> None:
    for number in range(count):
        with session("cpu", 30.0) as ranks:
            assert ranks.gather_objects(number) == [number, number]
        if os.environ["RANK"] == "0":
            time.sleep(random.random() * 0.02)  # the other is ahead, by this much


@pytest.mark.slow
def test_sessions_of_the_same_processes_follow_one_another_whoever_is_ahead() -> None:
    on_processes(2, _one_after_the_other, 100)


def _low_precision(folder: str) -> None:
    for name, dtype in (("fp32", "fp32"), ("bf16", "bf16")):
        config = run_config(
            Path(folder) / name, 2, steps=4, parallel__strategy="fsdp", parallel__param_dtype=dtype,
            parallel__reduce_dtype=dtype,
        )  # fmt: skip
        pretrain(config)
    with session("cpu", 30.0) as ranks:
        setup = Setup(run_config(Path(folder) / "none", 2, parallel__strategy="fsdp"), ranks)
        state = setup.new_state()
        blocks = state.student.backbone.blocks
        assert all(isinstance(block, FSDPModule) for block in blocks)
        held = sum(local(p).numel() for p in state.student.parameters())
        total = sum(p.numel() for p in state.student.parameters())
        assert 0.3 * total < held < 0.7 * total  # this process's half, but for rows that do not halve
        moments = [p for p in state.teacher.parameters() if local(p).numel() < p.numel()]
        assert moments


@pytest.mark.slow
def test_fsdp_shards_and_computes_in_low_precision_where_asked(tmp_path: Path) -> None:
    on_processes(2, _low_precision, str(tmp_path))
    exact, rounded = (loss_trace(tmp_path / name) for name in ("fp32", "bf16"))
    assert exact != rounded
    for x, y in zip(exact, rounded, strict=True):
        assert y[1] == pytest.approx(x[1], rel=0.02)  # bf16 has 8 bits: 0.4 % a number


# ------------------------------------------------------------------------------------------------------------
# Without a second process


def test_the_strategy_follows_the_size_of_the_student() -> None:
    auto = ParallelConfig()
    assert choose_strategy(auto, 10**9, 1) == "single"
    assert choose_strategy(auto, 300_000_000, 8) == "ddp"
    assert choose_strategy(auto, 300_000_001, 8) == "fsdp"
    assert choose_strategy(ParallelConfig(strategy="ddp"), 10**9, 8) == "ddp"
    assert choose_strategy(ParallelConfig(shard=4), 10, 8) == "fsdp"
    with pytest.raises(UserError, match=r"parallel.shard=3: expected a divisor of the 8 processes"):
        choose_strategy(ParallelConfig(shard=3), 10, 8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("parallel.strategy=zero", "expected auto, ddp or fsdp"),
        ("parallel.shard=0", "at least 1 process"),
        ("parallel.param_dtype=int8", "fp32, bf16 or fp16"),
        ("parallel.timeout=0", "a number of seconds in"),
        ("loss.koleo_ranks=0", "at least 1"),
    ],
)
def test_wrong_options_are_refused(values: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(None, [values])


def test_a_head_without_a_loss_is_left_out_of_ddp() -> None:
    tied = nn.ModuleDict({"backbone": nn.Linear(1, 1), "dino_head": nn.Linear(1, 1)})
    untied = nn.ModuleDict({**tied, "ibot_head": nn.Linear(1, 1)})
    no_ibot, no_dino = LossConfig(ibot_weight=0.0), LossConfig(dino_weight=0.0)
    assert [_learns(name, untied, no_ibot) for name in untied] == [True, True, False]
    assert [_learns(name, untied, no_dino) for name in untied] == [True, False, True]
    assert [_learns(name, tied, no_dino) for name in tied] == [True, True]


def test_on_one_process_nothing_is_wrapped_and_nothing_is_exchanged(tmp_path: Path) -> None:
    state = Setup(run_config(tmp_path / "run", 1)).new_state()
    assert state.train_modules is state.student
    assert isinstance(state.student.backbone, RegisterViT)
    assert ALONE.maximum(15) == 15
    assert ALONE.asked_to_stop() == 0
    with without_reduction(state.train_modules, True):
        pass
    check_replicas(1, 1, state.replicated(), ALONE)
    error = UserError("x")
    with pytest.raises(UserError) as caught, ALONE.collective_errors():
        raise error
    assert caught.value is error
    assert not ALONE.is_common(error)


def test_the_odd_one_out_is_named() -> None:
    a, b = {"step": "4", "student.w": "aa"}, {"step": "4", "student.w": "bb"}
    assert find_drift([a, a, a]) == []
    assert find_drift([a, b, a]) == ["student.w of rank 1 differs from most"]
    assert find_drift([a, a, {**b, "step": "5"}, a]) == [
        "step of rank 2 differs from most",
        "student.w of rank 2 differs from most",
    ]
    # Different shards have different names, so that only copies of the same one are compared.
    assert find_drift([{"w (shard 0)": "x"}, {"w (shard 1)": "y"}, {"w (shard 0)": "x"}, {"w (shard 1)": "z"}]) == [
        "w (shard 1) of rank 3 differs from the other"
    ]


def test_the_place_of_a_process_comes_from_torchrun_or_from_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    place = place_from_environment
    assert place({}) is None
    assert place({"WORLD_SIZE": "1", "RANK": "0"}) is None
    run = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
    assert place(run) == Place(3, 4, 1, "n1", 29500)
    with pytest.raises(UserError, match=r"WORLD_SIZE=4: RANK and MASTER_PORT missing"):
        place({"WORLD_SIZE": "4", "MASTER_ADDR": "n1"})
    with pytest.raises(UserError, match=r"RANK=three: expected a whole number"):
        place({**run, "RANK": "three"})
    # An allocation's shell or batch script has SLURM_NTASKS, yet is no task of a step.
    assert place({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}) is None
    step = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "71"}
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[03-04]")
    found = place(step)
    assert found is not None
    assert (found.rank, found.world_size, found.local_rank, found.address) == (5, 8, 1, "gpu03")
    again, other = place(step), place({**step, "SLURM_JOB_ID": "72"})
    assert again is not None
    assert other is not None
    assert again.port == found.port != other.port


def test_fewer_devices_than_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("is_available", True), ("current_device", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="own"))
    _check_devices("cuda", Ranks(1, 1))
    others = SimpleNamespace(gather_objects=lambda own: ["another", own, own])
    with pytest.raises(UserError, match=r"ranks 1, 2 share one CUDA device: .* fewer devices than processes"):
        _check_devices("cuda", others)


def test_the_anchor_of_parts_is_that_of_the_whole() -> None:
    torch.manual_seed(0)
    cls, patches, cls_there, patches_there = (torch.randn(n, 5) for n in (4, 9, 4, 9))
    whole = anchor_loss(cls, patches, cls_there, patches_there, torch.tensor(9.0))
    parts = [
        anchor_loss(cls[a:b], patches[c:d], cls_there[a:b], patches_there[c:d], torch.tensor(4.5))
        for a, b, c, d in ((0, 2, 0, 3), (2, 4, 3, 9))
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_a_resumed_run_tells_which_options_are_not_those_it_was_started_with(tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(run_config(out, 1, steps=2))
    before = load_config(out / "config.yaml")
    same = run_config(out, 1, steps=2, resume=True, data__workers=0, log__every=2, parallel__strategy="fsdp")
    assert changed_config(same, before, out) == []
    for key in ("precision", "parallel.param_dtype", "parallel.reduce_dtype"):
        (line,) = changed_config(
            run_config(out, 1, steps=2, resume=True, **{key.replace(".", "__"): "bf16"}), before, out
        )
        assert f"{key}=bf16 (was " in line
    (line,) = changed_config(dataclasses.replace(same, device="mps"), before, out)
    assert "device=mps (was cpu)" in line
    other = run_config(out, 1, steps=3, resume=True, optim__lr=2e-3)
    (line,) = changed_config(other, before, out)
    assert line.startswith("resumed with steps=3 (was 2), optim.lr=0.002 (was 0.001): ")
    pretrain(other)
    assert line in (out / "train.log").read_text()


def test_ports_for_tests_are_free() -> None:
    assert free_port() != 0
