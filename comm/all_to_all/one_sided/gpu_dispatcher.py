"""The token dispatcher over the Triton engine, for GPUs that can map one another's memory. Knows no model.

Never run on more than one GPU so far.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moeserve.comm.all_to_all.one_sided.dispatcher import TIMEOUT_SECONDS, RowSizes
from moeserve.comm.all_to_all.one_sided.layout import EpConfig, EpLayout, RowFormat
from moeserve.comm.all_to_all.protocol import Dispatched
from moeserve.comm.group import Group
from moeserve.comm.symm import HeapUnavailable, SymmHeap
from moeserve.comm.symm.heap import agree

if TYPE_CHECKING:
    from moeserve.comm.all_to_all.one_sided.triton_engine import TritonEngine

BACKENDS = ("fabric", "torch")
"""Of memory between GPUs, the preferred first."""


@dataclass(frozen=True)
class _Sent:
    engine: TritonEngine
    count: int  # rows that arrived
    out: Tensor  # [T, H], for the sums


class GpuDispatcher:
    """Ranks write rows and results into one another's GPU memory; the bits are those of every other dispatcher.

    One host sync a dispatch, for the number of rows that arrived: the tensors of TokenDispatcher have it as their
    size. (TritonEngine itself has none.) A dispatch while another has not been combined uses memory of its own, so
    every rank waits for what it started in the same order. A rank that is late is an error here.

    sizes: no step may bring more. timeout: seconds.
    Raises HeapUnavailable, on all ranks, where triton is missing or the ranks' GPUs cannot share memory.
    """

    def __init__(
        self,
        group: Group,
        slots_per_rank: int,
        sizes: RowSizes,
        device: torch.device,
        *,
        timeout: float = TIMEOUT_SECONDS,
        backends: Sequence[str] = BACKENDS,
    ) -> None:
        agree(group, "" if importlib.util.find_spec("triton") else "triton is not installed")
        form = RowFormat(sizes.width, sizes.dtype)
        config = EpConfig(group.size, sizes.max_rows, sizes.top_k, slots_per_rank, form, form)
        self._group, self._device, self._timeout = group, device, timeout
        self._layout = EpLayout(config)
        self._backends = tuple(backends)
        self._free = [self._new_engine()]

    def begin_step(self, rows_per_rank: Sequence[int]) -> None:
        """Nothing to know: rows say with their arrival how many they are."""

    def dispatch(self, x: Tensor, slots: Tensor, weights: Tensor) -> _Arriving:
        engine = self._free.pop() if self._free else self._new_engine()
        engine.send(x.contiguous(), slots.contiguous(), weights.contiguous())
        return _Arriving(self, engine, x)

    def combine(self, y: Tensor, dispatched: Dispatched) -> _Returning:
        sent: _Sent = dispatched.handle
        sent.engine.send_back(y.contiguous(), sent.count)
        return _Returning(self, sent)

    def arrive(self, engine: TritonEngine, x: Tensor) -> Dispatched:
        """The wait of a dispatch."""
        got = engine.receive()
        per_slot = got.slot_start.diff().to(torch.int64)
        rows = got.in_order(self._layout.config.top_k)
        self._check(engine)
        return Dispatched(rows, per_slot, _Sent(engine, rows.shape[0], torch.empty_like(x)))

    def finish(self, sent: _Sent) -> Tensor:
        """The wait of a combine."""
        out = sent.engine.receive_back(sent.out)
        self._check(sent.engine)
        self._free.append(sent.engine)
        return out

    def _check(self, engine: TritonEngine) -> None:
        """A dispatcher's results are whole or none. A fault in a combine shows in the next dispatch at the latest."""
        if faults := engine.query_fault():
            rank = self._group.ranks[faults[0]]
            raise RuntimeError(f"no rows or results of rank {rank} came for {self._timeout:.1f} s")

    def _new_engine(self) -> TritonEngine:
        """With memory of the first backend that works. All ranks make theirs in the same order."""
        from moeserve.comm.all_to_all.one_sided.triton_engine import TritonEngine

        group, problems = self._group, []
        for backend in self._backends:
            try:
                heap = SymmHeap.create(
                    backend, group.rank, group.size, self._layout.nbytes, group, self._device
                )
            except HeapUnavailable as error:
                problems.append(f"{backend}: {error}")
            else:
                self._backends = (backend,)
                return TritonEngine(heap, self._layout, deadline=self._timeout)
        raise HeapUnavailable("; ".join(problems))


@dataclass(frozen=True)
class _Arriving:
    """A dispatch under way."""

    dispatcher: GpuDispatcher
    engine: TritonEngine
    x: Tensor

    def wait(self) -> Dispatched:
        return self.dispatcher.arrive(self.engine, self.x)


@dataclass(frozen=True)
class _Returning:
    """A combine under way."""

    dispatcher: GpuDispatcher
    sent: _Sent

    def wait(self) -> Tensor:
        return self.dispatcher.finish(self.sent)
