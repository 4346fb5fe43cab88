"""The front-end's part in the loss of a rank: who hears of it, where requests go on, what is shown."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest

from moeserve.eplb.loss import without_rank
from moeserve.eplb.types import Placement, Topology
from moeserve.expert_balance import ExpertBalance
from moeserve.messages import (
    AbortRequest,
    AddRequest,
    EngineStats,
    ExpertCounts,
    FromRank,
    Migrate,
    RankFailed,
    RankLeft,
    RankReady,
    Rejoin,
    Rejoined,
    SamplingParams,
    SequenceOutput,
    Shutdown,
    StepDone,
    ToRank,
)
from moeserve.server.frontend import Frontend
from moeserve.server.settings import ServerSettings
from moeserve.text import Tokenizer

TWICE = Placement(np.array([[0, 1, 2, 0, 1, 2, 3, 3]]), 4)  # four ranks; expert 3 on the last alone
SAFE = Placement(np.array([[0, 1, 2, 3, 0, 1, 2, 3]]), 4)  # ranks 0 and 2 hold the same, 1 and 3 too
STATS = EngineStats(3, 1, 0, 5, 100, 7, 2, 0, 0)


class Link:
    """Ranks that say what the test has them say."""

    num_replicas = 4

    def __init__(self) -> None:
        self.sent: list[tuple[int, ToRank]] = []
        self.lost: list[int] = []

    async def send(self, replica: int, message: ToRank) -> None:
        self.sent.append((replica, message))

    async def receive(self) -> tuple[int, FromRank]:
        await asyncio.Event().wait()
        raise AssertionError

    def lose(self, rank: int) -> None:
        self.lost.append(rank)

    def meeting_place(self) -> tuple[str, int]:
        return "127.0.0.1", 1234


class Engine:
    """A front-end whose mail is delivered at once."""

    def __init__(self, tokenizer: Tokenizer, placement: Placement = SAFE, survive: bool = True) -> None:
        self.link = Link()
        topology = Topology.of(4, placement.num_slots)
        self.balance = ExpertBalance(placement, topology, layers=(0,), model="m", top_k=1, expert_groups=1)
        settings = ServerSettings("m", 1024, 8, 4, survive_rank_loss=survive)
        self.frontend = Frontend(self.link, tokenizer, settings, self.balance)

    def ready(self) -> None:
        for rank in range(4):
            self.frontend.handle(rank, RankReady(rank, 1, 1000, 1024, 0))

    def fail(self, rank: int) -> None:
        self.frontend.handle(rank, RankFailed(rank, 0.0, f"rank {rank} was killed"))

    def say(self, rank: int, name: str, *tokens: int) -> None:
        self.frontend.handle(rank, StepDone(rank, [SequenceOutput(name, list(tokens))], STATS))

    def sent(self) -> list[tuple[int, ToRank]]:
        posted = list(self.frontend._outbox)
        self.frontend._outbox.clear()
        return posted

    def rejoined(self, rank: int, number: int, placement: Placement) -> None:
        slots, share = placement.slot_to_expert.tolist(), placement.share.tolist()
        told = Rejoined(rank, number, placement.generation, placement.digest, slots, share)
        self.frontend.handle(rank, told)


def submit(engine: Engine, count: int) -> list[str]:
    """Requests of one sequence each, dealt to the replicas in turn; their names."""
    params = SamplingParams(max_tokens=9)
    generations = [engine.frontend.submit([[5, 6]], params) for _ in range(count)]
    return [generation.sequences[0].name for generation in generations]


def meet(engine: Engine, ranks: Sequence[int]) -> list[tuple[int, Rejoin]]:
    for rank in ranks:
        engine.frontend.handle(rank, RankLeft(rank))
    return [(rank, message) for rank, message in engine.sent() if isinstance(message, Rejoin)]


def test_the_others_meet_and_go_on(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        engine = Engine(tokenizer)
        engine.ready()
        frontend = engine.frontend
        names = submit(engine, 6)  # replicas 0 1 2 3 0 1
        sequences = dict(frontend._sequences)
        for name in names[:2]:
            engine.say(sequences[name].replica, name, 7)
        engine.sent()
        engine.fail(0)
        assert engine.link.lost == [0] and not frontend.dead.is_set()
        begun, waiting = sequences[names[0]], sequences[names[4]]
        assert begun.generation.error is not None and begun.generation.error.code == "rank_lost"
        assert begun.generation.error.status == 503
        assert frontend.loads.tokens[0] == 0 and frontend.in_flight == 5
        moved = [(r, m) for r, m in engine.sent() if isinstance(m, AddRequest)]
        assert [(r, m.request_id) for r, m in moved] == [(waiting.replica, names[4])] and waiting.replica
        engine.say(0, names[4], 9)  # what was on its way: the replica that has it now says it again
        assert waiting.num_generated == 0
        assert frontend.readiness() == (True, "degraded", "lost ranks [0]: 3 of 4 serve")
        assert 0 not in frontend.heartbeat_ages()

        told = meet(engine, (1, 2, 3))
        assert [rank for rank, _ in told] == [1, 2, 3]
        assert told[0][1] == Rejoin(1, [1, 2, 3], [0], "127.0.0.1", 1234)
        left, topology = without_rank(SAFE, Topology.of(4, 8), 0)
        for rank in (1, 2, 3):
            engine.rejoined(rank, 1, left)
        assert engine.balance.topology == topology and engine.balance.placement == left
        assert engine.balance.generations == {1: 1, 2: 1, 3: 1} and engine.balance.rank_names == [1, 2, 3]
        assert engine.balance.status()["ep_size"] == 3 and not engine.balance.status()["survives_rank_loss"]
        assert all(replica for replica, _ in (frontend.loads.add(1, 1) for _ in range(9)))
        assert [r for r, m in engine.sent() if isinstance(m, AbortRequest)] == []

    asyncio.run(main())


def test_a_second_loss_shrinks_again_as_long_as_every_expert_lives(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        engine = Engine(tokenizer)
        engine.ready()
        engine.fail(0)
        first = meet(engine, (1, 2, 3))
        engine.fail(3)  # before they had met
        assert {(*message.ranks, *message.lost) for _, message in first} == {(1, 2, 3, 0)}
        told = meet(engine, (1, 2))
        assert [(rank, message.lost) for rank, message in told] == [(1, [0, 3]), (2, [0, 3])]
        left = without_rank(SAFE, Topology.of(4, 8), 0)
        left = without_rank(*left, 2)
        engine.rejoined(2, 2, left[0])
        engine.rejoined(1, 2, left[0])
        assert engine.balance.rank_names == [1, 2] and not engine.frontend.dead.is_set()
        engine.fail(2)  # rank 1 has half of the experts
        assert engine.frontend.dead.is_set() and engine.frontend.failure == "rank 2 was killed"
        assert engine.frontend.readiness()[:2] == (False, "dead")

    asyncio.run(main())


class Orders:
    """A balancer that orders something at each tick."""

    def __init__(self) -> None:
        self.waiting: list[Migrate] = []
        self.orders = 0

    def tick(self) -> None:
        self.orders += 1
        self.waiting.append(Migrate(self.orders, 0, "", 1, "", [], 1))

    def take_orders(self) -> list[Migrate]:
        waiting, self.waiting = self.waiting, []
        return waiting

    def regroup(self, why: str) -> None:
        self.waiting.clear()


def test_nothing_is_ordered_between_a_loss_and_the_meeting(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        engine = Engine(tokenizer)
        engine.balance.online = online = Orders()  # type: ignore[assignment]
        engine.ready()
        carrying = asyncio.create_task(engine.frontend._carry_orders())

        async def ordered() -> list[tuple[int, int]]:
            begun = online.orders
            while online.orders < begun + 2:
                await asyncio.sleep(0.01)
            return [(rank, m.order) for rank, m in engine.sent() if isinstance(m, Migrate)]

        assert {rank for rank, _ in await ordered()} == {0, 1, 2, 3}
        engine.fail(0)
        engine.sent()
        assert not await ordered()
        meet(engine, (1, 2, 3))
        assert not await ordered()
        stale = online.orders
        engine.rejoined(1, 1, without_rank(SAFE, Topology.of(4, 8), 0)[0])
        after = await ordered()
        assert {rank for rank, _ in after} == {1, 2, 3} and min(order for _, order in after) > stale
        carrying.cancel()

    asyncio.run(main())


def test_counts_by_the_old_slots_and_by_the_new_do_not_mix(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        engine = Engine(tokenizer)
        engine.ready()
        data = np.ones((2, 1, 4), "<u4").tobytes()

        def report(rank: int, slots: int) -> None:
            given = np.ones((2, 1, slots), "<u4").tobytes()
            engine.frontend.handle(rank, ExpertCounts(rank, 5, 5, 1.0, (4, 4), data, given))

        for rank in range(4):
            report(rank, 8)
        before = engine.balance.rank_tokens()
        engine.fail(1)
        meet(engine, (0, 2, 3))
        left, _ = without_rank(SAFE, Topology.of(4, 8), 1)
        engine.rejoined(0, 1, left)
        assert np.array_equal(engine.balance.rank_tokens(), np.delete(before, 1, axis=1))
        assert engine.balance.imbalance()["decode"].measured_mean is None
        for rank in (0, 2, 3):
            report(rank, 6)
        assert engine.balance.imbalance()["decode"].steps == 5
        load = engine.balance.expert_load()
        assert load is not None and load.load.sum() == 2 * 4 * 7

    asyncio.run(main())


@pytest.mark.parametrize("case", ["fail", "loading", "mistake", "the only place"])
def test_else_the_engine_ends_as_ever(tokenizer: Tokenizer, case: str) -> None:
    async def main() -> None:
        placement = TWICE if case == "the only place" else SAFE
        engine = Engine(tokenizer, placement, survive=case != "fail")
        if case != "loading":
            engine.ready()
        engine.frontend.handle(3, RankFailed(3, 0.0, "why", mistake=case == "mistake"))
        assert engine.frontend.dead.is_set() and engine.frontend.failure == "why"
        assert engine.link.lost == []

    asyncio.run(main())


def test_ranks_that_follow_another_placement_end_it(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        engine = Engine(tokenizer)
        engine.ready()
        engine.fail(0)
        meet(engine, (1, 2, 3))
        left, _ = without_rank(SAFE, Topology.of(4, 8), 0)
        engine.rejoined(1, 1, left)
        engine.rejoined(2, 1, Placement(np.roll(left.slot_to_expert, 1), 4, left.generation))
        assert engine.frontend.dead.is_set() and "not as the others" in (engine.frontend.failure or "")

    asyncio.run(main())


def test_nothing_is_sent_to_a_lost_replica(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        engine = Engine(tokenizer)
        engine.ready()
        engine.fail(2)
        engine.sent()
        engine.frontend._post(2, Shutdown())
        submit(engine, 5)
        assert 2 not in [replica for replica, _ in engine.sent()]

    asyncio.run(main())
