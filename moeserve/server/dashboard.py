"""The dashboard over HTTP: the page, each panel's figures as JSON, and events that tell of new counts. Read only."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Mount, Route

from moeserve.dashboard import advice, panels
from moeserve.dashboard.page import self_contained
from moeserve.dashboard.recording import Recording, Source
from moeserve.eplb.formats.stats import format_stats
from moeserve.server.errors import ApiError
from moeserve.stats.dashboard import page_files
from moeserve.stats.prometheus import prometheus_files

TICK_SECONDS = 1.0
VERDICT_SECONDS, WHAT_IF_SECONDS = 10.0, 30.0  # so old an answer of the solver may be while counts come in
MAX_ANSWERS = 64  # of 0.2 MB at most, for 58 layers of 256 experts, and one page in a file
HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
NO_EXPERTS: dict[str, Any] = {"state": "no_experts", "model": "", "file": None, "version": "0"}


def dashboard_app(source: Source | None, stopping: Callable[[], bool]) -> Starlette:
    """To be mounted at /dashboard. source: None for a model without experts. stopping: events end when it says so."""
    answers = None if source is None else _Answers(source)

    def known() -> _Answers:
        if answers is None:
            raise ApiError(404, "this model has no experts, there is nothing to balance", code="no_experts")
        return answers

    async def page(request: Request) -> Response:
        return _file(request, "index.html", page_files())

    async def static(request: Request) -> Response:
        return _file(request, request.path_params["name"], page_files())

    async def summary(request: Request) -> Response:
        if answers is None or source is None:
            return _json(msgspec.json.encode(NO_EXPERTS))
        if answers.newest() is None:
            return _json(msgspec.json.encode(panels.summary(source, None)))
        return _json(await answers.give("summary", (), lambda found: panels.summary(source, found)))

    async def verdict(request: Request) -> Response:
        phase = _phase(request)
        return _json(
            await known().solve(
                "verdict", (phase,), lambda found: advice.verdict(found, phase), VERDICT_SECONDS
            )
        )

    async def load_map(request: Request) -> Response:
        given = (_phase(request), request.query_params.get("by", "rank"), _window(request))
        return _json(await known().give("map", given, lambda found: panels.load_map(found, *given)))

    async def history(request: Request) -> Response:
        given = (_phase(request), _number(request, "layer", 0))
        return _json(await known().give("history", given, lambda found: panels.history(found, *given)))

    async def layer(request: Request) -> Response:
        given = (_phase(request), _number(request, "layer", 0), _window(request))
        return _json(await known().give("layer", given, lambda found: panels.layer_detail(found, *given)))

    async def rebalances(request: Request) -> Response:
        return _json(
            await known().give("rebalances", (), lambda found: panels.rebalances(cast(Source, source), found))
        )

    async def what_if(request: Request) -> Response:
        recording = known().recording()
        given = (
            _phase(request),
            _number(request, "ep_size", recording.topology.num_ranks),
            _number(request, "extra", 1),
            request.query_params.get("policy", "auto"),
            _number(request, "layer", 0),
        )
        return _json(
            await known().solve(
                "what_if", given, lambda found: advice.what_if(found, *given), WHAT_IF_SECONDS
            )
        )

    async def stats(request: Request) -> Response:
        recording = known().recording()
        return _json(await asyncio.to_thread(lambda: format_stats(recording.load).encode()))

    async def page_file(request: Request) -> Response:
        body = await known().solve(
            "page", (), lambda found: self_contained(cast(Source, source), found), VERDICT_SECONDS
        )
        headers = {**HEADERS, "content-disposition": 'attachment; filename="expert-balance.html"'}
        return Response(msgspec.json.decode(body, type=str), media_type="text/html", headers=headers)

    async def prometheus(request: Request) -> Response:
        return _file(request, request.path_params["name"], prometheus_files())

    async def events(request: Request) -> Response:
        return StreamingResponse(_ticks(source, stopping), media_type="text/event-stream", headers=HEADERS)

    data = {"summary": summary, "verdict": verdict, "map": load_map, "history": history, "layer": layer}
    data |= {"rebalances": rebalances, "what-if": what_if, "stats.json": stats}
    data |= {"page.html": page_file}
    return Starlette(
        routes=[
            Route("/", page),
            Route("/events", events),
            Mount("/api", routes=[Route(f"/{name}", endpoint) for name, endpoint in data.items()]),
            Route("/static/{name}", static),
            Route("/prometheus/{name}", prometheus),
        ],
        exception_handlers={ApiError: _on_api_error},
    )


class _Answers:
    """Each answer is made once for what there is to show, in a thread: megabytes must not hold up streams."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._kept: Recording | None = None
        self._made: dict[tuple[Any, ...], tuple[str, float, bytes]] = {}
        self._locks = {"give": asyncio.Lock(), "solve": asyncio.Lock()}

    def newest(self) -> Recording | None:
        if self._kept is None or self._kept.version != self._source.version:
            self._kept = self._source.read()
        return self._kept

    def recording(self) -> Recording:
        """Raises ApiError before the first count."""
        found = self.newest()
        if found is None:
            message = "no expert load was counted yet: send a request and ask again"
            raise ApiError(409, message, code="no_expert_load")
        return found

    async def give(self, name: str, given: tuple[Any, ...], make: Callable[[Recording], Any]) -> bytes:
        return await self._answer("give", (name, *given), make, 0.0)

    async def solve(
        self, name: str, given: tuple[Any, ...], make: Callable[[Recording], Any], max_age: float
    ) -> bytes:
        """The same, one at a time and not again within max_age seconds."""
        return await self._answer("solve", (name, *given), make, max_age)

    async def _answer(
        self, lock: str, key: tuple[Any, ...], make: Callable[[Recording], Any], max_age: float
    ) -> bytes:
        async with self._locks[lock]:
            recording = self.recording()
            version, made, answer = self._made.get(key, ("", 0.0, b""))
            if version == recording.version or (version and time.monotonic() - made < max_age):
                return answer
            try:
                answer = await asyncio.to_thread(lambda: msgspec.json.encode(make(recording)))
            except ValueError as error:
                raise ApiError(400, str(error)) from None
            if len(self._made) >= MAX_ANSWERS:
                self._made.clear()
            self._made[key] = (recording.version, time.monotonic(), answer)
            return answer


async def _ticks(source: Source | None, stopping: Callable[[], bool]) -> AsyncIterator[bytes]:
    """What there is to show, every second, so that a page knows that it is in contact."""
    yield b"retry: 1000\n\n"
    while True:
        version = "0" if source is None else source.version
        yield b"data: " + msgspec.json.encode({"version": version, "time": time.time()}) + b"\n\n"
        if stopping():
            return
        await asyncio.sleep(TICK_SECONDS)


def serve_recorded(source: Source, listener: socket.socket) -> None:
    """Serve the dashboard alone, until Ctrl-C or SIGTERM."""

    async def home(request: Request) -> Response:
        return Response(status_code=307, headers={"location": "/dashboard/"})

    routes = [Route("/", home), Mount("/dashboard", dashboard_app(source, lambda: server.should_exit))]
    config = uvicorn.Config(
        Starlette(routes=routes), ws="none", lifespan="off", access_log=False, log_config=None,
        server_header=False, timeout_graceful_shutdown=2,
    )  # fmt: skip
    server = uvicorn.Server(config)
    server.run(sockets=[listener])


def _phase(request: Request) -> str:
    return request.query_params.get("phase", "decode")


def _window(request: Request) -> int | None:
    return None if "window" not in request.query_params else _number(request, "window", 0)


def _number(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ApiError(400, f"{name} = {text!r}: give a whole number", param=name)
    return int(text)


def _file(request: Request, name: str, files: dict[str, tuple[str, bytes]]) -> Response:
    found = files.get(name)
    if found is None:
        raise ApiError(404, f"there is no {name} here", code="not_found")
    media_type, content = found
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers={"etag": tag, **HEADERS})
    return Response(content, media_type=media_type, headers={"etag": tag, **HEADERS})


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json", headers=HEADERS)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return Response(error.body(), error.status, error.headers, "application/json")
