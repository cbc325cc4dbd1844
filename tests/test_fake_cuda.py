"""A step, the loader, runs and evaluations on a CUDA device that counts and computes nothing (`tests/fake_cuda`).

PyTorch's CUDA code is real here, the numbers are not: what is asserted are launches, waits, copies, memory, messages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fake_cuda.fixture import counts_of, needs_fake_cuda, run
from tests.jobs_on_trial import labelled_folder
from tests.miniatures import ade20k, roxford5k
from tests.training import TINY, read_lines

pytestmark = needs_fake_cuda

# Kernels and matrix products of a step without augmentation; these numbers only go down.
LAUNCHES = {
    ("vits14_reg4", 128): 1121 + 218,
    ("vitl16_short_reg4_in1k", 64): 1818 + 410,
    ("vitg14_reg4_in22k", 8): 3188 + 682,
}
# GB that a step's operations read and write outside matrix products; they only go down, too.
TRAFFIC = {"vitl16_short_reg4_in1k": 290}
SMALL = {**TINY, "device": "cuda", "precision": "bf16", "batch_size": 8}


def test_a_step_launches_no_more_than_it_did_and_neither_it_nor_the_loader_makes_the_host_wait() -> None:
    loaded = {**SMALL, "data.workers": 2, "data.prefetch": 2}
    found = run("smoke", config="vits14_reg4", overrides={"batch_size": 128}, loaded=loaded, devices=2)
    of_step = counts_of(found["step"]["counts"])
    assert of_step.waits == {}
    assert of_step.mallocs == 0
    if torch.__version__.startswith("2.10."):  # another release has other kernels
        assert of_step.launches <= LAUNCHES["vits14_reg4", 128]
    batches = found["batches"]
    of_batches = counts_of(batches["counts"])
    assert {wait.partition(" < ")[0] for wait in of_batches.waits} <= {"event"}  # a worker's, for its buffer's copies
    assert "pageable to device large" not in of_batches.copies
    assert of_batches.copies["pinned to device"] == 6 * 5  # crops of two sizes, mask, its indices and weights
    assert of_batches.devices == [1]  # those of worker threads, too, whose current device is 0
    assert 3 <= batches["buffers"] <= 5  # they are used again when they have been copied


MODES: dict[str, dict[str, Any]] = {
    "sinkhorn": {},
    "softmax": {"loss.centering": "softmax"},
    "fp16": {"precision": "fp16"},
    "fp32": {"precision": "fp32"},
    "separate heads": {"head.separate": True},
    "checkpointing": {"model.checkpointing": True},
    "micro-batches": {"optim.accumulate": 2},
    "no local crops": {"crops.num_local": 0},
    "anchor, PaKA": {"loss.anchor_weight": 1.0, "loss.paka_weight": 1.0},
    "varlen": {"model.attention": "varlen"},
    "sdpa": {"model.attention": "sdpa"},
    "plain": {"model.attention": "plain"},
    "swiglu, no drop path": {"model.ffn": "swiglu", "model.drop_path": 0.0},
}
FUSED = ("flash_fwd", "fmha_cutlassF")  # names of fused attention's forward kernels


@pytest.fixture(scope="module")
def modes() -> dict[str, Any]:
    cases = [{"config": None, "overrides": {**SMALL, **mode}, "warm": 3} for mode in MODES.values()]
    return dict(zip(MODES, run("several", cases=cases), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_no_mode_of_a_step_waits_for_the_device(modes: dict[str, Any], mode: str) -> None:
    counts = counts_of(modes[mode]["counts"])
    assert counts.launches > 100
    assert counts.waits == {}
    assert not [copy for copy in counts.copies if "pageable" in copy]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_the_attention_that_is_named_is_the_one_that_is_launched(modes: dict[str, Any], mode: str) -> None:
    named = modes[mode]["attention"]
    assert named == MODES[mode].get("model.attention", named)
    kernels = counts_of(modes[mode]["counts"]).kernels
    fused = sum(number for kernel, number in kernels.items() if any(part in kernel for part in FUSED))
    assert (fused == 0) == (named == "plain")
    if mode in (
        "sinkhorn",
        "varlen",
        "sdpa",
    ):  # two blocks: of the teacher, and of the student for all crops or for each size
        assert fused == 2 * (3 if named == "sdpa" else 2)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["auto", "varlen", "sdpa"])
def test_blocks_compile_to_four_graphs_without_a_break_and_run_the_fused_kernels(attention: str) -> None:
    found = run("compiled", overrides={**SMALL, "model.attention": attention}, steps=5)
    assert found["breaks"] == []
    assert found["graphs"][1] == found["graphs"][-1] <= 4  # whatever the number of masked patches
    counts = counts_of(found["counts"])
    assert counts.waits == {}
    assert any(part in kernel for kernel in counts.kernels for part in FUSED)


@pytest.mark.slow
@pytest.mark.skipif(not torch.__version__.startswith("2.10."), reason="another PyTorch has other kernels")
def test_launches_and_traffic_of_large_networks_only_go_down() -> None:
    cases = [{"config": name, "overrides": {"batch_size": size}} for name, size in LAUNCHES]
    found = run("several", cases=[{**case, "traffic": case["config"] in TRAFFIC} for case in cases])
    for (name, size), case in zip(LAUNCHES, found, strict=True):
        counts = counts_of(case["counts"])
        assert counts.launches <= LAUNCHES[name, size], name
        assert counts.waits == {}
        if name in TRAFFIC:
            outside = sum(moved for kind, moved in case["traffic"].items() if kind != "products")
            assert outside <= TRAFFIC[name] * 1e9


@pytest.mark.slow
def test_memory_is_what_the_plan_says_whatever_the_masks() -> None:
    given = {
        "config": "vitl16_short_reg4_in1k",
        "overrides": {"batch_size": 64, "model.attention": "sdpa"},
        "steps": 40,
        "ranks": 1,
    }
    found = run("varying_masks", **given)
    counts, plan = counts_of(found["counts"]), found["plan"]
    assert counts.allocated == pytest.approx(plan["allocated"], rel=0.01)
    assert counts.reserved <= plan["allocated"] + plan["fragments"]
    # As much as the plan asks for, less its allowance for what is no tensor, is enough.
    cap = (plan["allocated"] + plan["fragments"]) / 2**30
    capped = run("varying_masks", **given, gib=cap)
    assert counts_of(capped["counts"]).retries == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A whole run of one process, with a probe: the folder and what was counted."""
    out = tmp_path_factory.mktemp("run") / "run"
    probe = {"probe.data": "scenes:count=40,size=32", "probe.every": 3}
    return out, run("run", overrides={**SMALL, "steps": 6, "checkpoint.every": 2, **probe}, out=str(out))


@pytest.mark.slow
def test_a_run_waits_in_log_lines_probes_and_checkpoints_only(finished: tuple[Path, dict[str, Any]]) -> None:
    out, found = finished
    assert found["error"] is None
    assert (out / "checkpoints" / "last").exists()
    assert [line["step"] for line in read_lines(out / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    waits = counts_of(found["counts"]).waits
    assert any(" write" in wait for wait in waits)
    never = (" train_step", " __next__", " observe")  # functions on the stack
    assert [wait for wait in waits if any(function in wait for function in never)] == []
    assert sum(times for wait, times in waits.items() if " after <" in wait and "outlook" in wait) == 2  # first steps


@pytest.mark.slow
def test_rejected_steps_roll_a_run_back_and_it_goes_on(tmp_path: Path) -> None:
    overrides = {**SMALL, "steps": 6, "checkpoint.every": 2, "health.max_nonfinite": 2, "optim.accumulate": 2}
    # Reads of `train`: at each step whether to roll back; at steps 2 and 4 whether the state is good to save.
    reads = [0.0, 0.0, 0.0, 1.0, 2.0, 0.0]
    answers = {"train": reads, "_record_rejected": [1.0, 1.0, 0.0, 0.0, 1.0]}
    found = run("run", overrides=overrides, out=str(tmp_path / "run"), answers=answers)
    assert found["error"] is None
    steps = [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4, 3, 4, 5, 6]
    events = [line["name"] for line in read_lines(tmp_path / "run" / "health" / "events.jsonl")]
    assert "rolled-back" in events


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "parallel"), [(2, "ddp"), (2, "fsdp"), (4, "hsdp")])
def test_processes_train_save_and_go_on_and_send_what_the_plan_says(
    tmp_path: Path, processes: int, parallel: str
) -> None:
    """Under HSDP two copies of the network, each on two processes, which KoLeo, too, looks at together."""
    options = {"parallel.strategy": parallel}
    if parallel == "hsdp":
        options = {"parallel.strategy": "fsdp", "parallel.shard": 2, "loss.koleo_ranks": 2}
    overrides = {**SMALL, **options, "checkpoint.every": 2, "parallel.timeout": 300}
    for steps in (4, 6):
        given = {"overrides": {**overrides, "steps": steps}, "out": str(tmp_path / "run"), "at_step": steps - 1}
        found = run("run", processes=processes, devices=processes, **given)
        assert [rank["error"] for rank in found] == [None] * processes
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    planned = run("planned_collectives", overrides={**overrides, "steps": 6}, world_size=processes)
    for rank, counts in enumerate(counts_of(each["step"]) for each in found):
        assert counts.devices == [rank]
        sent = {kind: size * (1 if kind == "all-reduce" else 2) for kind, (_, size) in counts.collectives.items()}
        assert sent.keys() == planned.keys()
        for kind in planned:
            assert sent[kind] == pytest.approx(planned[kind], rel=0.01, abs=1024), kind


@pytest.mark.slow
def test_evaluations_views_features_and_distillation_run_to_their_end(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    weights, pictures = f"weights={finished[0]}", labelled_folder(tmp_path / "pictures", images=12)
    ade20k.write(tmp_path / "datasets")
    roxford5k.write(tmp_path / "datasets")
    usual = [weights, "device=cuda", "workers=0", "baselines=false", "examples=0", f"out={tmp_path / 'eval'}"]
    options = ["knn.k=[3]", "linear.lrs=[0.1]", "linear.epochs=1", "linear.epoch_steps=3", "logistic.num_c=2"]
    options += ["attention.epochs=1", "attention.epoch_steps=2"]
    dense = ["segmentation.size=48", "segmentation.stride=32", "segmentation.steps=3", "segmentation.lrs=[0.01]"]
    dense += ["knn_segmentation.size=48", "retrieval.size=48"]
    shown = [f"images={pictures}", weights, "device=cuda"]
    student = {**SMALL, "steps": 2, "distill": finished[0], "out": tmp_path / "student"}
    lines = [
        ["eval", str(pictures), "protocols=[knn,linear,logistic,attention]", *usual, *options],
        ["eval", "ade20k,roxford5k", f"root={tmp_path / 'datasets'}", *usual, *dense],
        ["embed", f"data={pictures}", weights, "device=cuda", f"out={tmp_path / 'features.safetensors'}"],
        ["view", "attention", *shown, f"out={tmp_path / 'view'}"],
        ["view", "pca", *shown, f"out={tmp_path / 'view'}"],
        ["registers", *shown, f"out={tmp_path / 'registers'}"],
        ["pretrain", "small", *(f"{key}={'none' if value is None else value}" for key, value in student.items())],
    ]
    found = run("commands", lines=lines)
    for line, each in zip(lines, found, strict=True):
        # A device that computes nothing leaves norms of zero, which the register report refuses to draw.
        nothing = line[0] == "registers" and "are not finite, or all zero" in each["said"]
        assert each["code"] == (1 if nothing else 0), f"{line}\n{each['said']}"
        assert counts_of(each["counts"]).launches, line
    assert [wait for wait in counts_of(found[-1]["counts"]).waits if " train_step" in wait] == []  # with distillation
