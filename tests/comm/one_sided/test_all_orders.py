"""The CPU engine itself, its calls in every order that its waits let the ranks of one process come in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from moeserve.comm.all_to_all.one_sided import native
from moeserve.comm.all_to_all.one_sided.cpu_engine import CpuEngine, Received
from moeserve.comm.all_to_all.one_sided.layout import EpConfig, EpLayout, RowFormat, read_mail
from moeserve.comm.all_to_all.one_sided.loops import Loops, PlainLoops
from moeserve.comm.all_to_all.reference import combine_all, dispatch_all
from moeserve.comm.symm import SymmHeap, local_heaps

MakeLoops = Callable[[SymmHeap, EpLayout], Loops]
CALLS = ("put", "receive", "push", "finish")
WIDTH, TOP_K, SLOTS = 3, 2, 2


@dataclass(frozen=True)
class Inputs:
    """Of one step: x [T, H], slots [T, K] and weights [T, K] of each rank, and what each should get."""

    xs: list[Tensor]
    slots: list[Tensor]
    weights: list[Tensor]
    expected: list[Tensor] = field(default_factory=list)


def experts(x: Tensor, counts: Tensor, rank: int) -> Tensor:
    slot = torch.arange(rank * SLOTS, (rank + 1) * SLOTS).repeat_interleave(counts)
    return x * (slot + 2).unsqueeze(1)


def make_steps(world: int, count: int, tokens: int, seed: int) -> list[Inputs]:
    random = np.random.default_rng(seed)
    steps = []
    for _ in range(count):
        sizes = random.integers(0, tokens + 1, world).tolist()
        xs = [torch.from_numpy(random.normal(size=(t, WIDTH))).float() for t in sizes]
        slots = [torch.from_numpy(random.integers(-1, world * SLOTS, (t, TOP_K))) for t in sizes]
        weights = [torch.from_numpy(random.normal(size=(t, TOP_K))).float() for t in sizes]
        got = dispatch_all(xs, slots, SLOTS)
        ys = [experts(g.rows, g.tokens_per_slot, rank) for rank, g in enumerate(got)]
        steps.append(Inputs(xs, slots, weights, combine_all(ys, got, weights)))
    return steps


class World:
    """The ranks of one process, made anew for each order that is tried."""

    def __init__(self, steps: Sequence[Inputs], make_loops: MakeLoops, tokens: int) -> None:
        self.steps = steps
        world = len(steps[0].xs)
        form = RowFormat(WIDTH, torch.float32)
        self.layout = EpLayout(EpConfig(world, tokens, TOP_K, SLOTS, form, form))
        self.heaps = local_heaps(world, self.layout.nbytes)
        self.engines = [
            CpuEngine(heap, self.layout, 1.0, keep_spare=False, loops=make_loops(heap, self.layout))
            for heap in self.heaps
        ]
        self.at = [0] * world
        self.received: list[Received | None] = [None] * world

    def can_go_on(self, rank: int) -> bool:
        """Whether a rank's next call would return at once."""
        step, call = divmod(self.at[rank], len(CALLS))
        if step == len(self.steps):
            return False
        block, engine = self.heaps[rank].block(rank), self.engines[rank]
        if CALLS[call] == "receive":
            words = self.layout.mail.view(block)[engine.epoch & 1].tolist()
            return all(read_mail(word)[0] == engine.epoch for word in words)
        if CALLS[call] == "finish":
            assert engine._step is not None
            words = self.layout.done.view(block)[engine._step.sent > 0].tolist()
            return all(word == engine.epoch for word in words)
        return True

    def go_on(self, rank: int) -> None:
        number, call = divmod(self.at[rank], len(CALLS))
        self.at[rank] += 1
        step, engine = self.steps[number], self.engines[rank]
        if CALLS[call] == "put":
            engine.put(step.xs[rank], step.slots[rank])
        elif CALLS[call] == "receive":
            self.received[rank] = engine.receive()
        elif CALLS[call] == "push":
            got = self.received[rank]
            assert got is not None
            engine.push(experts(got.x, got.counts.per_slot, rank), got.origin)
        else:
            out = engine.finish(step.weights[rank])
            assert torch.equal(out, step.expected[rank]), f"rank {rank}, step {number}"

    def state(self) -> bytes:
        """All that the following calls depend on."""
        blocks = [heap.block(heap.rank).clone() for heap in self.heaps]
        for block in blocks:
            self.layout.ctl.view(block).zero_()  # the time of day
        return bytes(self.at) + b"".join(block.numpy().tobytes() for block in blocks)


def try_all_orders(steps: Sequence[Inputs], make_loops: MakeLoops, tokens: int) -> int:
    """-> states seen."""
    seen: set[bytes] = set()
    orders: list[list[int]] = [[]]
    while orders:
        order = orders.pop()
        world = World(steps, make_loops, tokens)
        for rank in order:
            world.go_on(rank)
        state = world.state()
        if state in seen:
            continue
        seen.add(state)
        ready = [rank for rank in range(len(world.engines)) if world.can_go_on(rank)]
        if not ready:
            assert world.at == [len(CALLS) * len(steps)] * len(world.engines), f"all wait after {order}"
        orders += [[*order, rank] for rank in ready]
    return len(seen)


def native_loops(heap: SymmHeap, layout: EpLayout) -> Loops:
    if not native.available():
        pytest.skip("no C compiler")
    return native.make_loops(heap, layout)


@pytest.mark.parametrize("make_loops", [PlainLoops, native_loops])
def test_two_ranks(make_loops: MakeLoops) -> None:
    for seed in range(2):
        assert try_all_orders(make_steps(2, 3, 3, seed), make_loops, 3) > 20


@pytest.mark.parametrize("make_loops", [pytest.param(PlainLoops, marks=pytest.mark.slow), native_loops])
def test_three_ranks(make_loops: MakeLoops) -> None:
    assert try_all_orders(make_steps(3, 2, 2, 1), make_loops, 2) > 50


@pytest.mark.slow
def test_longer_runs_of_three_ranks() -> None:
    for seed in range(6):
        assert try_all_orders(make_steps(3, 4, 3, seed), native_loops, 3) > 100
