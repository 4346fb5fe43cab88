"""The online balancer: it moves when that pays, keeps still under steady load, and outlives its process."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest

from moeserve.eplb import solve
from moeserve.eplb.migration import apply_plan
from moeserve.eplb.policies.problem import Routing
from moeserve.eplb.rebalancer import Costs, Rebalancer, Settings
from moeserve.eplb.service import Answer, RebalanceService
from moeserve.eplb.synthetic import Traffic
from moeserve.eplb.types import Placement, Topology

TOPOLOGY = Topology.of(8, 72, 4)


def _windows(scenario: str, number: int, seed: int = 0) -> np.ndarray:
    traffic = Traffic.make(4, 64, seed=seed)
    steps = traffic.counts(traffic.mixes(scenario, number * 16, seed), 8 * 768, seed)  # type: ignore[arg-type]
    return steps.reshape(number, 16, 4, 64).sum(axis=1)


def _drive(rebalancer: Rebalancer, windows: np.ndarray) -> list[int]:
    """Moves of each window; plans are applied at once."""
    moves = []
    for window in windows:
        rebalancer.observe(window)
        decision = rebalancer.decide()
        moves.append(decision.moves if decision.plan else 0)
        if decision.plan:
            assert decision.predicted < decision.before
            rebalancer.applied(apply_plan(rebalancer.placement, decision.plan))
    return moves


@pytest.mark.parametrize("routing", ["even", "shares", "step"])
def test_converges_and_keeps_still_under_steady_load(routing: Routing) -> None:
    windows = _windows("steady", 40)
    rebalancer = Rebalancer(Placement.identity(4, 64, 72), TOPOLOGY, Settings(routing=routing))
    moves = _drive(rebalancer, windows)
    assert sum(moves[:12]) > 0
    assert max(moves) <= 4 * 4
    assert sum(moves[20:]) == 0
    assert rebalancer.decide().before < (1.12 if routing == "even" else 1.10 if routing == "shares" else 1.04)


@pytest.mark.parametrize("routing", ["even", "step"])
def test_few_moves_at_a_time_still_arrive(routing: Routing) -> None:
    """With one slot change a layer each decision gains less than min_gain long before there is nothing to gain."""
    windows = _windows("steady", 80)
    rebalancer = Rebalancer(
        Placement.identity(4, 64, 72), TOPOLOGY, Settings(routing=routing, max_moves_per_layer=2)
    )
    moves = _drive(rebalancer, windows)
    assert max(moves) <= 2 * 4 and sum(moves[60:]) == 0
    fresh = Rebalancer(solve(windows[-16:], TOPOLOGY, routing="even"), TOPOLOGY, rebalancer.settings)
    for window in windows[-16:]:
        fresh.observe(window)
    assert rebalancer.decide().before < 1.04 * fresh.decide().before


def test_follows_a_drift() -> None:
    windows = _windows("drift", 40, seed=3)
    still = Rebalancer(Placement.identity(4, 64, 72), TOPOLOGY, Settings(windows=4))
    _drive(still, windows[:15])
    settled = still.placement
    for window in windows[-4:]:
        still.observe(window)
    stale = still.decide()
    moving = Rebalancer(settled, TOPOLOGY, Settings(windows=4))
    _drive(moving, windows[15:])
    assert moving.decide().before < stale.before
    assert moving.placement.generation > settled.generation


def test_moves_that_cost_more_than_they_bring_are_left() -> None:
    windows = _windows("steady", 4)
    dear = Costs(expert_bytes=10**9, bytes_per_second=1e9, step_seconds=1e-3, horizon_steps=10)
    cheap = Costs(expert_bytes=10**3, bytes_per_second=1e9, step_seconds=1e-1, horizon_steps=10_000)
    for costs, moves in ((dear, False), (cheap, True)):
        rebalancer = Rebalancer(Placement.identity(4, 64, 72), TOPOLOGY, Settings(costs=costs))
        for window in windows:
            rebalancer.observe(window)
        decision = rebalancer.decide()
        assert (decision.plan is not None) == moves
        assert decision.cost_seconds is not None
        if not moves:
            assert "moves cost" in decision.reason


def test_shares_cost_nothing_and_come_before_moves() -> None:
    """Where moves do not pay, new shares are taken; where they do, shares for the slots as they are go first."""
    windows = _windows("steady", 4)
    start = solve(_windows("drift", 4, seed=5), TOPOLOGY, policy="greedy", routing="even")
    dear = Costs(expert_bytes=10**9, bytes_per_second=1e6, step_seconds=1e-3)
    cheap = Costs(expert_bytes=1, bytes_per_second=1e9, step_seconds=1e-3)
    rebalancer = Rebalancer(start, TOPOLOGY, Settings(min_gain=0.01))
    for window in windows:
        rebalancer.observe(window)
    routes = rebalancer.decide(dear)
    assert routes.plan is not None and routes.plan.num_moves == 0 and routes.predicted < routes.before
    assert np.array_equal(routes.plan.new.slot_to_expert, start.slot_to_expert)
    both = rebalancer.decide(cheap)
    assert both.plan is not None and both.plan.num_moves > 0 and both.predicted < routes.predicted
    assert both.routes is not None and both.routes.new.digest == routes.plan.new.digest
    assert apply_plan(
        both.routes.new, replace(both.plan, old_digest=both.routes.new.digest, old_generation=1)
    )
    assert rebalancer.decide(dear, force=True).moves > 0


def test_forgets_what_it_is_told_to_and_decides_at_once_when_forced() -> None:
    windows = _windows("steady", 3)
    rebalancer = Rebalancer(Placement.identity(4, 64, 72), TOPOLOGY)
    rebalancer.observe(windows[0])
    rebalancer.observe(windows[1], forget=True)
    assert "1 of 2 windows" in rebalancer.decide().reason
    assert rebalancer.decide(force=True).plan is not None


def test_says_why_it_waits() -> None:
    rebalancer = Rebalancer(Placement.identity(4, 64, 72), TOPOLOGY)
    assert "0 of 2 windows" in rebalancer.decide().reason
    rebalancer.observe(np.zeros((4, 64), np.int64))
    assert not rebalancer.windows
    with pytest.raises(ValueError, match="expected .layers, experts. = .4, 64."):
        rebalancer.observe(np.zeros((4, 63), np.int64))
    with pytest.raises(ValueError, match="negative"):
        rebalancer.observe(np.full((4, 64), -1))
    for _ in range(2):
        rebalancer.observe(np.full((4, 64), 9))
    assert rebalancer.decide().plan is None or rebalancer.decide().predicted < rebalancer.decide().before


def test_survives_rank_loss_at_every_step() -> None:
    topology = Topology.of(4, 24)
    windows = _windows("drift", 12, seed=1)[:, :, :10]
    start = Placement(np.tile(np.concatenate([np.arange(10), np.arange(10), np.arange(4)]), (4, 1)), 10)
    start = (
        Placement(np.tile(np.arange(24) % 10, (4, 1)), 10)
        if not start.survives_rank_loss(topology)
        else start
    )
    rebalancer = Rebalancer(start, topology, Settings(survive_rank_loss=True, min_gain=0.001))
    for window in windows:
        rebalancer.observe(window)
        decision = rebalancer.decide()
        if decision.plan:
            rebalancer.applied(decision.plan.new)
            assert rebalancer.placement.survives_rank_loss(topology)


def _answer(service: RebalanceService) -> Answer:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        answer = service.poll()
        if answer is not None:
            return answer
        time.sleep(0.01)
    raise AssertionError("no answer")


@pytest.mark.multi_rank
def test_service_answers_like_the_rebalancer_and_survives_crashes() -> None:
    windows = _windows("steady", 5)
    start = Placement.identity(4, 64, 72)
    here = Rebalancer(start, TOPOLOGY)
    service = RebalanceService(start, TOPOLOGY, max_restarts=1)
    try:
        for window in windows[:4]:
            here.observe(window)
            service.observe(window)
        service.request()
        assert service.state == "solving"
        answer = _answer(service)
        wanted = here.decide()
        assert answer.decision is not None and answer.decision.plan is not None and wanted.plan is not None
        assert answer.decision.plan.new == wanted.plan.new
        assert service.state == "idle"
        here.applied(wanted.plan.new)
        service.applied(wanted.plan.new)
        service.request()
        assert _answer(service).decision == here.decide()

        assert service.pid is not None
        os.kill(service.pid, signal.SIGKILL)
        time.sleep(0.1)
        service.request()
        answer = _answer(service)
        assert answer.decision is None
        assert "failed" in answer.error
        # restarted with the last placement and the windows
        here.observe(windows[4])
        service.observe(windows[4])
        service.request()
        answer = _answer(service)
        assert answer.decision == here.decide()
        assert service.restarts == 1

        assert service.pid is not None
        os.kill(service.pid, signal.SIGKILL)
        time.sleep(0.1)
        service.request()
        assert _answer(service).decision is None
        assert service.state == "dead"
        service.request()
        assert "dead" in _answer(service).error
    finally:
        service.close()
    assert service.state == "closed"


@pytest.mark.multi_rank
def test_a_solver_that_takes_nothing_in_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of a large model does not fit into a pipe."""
    monkeypatch.setattr("moeserve.eplb.service.TAKE_IN_SECONDS", 1.0)
    topology = Topology(num_ranks=8, slots_per_rank=32)
    service = RebalanceService(Placement.identity(58, 256, 256), topology, Settings())
    window = np.ones((58, 256), np.int64)
    try:
        service.observe(window)
        service.request()
        _answer(service)
        assert service.pid is not None
        os.kill(service.pid, signal.SIGSTOP)
        for _ in range(3):
            service.observe(window)
        service.request()
        assert _answer(service).decision is not None
        assert service.restarts == 1
    finally:
        service.close()


@pytest.mark.multi_rank
def test_a_solver_that_hangs_is_given_up() -> None:
    service = RebalanceService(Placement.identity(4, 64, 72), TOPOLOGY, solve_timeout=0.0, max_restarts=0)
    try:
        service.request()
        assert "no answer in 0 s" in _answer(service).error
        assert service.state == "dead"
    finally:
        service.close()


@pytest.mark.parametrize("routing", ["even", "shares", "step"])
def test_a_slot_much_heavier_than_others_is_moved_too(routing: Routing) -> None:
    """Four hot experts on ranks 0 and 3 alone: every useful swap is a large step, and one alone lowers no maximum."""
    topology = Topology.of(4, 20)
    load = np.where(np.arange(16) < 4, 400, 100)[None]
    rebalancer = Rebalancer(Placement.identity(1, 16, 20), topology, Settings(routing=routing))
    for _ in range(4):
        rebalancer.observe(load)
        rebalancer.observe(load)
        decision = rebalancer.decide()
        if decision.plan:
            assert decision.moves <= 4
            rebalancer.applied(decision.plan.new)
    assert rebalancer.decide().before < 1.02


def test_what_chance_may_have_made_is_not_acted_on() -> None:
    """Even traffic, so few tokens that some rank always looks busier; 66 moves without regard to that."""
    rng = np.random.default_rng(0)
    moves = {}
    for tokens in (64, 6400):
        rebalancer = Rebalancer(Placement.identity(2, 32, 32), Topology.of(4, 32), Settings())
        moves[tokens] = sum(_drive(rebalancer, rng.multinomial(tokens, np.full(32, 1 / 32), size=(30, 2))))
    assert moves[6400] == 0 and moves[64] < 50


@pytest.mark.parametrize("routing", ["even", "shares", "step"])
def test_nothing_is_searched_where_min_gain_is_out_of_reach(
    routing: Routing, monkeypatch: pytest.MonkeyPatch
) -> None:
    rebalancer = Rebalancer(Placement.identity(1, 8, 8), Topology.of(4, 8), Settings(routing=routing))
    for _ in range(3):
        rebalancer.observe(np.array([[101, 99, 100, 101, 99, 100, 100, 100]]) * 10)
    monkeypatch.setattr(rebalancer, "_improve", None)
    decision = rebalancer.decide()
    assert decision.plan is None and "leaves less than 2.00% to gain" in decision.reason


@pytest.mark.parametrize("routing", ["even", "shares", "step"])
@pytest.mark.parametrize(
    ("ranks", "per_rank", "experts"), [(11, 1, 6), (1, 7, 5), (6, 3, 9), (4, 5, 20), (5, 4, 3)]
)
def test_what_is_in_force_is_never_written_to(
    routing: Routing, ranks: int, per_rank: int, experts: int
) -> None:
    """Placements are immutable; the kernels write into what they are given, and know no read-only arrays."""
    rng = np.random.default_rng(0)
    topology = Topology.of(ranks, ranks * per_rank)
    current = Placement.identity(2, experts, topology.num_slots)
    before = current.slot_to_expert.copy(), current.share.copy()
    for load in (rng.poisson(9, (6, 2, experts)) * rng.integers(1, 60, (1, 1, experts)) for _ in range(4)):
        rebalancer = Rebalancer(current, topology, Settings(routing=routing, max_moves_per_layer=6))
        for window in load:
            rebalancer.observe(window)
        rebalancer.decide(force=True)
        solve(load, topology, current=current, max_moves=5, routing=routing)
        assert (current.slot_to_expert == before[0]).all() and (current.share == before[1]).all()
