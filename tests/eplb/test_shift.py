"""A change of traffic is noticed with its first window, noise and slow drift are not; what is old is forgotten."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from moeserve.eplb.rebalancer import Costs, Rebalancer, Routing, Settings
from moeserve.eplb.shift import Shifts
from moeserve.eplb.types import Placement, Topology

LAYERS, EXPERTS = 3, 32


def windows(
    number: int, tokens: int, domain: int, seed: int = 0, lumps: int = 1
) -> list[npt.NDArray[np.int64]]:
    """Counts of a domain's traffic; lumps: tokens that choose alike, so that windows scatter more."""
    rng = np.random.default_rng(domain)
    part = rng.dirichlet(np.full(EXPERTS, 0.7), size=LAYERS)
    rng = np.random.default_rng((domain, seed))
    return [np.stack([rng.multinomial(tokens // lumps, p) for p in part]) * lumps for _ in range(number)]


def see_all(shifts: Shifts, traffic: list[npt.NDArray[np.int64]]) -> list[int]:
    """Windows that are told to be of other traffic."""
    seen: list[npt.NDArray[np.int64]] = []
    found = []
    for number, window in enumerate(traffic):
        if shifts.see(window, seen):
            found.append(number)
            seen = []
        seen = [*seen, window][-16:]
    return found


@pytest.mark.parametrize(("tokens", "lumps"), [(800, 1), (20_000, 1), (20_000, 8)])
def test_each_change_is_seen_at_once_and_nothing_else(tokens: int, lumps: int) -> None:
    traffic = [w for turn in range(4) for w in windows(10, tokens, turn % 3, seed=turn, lumps=lumps)]
    shifts = Shifts()
    assert see_all(shifts, traffic) == [10, 20, 30]
    assert shifts.typical == 10


def test_too_few_tokens_tell_nothing() -> None:
    traffic = [w for turn in range(4) for w in windows(10, 16, turn % 2, seed=turn)]
    assert see_all(Shifts(), traffic) == []


def test_slow_drift_and_alternation_are_no_shifts() -> None:
    a, b = windows(40, 4000, 0), windows(40, 4000, 1)
    drift = [(x * (40 - i) + y * i) // 40 for i, (x, y) in enumerate(zip(a, b, strict=True))]
    assert see_all(Shifts(), drift) == []
    turns = [x if i % 2 else y for i, (x, y) in enumerate(zip(a, b, strict=True))]
    assert len(see_all(Shifts(), turns[:2])) == 1
    mixed = Shifts()
    see_all(mixed, [(x + y) // 2 for x, y in zip(a, b, strict=True)])
    assert see_all(mixed, [(3 * x + y) // 4 for x, y in zip(a, b, strict=True)]) == []


def test_traffic_that_changes_with_every_window_soon_counts_as_one() -> None:
    mixed = [windows(1, 20_000, domain)[0] for domain in range(60)]
    shifts = Shifts()
    assert len(see_all(shifts, mixed)) <= 12
    quiet = windows(20, 20_000, 100)
    assert see_all(shifts, quiet)[1:] == []
    assert see_all(shifts, windows(4, 20_000, 101)[:1] + quiet) == [
        1
    ]  # neighbours are near again: shifts show


def test_windows_before_a_shift_are_forgotten_where_routing_can_follow() -> None:
    for routing, left in (("even", 8), ("shares", 3), ("step", 3)):
        rebalancer = Rebalancer(
            Placement.identity(LAYERS, EXPERTS, 40),
            Topology.of(4, 40),
            Settings(routing=routing),  # type: ignore[arg-type]
        )
        for window in [*windows(5, 20_000, 0), *windows(3, 20_000, 1)]:
            rebalancer.observe(window)
        assert len(rebalancer.windows) == left


@pytest.mark.parametrize(("routing", "most"), [("shares", 1.06), ("step", 1.03)])
def test_the_second_window_after_a_shift_is_balanced_again(routing: Routing, most: float) -> None:
    topology = Topology.of(4, 40)
    rebalancer = Rebalancer(Placement.identity(LAYERS, EXPERTS, 40), topology, Settings(routing=routing))
    moves = []
    for turn in range(4):
        for window in windows(10, 20_000, turn, seed=1):
            rebalancer.observe(window)
            for _ in range(3):  # each migration is over long before the next window
                decision = rebalancer.decide()
                if decision.plan is None:
                    break
                moves.append(decision.moves)
                rebalancer.applied(decision.plan.new)
            if turn:
                assert decision.before < most and "observed" not in decision.reason
    assert sum(moves) < 4 * LAYERS * 20  # a fresh placement each window would write 40 x LAYERS x 40


def test_moves_pay_less_where_traffic_shifts_often() -> None:
    """Worth while what is seen lasts for 16 windows, not while it lasts for 2."""
    topology, costs = Topology.of(4, 40), Costs(10**6, 1e9, 1e-3, horizon_steps=800, stall_part=1.0)

    def drive(length: int) -> Rebalancer:
        rebalancer = Rebalancer(Placement.identity(LAYERS, EXPERTS, 40), topology, Settings(costs=costs))
        for turn in range(6):
            for window in windows(length, 20_000, turn % 2, seed=turn):
                rebalancer.observe(window)
        return rebalancer

    often, seldom = drive(2).decide(), drive(12).decide()
    assert often.gain_seconds is not None and seldom.gain_seconds is not None
    assert often.gain_seconds < seldom.gain_seconds / 4
