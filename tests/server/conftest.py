"""A front-end over a toy engine (no model, no ranks) behind a real HTTP server in a thread."""

from __future__ import annotations

import asyncio
import dataclasses
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from moeserve.expert_balance import ExpertBalance
from moeserve.messages import (
    AbortRequest,
    AddRequest,
    EngineStats,
    FromRank,
    RankFailed,
    RankReady,
    SequenceOutput,
    StepDone,
    TokenLogprob,
    ToRank,
    decode_from_rank,
    decode_to_rank,
    encode,
)
from moeserve.server.frontend import Frontend
from moeserve.server.run import HttpServer, bind
from moeserve.server.settings import ServerSettings
from moeserve.text import Tokenizer

MODEL_DIR = Path(__file__).parents[2] / "moeserve" / "tiny_model"
# What the toy says, over and over, from a place that the prompt and the seed decide.
SPEECH = "The quick brown fox costs 5 € in 日本, naïve 🦊 said. STOP here\n"
NUM_LAYERS, TOP_K = 4, 4
TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # unused, and with it no client loads certificates


class ToyLink:
    """An engine that says SPEECH: one token a step, as many sequences at once as it is given."""

    def __init__(self, tokenizer: Tokenizer, num_replicas: int = 2, step_seconds: float = 0.0) -> None:
        self.num_replicas = num_replicas
        self.step_seconds = step_seconds
        self.speech = tokenizer.encode(SPEECH)
        self.eos = tokenizer.eos_token_ids[0]
        self.running: dict[str, tuple[int, AddRequest, int]] = {}
        self.sent: list[tuple[int, ToRank]] = []
        self.kv_tokens = 1000
        self.step = 0
        self.paused = False
        self._inbox: asyncio.Queue[tuple[int, FromRank]] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def send(self, replica: int, message: ToRank) -> None:
        message = decode_to_rank(encode(message))  # what cannot travel must not pass here
        self.sent.append((replica, message))
        if isinstance(message, AddRequest):
            self.running[message.request_id] = (replica, message, 0)
        elif isinstance(message, AbortRequest):
            self.running.pop(message.request_id, None)

    async def receive(self) -> tuple[int, FromRank]:
        if self._task is None:
            self._task = asyncio.create_task(self._steps())
            for rank in range(self.num_replicas):
                self._inbox.put_nowait((rank, RankReady(rank, 1, self.kv_tokens, 1024)))
        replica, message = await self._inbox.get()
        return replica, decode_from_rank(encode(message))

    def fail(self, traceback: str) -> None:
        self._inbox.put_nowait((1, RankFailed(rank=1, time=0.0, traceback=traceback)))

    async def _steps(self) -> None:
        while True:
            await asyncio.sleep(self.step_seconds if self.running else 0.002)
            if self.paused:
                continue
            self.step += 1
            for replica in range(self.num_replicas):
                outputs = [
                    self._output(name) for name, (r, _, _) in list(self.running.items()) if r == replica
                ]
                running = sum(r == replica for r, _, _ in self.running.values())
                stats = EngineStats(self.step, running, 0, running, 100, 0, 0, 0, 0)
                self._inbox.put_nowait((replica, StepDone(replica, outputs, stats)))

    def _output(self, name: str) -> SequenceOutput:
        replica, request, made = self.running[name]
        params, prompt = request.params, request.prompt
        if len(prompt) + params.max_tokens > self.kv_tokens:
            del self.running[name]
            return SequenceOutput(
                name, [], "error", error="the KV cache holds 1000 tokens; shorten the prompt"
            )
        output = SequenceOutput(name, [])
        if params.prompt_logprobs is not None and made == 0:
            scored = [self._logprob(token, params.prompt_logprobs) for token in prompt]
            output.prompt_logprobs = [None, *scored[1:]]
            output.cached_tokens = len(prompt) // 2
        if params.max_tokens:
            token = self.speech[(sum(prompt) + params.seed + made) % len(self.speech)]
            # temperature 0 speaks from the beginning and ends after one round
            if params.temperature == 0:
                token = [*self.speech, self.eos][made % (len(self.speech) + 1)]
            output.token_ids = [token]
            if params.logprobs is not None:
                output.logprobs = [self._logprob(token, params.logprobs)]
            made += 1
            if token in params.stop_token_ids:
                output.finish_reason = "stop"
        if output.finish_reason is None and made >= params.max_tokens:
            output.finish_reason = "length"
        if output.finish_reason is None:
            self.running[name] = (replica, request, made)
        else:
            del self.running[name]
            if params.return_routed_experts:
                rows = len(prompt) + made - 1
                output.routed_experts = bytes(i % 32 for i in range(rows * NUM_LAYERS * TOP_K))
        return output

    def _logprob(self, token: int, alternatives: int) -> TokenLogprob:
        top = [(token, -0.5), *((i, -2.0 - i) for i in range(40, 40 + alternatives))][:alternatives]
        return TokenLogprob(token, -0.5, 1, top)


@dataclasses.dataclass
class Running:
    """A server in a thread and what tests look at. Only `call` may touch frontend and link."""

    url: str
    frontend: Frontend
    link: ToyLink
    http: HttpServer
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread
    exit_code: list[int]
    web: httpx.Client  # shared: making one costs 30 ms

    def call(self, function: Callable[[], Any]) -> Any:
        async def inside() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(inside(), self.loop).result(10)

    def client(self, **options: Any) -> openai.OpenAI:
        strict = {"_strict_response_validation": True}
        options = {"api_key": "none", "max_retries": 0, "timeout": 20, **strict, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def wait_ready(self) -> None:
        for _ in range(500):
            if self.web.get("/readyz").status_code == 200:
                return
        raise AssertionError("never ready")


def start(
    tokenizer: Tokenizer, step_seconds: float = 0.0, balance: ExpertBalance | None = None, **changes: Any
) -> Running:
    settings = ServerSettings(
        **{
            "model_name": "toy/model",
            "max_seq_len": 1024,
            "max_batch_size": 64,
            "num_ranks": 2,
            "num_moe_layers": NUM_LAYERS,
            "top_k": TOP_K,
            **changes,
        }
    )
    started = threading.Event()
    holder: list[Running] = []
    exit_code: list[int] = []

    async def main() -> None:
        link = ToyLink(tokenizer, step_seconds=step_seconds)
        frontend = Frontend(link, tokenizer, settings, balance)
        listener = bind("127.0.0.1", 0)
        http = HttpServer(frontend, settings, listener)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        loop = asyncio.get_running_loop()
        web = httpx.Client(base_url=url, timeout=20, limits=httpx.Limits(max_connections=300), verify=TLS)
        holder.append(Running(url, frontend, link, http, loop, thread, exit_code, web))
        carrying = asyncio.create_task(frontend.run())
        started.set()
        exit_code.append(await http.serve())
        carrying.cancel()

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert started.wait(10)
    holder[0].wait_ready()
    return holder[0]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(MODEL_DIR)


@pytest.fixture(scope="session")
def server(tokenizer: Tokenizer) -> Iterator[Running]:
    """One server for all tests that leave it as it was."""
    running = start(tokenizer)
    yield running
    running.loop.call_soon_threadsafe(running.http.stop)
    running.thread.join(10)


@pytest.fixture
def start_server(tokenizer: Tokenizer) -> Iterator[Callable[..., Running]]:
    """start_server(step_seconds=..., SETTING=...): a server of the test's own, ended at once afterwards."""
    begun: list[Running] = []

    def begin(**options: Any) -> Running:
        begun.append(start(tokenizer, **options))
        return begun[-1]

    yield begin
    for running in begun:
        if running.thread.is_alive():
            running.loop.call_soon_threadsafe(running.http.stop)
            running.loop.call_soon_threadsafe(running.http.stop)
            running.thread.join(10)
            assert not running.thread.is_alive()
