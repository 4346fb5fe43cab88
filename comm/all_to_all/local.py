"""The dispatcher of a group of one: rows are put in order of slot and back, nothing travels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from moeserve.comm.all_to_all.protocol import Dispatched, Done
from moeserve.comm.all_to_all.rows import choices_of_rows, order_by_slot, weighted_sum


@dataclass(frozen=True)
class _Sent:
    order: Tensor  # [N] flat numbers of the choices that have a slot, in order of slot
    weights: Tensor  # [T, K]
    skipped: Tensor | None  # [T, K] choices without a slot


class LocalDispatcher:
    """All slots are on this rank. Copies each row once for every choice; combine sums in top-k order."""

    def __init__(self, slots_per_rank: int) -> None:
        self._num_slots = slots_per_rank

    def begin_step(self, rows_per_rank: Sequence[int]) -> None:
        """Nothing to know."""

    def dispatch(self, x: Tensor, slots: Tensor, weights: Tensor) -> Done:
        order, bounds = order_by_slot(slots, 0, self._num_slots)
        num_skipped = int(bounds[0])
        order = order[num_skipped:]
        sent = _Sent(order, weights, slots < 0 if num_skipped else None)
        rows = x.index_select(0, order.div(slots.shape[1], rounding_mode="floor"))
        return Done(Dispatched(rows, bounds.diff(), sent))

    def combine(self, y: Tensor, dispatched: Dispatched) -> Done:
        sent: _Sent = dispatched.handle
        choices = choices_of_rows(y, sent.order, sent.weights.numel())
        return Done(weighted_sum(choices, sent.weights, sent.skipped))
