"""Finding the lost process of a run: each process answers health checks on a port of its own, from a thread.

A failed collective says that some process is missing, seldom which. A dead process refuses the connection, one behind a
broken network does not accept it, a stopped one accepts it and sends nothing; healthy ones answer. A failing process
sends its reason to the others before it exits: they wait in a collective until its connections close, and gloo closes
them only when the process is gone and can no longer answer. (torch's TCPStore does not serve here: it lives on rank 0's
machine and is lost with it, and a stopped process stays registered in it.)
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import repeat
from typing import Any

ANSWER_SECONDS = 3.0
WELL = b"well"
MOST_BYTES = 400
_MAX_CONNECTIONS = 64


@dataclass(frozen=True)
class Peer:
    """One process of a run: its rank, its machine's name and address, its process id, and the port it answers on."""

    rank: int
    host: str
    address: str
    pid: int
    port: int

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid})"


class Peers:
    """The processes of a run, and the thread that answers their health checks.

    rank    of this process
    gather  collects one value of every process, in the order of the ranks
    toward  a host that all processes reach (where rank 0 listens): this process answers at the address of the network
            interface that leads there; None: localhost
    """

    def __init__(self, rank: int, gather: Callable[[Any], list[Any]], toward: str | None = None) -> None:
        self._listener = socket.create_server(("", 0), backlog=128)
        port = self._listener.getsockname()[1]
        self._answer = WELL
        self._reasons: dict[int, str] = {}  # by rank, why it stopped
        self._thread = threading.Thread(target=self._serve, name="dinoreg-peers", daemon=True)
        self._thread.start()
        places = gather((socket.gethostname(), _own_address(toward), os.getpid(), port))
        self.all = [Peer(number, *place) for number, place in enumerate(places)]
        self.own = self.all[rank]

    def close(self) -> None:
        """Close the port and end the answering thread."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread, which closing alone does not
        self._listener.close()

    def broadcast_failure(self, reason: str) -> None:
        """Send the others the reason why this process stops, and answer health checks with it from now on.

        reason  one line; cut to about `MOST_BYTES` bytes
        """
        self._answer = f"stopped: {reason}".encode()[:MOST_BYTES]
        message = f"{self.own.rank} stopped: {reason}".encode()[:MOST_BYTES]
        self._check_others(message)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            with connection:
                try:
                    connection.settimeout(ANSWER_SECONDS)
                    connection.sendall(self._answer)
                    number, _, reason = connection.recv(MOST_BYTES).decode(errors="replace").partition(" ")
                except OSError:
                    continue
            if reason and number.isdecimal():
                self._reasons[int(number)] = reason

    def missing(self) -> list[tuple[Peer, str]]:
        """The processes that do not answer a health check properly in `ANSWER_SECONDS`, and their states in words."""
        return [(peer, state) for peer, state in self._check_others() if state is not None]

    def _check_others(self, message: bytes = b"") -> list[tuple[Peer, str | None]]:
        others = [peer for peer in self.all if peer != self.own]
        with ThreadPoolExecutor(_MAX_CONNECTIONS) as pool:
            return list(zip(others, pool.map(_check, others, repeat(message))))

    def explain(self, step: int | None, timeout: float) -> str:
        """One line: which processes are lost, after which step, and what to do.

        step     after which the collective failed; None: outside the steps
        timeout  seconds, parallel.timeout, for the message

        Takes at least `ANSWER_SECONDS`, so that this process still answers while the others check it.
        """
        started = time.monotonic()
        lost = self.missing()
        time.sleep(max(0.0, ANSWER_SECONDS - (time.monotonic() - started)))
        me = f"{self.own} stopped" if step is None else f"{self.own} stopped after step {step}"
        if not lost:
            return f"{me}: a collective failed or took more than parallel.timeout={timeout:.0f} s, yet all answer"
        # Those that sent a reason come first: the others may have ended because of them.
        lost.sort(key=lambda peer_and_state: peer_and_state[0].rank not in self._reasons)
        names = "; ".join(f"{peer}: {self._reasons.get(peer.rank, state)}" for peer, state in lost[:8])
        more = f" and {len(lost) - 8} more" if len(lost) > 8 else ""
        return f"{me}: lost {names}{more}. Go on with the same command and resume=true"


def _own_address(toward: str | None) -> str:
    """This machine's address on the way to `toward`; nothing is sent."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(toward or "localhost", 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"


def _connect(peer: Peer) -> socket.socket:
    # A machine may know itself by a loopback address that means another machine elsewhere.
    local = peer.address.startswith("127.") or peer.address == "::1"
    address = peer.host if local and peer.host != socket.gethostname() else peer.address
    connection = socket.create_connection((address, peer.port), timeout=ANSWER_SECONDS)
    connection.settimeout(ANSWER_SECONDS)
    return connection


def _check(peer: Peer, message: bytes = b"") -> str | None:
    """Send a peer the message, and return its state in words; None when it is healthy."""
    try:
        with _connect(peer) as connection:
            answer = connection.recv(MOST_BYTES)  # before sending, or closing would take the message back
            connection.sendall(message)
            return None if answer == WELL else answer.decode(errors="replace") or "has ended"
    except ConnectionError:  # refused, or taken by the system for a process that was about to end
        return "has ended"
    except TimeoutError:
        return "does not answer"
    except OSError as error:
        return f"cannot be reached ({error.strerror or type(error).__name__})"
