"""Runs on several processes of this machine, as torchrun would start them; shared by the tests of scale."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.multiprocessing as mp

from dinoreg.config.load import Config


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# What ranks import of other packages. Each is a fork of a process that has imported them, and nothing of this one.
IMPORTED = (
    *("numpy", "PIL.Image", "omegaconf", "rich.console", "torch", "torchvision.transforms.v2"),
    *("torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.nn.parallel"),
    *("torch.multiprocessing", "torch.utils.serialization", "torch._dynamo", "pytest"),
)


def start_each(num_processes: int, work: Callable[..., None], *arguments: Any) -> None:
    """Call `work(number, *arguments)` in new processes with this one's environment; raises what one raises."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(IMPORTED))
    given = (dict(os.environ), work, arguments)
    mp.start_processes(_in_environment, args=given, nprocs=num_processes, start_method="forkserver")


def _in_environment(
    number: int, environment: dict[str, str], work: Callable[..., None], arguments: Sequence[Any]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    work(number, *arguments)


def _rank(rank: int, world_size: int, port: int, work: Callable[..., None], arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    work(*arguments)


def on_processes(world_size: int, work: Callable[..., None], *arguments: Any) -> None:
    """Call `work(*arguments)` in `world_size` new processes that find torchrun's variables; raises what one raises."""
    start_each(world_size, _rank, world_size, free_port(), work, arguments)


def pretrain_each(configs: Sequence[Config]) -> None:
    """The runs of several configs, one after the other; start-up is paid once."""
    from dinoreg.train.loop import pretrain

    for config in configs:
        pretrain(config)
