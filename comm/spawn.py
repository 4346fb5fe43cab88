"""Processes that end with their parent, and a pool of ranks for tests and tools. Knows no engine."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import fcntl
import importlib
import importlib.util
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

PRELOAD = ["torch", "torch.distributed", "moeserve.comm.mesh"]
START_TIMEOUT = 60.0
SETTLE_SECONDS = 0.5
"""After the first failure of a job, how long the other ranks may take to finish or fail on their own."""

_started: list[BaseProcess] = []


def start_process(
    target: Callable[..., object],
    args: Sequence[Any] = (),
    name: str | None = None,
    *,
    with_main: bool = True,
) -> BaseProcess:
    """Starts target(*args) in a new process that dies with this one, however this one ends.

    target is a function of an importable module, args can be pickled. The process is forked from a server
    that has torch imported already (the first call starts the server and pays the import). It has this
    process's environment, but what torch reads at import (OMP_NUM_THREADS) counts as it was at the first
    call. The kernel kills it when this process ends in any way without having waited for it; it may start
    processes of its own, which are bound to it in the same way.

    with_main: whether it imports this program's main module first, as multiprocessing does. False for what does
    not need anything of it: a script without `if __name__ == "__main__":` would start over there.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    _ensure_fork_server()
    process = context.Process(
        target=_run_bound_to_parent, args=(dict(os.environ), target, tuple(args)), name=name
    )
    with contextlib.nullcontext() if with_main else _hidden_main():
        process.start()
    if not _started:
        atexit.register(
            _kill_started
        )  # registered after multiprocessing's own join at exit, so runs before it
    _started[:] = [p for p in _started if p.is_alive()] + [process]
    return process


@contextlib.contextmanager
def _hidden_main() -> Iterator[None]:
    """Multiprocessing tells a new process what the main module is; there is no option to leave it out."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that was free on `host` a moment ago."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


class RankError(RuntimeError):
    """A rank of a pool failed. rank: which; the message ends with its traceback or says how it died."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank


class RankPool:
    """`size` rank processes on this host that are joined by gloo, started once and sent functions to run.

    After a failure the ranks are killed, since messages may be left under way between them, and the next run
    starts new ones. Use as a context manager, or call close.
    """

    def __init__(self, size: int, *, threads: int = 1, operation_timeout: float = 60.0) -> None:
        """threads: torch threads of a rank; operation_timeout: seconds that one group operation may wait."""
        self.size = size
        self._threads = threads
        self._operation_timeout = operation_timeout
        self._ranks: list[_RankProcess] = []

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        """function(rank, *args) on every rank at once -> their results by rank.

        function stands at the top level of a module; args and results can be pickled. timeout: seconds until
        the last rank is done.

        Raises RankError when a rank raises, dies or is late, with the traceback of the first that failed.
        """
        if not self._ranks:
            self._start()
        call = pickle.dumps((_where(function), pickle.dumps(args)))
        return self._all("run", call, timeout)

    def close(self) -> None:
        """Ends the ranks; returns when they are gone."""
        for rank in self._ranks:
            rank.kill()
        self._ranks = []

    def _start(self) -> None:
        port = free_port()
        self._ranks = [_RankProcess(rank, self.size) for rank in range(self.size)]
        setup = pickle.dumps((self.size, port, self._threads, self._operation_timeout))
        self._all("start", setup, START_TIMEOUT)

    def _all(self, what: str, message: bytes, timeout: float) -> list[Any]:
        """Sends one message to every rank and gives their answers."""
        deadline = time.monotonic() + timeout
        try:
            for rank in self._ranks:
                rank.send(message)
            failures = self._collect(deadline)
            if failures:
                raise _first_failure(failures, self.size)
            late = [rank for rank in self._ranks if not rank.answered]
            if late:
                stacks = "\n".join(f"rank {rank.number} was at:\n{rank.stack()}" for rank in late)
                raise RankError(
                    late[0].number, f"{what}: {len(late)} ranks late after {timeout:g} s\n{stacks}"
                )
            return [rank.result for rank in self._ranks]
        except BaseException:
            self.close()
            raise

    def _collect(self, deadline: float) -> list[RankError]:
        """Waits for answers until all are there, the deadline, or a little after the first failure."""
        failures: list[RankError] = []
        while waiting := [rank for rank in self._ranks if not rank.answered]:
            ready = wait([rank.pipe for rank in waiting], max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in waiting:
                if rank.pipe in ready and (failure := rank.receive()):
                    deadline = min(deadline, time.monotonic() + SETTLE_SECONDS)
                    failures.append(failure)
        return failures


class _RankProcess:
    """The parent's end of one rank."""

    def __init__(self, number: int, size: int) -> None:
        self.number = number
        self.answered = True
        self.result: Any = None
        self._stacks = tempfile.NamedTemporaryFile("r", prefix=f"rank{number}-", suffix=".stack")  # noqa: SIM115
        self.pipe, child = multiprocessing.Pipe()
        self._process = start_process(_serve, (number, child, self._stacks.name), f"rank {number} of {size}")
        child.close()

    def send(self, message: bytes) -> None:
        self.answered = False
        try:
            self.pipe.send_bytes(message)
        except OSError:  # it died since its last answer: receive() will say so
            return

    def receive(self) -> RankError | None:
        self.answered = True
        try:
            good, value = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            self._process.join(5)
            return RankError(self.number, f"rank {self.number} {_manner_of_death(self._process.exitcode)}")
        if good:
            self.result = value
            return None
        return RankError(self.number, f"rank {self.number} raised:\n{value}")

    def stack(self) -> str:
        """Python stacks of a rank that hangs, written by its faulthandler."""
        if self._process.pid is None or not self._process.is_alive():
            return "(it is gone)"
        os.kill(self._process.pid, signal.SIGUSR1)
        time.sleep(0.2)
        return self._stacks.read() or "(it does not answer signals: stopped?)"

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()
        self._stacks.close()


def _first_failure(failures: list[RankError], size: int) -> RankError:
    """The failure to show: the first to arrive, but a death before the broken connections it caused."""
    first = next((f for f in failures if " died " in str(f).splitlines()[0]), failures[0])
    others = [str(f.rank) for f in failures if f is not first]
    note = f"(also failed: rank {', '.join(others)} of {size})\n" if others else ""
    return RankError(first.rank, note + str(first))


def _manner_of_death(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"died of {signal.Signals(-exit_code).name}"
    return f"died with exit code {exit_code}"


def _ensure_fork_server() -> None:
    """Starts the fork server deaf to SIGTERM and SIGINT: they often come to a whole process group, and the server
    and its processes would die before the one process that is to end them in order has done so."""
    resource_tracker.ensure_running()  # first: it would unblock the signals again
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _run_bound_to_parent(
    environment: dict[str, str], target: Callable[..., object], args: tuple[Any, ...]
) -> None:
    _die_with_parent()
    os.environ.clear()
    os.environ.update(environment)
    target(*args)


def _die_with_parent() -> None:
    """Has the kernel send this process SIGKILL at the moment its starter's end of their pipe closes.

    PR_SET_PDEATHSIG would watch the fork server instead, and that lives as long as any of its children.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    pipe = parent.sentinel
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if wait([pipe], 0):  # it ended before the request
        os._exit(1)


def _kill_started() -> None:
    for process in _started:
        if process.is_alive():
            process.kill()


def _serve(rank: int, pipe: Connection, stacks: str) -> None:
    """A rank's life: one setup message, then functions until the pipe closes."""
    import torch

    from moeserve.comm import mesh

    stack_file = Path(stacks).open("w")  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1, stack_file, all_threads=True)
    size, port, threads, operation_timeout = pickle.loads(pipe.recv_bytes())
    torch.set_num_threads(threads)
    _answer(pipe, lambda: mesh.start(rank, size, "127.0.0.1", port, timeout=operation_timeout))
    while True:
        try:
            where, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        _answer(pipe, lambda: _find(*where)(rank, *pickle.loads(args)))  # noqa: B023


def _answer(pipe: Connection, work: Callable[[], Any]) -> None:
    try:
        message = pickle.dumps((True, work()))
    except BaseException:
        message = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(message)


def _where(function: Callable[..., Any]) -> tuple[str, str, str]:
    """Module, file and name of a function: how a rank finds it, test modules off the import path included."""
    name, module = function.__qualname__, function.__module__
    if "." in name or "<" in name:
        raise ValueError(f"function = {module}.{name}: must stand at the top level of its module")
    return module, getattr(sys.modules[module], "__file__", None) or "", name


def _find(module: str, file: str, name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(_load(module, file), name)
    return function


def _load(module: str, file: str) -> ModuleType:
    if module in sys.modules and module != "__main__":
        return sys.modules[module]
    try:
        if module != "__main__":
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module + ".").startswith(error.name + "."):
            raise
    spec = importlib.util.spec_from_file_location(module.replace("__main__", "__mp_main__"), file)
    assert spec is not None and spec.loader is not None, f"{module} has no file to load it from"
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[module] = loaded  # before its code runs: classes it pickles are found by this name
    spec.loader.exec_module(loaded)
    return loaded
