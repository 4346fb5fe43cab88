"""The requests in flight: sends their sequences to replicas and turns what the ranks answer into text.

Knows the messages and the tokenizer; neither HTTP nor how a rank is reached (a RankLink does that).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import msgspec
import numpy as np

from moeserve.eplb.types import Placement
from moeserve.expert_balance import ExpertBalance
from moeserve.messages import (
    AbortRequest,
    AddRequest,
    EngineStats,
    ExpertCounts,
    FromRank,
    LayersSwitched,
    Migrated,
    RankFailed,
    RankLeft,
    RankReady,
    Rejoin,
    Rejoined,
    SamplingParams,
    SequenceOutput,
    StepDone,
    ToRank,
    Wake,
)
from moeserve.server.balance import BalanceCollector
from moeserve.server.balancedness import BalancednessCollector
from moeserve.server.errors import ApiError, engine_dead, rank_lost, timed_out, too_busy, unavailable
from moeserve.server.generation import Generation, RunningSequence
from moeserve.server.membership import Membership
from moeserve.server.metrics import ServingMetrics, make_registry
from moeserve.server.replicas import ReplicaLoads
from moeserve.server.settings import ServerSettings
from moeserve.text import Tokenizer

log = logging.getLogger(__name__)
MAX_SEED = (1 << 63) - 1
BALANCE_TICK_SECONDS = 0.02


class RankLink(Protocol):
    """The way to the ranks. receive gives each rank's messages in order; a rank that dies is a RankFailed."""

    num_replicas: int

    async def send(self, replica: int, message: ToRank) -> None: ...

    async def receive(self) -> tuple[int, FromRank]: ...

    def lose(self, rank: int) -> None:
        """The others go on without this rank."""
        ...

    def meeting_place(self) -> tuple[str, int]:
        """Address and port where they may meet."""
        ...


class Frontend:
    """Owns every request in flight. All methods but run() are plain calls on the event loop's thread."""

    def __init__(
        self,
        link: RankLink,
        tokenizer: Tokenizer,
        settings: ServerSettings,
        balance: ExpertBalance | None = None,
    ) -> None:
        """balance: is told what the ranks have counted; None for a model without experts."""
        self.tokenizer = tokenizer
        self.settings = settings
        self.loads = ReplicaLoads(link.num_replicas, balance=settings.balance_replicas)
        self.metrics = ServingMetrics(self._gauges)
        self.registry = make_registry(self.metrics, settings.model_name, settings.metrics_compat)
        self.balance = balance
        if balance is not None:
            self.registry.register(BalanceCollector(balance, settings.model_name))
            if settings.metrics_compat == "sglang":
                self.registry.register(BalancednessCollector(balance, settings.model_name))
        self.draining = False
        self.failure: str | None = None  # traceback of the rank that failed first
        self.dead = asyncio.Event()
        self.max_seq_len = settings.max_seq_len
        self.membership = Membership(list(range(settings.num_ranks))) if settings.survive_rank_loss else None
        self._link = link
        self._sequences: dict[str, RunningSequence] = {}
        self._generations: set[Generation] = set()
        self._queued_tokens = 0
        self._queued = 0
        self._ids = itertools.count()
        self._outbox: deque[tuple[int, ToRank]] = deque()
        self._outbox_filled = asyncio.Event()
        self._ready: set[int] = set()
        self._last_heard: dict[int, float] = {}
        self._stats: dict[int, EngineStats] = {}  # by replica

    def submit(
        self, prompts: Sequence[list[int]], params: SamplingParams, *, n: int = 1, stop: Sequence[str] = ()
    ) -> Generation:
        """Starts n sequences of each prompt; sequence index = prompt index * n + choice, seed + choice.

        Raises ApiError 429 when the queue is full, 503 while draining or after the engine's death.
        """
        self.check_admission(len(prompts) * n, sum(map(len, prompts)) * n)
        generation = Generation(self, len(prompts) * n, time.monotonic())
        used: set[int] = set()
        for index, (prompt, choice) in enumerate(itertools.product(prompts, range(n))):
            own = msgspec.structs.replace(params, seed=(params.seed + choice) & MAX_SEED)
            replica, weight = self.loads.add(len(prompt), params.max_tokens)
            used.add(replica)
            name = f"{next(self._ids)}"
            sequence = RunningSequence(
                name, generation, index, replica, weight, prompt, own, stop, self.tokenizer
            )
            self._sequences[name] = sequence
            generation.sequences.append(sequence)
            self._post(replica, AddRequest(name, prompt, own))
            self._queued += 1
            self._queued_tokens += len(prompt)
        for replica in self.loads.serving:
            if replica not in used:
                self._post(replica, Wake())
        self._generations.add(generation)
        if self.settings.request_timeout is not None:
            generation.set_deadline(self.settings.request_timeout)
        return generation

    def check_admission(self, sequences: int = 1, tokens: int = 0) -> None:
        """Raises ApiError when that much new work would not be taken now."""
        self.check_serving()
        settings = self.settings
        places = settings.max_batch_size * len(self.loads.serving)
        free = max(0, places - (len(self._sequences) - self._queued))
        if self._queued + sequences > settings.max_queued_requests + free:
            raise too_busy(
                f"{self._queued} sequences wait already, at most {settings.max_queued_requests} may; "
                "try again later"
            )
        limit = settings.max_queued_tokens
        if limit is not None and self._queued and self._queued_tokens + tokens > limit:
            raise too_busy(
                f"{self._queued_tokens} prompt tokens wait already, at most {limit} may; try again later"
            )

    def check_serving(self) -> None:
        """Raises ApiError 503 unless the engine is up and to stay."""
        if self.dead.is_set():
            raise engine_dead()
        if self.draining:
            raise unavailable("the server is shutting down and takes no new requests", "server_draining")
        if not self.all_ready:
            raise unavailable("the server is still loading the model", "server_loading")

    def cancel(self, generation: Generation) -> None:
        """Drops what still runs of the request and tells its ranks; used when the client has gone."""
        self._drop(generation, "abort")
        self._close(generation)

    def expire(self, generation: Generation) -> None:
        self._fail(generation, timed_out(self.settings.request_timeout or 0.0))

    def end_all(self) -> None:
        """Ends every request with an error: the time for draining is over."""
        for generation in list(self._generations):
            self._fail(generation, unavailable("the server is shutting down", "server_draining"))

    @property
    def placement_generation(self) -> int:
        return 0 if self.balance is None else self.balance.placement.generation

    @property
    def in_flight(self) -> int:
        """Requests that are not answered yet."""
        return len(self._generations)

    @property
    def all_ready(self) -> bool:
        return len(self._ready) >= self.settings.num_ranks

    def heartbeat_ages(self) -> dict[int, float]:
        """Seconds since each rank was heard."""
        now = time.monotonic()
        return {rank: now - heard for rank, heard in sorted(self._last_heard.items())}

    def replica_stats(self) -> list[EngineStats]:
        """The last word of each replica that has spoken."""
        return [stats for _, stats in sorted(self._stats.items())]

    def readiness(self) -> tuple[bool, str, str]:
        """(ready, phase, why not)."""
        if self.dead.is_set():
            return False, "dead", "a rank has failed"
        if not self.all_ready:
            return False, "loading", f"{len(self._ready)} of {self.settings.num_ranks} ranks are ready"
        if self.draining:
            return False, "draining", "the server is shutting down"
        limit = self.settings.heartbeat_timeout
        silent = [rank for rank, age in self.heartbeat_ages().items() if age > limit]
        if silent:
            return False, "degraded", f"no word for more than {limit:g} s from ranks {silent}"
        if self.membership is not None and self.membership.lost:
            # 200 all the same: what is left serves, and a load balancer that took it out would lose that too
            members = self.membership
            total = len(members.ranks) + len(members.lost)
            return True, "degraded", f"lost ranks {members.lost}: {len(members.ranks)} of {total} serve"
        return True, "ready", ""

    async def run(self) -> None:
        """Carries messages both ways until the engine is dead or this is cancelled."""
        sender = asyncio.create_task(self._send_all(), name="frontend-sender")
        balancing = asyncio.create_task(self._carry_orders(), name="frontend-balancing")
        try:
            while not self.dead.is_set():
                replica, message = await self._link.receive()
                self.handle(replica, message)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.exception("the link to the ranks broke")
            self.die(f"the link to the ranks broke: {error!r}")
        finally:
            sender.cancel()
            balancing.cancel()

    def handle(self, replica: int, message: FromRank) -> None:
        """One message of a rank of that replica."""
        now = time.monotonic()
        if self.membership is not None and replica in self.membership.lost:
            return  # its last words: what it worked on is with others or has ended
        if isinstance(message, StepDone):
            self._last_heard[message.rank] = now
            for output in message.outputs:
                sequence = self._sequences.get(output.request_id)
                if sequence is not None:
                    self._advance(sequence, output, now)
            self._note_stats(replica, message.stats)
        elif isinstance(message, RankReady):
            self._last_heard[message.rank] = now
            self._ready.add(message.rank)
            self.max_seq_len = min(self.max_seq_len, message.max_seq_len)
            if self.balance is not None and message.placement_generation is not None:
                self.balance.generations[message.rank] = message.placement_generation
        elif isinstance(message, ExpertCounts):
            if self.balance is not None:
                self.balance.add(message)
        elif isinstance(message, (LayersSwitched, Migrated)):
            if self.balance is not None and self.balance.online is not None:
                self.balance.online.handle(message)
        elif isinstance(message, RankLeft):
            if self.membership is not None:
                self.membership.leave(message.rank)
                self._let_meet()
        elif isinstance(message, Rejoined):
            self._last_heard[message.rank] = now
            self._follow_survivors(message)
        elif isinstance(message, RankFailed):
            why_not = self._cannot_spare(message)
            if why_not is None:
                self._lose(message)
                return
            if why_not:
                log.error("cannot go on without rank %d: %s", message.rank, why_not)
            self.die(message.traceback)

    def _cannot_spare(self, failure: RankFailed) -> str | None:
        """Why the engine ends with this rank; "" where nobody wanted otherwise, None when the others can go on."""
        members, balance = self.membership, self.balance
        if members is None or balance is None:
            return ""
        if failure.mistake or not self.all_ready:
            return "not all ranks had started"
        if len(members.ranks) == 1:
            return "it was the last one"
        return balance.missing_without([*members.lost[len(balance.lost) :], failure.rank]) or None

    def _lose(self, failure: RankFailed) -> None:
        """A rank is gone and the others go on. Requests that it had begun end with an error; those that only waited
        there begin elsewhere."""
        assert self.membership is not None
        rank = failure.rank
        log.error("going on without rank %d: %s", rank, failure.traceback)
        self._link.lose(rank)
        self.membership.lose(rank)
        self.loads.lose(rank)
        self._last_heard.pop(rank, None)
        if rank in self._stats:  # its counters stay, so that totals never go back
            self._stats[rank] = msgspec.structs.replace(
                self._stats[rank], running=0, waiting=0, pages_used=0, pages_total=0
            )
        orphans = [sequence for sequence in self._sequences.values() if sequence.replica == rank]
        for generation in dict.fromkeys(sequence.generation for sequence in orphans if sequence.first_output):
            self._fail(generation, rank_lost())
        for sequence in orphans:
            if sequence.running:
                self.loads.remove(rank, sequence.weight)
                prompt, params = sequence.prompt, sequence.params
                sequence.replica, sequence.weight = self.loads.add(len(prompt), params.max_tokens)
                self._post(sequence.replica, AddRequest(sequence.name, prompt, params))
        self._let_meet()

    def _let_meet(self) -> None:
        """Ask the ranks that are left to meet, once all of them wait for it."""
        members = self.membership
        if members is not None and members.may_meet():
            address, port = self._link.meeting_place()
            order = Rejoin(members.number, list(members.ranks), list(members.lost), address, port)
            for rank in members.ranks:
                self._post(rank, order)

    def _follow_survivors(self, message: Rejoined) -> None:
        """The first to have met the others says which placement is in force."""
        members, balance = self.membership, self.balance
        assert members is not None and balance is not None
        slots, share = np.array(message.slot_to_expert), np.array(message.share)
        placement = Placement(slots, balance.placement.num_experts, message.generation, share)
        left = placement.num_slots // balance.topology.slots_per_rank
        lost = members.lost[len(balance.lost) : len(members.lost) + len(members.ranks) - left]
        if lost:
            balance.regroup(placement, lost)
        balance.generations[message.rank] = message.generation
        if message.digest != placement.digest or placement.digest != balance.placement.digest:
            self.die(f"rank {message.rank} went on with placement {message.digest}, not as the others")

    def die(self, reason: str) -> None:
        """The engine is gone: every request ends with an error, new ones are refused."""
        if self.dead.is_set():
            return
        self.failure = reason
        self.dead.set()
        for generation in list(self._generations):
            self._fail(generation, engine_dead(500), tell=False)

    def _advance(self, sequence: RunningSequence, output: SequenceOutput, now: float) -> None:
        metrics = self.metrics
        if output.finish_reason == "error":
            message = output.error or "the engine could not run this request"
            self._fail(sequence.generation, ApiError(400, message, code="request_not_runnable"))
            return
        if output.finish_reason == "fault":
            self._fail(
                sequence.generation, ApiError(500, output.error or "the model failed", code="model_fault")
            )
            return
        tokens = len(output.token_ids)
        if sequence.first_output == 0.0:
            sequence.first_output = now
            self._queued -= 1
            self._queued_tokens -= len(sequence.prompt)
            metrics.prompt_tokens += len(sequence.prompt)
            waited = now - sequence.generation.arrival
            metrics.first_token.observe(waited)
            metrics.queue.observe(output.queue_seconds)
            metrics.prefill.observe(max(0.0, waited - output.queue_seconds))
        elif tokens:
            metrics.between_tokens.observe((now - sequence.last_output) / tokens)
        sequence.last_output = now
        metrics.generation_tokens += tokens
        delta = sequence.take(output)
        if delta.finish_reason is not None:
            if output.finish_reason is None:  # a stop string: the rank does not know yet
                self._post(sequence.replica, AbortRequest(sequence.name))
            self._forget(sequence, delta.finish_reason)
        generation = sequence.generation
        generation.deliver(delta)
        if not generation.num_running:
            self._close(generation)

    def _forget(self, sequence: RunningSequence, reason: str) -> None:
        sequence.running = False
        sequence.generation.num_running -= 1
        del self._sequences[sequence.name]
        self.loads.remove(sequence.replica, sequence.weight)
        metrics = self.metrics
        metrics.finished[reason] += 1
        if sequence.first_output == 0.0:
            self._queued -= 1
            self._queued_tokens -= len(sequence.prompt)
            return
        metrics.prompt_length.observe(len(sequence.prompt))
        metrics.output_length.observe(sequence.num_generated)
        metrics.max_output_length.observe(sequence.params.max_tokens)
        metrics.decode.observe(sequence.last_output - sequence.first_output)
        metrics.end_to_end.observe(sequence.last_output - sequence.generation.arrival)

    def _fail(self, generation: Generation, error: ApiError, *, tell: bool = True) -> None:
        self._drop(generation, "error", tell=tell)
        generation.error = error
        self._close(generation)

    def _drop(self, generation: Generation, reason: str, *, tell: bool = True) -> None:
        for sequence in generation.sequences:
            if sequence.running:
                if tell:
                    self._post(sequence.replica, AbortRequest(sequence.name))
                self._forget(sequence, reason)

    def _close(self, generation: Generation) -> None:
        self._generations.discard(generation)
        generation.close()

    def _post(self, replica: int, message: ToRank) -> None:
        """To a replica that was lost, nothing."""
        if replica not in self.loads.serving:
            return
        self._outbox.append((replica, message))
        self._outbox_filled.set()

    async def _send_all(self) -> None:
        """The one place that sends, so that messages to a rank keep their order."""
        while True:
            await self._outbox_filled.wait()
            self._outbox_filled.clear()
            while self._outbox:
                replica, message = self._outbox.popleft()
                try:
                    await self._link.send(replica, message)
                except Exception as error:
                    log.exception("sending to replica %d failed", replica)
                    self.die(f"sending to replica {replica} failed: {error!r}")
                    return

    async def _carry_orders(self) -> None:
        """Lets the online balancer know the time and sends what it orders to every replica."""
        balance, members = self.balance, self.membership
        online = None if balance is None else balance.online
        while balance is not None and online is not None:
            online.tick()
            # between a loss and the meeting only some would hear of an order, and those wait for the others
            if members is None or len(members.lost) == len(balance.lost):
                for order in online.take_orders():
                    for replica in range(self._link.num_replicas):
                        self._post(replica, order)
            await asyncio.sleep(BALANCE_TICK_SECONDS)

    def _note_stats(self, replica: int, stats: EngineStats) -> None:
        before = self._stats.get(replica)
        if before is not None and stats.step < before.step:
            return  # a heartbeat of another rank of the replica, overtaken: counters never go back
        self._stats[replica] = stats
        if before is not None and stats.step > before.step:
            made = stats.prompt_tokens + stats.generated_tokens
            self.metrics.step_tokens.observe(made - before.prompt_tokens - before.generated_tokens)

    def _gauges(self) -> dict[str, float]:
        stats = self._stats.values()
        total = len(self._sequences)
        running = min(total, sum(s.running for s in stats))
        pages = sum(s.pages_total for s in stats)
        prompt_tokens = sum(s.prompt_tokens for s in stats)
        cached = sum(s.cached_tokens for s in stats)
        return {
            "running": running,
            "waiting": total - running,
            "kv_usage": sum(s.pages_used for s in stats) / pages if pages else 0.0,
            "preemptions": sum(s.preemptions for s in stats),
            "cached_tokens": cached,
            "hit_ratio": cached / prompt_tokens if prompt_tokens else 0.0,
        }


def random_seed() -> int:
    """A seed for a request that names none."""
    return secrets.randbits(62)
