"""What each step computes: decodes first, then prompts in order of arrival, within tokens, seats and pages.

Pure data and deterministic: every rank of a replica runs it on the same messages and sees the same batches.
Knows no tensor and no rank. First come, first served: nothing overtakes, so nothing starves.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Collection
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from moeserve.engine.page_pool import PagePool
from moeserve.engine.sequence import NO_TOKEN, Chunk, Sequence, State, StepResult
from moeserve.messages import AddRequest, EngineStats, SequenceOutput


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """One step of a replica: the first num_decode chunks have exactly one token each."""

    chunks: tuple[Chunk, ...]
    num_decode: int
    num_tokens: int
    want_experts: bool

    def num_rows(self, tp: int) -> int:
        """Tokens, padded to a multiple of tp."""
        return -(-self.num_tokens // tp) * tp


class Scheduler:
    """Sequences wait, then run (hold a seat and pages for all their tokens), then finish.

    A sequence gets the pages of its whole prompt when it is admitted, so only decodes ask for more. When
    there is none, the youngest running sequence gives all of its up and waits again, first in line; its
    output becomes part of what is computed anew. The oldest can thus always go on, and `add` refuses what
    would not fit alone.
    """

    def __init__(
        self,
        pool: PagePool,
        max_batch_size: int,
        max_num_tokens: int,
        max_seq_len: int,
        enable_chunked_prefill: bool = True,
        eos_token_ids: Collection[int] = (),
        vocab_size: int | None = None,
    ) -> None:
        for name, value in (
            ("max_batch_size", max_batch_size),
            ("max_num_tokens", max_num_tokens),
            ("max_seq_len", max_seq_len),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")
        self.pool = pool
        self.max_batch_size = max_batch_size
        self.max_num_tokens = max_num_tokens
        self.max_seq_len = max_seq_len
        self.enable_chunked_prefill = enable_chunked_prefill
        self.eos_token_ids = frozenset(eos_token_ids)
        self.vocab_size = vocab_size
        self._waiting: OrderedDict[str, Sequence] = OrderedDict()  # by arrival
        self._running: list[Sequence] = []  # by arrival; all arrived before those that wait
        self._sequences: dict[str, Sequence] = {}  # both
        self._arrivals = 0
        self._prompt_only = False  # the last step left the decodes out
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._cached_tokens = 0
        self._preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    @property
    def has_queue(self) -> bool:
        """Whether prompts wait, for a seat, pages or the next step."""
        return bool(self._waiting)

    @property
    def prefill_ready(self) -> bool:
        """Whether the next batch would compute prompt tokens if it were not held back."""
        if any(len(sequence.tokens) - sequence.num_computed > 1 for sequence in self._running):
            return True
        return self._admissible() is not None

    @property
    def prefill_fills_step(self) -> bool:
        """Whether the prompts that wait already make a full step: waiting for more would gain nothing."""
        tokens = 0
        for sequence in self._waiting.values():
            tokens += len(sequence.tokens)
            if tokens >= self.max_num_tokens:
                return True
        return len(self._waiting) + len(self._running) >= self.max_batch_size

    def stats(self, step: int) -> EngineStats:
        return EngineStats(
            step=step,
            running=len(self._running),
            waiting=len(self._waiting),
            pages_used=self.pool.num_pages - self.pool.num_free,
            pages_total=self.pool.num_pages,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=self._preemptions,
            cached_tokens=self._cached_tokens,
        )

    def add(self, request: AddRequest) -> str | None:
        """Queue the request, or say why it can never run."""
        problem = self._problem(request)
        if problem is None:
            sequence = Sequence.from_request(request, self._arrivals)
            self._arrivals += 1
            self._sequences[request.request_id] = self._waiting[request.request_id] = sequence
        return problem

    def abort(self, request_id: str) -> bool:
        """Drop the sequence, its seat and its pages; False when it is not there (any more)."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        if sequence.state is State.RUNNING:
            self._running.remove(sequence)
        else:
            del self._waiting[request_id]
        self._forget(sequence)
        return True

    def abort_all(self) -> None:
        for request_id in list(self._sequences):
            self.abort(request_id)

    def next_batch(self, hold_prefill: bool = False) -> ScheduledBatch:
        """The next step, its pages allocated; `finish` must have been told of the one before.

        hold_prefill: only decodes, no prompt tokens and no admissions in this step.
        """
        preemptions = self._preemptions
        chunks: list[Chunk] = []
        self._prompt_only = not hold_prefill and not self._prompt_only and self._prompt_needs_whole_step()
        if not self._prompt_only:
            self._schedule_decodes(chunks)
        num_decode = num_tokens = len(chunks)
        if not hold_prefill:
            # What a preemption has just freed is for those who decode, not for the next in line.
            may_admit = self._preemptions == preemptions
            num_tokens += self._schedule_prompts(chunks, self.max_num_tokens - num_tokens, may_admit)
        want_experts = any(chunk.sequence.params.return_routed_experts for chunk in chunks)
        return ScheduledBatch(tuple(chunks), num_decode, num_tokens, want_experts)

    def finish(
        self, batch: ScheduledBatch, results: Listing[StepResult], experts: NDArray[Any] | None = None
    ) -> list[SequenceOutput]:
        """Record a computed step; the outputs of the sequences that have something to say, in batch order.

        results: one a chunk. experts: [tokens, L, K] unsigned or int16, the routed experts of the batch's
        tokens (padding rows may follow), when want_experts. A sequence aborted meanwhile is passed over.
        """
        outputs: list[SequenceOutput] = []
        row = 0
        any_finished = False
        page_size = self.pool.page_size
        for chunk, result in zip(batch.chunks, results, strict=True):
            sequence, start, num_tokens = chunk.sequence, chunk.start, chunk.num_tokens
            row += num_tokens
            if sequence.state is not State.RUNNING:
                continue
            end = start + num_tokens
            sequence.num_computed = end
            if end // page_size > sequence.num_published:
                self._publish(sequence, end // page_size)
            if result.prompt_logprobs is not None:
                sequence.prompt_logprobs += result.prompt_logprobs
            if experts is not None and sequence.params.return_routed_experts:
                _record_experts(sequence, start, experts[row - num_tokens : row])
            if end < len(sequence.tokens):
                continue
            output = self._extend(sequence, result)
            outputs.append(output)
            if output.finish_reason is not None:
                any_finished = True
                self._forget(sequence)
        if any_finished:
            self._running = [sequence for sequence in self._running if sequence.state is State.RUNNING]
        return outputs

    def check(self) -> None:
        """Verify every invariant (AssertionError); for tests."""
        self.pool.check(sequence.pages for sequence in self._sequences.values())
        in_line = self._running + list(self._waiting.values())
        assert [s.arrival for s in in_line] == sorted(s.arrival for s in in_line), "someone was overtaken"
        assert {s.request_id for s in in_line} == set(self._sequences) and len(in_line) == len(
            self._sequences
        )
        assert len(self._running) <= self.max_batch_size
        assert all(s.state is State.WAITING and not s.pages for s in self._waiting.values())
        for sequence in self._running:
            assert sequence.state is State.RUNNING
            assert sequence.num_computed < len(sequence.tokens) <= self.max_seq_len
            assert len(sequence.tokens) - 1 <= len(sequence.pages) * self.pool.page_size
            assert sequence.num_published <= len(sequence.pages)

    # ------------------------------------------------------------------ the parts of a step

    def _schedule_decodes(self, chunks: list[Chunk]) -> None:
        running, pool = self._running, self.pool
        index = 0
        while index < len(running) and len(chunks) < self.max_num_tokens:
            sequence = running[index]
            index += 1
            start = sequence.num_computed
            if len(sequence.tokens) - start != 1:
                continue
            if start == len(sequence.pages) * pool.page_size:
                # The victims stand behind this sequence, or are it: none is in the batch yet.
                while not pool.num_free and sequence.state is State.RUNNING:
                    self._preempt(running.pop())
                if sequence.state is not State.RUNNING:
                    break
                sequence.pages.append(pool.allocate())
            chunks.append(Chunk(sequence, start, 1, sequence.params.max_tokens > 0))

    def _schedule_prompts(self, chunks: list[Chunk], budget: int, may_admit: bool) -> int:
        """Add chunks of running, then of newly admitted prompts; the number of tokens added."""
        added = 0
        for sequence in self._running:
            if len(sequence.tokens) - sequence.num_computed > 1:
                added += self._schedule_prompt(chunks, sequence, budget - added)
        while may_admit and added < budget:
            shared = self._admissible()
            if shared is None:
                break
            sequence = next(iter(self._waiting.values()))
            if self._part(sequence, len(shared) * self.pool.page_size, budget - added) == 0:
                break
            self._admit(sequence, shared)
            added += self._schedule_prompt(chunks, sequence, budget - added)
        return added

    def _schedule_prompt(self, chunks: list[Chunk], sequence: Sequence, budget: int) -> int:
        start = sequence.num_computed
        num_tokens = self._part(sequence, start, budget)
        if num_tokens == 0:
            return 0
        end = start + num_tokens
        samples = end == len(sequence.tokens) and sequence.params.max_tokens > 0
        score_start = num_scored = 0
        if sequence.params.prompt_logprobs is not None:
            score_start = max(start, len(sequence.prompt_logprobs))
            num_scored = max(0, min(end, sequence.num_prompt - 1) - score_start)
        chunks.append(Chunk(sequence, start, num_tokens, samples, score_start, num_scored))
        return num_tokens

    def _part(self, sequence: Sequence, start: int, budget: int) -> int:
        """How many of the sequence's tokens from start on go into a step with so many tokens left."""
        remaining = len(sequence.tokens) - start
        # Without chunking, only what has grown past a whole step since it was accepted is cut.
        if self.enable_chunked_prefill or remaining <= budget or remaining > self.max_num_tokens:
            return min(remaining, budget)
        return 0

    def _prompt_needs_whole_step(self) -> bool:
        """Without chunking: the next prompt fits into a step, but not beside the decodes."""
        if self.enable_chunked_prefill:
            return False
        partial = [s for s in self._running if len(s.tokens) - s.num_computed > 1]
        num_decodes = len(self._running) - len(partial)
        if partial:
            remaining = len(partial[0].tokens) - partial[0].num_computed
        else:
            shared = self._admissible()
            if shared is None:
                return False
            remaining = len(next(iter(self._waiting.values())).tokens) - len(shared) * self.pool.page_size
        return self.max_num_tokens - num_decodes < remaining <= self.max_num_tokens

    # ------------------------------------------------------------------ into and out of the running

    def _admissible(self) -> list[int] | None:
        """The pages that the first in line would share, if it can be admitted now; None if not."""
        if not self._waiting or len(self._running) >= self.max_batch_size:
            return None
        sequence = next(iter(self._waiting.values()))
        pool = self.pool
        shared: list[int] = []
        if pool.enable_block_reuse:
            num_sharable = sequence.num_skippable // pool.page_size
            pool.extend_keys(sequence.page_keys, sequence.tokens, num_sharable)
            shared = pool.match(sequence.page_keys[:num_sharable])
        # One page for each that runs stays free: an admission that is undone in the next steps is work lost.
        needed = pool.pages_for(len(sequence.tokens)) - len(shared) + len(self._running)
        return shared if needed <= pool.num_free_without(shared) else None

    def _admit(self, sequence: Sequence, shared: list[int]) -> None:
        pool = self.pool
        del self._waiting[sequence.request_id]
        pool.retain(shared)
        sequence.pages.extend(shared)
        while len(sequence.pages) < pool.pages_for(len(sequence.tokens)):
            sequence.pages.append(pool.allocate())
        sequence.num_computed = len(shared) * pool.page_size
        sequence.num_published = len(shared)
        sequence.state = State.RUNNING
        self._running.append(sequence)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.num_computed
            sequence.queue_seconds = time.monotonic() - sequence.arrived
            self._cached_tokens += sequence.num_computed
            self._prompt_tokens += sequence.num_prompt

    def _preempt(self, sequence: Sequence) -> None:
        self._preemptions += 1
        self._give_up_pages(sequence)
        sequence.state = State.WAITING
        self._waiting[sequence.request_id] = sequence
        self._waiting.move_to_end(sequence.request_id, last=False)

    def _forget(self, sequence: Sequence) -> None:
        self._give_up_pages(sequence)
        sequence.state = State.FINISHED
        del self._sequences[sequence.request_id]

    def _give_up_pages(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        del sequence.pages[:]
        sequence.num_computed = sequence.num_published = 0

    # ------------------------------------------------------------------ what a step brought

    def _publish(self, sequence: Sequence, num_full: int) -> None:
        if self.pool.enable_block_reuse:
            self.pool.extend_keys(sequence.page_keys, sequence.tokens, num_full)
            for index in range(sequence.num_published, num_full):
                self.pool.publish(sequence.pages[index], sequence.page_keys[index])
        sequence.num_published = num_full

    def _extend(self, sequence: Sequence, result: StepResult) -> SequenceOutput:
        """Append the sampled token, if the sequence wants any, and see whether it ends here."""
        params = sequence.params
        token = result.token
        output = SequenceOutput(sequence.request_id, [], cached_tokens=sequence.cached_tokens or 0)
        if params.max_tokens == 0:
            output.finish_reason = "length"
        elif token == NO_TOKEN:
            output.finish_reason = "fault"
            output.error = "the model's output is not a number: its weights are broken"
        else:
            assert token is not None, f"no token sampled for {sequence.request_id}"
            sequence.tokens.append(token)
            self._generated_tokens += 1
            output.token_ids.append(token)
            if token in params.stop_token_ids or (token in self.eos_token_ids and not params.ignore_eos):
                output.finish_reason = "stop"
            elif sequence.num_output >= params.max_tokens or len(sequence.tokens) >= self.max_seq_len:
                output.finish_reason = "length"
            if params.logprobs is not None:
                assert result.logprob is not None
                output.logprobs = [result.logprob]
        if sequence.num_output <= 1:
            output.queue_seconds = sequence.queue_seconds
        if params.prompt_logprobs is not None and sequence.num_output <= 1:
            output.prompt_logprobs = [None, *sequence.prompt_logprobs]
        if output.finish_reason is not None:
            output.routed_experts = sequence.routed_experts()
        return output

    def _problem(self, request: AddRequest) -> str | None:
        num_prompt, max_tokens = len(request.prompt), request.params.max_tokens
        if request.request_id in self._sequences:
            return f"request {request.request_id} is already here"
        if num_prompt == 0:
            return "the prompt has no token: give at least one"
        if self.vocab_size is not None:
            for name, ids in (("prompt", request.prompt), ("logit_bias", request.params.logit_bias)):
                strange = [token for token in ids if not 0 <= token < self.vocab_size]
                if strange:
                    return f"{name} has token {strange[0]}: tokens are 0..{self.vocab_size - 1}"
        longest = self.max_seq_len - min(max_tokens, 1)
        if num_prompt > longest:
            return (
                f"the prompt has {num_prompt} tokens: with max_seq_len {self.max_seq_len} "
                f"it can have at most {longest}"
            )
        if not self.enable_chunked_prefill and num_prompt > self.max_num_tokens:
            return (
                f"the prompt has {num_prompt} tokens: without enable_chunked_prefill it can have at most "
                f"max_num_tokens = {self.max_num_tokens}"
            )
        # The last token that is generated is never computed.
        num_cached = max(num_prompt, min(num_prompt + max_tokens, self.max_seq_len) - 1)
        capacity = self.pool.num_pages * self.pool.page_size
        if num_cached > capacity:
            return (
                f"prompt ({num_prompt} tokens) and max_tokens ({max_tokens}) need {num_cached} tokens of KV "
                f"cache: there are {capacity}"
            )
        return None


def _record_experts(sequence: Sequence, start: int, rows: NDArray[Any]) -> None:
    """Keep the rows of positions not recorded before: what is computed anew is there already."""
    known = sequence.num_expert_rows - start
    if known < len(rows):
        sequence.experts.append(rows[max(known, 0) :].copy())
        sequence.num_expert_rows = start + len(rows)
