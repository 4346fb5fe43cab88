"""A real `moeserve serve` in a process of its own, as its user starts it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import httpx
import pytest

START_SECONDS = 120.0
EXIT_SECONDS = 30.0


@dataclass
class ServerProcess:
    """The process and what it has printed; url once it is ready."""

    process: subprocess.Popen[str]
    url: str = ""
    lines: list[str] = field(default_factory=list)

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            found = re.search(r"API +(http://\S+)/v1", self.output)
            if found:
                self.url = found.group(1)
                return
            time.sleep(0.05)
        raise AssertionError(f"the server did not become ready:\n{self.output}")

    def wait_exit(self) -> int:
        code = self.process.wait(EXIT_SECONDS)
        time.sleep(0.2)  # the reader thread takes the last lines
        return code

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=10)

    def processes(self) -> list[int]:
        """All below the server: the fork server, its tracker, and the ranks."""
        return [*children(self.process.pid), *self.rank_pids()]

    def rank_pids(self) -> list[int]:
        """The rank processes: children of the server's fork server, in order of start."""
        return sorted(rank for child in children(self.process.pid) for rank in children(child))


def children(pid: int) -> list[int]:
    """Living processes that `pid` started."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat") as file:
                state, parent = file.read().rsplit(")", 1)[1].split()[:2]
        except OSError:
            continue  # it has ended meanwhile
        if int(parent) == pid and state != "Z":
            found.append(int(entry))
    return found


Start = Callable[..., ServerProcess]


@pytest.fixture
def start_server() -> Iterator[Start]:
    """start_server(*flags, wait=True): a server on the embedded model at a free port; ended after the test."""
    started: list[ServerProcess] = []

    def start(*flags: str, wait: bool = True) -> ServerProcess:
        server = launch_server(*flags)
        started.append(server)
        if wait:
            server.wait_ready()
        return server

    yield start
    for server in started:
        end(server)


def launch_server(*flags: str) -> ServerProcess:
    process = subprocess.Popen(
        [sys.executable, "-m", "moeserve", "serve", "--port", "0", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    server = ServerProcess(process)
    threading.Thread(target=server.read, daemon=True).start()
    return server


def end(server: ServerProcess) -> None:
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
        try:
            server.process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            server.process.kill()
            raise
