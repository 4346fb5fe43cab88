"""Which ranks take part in a one-sided all-to-all after faults: the host's side, between steps. Knows no memory.

HEALTHY -> a wait found a rank late -> FAULT -> reconcile: everyone there votes, one decision counts -> DEGRADED, or
HEALTHY again if all ranks are in. Steady state reads one list and one key. The votes travel through a store that
outlives the ranks (torch's TCPStore in the process that launches them), not through memory or groups of the ranks.
"""

from __future__ import annotations

import enum
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

POLL_SECONDS = 0.01


class State(enum.Enum):
    HEALTHY = "healthy"
    FAULT = "fault"
    DEGRADED = "degraded"


class Store(Protocol):
    """What torch.distributed's stores offer."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...

    def compare_set(self, key: str, expected: str, desired: str) -> bytes: ...


class Engine(Protocol):
    """One rank's engine, of whatever device."""

    @property
    def epoch(self) -> int: ...

    @property
    def generation(self) -> int: ...

    def late_at(self) -> dict[int, int]:
        """Members found late since the last set_membership, with the epoch in which they were."""
        ...

    def set_membership(self, members: Sequence[bool], generation: int, epoch: int) -> None: ...


@dataclass(frozen=True)
class Vote:
    """What one rank knows. epoch: its last step, finished; late: ranks it waited for in vain, and in which epoch."""

    epoch: int
    late: Mapping[int, int]


@dataclass(frozen=True)
class Decision:
    """What holds from the next step on: the same on every member. epoch: above any member's last step."""

    members: tuple[bool, ...]
    epoch: int


def decide(votes: Mapping[int, Vote], world: int) -> Decision:
    """The members that can go on together: voters none of whom another one misses.

    Who did not vote is out. That somebody was missed in a step that he never began, as he was voting by then,
    counts nothing. While some voter misses another, the one whom most miss goes, and his vote with him: a rank that
    slept and misses everybody does not take them along. Among equals goes who misses more, then the higher number.
    """
    members = set(votes)
    missed = {
        (voter, rank)
        for voter, vote in votes.items()
        for rank, epoch in vote.late.items()
        if rank in votes and rank != voter and epoch <= votes[rank].epoch
    }
    while missed:
        by, of = Counter(voter for voter, _ in missed), Counter(rank for _, rank in missed)
        worst = max(members, key=lambda rank: (of[rank], by[rank], rank))
        members.remove(worst)
        missed = {pair for pair in missed if worst not in pair}
    epoch = max((vote.epoch for vote in votes.values()), default=0) + 1
    return Decision(tuple(rank in members for rank in range(world)), epoch)


class Membership:
    """One rank's part. Used between steps by the thread that drives the engine.

    patience: seconds to wait for the votes of the others; longer than the engine's own deadline, so that ranks that
    still wait for us inside a step find that out and come.
    """

    def __init__(self, engine: Engine, store: Store, rank: int, world: int, patience: float) -> None:
        self._engine, self._store, self._patience = engine, store, patience
        self._rank, self._world = rank, world
        self._members = [True] * world

    @property
    def members(self) -> list[bool]:
        return list(self._members)

    @property
    def state(self) -> State:
        if self._engine.late_at():
            return State.FAULT
        return State.HEALTHY if all(self._members) else State.DEGRADED

    @property
    def called(self) -> bool:
        """Whether this rank should reconcile: it found a fault itself, or another member called for it."""
        return self.state is State.FAULT or self._store.check([self._key("call")])

    def reconcile(self) -> Decision:
        """Votes, waits for the others and takes the decision. Every member that lives calls it, between two steps.

        A member whose vote comes too late, or whom the others miss, is out: the engine's set_membership raises.
        """
        engine = self._engine
        self._store.set(self._key("call"), "1")
        vote = Vote(engine.epoch, engine.late_at())
        self._store.set(self._key(f"vote/{self._rank}"), json.dumps(asdict(vote)))
        decision = self._await_decision()
        self._members = list(decision.members)
        engine.set_membership(decision.members, engine.generation + 1, decision.epoch)
        return decision

    def _await_decision(self) -> Decision:
        """Another's decision, or our own if it is the first: one for all, whoever waited how long for whom."""
        key = self._key("decision")
        deadline = time.monotonic() + self._patience
        while not self._store.check([key]):
            votes = self._votes()
            if len(votes) == sum(self._members) or time.monotonic() > deadline:
                text = json.dumps(asdict(decide(votes, self._world)))
                self._store.compare_set(key, "", text)
                break
            time.sleep(POLL_SECONDS)
        found = json.loads(self._store.get(key))
        return Decision(tuple(found["members"]), found["epoch"])

    def _votes(self) -> dict[int, Vote]:
        votes = {}
        for rank in (rank for rank in range(self._world) if self._members[rank]):
            key = self._key(f"vote/{rank}")
            if self._store.check([key]):
                found = json.loads(self._store.get(key))
                votes[rank] = Vote(found["epoch"], {int(r): e for r, e in found["late"].items()})
        return votes

    def _key(self, name: str) -> str:
        return f"membership/{self._engine.generation + 1}/{name}"
