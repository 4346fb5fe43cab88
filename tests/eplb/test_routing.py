"""Routing shares against the linear program's optimum, and local shares in whole tokens."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linprog

from moeserve.eplb import Placement, Topology, solve
from moeserve.eplb.metrics import balance, imbalance
from moeserve.eplb.routing import local_counts, static_shares, step_shares
from moeserve.eplb.synthetic import Traffic


def _optimum(slots: np.ndarray, load: np.ndarray, topology: Topology) -> float:
    """Least possible highest rank load over all splits of this layer."""
    num_slots, experts = len(slots), len(load)
    rank = np.arange(num_slots) // topology.slots_per_rank
    cost = np.zeros(num_slots + 1)
    cost[-1] = 1
    upper = np.zeros((topology.num_ranks, num_slots + 1))
    upper[rank, np.arange(num_slots)] = 1
    upper[:, -1] = -1
    equal = np.zeros((experts, num_slots + 1))
    equal[slots, np.arange(num_slots)] = 1
    found = linprog(cost, A_ub=upper, b_ub=np.zeros(topology.num_ranks), A_eq=equal, b_eq=load)
    return float(found.fun)


@pytest.mark.parametrize(("ranks", "slots", "experts"), [(4, 12, 8), (8, 72, 64), (16, 80, 64), (5, 30, 12)])
def test_water_filling_comes_within_1e3_of_the_linear_program(ranks: int, slots: int, experts: int) -> None:
    topology, traffic = Topology.of(ranks, slots), Traffic.make(3, experts, seed=ranks)
    steps = traffic.counts(traffic.mixes("burst", 12), ranks * 1000).astype(float)
    for policy in ("connected", "greedy"):
        placement = solve(steps[:6], topology, policy=policy)
        _, ranks_load = step_shares(placement, steps[6:], topology, sweeps=300)
        for step, per_layer in zip(steps[6:], ranks_load, strict=True):
            for layer in range(3):
                best = _optimum(placement.slot_to_expert[layer], step[layer], topology)
                assert per_layer[layer].max() <= best * 1.001
                assert per_layer[layer].sum() == pytest.approx(step[layer].sum())


def test_shares_add_up_and_few_sweeps_already_help() -> None:
    topology, traffic = Topology.of(32, 288), Traffic.make(2, 256)
    steps = traffic.counts(traffic.mixes("drift", 40), 32768)
    placement = solve(steps[:32], topology)
    shares, _ = step_shares(placement, steps[32:], topology)
    for step in shares:
        Placement(placement.slot_to_expert, 256, 0, step)  # checks the sums
    results = [imbalance(step_shares(placement, steps[32:], topology, n)[1]).mean() for n in (0, 3, 12)]
    assert results[0] > results[1] > results[2]
    assert results[2] < 1.02


def test_static_shares_even_out_the_mean_and_never_lose_to_an_even_split_in_sample() -> None:
    topology, traffic = Topology.of(8, 40), Traffic.make(4, 32)
    windows = traffic.counts(traffic.mixes("burst", 16, concentration=5), 8000)
    placement = solve(windows, topology, routing="even")
    share = static_shares(placement, windows, topology)
    weighted = Placement(placement.slot_to_expert, 32, 0, share)
    assert (
        balance(windows, weighted, topology).mean
        <= balance(windows, placement, topology, even=True).mean + 1e-6
    )
    total = windows.sum(axis=0)
    alone = Placement(placement.slot_to_expert, 32, 0, static_shares(placement, total, topology))
    assert (
        balance(total[None], alone, topology).mean < balance(total[None], placement, topology, even=True).mean
    )


def test_experts_without_load_share_evenly() -> None:
    placement = Placement(np.array([[0, 1, 0, 1]]), 2)
    share = static_shares(placement, np.array([[0, 8]]), Topology.of(2, 4))
    assert share.tolist() == [[0.5, 0.5, 0.5, 0.5]]


def test_local_counts_are_whole_and_exact_and_better_than_even() -> None:
    topology, traffic = Topology.of(8, 72), Traffic.make(1, 64)
    steps = traffic.counts(traffic.mixes("drift", 40), 8 * 768)
    placement = solve(steps[:32], topology)
    slots = placement.slot_to_expert[0]
    rng = np.random.default_rng(0)
    local, even = [], []
    for number, step in enumerate(steps[32:, 0]):
        own = rng.multinomial(step, np.full(8, 1 / 8)).T
        sent = local_counts(slots, own, topology, number)
        assert (sent >= 0).all()
        by_expert = np.zeros((8, 64), np.int64)
        np.add.at(by_expert, (slice(None), slots), sent)
        assert (by_expert == own).all()
        local.append(sent.sum(axis=0).reshape(8, -1).sum(axis=1))
        even.append(step)
    found = imbalance(np.array(local, float)).mean()
    assert found < balance(np.array(even)[:, None], placement, topology, even=True).mean
    assert found < 1.03


def test_replicas_on_one_rank_do_no_harm() -> None:
    placement = Placement(np.array([[0, 0, 1, 0, 2, 2]]), 3)
    shares, ranks = step_shares(placement, np.array([[[9.0, 3.0, 6.0]]]), Topology.of(2, 6))
    assert ranks.sum() == pytest.approx(18)
    assert ranks.max() == pytest.approx(9, rel=1e-3)
    assert shares[0, 0, [0, 1, 3]].sum() == pytest.approx(1)


def test_loads_of_another_shape_are_refused() -> None:
    topology, placement = Topology.of(2, 8), Placement.identity(1, 6, 8)
    for load in (np.ones((3, 1, 5)), np.ones((3, 2, 6)), np.ones(6)):
        for share in (static_shares, step_shares):
            with pytest.raises(ValueError, match="the load has shape"):
                share(placement, load, topology)
    for slots, counts in (([0, 1, 2, 3, 4, 5, 6, 0], np.ones((2, 6))), ([0, 1, 2, 3, 4, 5], np.ones((2, 6)))):
        with pytest.raises(ValueError, match="the counts have shape"):
            local_counts(np.array(slots, np.int32), counts.astype(np.int64), topology)
