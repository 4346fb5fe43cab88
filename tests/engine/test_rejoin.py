"""What a rank does while it waits for the others after a loss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from moeserve.comm.wire import RankLost
from moeserve.config import EngineConfig, parse
from moeserve.engine import rejoin
from moeserve.engine.rejoin import Survival
from moeserve.eplb.types import Placement, Topology
from moeserve.messages import AbortRequest, Migrate, Rejoin, ToRank, Wake, encode
from moeserve.moe.migration import fingerprint
from moeserve.plan import make_plan

LOSS = RankLost("rank 2 has died")
ORDER = Migrate(order=1, old_generation=0, old_digest="", generation=1, digest="", layers=[])


def survival(on_rank_loss: str = "shrink") -> Survival:
    balancer = {"num_slots": 64, "on_rank_loss": on_rank_loss}
    settings = {"device": "cpu", "tensor_parallel_size": 4, "enable_attention_dp": True}
    plan = make_plan(parse(EngineConfig, {**settings, "moe_config": {"load_balancer": balancer}}))
    return Survival(plan, 4, timeout=10.0)


class Waiting:
    """A rank that hears these letters, one delivery a look."""

    def __init__(self, *letters: list[ToRank]) -> None:
        self.letters = list(letters)
        self.held: list[ToRank] = []
        self.mail = SimpleNamespace(take=self.take)

    def take(self, timeout: float) -> list[bytes]:
        return [encode(message) for message in self.letters.pop(0)] if self.letters else []

    def apply(self, message: ToRank) -> None:
        raise AssertionError("the interrupted step still needs what this may take away")


def order(membership: int) -> Rejoin:
    return Rejoin(membership, [0, 1, 3], [2], "127.0.0.1", 1)


def test_what_comes_meanwhile_waits_for_the_end_of_the_step() -> None:
    rank = Waiting([AbortRequest("7"), ORDER], [], [Wake(), order(0), order(1), AbortRequest("8")])
    assert survival()._await_order(cast(Any, rank), LOSS) == order(1)
    assert rank.held == [AbortRequest("7"), Wake(), AbortRequest("8")], "orders were for the old group"


def test_without_an_answer_the_loss_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejoin, "ANSWER_SECONDS", 0.05)
    with pytest.raises(RankLost, match="rank 2 has died"):
        survival()._await_order(cast(Any, Waiting([order(0)])), LOSS)


def test_nobody_who_was_not_asked_to_goes_on() -> None:
    with pytest.raises(RankLost, match="rank 2 has died"):
        survival("fail").go_on(cast(Any, None), LOSS)


class Moving:
    """A migrator with a round that all ranks had staged."""

    def __init__(self, ready: Placement | None) -> None:
        self.ready, self.switched, self.abandoned = ready, False, False

    def ready_for(self) -> int:
        return 0 if self.ready is None else fingerprint(self.ready)

    def switch_now(self) -> None:
        assert not self.abandoned
        self.switched = True

    def abandon(self) -> None:
        self.abandoned = True


@pytest.mark.parametrize("others_have", ["the old", "the new", "the new, this one too"])
def test_a_round_that_others_have_switched_is_switched_and_what_else_moves_is_dropped(
    others_have: str,
) -> None:
    old = Placement(np.array([[0, 1, 0, 1]]), 2, 3)
    new = Placement(np.array([[1, 1, 0, 0]]), 2, 4)
    mine = new if others_have.endswith("too") else old
    theirs = old if others_have == "the old" else new
    moving = Moving(None if mine is new else new)
    told: list[tuple[int, ...]] = []

    def gather(values: tuple[int, ...]) -> list[list[int]]:
        told.append(values)
        return [list(values), [9, 0, fingerprint(theirs), 0]]

    world = SimpleNamespace(all_gather_ints=gather)
    runner = SimpleNamespace(placement=mine, mesh=SimpleNamespace(world=world))
    rank = SimpleNamespace(steps=8, runner=runner, migrator=moving)
    assert survival()._reconcile(cast(Any, rank)) == 9, (
        "the other has finished a step that this one runs again"
    )
    assert told == [(8, 0, fingerprint(mine), moving.ready_for())]
    assert moving.switched == (others_have == "the new") and moving.abandoned


def test_two_losses_leave_the_same_bits_whether_heard_of_together_or_not() -> None:
    random = np.random.default_rng(0)
    slots = np.tile(np.arange(20) % 5, (3, 1))  # each expert on four of the five ranks
    share = random.random(slots.shape)
    share /= np.array([[row[slots[0] == expert].sum() for expert in slots[0]] for row in share])
    start = (Placement(slots, 5, 3, share), Topology(5, slots_per_rank=4))
    ranks = [0, 1, 2, 3, 4]

    def others() -> Survival:
        one = survival()
        one._ranks = list(ranks)
        return one

    together = others()._without(*start, [3, 0])
    early = others()
    first = early._without(*start, [3])
    early._ranks, early._num_lost = [0, 1, 2, 4], 1
    assert early._without(*first, [3, 0]) == together
    assert together[0].generation == 5 and together[1].num_ranks == 3
    assert np.array_equal(together[0].slot_to_expert, slots[:, [*range(4, 12), *range(16, 20)]])
