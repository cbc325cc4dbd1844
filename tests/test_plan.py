"""What a run will cost: every figure against the real thing, refusals, remedies that work, and the command."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import dinoreg.plan.devices as plan_devices
import dinoreg.plan.run as plan_run
from dinoreg.checkpoint import format as checkpoint
from dinoreg.commands.main import main
from dinoreg.config.load import Config, load_config, to_yaml
from dinoreg.distributed.process_group import ALONE, Ranks, simulated_session
from dinoreg.plan.advice import change, remedies
from dinoreg.plan.devices import DEVICES, GIB, Device, find_device, recognise
from dinoreg.plan.job import describe, measure_sizes, padded
from dinoreg.plan.memory import memory_of, operations_of
from dinoreg.plan.run import plan
from dinoreg.plan.speed import Speed, estimate, probe, worth_probing
from dinoreg.plan.step import random_batch
from dinoreg.plan.trace import trace_job
from dinoreg.plan.traffic import Collective, collectives
from dinoreg.runtime.durations import duration
from dinoreg.runtime.errors import UserError
from dinoreg.train.schedules import Now
from dinoreg.train.state import TrainState, build_networks
from dinoreg.train.step import train_step
from tests.training import tiny_config

CPU = torch.device("cpu")
NOW = Now(lr=1e-3, last_layer_lr=1e-3, weight_decay=0.0, momentum=0.9, teacher_temp=0.1)
# A head's weights and biases between its input and its prototypes: 2048 wide, a bottleneck of 256.
HIDDEN = 2048**2 + 2048 * 256 + 2 * 2048 + 256
# Every crop has the same number of hidden patches: what a process sees is then known exactly.
EVEN_MASKS = {"mask.probability": 1.0, "mask.ratio": [0.3, 0.3], "mask.min_patches": 1}
# A ViT whose blocks outweigh the rest, as they do in real ones, yet which takes a moment.
SMALL = {
    **EVEN_MASKS,
    "model.name": "vitt14_reg4",
    "model.dim": 192,
    "model.depth": 4,
    "model.heads": 3,
    "model.attention": "sdpa",
    "model.layerscale": 1e-5,
    "crops.global_size": 112,
    "crops.local_size": 56,
    "crops.num_local": 4,
    "head.prototypes": 512,
    "head.hidden_dim": 128,
    "head.bottleneck_dim": 32,
    "batch_size": 4,
}


@pytest.fixture(autouse=True)
def _nothing_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """No CUDA device and no wait for a probe, whatever the machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def small(**overrides: Any) -> Config:
    return tiny_config(**{**SMALL, **{key.replace("__", "."): value for key, value in overrides.items()}})


def device(**values: Any) -> Device:
    return dataclasses.replace(find_device("h100"), **values)


def state_of(config: Config, ranks: Ranks = ALONE) -> TrainState:
    return TrainState(config, *build_networks(config), CPU, torch.float32, ranks=ranks)


def take_step(config: Config, state: TrainState) -> None:
    batch = random_batch(config, state.student.backbone.patch_size, CPU)
    train_step(state, batch, NOW)


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize(
    ("name", "backbone", "head"),
    [
        # recipe: 303,351,808 without registers, at 224 pixels with patches of 16; 4 registers of 1024 besides
        ("vitl16_short_reg4_in1k", 303_351_808 + 4096, 65536 * 257 + 1024 * 2048 + HIDDEN),
        # recipe: 22,058,112 with 37 x 37 positions; here they are 16 x 16
        ("vits14_reg4", 22_058_112 - (37**2 - 16**2) * 384, 8192 * 257 + 384 * 2048 + HIDDEN),
    ],
)
def test_parameters_are_those_of_the_published_models(name: str, backbone: int, head: int) -> None:
    sizes = measure_sizes(load_config(name))
    assert sizes.parameters == {"backbone": backbone, "dino_head": head}
    assert sizes.student == backbone + head


def test_an_untied_head_is_counted() -> None:
    sizes = measure_sizes(tiny_config(**{"head.separate": True, "head.ibot_prototypes": 16}))
    assert sizes.prototypes == {"dino_head": 24, "ibot_head": 16}


def test_what_is_gathered_has_whole_rows_of_every_process() -> None:
    network = torch.nn.ParameterList([torch.empty(10, 3), torch.empty(1, 7)])
    assert padded(network, 1) == 37
    assert padded(network, 4) == 12 * 3 + 4 * 7


# ---------------------------------------------------------------- memory


@pytest.mark.slow
@pytest.mark.parametrize(("name", "checkpointing"), [("vitb14_reg4", True), ("vitl16_short_reg4_in1k", False)])
def test_the_peaks_of_whole_models_are_foretold(name: str, checkpointing: bool) -> None:
    overrides = {"precision": "bf16", "model.attention": "sdpa", "batch_size": 32, "model.checkpointing": checkpointing}
    job = describe(load_config(name, overrides), 1, 1, device())
    whole = trace_job(job, job.sizes.depth, (job.masked_patches(32, worst=True),)).peaks
    peak = max(sum(parts.values()) for parts in whole.values())
    assert peak > 3 * GIB
    assert memory_of(job).allocated == pytest.approx(peak, rel=1e-6)


def test_weights_moments_and_gradients_are_those_of_a_real_state() -> None:
    config = small()
    state = state_of(config)
    take_step(config, state)
    found = memory_of(describe(config, 1, 1, device())).moments["update"]
    weights = sum(parameter.nbytes for parameter in state.student.parameters())
    moments = sum(value.nbytes for each in state.optimizer.state.values() for value in each.values())
    gradients = sum(parameter.grad.nbytes for parameter in state.student.parameters() if parameter.grad is not None)
    assert found["student weights"] == found["teacher weights"] == weights
    assert found["AdamW moments"] == moments
    assert found["gradients"] == gradients


def test_processes_share_the_state_under_fsdp_and_copy_it_under_ddp() -> None:
    def parts(processes: int, **overrides: Any) -> dict[str, int]:
        memory = memory_of(describe(small(**overrides), 1, processes, device()))
        return memory.moments[memory.peak]

    one = parts(1)
    ddp = parts(8, parallel__strategy="ddp")
    fsdp = parts(8, parallel__strategy="fsdp")
    hybrid = parts(8, parallel__strategy="fsdp", parallel__shard=2)
    assert ddp["student weights"] == one["student weights"]
    for part in ("student weights", "teacher weights", "AdamW moments"):
        assert fsdp[part] == pytest.approx(one[part] / 8, rel=0.05)  # single rows are not divided
        assert hybrid[part] == pytest.approx(one[part] / 2, rel=0.01)
    assert "gathered weights" not in ddp
    assert fsdp["gathered weights"] > 0


def test_hidden_patches_vary_between_processes_but_not_on_one() -> None:
    config = tiny_config(**{"batch_size": 32, "crops.global_size": 64})
    alone, many = describe(config, 1, 1, device()), describe(config, 8, 8, device())
    assert alone.masked_patches(32) == round(64 * 0.5 * 0.3 * 64)
    assert alone.masked_patches(32, worst=True) == pytest.approx(alone.masked_patches(32), abs=1)
    assert many.masked_patches(32) == alone.masked_patches(32)
    counts = [len(random_batch(dataclasses.replace(config, seed=seed), 8, CPU).mask_indices) for seed in range(2)]
    assert max(counts) <= alone.masked_patches(32, worst=True) * 1.02
    assert many.masked_patches(32) * 1.1 < many.masked_patches(32, worst=True) < 64 * 0.5 * 64


@pytest.mark.slow
def test_everything_that_is_said_to_save_memory_does() -> None:
    config = small(parallel__strategy="fsdp")
    base = memory_of(describe(config, 1, 8, device())).needed
    for overrides in (
        {"model.checkpointing": True},
        {"optim.accumulate": 2},
        {"parallel.reshard": True},
        {"batch_size": 2},
    ):
        assert memory_of(describe(small(**{"parallel.strategy": "fsdp", **overrides}), 1, 8, device())).needed < base


# ---------------------------------------------------------------- traffic


class Listening(TorchDispatchMode):
    """Bytes of the largest tensor, and calls, of every collective."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("c10d."):
            tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.bytes[name.split(".")[1]] += max(tensor.nbytes for tensor in tensors)
            self.calls[name.split(".")[1]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"parallel.reshard": True, "loss.centering": "sinkhorn"},
        {"parallel.shard": 2, "loss.koleo_ranks": 2},
        {"optim.accumulate": 2, "parallel.reduce_dtype": "bf16", "loss.paka_weight": 1.0},
        {"optim.accumulate": 2, "parallel.reshard": True, "parallel.param_dtype": "bf16"},
        {"head.separate": True, "loss.koleo_weight": 0.0},
    ],
    ids=lambda overrides: ", ".join(f"{key}={value}" for key, value in overrides.items()) or "as it is",
)
def test_fsdp_exchanges_what_the_formulas_say_to_the_byte(overrides: dict[str, Any]) -> None:
    config = tiny_config(**{"parallel.strategy": "fsdp", "batch_size": 4, **overrides})
    with simulated_session(8) as ranks:
        state = state_of(config, ranks)
        take_step(config, state)
        with Listening() as heard:
            take_step(config, state)
    told: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    kinds = {"all-gather": "_allgather_base_", "reduce-scatter": "_reduce_scatter_base_", "all-reduce": "allreduce_"}
    for each in collectives(describe(config, 1, 8, device())):
        kind = next(kinds[kind] for kind in kinds if kind in each.name)
        told[kind] += each.size
        calls[kind] += each.calls
    for kind in ("_allgather_base_", "_reduce_scatter_base_"):
        assert (heard.bytes[kind], heard.calls[kind]) == (told[kind], calls[kind])
    assert told["allreduce_"] == pytest.approx(heard.bytes["allreduce_"], abs=100)  # scalars


def test_ddp_sends_every_gradient_around_the_ring_twice() -> None:
    config = tiny_config(**{"parallel.strategy": "ddp"})
    job = describe(config, 1, 4, device())
    gradients = next(each for each in collectives(job) if each.name.startswith("gradients"))
    assert gradients.sent == 2 * 4 * job.sizes.student * 3 // 4
    assert collectives(describe(config, 1, 1, device())) == []


def test_a_group_on_one_machine_uses_its_links_and_one_across_machines_all_of_them_together() -> None:
    links = device(local_link=400.0, link=50.0)
    assert Collective("a", 8 * 10**9, 1, 8, 8, 1, True).seconds(links) == pytest.approx(7 / (400 * 0.8), rel=0.01)
    # 8 devices of a machine have 8 links of 50 GB/s: as much as the machine has inside.
    assert Collective("a", 8 * 10**9, 1, 64, 8, 1, True).seconds(links) == pytest.approx(7.875 / (400 * 0.8), rel=0.01)
    assert Collective("a", 8 * 10**9, 1, 64, 1, 1, True).seconds(links) == pytest.approx(7.875 / (50 * 0.8), rel=0.01)
    assert Collective("a", 0, 10, 64, 8, 1, True).seconds(links) > 0  # every call takes its time


# ---------------------------------------------------------------- speed


def test_an_estimate_is_peak_times_share_over_operations() -> None:
    job = describe(load_config("vitl16_short_reg4_in1k"), 1, 8, find_device("a100"))
    found = estimate(job, utilisation=0.4)
    assert found is not None
    per_image = operations_of(job).total + job.koleo_operations() / 64
    assert found.images_per_second == pytest.approx(0.4 * 312e12 / per_image)
    assert not found.measured
    assert found.source.startswith("estimate: 40% of 312 TFLOP/s")
    assert estimate(dataclasses.replace(job, device=device(peaks={}))) is None


def test_a_probe_trains_real_steps_and_leaves_the_random_numbers_alone() -> None:
    config = tiny_config(**{"batch_size": 2, "parallel.strategy": "ddp", "loss.koleo_ranks": 2})
    job = describe(config, 1, 4, dataclasses.replace(plan_run.cpu_device(), memory=0))
    assert worth_probing(job)
    before = torch.get_rng_state()
    found = probe(job, CPU)
    assert torch.equal(before, torch.get_rng_state())
    assert found is not None
    assert found.measured
    assert 1 < found.images_per_second < 1e5
    assert found.source == "measured: 10 steps of 2 images on one process here"


@pytest.mark.slow
def test_what_takes_long_on_a_cpu_is_not_probed_unasked() -> None:
    config = load_config("vitl16_short_reg4_in1k", ["device=cpu"])
    assert not worth_probing(describe(config, 1, 1, dataclasses.replace(plan_run.cpu_device(), memory=0)))
    assert not worth_probing(describe(load_config("vitg14_reg4_in22k"), 1, 1, device(memory=GIB)))
    assert worth_probing(describe(load_config("vits14_reg4"), 1, 1, device()))


def test_a_measured_speed_is_what_a_plan_counts_with(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Speed(50.0, True, "measured")
    monkeypatch.setattr(plan_run, "probe", lambda job, where: measured)
    found = plan(tiny_config(steps=100), probe=True)
    assert found.step.computing == 6 / 50
    assert found.run.seconds == pytest.approx(12.0)
    monkeypatch.setattr(plan_run, "probe", lambda job, where: None)
    found = plan(tiny_config(steps=100), probe=True)
    assert found.speed is not None
    assert not found.speed.measured
    assert "The probe ran out of memory; the speed is an estimate." in found.notes


# ---------------------------------------------------------------- devices


def test_devices_are_found_by_name_and_recognised_by_what_pytorch_calls_them() -> None:
    assert find_device("H100") is DEVICES["h100"]
    assert find_device("a100") is DEVICES["a100-80"]
    assert find_device("RTX 4090") is DEVICES["rtx4090"]
    for name, memory, key in (
        ("NVIDIA H100 80GB HBM3", 85_024_112_640, "h100"),
        ("NVIDIA A100-SXM4-40GB", 42_298_834_944, "a100-40"),
        ("NVIDIA A100-SXM4-80GB", 84_974_239_744, "a100-80"),
        ("Tesla V100-SXM2-16GB", 16_935_682_048, "v100-16"),
        ("NVIDIA GeForce RTX 3090", 25_438_126_080, "rtx3090"),
        ("NVIDIA L40S", 47_677_177_856, "l40s"),
    ):
        found = recognise(name, memory)
        assert found is not None
        assert (found.peaks, found.memory) == (DEVICES[key].peaks, memory)
    assert recognise("NVIDIA Something", 10**10) is None


def test_a_device_without_bf16_computes_in_fp16() -> None:
    config = tiny_config(precision="auto")
    assert describe(config, 1, 1, find_device("v100")).precision == "fp16"
    assert describe(config, 1, 1, find_device("l4")).precision == "bf16"


def test_without_a_word_the_plan_is_for_this_machine_and_with_one_for_a_cluster() -> None:
    here = plan(tiny_config(device="auto"), probe=False)
    assert (here.job.device.kind, here.job.world_size) == ("cpu", 1)
    cluster = plan(tiny_config(device="auto"), nodes=2)
    assert (cluster.job.device.name, cluster.job.world_size) == ("H100 80GB", 16)
    assert "No gpu= was given and none is here: H100 80GB is assumed." in cluster.notes
    named = plan(tiny_config(device="auto"), gpu="t4", gpus=1, memory=10, link=2.5)
    assert (named.job.device.memory, named.job.device.link) == (10 * GIB, 2.5)
    cores = plan(tiny_config(device="cpu"), gpus=2, probe=False)
    assert (cores.job.device.kind, cores.job.world_size) == ("cpu", 2)


# ---------------------------------------------------------------- the run


def test_steps_images_and_epochs_follow_from_budget_and_batch() -> None:
    found = plan(tiny_config(steps=None, epochs=3.0), nodes=1, gpus=2, num_images=120)
    assert (found.run.steps, found.run.images, found.run.epochs) == (30, 360, 3.0)
    counted = plan(tiny_config(steps=10), gpus=5)
    assert (counted.num_images, counted.run.epochs) == (50, 6.0)
    away = plan(tiny_config(steps=10, data__source="nowhere/photos"), gpus=5)
    assert away.run.epochs is None
    assert away.notes[0].startswith("The images could not be counted here: ")


@pytest.mark.slow
def test_a_checkpoint_is_as_large_as_a_real_one(tmp_path: Path) -> None:
    config = small()
    state = state_of(config)
    take_step(config, state)
    folder = checkpoint.save(tmp_path / "checkpoints", 1, state.tensors(), state.numbers(), keep=2)
    real = sum(path.stat().st_size for path in folder.iterdir())
    teacher = checkpoint.write_teacher(tmp_path, 1, state.teacher.state_dict(), {})
    found = plan(config, probe=False, disk=2.0).checkpoint
    assert found.size == pytest.approx(real, rel=0.03)
    assert found.teacher == pytest.approx(teacher.stat().st_size, rel=0.01)
    assert found.seconds == (found.size + found.teacher) / 2e9
    assert found.copy == found.size
    shared = plan(small(parallel__strategy="ddp"), nodes=2, gpus=8, disk=2.0).checkpoint
    assert shared.copy == found.size // 16


@pytest.mark.slow
def test_a_search_for_neighbours_that_grows_with_the_processes_is_pointed_out() -> None:
    config = load_config("vits14_reg4")
    found = plan(config, nodes=64, gpu="h100")
    assert any(note.startswith("KoLeo compares 65536 images with one another: 16.0 GiB") for note in found.notes)
    grouped = plan(dataclasses.replace(config, loss=dataclasses.replace(config.loss, koleo_ranks=8)), nodes=64)
    assert not any("KoLeo" in note for note in grouped.notes)


def test_the_verdict_is_of_the_whole_run() -> None:
    found = plan(tiny_config(steps=10), probe=False)
    assert found.memory.on_cpu

    def verdict(steps: int, seconds: float, num_images: int | None, spare: int = GIB) -> str:
        memory = dataclasses.replace(found.memory, available=found.memory.needed + spare)
        run = dataclasses.replace(found.run, steps=steps, images=6 * steps, seconds=seconds)
        return dataclasses.replace(found, memory=memory, run=run, num_images=num_images).verdict

    assert verdict(1000, 9060.0, 4800) == "It fits, 1.00 GiB to spare, 2 h 31 min, 1.2 passes over 4,800 images."
    assert verdict(1000, 9060.0, None) == "It fits, 1.00 GiB to spare, 2 h 31 min."
    long = verdict(2_131_000, 248 * 86_400.0, 544)
    assert long.startswith("It fits, but 248 days on this CPU and 23,500 passes over 544 images; better: steps=")
    assert "init=FILE" in long
    assert long.endswith("a GPU.")
    assert verdict(2_131_000, 248 * 86_400.0, 544, spare=-GIB).startswith("It does not fit: 1.00 GiB too much.")


def test_what_loading_costs_is_measured_on_the_images_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        Image.fromarray(np.full((90, 120, 3), number, dtype=np.uint8)).save(tmp_path / f"{number}.png")
    config = tiny_config(steps=10, data__source=str(tmp_path), batch_size=2)
    found = plan(config, probe=False)
    assert 1e-4 < found.run.loading < 0.5
    of_one = tiny_config(steps=10, data__source=str(tmp_path), batch_size=2, model__channels="bag")
    assert plan(of_one, probe=False).run.loading is not None  # though its statistics are not measured yet
    assert plan(tiny_config(steps=10), probe=False).run.loading is None  # scenes are drawn once
    monkeypatch.setattr(plan_run, "seconds_per_image", lambda *_, **__: 3.0)
    monkeypatch.setattr(plan_run, "estimate", lambda *_: Speed(1.0, False, "assumed"))
    monkeypatch.setattr(plan_run, "usable_cores", lambda: 4)
    waits = plan(dataclasses.replace(config, data=dataclasses.replace(config.data, workers=1)), probe=False).run
    assert (waits.seconds, waits.waiting) == (10 * 2 * 3.0, pytest.approx(2 / 3))
    shares = plan(dataclasses.replace(config, data=dataclasses.replace(config.data, workers=4)), probe=False).run
    assert shares.seconds == pytest.approx(10 * 2 * (1.0 + 3.0 / 4))
    away = plan(dataclasses.replace(config, device="auto"), gpu="h100", gpus=2)
    assert (away.run.loading, away.run.waiting) == (3.0, None)
    assert away.run.cores_per_process == pytest.approx(3.0 * away.run.images_per_second / 2)


# ---------------------------------------------------------------- what does not fit


def test_a_run_on_the_cpu_fits_into_nine_tenths_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    def fits(free: float) -> bool:
        monkeypatch.setattr(plan_devices, "free_memory", lambda: int(free))
        return memory_of(describe(tiny_config(), 1, 1, plan_devices.cpu_device())).fits

    needed = memory_of(describe(tiny_config(), 1, 1, plan_devices.cpu_device())).needed
    assert needed > 0.7 * GIB  # a tenth of which are tensors
    assert fits(needed / 0.89)
    assert not fits(needed / 0.91)


@pytest.mark.slow
def test_the_peak_of_a_real_process_is_foretold(tmp_path: Path) -> None:
    config = small(batch_size=32, steps=8, checkpoint__every=2, data__workers=1)
    foretold = memory_of(describe(config, 1, 1, plan_devices.cpu_device())).needed
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    # A child's peak counts the process it was started from until it called exec, and a test worker is large: hence a
    # small process between the two.
    measure = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    run = [sys.executable, "-m", "dinoreg", "pretrain", str(path), f"out={tmp_path / 'run'}"]
    peak = subprocess.run([sys.executable, "-c", measure, *run], check=True, capture_output=True, text=True).stdout
    assert foretold == pytest.approx(1024 * int(peak), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gpus", "memory", "best"),
    [
        ("vitl16_short_reg4_in1k", 1, 36, {"optim.accumulate"}),
        ("vits14_reg4", 1, 3.0, {"model.checkpointing", "optim.accumulate"}),
        ("vitg14_reg4_in22k", 8, 24, {"optim.accumulate"}),
        ("vits14_reg4", 1, 4, {"optim.accumulate"}),
    ],
)
def test_the_fewest_overrides_that_fit_are_advised(name: str, gpus: int, memory: float, best: set[str]) -> None:
    target = device(memory=int(memory * GIB))
    job = describe(load_config(name), 1, gpus, target)
    assert not memory_of(job).fits
    found = remedies(job)
    assert set(found[0].overrides) == best
    for remedy in found:
        again = memory_of(describe(load_config(name, str(remedy).split()), 1, gpus, target))
        assert again.fits
        assert again == remedy.memory
        assert len(remedy.overrides) == len(best)
        for key in remedy.overrides:  # none of them is superfluous
            fewer = {other: value for other, value in remedy.overrides.items() if other != key}
            assert not memory_of(change(job, fewer)).fits


@pytest.mark.slow
def test_sharding_is_advised_where_the_state_is_what_is_too_large() -> None:
    config = load_config("vitg14_reg4_in22k", ["parallel.strategy=ddp", "batch_size=1"])
    found = remedies(describe(config, 1, 8, device(memory=24 * GIB)))
    assert str(found[0]) == "parallel.strategy=fsdp"


@pytest.mark.slow
def test_the_batch_is_touched_only_when_nothing_else_is_enough() -> None:
    config = load_config("vitl16_short_reg4_in1k", ["head.prototypes=1000000"])
    job = describe(config, 1, 1, device(memory=32 * GIB))
    found = remedies(job)
    assert found
    assert "batch_size" in found[0].overrides
    assert not memory_of(change(job, {"model.checkpointing": True, "optim.accumulate": 64})).fits


@pytest.mark.slow
def test_nothing_is_advised_for_what_fits_on_no_account() -> None:
    with pytest.raises(UserError, match=r"^does not fit: .* GiB a device as it is, .* with model.checkpointing=true"):
        plan(load_config("vitg14_reg4_in22k"), gpus=1, gpu="t4")


# ---------------------------------------------------------------- the command


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err.strip().removeprefix("dinoreg: ")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "plan: missing CONFIG"),
        (["nodes=2"], "plan: missing CONFIG"),
        (["vits14"], "config vits14: unknown; did you mean vits14_reg4?"),
        (["vits14_reg4", "gpus=0"], "gpus=0: expected at least 1"),
        (["vits14_reg4", "nodes=two"], "nodes=two: expected a whole number"),
        (["vits14_reg4", "node=2"], "node: unknown key (command line)"),
        (["vits14_reg4", "gpu=h1000"], "gpu=h1000: unknown; did you mean h100?; known: v100"),
        (["vits14_reg4", "memory=-1"], "memory=-1: expected a positive number"),
        (["vits14_reg4", "utilisation=2"], "utilisation=2: expected a share of the peak in (0, 1]"),
        (["vits14_reg4", "steps=none"], "no budget: give one of"),
        (["vits14_reg4", "epochs=3", "gpus=1"], "epochs=3: the data are not here to be counted; give num_images="),
        (["vits14_reg4", "gpus=6", "parallel.shard=4"], "parallel.shard=4: expected a divisor of the 6 processes"),
        (["vits14_reg4", "gpus=6", "loss.koleo_ranks=4"], "loss.koleo_ranks=4: expected a divisor of the 6 processes"),
        (["vits14_reg4", "gpu=t4", "precision=bf16"], "precision=bf16: a T4 16GB does not compute in it"),
        (["vits14_reg4", "gpu=t4", "device=cpu"], "gpu=t4: the config says device=cpu"),
        (["vits14_reg4", "device=cpu", "model.attention=xformers"], "model.attention=xformers: runs on CUDA"),
        (["vits14_reg4", "gpu=t4", "probe=true"], "probe=true: there is no T4 16GB here to measure on"),
        (["vits14_reg4", "loss.anchor_weight=1"], "loss.anchor_weight=1: expected 0 without init="),
        (["vitg14_reg4_in22k", "gpu=t4", "gpus=1"], "does not fit: "),
        (["vits14_reg4", "gpus=1", "out=nowhere/plan.json"], "out=nowhere/plan.json: cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_run_is_one_line_with_exit_code_2_and_nothing_written(
    arguments: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *arguments]) == 2
    assert one_line(capsys).startswith(expected)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_is_printed_on_one_screen_and_written_with_every_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    arguments = ["vitl16_short_reg4_in1k", "nodes=4", "gpu=h100", "num_images=1281167", "link=25", f"out={out}"]
    assert main(["plan", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "vitl16_reg4 on 4 x 8 H100 80GB, fsdp, bf16, 64 images a process, 2048 in all"
    assert lines[-1] == f"plan: {out}"
    assert len(lines) <= 55
    assert max(map(len, lines)) <= 120
    assert any(line.startswith("It fits, ") for line in lines)
    assert any("estimate: 33% of 989 TFLOP/s" in line for line in lines)
    found = json.loads(out.read_text())
    assert found == plan(load_config(arguments[0]), nodes=4, gpu="h100", num_images=1281167, link=25).as_dict()
    assert found["fits"]
    assert found["run"]["epochs"] == pytest.approx(125000 * 2048 / 1281167)
    assert found["memory"]["needed"] < found["memory"]["available"]
    peak = found["memory"]["moments"][found["memory"]["peak"]]
    assert sum(value for part, value in peak.items() if part != "total") == peak["total"]
    assert found["links"]["between"] == 25
    assert found["step"]["seconds"] * 125000 == pytest.approx(found["run"]["seconds"])


def test_a_plan_that_does_not_fit_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "vitl16_short_reg4_in1k", "gpus=1", "gpu=a100-40", "batch_size=80"]) == 0
    out = capsys.readouterr().out
    assert "It does not fit: " in out
    assert "\n  optim.accumulate=2   " in out


def test_a_plan_for_this_machine_measures_where_that_is_quick(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(to_yaml(tiny_config()))
    assert main(["plan", str(config)]) == 0
    out = capsys.readouterr().out
    assert "on this machine's CPU, fp32, 6 images a process" in out
    assert "measured: 10 steps of 6 images" in out


def test_times_read_as_people_write_them() -> None:
    assert [duration(value) for value in (31, 720, 7_300, 200_000)] == ["31 s", "12 min", "2 h 1 min", "2 d 7 h"]
