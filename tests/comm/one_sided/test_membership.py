"""Who goes on after a fault: the rule by itself, and ranks as threads over one store."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from moeserve.comm.all_to_all.one_sided.cpu_engine import Evicted
from moeserve.comm.all_to_all.one_sided.membership import Decision, Membership, State, Vote, decide


@dataclass
class Engine:
    """What Membership sees of one."""

    rank: int
    epoch: int
    late: dict[int, int] = field(default_factory=dict)
    generation: int = 0
    members: Sequence[bool] = ()

    def late_at(self) -> dict[int, int]:
        return self.late

    def set_membership(self, members: Sequence[bool], generation: int, epoch: int) -> None:
        if not members[self.rank]:
            raise Evicted(f"rank {self.rank}")
        self.members, self.generation, self.epoch, self.late = members, generation, epoch, {}


def members(*votes: Vote | None) -> list[int]:
    found = decide({r: v for r, v in enumerate(votes) if v is not None}, len(votes)).members
    return [rank for rank, member in enumerate(found) if member]


def test_a_dead_rank_is_out() -> None:
    assert members(Vote(5, {1: 5}), None, Vote(5, {1: 5}), Vote(5, {})) == [0, 2, 3]


def test_a_sleeper_that_misses_everybody_goes_alone() -> None:
    assert members(Vote(9, {1: 9}), Vote(9, {0: 9, 2: 9}), Vote(9, {})) == [0, 2]
    assert members(Vote(9, {2: 9}), Vote(9, {2: 9}), Vote(9, {0: 9, 1: 9})) == [0, 1]


def test_who_came_to_vote_was_not_late_in_the_step_that_others_began() -> None:
    assert members(Vote(5, {1: 5}), None, Vote(6, {0: 6, 1: 5})) == [0, 2]


def test_two_that_miss_each_other_cannot_both_stay() -> None:
    assert members(Vote(5, {1: 5}), Vote(5, {0: 5}), Vote(5, {})) == [0, 2]


@given(st.data())
def test_members_can_work_with_one_another(data: st.DataObject) -> None:
    world = data.draw(st.integers(1, 6))
    ranks = st.integers(0, world - 1)
    vote = st.builds(Vote, st.integers(1, 9), st.dictionaries(ranks, st.integers(1, 9), max_size=world))
    votes = data.draw(st.dictionaries(ranks, vote))
    decision = decide(votes, world)
    inside = [rank for rank in range(world) if decision.members[rank]]
    assert set(inside) <= set(votes)
    assert bool(inside) == bool(votes)
    for rank in inside:
        missed = votes[rank].late
        assert not any(other != rank and missed.get(other, 99) <= votes[other].epoch for other in inside)
    assert all(decision.epoch > vote.epoch for vote in votes.values())
    if not any(vote.late for vote in votes.values()):
        assert inside == sorted(votes)


def run(engines: list[Engine], world: int, patience: float) -> list[Decision | BaseException]:
    """All of `engines` reconcile at once."""
    store = dist.HashStore()

    def play(engine: Engine) -> Decision | BaseException:
        member = Membership(engine, store, engine.rank, world, patience)
        try:
            return member.reconcile()
        except Evicted as error:
            return error

    with ThreadPoolExecutor(len(engines)) as threads:
        return list(threads.map(play, engines))


def test_survivors_take_one_decision() -> None:
    engines = [Engine(0, 7, {2: 7}), Engine(1, 8, {2: 7}), Engine(3, 7)]
    expected = Decision((True, True, False, True), 9)
    assert run(engines, 4, patience=0.5) == [expected] * 3
    assert [engine.generation for engine in engines] == [1] * 3
    assert [engine.epoch for engine in engines] == [9] * 3


def test_a_late_vote_changes_nothing_and_its_rank_stops() -> None:
    store = dist.HashStore()
    alone = Membership(Engine(0, 7, {1: 7}), store, 0, 2, patience=0.05)
    assert alone.called and alone.state is State.FAULT
    alone.reconcile()
    assert alone.state is State.DEGRADED and alone.members == [True, False] and not alone.called
    late = Membership(Engine(1, 7, {0: 7}), store, 1, 2, patience=0.05)
    assert late.called
    with pytest.raises(Evicted):
        late.reconcile()


def test_a_decision_that_came_first_counts_for_all() -> None:
    """Another rank, that knows of one vote more, is quicker by a moment."""

    class Raced(dist.HashStore):
        raced = False

        def check(self, keys: list[str]) -> bool:
            there: bool = super().check(keys)
            if keys[0].endswith("decision") and not self.raced:
                self.raced = True
                self.set(keys[0], json.dumps(asdict(Decision((True, True, False), 50))))
            return there

    member = Membership(Engine(0, 7, {2: 7}), Raced(), 0, 3, patience=0.0)
    assert member.reconcile() == Decision((True, True, False), 50)
    assert member.members == [True, True, False]


def test_a_call_reaches_who_saw_no_fault() -> None:
    store = dist.HashStore()
    healthy = Membership(Engine(1, 7), store, 1, 3, patience=5)
    assert not healthy.called and healthy.state is State.HEALTHY
    faulty = Membership(Engine(0, 7, {2: 7}), store, 0, 3, patience=0.5)
    thread = threading.Thread(target=faulty.reconcile)
    thread.start()
    while not healthy.called:
        pass
    healthy.reconcile()
    thread.join()
    assert healthy.members == faulty.members == [True, True, False]
