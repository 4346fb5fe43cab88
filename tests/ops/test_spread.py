"""Step routing: exact, the same in every form, as level as the numpy water filling of eplb."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.eplb import Placement, Topology, solve
from moeserve.eplb.metrics import imbalance
from moeserve.eplb.routing import local_counts
from moeserve.eplb.synthetic import Traffic
from moeserve.ops import build, native
from moeserve.ops.spread import UNIT, SplitTable, phase, spread_tokens


@pytest.fixture(scope="module")
def kernels() -> native.NativeOps:
    try:
        return native.NativeOps(build.build())
    except build.BuildError as error:
        pytest.skip(f"no C kernels here: {error}")


def random_slots(random: np.random.Generator, experts: int, ranks: int, redundant: int) -> np.ndarray:
    """Slots of one layer with replicas anywhere, several on one rank too."""
    count = -(-(experts + redundant) // ranks) * ranks
    slots = np.concatenate((np.arange(experts), random.integers(0, min(experts, 5), count - experts)))
    return random.permutation(slots)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_the_kernel_gives_the_slots_of_the_plain_form(kernels: native.NativeOps, seed: int) -> None:
    random = np.random.default_rng(seed)
    experts, ranks = int(random.integers(1, 40)), int(random.integers(1, 9))
    slots = random_slots(random, experts, ranks, int(random.integers(0, 30)))
    source = int(random.integers(ranks))
    table = SplitTable.make(slots, experts, ranks, source)
    tokens, top_k = int(random.integers(0, 70)), int(random.integers(1, 9))
    skewed = np.minimum(random.geometric(0.2, (tokens, top_k)) - 1, experts - 1)
    chosen, valid = torch.tensor(skewed), torch.tensor(random.random(tokens) < 0.8)
    begin = phase(source, int(random.integers(1000)), 3)
    plain = spread_tokens(chosen, valid, table, begin)
    assert torch.equal(kernels.spread_tokens(chosen, valid, table, begin), plain)
    assert (plain[~valid] == -1).all()
    assert torch.equal(torch.tensor(slots)[plain[valid]], chosen[valid])


def pour(counts: np.ndarray, slots: np.ndarray, ranks: int, source: int, begin: int) -> np.ndarray:
    """Tokens given to each slot, [P]."""
    table = SplitTable.make(slots, len(counts), ranks, source)
    experts = torch.tensor(np.repeat(np.arange(len(counts)), counts)).unsqueeze(1)
    got = spread_tokens(experts, torch.ones(len(experts), dtype=torch.bool), table, begin)
    return np.bincount(got.flatten().numpy(), minlength=len(slots))


def test_two_replicas_level_their_ranks() -> None:
    slots = np.array([0, 1, 0, 2])  # two ranks
    assert pour(np.array([10, 6, 2]), slots, 2, 0, 0).tolist() == [3, 6, 7, 2]
    assert pour(np.array([2, 9, 1]), slots, 2, 0, 0).tolist() == [0, 9, 2, 1]
    assert pour(np.array([10, 0, 0]), slots, 2, 1, 0).tolist() == [5, 0, 5, 0]


def test_what_cannot_be_divided_starts_elsewhere_in_each_step_and_rank() -> None:
    odd = [
        int(pour(np.array([1, 0, 0]), np.array([0, 1, 0, 2]), 2, source, phase(source, step, 0))[0])
        for step in range(100)
        for source in range(2)
    ]
    assert 90 < sum(odd) < 110


def test_a_replica_on_the_source_rank_comes_first() -> None:
    for source in range(3):
        table = SplitTable.make(np.array([0, 1, 0, 2, 0, 1]), 3, 3, source)
        assert int(table.hosts[table.row[0], 0]) == source


@pytest.mark.parametrize(("ranks", "slots", "experts", "rows"), [(8, 72, 64, 96), (16, 80, 64, 64)])
def test_ranks_are_as_level_as_by_the_numpy_water_filling(
    ranks: int, slots: int, experts: int, rows: int
) -> None:
    topology, traffic = Topology.of(ranks, slots), Traffic.make(1, experts)
    steps = traffic.counts(traffic.mixes("drift", 44), ranks * rows * 8)
    placement: Placement = solve(steps[:32], topology)
    row = placement.slot_to_expert[0]
    random = np.random.default_rng(0)
    ours, theirs, even = [], [], []
    for number, step in enumerate(steps[32:, 0]):
        own = random.multinomial(step, np.full(ranks, 1 / ranks)).T
        sent = sum(pour(own[s], row, ranks, s, phase(s, number, 0)) for s in range(ranks))
        by_expert = np.bincount(row, weights=sent, minlength=experts)
        assert np.array_equal(by_expert, step)
        load = (local_counts(row, own, topology, number).sum(axis=0), sent, (step / np.bincount(row))[row])
        for kept, each in zip((theirs, ours, even), load, strict=True):
            kept.append(each.reshape(ranks, -1).sum(axis=1))

    def measure(loads: list[np.ndarray]) -> float:
        return float(imbalance(np.array(loads, float)).mean())

    assert measure(ours) < measure(theirs) + 0.006
    assert measure(ours) - 1 < (measure(even) - 1) / 2


def test_the_kernels_constants_are_these() -> None:
    header = Path(native.__file__).with_name("spread.h").read_text()
    assert f"#define SPREAD_UNIT {UNIT}\n" in header
