"""The CPU engine, virtual ranks of one process in lock-step: results, memory, faults, membership."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from moeserve.comm.all_to_all.one_sided import native
from moeserve.comm.all_to_all.one_sided.cpu_engine import CpuEngine, Evicted, Received
from moeserve.comm.all_to_all.one_sided.layout import CTL_HEARTBEAT, EpConfig, EpLayout, RowFormat
from moeserve.comm.all_to_all.one_sided.loops import Loops, PlainLoops
from moeserve.comm.all_to_all.reference import combine_all, dispatch_all
from moeserve.comm.all_to_all.rows import weighted_sum
from moeserve.comm.symm import SymmHeap, local_heaps

MakeLoops = Callable[[SymmHeap, EpLayout], Loops]
LATE = 0.01


def native_loops(heap: SymmHeap, layout: EpLayout) -> Loops:
    if not native.available():
        pytest.skip("no C compiler")
    return native.make_loops(heap, layout)


BOTH = pytest.mark.parametrize("make_loops", [PlainLoops, native_loops])


@dataclass(frozen=True)
class Inputs:
    """Of one step: x [T, H], scales, slots [T, K], weights [T, K] of each rank."""

    xs: list[Tensor]
    scales: list[Tensor | None]
    slots: list[Tensor]
    weights: list[Tensor]


def make_config(seed: int) -> EpConfig:
    random = np.random.default_rng(seed)
    width = int(random.choice([1, 3, 8, 40, 1030]))
    dtype = [torch.float32, torch.bfloat16][seed % 2]
    num_scales = int(random.choice([0, 3]))
    world, slots = int(random.integers(1, 9)), int(random.integers(1, 9))
    top_k = int(random.integers(1, min(22, world * slots) + 1))
    x = RowFormat(width, dtype, num_scales)
    return EpConfig(world, int(random.integers(2, 20)), top_k, slots, x, RowFormat(width, dtype))


def make_inputs(config: EpConfig, seed: int, limit: int) -> Inputs:
    """Random inputs of at most `limit` tokens; each kind of awkward one comes up every few seeds."""
    random, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    tokens = random.integers(0, limit + 1, config.world).tolist()
    low, high = 0, config.world * config.slots_per_rank
    kind = seed % 5
    if kind == 1:
        tokens = [0] * config.world
    if kind == 2:  # as many as there may be, all to one rank
        tokens = [limit] * config.world
        low = int(random.integers(config.world)) * config.slots_per_rank
        high = low + config.slots_per_rank
    slots = [torch.randint(low, high, (t, config.top_k), generator=generator) for t in tokens]
    if kind == 3:
        slots = [s.masked_fill(torch.rand(s.shape, generator=generator) < 0.4, -1) for s in slots]
    form = config.x
    return Inputs(
        [torch.randn(t, form.width, generator=generator).to(form.dtype) for t in tokens],
        [torch.rand(t, form.num_scales, generator=generator) if form.num_scales else None for t in tokens],
        slots,
        [torch.randn(t, config.top_k, generator=generator) for t in tokens],
    )


def experts(rows: Tensor, per_slot: Tensor, first_slot: int) -> Tensor:
    """Something that differs by slot and by row."""
    slot = torch.repeat_interleave(torch.arange(first_slot, first_slot + len(per_slot)), per_slot)
    return (torch.sin(rows.float() * 3) * (slot + 1).sqrt().unsqueeze(1)).to(rows.dtype)


def make_engines(
    config: EpConfig, make_loops: MakeLoops, keep_spare: bool = False
) -> tuple[list[CpuEngine], list[SymmHeap]]:
    layout = EpLayout(config)
    heaps = local_heaps(config.world, layout.nbytes)
    engines = [CpuEngine(heap, layout, LATE, keep_spare, make_loops(heap, layout)) for heap in heaps]
    return engines, heaps


def answer(engine: CpuEngine, received: Received) -> None:
    first = engine.rank * len(received.counts.per_slot)
    engine.push(experts(received.x, received.counts.per_slot, first), received.origin)


def run_step(engines: Sequence[CpuEngine], given: Inputs) -> list[Tensor]:
    for rank, engine in enumerate(engines):
        engine.put(given.xs[rank], given.slots[rank], given.scales[rank])
    for engine in engines:
        answer(engine, engine.receive())
    return [engine.finish(given.weights[rank]) for rank, engine in enumerate(engines)]


def same_bits(got: Tensor, expected: Tensor) -> bool:
    kinds = got.dtype == expected.dtype and got.shape == expected.shape
    return kinds and torch.equal(got.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


@BOTH
@pytest.mark.parametrize("seed", range(12))
def test_steps_equal_the_reference(make_loops: MakeLoops, seed: int) -> None:
    """Three steps through the same memory."""
    config = make_config(seed)
    each = config.slots_per_rank
    engines, _ = make_engines(config, make_loops)
    for step in range(3):
        given = make_inputs(config, seed * 3 + step, config.max_tokens)
        expected = dispatch_all(given.xs, given.slots, each)
        for rank, engine in enumerate(engines):
            engine.put(given.xs[rank], given.slots[rank], given.scales[rank])
        for rank, engine in enumerate(engines):
            received = engine.receive()
            assert same_bits(received.x, expected[rank].rows)
            assert torch.equal(received.counts.per_slot, expected[rank].tokens_per_slot)
            assert received.counts.total == len(expected[rank].rows)
            for n, (source, token, choice) in enumerate(expected[rank].handle):
                assert received.origin[n].tolist() == [source, token * config.top_k + choice]
                scales = given.scales[source]
                if scales is not None:
                    assert received.scales is not None and torch.equal(received.scales[n], scales[token])
            answer(engine, received)
        ys = [experts(e.rows, e.tokens_per_slot, i * each) for i, e in enumerate(expected)]
        wanted = combine_all(ys, expected, given.weights)
        for rank, engine in enumerate(engines):
            assert same_bits(engine.finish(given.weights[rank]), wanted[rank])
            assert engine.lost_weight is None and not engine.query_fault()


@pytest.mark.parametrize("seed", range(10))
def test_compiled_and_plain_loops_leave_the_same_memory(seed: int) -> None:
    config = make_config(seed)
    plain, plain_heaps = make_engines(config, PlainLoops)
    fast, fast_heaps = make_engines(config, native_loops)
    for step in range(2):
        given = make_inputs(config, seed * 2 + step, config.max_tokens)
        for a, b in zip(run_step(plain, given), run_step(fast, given), strict=True):
            assert same_bits(a, b)
        for rank in range(config.world):
            left, right = plain_heaps[0].block(rank).clone(), fast_heaps[0].block(rank).clone()
            clock = EpLayout(config).ctl.at(CTL_HEARTBEAT)
            left[clock : clock + 8] = right[clock : clock + 8] = 0
            assert torch.equal(left, right)


def test_as_many_ranks_as_a_rack_has() -> None:
    form = RowFormat(3, torch.float32)
    config = EpConfig(72, 3, 22, 4, form, form)
    engines, _ = make_engines(config, native_loops)
    given = make_inputs(config, 3, 3)
    expected = dispatch_all(given.xs, given.slots, 4)
    ys = [experts(e.rows, e.tokens_per_slot, i * 4) for i, e in enumerate(expected)]
    for out, wanted in zip(run_step(engines, given), combine_all(ys, expected, given.weights), strict=True):
        assert same_bits(out, wanted)


def test_a_token_travels_once_to_a_rank() -> None:
    config = EpConfig(2, 4, 4, 4, RowFormat(8, torch.float32), RowFormat(8, torch.float32))
    engines, heaps = make_engines(config, PlainLoops)
    slots = torch.tensor([[0, 1, 2, 3], [0, 1, 4, 5]])
    engines[0].put(torch.ones(2, 8), slots)
    layout = EpLayout(config)
    rows = [int(layout.mail.view(heaps[0].block(rank))[1, 0]) & 0xFFFFF for rank in range(2)]
    assert rows == [2, 1], "4 choices of token 0 on rank 0 are one row; token 1 has one on each"


@BOTH
def test_rows_of_another_table_version_are_counted(make_loops: MakeLoops) -> None:
    config = EpConfig(2, 4, 1, 1, RowFormat(4, torch.float32), RowFormat(4, torch.float32))
    engines, _ = make_engines(config, make_loops)
    engines[0].put(torch.ones(3, 4), torch.ones(3, 1, dtype=torch.int64), version=7)
    engines[1].put(torch.ones(1, 4), torch.ones(1, 1, dtype=torch.int64), version=8)
    engines[0].receive(7)
    engines[1].receive(8)
    assert [engine.foreign_versions for engine in engines] == [0, 3]


@BOTH
def test_a_slot_that_nobody_has_is_refused_before_anything_is_written(make_loops: MakeLoops) -> None:
    config = EpConfig(2, 4, 2, 3, RowFormat(4, torch.float32), RowFormat(4, torch.float32))
    engines, heaps = make_engines(config, make_loops)
    with pytest.raises(AssertionError, match="slots up to 6"):
        engines[0].put(torch.ones(2, 4), torch.tensor([[0, 3], [-1, 6]]))
    assert not heaps[0].block(1).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_results_may_travel_in_fewer_bits(dtype: torch.dtype) -> None:
    config = EpConfig(2, 4, 2, 2, RowFormat(8, torch.float32), RowFormat(8, dtype))
    engines, _ = make_engines(config, native_loops)
    x, slots, weights = torch.randn(4, 8), torch.tensor([[0, 3], [1, -1], [2, 3], [-1, -1]]), torch.rand(4, 2)
    for engine in engines:
        engine.put(x, slots)
    for engine in engines:
        received = engine.receive()
        engine.push(received.x.to(dtype), received.origin)
    rows = x.to(dtype).to(torch.float32).repeat_interleave(2, 0)
    expected = weighted_sum(rows, weights, slots < 0)
    for engine in engines:
        out = torch.empty(4, 8)
        assert torch.equal(engine.finish(weights, out=out), expected)


# --- faults ---------------------------------------------------------------------------------------------------


def fault_case(seed: int = 0) -> tuple[EpConfig, Inputs]:
    """Three ranks with six tokens each, as many as fit beside a spare half."""
    form = RowFormat(16, torch.float32)
    config = EpConfig(3, 12, 4, 2, form, form)
    generator = torch.Generator().manual_seed(seed)
    slots = [torch.randint(-1, 6, (6, 4), generator=generator) for _ in range(3)]
    xs, weights = torch.randn(3, 6, 16, generator=generator), torch.randn(3, 6, 4, generator=generator)
    return config, Inputs(list(xs), [None] * 3, slots, list(weights))


def without(given: Inputs, rank: int, lost: set[int], each: int) -> Tensor:
    """What `rank` gets when the slots of the ranks `lost` count nothing."""
    x, slots, weights = given.xs[rank], given.slots[rank], given.weights[rank]
    gone = torch.tensor([[s < 0 or s // each in lost for s in row] for row in slots.tolist()])
    flat = slots.flatten().clamp(min=0)
    rows = x.repeat_interleave(slots.shape[1], 0)
    y = torch.sin(rows * 3) * (flat + 1).sqrt().unsqueeze(1)
    return weighted_sum(y, weights, gone)


@BOTH
@pytest.mark.parametrize("phase", ["before put", "before receive", "before push"])
def test_a_late_rank_is_masked_and_harms_nobody_later(make_loops: MakeLoops, phase: str) -> None:
    """Rank 2 stops in step 2, is masked, and goes on with that step when the others are at step 4."""
    config, given = fault_case()
    each = config.slots_per_rank
    engines, _ = make_engines(config, make_loops, keep_spare=True)
    survivors, sleeper = engines[:2], engines[2]
    run_step(engines, given)
    for rank in range(3):
        if rank < 2 or phase != "before put":
            engines[rank].put(given.xs[rank], given.slots[rank])
    received = sleeper.receive() if phase == "before push" else None
    for engine in survivors:
        answer(engine, engine.receive())
        assert (phase == "before put") == (engine.late_at() == {2: 2})
    for rank, engine in enumerate(survivors):
        assert torch.equal(engine.finish(given.weights[rank]), without(given, rank, {2}, each))
        lost = (given.slots[rank] >= 2 * each) * given.weights[rank]
        assert engine.lost_weight is not None and torch.equal(engine.lost_weight, lost.sum(1))
        assert engine.query_fault() == [2] and engine.late_at() == {2: 2}

    _, later = fault_case(1)
    for rank, engine in enumerate(survivors):  # step 3
        engine.put(later.xs[rank], later.slots[rank])
    for engine in survivors:
        answer(engine, engine.receive())
    if phase == "before put":  # wakes in the middle of it, and writes all that it ever can
        sleeper.put(torch.full_like(given.xs[2], 99.0), given.slots[2])
    received = received or sleeper.receive()
    sleeper.push(torch.full_like(received.x, 77.0), received.origin)
    for rank, engine in enumerate(survivors):
        assert torch.equal(engine.finish(later.weights[rank]), without(later, rank, {2}, each))
    sleeper.finish(given.weights[2])
    if phase == "before put":
        assert sleeper.query_fault() == [0, 1], "nobody answers a rank that is masked"


def test_no_spare_half_is_left_after_a_second_sleeper() -> None:
    config, given = fault_case()
    engines, _ = make_engines(config, PlainLoops, keep_spare=True)
    engines[0].put(given.xs[0], given.slots[0])
    engines[1].put(given.xs[1], given.slots[1])
    engines[0].receive()
    assert engines[0].query_fault() == [2]
    engines[0].push(torch.empty(0, 16), torch.empty(0, 2, dtype=torch.int64))
    engines[1].receive()
    engines[1].push(torch.empty(0, 16), torch.empty(0, 2, dtype=torch.int64), everyone=True)
    engines[0].finish(given.weights[0])
    engines[0].put(given.xs[0], given.slots[0])
    with pytest.raises(RuntimeError, match=r"ranks \[1, 2\] were late one after the other"):
        engines[0].receive()


@BOTH
def test_a_rank_comes_back_with_a_new_membership(make_loops: MakeLoops) -> None:
    config, given = fault_case()
    engines, _ = make_engines(config, make_loops, keep_spare=True)
    survivors = engines[:2]
    for _ in range(3):
        for rank, engine in enumerate(survivors):
            engine.put(given.xs[rank], given.slots[rank])
        for engine in survivors:
            answer(engine, engine.receive())
        for rank, engine in enumerate(survivors):
            engine.finish(given.weights[rank])
    for engine in engines:
        engine.set_membership([True] * 3, generation=1, epoch=10)
        assert not engine.query_fault() and engine.generation == 1
    outs = run_step(engines, given)
    for rank in range(3):
        assert torch.equal(outs[rank], without(given, rank, set(), config.slots_per_rank))
        assert engines[rank].lost_weight is None


def test_a_rank_that_was_left_behind_stops() -> None:
    config, given = fault_case()
    engines, _ = make_engines(config, PlainLoops)
    for engine in engines[:2]:
        engine.set_membership([True] * 3, generation=1, epoch=10)
        engine.put(given.xs[engine.rank], given.slots[engine.rank])
    engines[2].put(given.xs[2], given.slots[2])
    with pytest.raises(Evicted, match="rank 2 is at step 1, others went on"):
        engines[2].receive()


def test_membership_of_the_past_is_refused() -> None:
    config, _ = fault_case()
    engine = make_engines(config, PlainLoops)[0][1]
    engine.set_membership([True, True, False], 1, 5)
    with pytest.raises(ValueError, match="generation = 1: must be above 1"):
        engine.set_membership([True] * 3, 1, 9)
    with pytest.raises(ValueError, match="epoch = 5: must be above 5"):
        engine.set_membership([True] * 3, 2, 5)
    with pytest.raises(Evicted, match="rank 1 is not a member of generation 2"):
        engine.set_membership([True, False, True], 2, 9)
