"""Responses that run a generation: one JSON object or server-sent events, dropped when the client leaves."""

from __future__ import annotations

import asyncio

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from moeserve.server.errors import ApiError
from moeserve.server.generation import Generation
from moeserve.server.render import Renderer, error_event

EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class GenerationResponse(Response):
    """Runs the generation while it is sent. The request's body must have been read."""

    media_type = "application/json"

    def __init__(self, generation: Generation, renderer: Renderer, *, stream: bool) -> None:
        super().__init__()
        self._generation = generation
        self._renderer = renderer
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        generation = self._generation
        watch = asyncio.ensure_future(_disconnected(receive))
        watch.add_done_callback(lambda _: generation.cancel())
        try:
            await (self._send_events(send) if self._stream else self._send_whole(send))
        finally:
            generation.cancel()
            watch.cancel()

    async def _send_whole(self, send: Send) -> None:
        generation = self._generation
        deltas = await generation.all()
        if generation.error is not None:
            await send_error(send, generation.error)
            return
        if generation.cancelled:  # nobody reads it
            return
        body = self._renderer.whole(deltas, generation)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _send_events(self, send: Send) -> None:
        generation, renderer = self._generation, self._renderer
        # The status waits for the first step: a request that cannot run then gets a proper one.
        deltas = await generation.next()
        if not deltas:
            if generation.error is not None:
                await send_error(send, generation.error)
            return
        await send({"type": "http.response.start", "status": 200, "headers": EVENT_HEADERS})
        while deltas:
            data = renderer.chunks(deltas, generation)
            if data:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            deltas = await generation.next()
        last = renderer.end(generation) if generation.error is None else error_event(generation.error)
        await send({"type": "http.response.body", "body": last})


async def send_error(send: Send, error: ApiError, extra: tuple[tuple[bytes, bytes], ...] = ()) -> None:
    """The error as a whole response."""
    body = error.body()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *extra]
    headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
