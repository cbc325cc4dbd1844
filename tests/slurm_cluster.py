"""A real Slurm on one machine for the tests: munged, slurmctld and a slurmd for each of a few virtual nodes.

Each node is a set of namespaces of its own (`unshare`): a host name, mounts (the nodes' /etc/hosts and /etc/slurm, and
a folder `unshared` that is empty there), and processes, so that killing its first process is pulling its plug. Settings
are those of a cluster in a hurry: what takes minutes on a real one takes seconds here. It needs root.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "squeue", "unshare", "env")
NODE = """\
hostname {name} && mount --bind {home}/etc/hosts /etc/hosts && mount -t tmpfs none {home}/unshared || exit 1
test ! -d /etc/slurm || mount --bind {home}/etc /etc/slurm || exit 1
exec slurmd -D -N {name} -f {home}/etc/slurm.conf
"""
SETTINGS = {
    "SlurmUser": "root",
    "SlurmdUser": "root",
    "AuthType": "auth/munge",
    "CredType": "cred/munge",
    "ProctrackType": "proctrack/linuxproc",  # no cgroups: these are not real machines
    "TaskPlugin": "task/none",
    "JobAcctGatherType": "jobacct_gather/none",
    "AccountingStorageType": "accounting_storage/none",
    "MpiDefault": "none",
    "MailProg": "/bin/true",
    "SwitchType": "switch/none",
    "SelectType": "select/cons_tres",
    "SelectTypeParameters": "CR_Core",
    "SlurmdParameters": "config_overrides",  # nodes are as large as the file says
    "PreemptType": "preempt/partition_prio",
    "PreemptMode": "REQUEUE",
    "SlurmctldParameters": "preempt_send_user_signal",
    "ReturnToService": "2",
    "KillWait": "15",
    "SlurmdTimeout": "6",
    "SlurmctldTimeout": "10",
    "MessageTimeout": "10",
    "InactiveLimit": "0",
    "MaxArraySize": "2",
    "SchedulerType": "sched/backfill",
    "SchedulerParameters": "batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1",
    "GresTypes": "gpu",
}


def obstacle() -> str | None:
    """Why no cluster can be started here, or None."""
    missing = [name for name in PROGRAMS if _which(name) is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)} missing)"
    if os.geteuid() != 0:
        return "a Slurm of one's own needs root"
    tried = subprocess.run(
        ["unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "hostname", "n1"], capture_output=True
    )
    return None if tried.returncode == 0 else "namespaces are not permitted here"


class SlurmCluster:
    """Nodes n1, n2, … with 16 cores and 2 stand-in GPUs; partitions `low` (default) and `high`, which preempts it."""

    def __init__(self, nodes: int = 4) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="sc-"))  # short: unix sockets below it hold 107 characters
        self.nodes = [f"n{number + 1}" for number in range(nodes)]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.shared = self.home / "shared"  # for the tests' own folders
        self.unshared = self.home / "unshared"

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.home / "etc" / "slurm.conf")}

    def start(self) -> None:
        for name in ("etc", "run", "state", "spool", "log", "gpu", "shared", "unshared"):
            (self.home / name).mkdir()
        self._configure()
        munge = ["--foreground", "--force", f"--key-file={self.home}/etc/munge.key", f"--socket={self.home}/run/munge"]
        files = [f"--{name}-file={self.home}/run/munge.{name}" for name in ("pid", "seed")]
        self._launch("munged", "munged", *munge, *files, f"--log-file={self.home}/log/munged.log")
        self._until(lambda: (self.home / "run" / "munge").exists(), "munged did not start", 10)
        self._launch("slurmctld", "slurmctld", "-D", "-c", "-f", self.environment["SLURM_CONF"])
        for name in self.nodes:
            self.start_node(name)
        self.wait_for_nodes()

    def stop(self) -> None:
        for name in self.nodes:
            if name in self.processes:
                self.kill_node(name, tell=False)
        for name in ("slurmctld", "munged"):
            process = self.processes.pop(name, None)
            if process is not None:
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        shutil.rmtree(self.home, ignore_errors=True)

    def run(self, *command: str, check: bool = True) -> str:
        """A Slurm command's output."""
        environment = {**_without_slurm(os.environ), **self.environment}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr or done.stdout}")
        return done.stdout.strip()

    def start_node(self, name: str) -> None:
        namespaces = ["--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._launch(name, "unshare", *namespaces, "sh", "-c", NODE.format(name=name, home=self.home))

    def kill_node(self, name: str, tell: bool = True) -> None:
        """Power a node off; tell: Slurm learns of it at once, as from a monitoring system, not by a time-out."""
        process = self.processes.pop(name)
        first = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in first or [process.pid]:
            os.kill(int(pid), signal.SIGKILL)  # a node's first process takes all others along
        process.wait()
        if tell:
            self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=killed")

    def wait_for_nodes(self) -> None:
        def ready() -> bool:
            rows = self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%N %t", check=False).splitlines()
            return {row.split()[0] for row in rows if row.split()[1] in ("idle", "mix", "alloc")} == set(self.nodes)

        self._until(ready, "the nodes did not come up", 30)

    def _configure(self) -> None:
        ports = _free_ports(len(self.nodes) + 1)
        addresses = {name: f"127.0.0.{11 + number}" for number, name in enumerate(self.nodes)}
        home = self.home
        for number in range(2):  # Slurm wants device files; these are /dev/null
            os.mknod(home / "gpu" / f"nvidia{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        (home / "etc" / "gres.conf").write_text(f"Name=gpu File={home}/gpu/nvidia[0-1]\n")
        lines = [
            "ClusterName=tests",
            f"SlurmctldHost={socket.gethostname()}(127.0.0.1)",
            f"SlurmctldPort={ports[0]}",
            f"AuthInfo=socket={home}/run/munge,cred_expire=5",
            f"StateSaveLocation={home}/state",
            f"SlurmdSpoolDir={home}/spool/%n",
            f"SlurmctldPidFile={home}/run/slurmctld.pid",
            f"SlurmdPidFile={home}/run/%n.pid",
            f"SlurmctldLogFile={home}/log/slurmctld.log",
            f"SlurmdLogFile={home}/log/%n.log",
            *(f"{key}={value}" for key, value in SETTINGS.items()),
            *(
                f"NodeName={name} NodeHostname={name} NodeAddr={addresses[name]} Port={port} "
                "CPUs=16 RealMemory=64000 Gres=gpu:2"
                for name, port in zip(self.nodes, ports[1:])
            ),
            "PartitionName=low Nodes=ALL Default=YES PriorityTier=1 MaxTime=INFINITE GraceTime=10",
            "PartitionName=high Nodes=ALL PriorityTier=10 MaxTime=INFINITE PreemptMode=OFF",
        ]
        (home / "etc" / "slurm.conf").write_text("\n".join(lines) + "\n")
        names = "".join(f"{address} {name}\n" for name, address in addresses.items())
        (home / "etc" / "hosts").write_text(names + Path("/etc/hosts").read_text())
        key = home / "etc" / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)

    def _launch(self, name: str, program: str, *arguments: str) -> None:
        environment = {**_without_slurm(os.environ), **self.environment}
        with open(self.home / "log" / f"{name}.out", "ab") as log:
            self.processes[name] = subprocess.Popen(
                [str(_which(program)), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env={**environment, "PATH": f"{environment.get('PATH', '')}:/usr/sbin:/sbin"},
                start_new_session=True,
            )

    def _until(self, condition, message: str, seconds: float) -> None:  # type: ignore[no-untyped-def]
        end = time.monotonic() + seconds
        while not condition():
            ended = [name for name, process in self.processes.items() if process.poll() is not None]
            if ended or time.monotonic() > end:
                logs = [path.read_text(errors="replace")[-800:] for path in sorted((self.home / "log").iterdir())]
                self.stop()
                raise RuntimeError(f"{message} ({', '.join(ended) or 'in time'}):\n" + "\n---\n".join(logs))
            time.sleep(0.1)


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/usr/bin:/bin")


def _without_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in environment.items() if not key.startswith(("SLURM", "SBATCH", "SRUN"))}


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
