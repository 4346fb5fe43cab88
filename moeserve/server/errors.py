"""The one error that a request can meet, and OpenAI's JSON shape of it."""

from __future__ import annotations

import reprlib

import msgspec

RETRY_SECONDS = 1

_SHORT = reprlib.Repr()  # a value may be megabytes long
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxother = 3, 6, 4, 60, 60


class ApiError(Exception):
    """All that the client is told. param: the field; code: OpenAI's machine-readable word or None."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> bytes:
        param = None if self.param is None else _sendable(self.param)
        error = {"message": _sendable(self.message), "type": self.kind, "param": param, "code": self.code}
        return msgspec.json.encode({"error": error})


def bad_value(param: str, value: object, wanted: str, code: str | None = "invalid_value") -> ApiError:
    """400 with the field, the value and what would do."""
    return ApiError(400, f"{param}: {_SHORT.repr(value)} is not accepted; {wanted}", param=param, code=code)


def _sendable(text: str) -> str:
    """JSON lets half a surrogate pair in, UTF-8 does not let it out."""
    return text.encode("utf-8", "replace").decode()


def too_busy(message: str) -> ApiError:
    headers = {"retry-after": str(RETRY_SECONDS), "retry-after-ms": str(RETRY_SECONDS * 1000)}
    return ApiError(429, message, kind="rate_limit_error", code="rate_limit_exceeded", headers=headers)


def unavailable(message: str, code: str) -> ApiError:
    headers = {"retry-after": str(RETRY_SECONDS * 5)}
    return ApiError(503, message, kind="service_unavailable_error", code=code, headers=headers)


def engine_dead(status: int = 503) -> ApiError:
    message = "the engine has stopped after a rank failed; see the server's log"
    if status == 503:
        return unavailable(message, "engine_dead")
    return ApiError(status, message, kind="server_error", code="engine_dead")


def rank_lost() -> ApiError:
    return unavailable("the rank that worked on this request was lost; send it again", "rank_lost")


def timed_out(seconds: float) -> ApiError:
    # Tried again it would take as long: tell the client's retry loop so.
    return ApiError(
        504,
        f"the request was not finished within {seconds:g} s (--request-timeout)",
        kind="timeout_error",
        code="request_timeout",
        headers={"x-should-retry": "false"},
    )
