"""Dispatch by all-gather: every rank gets every token and its slots in one hop, and keeps what is its own.

Needs the rows of each rank for the step, which saves the exchange of counts: the quickest way for a few
tokens on a few ranks. Each row travels to all ranks, so its bytes grow with the group.
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
    order: Tensor  # [rows to come back] flat numbers of our choices, by rank, token, choice
    send: list[int]  # results we owe each rank
    receive: list[int]  # results each rank owes us
    by_source: Tensor  # [N] dispatched rows in order of source rank, token, choice
    weights: Tensor  # [T, K]
    skipped: Tensor | None  # [T, K] choices without a slot


class GatherDispatcher:
    """Tokens and slots are gathered in one message a pair; results return one row a choice.

    A plain reduce-scatter of each rank's partial sums would add in rank order, and a token's bits would
    change with the rank that holds a replica. Per-choice rows are the cheapest exact way: each choice's
    result crosses the wire once, as in exchange, and both ends know the sizes from the gathered slots. One
    host sync, in dispatch.
    """

    def __init__(self, group: Group, slots_per_rank: int) -> None:
        self._group = group
        self._slots_per_rank = slots_per_rank
        self._rows_per_rank: list[int] | None = None
        self._sources: Tensor | None = (
            None  # [T of all ranks, 1], source * (size + 1) + 1 of each gathered row
        )

    def begin_step(self, rows_per_rank: Sequence[int]) -> None:
        """Says how many rows each rank of the group gives to each dispatch until the next begin_step."""
        assert len(rows_per_rank) == self._group.size, f"{rows_per_rank} for {self._group.size} ranks"
        if self._rows_per_rank != list(rows_per_rank):
            self._rows_per_rank = list(rows_per_rank)
            self._sources = None

    def dispatch(self, x: Tensor, slots: Tensor, weights: Tensor) -> Done:
        group, each = self._group, self._slots_per_rank
        assert self._rows_per_rank is not None, "begin_step comes before the first dispatch"
        rows_per_rank = self._rows_per_rank
        first_row = sum(rows_per_rank[: group.rank])
        assert x.shape[0] == rows_per_rank[group.rank], f"{x.shape[0]} rows, said {rows_per_rank[group.rank]}"
        all_x, all_slots = self._gather(x, slots)
        targets = all_slots.div(each, rounding_mode="floor")  # [T of all ranks, K], -1 for none
        table = self._count_rows(targets)
        send, receive = [row[group.rank + 1] for row in table], table[group.rank][1:]
        before = sum(sum(row[: group.rank + 1]) for row in table)

        order, bounds = order_by_slot(all_slots, group.rank * each, (group.rank + 1) * each)
        order = order[before : before + sum(send)]
        rows = all_x.index_select(0, order.div(slots.shape[1], rounding_mode="floor"))
        num_skipped = table[group.rank][0]
        our_targets = targets[first_row : first_row + x.shape[0]].reshape(-1)
        returning = our_targets.argsort(stable=True)[num_skipped:]
        skipped = slots < 0 if num_skipped else None
        sent = _Sent(returning, send, receive, order.argsort(), weights, skipped)
        return Done(Dispatched(rows, bounds.diff(), sent))

    def combine(self, y: Tensor, dispatched: Dispatched) -> Done:
        sent: _Sent = dispatched.handle
        rows = self._group.all_to_all(y.index_select(0, sent.by_source), sent.send, sent.receive)
        choices = choices_of_rows(rows, sent.order, sent.weights.numel())
        return Done(weighted_sum(choices, sent.weights, sent.skipped))

    def _gather(self, x: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """x and slots of all ranks, as one message of bytes: slots first, rows padded to whole words."""
        tokens, width = x.shape
        head = slots.shape[1] * 4
        length = head + -(-width * x.itemsize // 4) * 4
        message = torch.empty(tokens, length, dtype=torch.uint8, device=x.device)
        message[:, :head].view(torch.int32).copy_(slots)
        message[:, head:].view(x.dtype)[:, :width].copy_(x)
        got = self._group.all_gather(message, self._rows_per_rank)
        return got[:, head:].view(x.dtype)[:, :width], got[:, :head].view(torch.int32).contiguous()

    def _count_rows(self, targets: Tensor) -> list[list[int]]:
        """table[source][1 + target]: choices of a source rank on a target rank; column 0 the skipped ones."""
        assert self._rows_per_rank is not None
        size = self._group.size
        if self._sources is None:
            firsts = torch.arange(size) * (size + 1) + 1
            sources = firsts.repeat_interleave(torch.tensor(self._rows_per_rank))
            self._sources = sources.unsqueeze(1).to(targets.device)
        cells = (self._sources + targets).view(-1)
        counts = torch.zeros(size * (size + 1), dtype=torch.int64, device=targets.device)
        counts.scatter_add_(0, cells, torch.ones_like(cells))
        table: list[list[int]] = counts.view(size, size + 1).tolist()
        return table
