"""Meeting: the processes of a run wait for one another in a store, and one that is alone does not wait in silence.

The lowest of those that are there says who is missing.
"""

import os
import socket
import time
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

        raises OSError or dist.DistError where they are not within `timeout` seconds
        """
        self.count += 1
        # torchrun's store is that of its own processes, and of all attempts.
        prefix = f"dinoreg-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}-{self.count}"
        serves = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        keys = [f"{prefix}-{rank}" for rank in range(place.world_size)]
        until, say = time.monotonic() + timeout, time.monotonic() + FIRST_SECONDS
        while True:
            try:
                if self.store is None:
                    if not serves:  # refused at once, where the store tries on and on
                        socket.create_connection((place.address, place.port), timeout=3.0).close()
                    self.store = dist.TCPStore(
                        place.address, place.port, is_master=serves, wait_for_workers=False, multi_tenant=True
                    )
                self.store.set(keys[place.rank], "")
                self.store.wait(keys, timedelta(seconds=max(0.1, min(say, until) - time.monotonic())))
                self.store.set_timeout(timedelta(seconds=timeout))
                return dist.PrefixStore(prefix, self.store)
            except (OSError, dist.DistStoreError):  # rank 0 is not there, or some other one
                if time.monotonic() >= until:
                    raise
                time.sleep(0.1)
            if time.monotonic() >= say:
                self._name_missing(place, keys)
                say += AGAIN_SECONDS

    def _name_missing(self, place: Place, keys: list[str]) -> None:
        here = {rank for rank, key in enumerate(keys) if rank == place.rank or (self.store and self.store.check([key]))}
        missing = [rank for rank in range(place.world_size) if rank not in here]
        if missing and min(here) == place.rank:
            ranks = f"rank{'s' if len(missing) > 1 else ''} {listed(missing, 8)}"
            where = "" if 0 in here else f" at {place.address}:{place.port}"
            why = f"{place.told_by}={place.world_size}"
            line = f"rank {place.rank} of {place.world_size} waits for {ranks}{where} ({why})"
            print_status(f"{line}; is this process alone? start it with WORLD_SIZE=1")
