"""Records expert load from an engine that returns routed experts over HTTP: ours, vLLM or SGLang, unpatched.

Sends requests from a file and counts the experts of each answer; needs nothing but numpy.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeserve.eplb.formats.files import named, read_bytes
from moeserve.eplb.formats.placement import PlacementFile, parse_placement
from moeserve.eplb.load import ExpertLoad
from moeserve.routed_experts import Routed, Tally, routed_of

MAX_ANSWER_BYTES = 256 << 20
TRIES = 5
"""Of a request that the server is too busy for."""
GIVE_UP = 5
"""Failures before the first answer, after which a server is taken for one that cannot be recorded."""
PATHS = {
    "prompt": "/v1/completions",
    "messages": "/v1/chat/completions",
    "text": "/generate",
    "input_ids": "/generate",
}


@dataclass(frozen=True)
class Request:
    """line: in the file, from 1."""

    line: int
    path: str
    body: dict[str, Any]


@dataclass
class Recorded:
    """load: None where no request was answered. failures: "line 3: what is wrong"."""

    load: ExpertLoad | None
    answers: int
    tokens: int
    failures: list[str] = field(default_factory=list)


def read_requests(path: Path, max_tokens: int) -> list[Request]:
    """One a line: the JSON body of a request to /v1/completions, /v1/chat/completions or /generate, an entry of
    OpenAI's batch files, or a prompt as plain text. ValueError names the line."""
    try:
        lines = named(path, lambda: read_bytes(path)).decode().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: byte {error.start}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(_request(number, line.strip(), max_tokens))
            except ValueError as error:
                raise ValueError(f"{path}: line {number}: {error}") from None
    if not found:
        raise ValueError(f"{path}: there is no request in it")
    return found


def _request(number: int, line: str, max_tokens: int) -> Request:
    body: Any = {"prompt": line}
    if line[0] in '{"[':
        try:
            body = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"broken JSON: {error.msg}") from None
        if isinstance(body, str):
            body = {"prompt": body}
        if isinstance(body, dict) and isinstance(body.get("body"), dict):
            body = body["body"]  # an entry of a batch file
    kind = next((key for key in PATHS if isinstance(body, dict) and key in body), None)
    if kind is None:
        raise ValueError(f"is no request: give one of {', '.join(PATHS)}")
    several = (
        kind == "messages" or not isinstance(body[kind], list) or all(type(x) is int for x in body[kind])
    )
    if not several:
        raise ValueError(f"{kind} has several prompts: give them a line each")
    body = {**body, "stream": False, "return_routed_experts": True}
    if PATHS[kind] == "/generate":
        body["sampling_params"] = {"max_new_tokens": max_tokens, **(body.get("sampling_params") or {})}
    elif "max_completion_tokens" not in body:
        body.setdefault("max_tokens", max_tokens)
    body.pop("stream_options", None)
    return Request(number, PATHS[kind], body)


class Server:
    """An engine's HTTP address."""

    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url = {url!r}: must be http://HOST:PORT")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"content-type": "application/json"}
        if api_key is not None:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._timeout = timeout

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer's JSON; tries again while the server is too busy. RuntimeError with the server's words."""
        for attempt in range(TRIES):
            try:
                return self._ask(path, body)
            except urllib.error.HTTPError as error:
                words = f"{error.code}: {_words(error.read(2000))}"
                wait = error.headers.get("retry-after", "")
                if error.code not in (429, 503) or attempt + 1 == TRIES:
                    raise RuntimeError(words) from None
                time.sleep(min(float(wait) if wait.isdigit() else 2.0**attempt, 30.0))
            except (OSError, EOFError) as error:
                reason = getattr(error, "reason", error)
                raise RuntimeError(f"{self.url}: {reason}") from None
        raise AssertionError

    def _ask(self, path: str, body: Mapping[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self._headers)
        with urllib.request.urlopen(request, timeout=self._timeout) as answer:
            text = answer.read(MAX_ANSWER_BYTES + 1)
        if len(text) > MAX_ANSWER_BYTES:
            raise RuntimeError(
                f"the answer is larger than {MAX_ANSWER_BYTES >> 20} MiB: ask for fewer tokens"
            )
        try:
            return json.loads(text)
        except ValueError:
            raise RuntimeError(f"the answer is not JSON: {text[:80]!r}") from None

    def placement(self) -> PlacementFile | None:
        """Of a server of ours; None of another one."""
        try:
            return parse_placement(self.ask("/eplb/placement"))
        except (RuntimeError, ValueError):
            return None

    def model(self) -> str:
        """The first model that it serves; RuntimeError where it does not say."""
        try:
            return str(self.ask("/v1/models")["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise RuntimeError(f"{self.url}/v1/models names no model") from None


def _words(answer: bytes) -> str:
    """What an error's body says, in a line."""
    try:
        document = json.loads(answer)
        error = document.get("error", document.get("message", document.get("detail", document)))
        text = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = answer.decode(errors="replace")
    return " ".join(str(text).split())[:300]


Answer = tuple[Request, list[Routed] | Exception | None]
Watch = Callable[[Iterator[Answer], int], Iterator[Answer]]


def record(
    server: Server,
    requests: Sequence[Request],
    *,
    concurrency: int,
    num_experts: int | None = None,
    top_k: int | None = None,
    ep_size: int | None = None,
    watch: Watch | None = None,
) -> Recorded:
    """Sends the requests, `concurrency` at a time, and counts. watch: given an iterator over the answers and how many
    there will be, passes them on (a progress bar). RuntimeError where no request is answered as it should be."""
    placed = server.placement()
    openai = any(request.path != "/generate" for request in requests)
    unnamed = any("model" not in request.body for request in requests)
    model = server.model() if openai and unnamed else str(requests[0].body.get("model", ""))
    if placed is not None:
        num_experts, ep_size = num_experts or placed.placement.num_experts, ep_size or placed.ep_size
    tally = Tally(len(requests), num_experts)
    result = Recorded(None, 0, 0)
    stop = threading.Event()

    def one(request: Request) -> Answer:
        if stop.is_set():
            return request, None
        try:
            body = {"model": model, **request.body} if request.path != "/generate" else request.body
            return request, routed_of(server.ask(request.path, body), top_k)
        except (RuntimeError, ValueError) as error:
            return request, error

    def answers(pool: ThreadPoolExecutor) -> Iterator[Answer]:
        for future in as_completed([pool.submit(one, request) for request in requests]):
            yield future.result()

    with ThreadPoolExecutor(concurrency) as pool:
        try:
            for request, found in watch(answers(pool), len(requests)) if watch else answers(pool):
                try:
                    if isinstance(found, Exception):
                        raise found
                    if found is not None:
                        tally.add(found)
                except (RuntimeError, ValueError) as error:
                    result.failures.append(f"line {request.line}: {error}")
                if len(result.failures) >= min(GIVE_UP, len(requests)) and not tally.answers:
                    stop.set()
        except KeyboardInterrupt:
            stop.set()
            result.failures.append("interrupted: the rest was not asked")
    if not tally.answers:
        raise RuntimeError(f"nothing was recorded: {result.failures[0]}")
    result.load = tally.load(model, ep_size or 0, placed)
    result.answers, result.tokens = tally.answers, tally.tokens
    return result
