"""Brings the experts of a serving rank to another placement, a little in each step, together with the other ranks.

Knows neither why nor when: an order comes as a message, and what came of it goes back as one.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor

from moeserve.comm.mesh import Mesh
from moeserve.comm.weight_mover import TransferError, WeightMover
from moeserve.messages import FromRank, LayersSwitched, Migrate, Migrated
from moeserve.moe.expert_map import ExpertMap
from moeserve.moe.migration import (
    IDLE_BYTES,
    Pace,
    Rounds,
    State,
    Word,
    fingerprint,
    ordered_placement,
)
from moeserve.ops.spread import SplitTable

log = logging.getLogger(__name__)
ROUND_SECONDS = 30.0
"""A round may take so long once it was allowed more bytes than a rank could need."""
PREPARE_SECONDS = 0.5e-3
"""A busy step goes on getting tables ready for so long, where ranks may differ in that; one takes 0.1 to 0.3 ms."""
AGREE_EVERY = 4
"""The ranks agree in every so many of busy steps, and in each step that is idle."""

Weights = Sequence[Sequence[Tensor]]
"""Of each MoE layer: the tensors that an expert consists of, each [S, ...]."""


class Migrator:
    """One a rank. While no order runs it costs a step nothing but a look at the clock."""

    def __init__(
        self, mesh: Mesh, expert_map: ExpertMap, weights: Weights, make_mover: Callable[[], WeightMover]
    ):
        """make_mover: a mover over mesh.ep; one is made for each layer that is under way at a time."""
        self._mesh = mesh
        self._map = expert_map
        self._weights = weights
        self._make_mover = make_mover
        self._held: Migrate | None = None
        self._run: _Run | None = None
        self._pace = Pace()
        self._left_at: float | None = None  # when the last step with work went on from here

    @property
    def order(self) -> int:
        """The order that is held or carried out, 0 for none: the ranks must go on stepping then."""
        if self._run is not None:
            return self._run.order.order
        return 0 if self._held is None else self._held.order

    def offer(self, order: Migrate) -> None:
        """It begins in the first step in which all replicas hold it, and none runs."""
        self._held = order

    def step(self, orders: Iterable[int], idle: bool) -> list[FromRank]:
        """Once in each step, by all ranks, before the model runs. orders: that the replicas hold, as agreed for this
        step. idle: no rank has tokens in it."""
        entered = time.perf_counter()
        if self._left_at is not None:
            self._pace.saw_step(entered - self._left_at)
        said: list[FromRank] = []
        if self._run is None and self._held is not None and all(n == self._held.order for n in orders):
            self._run = _Run(self._held, self._mesh, self._map, self._weights, self._make_mover, self._pace)
            self._held = None
        if self._run is not None:
            said = self._run.step(idle, entered)
            if self._run.over:
                self._run = None
        self._left_at = None if idle else time.perf_counter()
        return said

    def ready_for(self) -> int:
        """Fingerprint of the placement that this rank could switch to at once, 0 for none."""
        return 0 if self._run is None else self._run.ready_for()

    def switch_now(self) -> None:
        """As others of the ranks did, before all could agree on it."""
        assert self._run is not None
        self._run.switch_now()

    def abandon(self) -> None:
        """The rank leaves: what is under way is dropped, all ranks alike."""
        if self._run is not None:
            self._run.abandon()
        self._run = self._held = None


class _Run:
    """An order that is carried out."""

    def __init__(
        self,
        order: Migrate,
        mesh: Mesh,
        expert_map: ExpertMap,
        weights: Weights,
        make_mover: Callable[[], WeightMover],
        pace: Pace,
    ):
        self.order = order
        self.over = False
        self._mesh, self._map, self._weights, self._pace = mesh, expert_map, weights, pace
        self._layers = {layer.layer: layer for layer in order.layers}
        self._rounds = Rounds.of(order)
        self._movers = [make_mover() for _ in range(order.layers_per_step)]
        self._moving: list[tuple[int, WeightMover]] = []  # by layer
        self._arrived: set[int] = set()
        self._views: dict[int, Tensor | SplitTable] = {}
        self._steps = self._max_bytes = 0
        self._is_prepared = self._all_prepared = False
        self._failures: list[str] = []
        self._began = time.perf_counter()
        self._stall = 0.0
        pace.spent(self._began)
        self._after = expert_map.placement
        try:
            self._new = ordered_placement(order, expert_map.placement, expert_map.topology)
        except ValueError as error:
            self._fail(str(error), State.REFUSED)
        else:
            self._begin_round()

    def step(self, idle: bool, entered: float) -> list[FromRank]:
        """Of a busy step one thing alone, as each meeting of the ranks costs it: to agree, to get a table ready, or to
        send and receive. All ranks do the same thing."""
        said: list[FromRank] = []
        agree = idle or self._steps % AGREE_EVERY == 0
        self._steps += 1
        if agree:
            said = self._agree(entered)
        if not self.over and (idle or not agree):
            self._work(idle)
        now = time.perf_counter()
        self._stall += now - entered
        if self.over:
            said.append(self._outcome(now))
        return said

    def abandon(self) -> None:
        for _, mover in self._moving:
            mover.abandon()

    def _agree(self, now: float) -> list[FromRank]:
        """Hear what all ranks say; end the round if it is over, one way or the other, and begin the next."""
        wanted = self._pace.max_bytes(self.order.bytes_per_second, now)
        word = Word(self.order.order, self._state, fingerprint(self._after), wanted)
        rows = self._mesh.stage.all_gather_ints([word.order, word.state, word.result, word.max_bytes])
        words = [Word(row[0], State(row[1]), row[2], row[3]) for row in rows]
        assert {word.order for word in words} == {self.order.order}, words
        self._max_bytes = min(word.max_bytes for word in words)
        self._all_prepared = self._is_prepared  # after as many steps on every rank
        layers = self._rounds.current
        turn = self._rounds.hear(words)
        said: list[FromRank] = []
        if turn == "wait":
            return said
        if turn == "switch":
            self.switch_now()
            if self._mesh.world.rank == 0:
                said.append(LayersSwitched(0, self.order.order, list(layers)))
        else:
            self.abandon()
            failed = [rank for rank, word in enumerate(words) if word.state == State.FAILED]
            if failed and self._state != State.FAILED:
                self._failures.append(f"layers {list(layers)}: failed on ranks {failed}")
        if self._rounds.current:
            self._begin_round()
        else:
            self.over = True
        return said

    def ready_for(self) -> int:
        return fingerprint(self._after) if self._state == State.READY else 0

    def switch_now(self) -> None:
        for _, mover in self._moving:
            mover.commit()
        self._map.switch(self._after, self._views)

    def _begin_round(self) -> None:
        layers = self._rounds.current
        moved = [layer for layer in layers if self._layers[layer].moves]
        assert len(moved) <= len(self._movers), "a round has a mover for each of its layers"
        self._state = State.UNDER_WAY
        self._views, self._moving, self._arrived = {}, [], set()
        self._preparations = self._prepare(layers, moved)
        self._is_prepared = self._all_prepared = False
        self._bytes_left = sum(
            2 * len(self._layers[layer].moves) * self._expert_bytes(layer) for layer in moved
        )
        self._deadline = math.inf

    def _prepare(self, layers: Sequence[int], moved: Sequence[int]) -> Iterator[None]:
        """What this rank does by itself before bytes travel, in parts for a step each: as many on every rank."""
        self._after = self._map.placement.with_layers(layers, self._new)
        yield
        for layer in layers:
            self._views[layer] = self._map.view(layer, self._new)
            yield
        for layer, mover in zip(moved, self._movers, strict=False):
            try:
                mover.begin(self._weights[layer], self._layers[layer].moves)
            except TransferError as error:
                mover.abandon()
                self._fail(f"layer {layer}: {error}")
                return
            self._moving.append((layer, mover))

    def _work(self, idle: bool) -> None:
        """This rank's part of a step between two agreements."""
        begun = time.perf_counter()
        transfers = any(self._layers[layer].moves for layer in self._rounds.current)
        for _ in self._preparations:
            # Ranks that exchange bytes must begin in the same step, so there a clock decides nothing.
            if not idle and (transfers or time.perf_counter() - begun > PREPARE_SECONDS):
                return
        self._is_prepared = True
        if transfers and not self._all_prepared:
            return  # one that could not begin must be able to say so before others wait for its bytes
        if transfers:
            self._transfer(idle)
        if self._state == State.UNDER_WAY:
            if len(self._arrived) == len(self._moving):
                self._state = State.READY
            elif begun > self._deadline:
                self._fail(f"layers {list(self._rounds.current)}: not complete after {ROUND_SECONDS:g} s")

    def _transfer(self, idle: bool) -> None:
        rate = self.order.bytes_per_second
        max_bytes = IDLE_BYTES if idle and rate is None else self._max_bytes
        if not max_bytes:
            return
        begun = time.perf_counter()
        for layer, mover in self._moving:
            try:
                if mover.advance(max(8, max_bytes // len(self._moving))):
                    self._arrived.add(layer)
            except TransferError as error:
                if self._state == State.UNDER_WAY:
                    self._fail(f"layer {layer}: {error}")
        now = time.perf_counter()
        self._bytes_left -= max_bytes
        if self._bytes_left <= 0:
            self._deadline = min(self._deadline, now + ROUND_SECONDS)
        if rate is not None:
            self._max_bytes = 0  # what was due is spent; the next agreement sees what has come due since
            self._pace.spent(now)
        elif not idle:
            self._pace.saw_transfer(max_bytes, now - begun)

    def _fail(self, why: str, state: State = State.FAILED) -> None:
        self._state = state
        self._failures.append(why)
        log.warning("migration %d: %s", self.order.order, why)

    def _expert_bytes(self, layer: int) -> int:
        return sum(tensor[0].numel() * tensor.itemsize for tensor in self._weights[layer])

    def _outcome(self, now: float) -> Migrated:
        done = self._rounds.done
        complete = len(done) == len(self.order.layers)
        reasons = [] if complete else [*filter(None, [self._rounds.why]), *self._failures]
        moves, num_bytes = self._moved(done) if self._mesh.world.rank == 0 else (0, 0)
        outcome = Migrated(
            rank=self._mesh.world.rank,
            order=self.order.order,
            result="applied" if complete else "partial" if done else "failed",
            reason="; ".join(reasons),
            layers_done=len(done),
            generation=self._map.generation,
            digest=self._map.digest,
            moves=moves,
            bytes=num_bytes,
            seconds=now - self._began,
            stall_seconds=self._stall,
        )
        if outcome.rank == 0:
            log.info(
                "migration %d %s: generation %d, %d layers, %d moves, %d bytes in %.3f s, steps held up for %.3f s%s",
                *(outcome.order, outcome.result, outcome.generation, outcome.layers_done, moves, num_bytes),
                *(outcome.seconds, outcome.stall_seconds, f": {outcome.reason}" if reasons else ""),
            )
        return outcome

    def _moved(self, layers: Iterable[int]) -> tuple[int, int]:
        """(slots written, bytes that went between ranks) in these layers, over all ranks."""
        width = self._map.topology.slots_per_rank
        moves = num_bytes = 0
        for layer in layers:
            pairs = self._layers[layer].moves
            moves += len(pairs)
            far = {
                (source, target // width) for source, target in pairs if source // width != target // width
            }
            num_bytes += len(far) * self._expert_bytes(layer) * self._mesh.etp.size
        return moves, num_bytes
