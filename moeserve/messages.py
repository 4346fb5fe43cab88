"""What the front-end and the ranks say to each other, and the bytes it travels as.

The only thing that server/ and engine/ share. Knows no transport and no tensor.
"""

from __future__ import annotations

import math

import msgspec


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How one sequence is continued. Everything resolved: no defaults of a model or of an API are left open.

    seed decides every random choice of the sequence together with the position alone, so the text does not
    depend on the batch. top_k = 0, top_p = 1 and min_p = 0 switch the filter off; temperature = 0 is greedy.
    logprobs: number of alternatives wanted beside the chosen token's own, None for no log-probabilities.
    prompt_logprobs: the same for the prompt's tokens (echo scoring).
    Stop strings are not here: the front-end sees the text and aborts. ValueError for what no sampler can do.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_routed_experts: bool = False

    def __post_init__(self) -> None:
        for name, value, good, wanted in (
            ("max_tokens", self.max_tokens, self.max_tokens >= 0, "at least 0"),
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "at least 0"),
            ("top_p", self.top_p, 0 <= self.top_p <= 1, "from 0 to 1"),
            ("top_k", self.top_k, self.top_k >= 0, "at least 0"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
            ("presence_penalty", self.presence_penalty, math.isfinite(self.presence_penalty), "finite"),
            ("frequency_penalty", self.frequency_penalty, math.isfinite(self.frequency_penalty), "finite"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                0 < self.repetition_penalty < math.inf,
                "above 0",
            ),
            ("logit_bias", self.logit_bias, all(map(math.isfinite, self.logit_bias.values())), "finite"),
            ("logprobs", self.logprobs, self.logprobs is None or self.logprobs >= 0, "at least 0"),
            (
                "prompt_logprobs",
                self.prompt_logprobs,
                self.prompt_logprobs is None or self.prompt_logprobs >= 0,
                "at least 0",
            ),
        ):
            if not good:
                raise ValueError(f"{name} = {value!r}: must be {wanted}")


# ------------------------------------------------------------------ front-end -> rank


class AddRequest(msgspec.Struct, frozen=True, tag="add"):
    """One sequence to continue. max_tokens 0 with prompt_logprobs scores the prompt and makes no token."""

    request_id: str
    prompt: list[int]
    params: SamplingParams


class AbortRequest(msgspec.Struct, frozen=True, tag="abort"):
    """Drop the sequence if it is still there: its pages are free after this step. Not answered."""

    request_id: str


class Wake(msgspec.Struct, frozen=True, tag="wake"):
    """Another replica got work: take part in its steps."""


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Drop what still runs and leave once every replica was told to; sent to each replica's leader."""


class LayerOrder(msgspec.Struct, frozen=True, array_like=True):
    """What one layer is to look like: its number among the MoE layers, the expert and the share of each slot [P].

    moves: (source slot, target slot); sources are read as they stood before any of them. Without moves the shares
    alone change.
    """

    layer: int
    slot_to_expert: list[int]
    share: list[float]
    moves: list[tuple[int, int]]


class Migrate(msgspec.Struct, frozen=True, tag="migrate"):
    """Bring the experts to another placement while serving; to each replica's leader, answered by Migrated.

    order: a number that grows from one order to the next, above 0. old_generation and old_digest: of the placement
    it starts from; generation and digest: of the one it leads to. layers: those that differ, moved in this order
    after all whose shares alone change. layers_per_step: layers under way at the same time, each with staging of
    its own. bytes_per_second: that a rank sends and receives at most, both together; None: as much as its steps
    bear. A later order replaces one that has not begun.
    """

    order: int
    old_generation: int
    old_digest: str
    generation: int
    digest: str
    layers: list[LayerOrder]
    layers_per_step: int = 1
    bytes_per_second: float | None = None


class Rejoin(msgspec.Struct, frozen=True, tag="rejoin"):
    """Go on without the ranks that were lost; sent to each rank that is left once all of them have said RankLeft.

    membership: number of the group, one more each time. ranks: those that are left, by the numbers they started
    with, in the order of their new ones. lost: all that were lost since the start, in the order of their loss.
    address, port: of the store where they meet.
    """

    membership: int
    ranks: list[int]
    lost: list[int]
    address: str
    port: int


ToRank = AddRequest | AbortRequest | Wake | Shutdown | Migrate | Rejoin


# ------------------------------------------------------------------ rank -> front-end


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural log-probability of a token under the model's own distribution (before temperature and filters),
    its rank (1 = most likely) and the most likely alternatives, best first, as (token, logprob)."""

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]] = []


class SequenceOutput(msgspec.Struct, array_like=True):
    """What one step added to one sequence; finish_reason is None while it goes on.

    finish_reason: "stop" (an end or stop token, which is the last of token_ids), "length", "error" (the
    request cannot be run) or "fault" (it was run, and the model's output is not a number).
    prompt_logprobs: once, with the first output: one entry a prompt token, the first None.
    routed_experts: with the last output when asked for: uint8/int16 little-endian bytes of [tokens, L, K]
    (tokens = prompt + generated - 1: the last token was never an input), width by expert_width (1 or 2).
    queue_seconds: with the first output: from the sequence's arrival at the rank to its first step.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    cached_tokens: int = 0
    routed_experts: bytes | None = None
    error: str | None = None
    queue_seconds: float = 0.0


class EngineStats(msgspec.Struct, frozen=True, array_like=True):
    """State of one rank's replica after a step, and the counts since the rank's start.

    replica_tokens: tokens computed by this replica; busiest_tokens: the same counted as if it had always been the
    busiest replica of its step. Over all replicas mean(replica_tokens) / busiest_tokens is the token balance of
    attention DP: 1 when nobody waited.
    """

    step: int
    running: int
    waiting: int
    pages_used: int
    pages_total: int
    prompt_tokens: int
    generated_tokens: int
    preemptions: int
    cached_tokens: int
    replica_tokens: int = 0
    busiest_tokens: int = 0


class RankReady(msgspec.Struct, frozen=True, tag="ready"):
    """The rank has its weights and caches. kv_tokens: tokens that its KV cache holds.

    placement_generation: of the experts' placement that it follows, None without experts.
    """

    rank: int
    pid: int
    kv_tokens: int
    max_seq_len: int
    placement_generation: int | None = None


class StepDone(msgspec.Struct, frozen=True, tag="step"):
    """From a replica's leader after each step that had work; from others and idle ranks as a heartbeat."""

    rank: int
    outputs: list[SequenceOutput]
    stats: EngineStats


class ExpertCounts(msgspec.Struct, frozen=True, tag="experts"):
    """The experts that a rank's own rows chose since its last such message: summed over ranks, each token counts
    once. About once a second while there is something to tell; with online balancing when `step` is a multiple of
    window_steps, from every rank, and once more when the traffic stops in between.

    counts: uint32 little-endian bytes of [2, L, E], prefill then decode: (token, choice) counts of the logical
    experts of each MoE layer, padding excluded. tokens: rows counted, (prefill, decode). They fell in the `steps`
    engine steps before `step`, which took about `seconds`; steps are numbered alike on all ranks.
    slot_counts: the same of [2, L, P]: what this rank's rows gave to each slot of the group. A row that is alone of
    its sequence in a step is a decode, the last of a prompt cut into chunks too.
    """

    rank: int
    step: int
    steps: int
    seconds: float
    tokens: tuple[int, int]
    counts: bytes
    slot_counts: bytes = b""


class LayersSwitched(msgspec.Struct, frozen=True, tag="switched"):
    """These layers of an order are in force, on all ranks from the same step on; from rank 0."""

    rank: int
    order: int
    layers: list[int]


class Migrated(msgspec.Struct, frozen=True, tag="migrated"):
    """An order is over, from each rank.

    result: "applied"; "partial": some layers follow it, the others are as they were; "failed": none does. reason:
    why not all, "" for applied. Ranks switch layers together, so layers_done (with and without moves) is the same
    on all. generation, digest: of the placement that this rank follows now. From rank 0 moves and bytes count the
    layers done on all ranks (slots written; bytes between ranks), from the others they are 0. seconds: from the
    step in which all ranks had the order; stall_seconds: the part of it that this rank's steps were held up.
    """

    rank: int
    order: int
    result: str
    reason: str
    layers_done: int
    generation: int
    digest: str
    moves: int
    bytes: int
    seconds: float
    stall_seconds: float


class RankLeft(msgspec.Struct, frozen=True, tag="left"):
    """The rank found another gone, has left their group and waits for Rejoin."""

    rank: int


class Rejoined(msgspec.Struct, frozen=True, tag="rejoined"):
    """The rank goes on in the group of this membership, under this placement of the experts, each [L, P]."""

    rank: int
    membership: int
    generation: int
    digest: str
    slot_to_expert: list[list[int]]
    share: list[list[float]]


class RankFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The rank is about to exit. time: seconds since the epoch when it failed: the earliest is the cause.

    mistake: a setting or a file cannot be used; traceback is then one line that names it.
    """

    rank: int
    time: float
    traceback: str
    mistake: bool = False


FromRank = RankReady | StepDone | ExpertCounts | LayersSwitched | Migrated | RankLeft | Rejoined | RankFailed

encode = msgspec.msgpack.Encoder().encode
decode_to_rank = msgspec.msgpack.Decoder(ToRank).decode
decode_from_rank = msgspec.msgpack.Decoder(FromRank).decode
