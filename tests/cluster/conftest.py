"""A cluster on one machine: hosts are sets of namespaces, joined by a bridge without a way out, and run real Slurm.

A host is a process and all that is started in its PID namespace: the kernel ends it whole when that process ends,
which it does when its input closes, so that nothing outlives the tests, however they end.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "ip", "nsenter", "unshare")
START_SECONDS = 20.0
ADDRESSES = {"ctl": "198.18.77.10", "n1": "198.18.77.11", "n2": "198.18.77.12"}  # RFC 2544: never routed
HOST = """
set -eu
echo "$1" > /proc/sys/kernel/hostname
mount --bind "$2/hosts" /etc/hosts
mount --bind /dev/null "$(readlink -f /etc/resolv.conf)"
ip link set lo up
echo up
exec cat
"""
# No munge: fit for nothing but hosts that nobody else can reach.
CONFIGURATION = """
ClusterName=lab
SlurmctldHost=ctl
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
NodeName=n[1-2] CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=lab Nodes=n[1-2] Default=YES MaxTime=10 State=UP
"""


@dataclass
class Host:
    """A host of the cluster; `process` holds its namespaces."""

    name: str
    process: subprocess.Popen[str]
    environment: dict[str, str]

    def command(self, *words: str) -> list[str]:
        namespaces = f"/proc/{self.process.pid}/ns"
        kinds = {"net": "net", "mount": "mnt", "uts": "uts", "pid": "pid_for_children"}
        return ["nsenter", *(f"--{kind}={namespaces}/{file}" for kind, file in kinds.items()), *words]

    def run(self, *words: str, timeout: float = 20.0, check: bool = True) -> str:
        """What a command prints on this host."""
        done = subprocess.run(
            self.command(*words),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0 or not check, (
            f"{self.name}: {words} ended with {done.returncode}:\n{done.stdout}"
        )
        return done.stdout


@dataclass
class Cluster:
    """Slurm on hosts n1 and n2, its controller on ctl."""

    ctl: Host
    nodes: dict[str, Host]
    folder: Path

    def submit(self, *words: str) -> Job:
        output = self.folder / f"job-{time.monotonic_ns()}.log"
        number = self.ctl.run("sbatch", "--parsable", f"--output={output}", *words).strip()
        return Job(self, number, output)


@dataclass
class Job:
    cluster: Cluster
    number: str
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text("utf-8") if self.log.exists() else ""

    def describe(self) -> dict[str, str]:
        """Slurm's own words: JobState, ExitCode ..."""
        words = self.cluster.ctl.run("scontrol", "show", "job", self.number, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, condition: Callable[[], bool], seconds: float) -> None:
        """Until condition holds; AssertionError with all logs when it does not in time."""
        start = time.monotonic()
        while not condition():
            if time.monotonic() > start + seconds:
                raise AssertionError(
                    f"after {seconds:g} s: {self.describe()}\n{logs_of(self.cluster.folder)}"
                )
            time.sleep(0.1)

    def wait_end(self, seconds: float) -> dict[str, str]:
        running = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")
        self.wait(lambda: self.describe()["JobState"] not in running, seconds)
        return self.describe()


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes of two CPUs with Slurm up, a fresh one a test; skips with a reason where that cannot be had."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (slurmctld slurmd slurm-client iproute2)")
    if os.geteuid() != 0:
        pytest.skip("network namespaces and slurmd need root")
    folder = tmp_path_factory.mktemp("cluster")
    with ExitStack() as stack:
        hosts = {name: stack.enter_context(running_host(name, folder)) for name in ADDRESSES}
        try:
            join(hosts)
        except (AssertionError, subprocess.CalledProcessError) as error:
            pytest.skip(f"hosts cannot be joined by a network here: {error}")
        start_slurm(hosts, folder)
        yield Cluster(hosts.pop("ctl"), hosts, folder)


@contextmanager
def running_host(name: str, folder: Path) -> Iterator[Host]:
    """A host without a network yet. Skips when this machine does not let root make namespaces."""
    table = "".join(f"{address} {host}\n" for host, address in ADDRESSES.items())
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{table}")
    words = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc"]
    process = subprocess.Popen(
        [*words, "sh", "-c", HOST, "host", name, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        said = process.stdout.readline()
        if said != "up\n":
            pytest.skip(f"namespaces cannot be made here: {said.strip()}")
        yield Host(name, process, environment(folder))
    finally:
        process.stdin.close()
        process.wait(10)


def environment(folder: Path) -> dict[str, str]:
    """Of all commands on hosts; jobs inherit it. `moeserve` is this checkout's, as an activated environment has it."""
    command = folder / "bin" / "moeserve"
    command.parent.mkdir(exist_ok=True)
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m moeserve "$@"\n')
    command.chmod(0o755)
    return os.environ | {
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "SLURM_CONF": str(folder / "slurm.conf"),
    }


def join(hosts: dict[str, Host]) -> None:
    """One Ethernet for all hosts; the bridge is on ctl."""
    ctl = hosts["ctl"]
    ctl.run("ip", "link", "add", "eth0", "type", "bridge")
    for name, host in hosts.items():
        if host is not ctl:
            peer = ("peer", "name", "eth0", "netns", str(host.process.pid))
            subprocess.run(
                ["ip", "link", "add", name, "netns", str(ctl.process.pid), "type", "veth", *peer],
                check=True,
                timeout=10,
            )
            ctl.run("ip", "link", "set", name, "master", "eth0", "up")
        host.run("ip", "address", "add", f"{ADDRESSES[name]}/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")


def start_slurm(hosts: dict[str, Host], folder: Path) -> None:
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # needs none mounted
    ctl = hosts["ctl"]
    ctl.run("slurmctld", "-c")
    for name in ("n1", "n2"):
        (folder / name).mkdir()
        hosts[name].run("slurmd")
    deadline = time.monotonic() + START_SECONDS
    idle = ("sinfo", "--noheader", "--states=idle", "--format=%D")
    while ctl.run(*idle, check=False).strip() != "2":
        assert time.monotonic() < deadline, logs_of(folder)
        time.sleep(0.1)


def logs_of(folder: Path) -> str:
    """The end of every log: of Slurm's daemons and of the jobs."""
    ends = {log.name: log.read_text("utf-8", "replace")[-4000:] for log in sorted(folder.glob("*.log"))}
    return "\n".join(f"--- {name}\n{end}" for name, end in ends.items())
