"""Runs on several processes of this machine, as torchrun would start them; shared by the tests of scale."""

from __future__ import annotations

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
    mp.spawn(_rank, args=(world_size, free_port(), work, arguments), nprocs=world_size)


def pretrain_each(configs: Sequence[Config]) -> None:
    """The runs of several configs, one after the other; start-up is paid once."""
    from dinoreg.train.loop import pretrain

    for config in configs:
        pretrain(config)
