"""The CPU engine and the Triton engine are two ends of one protocol: the same bytes, also with some ranks of each."""

from __future__ import annotations

from typing import Protocol

import pytest
import torch
from torch import Tensor

from moeserve.comm.all_to_all.one_sided.cpu_engine import CpuEngine
from moeserve.comm.all_to_all.one_sided.layout import EpConfig, EpLayout, RowFormat
from moeserve.comm.all_to_all.reference import combine_all, dispatch_all
from moeserve.comm.symm import SymmHeap, local_heaps
from tests.comm.one_sided.interpreted import Interpreters, experts, make_case, same_bits

pytestmark = pytest.mark.multi_rank

WORLD, SLOTS = 3, 4
X = RowFormat(20, torch.bfloat16, num_scales=3)
CONFIG = EpConfig(WORLD, 7, 5, SLOTS, X, RowFormat(20, torch.bfloat16))


class Rank(Protocol):
    """One end of the protocol, of either engine."""

    def send(self, x: Tensor, scales: Tensor, slots: Tensor, weights: Tensor) -> None: ...

    def receive(self) -> tuple[Tensor, Tensor]:
        """-> (rows [N, width] in the order of results, rows of each slot int64 [S])."""
        ...

    def send_back(self, y: Tensor) -> None: ...

    def receive_back(self) -> Tensor: ...


class CpuRank:
    def __init__(self, heap: SymmHeap, layout: EpLayout) -> None:
        self._engine = CpuEngine(heap, layout, timeout=5.0, keep_spare=False)

    def send(self, x: Tensor, scales: Tensor, slots: Tensor, weights: Tensor) -> None:
        self._weights = weights
        self._engine.put(x, slots, scales)

    def receive(self) -> tuple[Tensor, Tensor]:
        self._got = self._engine.receive()
        return self._got.x, self._got.counts.per_slot

    def send_back(self, y: Tensor) -> None:
        self._engine.push(y, self._got.origin)

    def receive_back(self) -> Tensor:
        return self._engine.finish(self._weights)


class TritonRank:
    def __init__(self, heap: SymmHeap, layout: EpLayout) -> None:
        from moeserve.comm.all_to_all.one_sided.triton_engine import TritonEngine

        self._engine = TritonEngine(heap, layout, deadline=0)

    def send(self, x: Tensor, scales: Tensor, slots: Tensor, weights: Tensor) -> None:
        self._count = len(x)
        self._engine.send(x, slots, weights, scales)

    def receive(self) -> tuple[Tensor, Tensor]:
        got = self._engine.receive()
        return got.in_order(CONFIG.top_k), got.slot_start.diff().to(torch.int64)

    def send_back(self, y: Tensor) -> None:
        self._engine.send_back(y)

    def receive_back(self) -> Tensor:
        out = torch.empty(self._count, X.width, dtype=X.dtype)
        return self._engine.receive_back(out)


def run_steps(kinds: str) -> tuple[list[Tensor], list[list[Tensor]]]:
    """kinds: c or t for each rank. Some steps in lock-step, the results checked -> (blocks, sums of each step)."""
    layout = EpLayout(CONFIG)
    heaps = local_heaps(WORLD, layout.nbytes)
    engines: dict[str, type[Rank]] = {"c": CpuRank, "t": TritonRank}
    ranks = [engines[kind](heap, layout) for kind, heap in zip(kinds, heaps, strict=True)]
    sums = []
    for seed in (6, 10, 9, 2):
        case = make_case(CONFIG, seed)
        assert case.scales is not None
        for rank, *inputs in zip(ranks, case.xs, case.scales, case.ids, case.weights, strict=True):
            rank.send(*inputs)
        expected = dispatch_all(case.xs, case.ids, SLOTS)
        ys = []
        for number, (rank, expect) in enumerate(zip(ranks, expected, strict=True)):
            rows, per_slot = rank.receive()
            assert same_bits(rows, expect.rows) and torch.equal(per_slot, expect.tokens_per_slot)
            ys.append(experts(rows, per_slot, number * SLOTS, X.dtype))
        for rank, y in zip(ranks, ys, strict=True):
            rank.send_back(y)
        outs = [rank.receive_back() for rank in ranks]
        for out, total in zip(outs, combine_all(ys, expected, case.weights), strict=True):
            assert same_bits(out, total)
        sums.append(outs)
    for heap in heaps:
        layout.ctl.view(heap.block(heap.rank)).zero_()  # has the time of day in it
    return [heap.block(heap.rank) for heap in heaps], sums


def compare(rank: int) -> None:
    blocks, sums = run_steps("ccc")
    for kinds in ("ttt", "tct"):
        others, other_sums = run_steps(kinds)
        for block, other in zip(blocks, others, strict=True):
            assert torch.equal(block, other), (
                f"{kinds}: blocks differ at {(block != other).nonzero()[:9, 0].tolist()}"
            )
        for step, other_step in zip(sums, other_sums, strict=True):
            assert all(same_bits(a, b) for a, b in zip(step, other_step, strict=True))


def test_engines_write_the_same_bytes_and_work_together(interpreter: Interpreters) -> None:
    interpreter.run(compare)
