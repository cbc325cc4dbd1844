"""The machine under a run: what device and precision are chosen, and in which words they are refused."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dinoreg.runtime import device as runtime
from dinoreg.runtime import environment
from dinoreg.runtime.device import autocast, keep_freed_memory, peak_memory, pick_device, pick_precision
from dinoreg.runtime.errors import UserError


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


def refusal(name: str) -> str:
    with pytest.raises(UserError) as caught:
        pick_device(name)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"device={name}: ")
    return message


@pytest.mark.usefixtures("no_gpu")
def test_auto_is_the_cpu_where_there_is_no_gpu() -> None:
    assert pick_device("auto") == torch.device("cpu")
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.usefixtures("two_gpus")
def test_auto_is_the_current_gpu_where_there_is_one() -> None:
    assert pick_device("auto") == torch.device("cuda", 1)
    assert pick_device("cuda:0") == torch.device("cuda", 0)
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cuda", "PyTorch finds no CUDA device here; use device=cpu or device=auto"),
        ("cuda:3", "PyTorch finds no CUDA device here"),
        ("mps", "no Apple GPU here"),
        ("tpu", "expected auto, cpu, cuda, cuda:N or mps"),
        ("", "expected auto, cpu"),
        ("cuda:x", "expected auto, cpu"),
        ("meta", "expected auto, cpu"),
    ],
)
def test_a_device_that_is_not_there_is_refused_in_one_line(name: str, expected: str) -> None:
    assert expected in refusal(name)


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_beyond_the_last_is_refused() -> None:
    assert "this machine has 2 CUDA device(s)" in refusal("cuda:2")


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_a_precision_that_is_named_is_taken_on_any_device(name: str, dtype: torch.dtype) -> None:
    for device in ("cpu", "cuda", "mps"):
        assert pick_precision(name, torch.device(device)) == dtype


@pytest.mark.parametrize(("hardware", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_precision_of_a_cpu_is_bf16_only_in_hardware(
    hardware: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: hardware)
    assert pick_precision("auto", torch.device("cpu")) == dtype


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    """A GPU of this compute capability, on which PyTorch can make bfloat16 tensors, as it can on every one."""
    properties = SimpleNamespace(name="GPU", major=major, minor=minor, total_memory=16 << 30)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
    ids=["V100", "T4", "A100", "H100"],
)
def test_auto_precision_of_a_gpu_is_bf16_where_the_hardware_has_it_or_else_fp16(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpu(monkeypatch, *capability)
    assert torch.cuda.is_bf16_supported()  # PyTorch's own default counts emulation
    assert pick_precision("auto", torch.device("cuda")) == dtype
    if dtype == torch.bfloat16:
        assert pick_precision("tf32", torch.device("cuda")) == torch.float32
    else:
        with pytest.raises(UserError, match="precision=tf32: cuda does not compute in it; use fp32"):
            pick_precision("tf32", torch.device("cuda"))
    (described,) = environment._torch()["cuda"]
    assert described["bf16"] == (dtype == torch.bfloat16)


def test_auto_precision_elsewhere_is_fp32() -> None:
    assert pick_precision("auto", torch.device("mps")) == torch.float32


def test_whether_the_cpu_has_bf16_agrees_with_its_flags() -> None:
    try:
        with open("/proc/cpuinfo") as file:
            flags = set(next(line for line in file if line.startswith("flags")).split(":")[1].split())
    except (OSError, StopIteration):
        pytest.skip("no x86 /proc/cpuinfo")
    assert runtime.cpu_has_bf16() == bool(flags & {"avx512_bf16", "amx_tile"})


def test_autocast_is_off_for_fp32_and_of_the_dtype_otherwise() -> None:
    cpu = torch.device("cpu")
    one = torch.ones(3, 5)
    for dtype in (torch.bfloat16, torch.float16):
        with autocast(cpu, dtype):
            assert torch.is_autocast_enabled("cpu")
            assert (one @ one.T).dtype == dtype
    with autocast(cpu, torch.float32):
        assert not torch.is_autocast_enabled("cpu")
        assert (one @ one.T).dtype == torch.float32
    # Inside another autocast fp32 still means fp32.
    with autocast(cpu, torch.bfloat16), autocast(cpu, torch.float32):
        assert (one @ one.T).dtype == torch.float32
    assert (one @ one.T).dtype == torch.float32


@pytest.fixture
def _no_malloc_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in [key for key in os.environ if key.startswith("MALLOC_") or key == "DINOREG_MALLOC"]:
        monkeypatch.delenv(key)


class Libc:
    """Stands in for glibc and notes what it is asked."""

    def __init__(self, answer: int = 1) -> None:
        self.answer = answer
        self.calls: list[tuple[int, int]] = []

    def mallopt(self, parameter: int, value: int) -> int:
        self.calls.append((parameter, value))
        return self.answer


@pytest.mark.usefixtures("_no_malloc_settings")
@pytest.mark.parametrize(
    "setting", [("DINOREG_MALLOC", "0"), ("MALLOC_TRIM_THRESHOLD_", "1"), ("MALLOC_ARENA_MAX", "2")]
)
def test_allocator_settings_of_the_environment_are_respected(
    setting: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    libc = Libc()
    monkeypatch.setattr(runtime.sys, "platform", "linux")
    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda name: libc)
    monkeypatch.setenv(*setting)
    assert keep_freed_memory() is False
    assert libc.calls == []


@pytest.mark.usefixtures("_no_malloc_settings")
def test_freed_memory_is_kept_by_two_thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = Libc()
    monkeypatch.setattr(runtime.sys, "platform", "linux")
    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda name: libc)
    assert keep_freed_memory() is True
    assert dict(libc.calls) == {-3: 2**30, -1: 2**31 - 1}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
    libc.answer = 0
    assert keep_freed_memory() is False
    monkeypatch.setattr(runtime.sys, "platform", "darwin")
    libc.calls.clear()
    assert keep_freed_memory() is False
    assert libc.calls == []


@pytest.mark.usefixtures("_no_malloc_settings")
def test_a_machine_without_glibc_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise OSError(name)

    monkeypatch.setattr(runtime.sys, "platform", "linux")
    monkeypatch.setattr(runtime.ctypes, "CDLL", missing)
    assert keep_freed_memory() is False
    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda name: object())
    assert keep_freed_memory() is False


def test_peak_memory_is_positive_and_never_falls() -> None:
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(50_000_000)  # 200 MB
    after = peak_memory(torch.device("cpu"))
    assert before > 10_000_000
    assert after >= max(before, held.numel() * held.element_size())
    del held
    assert peak_memory(torch.device("cpu")) >= after


@pytest.mark.gpu
def test_peak_memory_of_a_gpu_is_what_was_allocated_there() -> None:
    device = pick_device("cuda")
    held = torch.ones(25_000_000, device=device)
    assert peak_memory(device) >= held.numel() * held.element_size()


def fake_machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


MEMINFO = {"proc/meminfo": f"MemTotal: {16 << 20} kB\nMemAvailable:   {8 << 20} kB"}


@pytest.mark.parametrize(
    ("files", "gib"),
    [
        (MEMINFO, 8),
        ({}, None),
        (  # version 2, seen from the machine; the outer group is the narrower one
            {
                **MEMINFO,
                "proc/self/cgroup": "0::/outer/inner",
                "sys/fs/cgroup/outer/inner/memory.max": "max",
                "sys/fs/cgroup/outer/inner/memory.current": str(2 << 30),
                "sys/fs/cgroup/outer/memory.max": str(6 << 30),
                "sys/fs/cgroup/outer/memory.current": str(4 << 30),
                "sys/fs/cgroup/outer/memory.stat": f"anon 1\ninactive_file {1 << 30}",
            },
            3,
        ),
        (  # version 1, in a container that sees its own group as the root
            {
                **MEMINFO,
                "proc/self/cgroup": "9:name=systemd:/\n4:memory,hugetlb:/docker/1234",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": str(4 << 30),
                "sys/fs/cgroup/memory/memory.usage_in_bytes": str(3 << 30),
                "sys/fs/cgroup/memory/memory.stat": f"inactive_file 5\ntotal_inactive_file {1 << 29}",
            },
            1.5,
        ),
        (  # no limit is a very large one in version 1
            {
                **MEMINFO,
                "proc/self/cgroup": "4:memory:/",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "5",
            },
            8,
        ),
    ],
    ids=("no group", "unknown", "version 2", "version 1", "no limit"),
)
def test_free_memory_is_the_machines_or_what_the_narrowest_group_leaves(
    tmp_path: Path, files: dict[str, str], gib: float | None
) -> None:
    free = environment.free_memory(fake_machine(tmp_path, files))
    assert free == (None if gib is None else int(gib * 2**30))


def test_cores_are_those_that_the_groups_quota_allows(tmp_path: Path) -> None:
    assert environment.usable_cores(tmp_path) == len(os.sched_getaffinity(0))
    quota = {
        "proc/self/cgroup": "0::/a",
        "sys/fs/cgroup/a/cpu.max": "max 100000",
        "sys/fs/cgroup/cpu.max": "50000 100000",
    }
    assert environment.usable_cores(fake_machine(tmp_path / "2", quota)) == 1
    old = {"proc/self/cgroup": "1:cpu,cpuacct:/a", "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "90000"}
    old["sys/fs/cgroup/cpu/a/cpu.cfs_period_us"] = "100000"
    assert environment.usable_cores(fake_machine(tmp_path / "1", old)) == 1
