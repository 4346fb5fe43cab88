"""The scheduler as pure data, on a paged toy model: its next token is a hash of the whole prefix, read back
through the page table, so that a wrong page, slot, chunk or restart changes the text."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from moeserve.engine.batch import make_batch
from moeserve.engine.page_pool import PagePool
from moeserve.engine.scheduler import ScheduledBatch, Scheduler
from moeserve.engine.sequence import NO_TOKEN, StepResult
from moeserve.messages import AddRequest, SamplingParams, SequenceOutput, TokenLogprob

VOCAB = 5
EOS = 4


def digest(prefix: list[int]) -> int:
    value = 17
    for token in prefix:
        value = (value * 31 + token + 1) % 1_000_003
    return value


def next_token(prefix: list[int]) -> int:
    return digest(prefix) // 7 % VOCAB


def score(prefix: list[int], token: int) -> TokenLogprob:
    return TokenLogprob(token, -float(digest(prefix)), token + 1)


def expected(request: AddRequest, max_seq_len: int) -> SequenceOutput:
    """All that the request should give, computed on its own from the whole text."""
    params, tokens = request.params, list(request.prompt)
    output = SequenceOutput(request.request_id, [], "length")
    while len(output.token_ids) < params.max_tokens and len(tokens) < max_seq_len:
        tokens.append(next_token(tokens))
        output.token_ids.append(tokens[-1])
        if tokens[-1] in params.stop_token_ids or (tokens[-1] == EOS and not params.ignore_eos):
            output.finish_reason = "stop"
            break
    generated = range(len(request.prompt), len(tokens))
    if params.logprobs is not None:
        output.logprobs = [score(tokens[:i], tokens[i]) for i in generated]
    if params.prompt_logprobs is not None:
        scored = range(1, len(request.prompt))
        output.prompt_logprobs = [None, *(score(tokens[:i], tokens[i]) for i in scored)]
    if params.return_routed_experts:
        output.routed_experts = bytes(digest(tokens[: i + 1]) % 251 for i in range(len(tokens) - 1))
    return output


@dataclass
class Toy:
    """Runs a scheduler on the toy model and keeps what each request was given."""

    scheduler: Scheduler
    got: dict[str, SequenceOutput] = field(default_factory=dict)
    steps: int = 0

    def __post_init__(self) -> None:
        pool = self.scheduler.pool
        self.cache = np.full(pool.num_pages * pool.page_size, -1)

    def step(self, hold_prefill: bool = False) -> ScheduledBatch:
        batch = self.scheduler.next_batch(hold_prefill)
        self.scheduler.check()
        assert batch.num_tokens <= self.scheduler.max_num_tokens
        assert batch.num_tokens == sum(chunk.num_tokens for chunk in batch.chunks)
        results, experts = self.run(batch)
        outputs = self.scheduler.finish(batch, results, experts)
        self.scheduler.check()
        for output in outputs:
            self.record(output)
        self.steps += 1
        return batch

    def drain(self, limit: int = 2000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_work:
                return
            batch = self.step()
            assert batch.chunks or self.scheduler.has_work is False, "a step did nothing though there is work"
        raise AssertionError(f"still work after {limit} steps")

    def run(self, batch: ScheduledBatch) -> tuple[list[StepResult], np.ndarray[Any, Any] | None]:
        page_size = self.scheduler.pool.page_size
        num_rows = batch.num_rows(tp=2)
        forward = make_batch(batch, page_size, num_rows, [num_rows // 2])
        assert forward.token_ids.shape == forward.positions.shape == forward.kv_slots.shape == (num_rows,)
        assert (forward.kv_slots[batch.num_tokens :] == -1).all()
        slots = forward.kv_slots[: batch.num_tokens].numpy()
        assert len(set(slots.tolist())) == len(slots), "two rows write the same place"
        self.cache[slots] = forward.token_ids[: batch.num_tokens].numpy()

        query_start, context_len = forward.query_start.tolist(), forward.context_len.tolist()
        prefix_of_row: list[list[int]] = []
        for b, pages in enumerate(forward.page_table.tolist()):
            context = [
                int(self.cache[pages[i // page_size] * page_size + i % page_size])
                for i in range(context_len[b])
            ]
            num_new = query_start[b + 1] - query_start[b]
            assert b >= forward.num_decode or num_new == 1
            first = context_len[b] - num_new
            positions = forward.positions[query_start[b] : query_start[b + 1]].tolist()
            assert positions == list(range(first, context_len[b]))
            prefix_of_row += [context[: position + 1] for position in positions]

        wanted: Iterator[int] = iter(forward.logit_rows.tolist())
        results = [self.result(chunk, wanted, prefix_of_row) for chunk in batch.chunks]
        assert next(wanted, None) is None
        experts = None
        if forward.want_experts:
            rows = [digest(prefix) % 251 for prefix in prefix_of_row]
            experts = np.array(rows + [255] * (num_rows - len(rows)), np.uint8).reshape(-1, 1, 1)
        return results, experts

    def result(self, chunk: Any, wanted: Iterator[int], prefix_of_row: list[list[int]]) -> StepResult:
        params, tokens = chunk.sequence.params, chunk.sequence.tokens
        scores = None
        if chunk.num_scored:
            prefixes = [prefix_of_row[next(wanted)] for _ in range(chunk.num_scored)]
            scores = [score(prefix, tokens[len(prefix)]) for prefix in prefixes]
        if not chunk.samples:
            return StepResult(prompt_logprobs=scores)
        prefix = prefix_of_row[next(wanted)]
        token = next_token(prefix)
        logprob = score(prefix, token) if params.logprobs is not None else None
        return StepResult(token, logprob, scores)

    def record(self, output: SequenceOutput) -> None:
        so_far = self.got.get(output.request_id)
        if so_far is None:
            self.got[output.request_id] = output
            return
        assert so_far.finish_reason is None, "output after the end"
        assert output.prompt_logprobs is None, "prompt scores come once, with the first output"
        so_far.token_ids += output.token_ids
        so_far.finish_reason = output.finish_reason
        so_far.routed_experts = output.routed_experts
        if output.logprobs is not None and so_far.logprobs is not None:
            so_far.logprobs += output.logprobs

    def check_text(self, request: AddRequest) -> None:
        got = self.got[request.request_id]
        want = expected(request, self.scheduler.max_seq_len)
        want.cached_tokens, want.queue_seconds = got.cached_tokens, got.queue_seconds
        assert got == want


def toy(
    num_pages: int = 8,
    page_size: int = 2,
    max_batch_size: int = 4,
    max_num_tokens: int = 8,
    max_seq_len: int = 16,
    enable_chunked_prefill: bool = True,
    enable_block_reuse: bool = True,
    vocab_size: int | None = None,
) -> Toy:
    pool = PagePool(num_pages, page_size, enable_block_reuse)
    limits = (max_batch_size, max_num_tokens, max_seq_len, enable_chunked_prefill, {EOS}, vocab_size)
    return Toy(Scheduler(pool, *limits))


def request(name: str, prompt: list[int], max_tokens: int = 4, **params: Any) -> AddRequest:
    params.setdefault("ignore_eos", True)
    return AddRequest(name, prompt, SamplingParams(max_tokens=max_tokens, **params))


class Walk(RuleBasedStateMachine):
    """Any order of additions, aborts and steps: every text is what it is alone, every invariant holds."""

    @initialize(
        num_pages=st.integers(3, 10),
        page_size=st.integers(1, 3),
        max_batch_size=st.integers(1, 4),
        max_num_tokens=st.integers(1, 9),
        chunked=st.booleans(),
        reuse=st.booleans(),
    )
    def start(
        self,
        num_pages: int,
        page_size: int,
        max_batch_size: int,
        max_num_tokens: int,
        chunked: bool,
        reuse: bool,
    ) -> None:
        self.toy = toy(num_pages, page_size, max_batch_size, max_num_tokens, 14, chunked, reuse)
        self.requests: dict[str, AddRequest] = {}
        self.number = 0

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        max_tokens=st.integers(0, 8),
        logprobs=st.sampled_from([None, 0]),
        prompt_logprobs=st.sampled_from([None, None, 0]),
        experts=st.booleans(),
        ignore_eos=st.booleans(),
    )
    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        logprobs: int | None,
        prompt_logprobs: int | None,
        experts: bool,
        ignore_eos: bool,
    ) -> None:
        self.number += 1
        params = SamplingParams(
            max_tokens=max_tokens,
            logprobs=logprobs if max_tokens else None,
            prompt_logprobs=prompt_logprobs,
            return_routed_experts=experts,
            ignore_eos=ignore_eos,
        )
        new = AddRequest(f"r{self.number}", prompt, params)
        if self.toy.scheduler.add(new) is None:
            self.requests[new.request_id] = new

    @rule(which=st.integers(0, 20))
    def abort(self, which: int) -> None:
        alive = [name for name in self.requests if not self.finished(name)]
        if alive:
            name = alive[which % len(alive)]
            assert self.toy.scheduler.abort(name)
            assert not self.toy.scheduler.abort(name)
            del self.requests[name]

    @rule(hold=st.sampled_from([False, False, False, True]))
    def step(self, hold: bool) -> None:
        ready = self.toy.scheduler.prefill_ready
        batch = self.toy.step(hold)
        if hold:
            assert batch.num_decode == batch.num_tokens
        elif batch.num_tokens > batch.num_decode:
            assert ready

    @rule(hold=st.booleans())
    def abort_in_flight(self, hold: bool) -> None:
        """The step is computed, then its first sequence is gone before the results are recorded."""
        batch = self.toy.scheduler.next_batch(hold)
        results, experts = self.toy.run(batch)
        if batch.chunks:
            name = batch.chunks[0].sequence.request_id
            self.toy.scheduler.abort(name)
            del self.requests[name]
        for output in self.toy.scheduler.finish(batch, results, experts):
            self.toy.record(output)

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "toy"):
            self.toy.scheduler.check()

    def finished(self, name: str) -> bool:
        output = self.toy.got.get(name)
        return output is not None and output.finish_reason is not None

    def teardown(self) -> None:
        if not hasattr(self, "toy"):
            return
        self.toy.drain()
        for sent in self.requests.values():
            self.toy.check_text(sent)
        assert self.toy.scheduler.pool.num_free == self.toy.scheduler.pool.num_pages


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_decodes_come_first_then_prompts_in_order_of_arrival_cut_to_the_budget() -> None:
    run = toy(num_pages=20, max_num_tokens=6, max_seq_len=24, enable_block_reuse=False)
    for name, length in (("a", 2), ("b", 7), ("c", 2)):
        assert run.scheduler.add(request(name, [1, 0] * length, 3)) is None
    shapes = []
    while run.scheduler.has_work:
        batch = run.step()
        shapes.append([(chunk.sequence.request_id, chunk.start, chunk.num_tokens) for chunk in batch.chunks])
    assert shapes == [
        [("a", 0, 4), ("b", 0, 2)],
        [("a", 4, 1), ("b", 2, 5)],
        [("a", 5, 1), ("b", 7, 5)],
        [("b", 12, 2), ("c", 0, 4)],
        [("b", 14, 1), ("c", 4, 1)],
        [("b", 15, 1), ("c", 5, 1)],
    ]


def test_text_survives_preemption_with_scores_and_experts() -> None:
    run = toy(num_pages=6, page_size=2, max_batch_size=3, max_num_tokens=4, max_seq_len=13)
    wants: dict[str, Any] = {"logprobs": 0, "prompt_logprobs": 0, "return_routed_experts": True}
    sent = [request(f"r{i}", [i, 1, 0, 1][: 2 + i], 8, **wants) for i in range(3)]
    for one in sent:
        assert run.scheduler.add(one) is None
    run.drain()
    assert run.scheduler.stats(0).preemptions > 0, "the case is meant to run out of pages"
    for one in sent:
        run.check_text(one)


def test_a_prompt_preempted_half_way_is_scored_once() -> None:
    run = toy(num_pages=9, page_size=1, max_num_tokens=2, enable_block_reuse=False)
    old = request("old", [1], 7)
    young = request("young", [0, 1, 1, 0, 1, 0], 2, prompt_logprobs=0, return_routed_experts=True)
    for one in (old, young):
        assert run.scheduler.add(one) is None
    while run.scheduler.stats(0).preemptions == 0:
        run.step()
    assert "young" not in run.got
    run.drain()
    run.check_text(old)
    run.check_text(young)


def test_the_youngest_is_preempted_and_the_oldest_never() -> None:
    run = toy(num_pages=4, page_size=2, max_batch_size=4, max_seq_len=8)
    run.scheduler.add(request("old", [1], 7))
    run.scheduler.add(request("young", [0], 7))
    order = []
    while run.scheduler.has_work:
        batch = run.step()
        order.append([chunk.sequence.request_id for chunk in batch.chunks])
    assert run.scheduler.stats(0).preemptions == 1
    assert sum("old" in names for names in order) == 7, "the oldest was in every step until its end"
    run.check_text(request("young", [0], 7))


def test_a_prefix_is_reused_but_the_last_token_is_always_computed() -> None:
    run = toy(num_pages=20, page_size=2)
    prompt = [1, 0, 1, 1, 0, 1]
    cached = []
    for name, tokens in (("a", prompt), ("b", prompt), ("c", prompt + [1]), ("d", [0] + prompt)):
        run.scheduler.add(request(name, tokens, 1))
        run.drain()
        cached.append(run.got[name].cached_tokens)
    assert cached == [0, 4, 6, 0]
    stats = run.scheduler.stats(9)
    assert (stats.step, stats.cached_tokens, stats.prompt_tokens, stats.generated_tokens) == (9, 10, 26, 4)
    assert (stats.running, stats.waiting, stats.pages_used, stats.pages_total) == (0, 0, 0, 20)


def test_output_is_reused_by_the_next_turn() -> None:
    run = toy(num_pages=20, page_size=2)
    run.scheduler.add(request("a", [1, 0, 1], 6))
    run.drain()
    run.scheduler.add(request("b", [1, 0, 1] + run.got["a"].token_ids + [1], 2))
    run.drain()
    assert run.got["b"].cached_tokens == 8


@pytest.mark.parametrize("wants", [{"prompt_logprobs": 0}, {"return_routed_experts": True}])
def test_what_has_to_be_computed_is_not_taken_from_the_cache(wants: dict[str, Any]) -> None:
    run = toy(num_pages=20, page_size=2)
    prompt = [1, 0, 1, 1, 0, 1]
    for one in (request("a", prompt), request("b", prompt, **wants)):
        run.scheduler.add(one)
        run.drain()
        run.check_text(one)
    assert run.got["b"].cached_tokens == 0


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_scoring_a_prompt_that_takes_several_steps(max_tokens: int) -> None:
    run = toy(max_num_tokens=3)
    one = request("a", [1, 0, 1, 1, 0, 1, 1], max_tokens, prompt_logprobs=0)
    run.scheduler.add(one)
    run.drain()
    assert run.steps == 3
    run.check_text(one)


def test_a_prompt_as_long_as_the_context_can_be_scored_but_not_continued() -> None:
    run = toy(max_seq_len=8)
    assert run.scheduler.add(request("a", [1] * 8, 0, prompt_logprobs=0)) is None
    assert run.scheduler.add(request("b", [1] * 8, 1)) is not None
    run.drain()
    assert len(run.got["a"].prompt_logprobs or []) == 8


def test_ends() -> None:
    text = [1]
    while len(text) < 40:
        text.append(next_token(text))
    first_eos = text.index(EOS, 1)
    stop = text[3]
    run = toy(num_pages=30, max_seq_len=40)
    for one in (
        request("eos", [1], 39, ignore_eos=False),
        request("stop", [1], 39, stop_token_ids=(stop,)),
        request("budget", [1], 5),
        request("context", [1], 99),
    ):
        assert run.scheduler.add(one) is None
    run.drain()
    ends = {name: (len(out.token_ids), out.finish_reason) for name, out in run.got.items()}
    assert ends["eos"] == (first_eos, "stop")
    assert ends["stop"] == (text.index(stop, 1), "stop")
    assert ends["budget"] == (5, "length")
    assert ends["context"] == (39, "length")


def test_a_model_that_gives_no_numbers_ends_the_request_and_frees_its_pages() -> None:
    run = toy(num_pages=4)
    run.scheduler.add(request("broken", [1, 2], 5))
    (output,) = run.scheduler.finish(run.scheduler.next_batch(), [StepResult(NO_TOKEN)])
    assert (output.finish_reason, output.token_ids) == ("fault", [])
    assert "not a number" in (output.error or "")
    run.scheduler.check()
    assert run.scheduler.stats(1).pages_used == 0


def test_without_chunking_a_prompt_is_whole_and_waits_neither_for_ever_nor_stops_the_others() -> None:
    run = toy(num_pages=40, max_num_tokens=4, max_batch_size=8, enable_chunked_prefill=False)
    run.scheduler.pool.enable_block_reuse = False
    names = [f"r{i}" for i in range(6)]
    for name in names:
        assert run.scheduler.add(request(name, [1, 0, 1, 1], 6)) is None
    decoding_idle = 0
    for step in range(100):
        decodes = sum(name in run.got and run.got[name].finish_reason is None for name in names)
        batch = run.step()
        assert all(c.num_tokens in (1, 4) for c in batch.chunks)
        decoding_idle = decoding_idle + 1 if decodes and not batch.num_decode else 0
        assert decoding_idle <= 1, "decodes were left out of two steps in a row"
        assert len(run.got) >= min(6, step // 2 + 1), "a prompt does not get its turn"
        if not run.scheduler.has_work:
            break
    for name in names:
        run.check_text(request(name, [1, 0, 1, 1], 6))


def test_a_long_prompt_is_not_overtaken_by_a_stream_of_short_ones() -> None:
    run = toy(num_pages=8, page_size=2, max_batch_size=3, max_seq_len=16)
    for i in range(3):
        run.scheduler.add(request(f"s{i}", [1, 0], 2))
    run.scheduler.add(request("long", [1] * 13, 2))
    for i in range(3, 30):
        run.scheduler.add(request(f"s{i}", [0, 1], 2))
        run.step()
        if "long" in run.got:
            break
    assert run.steps < 8


def test_hold_lets_decodes_go_and_keeps_prompts_waiting() -> None:
    run = toy()
    run.scheduler.add(request("a", [1, 0], 8))
    assert run.scheduler.prefill_ready
    assert not run.step(hold_prefill=True).chunks
    run.step()
    assert not run.scheduler.prefill_ready
    run.scheduler.add(request("b", [0, 0], 2))
    assert run.scheduler.prefill_ready
    for _ in range(3):
        assert [c.sequence.request_id for c in run.step(hold_prefill=True).chunks] == ["a"]
    assert [c.sequence.request_id for c in run.step().chunks] == ["a", "b"]


def test_the_time_in_the_queue_is_told_with_the_first_output() -> None:
    scheduler = Scheduler(PagePool(8, 4), 1, 8, 32)
    for name in "ab":
        scheduler.add(AddRequest(name, [1, 2], SamplingParams(max_tokens=2, ignore_eos=True)))
    seconds: dict[str, list[float]] = {"a": [], "b": []}
    while scheduler.has_work:
        time.sleep(0.001)
        batch = scheduler.next_batch()
        for output in scheduler.finish(batch, [StepResult(1) for _ in batch.chunks], None):
            seconds[output.request_id].append(output.queue_seconds)
    assert 0.0 < seconds["a"][0] < seconds["b"][0]  # one place: b waited for both steps of a
    assert seconds["a"][1] == seconds["b"][1] == 0.0


def test_an_empty_step_makes_an_empty_batch_with_padding() -> None:
    batch = toy().scheduler.next_batch()
    assert batch.chunks == () and batch.num_rows(4) == 0
    forward = make_batch(batch, 2, 4, [1, 1])
    assert forward.kv_slots.tolist() == [-1] * 4
    assert forward.query_start.tolist() == [0] and forward.logit_rows.numel() == 0
    assert forward.page_table.shape[0] == 0 and forward.max_query_len == 0


@pytest.mark.parametrize(
    ("prompt", "params", "says"),
    [
        ([], {}, "no token"),
        ([1] * 16, {}, "at most 15"),
        ([1] * 8, {"max_tokens": 4}, "10 tokens of KV cache: there are 8|11 tokens of KV cache: there are 8"),
        ([1, 5], {}, "prompt has token 5: tokens are 0..4"),
        ([-1], {}, "prompt has token -1"),
        ([1], {"logit_bias": {7: 1.0}}, "logit_bias has token 7"),
    ],
)
def test_what_can_never_run_is_refused_with_the_reason(
    prompt: list[int], params: dict[str, Any], says: str
) -> None:
    run = toy(num_pages=4, page_size=2, max_seq_len=16, vocab_size=5)
    problem = run.scheduler.add(request("a", prompt, **params))
    assert problem is not None
    assert any(part in problem for part in says.split("|")), problem
    assert not run.scheduler.has_work


def test_a_long_prompt_without_chunking_and_a_name_twice_are_refused() -> None:
    run = toy(max_num_tokens=4, enable_chunked_prefill=False)
    assert "max_num_tokens = 4" in (run.scheduler.add(request("a", [1] * 5)) or "")
    assert run.scheduler.add(request("a", [1] * 4)) is None
    assert "already" in (run.scheduler.add(request("a", [1] * 4)) or "")


@pytest.mark.parametrize("name", ["max_batch_size", "max_num_tokens", "max_seq_len"])
def test_a_limit_below_one_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0"):
        toy(**{name: 0})
