"""Saying who is waited for while the processes of a run meet, so that a process that is alone does not wait in silence.

Each waiting process leaves its rank in the store where they meet; the lowest rank says which ones are missing.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

# Seconds after which a waiting process makes itself known, and after which the missing ones are named, then again.
KNOWN_SECONDS, FIRST_SECONDS, AGAIN_SECONDS = 2.0, 10.0, 300.0
_LISTED = 8


@contextmanager
def announced(rank: int, world_size: int, address: str, port: int, why: str, session: int) -> Iterator[None]:
    """A context in which stderr gets a line on the missing processes, after `FIRST_SECONDS` and rarely after that.

    address, port  where rank 0 listens
    why            the variable that says there are so many processes
    session        number of this meeting in this process
    """
    done = threading.Event()

    def watch() -> None:
        if done.wait(KNOWN_SECONDS):
            return
        prefix = f"waiting-{session}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}-"
        _ranks_here(address, port, prefix, rank, world_size)
        pause = FIRST_SECONDS - KNOWN_SECONDS
        while not done.wait(pause):
            here = _ranks_here(address, port, prefix, rank, world_size)
            missing = [str(other) for other in range(world_size) if other not in here]
            if missing and min(here) == rank and not done.is_set():
                more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
                ranks = f"rank{'s' if len(missing) > 1 else ''} {', '.join(missing[:_LISTED])}{more}"
                where = "" if 0 in here else f" at {address}:{port}"
                line = f"rank {rank} of {world_size} waits for {ranks}{where} ({why})"
                print(f"{line}; is this process alone? start it with WORLD_SIZE=1", file=sys.stderr, flush=True)
            pause = AGAIN_SECONDS

    threading.Thread(target=watch, name="dinoreg-waiting", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _ranks_here(address: str, port: int, prefix: str, rank: int, world_size: int) -> set[int]:
    """The ranks that have made themselves known, after this one has; without rank 0's store this one only."""
    try:
        # Refused at once, where the store tries on and on.
        socket.create_connection((address, port), timeout=3.0).close()
        store = dist.TCPStore(address, port, timeout=timedelta(seconds=5), wait_for_workers=False)
        store.set(f"{prefix}{rank}", "")
        return {rank} | {other for other in range(world_size) if store.check([f"{prefix}{other}"])}
    except (OSError, RuntimeError, ValueError):
        return {rank}
