"""The course of a migration as all its ranks agree on it: what is ordered, whose turn it is, how much goes at once.

Pure: no clock, no message and no weights. Each rank keeps its own copy and hears the same words.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from statistics import median
from typing import Literal

from moeserve.eplb.types import Placement, Topology
from moeserve.messages import LayerOrder, Migrate

MOST_SKIPPED = 3
"""Layers that may fail before the rest of an order is given up."""


def ordered_placement(order: Migrate, current: Placement, topology: Topology) -> Placement:
    """What the order leads to. Raises ValueError when it does not start from `current` or does not lead there."""
    if (order.old_generation, order.old_digest) != (current.generation, current.digest):
        raise ValueError(
            f"it starts from generation {order.old_generation} ({order.old_digest:.12}), in force is generation "
            f"{current.generation} ({current.digest:.12})"
        )
    if not order.layers or order.layers_per_step < 1:
        raise ValueError(
            f"it has {len(order.layers)} layers, {order.layers_per_step} at a time; 1 or more of both"
        )
    if order.bytes_per_second is not None and not order.bytes_per_second >= 1000:
        raise ValueError(f"bytes_per_second = {order.bytes_per_second}: 1000 or more")
    slots, shares = current.slot_to_expert.copy(), current.share.copy()
    for layer in order.layers:
        if not 0 <= layer.layer < current.num_layers:
            raise ValueError(f"layer {layer.layer}: the model has 0 to {current.num_layers - 1} with experts")
        if len(layer.slot_to_expert) != current.num_slots or len(layer.share) != current.num_slots:
            raise ValueError(
                f"layer {layer.layer}: {len(layer.slot_to_expert)} slots and {len(layer.share)} shares, expected "
                f"{current.num_slots} each"
            )
        _check_moves(layer, current.slot_to_expert[layer.layer].tolist())
        slots[layer.layer], shares[layer.layer] = layer.slot_to_expert, layer.share
    if len({layer.layer for layer in order.layers}) < len(order.layers):
        raise ValueError("a layer is named twice")
    placement = Placement(slots, current.num_experts, order.generation, shares)
    placement.check(topology)
    if placement.digest != order.digest:
        raise ValueError(f"it leads to {placement.digest:.12}, not to {order.digest:.12} as it says")
    return placement


def _check_moves(layer: LayerOrder, before: list[int]) -> None:
    """Raise ValueError unless the moves, and nothing else, turn the slots `before` into the layer's."""
    moved = list(before)
    for source, target in layer.moves:
        if not (0 <= source < len(before) and 0 <= target < len(before)):
            raise ValueError(
                f"layer {layer.layer}: no move from slot {source} to {target} in {len(before)} slots"
            )
        moved[target] = before[source]
    if len({target for _, target in layer.moves}) < len(layer.moves):
        raise ValueError(f"layer {layer.layer}: two moves into one slot")
    if moved != layer.slot_to_expert:
        wrong = next(slot for slot, expert in enumerate(layer.slot_to_expert) if moved[slot] != expert)
        raise ValueError(
            f"layer {layer.layer}: slot {wrong} would hold expert {moved[wrong]}, not {layer.slot_to_expert[wrong]}"
        )


class State(IntEnum):
    """Of a rank in the round that is under way."""

    UNDER_WAY = 0
    READY = 1  # everything that this rank receives is staged and verified
    FAILED = 2
    REFUSED = 3  # the order does not fit this rank


@dataclass(frozen=True)
class Word:
    """What each rank tells all others now and then while a migration runs.

    result: of (generation, digest) that would be in force after the round. max_bytes: that it would send and
    receive in a step until the next word.
    """

    order: int
    state: State
    result: int
    max_bytes: int


def fingerprint(placement: Placement) -> int:
    """63 bits of a placement's generation and digest."""
    return (int(placement.digest[:16], 16) ^ placement.generation * 0x9E3779B97F4A7C15) & (1 << 63) - 1


Turn = Literal["wait", "switch", "abandon", "end"]


@dataclass
class Rounds:
    """Layers in the order in which they change: rounds of layers that are switched in the same step.

    done and skipped: layers that follow the order, and layers that could not. why: the end came early.
    """

    waiting: deque[tuple[int, ...]]
    done: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    why: str = ""

    @classmethod
    def of(cls, order: Migrate) -> Rounds:
        """Routes first: all layers whose shares alone change, then layers_per_step at a time as they are named."""
        shares = tuple(layer.layer for layer in order.layers if not layer.moves)
        moved = [layer.layer for layer in order.layers if layer.moves]
        width = max(1, order.layers_per_step)
        groups = [tuple(moved[i : i + width]) for i in range(0, len(moved), width)]
        return cls(deque([shares, *groups] if shares else groups))

    @property
    def current(self) -> tuple[int, ...]:
        """The layers of this round; none when all is over."""
        return self.waiting[0] if self.waiting and not self.why else ()

    def hear(self, words: Sequence[Word]) -> Turn:
        """What all ranks do now, given what each has said in this step.

        switch: this round's layers are in force from now on. abandon: none of them is; those of a round of several
        are tried again one by one, so that only the one at fault is left out. end: abandon, and no further round.
        """
        states = [word.state for word in words]
        layers = self.current
        if State.REFUSED in states:
            return self._end(f"refused by {_ranks(states, State.REFUSED)}")
        if State.FAILED in states:
            self.waiting.popleft()
            if len(layers) > 1:
                self.waiting.extendleft((layer,) for layer in reversed(layers))
                return "abandon"
            self.skipped += layers
            if len(self.skipped) >= MOST_SKIPPED and self.waiting:
                return self._end(f"given up after {len(self.skipped)} failed layers")
            return "abandon"
        if any(state != State.READY for state in states):
            return "wait"
        if len({word.result for word in words}) > 1:
            return self._end(
                f"the ranks would not agree on the placement after layers {list(layers)}: "
                + ", ".join(f"rank {rank} {word.result:016x}" for rank, word in enumerate(words))
            )
        self.waiting.popleft()
        self.done += layers
        return "switch"

    def _end(self, why: str) -> Turn:
        self.why = why
        return "end"


def _ranks(states: Sequence[State], state: State) -> str:
    return "ranks " + ", ".join(str(rank) for rank, its in enumerate(states) if its == state)


STEP_PART = 0.03
"""Of a steady step's time that a transfer may take."""
LEAST_BYTES = 32 << 10
"""A step less than this is not worth the message."""
IDLE_BYTES = 4 << 20
"""For a step without tokens, which nobody waits for; a request that comes meanwhile waits for it to end."""
LINK_BYTES_PER_SECOND = 25e9
"""What a step is charged for where the host cannot see how long the device takes; below any rank's own link."""


class Pace:
    """How many bytes a rank would move in the next step.

    With a given rate: what has come due since it last moved. Without: the transfer may take STEP_PART of a steady
    step; the bytes follow from how long the last ones took, by a factor of two a step at most.
    """

    def __init__(self) -> None:
        self._steps: deque[float] = deque(maxlen=32)
        self._bytes = LEAST_BYTES
        self._due_since = 0.0

    def saw_step(self, seconds: float) -> None:
        """A step with work, without what a migration added to it."""
        self._steps.append(seconds)

    def saw_transfer(self, num_bytes: int, seconds: float) -> None:
        """What was allowed for a busy step, and how long it took."""
        if self._steps and seconds > 0:
            factor = min(2.0, max(0.5, STEP_PART * median(self._steps) / seconds))
            self._bytes = int(num_bytes * factor)

    def max_bytes(self, rate: float | None, now: float) -> int:
        """Of a busy step; with a rate (bytes a second) of the next transfer altogether, 0 while less is due."""
        if rate is not None:
            due = int(min(now - self._due_since, 1.0) * rate)
            return due if due >= min(LEAST_BYTES, int(rate / 2)) else 0
        if not self._steps:
            return LEAST_BYTES
        most = STEP_PART * median(self._steps) * LINK_BYTES_PER_SECOND
        return int(max(LEAST_BYTES, min(self._bytes, most)))

    def spent(self, now: float) -> None:
        """All that was due."""
        self._due_since = now
