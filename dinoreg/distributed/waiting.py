"""Meeting: the processes of a run wait for one another in a store, and one that is alone does not wait in silence.

The lowest of those that are there says who is missing.
"""

import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from dinoreg.runtime.printable import listed, print_status

# Seconds after which the missing processes are named, and then again.
FIRST_SECONDS, AGAIN_SECONDS = 10.0, 300.0


@dataclass(frozen=True)
class Place:
    """A process's rank among `world_size`, its rank on its machine, and the host and port where rank 0 listens.

    told_by  the environment variable that says how many processes there are
    """

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int
    told_by: str = "WORLD_SIZE"


@dataclass
class Meetings:
    """The meetings of this process with the others at one place: their store, and how many there were.

    The store outlives a session: otherwise a process that is ahead would find it closing at its next session.
    """

    store: dist.Store | None = None
    count: int = 0

    def next_store(self, place: Place, timeout: float) -> dist.Store:
        """The store, once all processes are there, under a prefix that no other session has.

        raises TimeoutError where they are not within `timeout` seconds, dist.DistError for a store that is lost
        """
        self.count += 1
        # torchrun's store is that of its own processes, and of all attempts.
        prefix = f"dinoreg-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}-{self.count}"
        serves = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        keys = [f"{prefix}-{rank}" for rank in range(place.world_size)]
        until, say = time.monotonic() + timeout, time.monotonic() + FIRST_SECONDS
        where = place.address, place.port
        while True:
            with suppress(OSError):
                if self.store is None:
                    if not serves:  # refused at once, where the store tries on and on
                        socket.create_connection(where, timeout=3.0).close()
                    self.store = dist.TCPStore(*where, is_master=serves, wait_for_workers=False, multi_tenant=True)
                self.store.set(keys[place.rank], "")
                if self.store.check(keys):
                    self.store.set_timeout(timedelta(seconds=timeout))
                    return dist.PrefixStore(prefix, self.store)
            now = time.monotonic()
            if now >= min(until, say):
                here = {rank for rank, key in enumerate(keys) if self.store is not None and self.store.check([key])}
                here |= {place.rank}
                missing = listed((rank for rank in range(place.world_size) if rank not in here), 8)
                if now >= until:
                    raise TimeoutError(f"missing: rank {missing}")
                if min(here) == place.rank:
                    what = f"rank {place.rank} of {place.world_size} waits for rank {missing}"
                    at = "" if 0 in here else f" at {place.address}:{place.port}"
                    why = f"{place.told_by}={place.world_size}"
                    print_status(f"{what}{at} ({why}); is this process alone? start it with WORLD_SIZE=1")
                say = now + AGAIN_SECONDS
            time.sleep(0.2)
