"""Dispatch by uneven all-to-all: counts first, then each chosen row to the one rank that wants it.

Knows no sizes in advance and sends no row where it is not used, so it suits many ranks and long prompts; a
step of a few tokens pays for the additional exchange of counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.comm.all_to_all.protocol import Dispatched, Done
from moeserve.comm.all_to_all.rows import choices_of_rows, order_by_slot, weighted_sum
from moeserve.comm.group import Group


@dataclass(frozen=True)
class _Sent:
    order: Tensor  # [rows sent] flat numbers of our choices, by rank, slot, token, choice
    send: list[int]  # rows we sent to each rank
    receive: list[int]  # rows we had from each rank
    arrival: Tensor  # [N] number, by arrival (source rank first), of each dispatched row (slot first)
    weights: Tensor  # [T, K]
    skipped: Tensor | None  # [T, K] choices without a slot


class ExchangeDispatcher:
    """Every choice's row travels by itself, in dispatch and in combine: 2 * T * K rows a rank at most.

    A token with several choices on one rank travels once for each: their results must come back one by one
    anyway, for the sum in top-k order to be exact, so sending it once would save less than half of the bytes
    and cost an index list. One host sync in dispatch (the sizes), none in combine.
    """

    def __init__(self, group: Group, slots_per_rank: int) -> None:
        self._group = group
        self._slots_per_rank = slots_per_rank
        self._counts_each = [slots_per_rank] * group.size

    def begin_step(self, rows_per_rank: Sequence[int]) -> None:
        """Nothing to know: the counts are exchanged."""

    def dispatch(self, x: Tensor, slots: Tensor, weights: Tensor) -> Done:
        group, each = self._group, self._slots_per_rank
        order, bounds = order_by_slot(slots, 0, group.size * each)
        counts = bounds.diff()
        received = group.all_to_all(counts, self._counts_each, self._counts_each).view(group.size, each)
        sizes = torch.stack((counts.view(group.size, each).sum(1), received.sum(1))).tolist()
        send, receive = sizes
        num_skipped = slots.numel() - sum(send)
        order = order[num_skipped:]
        rows = x.index_select(0, order.div(slots.shape[1], rounding_mode="floor"))
        rows = group.all_to_all(rows, send, receive)
        arrival = _by_slot(received, rows.shape[0])
        skipped = slots < 0 if num_skipped else None
        sent = _Sent(order, send, receive, arrival, weights, skipped)
        return Done(Dispatched(rows.index_select(0, arrival), received.sum(0), sent))

    def combine(self, y: Tensor, dispatched: Dispatched) -> Done:
        sent: _Sent = dispatched.handle
        back = torch.empty_like(y).index_copy_(0, sent.arrival, y)
        rows = self._group.all_to_all(back, sent.receive, sent.send)
        choices = choices_of_rows(rows, sent.order, sent.weights.numel())
        return Done(weighted_sum(choices, sent.weights, sent.skipped))


def _by_slot(received: Tensor, num_rows: int) -> Tensor:
    """received [R, S] rows by source and slot, arrived in that order -> the order by slot and source."""
    sources, num_slots = received.shape
    slots = torch.arange(num_slots, device=received.device).repeat(sources)
    slot_of_row = slots.repeat_interleave(received.view(-1), output_size=num_rows)
    return slot_of_row.argsort(stable=True)
