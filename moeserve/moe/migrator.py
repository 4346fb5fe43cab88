"""Brings the experts of a serving rank to another placement, a little in each step, together with the other ranks.

Knows neither why nor when: an order comes as a message, and what came of it goes back as one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple

from torch import Tensor

from moeserve.comm.mesh import Mesh
from moeserve.comm.weight_mover import TransferError, WeightMover
from moeserve.messages import FromRank, LayersSwitched, Migrate, Migrated
from moeserve.moe.expert_map import ExpertMap
from moeserve.moe.migration import (
    Pace,
    Rounds,
    State,
    Word,
    fingerprint,
    ordered_placement,
    placement_after,
)
from moeserve.ops.spread import SplitTable

log = logging.getLogger(__name__)
ROUND_SECONDS = 30.0
"""A round may take so long beyond the time that its bytes need at the ordered rate."""
VIEW_SECONDS = 0.5e-3
"""A busy step goes on making the tables of further layers for so long; one takes 0.1 to 0.3 ms."""

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
        self._failures: list[str] = []
        self._began = time.perf_counter()
        self._stall = 0.0
        pace.begin(self._began)
        try:
            self._new = ordered_placement(order, expert_map.placement, expert_map.topology)
        except ValueError as error:
            self._new = self._after = expert_map.placement
            self._fail(str(error), State.REFUSED)
        else:
            self._begin_round(self._began)

    def step(self, idle: bool, entered: float) -> list[FromRank]:
        wanted = self._pace.max_bytes(self.order.bytes_per_second, idle, entered)
        word = Word(self.order.order, self._state, fingerprint(self._after), wanted)
        rows = self._mesh.stage.all_gather_ints(astuple(word))
        words = [Word(row[0], State(row[1]), row[2], row[3]) for row in rows]
        assert {word.order for word in words} == {self.order.order}, words
        said = self._take_turn(words, entered)
        if not self.over:
            self._work(min(word.max_bytes for word in words), idle)
        now = time.perf_counter()
        self._stall += now - entered
        if self.over:
            said.append(self._outcome(now))
        return said

    def abandon(self) -> None:
        for _, mover in self._moving:
            mover.abandon()

    def _take_turn(self, words: Sequence[Word], now: float) -> list[FromRank]:
        """What all ranks have just agreed on: the round's end, one way or the other, and the next one's beginning."""
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
            self._begin_round(now)
        else:
            self.over = True
        return said

    def ready_for(self) -> int:
        return fingerprint(self._after) if self._state == State.READY else 0

    def switch_now(self) -> None:
        for _, mover in self._moving:
            mover.commit()
        self._map.switch(self._after, self._views)

    def _begin_round(self, now: float) -> None:
        layers = self._rounds.current
        self._state = State.UNDER_WAY
        self._after = placement_after(self._map.placement, layers, self._new)
        self._views, self._arrived = {}, set()
        moved = [layer for layer in layers if self._layers[layer].moves]
        self._moving = list(zip(moved, self._movers, strict=False))
        assert len(self._moving) == len(moved), "a round has a mover for each of its layers"
        num_bytes = 0
        for layer, mover in self._moving:
            mover.begin(self._weights[layer], self._layers[layer].moves)
            num_bytes += 2 * len(self._layers[layer].moves) * self._expert_bytes(layer)
        rate = self.order.bytes_per_second
        self._deadline = now + ROUND_SECONDS + (0.0 if rate is None else 2 * num_bytes / rate)

    def _work(self, max_bytes: int, idle: bool) -> None:
        """This rank's part of a step: tables are made, bytes go on their way."""
        begun = time.perf_counter()
        for layer in self._rounds.current:
            if layer not in self._views:
                self._views[layer] = self._map.view(layer, self._new)
                if not idle and time.perf_counter() - begun > VIEW_SECONDS:
                    break
        if max_bytes and self._moving:
            self._transfer(max_bytes, idle)
        if self._state == State.UNDER_WAY:
            if len(self._views) == len(self._rounds.current) and len(self._arrived) == len(self._moving):
                self._state = State.READY
            elif begun > self._deadline:
                self._fail(f"layers {list(self._rounds.current)}: not complete after {ROUND_SECONDS:g} s")

    def _transfer(self, max_bytes: int, idle: bool) -> None:
        begun = time.perf_counter()
        for layer, mover in self._moving:
            try:
                if mover.advance(max(8, max_bytes // len(self._moving))):
                    self._arrived.add(layer)
            except TransferError as error:
                self._fail(f"layer {layer}: {error}")
        now = time.perf_counter()
        self._pace.moved(now)
        if not idle:
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
