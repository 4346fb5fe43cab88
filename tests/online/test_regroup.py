"""A rank is lost: what was under way is over, and balancing goes on over those that are left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moeserve.eplb.loss import without_rank
from moeserve.eplb.types import Placement, Topology
from moeserve.expert_balance import ExpertBalance
from moeserve.messages import ExpertCounts, Migrated
from moeserve.online.balancer import OnlineBalancer, OnlineSettings

EXPERTS, STEPS = 8, 10
TOPOLOGY = Topology(4, slots_per_rank=4)
PLACEMENT = Placement(np.array([np.arange(16) % EXPERTS, np.arange(16)[::-1] % EXPERTS]), EXPERTS)


class Solver:
    """Knows what it was told, and decides nothing."""

    state = "idle"

    def __init__(self, placement: Placement) -> None:
        self.placement, self.closed, self.asked = placement, False, 0
        self.seen: list[np.ndarray] = []

    def observe(self, load: np.ndarray, forget: bool = False) -> None:
        self.seen.append(load)

    def request(self, costs: Any = None, force: bool = False) -> None:
        self.asked += 1

    def applied(self, placement: Placement) -> None:
        self.placement = placement

    def poll(self) -> None:
        return None

    def close(self) -> None:
        self.closed = True


def make() -> tuple[ExpertBalance, OnlineBalancer, list[Solver], Callable[..., None]]:
    balance = ExpertBalance(PLACEMENT, TOPOLOGY, layers=(0, 1), model="m", top_k=1, expert_groups=1)
    solvers: list[Solver] = []

    def start(placement: Placement) -> Solver:
        solvers.append(Solver(placement))
        return solvers[-1]

    settings = OnlineSettings(STEPS, 16, 1, num_ranks=4, survive_rank_loss=True)
    online = balance.online = OnlineBalancer(balance, settings, start)
    steps = [0]

    def window(*ranks: int) -> None:
        steps[0] += STEPS
        data = np.ones((2, 2, EXPERTS), "<u4").tobytes()
        for rank in ranks:
            balance.add(ExpertCounts(rank, steps[0], STEPS, 0.5, (EXPERTS, EXPERTS), data))

    return balance, online, solvers, window


@pytest.mark.parametrize("lost", [0, 1])
def test_what_was_under_way_is_over_and_fewer_ranks_go_on(lost: int) -> None:
    balance, online, solvers, window = make()
    window(0, 1, 2, 3)
    other = Placement(np.roll(PLACEMENT.slot_to_expert, 4, axis=1), EXPERTS)
    number = online.apply(online.plan(other))
    (order,) = online.take_orders()
    assert online.state == "migrating" and order.order == number

    left, topology = without_rank(PLACEMENT, TOPOLOGY, lost)
    balance.regroup(left, [lost])
    assert online.state == "idle" and online.progress() is None and online.take_orders() == []
    newest = online.history()[0]
    assert (newest["result"], newest["reason"]) == ("failed", f"lost rank {lost}")
    assert solvers[0].closed and len(solvers) == 2
    assert solvers[1].placement == left and len(solvers[1].seen) == 1, "the load is the same on fewer ranks"
    assert online.settings.num_ranks == 3 and not online.settings.survive_rank_loss
    late = Migrated(0, order.order, "applied", "", 2, 9, other.digest, 0, 0, 1.0, 0.0)
    online.handle(late)  # from before, heard late
    assert balance.placement == left and not online.trouble

    window(*sorted({0, 1, 2, 3} - {lost}))
    assert len(solvers[1].seen) == 2, "three reports make a window now"
    wanted = Placement(np.roll(left.slot_to_expert, 4, axis=1), EXPERTS)
    assert online.apply(online.plan(wanted)) is not None
    (again,) = online.take_orders()
    assert (again.old_generation, again.old_digest) == (left.generation, left.digest)
    assert again.generation > max(left.generation, order.generation) and again.order > order.order
    for rank in range(3):
        answer = Migrated(rank, again.order, "failed", "no", 0, left.generation, left.digest, 0, 0, 1.0, 0.0)
        online.handle(answer)
    assert sorted(balance.generations) == sorted({0, 1, 2, 3} - {lost}), "by the numbers they started with"
    assert online.state == "solving" and not online.trouble
