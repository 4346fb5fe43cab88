"""What the CPU engine does to memory, as five operations, and their plain forms on torch's views. Knows no step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moeserve.comm.all_to_all.one_sided.layout import ROW_BITS, EpLayout, Region, mail_word
from moeserve.comm.symm import SymmHeap

POLLS_BEFORE_SLEEP = 50


@dataclass(frozen=True)
class Counts:
    """Choices that arrive at a rank, all int64.

    each: [R, S] by source and slot. per_slot: [S]. first: [R, S], where those of each source and slot begin when
    ordered by slot, then source. total: of all.
    """

    each: Tensor
    per_slot: Tensor
    first: Tensor
    total: int

    @staticmethod
    def of(each: Tensor) -> Counts:
        by_slot = each.t().reshape(-1)
        first = (by_slot.cumsum(0) - by_slot).view(each.shape[1], each.shape[0]).t().contiguous()
        return Counts(each, each.sum(0), first, int(by_slot.sum()))


class Loops(Protocol):
    """On the blocks of one heap under one layout, for its rank. Ranks' flags are uint8 [R], counts int64 [R]."""

    def put(
        self,
        epoch: int,
        x: Tensor,
        scales: Tensor | None,
        slots: Tensor,
        alive: Tensor,
        first: int,
        version: int,
    ) -> Tensor:
        """Each token's row, once, to every rank alive that holds one of its slots; then the words of `epoch`.

        x [T, ...], scales [T, ...], slots int64 [T, K], all contiguous. first: number of token 0 in the records.
        -> rows put to each rank.
        """
        ...

    def wait(
        self, words: str, epoch: int, pending: Tensor, low: Tensor, seconds: float, pause: float, spin: bool
    ) -> int:
        """Waits for the word of every rank with pending set, "mail" or "done", to show epoch, and clears it.

        low: gets the rows of mail words. -> how many are pending after `seconds`; -1 if one shows a later epoch.
        """
        ...

    def count(self, epoch: int, rows: Tensor) -> Counts:
        """What arrived in `epoch`; zeros for sources without rows."""
        ...

    def take(
        self, rows: Tensor, version: int, following: Tensor, x: Tensor, scales: Tensor | None, origin: Tensor
    ) -> int:
        """Copies the rows that arrived to x [N, ...] and scales, where following int64 [R, S] says; moves it on.

        origin int64 [N, 2]: gets source rank and cell, token * K + choice. -> records of another table version.
        """
        ...

    def push(self, epoch: int, y: Tensor, origin: Tensor, low: int, high: int, tell: Tensor) -> None:
        """Results y [N, ...] of cells low <= cell < high into z cell - low of their sources; then `done` words."""
        ...

    def sum(self, first: int, slots: Tensor, weights: Tensor, alive: Tensor, out: Tensor) -> None:
        """out [T, H] = sum over k, in order, of weight * z cell in float32, of choices with slots of ranks alive."""
        ...


class PlainLoops:
    """In torch. Relies on stores being seen in the order they were made, as x86 promises."""

    def __init__(self, heap: SymmHeap, layout: EpLayout) -> None:
        config = layout.config
        self._rank, self._each, self._top_k = heap.rank, config.slots_per_rank, config.top_k
        blocks = [heap.block(rank) for rank in range(heap.world)]

        def views(region: Region) -> list[Tensor]:
            return [region.view(block) for block in blocks]

        self._words = {"mail": views(layout.mail), "done": views(layout.done)}
        self._counts = views(layout.slot_cnt)
        self._tokens, self._versions = views(layout.meta_token), views(layout.meta_version)
        self._slots = views(layout.meta_slots)
        self._x = views(layout.x_values)
        self._scales = None if layout.x_scales is None else views(layout.x_scales)
        assert layout.z is not None
        self._z = [view.flatten(0, 1) for view in views(layout.z)]

    def put(
        self,
        epoch: int,
        x: Tensor,
        scales: Tensor | None,
        slots: Tensor,
        alive: Tensor,
        first: int,
        version: int,
    ) -> Tensor:
        me, each = self._rank, self._each
        targets = slots.div(each, rounding_mode="floor")
        assert not len(slots) or int(targets.max()) < len(alive), f"slots up to {int(slots.max())}"
        sent = torch.zeros(len(alive), dtype=torch.int64)
        for rank in alive.nonzero()[:, 0].tolist():
            hit = targets == rank
            tokens = hit.any(1).nonzero()[:, 0]
            count = len(tokens)
            sent[rank] = count
            self._x[rank][me, :count] = x[tokens]
            if scales is not None and self._scales is not None:
                self._scales[rank][me, :count] = scales[tokens]
            self._tokens[rank][me, :count] = (tokens + first).to(torch.int32)
            self._versions[rank][me, :count] = version
            local = torch.where(hit, slots - rank * each, -1)
            self._slots[rank][me, :count] = local[tokens].to(torch.int16)
            self._counts[rank][epoch & 1, me] = torch.bincount(local[hit], minlength=each).to(torch.int32)
        for rank in alive.nonzero()[:, 0].tolist():
            self._words["mail"][rank][epoch & 1, me] = mail_word(epoch, int(sent[rank]))
        return sent

    def wait(
        self, words: str, epoch: int, pending: Tensor, low: Tensor, seconds: float, pause: float, spin: bool
    ) -> int:
        mine = self._words[words][self._rank]
        bits = ROW_BITS if words == "mail" else 0
        cells = mine[epoch & 1] if words == "mail" else mine
        deadline = time.monotonic() + seconds
        polls = 0 if spin else POLLS_BEFORE_SLEEP
        while True:
            seen = cells.clone()
            epochs = seen >> bits
            wanted = pending.bool()
            if bool((wanted & (epochs > epoch)).any()):
                return -1
            there = wanted & (epochs == epoch)
            low[there] = seen[there] & ((1 << bits) - 1)
            pending[there] = 0
            left = int(pending.sum())
            if not left or time.monotonic() >= deadline:
                return left
            polls += 1
            if polls > POLLS_BEFORE_SLEEP:
                time.sleep(pause)

    def count(self, epoch: int, rows: Tensor) -> Counts:
        counts = self._counts[self._rank][epoch & 1].to(torch.int64)
        return Counts.of(counts.masked_fill((rows == 0)[:, None], 0))

    def take(
        self, rows: Tensor, version: int, following: Tensor, x: Tensor, scales: Tensor | None, origin: Tensor
    ) -> int:
        me, others = self._rank, 0
        for source, count in enumerate(rows.tolist()):
            local = self._slots[me][source, :count].to(torch.int64)  # [count, K]
            others += int((self._versions[me][source, :count] != version).sum())
            flat = local.flatten()
            order = flat.argsort(stable=True)[int((flat < 0).sum()) :]  # choices by slot, token, choice
            found = torch.bincount(flat[order], minlength=self._each)
            starts = following[source] - (found.cumsum(0) - found)
            at = starts[flat[order]] + torch.arange(len(order))
            row = order.div(self._top_k, rounding_mode="floor")
            x[at] = self._x[me][source][row]
            if scales is not None and self._scales is not None:
                scales[at] = self._scales[me][source][row]
            origin[at, 0] = source
            origin[at, 1] = (
                self._tokens[me][source, :count].to(torch.int64)[row] * self._top_k + order % self._top_k
            )
            following[source] += found
        return others

    def push(self, epoch: int, y: Tensor, origin: Tensor, low: int, high: int, tell: Tensor) -> None:
        source, cell = origin.unbind(1)
        wanted = (cell >= low) & (cell < high)
        for rank, z in enumerate(self._z):
            at = (wanted & (source == rank)).nonzero()[:, 0]
            z[cell[at] - low] = y[at]
        for rank in tell.nonzero()[:, 0].tolist():
            self._words["done"][rank][self._rank] = epoch

    def sum(self, first: int, slots: Tensor, weights: Tensor, alive: Tensor, out: Tensor) -> None:
        tokens, top_k = slots.shape
        cells = self._z[self._rank][first * top_k : (first + tokens) * top_k].view(
            tokens, top_k, out.shape[1]
        )
        counts = (slots >= 0) & alive.bool()[slots.div(self._each, rounding_mode="floor")]
        total = torch.zeros(out.shape)
        for k in range(top_k):
            product = weights[:, k, None] * cells[:, k].to(torch.float32)
            total = torch.where(counts[:, k, None], total + product, total)
        out.copy_(total)
