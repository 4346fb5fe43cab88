"""One request as the engine sees it: its tokens, its pages and how far it has been computed.

Data only: what happens to it is the scheduler's and the sampler's matter.
"""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moeserve.messages import AddRequest, SamplingParams, TokenLogprob

GREEDY_BELOW = 1e-5  # a temperature below this is taken as 0: the division would overflow before it mattered


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and what has been generated after it.

    Tokens computed: the first num_computed of `tokens` have their keys and values in `pages`. The last token
    of a sequence that generates is never computed before the next one is wanted.
    """

    request_id: str
    params: SamplingParams
    tokens: array[int]  # int64, prompt then output
    num_prompt: int
    arrival: int  # order of arrival, never reused
    arrived: float = field(default_factory=time.monotonic)  # told to the user, never decides anything
    queue_seconds: float = 0.0  # from there to the first admission
    state: State = State.WAITING
    pages: array[int] = field(default_factory=lambda: array("i"))
    page_keys: list[bytes] = field(default_factory=list)  # of full pages, as far as ever needed
    num_published: int = 0  # the first so many pages were offered for reuse
    num_computed: int = 0
    cached_tokens: int | None = None  # prompt tokens found in the cache when first admitted
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # of tokens 1, 2, ... so far
    experts: list[NDArray[Any]] = field(
        default_factory=list
    )  # [rows, L, K] each, of positions 0, 1, ... so far
    num_expert_rows: int = 0
    plain: bool = False  # greedy and nothing else wanted: one argmax serves it

    @classmethod
    def from_request(cls, request: AddRequest, arrival: int) -> Sequence:
        params = request.params
        return cls(
            request_id=request.request_id,
            params=params,
            tokens=array("q", request.prompt),
            num_prompt=len(request.prompt),
            arrival=arrival,
            plain=is_plain(params),
        )

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_skippable(self) -> int:
        """Tokens whose computation would give nothing that is still wanted, but for their keys and values.

        At least the last token has to be computed; scores and routed experts come only from computing.
        """
        skippable = len(self.tokens) - 1
        if self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt - 1:
            skippable = min(skippable, len(self.prompt_logprobs))
        if self.params.return_routed_experts:
            skippable = min(skippable, self.num_expert_rows)
        return skippable

    def routed_experts(self) -> bytes | None:
        """Little-endian bytes of [tokens - 1, L, K], the last token left out; None when not asked for."""
        if not self.params.return_routed_experts or not self.experts:
            return None
        rows = np.concatenate(self.experts)[: len(self.tokens) - 1]
        return rows.astype(rows.dtype.newbyteorder("<"), copy=False).tobytes()


class Chunk(NamedTuple):
    """The part of one sequence that one step computes: positions start .. start + num_tokens - 1."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool  # the chunk reaches the end and a next token is wanted: the last row's logits
    score_start: int = (
        0  # positions score_start .. score_start + num_scored - 1 score their next prompt token
    )
    num_scored: int = 0


NO_TOKEN = -1
"""In place of a token where the logits were not numbers: the weights or a kernel are broken."""


class StepResult(NamedTuple):
    """What a step found for one chunk: the sampled token (None: the chunk did not sample; NO_TOKEN), its
    log-probability when wanted, and one entry for each scored prompt token."""

    token: int | None = None
    logprob: TokenLogprob | None = None
    prompt_logprobs: list[TokenLogprob] | None = None


def is_plain(params: SamplingParams) -> bool:
    """Greedy, raw logits, no log-probabilities."""
    return (
        params.temperature < GREEDY_BELOW
        and params.logprobs is None
        and params.prompt_logprobs is None
        and not adjusts_logits(params)
    )


def adjusts_logits(params: SamplingParams) -> bool:
    """Whether a penalty or a bias changes the logits."""
    return bool(
        params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1.0
        or params.logit_bias
    )
