"""What stands before the application: request ids, keys, body size, draining and admission.

Pure ASGI: under Starlette's BaseHTTPMiddleware a client's leaving is never noticed.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
import uuid
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moeserve.server.answer import send_error
from moeserve.server.errors import ApiError

WORK_PATHS = frozenset({"/v1/completions", "/v1/chat/completions"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
# An answer before the body is read reaches the client as a connection reset: read on for so much and so long.
MAX_DISCARDED_BYTES = 64 << 20
MAX_DISCARD_SECONDS = 10.0


class Guard:
    """Order: key, body size, admission (which also refuses while draining or dead). Counts the work inside.

    Keys are wanted for /v1/* and for everything that changes something; probes, metrics and read-only pages
    are open.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_keys: tuple[str, ...],
        max_body_bytes: int,
        check_admission: Callable[[], None],
    ) -> None:
        """check_admission raises ApiError when no new work is taken."""
        self.active = 0  # work requests whose answer is not sent yet
        self._app = app
        self._keys = [_digest(key.encode()) for key in api_keys]
        self._max_body_bytes = max_body_bytes
        self._check_admission = check_admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        started = False

        async def tagged(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        try:
            self._check_key(scope, headers)
            if scope["method"] in SAFE_METHODS:
                await self._app(scope, receive, tagged)
                return
            body = await self._read_body(headers, receive)
            if body is None:  # the client left while sending it
                return
            working = scope["path"] in WORK_PATHS
            if working:
                self._check_admission()
            self.active += working
            try:
                await self._app(scope, _replayed(body, receive), tagged)
            finally:
                self.active -= working
        except ApiError as error:
            if started:
                raise
            close = ((b"connection", b"close"),) if error.status == 413 else ()
            await send_error(tagged, error, close)

    def _check_key(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        if not self._keys or not (scope["path"].startswith("/v1/") or scope["method"] not in SAFE_METHODS):
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        digest = _digest(key.strip())
        known = [hmac.compare_digest(digest, one) for one in self._keys]  # all of them: time tells nothing
        if scheme.lower() != b"bearer" or not any(known):
            raise ApiError(
                401,
                "Incorrect API key provided; send the header Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    async def _read_body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        limit = self._max_body_bytes
        announced = headers.get(b"content-length", b"0")
        too_large = announced.isdigit() and int(announced) > limit
        parts: list[bytes] = []
        size = 0
        deadline = time.monotonic() + MAX_DISCARD_SECONDS
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            too_large = too_large or size > limit
            if too_large:
                parts.clear()
            else:
                parts.append(part)
            ended = not message.get("more_body", False)
            if too_large and (ended or size > limit + MAX_DISCARDED_BYTES or time.monotonic() > deadline):
                raise ApiError(
                    413, f"the request's body has more than {limit} bytes", code="request_too_large"
                )
            if ended:
                return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Gives the body once, then what the connection says: its end."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
