"""Starts the ranks of an engine, carries messages to and from them, and sees to it that none outlives the rest.

Ranks are local processes, or those that torchrun or Slurm has started. Knows no request and no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import re
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Any

import zmq
import zmq.asyncio

from moeserve.comm.mesh import keep_store
from moeserve.comm.spawn import free_port, start_process
from moeserve.engine.rank import rank_main
from moeserve.messages import FromRank, RankFailed, RankReady, Shutdown, ToRank, decode_from_rank, encode
from moeserve.plan import EnginePlan

log = logging.getLogger(__name__)

FAILURE_SETTLE_SECONDS = 1.0  # peers of a dead rank fail too: wait for all reports before naming the cause


@dataclass(frozen=True)
class RankPlace:
    """Where one rank runs and whom it meets."""

    rank: int
    local_rank: int
    local_size: int
    world_size: int
    store: tuple[str, int]  # address and port of the ranks' rendezvous
    mail: str  # zmq address of the front-end


def place_from_environment(environment: Mapping[str, str]) -> RankPlace | None:
    """The rank that torchrun or Slurm made of this process, or None when neither did.

    They meet at MASTER_PORT, where torchrun's own store answers; the mail has the port after it.
    Raises ValueError naming the variable that is missing or no number.
    """
    if "RANK" in environment:
        names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
    elif environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":  # unset in a batch script, which is no rank
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NUM_TASKS")
        environment = {**environment, names[2]: _own_node(environment, names[2])}
    else:
        return None
    numbers = []
    for name in (*names, "MASTER_PORT"):
        if not re.fullmatch(r"\d+", environment.get(name, "")):
            raise ValueError(f"{name} = {environment.get(name)!r}: the launcher must set it to a number")
        numbers.append(int(environment[name]))
    rank, local_rank, local_size, world_size, port = numbers
    address = environment.get("MASTER_ADDR")
    if not address:
        raise ValueError("MASTER_ADDR is not set: the launcher must set it to the host of rank 0")
    return RankPlace(rank, local_rank, local_size, world_size, (address, port), f"tcp://{address}:{port + 1}")


def _own_node(environment: Mapping[str, str], name: str) -> str:
    """This node's number in Slurm's short list, where "4(x2),3" is 4 on each of two nodes and 3 on another."""
    text, node = environment.get(name, ""), environment.get("SLURM_NODEID", "")
    numbers: list[str] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?(?:,|$)", text):
        numbers += [number] * int(times or 1)
    if not node.isdecimal() or int(node) >= len(numbers):
        raise ValueError(
            f"{name} = {text!r}, SLURM_NODEID = {node!r}: the launcher must set both, as Slurm does"
        )
    return numbers[int(node)]


def check_reachable(place: RankPlace) -> None:
    """Raise ValueError when the other hosts' ranks cannot reach this host at its own name, else they wait minutes."""
    host = place.store[0]
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        raise ValueError(f"MASTER_ADDR = {host}: not known on the host of rank 0: {error}") from None
    meant = host == "localhost" or host.startswith("127.")  # several launchers on one machine
    if address.startswith("127.") and not meant and place.local_size < place.world_size:
        raise ValueError(
            f"MASTER_ADDR = {host}: is {address} on that host itself, where ranks of other hosts cannot reach it; "
            "use its address in their network, or correct its /etc/hosts"
        )


@dataclass
class RankSet:
    """The ranks of a running engine, as the front-end sees them: one leader an attention replica."""

    plan: EnginePlan
    place: RankPlace | None = None
    processes: dict[int, BaseProcess] = field(default_factory=dict)
    failures: list[RankFailed] = field(default_factory=list)
    lost: set[int] = field(default_factory=set)
    stopping: bool = False

    def __post_init__(self) -> None:
        self.num_replicas = self.plan.layout.dp
        self._directory = tempfile.mkdtemp(prefix="moeserve-")
        self._inbox: asyncio.Queue[tuple[int, FromRank]] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._num_ready = 0
        self._store: Any = None  # where ranks meet after a loss

    def start(self) -> None:
        """Start the ranks and listen to them; returns before they are ready. Call inside the event loop."""
        places = self._places()
        # Threads that spin while they wait hold the cores that the front-end and other ranks need: on a busy
        # machine a step then takes many scheduler ticks. Read when the ranks' fork server imports torch.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self._socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.set_hwm(0)
        try:
            self._socket.bind(places[0].mail)
        except zmq.ZMQError as error:
            self._socket.close()
            self.kill()
            store = places[0].store[1]
            raise ValueError(
                f"MASTER_PORT = {store}: rank 0 listens at {places[0].mail} too, the port after it: {error.strerror}"
            ) from error
        loop = asyncio.get_running_loop()
        for place in places:
            name = f"moeserve-rank-{place.rank}"
            process = start_process(rank_main, (self.plan, place), name, with_main=False)
            self.processes[place.rank] = process
            loop.add_reader(process.sentinel, self._process_ended, place.rank)
        self._tasks = [asyncio.create_task(self._listen())]

    def _places(self) -> list[RankPlace]:
        if self.place is not None:
            check_reachable(self.place)
            return [self.place]
        size = self.plan.layout.world_size
        store, mail = ("127.0.0.1", free_port()), f"ipc://{self._directory}/mail"
        return [RankPlace(rank, rank, size, size, store, mail) for rank in range(size)]

    async def send(self, replica: int, message: ToRank) -> None:
        leader = replica * self.plan.layout.tp
        await self._socket.send_multipart([str(leader).encode(), encode(message)])

    def lose(self, rank: int) -> None:
        """The others go on without this rank: its end is no failure of the engine. No process of it is left."""
        process = self.processes[rank]
        if process.is_alive():
            process.kill()
        process.join()
        self.lost.add(rank)
        self.failures = [failure for failure in self.failures if failure.rank != rank]

    def meeting_place(self) -> tuple[str, int]:
        """Address and port where the ranks that are left may meet; they are all on this host."""
        assert self.place is None, "ranks of a launcher are not asked to go on"
        host = "127.0.0.1"
        self._store = self._store or keep_store(host)
        return host, self._store.port

    async def receive(self) -> tuple[int, FromRank]:
        """The next message, with the replica of the rank that sent it."""
        return await self._inbox.get()

    def raise_failure(self) -> None:
        """Raise what the rank that failed first has to say, if one did; after stop, when all were heard.

        ValueError when it could not use a setting or a file, else RuntimeError with its traceback.
        """
        if not self.failures:
            return
        first = min(self.failures, key=lambda failure: failure.time)
        if first.mistake:
            raise ValueError(first.traceback)
        raise RuntimeError(f"rank {first.rank} failed\n{first.traceback}")

    async def stop(self, timeout: float = 10.0) -> None:
        """End every rank: politely when they still answer, else at once. No process is left."""
        if self.failures:
            await asyncio.sleep(FAILURE_SETTLE_SECONDS)
        self.stopping = True
        if not self.failures and self._num_ready == self.plan.layout.world_size:
            for replica in range(self.num_replicas):
                if replica * self.plan.layout.tp not in self.lost:
                    await self.send(replica, Shutdown())
            deadline = time.monotonic() + timeout
            while any(p.is_alive() for p in self.processes.values()) and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
        self.kill()
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._socket.close()

    def kill(self) -> None:
        """End what is left of the ranks without asking."""
        self.stopping = True
        for process in self.processes.values():
            if process.is_alive():
                process.kill()
        for process in self.processes.values():
            process.join()
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _listen(self) -> None:
        while True:
            sender, data = await self._socket.recv_multipart()
            message = decode_from_rank(data)
            if isinstance(message, RankFailed):
                self._fail(message)
            else:
                if isinstance(message, RankReady):
                    self._num_ready += 1
                    if (
                        self._num_ready == self.plan.layout.world_size
                    ):  # connected: a SIGKILL leaves no file now
                        shutil.rmtree(self._directory, ignore_errors=True)
                self._inbox.put_nowait((int(sender) // self.plan.layout.tp, message))

    def _process_ended(self, rank: int) -> None:
        process = self.processes[rank]
        asyncio.get_running_loop().remove_reader(process.sentinel)
        if self.stopping:
            return
        process.join(1)
        code = process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        if code < 0 or not any(failure.rank == rank for failure in self.failures):
            # A killed rank had no chance to report: it is the cause of what its peers complain of.
            reported = time.time() if code >= 0 else 0.0
            self._fail(
                RankFailed(rank=rank, time=reported, traceback=f"rank {rank} (pid {process.pid}) {how}")
            )

    def _fail(self, failure: RankFailed) -> None:
        if failure.rank in self.lost:
            return
        first = all(other.rank != failure.rank for other in self.failures)
        self.failures.append(failure)
        if first:
            self._inbox.put_nowait((failure.rank // self.plan.layout.tp, failure))


def run_rank_here(plan: EnginePlan, place: RankPlace) -> int:
    """Be a rank that a launcher started, until the front-end or the launcher's own end stops it; the exit code."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
    log.info("rank=%d host=%s waits for rank 0 at %s", place.rank, os.uname().nodename, place.store[0])
    rank_main(plan, place)
    return 0
