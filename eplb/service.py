"""The rebalancer in a process of its own: numpy only, so that a solve never holds up a step.

The engine's side never blocks: a thread carries typed messages over pipes. A solver that crashes or hangs is ended
and started again with the last placement and the remembered windows; after too many crashes the state is "dead"
and the placement in force stays.
"""

from __future__ import annotations

import logging
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Literal

import numpy as np
import numpy.typing as npt

from moeserve.eplb.rebalancer import Costs, Decision, Rebalancer, Settings
from moeserve.eplb.types import Placement, Topology

logger = logging.getLogger(__name__)

State = Literal["idle", "solving", "dead", "closed"]

TAKE_IN_SECONDS = 10.0
"""In which a solver reads what it is sent while it solves nothing; then it is ended."""


@dataclass(frozen=True)
class Start:
    """The first message to a solver, with what a former one knew."""

    placement: Placement
    topology: Topology
    settings: Settings
    windows: tuple[npt.NDArray[np.int64], ...]


@dataclass(frozen=True)
class Observe:
    load: npt.NDArray[np.int64]
    forget: bool = False


@dataclass(frozen=True)
class Applied:
    placement: Placement


@dataclass(frozen=True)
class Decide:
    number: int
    costs: Costs | None = None
    force: bool = False


@dataclass(frozen=True)
class Decided:
    number: int
    decision: Decision
    seconds: float


@dataclass(frozen=True)
class Failed:
    number: int
    error: str


ToSolver = Start | Observe | Applied | Decide
FromSolver = Decided | Failed


@dataclass(frozen=True)
class Answer:
    """A decision and how long it took to find; error instead where the solver failed."""

    decision: Decision | None
    seconds: float
    error: str = ""


class RebalanceService:
    """observe, request and applied return at once; poll gives the answer to a request when it is there."""

    def __init__(
        self,
        placement: Placement,
        topology: Topology,
        settings: Settings | None = None,
        *,
        solve_timeout: float = 60.0,
        max_restarts: int = 3,
    ) -> None:
        self._placement, self._topology, self._settings = placement, topology, settings or Settings()
        self._timeout, self._restarts_left = solve_timeout, max_restarts
        self._windows: deque[npt.NDArray[np.int64]] = deque(maxlen=self._settings.windows)
        self._todo: queue.SimpleQueue[ToSolver | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._pending = 0
        self._dead = self._closed = False
        self._solver: _Solver | None = None
        self.restarts = 0
        self._thread = threading.Thread(target=self._carry, name="eplb-service", daemon=True)
        self._thread.start()

    @property
    def state(self) -> State:
        if self._closed:
            return "closed"
        if self._dead:
            return "dead"
        return "solving" if self._pending else "idle"

    @property
    def pid(self) -> int | None:
        """Of the solver's process, None before it is up."""
        return None if self._solver is None else self._solver.process.pid

    def observe(self, load: npt.NDArray[np.int64], forget: bool = False) -> None:
        """A window's routed counts [L, E]; forget: the windows before it no longer count."""
        self._todo.put(Observe(np.array(load, np.int64), forget))

    def applied(self, placement: Placement) -> None:
        """The placement that is in force from now on."""
        self._todo.put(Applied(placement))

    def request(self, costs: Costs | None = None, force: bool = False) -> None:
        """Ask for a decision, at these costs instead of those of the settings; poll will have the answer.

        force: however little it brings.
        """
        self._pending += 1
        self._todo.put(Decide(self._pending, costs, force))

    def poll(self) -> Answer | None:
        """The next answer, None while there is none."""
        try:
            answer = self._answers.get_nowait()
        except queue.Empty:
            return None
        self._pending -= 1
        return answer

    def close(self) -> None:
        """End the solver. Answers that are on their way are dropped."""
        if self._closed:
            return
        self._closed = True
        self._todo.put(None)
        if self._solver is not None:
            self._solver.process.kill()  # its pipes are the thread's as long as that runs
        self._thread.join(timeout=5)
        if self._solver is not None:
            self._solver.end()

    def _carry(self) -> None:
        while (message := self._todo.get()) is not None:
            if isinstance(message, Observe):
                if message.forget:
                    self._windows.clear()
                self._windows.append(message.load)
            elif isinstance(message, Applied):
                self._placement = message.placement
            if self._dead:
                if isinstance(message, Decide):
                    self._answers.put(Answer(None, 0.0, "the solver is dead: it crashed too often"))
                continue
            try:
                self._pass_on(message)
            except (OSError, EOFError, TimeoutError) as error:
                self._crashed(message, error)

    def _pass_on(self, message: ToSolver) -> None:
        if self._solver is None:
            self._solver = _Solver()
            start = Start(self._placement, self._topology, self._settings, tuple(self._windows))
            self._solver.send(start)
            if not isinstance(message, Decide):
                return  # Start has said it already
        self._solver.send(message)
        if isinstance(message, Decide):
            reply = self._solver.receive(self._timeout)
            if isinstance(reply, Decided):
                self._answers.put(Answer(reply.decision, reply.seconds))
            else:
                self._answers.put(Answer(None, 0.0, reply.error))

    def _crashed(self, message: ToSolver, error: Exception) -> None:
        if self._closed:
            return
        what = f"{type(error).__name__}: {error}".strip(": ")
        logger.warning("the solver process failed (%s)", what)
        if self._solver is not None:
            self._solver.end()
            self._solver = None
        if self._restarts_left:
            self._restarts_left -= 1
            self.restarts += 1
        else:
            self._dead = True
            logger.error("the solver crashed too often: the placement in force stays")
        if isinstance(message, Decide):
            self._answers.put(Answer(None, 0.0, f"the solver process failed: {what}"))


class _Solver:
    """The child process and its two pipes."""

    def __init__(self) -> None:
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        command = [sys.executable, "-m", "moeserve.eplb.service", str(theirs_in), str(theirs_out)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        root = os.path.dirname(
            os.path.dirname(os.path.dirname(os.path.abspath(sys.modules["moeserve.eplb"].__file__ or "")))
        )
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH", "")]))
        try:
            self.process = subprocess.Popen(command, pass_fds=(theirs_in, theirs_out), env=environment)
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        self.out, self.back = Connection(ours_out, readable=False), Connection(ours_in, writable=False)

    def send(self, message: ToSolver) -> None:
        """Raises OSError when the process has ended, or was as it read nothing for TAKE_IN_SECONDS."""
        watch = threading.Timer(TAKE_IN_SECONDS, self.process.kill)
        watch.daemon = True
        watch.start()
        try:
            self.out.send(message)
        finally:
            watch.cancel()

    def receive(self, timeout: float) -> FromSolver:
        if not self.back.poll(timeout):
            raise TimeoutError(f"no answer in {timeout:g} s")
        reply: FromSolver = self.back.recv()
        return reply

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for end in (self.out, self.back):
            if not end.closed:
                end.close()


def serve(receive: Connection, send: Connection) -> None:
    """The solver's side: until the engine's end of the pipe closes."""
    rebalancer: Rebalancer | None = None
    while True:
        try:
            message: ToSolver = receive.recv()
        except EOFError:
            return
        if isinstance(message, Start):
            rebalancer = Rebalancer(message.placement, message.topology, message.settings)
            for load in message.windows:
                rebalancer.observe(load)
            continue
        assert rebalancer is not None
        if isinstance(message, Observe):
            rebalancer.observe(message.load, message.forget)
        elif isinstance(message, Applied):
            rebalancer.applied(message.placement)
        else:
            start = time.perf_counter()
            try:
                decision = rebalancer.decide(message.costs, message.force)
            except Exception:
                send.send(Failed(message.number, traceback.format_exc(limit=5)))
            else:
                send.send(Decided(message.number, decision, time.perf_counter() - start))


if __name__ == "__main__":
    # by its own name, so that messages are the same classes on both sides
    from moeserve.eplb import service

    service.serve(Connection(int(sys.argv[1]), writable=False), Connection(int(sys.argv[2]), readable=False))
