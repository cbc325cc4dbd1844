"""Who is lost: what a process finds out by asking the others, and what it has been told."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from dinoreg.distributed import failures as peers
from dinoreg.distributed.failures import Peers


class Meeting:
    """Stands in for the process group: gathers what each of several threads brings."""

    def __init__(self, size: int) -> None:
        self.values: list[Any] = [None] * size
        self.barrier = threading.Barrier(size)

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait(30)
        return list(self.values)


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Peers]]:
    monkeypatch.setattr(peers, "ANSWER_SECONDS", 0.5)
    meeting = Meeting(3)
    found: dict[int, Peers] = {}

    def join(rank: int) -> None:
        found[rank] = Peers(rank, lambda value: meeting.gather(rank, value), "127.0.0.1")

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    yield [found[rank] for rank in range(3)]
    for each in found.values():
        each.close()


def test_those_that_are_well_are_not_missing(three: list[Peers]) -> None:
    assert three[0].missing() == []
    assert "yet all answer" in three[0].explain(4, 20.0)


def test_one_that_has_ended_is_named(three: list[Peers]) -> None:
    three[1].close()
    ((peer, how),) = three[0].missing()
    assert (peer.rank, how) == (1, "has ended")
    line = three[0].explain(4, 20.0)
    assert line.startswith(f"{three[0].own} stopped after step 4: lost rank 1 (")
    assert "resume=true" in line


def test_one_that_ends_while_it_is_asked_is_named_as_ended(three: list[Peers]) -> None:
    with socket.create_server(("", 0)) as dying:
        going = peers.Peer(2, socket.gethostname(), "127.0.0.1", 1, dying.getsockname()[1])
        three[0].all[2] = going

        def die() -> None:  # the system resets what it took for a process that is gone
            connection, _ = dying.accept()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()

        thread = threading.Thread(target=die)
        thread.start()
        assert three[0].missing() == [(going, "has ended")]
        thread.join(30)


def test_one_that_stands_still_is_named_for_not_answering(three: list[Peers]) -> None:
    with socket.create_server(("", 0)) as silent:  # the kernel takes the connection, nobody answers
        still = peers.Peer(2, socket.gethostname(), "127.0.0.1", 1, silent.getsockname()[1])
        three[0].all[2] = still
        assert three[0].missing() == [(still, "does not answer")]


@pytest.mark.slow
def test_why_one_stops_is_known_to_the_others_when_it_is_long_gone(three: list[Peers]) -> None:
    three[1].broadcast_failure("LookupError: the storage driver gave up")
    three[1].close()
    time.sleep(0.2)
    for other in (three[0], three[2]):
        assert "lost rank 1 (" in other.explain(4, 20.0)
        assert ": stopped: LookupError: the storage driver gave up" in other.explain(4, 20.0)


def test_what_strangers_send_is_not_believed(three: list[Peers]) -> None:
    for message in (b"", b"nonsense", b"99999 stopped: me", b"\xff\xfe 1 stopped", b"x" * 100_000):
        with socket.create_connection(("127.0.0.1", three[0].own.port)) as connection:
            connection.settimeout(5)
            assert connection.recv(100) == peers.WELL
            connection.sendall(message)
    assert three[1].missing() == []
    assert "yet all answer" in three[0].explain(4, 20.0)
