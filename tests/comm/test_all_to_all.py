"""Every dispatcher gives exactly what the one-process reference gives, whatever the shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from moeserve.comm.all_to_all import NAMES, make_dispatcher
from moeserve.comm.all_to_all.local import LocalDispatcher
from moeserve.comm.all_to_all.protocol import TokenDispatcher
from moeserve.comm.all_to_all.reference import combine_all, dispatch_all
from moeserve.comm.all_to_all.rows import SUM_BLOCK, weighted_sum
from moeserve.comm.layout import ParallelLayout
from moeserve.comm.mesh import Mesh
from moeserve.comm.spawn import RankPool

GetPool = Callable[[int], RankPool]


@dataclass(frozen=True)
class Case:
    """Inputs of all ranks, and how many slots each holds."""

    slots_per_rank: int
    xs: list[Tensor]
    slots: list[Tensor]
    weights: list[Tensor]


def make_case(seed: int, size: int, dtype: torch.dtype) -> Case:
    """Random shapes; each kind of awkward input comes up every few seeds."""
    random = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    each = int(random.integers(1, 9))
    top_k = int(random.integers(1, min(22, each * size) + 1))
    width = int(random.choice([1, 3, 8, 64]))
    tokens = random.integers(0, 12, size).tolist()
    kind = seed % 6
    if kind == 1:
        tokens = [0] * size
    if kind == 2:
        tokens[int(random.integers(size))] = 0
    low, high = 0, size * each
    if kind == 3:  # all to one rank
        low = int(random.integers(size)) * each
        high = low + each
    xs, slots, weights = [], [], []
    for t in tokens:
        chosen = torch.randint(low, high, (t, top_k), generator=generator)
        if kind in (4, 5):
            chosen[torch.rand(t, top_k, generator=generator) < (0.3 if kind == 4 else 1.0)] = -1
        xs.append(torch.randn(t, width, generator=generator).to(dtype))
        slots.append(chosen)
        weights.append(torch.randn(t, top_k, generator=generator))
    return Case(each, xs, slots, weights)


def experts(rows: Tensor, tokens_per_slot: Tensor, first_slot: int) -> Tensor:
    """Something that differs by slot and by row."""
    slot = torch.repeat_interleave(
        torch.arange(first_slot, first_slot + len(tokens_per_slot)), tokens_per_slot
    )
    return (torch.sin(rows.float() * 3) * (slot + 1).sqrt().unsqueeze(1)).to(rows.dtype)


def same_bits(got: Tensor, expected: Tensor) -> bool:
    kinds = got.dtype == expected.dtype and got.shape == expected.shape
    return kinds and torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


def check(dispatcher: TokenDispatcher, rank: int, case: Case) -> None:
    expected = dispatch_all(case.xs, case.slots, case.slots_per_rank)
    each = case.slots_per_rank
    dispatcher.begin_step([len(x) for x in case.xs])
    got = dispatcher.dispatch(case.xs[rank], case.slots[rank], case.weights[rank]).wait()
    assert torch.equal(got.tokens_per_slot, expected[rank].tokens_per_slot)
    assert got.tokens_per_slot.dtype == torch.int64
    assert same_bits(got.rows, expected[rank].rows)
    result = dispatcher.combine(experts(got.rows, got.tokens_per_slot, rank * each), got).wait()
    ys = [experts(e.rows, e.tokens_per_slot, i * each) for i, e in enumerate(expected)]
    assert same_bits(result, combine_all(ys, expected, case.weights)[rank])


def check_seeds(rank: int, size: int, name: str, seeds: Sequence[int]) -> None:
    group = Mesh(ParallelLayout(dp=size), rank).ep
    for seed in seeds:
        case = make_case(seed, size, torch.bfloat16 if seed % 2 else torch.float32)
        dispatcher = make_dispatcher(name, group, case.slots_per_rank)
        try:
            check(dispatcher, rank, case)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def check_repeated(rank: int, size: int, name: str) -> None:
    """One dispatcher over many steps, dispatches of a step interleaved as two layers in flight would be."""
    group = Mesh(ParallelLayout(dp=size), rank).ep
    cases = [make_case(seed, size, torch.float32) for seed in range(40)]
    chosen = [case for case in cases if case.slots_per_rank == cases[0].slots_per_rank]
    assert len(chosen) > 2
    dispatcher = make_dispatcher(name, group, chosen[0].slots_per_rank)
    for case in chosen:
        check(dispatcher, rank, case)
        first = dispatcher.dispatch(case.xs[rank], case.slots[rank], case.weights[rank]).wait()
        second = dispatcher.dispatch(-case.xs[rank], case.slots[rank], case.weights[rank]).wait()
        a = dispatcher.combine(first.rows, first).wait()
        b = dispatcher.combine(second.rows, second).wait()
        assert torch.equal(a, -b)


@pytest.mark.multi_rank
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_equals_reference(rank_pool: GetPool, name: str, size: int) -> None:
    rank_pool(size).run(check_seeds, size, name, range(60))


@pytest.mark.multi_rank
@pytest.mark.parametrize("name", NAMES)
def test_one_dispatcher_for_many_steps(rank_pool: GetPool, name: str) -> None:
    rank_pool(4).run(check_repeated, 4, name)


@pytest.mark.parametrize("seed", range(60))
def test_local_equals_reference(seed: int) -> None:
    case = make_case(seed, 1, torch.bfloat16 if seed % 2 else torch.float32)
    check(LocalDispatcher(case.slots_per_rank), 0, case)


def test_a_group_of_one_is_local() -> None:
    group = Mesh(ParallelLayout(), 0).ep
    for name in NAMES:
        assert isinstance(make_dispatcher(name, group, 4), LocalDispatcher)


def test_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="all_to_all = 'pigeon': must be one of exchange, gather, one_sided"):
        make_dispatcher("pigeon", Mesh(ParallelLayout(), 0).ep, 4)


def test_weighted_sum_does_not_depend_on_its_blocks() -> None:
    top_k, width = 3, 1000
    tokens = SUM_BLOCK // (top_k * width) * 2 + 5
    choices, weights = torch.randn(tokens * top_k, width), torch.randn(tokens, top_k)
    whole = weighted_sum(choices, weights, None)
    for t in (0, 1, tokens // 2, tokens - 1):
        alone = weighted_sum(choices[t * top_k : (t + 1) * top_k], weights[t : t + 1], None)
        assert torch.equal(alone[0], whole[t])


def test_skipped_choices_count_nothing_whatever_their_weight() -> None:
    x, slots = torch.randn(2, 4), torch.tensor([[0, -1], [-1, -1]])
    weights = torch.tensor([[0.5, float("nan")], [float("inf"), 1.0]])
    local = LocalDispatcher(1)
    got = local.dispatch(x, slots, weights).wait()
    result = local.combine(got.rows, got).wait()
    assert torch.equal(result, torch.stack((x[0] * 0.5, torch.zeros(4))))
