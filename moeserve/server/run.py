"""Listens on a port until told to stop: SIGTERM lets what runs finish, a second one ends at once."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import resource
import signal
import socket
from collections.abc import Iterator

import uvicorn

from moeserve.server.app import guarded, make_app
from moeserve.server.frontend import Frontend
from moeserve.server.guard import Guard
from moeserve.server.settings import ServerSettings

log = logging.getLogger(__name__)
DEAD_SECONDS = 1.0  # how long errors are still answered after the engine's death or the drain's end
CLOSE_SECONDS = 2  # then connections with half a request on them are cut
POLL_SECONDS = 0.02
BACKLOG = 2048
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def bind(host: str, port: int) -> socket.socket:
    """The listening socket; port 0 takes a free one. Raises ValueError when it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol must be said: asyncio sets TCP_NODELAY only then, and without it answers wait 40 ms for an ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise ValueError(f"host = {host}: {error.strerror}; give an address of this machine") from None
        raise ValueError(
            f"port: {port} cannot be listened on at {host}: {error.strerror}; "
            "end the program that has it or choose another --port"
        ) from None
    return listener


class HttpServer:
    """uvicorn under our own rules for stopping. serve() returns the exit code: 0 drained, 1 engine dead."""

    def __init__(self, frontend: Frontend, settings: ServerSettings, listener: socket.socket) -> None:
        self.app = make_app(frontend, settings)
        self.guard: Guard = guarded(self.app, frontend, settings)
        self._frontend = frontend
        self._settings = settings
        self._listener = listener
        self._stop = asyncio.Event()
        self._server = _Server(
            uvicorn.Config(
                self.guard,
                http="httptools",
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=CLOSE_SECONDS,
            )
        )

    async def serve(self) -> int:
        """Serves until stop() or the engine's death; Frontend.run() must be going in this event loop."""
        _allow_many_connections()
        serving = asyncio.create_task(self._server.serve(sockets=[self._listener]), name="http")
        dead = asyncio.create_task(self._frontend.dead.wait())
        stopped = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({serving, dead, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if stopped.done() and not dead.done():
                await self._drain()
            if self._frontend.dead.is_set():
                await asyncio.sleep(DEAD_SECONDS)  # for probes and waiting clients
            self._server.should_exit = True
            await serving
        finally:
            dead.cancel()
            stopped.cancel()
        return 1 if self._frontend.dead.is_set() else 0

    def stop(self) -> None:
        """First call: drain. Second: end at once; who still waits gets an error."""
        if self._stop.is_set():
            self._frontend.end_all()
            self._server.force_exit = True
        self._frontend.draining = True
        self._stop.set()

    def handle_signals(self) -> None:
        """SIGTERM and SIGINT call stop()."""
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self.stop)

    async def _drain(self) -> None:
        """Waits until all that runs is answered, within drain_timeout."""
        log.info("draining: %d requests run, new ones get 503", self.guard.active)
        limit = self._settings.drain_timeout
        loop = asyncio.get_running_loop()
        deadline = math.inf if limit is None else loop.time() + limit
        while self.guard.active and not self._frontend.dead.is_set():
            if self._server.force_exit:
                await asyncio.sleep(POLL_SECONDS)  # for the errors to leave
                return
            if loop.time() > deadline:
                log.warning("ending %d requests that did not finish in %g s", self.guard.active, limit)
                self._frontend.end_all()
                await asyncio.sleep(DEAD_SECONDS)
                return
            await asyncio.sleep(POLL_SECONDS)


def _allow_many_connections() -> None:
    """Every connection is an open file; the usual soft limit of 1024 would keep clients waiting unanswered."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # ours: uvicorn would close the listener before running streams are through
