"""The token dispatcher over one-sided memory: one put per rank and token, one word to wait for, no exchange of counts.

Windows of bounded size are made on first use; a step with more rows than a window goes through it in parts. Knows
the engine of CPUs; knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.comm.all_to_all.one_sided.cpu_engine import CpuEngine
from moeserve.comm.all_to_all.one_sided.layout import EpConfig, EpLayout, RowFormat
from moeserve.comm.all_to_all.one_sided.loops import Counts
from moeserve.comm.all_to_all.protocol import Dispatched, Done
from moeserve.comm.group import Group
from moeserve.comm.symm import SymmHeap
from moeserve.comm.wire import RankLost

WINDOW_BYTES = 32 << 20
"""Shared memory of a rank's window at most, unless a single row needs more."""
MAX_ROWS = 4096
TIMEOUT_SECONDS = 300.0
PROBE_BYTES = 4096


@dataclass(frozen=True)
class RowSizes:
    """What a dispatch brings: at most max_rows rows of `width` values of dtype a rank, top_k choices each."""

    max_rows: int
    width: int
    top_k: int
    dtype: torch.dtype


def window_config(
    world: int, slots_per_rank: int, sizes: RowSizes, window_bytes: int = WINDOW_BYTES
) -> EpConfig:
    """The window for such rows: all of a step, or as many as fit into window_bytes."""
    form = RowFormat(sizes.width, sizes.dtype)

    def config(rows: int) -> EpConfig:
        return EpConfig(world, rows, sizes.top_k, slots_per_rank, form, form)

    few, many = 1, min(sizes.max_rows, MAX_ROWS)  # the most that fit, of these
    while few < many:
        rows = (few + many + 1) // 2
        few, many = (rows, many) if EpLayout(config(rows)).nbytes <= window_bytes else (few, rows - 1)
    return config(few)


class _Window:
    """Memory for one dispatch and its combine."""

    def __init__(self, group: Group, sizes: RowSizes, config: EpConfig, timeout: float) -> None:
        layout = EpLayout(config)
        heap = SymmHeap.create("shm", group.rank, group.size, layout.nbytes, group)
        self.engine = CpuEngine(heap, layout, timeout, keep_spare=False, on_wait=group.check)
        self.sizes = sizes
        self.rows = config.max_tokens


@dataclass(frozen=True)
class _Sent:
    window: _Window
    slots: Tensor  # [T, K]
    weights: Tensor  # [T, K]
    origin: Tensor  # [N, 2] source rank, and cell, of each dispatched row
    rounds: int


class OneSidedDispatcher:
    """Ranks of one host write into one another's shared memory. A rank that ends or is late is an error here.

    A token travels once to each rank that it has choices on; results come back one row a choice, and are summed in
    top-k order: the bits of every other dispatcher. A dispatch while another has not been combined uses a window
    of its own, so every rank waits for what it started in the same order.

    sizes: makes the first window at once; left out, it is made in the first dispatch.
    Raises HeapUnavailable, on all ranks, where the ranks share no memory.
    """

    def __init__(
        self,
        group: Group,
        slots_per_rank: int,
        sizes: RowSizes | None = None,
        *,
        timeout: float = TIMEOUT_SECONDS,
        window_bytes: int = WINDOW_BYTES,
    ) -> None:
        self._group = group
        self._slots_per_rank = slots_per_rank
        self._timeout = timeout
        self._window_bytes = window_bytes
        self._rows_per_rank: list[int] | None = None
        self._sizes = sizes
        self._free: list[_Window] = []
        if sizes is None:
            SymmHeap.create("shm", group.rank, group.size, PROBE_BYTES, group).close()
        else:
            self._free.append(self._new_window(sizes))

    def begin_step(self, rows_per_rank: Sequence[int]) -> None:
        """Says how many rows each rank of the group gives to each dispatch until the next begin_step."""
        assert len(rows_per_rank) == self._group.size, f"{rows_per_rank} for {self._group.size} ranks"
        self._rows_per_rank = list(rows_per_rank)

    def dispatch(self, x: Tensor, slots: Tensor, weights: Tensor) -> _Arriving:
        assert self._rows_per_rank is not None, "begin_step comes before the first dispatch"
        said = self._rows_per_rank[self._group.rank]
        assert x.shape[0] == said, f"{x.shape[0]} rows, said {said}"
        window = self._take_window(x, slots.shape[1])
        rounds = max(1, -(-max(self._rows_per_rank) // window.rows))
        window.engine.put(x[: window.rows], slots[: window.rows])
        return _Arriving(self, window, x, slots, weights, rounds)

    def combine(self, y: Tensor, dispatched: Dispatched) -> _Returning | Done:
        sent: _Sent = dispatched.handle
        if sent.rounds > 1:
            return Done(self._combine_parts(y, sent))
        sent.window.engine.push(y, sent.origin)
        self._check(sent.window)
        return _Returning(self, sent)

    def arrive(self, window: _Window, x: Tensor, slots: Tensor, weights: Tensor, rounds: int) -> Dispatched:
        """The wait of a dispatch."""
        engine = window.engine
        if rounds == 1:
            received = engine.receive()
            self._check(window)
            sent = _Sent(window, slots, weights, received.origin, rounds)
            return Dispatched(received.x, received.counts.per_slot, sent)
        group = self._group
        each = [self._slots_per_rank] * group.size
        chosen = slots[slots >= 0]
        chosen_each = torch.bincount(chosen, minlength=group.size * self._slots_per_rank)
        counts = Counts.of(group.all_to_all(chosen_each, each, each).view(group.size, -1))
        rows, _, origin = engine.empty_rows(counts.total)
        for part in range(rounds):
            if part:
                start = part * window.rows
                of_part = slice(start, start + window.rows)
                engine.put(x[of_part], slots[of_part], first_token=start)
            engine.await_rows()
            self._check(window)
            engine.take(counts.first, rows, None, origin)
            if part < rounds - 1:  # nobody may overwrite rows before all have taken theirs
                self._skip_results(window, x)
        return Dispatched(rows, counts.per_slot, _Sent(window, slots, weights, origin, rounds))

    def finish(self, sent: _Sent) -> Tensor:
        """The wait of a combine."""
        out = sent.window.engine.finish(sent.weights)
        self._check(sent.window)
        self._give_back(sent.window)
        return out

    def _combine_parts(self, y: Tensor, sent: _Sent) -> Tensor:
        window, engine, top_k = sent.window, sent.window.engine, sent.slots.shape[1]
        out = y.new_empty(len(sent.slots), y.shape[1])
        for part in range(sent.rounds):
            start, stop = part * window.rows, (part + 1) * window.rows
            if part:  # a step without rows: its words say that the results before have been read
                engine.put(out[:0], sent.slots[:0])
                engine.await_rows()
                self._check(window)
            engine.push(y, sent.origin, start * top_k, stop * top_k, everyone=True)
            engine.finish(sent.weights[start:stop], sent.slots[start:stop], out[start:stop], everyone=True)
            self._check(window)
        self._give_back(window)
        return out

    def _skip_results(self, window: _Window, x: Tensor) -> None:
        engine = window.engine
        none = torch.empty(0, 2, dtype=torch.int64)
        engine.push(x[:0], none, everyone=True)
        engine.finish(torch.empty(none.shape), none, x[:0], everyone=True)
        self._check(window)

    def _take_window(self, x: Tensor, top_k: int) -> _Window:
        """A free window for such rows. All ranks make, use and give back windows in the same order."""
        assert x.device.type == "cpu", f"one-sided memory of CPUs cannot carry rows of {x.device}"
        known = self._sizes
        if known is None or (known.width, known.top_k, known.dtype) != (x.shape[1], top_k, x.dtype):
            self._free = []
            self._sizes = RowSizes(MAX_ROWS, x.shape[1], top_k, x.dtype)
        assert self._sizes is not None
        return self._free.pop() if self._free else self._new_window(self._sizes)

    def _give_back(self, window: _Window) -> None:
        if window.sizes == self._sizes:
            self._free.append(window)

    def _new_window(self, sizes: RowSizes) -> _Window:
        config = window_config(self._group.size, self._slots_per_rank, sizes, self._window_bytes)
        return _Window(self._group, sizes, config, self._timeout)

    def _check(self, window: _Window) -> None:
        """A dispatcher's results are whole or none: who serves decides what a lost rank means."""
        engine = window.engine
        if faults := engine.query_fault():
            rank = self._group.ranks[faults[0]]
            if engine.ended(faults[0]):
                raise RankLost(f"rank {rank} has died")
            raise RuntimeError(f"no rows or results of rank {rank} came for {self._timeout:.1f} s")


@dataclass(frozen=True)
class _Arriving:
    """A dispatch under way."""

    dispatcher: OneSidedDispatcher
    window: _Window
    x: Tensor
    slots: Tensor
    weights: Tensor
    rounds: int

    def wait(self) -> Dispatched:
        return self.dispatcher.arrive(self.window, self.x, self.slots, self.weights, self.rounds)


@dataclass(frozen=True)
class _Returning:
    """A combine under way."""

    dispatcher: OneSidedDispatcher
    sent: _Sent

    def wait(self) -> Tensor:
        return self.dispatcher.finish(self.sent)
