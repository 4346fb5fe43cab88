"""Records expert load from an engine that returns routed experts over HTTP: ours, vLLM or SGLang, unpatched.

Sends requests from a file, counts the experts of each answer by phase, and needs nothing but numpy.
"""

from __future__ import annotations

import base64
import binascii
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeserve.eplb.formats.arrays import parse_npy
from moeserve.eplb.formats.files import named, read_bytes
from moeserve.eplb.formats.placement import PlacementFile, parse_placement
from moeserve.eplb.load import ExpertLoad, Phase, Window

WINDOWS = 32
"""Of each phase at most: the answers in the order in which they come, cut into equal parts."""
MAX_ANSWER_BYTES = 256 << 20
MOST_EXPERTS = 4096
"""Of a layer, unless the number is given: one wrong answer must not take all memory."""
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
NO_EXPERTS = (
    "the answer has no routed experts: start vLLM and SGLang with --enable-return-routed-experts, and ask for a "
    "model that has experts"
)


@dataclass(frozen=True)
class Request:
    """line: in the file, from 1."""

    line: int
    path: str
    body: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Routed:
    """experts: [tokens, layers, top_k]; the first prompt_tokens of them are of the prompt. dense: layers without
    experts are among them, all zeros."""

    experts: npt.NDArray[Any]
    prompt_tokens: int
    dense: bool


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


def routed_of(answer: Any, top_k: int | None) -> list[Routed]:
    """The routed experts of each choice. ValueError where there are none, or where they are of no known shape."""
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if not isinstance(answer, dict):
        raise ValueError(NO_EXPERTS)
    about = answer.get("meta_info") or answer.get("usage") or {}
    prompt, made = (about.get(key) for key in ("prompt_tokens", "completion_tokens"))
    if not isinstance(prompt, int) or not isinstance(made, int):
        raise ValueError("the answer does not say how many tokens prompt and completion have")
    found = [
        _decode(value, prompt, made, top_k) for value in _values(answer, answer.get("choices") or [answer])
    ]
    if not found:
        raise ValueError(NO_EXPERTS)
    # a prompt runs once, however many continuations it has
    return [found[0], *(Routed(one.experts[prompt:], 0, one.dense) for one in found[1:])]


def _values(answer: dict[str, Any], choices: list[dict[str, Any]]) -> list[Any]:
    """What stands under the names that engines use: ours and vLLM's, SGLang's for OpenAI, SGLang's own."""
    outer = (answer.get("sglext") or {}).get("routed_experts")
    if outer is not None:
        return outer if isinstance(outer, list) and outer and isinstance(outer[0], str) else [outer]
    values = []
    for choice in choices:
        for place in (choice, choice.get("sglext") or {}, choice.get("meta_info") or {}):
            if place.get("routed_experts") is not None:
                values.append(place["routed_experts"])
                break
    return values


def _decode(value: Any, prompt: int, made: int, top_k: int | None) -> Routed:
    if isinstance(value, list):  # ours: [tokens][MoE layers][top_k]
        experts = np.asarray(value)
        dense = False
    elif isinstance(value, str):
        try:
            data = base64.b64decode(value, validate=True)
        except binascii.Error:
            raise ValueError("routed_experts is no base64") from None
        experts = parse_npy(data) if data.startswith(b"\x93NUMPY") else _raw(data, prompt + made - 1, top_k)
        dense = True
    else:
        raise ValueError(f"routed_experts is a {type(value).__name__}, expected a list or base64")
    if experts.ndim != 3 or experts.dtype.kind not in "iu" or 0 in experts.shape[1:]:
        raise ValueError(
            f"routed_experts is {experts.shape} of {experts.dtype}, expected [tokens, layers, top_k]"
        )
    return Routed(experts, prompt, dense)


def _raw(data: bytes, rows: int, top_k: int | None) -> npt.NDArray[Any]:
    """SGLang's int32, which do not say their shape."""
    if top_k is None:
        raise ValueError("SGLang's routed experts do not say their shape: give --top-k")
    if rows < 1 or not data or len(data) % (4 * rows * top_k):
        raise ValueError(
            f"{len(data)} bytes of routed experts are not int32 of [{rows}, layers, top_k = {top_k}]"
        )
    return np.frombuffer(data, "<i4").reshape(rows, -1, top_k)


Answer = tuple[Request, list[Routed] | Exception | None]
Watch = Callable[[Iterator[Answer], int], Iterator[Answer]]


class Tally:
    """Counts by window and phase. Memory: WINDOWS x 2 phases x layers x experts, however many requests there are."""

    def __init__(self, num_requests: int, num_experts: int | None) -> None:
        self._num_requests, self._num_experts = num_requests, num_experts
        self._counts: dict[tuple[int, Phase], npt.NDArray[np.int64]] = {}
        self._about: dict[tuple[int, Phase], tuple[int, str]] = {}  # tokens, start
        self._shape: tuple[int, int] | None = None  # layers, top_k
        self._dense = False
        self.answers = self.tokens = 0

    def add(self, routed: Sequence[Routed]) -> None:
        """One answer; ValueError, and nothing counted, where it does not fit to those before."""
        for one in routed:
            shape = (one.experts.shape[1], one.experts.shape[2])
            if self._shape is not None and shape != self._shape:
                raise ValueError(
                    f"[layers, top_k] is {list(shape)}, {list(self._shape)} in the answers before"
                )
            low, high = (int(f(one.experts)) for f in (np.min, np.max)) if one.experts.size else (0, 0)
            limit = self._num_experts or MOST_EXPERTS
            if low < -1 or high >= limit:
                raise ValueError(f"expert ids run from {low} to {high}, expected -1 to {limit - 1}")
            self._shape = shape
            self._dense |= one.dense
        window = self.answers * WINDOWS // max(self._num_requests, WINDOWS)
        for one in routed:
            self._count(window, "prefill", one.experts[: one.prompt_tokens])
            self._count(window, "decode", one.experts[one.prompt_tokens :])
        self.answers += 1

    def _count(self, window: int, phase: Phase, experts: npt.NDArray[Any]) -> None:
        if not len(experts):
            return
        key, layers = (window, phase), experts.shape[1]
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        counts = self._counts.get(key, np.zeros((layers, self._num_experts or 1), np.int64))
        more = int(experts.max()) + 1 - counts.shape[1]
        if more > 0:
            counts = np.pad(counts, ((0, 0), (0, more)))
        for layer in range(layers):
            chosen = experts[:, layer].ravel()
            counts[layer] += np.bincount(chosen[chosen >= 0], minlength=counts.shape[1])
        self._counts[key] = counts
        tokens, begun = self._about.get(key, (0, now))
        self._about[key] = (tokens + len(experts), begun)
        self.tokens += len(experts)

    def load(self, model: str, ep_size: int, placed: PlacementFile | None) -> ExpertLoad | None:
        """What was counted; layers without experts are left out. None when nothing was."""
        if not self._counts or self._shape is None:
            return None
        experts = self._num_experts or max(counts.shape[1] for counts in self._counts.values())
        keys = sorted(self._counts)
        load = np.stack(
            [np.pad(c, ((0, 0), (0, experts - c.shape[1]))) for c in map(self._counts.__getitem__, keys)]
        )
        layers = list(range(load.shape[1]))
        if self._dense:
            layers = [layer for layer in layers if load[:, layer, 1:].any()]
            if not layers:
                raise ValueError("all expert ids are 0: " + NO_EXPERTS)
        windows = tuple(Window(phase, window, 1, *self._about[window, phase]) for window, phase in keys)
        fits = (
            placed is not None
            and (len(placed.layers), placed.ep_size) == (len(layers), ep_size)
            and placed.placement.num_experts == experts
        )
        return ExpertLoad(
            load[:, layers],
            layers=placed.layers if placed is not None and fits else tuple(layers),
            windows=windows,
            model=model,
            top_k=self._shape[1],
            ep_size=ep_size,
            placement=placed.placement if placed is not None and fits else None,
        )


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
