"""Two hosts, each a network namespace, and the cable between them: torchrun across it, as on two machines."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import RUN, Faults, _plain_environment, _text, assert_sound
from processes import free_port
from training import loss_trace

TIMEOUT = 8.0  # parallel.timeout here
LONGER = {"steps": 120, "checkpoint.every": 20}  # so that the cut comes in the middle
MARGIN = 30.0  # asking who is lost, and a machine that is busy


class TwoHosts:
    """Namespaces with addresses .1 and .2 behind a switch in a third, whose ports can be unplugged."""

    def __init__(self) -> None:
        tag = f"f{os.getpid() % 10_000}"
        self.names = [f"{tag}a", f"{tag}b"]
        self.switch = f"{tag}s"
        self.addresses = ["10.213.7.1", "10.213.7.2"]

    def up(self) -> None:
        """Raises CalledProcessError or OSError where this is not permitted."""
        self.ip("netns", "add", self.switch)
        self.ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        self.ip("-n", self.switch, "link", "set", "bridge", "up")
        for name, address in zip(self.names, self.addresses):
            self.ip("netns", "add", name)
            self.ip("-n", name, "link", "set", "lo", "up")
            self.ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", name, "netns", self.switch)
            self.ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            self.ip("-n", name, "link", "set", "eth0", "up")
            self.ip("-n", self.switch, "link", "set", name, "master", "bridge", "up")
            # `ip netns exec` mounts these: the host's name is its own address, and no name server is waited for.
            folder = Path("/etc/netns") / name
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")
            (folder / "resolv.conf").write_text("options timeout:1 attempts:1\n")

    def down(self) -> None:
        for name in (*self.names, self.switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)

    def cut(self) -> None:
        """What is sent gets lost; the cards notice nothing, as behind a switch that has failed."""
        self.ip("-n", self.switch, "link", "set", self.names[1], "nomaster")

    def mend(self) -> None:
        self.ip("-n", self.switch, "link", "set", self.names[1], "master", "bridge")

    @staticmethod
    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("networks of one's own take root and the program ip")
    hosts = TwoHosts()
    try:
        try:
            hosts.up()
        except (subprocess.CalledProcessError, OSError) as error:
            pytest.skip(f"no networks can be made here: {getattr(error, 'stderr', '') or error}")
        yield hosts
    finally:
        hosts.down()


class Hosted:
    """torchrun on one host, with one rank."""

    def __init__(self, hosts: TwoHosts, number: int, port: int, out: Path, log: Path) -> None:
        keys = {**RUN, "resume": "true", "out": out, "parallel.timeout": TIMEOUT, **LONGER}
        config = out.parent / "plain.yaml"
        config.write_text("batch_size: 4\n")
        place = ["--nnodes=2", f"--node-rank={number}", "--nproc-per-node=1"]
        meeting = [f"--master-addr={hosts.addresses[0]}", f"--master-port={port}"]
        run = ["-m", "dinoreg", "pretrain", str(config), *(f"{key}={_text(value)}" for key, value in keys.items())]
        exec_in = ["ip", "netns", "exec", hosts.names[number]]
        python = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
        self.log = log
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                [*exec_in, *python, *place, *meeting, *run],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**_plain_environment(), "PYTHONPATH": os.pathsep.join(sys.path)},
                start_new_session=True,
            )

    def said(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.startswith("dinoreg: ")]

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def wait_for(what: object, seconds: float, processes: list[Hosted]) -> float:
    """Seconds until `what()` holds; AssertionError with the logs when it does not come to that."""
    began = time.monotonic()
    while not what():  # type: ignore[operator]
        if time.monotonic() - began > seconds:
            raise AssertionError("\n".join(each.log.read_text() for each in processes))
        time.sleep(0.02)
    return time.monotonic() - began


@pytest.mark.slow
def test_with_the_link_cut_both_sides_stop_naming_the_other_and_when_it_is_back_they_go_on(
    hosts: TwoHosts, faults: Faults, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    out = tmp_path / "run"
    metrics = out / "metrics.jsonl"
    port = free_port()
    sides = [Hosted(hosts, number, port, out, tmp_path / f"{number}.log") for number in range(2)]
    try:
        wait_for(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 3, 120, sides)
        hosts.cut()
        seconds = wait_for(lambda: all(side.said() for side in sides), TIMEOUT + MARGIN, sides)
        record_property("seconds", seconds)
        print(f"both sides had stopped {seconds:.1f} s after the cut, with a time-out of {TIMEOUT:.0f} s")
        for number, side in enumerate(sides):
            (line,) = side.said()
            other = 1 - number
            assert re.search(rf"rank {number} \(.*stopped after step \d+: lost rank {other} \(", line), line
            assert "does not answer" in line
            assert "resume=true" in line
        assert_sound(out)
    finally:
        for side in sides:
            side.end()  # torchrun itself may wait for the other side for ever
    hosts.mend()
    again = [Hosted(hosts, number, port + 1, out, tmp_path / f"again{number}.log") for number in range(2)]
    try:
        wait_for(lambda: all(side.process.poll() is not None for side in again), 120, again)
        assert [side.process.returncode for side in again] == [0, 0], [side.log.read_text() for side in again]
    finally:
        for side in again:
            side.end()
    whole = faults.start(tmp_path / "whole", processes=2, **{key.replace(".", "__"): LONGER[key] for key in LONGER})
    assert faults.wait(whole) == [0, 0], whole.describe()
    assert loss_trace(out) == loss_trace(tmp_path / "whole")
    assert_sound(out, LONGER["steps"])
