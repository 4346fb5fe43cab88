"""One request's stream of text and the sequences that make it: the front-end fills it, one consumer reads."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moeserve.messages import SamplingParams, SequenceOutput, TokenLogprob
from moeserve.server.errors import ApiError
from moeserve.text import IncrementalDecoder, StopMatcher, Tokenizer

if TYPE_CHECKING:
    from moeserve.server.frontend import Frontend


class Delta:
    """What one step added to one sequence. token_ids and logprobs also cover text that is held back."""

    __slots__ = (
        "finish_reason",
        "index",
        "logprobs",
        "prompt_logprobs",
        "routed_experts",
        "text",
        "token_ids",
    )

    def __init__(self, index: int, text: str, finish_reason: str | None, output: SequenceOutput) -> None:
        self.index = index
        self.text = text
        self.finish_reason = finish_reason
        self.token_ids = output.token_ids
        self.logprobs: list[TokenLogprob] | None = output.logprobs
        self.prompt_logprobs = output.prompt_logprobs
        self.routed_experts = output.routed_experts


class RunningSequence:
    """One sequence at a replica, with its decoder and stop strings."""

    __slots__ = (
        *("cached_tokens", "first_output", "generation", "index", "last_output", "name", "num_generated"),
        *("params", "prompt", "replica", "running", "weight", "_decoder", "_matcher"),
    )

    def __init__(
        self,
        name: str,
        generation: Generation,
        index: int,
        replica: int,
        weight: int,
        prompt: list[int],
        params: SamplingParams,
        stop: Sequence[str],
        tokenizer: Tokenizer,
    ) -> None:
        self.name = name
        self.generation = generation
        self.index = index
        self.replica = replica
        self.weight = weight
        self.prompt = prompt
        self.params = params
        self.running = True
        self.num_generated = 0
        self.cached_tokens = 0
        self.first_output = 0.0  # time.monotonic(); 0 = none yet
        self.last_output = 0.0
        self._decoder = IncrementalDecoder(tokenizer)
        self._matcher = StopMatcher(stop) if stop else None

    def take(self, output: SequenceOutput) -> Delta:
        """The step's text. Its finish_reason is "stop" when a stop string came up, whatever the rank says."""
        ids = output.token_ids
        finish = output.finish_reason
        self.num_generated += len(ids)
        self.cached_tokens = max(self.cached_tokens, output.cached_tokens)
        # "stop" by the rank means that the last token is an end token: no part of the text
        text = self._decoder.push(ids[:-1] if finish == "stop" else ids)
        if finish is not None:
            text += self._decoder.flush()
        if self._matcher is not None:
            text, hit = self._matcher.push(text)
            if hit:
                finish = "stop"
            elif finish is not None:
                text += self._matcher.flush()
        return Delta(self.index, text, finish, output)


class Generation:
    """A request in flight: `while deltas := await generation.next(): ...`, then look at `error`.

    next() wakes once for all that one step brought; all() once, at the end. No longer wanted: cancel().
    """

    def __init__(self, frontend: Frontend, num_sequences: int, arrival: float) -> None:
        self.sequences: list[RunningSequence] = []
        self.num_running = num_sequences
        self.arrival = arrival  # time.monotonic()
        self.error: ApiError | None = None
        self.cancelled = False
        self._frontend = frontend
        self._pending: list[Delta] = []
        self._closed = False
        self._each_step = True
        self._waiter: asyncio.Future[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None

    async def next(self) -> list[Delta]:
        """The deltas since the last call, in the order they were made; empty when there will be none."""
        while not self._pending:
            if self._closed:
                return []
            await self._wait()
        deltas, self._pending = self._pending, []
        return deltas

    async def all(self) -> list[Delta]:
        """Every delta, when the last one is there; steps before it wake nobody."""
        self._each_step = False
        while not self._closed:
            await self._wait()
        return await self.next()

    def cancel(self) -> None:
        """Drops what is not finished yet; nothing happens when all is."""
        if not self._closed:
            self.cancelled = True
            self._frontend.cancel(self)

    def set_deadline(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(seconds, self._frontend.expire, self)

    def deliver(self, delta: Delta) -> None:
        self._pending.append(delta)
        if self._each_step:
            self._wake()

    def close(self) -> None:
        self._closed = True
        if self._deadline is not None:
            self._deadline.cancel()
        self._wake()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def num_generated(self) -> int:
        return sum(sequence.num_generated for sequence in self.sequences)
