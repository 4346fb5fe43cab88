"""The online balancer against ranks that obey, fail, disagree or fall silent; time stands still in between."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from moeserve.eplb import solve
from moeserve.eplb.migration import plan_migration
from moeserve.eplb.rebalancer import Decision, Settings
from moeserve.eplb.service import Answer, RebalanceService
from moeserve.eplb.types import Placement
from moeserve.messages import LayersSwitched
from moeserve.online.balancer import RESUMES, SILENCE_SECONDS, Busy, OnlineBalancer
from moeserve.online.records import KEPT, KEPT_TABLES
from tests.online.fakes import EXPERT_BYTES, EXPERTS, LAYERS, SLOTS, STEPS, TOPOLOGY, Engine, skewed


def settle(engine: Engine, hot: int = 0, windows: int = 12) -> None:
    for seed in range(windows):
        engine.window(skewed(hot, seed=seed))


def carry_out(engine: Engine) -> None:
    """What was ordered, and nothing that this gives rise to."""
    for order in engine.online.take_orders():
        for answer in engine.ranks.carry_out(order):
            engine.online.handle(answer)


def test_skewed_traffic_is_balanced_and_what_it_took_is_kept() -> None:
    engine = Engine()
    engine.window(skewed(0, seed=100))
    start = engine.balance.imbalance()["decode"].mean
    settle(engine)
    status = engine.balance.status()
    assert start > 1.25 and status["imbalance"]["decode"]["mean"] < 1.1
    assert status["state"] == "idle" and status["migration"] is None
    assert status["digest"] == engine.ranks.placement.digest
    assert set(engine.balance.generations.values()) == {status["generation"]}
    applied = [record for record in status["rebalances"] if record["result"] == "applied"]
    first, last = applied[-1], applied[0]
    assert last["generation"] == status["generation"] == len(engine.ranks.orders)
    assert first["before"] > first["predicted"] and first["trigger"] == "periodic"
    assert abs(first["after"] - first["predicted"]) < 0.25 and first["after"] < start
    assert sum(record["moves"] for record in applied) == engine.moves() > 0
    assert sum(record["bytes"] for record in applied) == engine.moves() * EXPERT_BYTES
    assert engine.online.ledger.slots == engine.moves()
    # what came from a rank's own slots took no link
    between = sum(
        EXPERT_BYTES
        for order in engine.ranks.orders
        for layer in order.layers
        for source, target in layer.moves
        if source // 5 != target // 5
    )
    assert sum(record["bytes_by_link"]["intra_node"] for record in applied) == between
    assert sum(np.sum(record["rank_bytes"]) for record in applied) == between
    assert all(record["net_seconds"] is not None for record in applied if record["moves"])


def test_steady_traffic_is_left_alone_and_alternating_traffic_causes_no_back_and_forth() -> None:
    engine = Engine()
    settle(engine, windows=16)
    moved, orders = engine.moves(), len(engine.ranks.orders)
    for seed in range(200, 240):
        engine.window(skewed(0, seed=seed))
    assert engine.moves() == moved and len(engine.ranks.orders) == orders
    for turn in range(40):
        engine.window(skewed(8 * (turn % 2), seed=300 + turn))
    both = engine.moves()
    for turn in range(40):
        engine.window(skewed(8 * (turn % 2), seed=400 + turn))
    assert engine.moves() - both <= LAYERS


def decided(engine: Engine, target: Placement, routes: Placement | None) -> None:
    """The solver's next answer, whatever it thinks itself, and what comes of it."""
    plan, first = (
        None if to is None else plan_migration(engine.balance.placement, to, TOPOLOGY)
        for to in (target, routes)
    )
    engine.solver.instead = [Answer(Decision(plan, "so", 1.5, 1.1, routes=first), 0.0)]
    engine.window(skewed(0))


def test_routes_come_before_weights() -> None:
    """Replicas help at once when they are given their part; only then weights travel."""
    engine = Engine()
    start, wanted = engine.balance.placement, solve(skewed(0), TOPOLOGY)
    share = start.share.copy()
    share[:, [0, 16]] = [0.25, 0.75]  # expert 0 stands in both
    routes = Placement(start.slot_to_expert, EXPERTS, share=share)
    decided(engine, wanted, routes)
    first, second = engine.ranks.orders[:2]
    assert not any(layer.moves for layer in first.layers) and any(layer.moves for layer in second.layers)
    assert first.digest == routes.digest == second.old_digest and second.digest == wanted.digest
    assert engine.online.ledger.results["periodic", "applied"] == 1
    assert engine.balance.status()["rebalances"][-1]["generation"] == 2


def test_the_same_windows_are_asked_again_until_nothing_is_left_to_gain() -> None:
    engine = Engine(max_moves_per_layer=2)
    for seed in range(2):
        engine.window(skewed(0, seed=seed))
    assert len(engine.ranks.orders) > 2 and engine.online.state == "idle"
    assert all(len(layer.moves) <= 2 for order in engine.ranks.orders for layer in order.layers)
    assert engine.balance.imbalance()["decode"].mean < 1.2


def test_the_worst_layers_move_first() -> None:
    engine = Engine()
    load = skewed(0)
    load[0] = 400  # no matter where its experts stand
    load[2] = np.where(np.arange(EXPERTS) < 4, 2000, 40)
    engine.solver.instead = [Answer(Decision(None, "first", 1.5, 1.5), 0.0)]
    engine.window(load)
    plan = plan_migration(engine.balance.placement, solve(load, TOPOLOGY, routing="even"), TOPOLOGY)
    engine.solver.instead = [Answer(Decision(plan, "so", 1.5, 1.1), 0.0)]
    engine.window(load)
    assert [layer.layer for layer in engine.ranks.orders[0].layers][:2] == [2, 1]


def test_every_reason_to_skip_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    flat = np.full((LAYERS, EXPERTS), 400)
    engine = Engine(solve(flat, TOPOLOGY))
    for _ in range(4):
        engine.window(flat)
    reasons = [record["reason"] for record in engine.balance.status()["rebalances"]]
    assert "1 of 2 windows observed" in reasons and not engine.ranks.orders
    assert sum("rebalance (periodic) skipped" in line for line in caplog.messages) == 2  # not one a window

    dear = Engine(routing="even")
    dear.balance.expert_bytes = 10**15
    for seed in range(3):
        dear.window(skewed(0, seed=seed))
    (record, *_) = dear.balance.status()["rebalances"]
    assert record["result"] == "skipped" and "moves cost" in record["reason"] and not dear.ranks.orders
    dear.online.rebalance()  # asked for, it is done whatever it costs
    dear.run()
    assert dear.ranks.orders and dear.online.ledger.results["requested", "applied"] == 1


def test_costs_are_measured() -> None:
    engine = Engine()
    settle(engine, windows=6)
    first, last = engine.solver.costs[0], engine.solver.costs[-1]
    assert first is not None and last is not None
    assert first.step_seconds == pytest.approx(0.5 / STEPS, rel=0.2) and first.horizon_steps == 16 * STEPS
    assert first.bytes_per_second == 1e9
    assert last.bytes_per_second < 1e5 and last.stall_part == pytest.approx(0.03 / 0.5)


def test_paused_it_decides_nothing_but_does_what_it_is_told() -> None:
    engine = Engine()
    engine.online.pause()
    settle(engine, windows=4)
    assert engine.online.state == "paused" and not engine.ranks.orders and not engine.solver.costs
    engine.online.rebalance()
    engine.run()
    assert engine.ranks.orders and engine.online.state == "paused"
    orders = len(engine.ranks.orders)
    engine.online.resume()
    settle(engine, hot=8, windows=4)
    assert len(engine.ranks.orders) > orders


def test_what_a_failed_order_has_left_is_ordered_again() -> None:
    engine = Engine(routing="even")
    engine.window(skewed(0))
    engine.ranks.fail_after = 1
    engine.window(skewed(0, seed=1))
    (order,) = engine.ranks.orders
    wanted = {layer.layer: layer.slot_to_expert for layer in order.layers}
    done = order.layers[0].layer
    status = engine.balance.status()
    assert status["rebalances"][0]["result"] == "failed"
    assert f"1 of {len(wanted)} layers done" in status["rebalances"][0]["reason"]
    assert "a checksum is wrong" in status["rebalances"][0]["reason"]
    assert status["digest"] == engine.ranks.placement.digest and status["generation"] == 0
    assert status["state"] == "idle"

    engine.ranks.fail_after = None
    engine.count(skewed(0, seed=2))
    carry_out(engine)
    again = engine.ranks.orders[1]
    assert {layer.layer for layer in again.layers} == set(wanted) - {done}
    assert engine.ranks.placement.slot_to_expert.tolist() == [wanted[layer] for layer in range(LAYERS)]
    assert engine.balance.placement == engine.ranks.placement and again.generation == 2
    assert engine.balance.status()["rebalances"][0]["trigger"] == "resume"


def test_after_failure_upon_failure_it_waits_longer_and_longer() -> None:
    engine = Engine(routing="even")
    engine.ranks.fail_after = 0
    settle(engine, windows=40)
    orders = len(engine.ranks.orders)
    assert RESUMES < orders <= 7
    assert engine.online.state == "idle" and engine.balance.placement.generation == 0
    engine.ranks.fail_after = None
    engine.online.resume()  # a person who has mended it need not wait
    settle(engine, windows=2)
    assert engine.balance.placement.generation > 0


def test_silent_ranks_are_told_and_taken_back_when_they_speak() -> None:
    engine = Engine(routing="even")
    engine.window(skewed(0))
    engine.ranks.silent = True
    engine.window(skewed(0, seed=1))
    assert engine.online.state == "migrating" and not engine.online.trouble
    with pytest.raises(Busy, match="migration 1 is under way"):
        engine.online.rebalance()
    engine.now += SILENCE_SECONDS + 1
    engine.run()
    assert engine.online.state == "dead" and "no sign of life in migration 1" in engine.online.trouble
    assert "no sign of life from the ranks for 61 s" in engine.balance.status()["rebalances"][0]["reason"]
    settle(engine, windows=4)
    assert len(engine.ranks.orders) == 1  # never two orders at a time
    engine.online.pause()

    order = engine.ranks.orders[0]
    engine.online.handle(LayersSwitched(0, order.order, []))
    assert engine.online.state == "migrating" and not engine.online.trouble
    engine.ranks.silent, engine.ranks.placement = False, Placement.identity(LAYERS, EXPERTS, SLOTS)
    for answer in engine.ranks.carry_out(order):
        engine.online.handle(answer)
    assert engine.online.state == "paused" and engine.balance.placement == engine.ranks.placement
    assert "later applied" in engine.balance.status()["rebalances"][0]["reason"]


def test_a_slow_rate_is_no_silence() -> None:
    engine = Engine(routing="even")
    engine.online.settings = replace(engine.online.settings, bytes_per_second=1000.0)
    engine.balance.expert_bytes = 50_000  # 50 s a move
    engine.ranks.silent = True
    engine.online.apply(engine.online.plan(solve(skewed(0), TOPOLOGY)))
    engine.run()
    most = max(len(layer.moves) for layer in engine.ranks.orders[0].layers)
    engine.now += most * 2 * 50 + SILENCE_SECONDS - 1
    engine.run()
    assert engine.online.state == "migrating"
    engine.now += 2
    engine.run()
    assert engine.online.state == "dead"


def test_resume_waits_for_ranks_that_owe_an_answer() -> None:
    engine = Engine()
    engine.ranks.silent = True
    settle(engine, windows=3)
    engine.now += SILENCE_SECONDS + 1
    engine.online.tick()
    with pytest.raises(Busy, match="no sign of life in migration 1; it goes on by itself"):
        engine.online.resume()


def test_one_decision_at_a_time_is_asked_for() -> None:
    engine = Engine()
    settle(engine)
    engine.solver.mute = True
    engine.online.rebalance()
    with pytest.raises(Busy, match="is being made"):
        engine.online.rebalance()
    engine.solver.mute = False
    engine.run()
    engine.online.rebalance()


def test_a_placement_given_before_any_traffic_is_measured_with_the_first() -> None:
    engine = Engine()
    plan = engine.online.plan(solve(skewed(0), TOPOLOGY))
    engine.online.apply(plan)
    engine.run()
    settle(engine, windows=3)
    record = next(r for r in engine.online.history() if r["trigger"] == "placement")
    assert record["phase"] == "decode" and record["after"] is not None and record["after"] < 1.2


def test_a_single_silent_rank_is_named() -> None:
    engine = Engine(routing="even")
    engine.window(skewed(0))
    engine.count(skewed(0, seed=1))
    engine.online.tick()
    (order,) = engine.online.take_orders()
    for answer in engine.ranks.carry_out(order)[:-1]:
        engine.online.handle(answer)
    engine.now += SILENCE_SECONDS + 1
    engine.online.tick()
    assert "from ranks [3]" in engine.balance.status()["rebalances"][0]["reason"]


def test_ranks_that_disagree_end_the_balancing() -> None:
    engine = Engine(routing="even")
    engine.ranks.astray = 2
    settle(engine, windows=6)
    assert engine.online.state == "dead" and "rank 2 000000000000" in engine.online.trouble
    assert len(engine.ranks.orders) == 1


def test_a_mistake_of_the_balancer_ends_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine()
    engine.solver.observe = lambda *_, **__: 1 / 0  # type: ignore[method-assign,assignment]
    engine.window(skewed(0))
    assert engine.online.state == "dead" and "ZeroDivisionError" in engine.online.trouble
    assert "balancing failed" in caplog.messages
    assert engine.balance.imbalance()["decode"].mean > 1.25


def test_a_solver_s_error_is_a_failed_decision() -> None:
    engine = Engine()
    engine.window(skewed(0))
    engine.solver.instead = [Answer(None, 0.0, "Traceback\n  File x\nValueError: no such thing\n")]
    engine.window(skewed(0, seed=1))
    (record, *_) = engine.balance.status()["rebalances"]
    assert (record["result"], record["reason"]) == ("failed", "ValueError: no such thing")
    engine.window(skewed(0, seed=2))
    assert engine.ranks.orders


def test_a_given_placement_comes_into_force_with_its_digest() -> None:
    engine = Engine()
    engine.count(skewed(0))
    given = solve(skewed(0), TOPOLOGY)
    # a share that differs by less than moves are planned for, but not less than the digest tells
    order = engine.online.apply(engine.online.plan(given), predicted=1.01)
    with pytest.raises(Busy):
        engine.online.apply(engine.online.plan(given))
    engine.run()
    assert order == 1 and engine.ranks.placement.digest == given.digest == engine.balance.placement.digest
    status = engine.balance.status()
    assert (status["rebalances"][0]["trigger"], status["rebalances"][0]["predicted"]) == ("placement", 1.01)
    assert status["imbalance"]["decode"]["predicted"] == 1.01
    assert engine.online.apply(engine.online.plan(given)) is None
    stale = engine.online.plan(Placement.identity(LAYERS, EXPERTS, SLOTS))
    engine.online.apply(engine.online.plan(solve(skewed(8), TOPOLOGY)))
    engine.run()
    with pytest.raises(Busy, match="came into force meanwhile"):
        engine.online.apply(stale)


def test_the_list_of_rebalances_is_bounded() -> None:
    engine = Engine()
    engine.online.pause()
    for number in range(KEPT + 10):
        engine.online.apply(engine.online.plan(solve(skewed(8 * (number % 2)), TOPOLOGY)))
        engine.run()
    records = engine.balance.status()["rebalances"]
    assert len(records) == KEPT and engine.online.ledger.results["placement", "applied"] == KEPT + 10
    assert sum(record["rank_bytes"] is not None for record in records) == KEPT_TABLES
    assert records[0]["rank_bytes"] is not None and records[0]["generation"] == KEPT + 10


def test_a_decision_that_comes_too_late_is_dropped() -> None:
    engine = Engine()
    engine.window(skewed(0))
    engine.solver.mute = True
    engine.window(skewed(0, seed=1))
    assert engine.online.state == "solving"
    engine.online.apply(engine.online.plan(solve(skewed(8), TOPOLOGY)))
    engine.run()
    engine.solver.mute = False
    engine.run()
    assert len(engine.ranks.orders) == 1
    assert "another placement came into force" in engine.balance.status()["rebalances"][0]["reason"]


def test_shares_are_not_taken_over_where_routing_is_even() -> None:
    engine = Engine(routing="even")
    plan = engine.online.plan(solve(skewed(0), TOPOLOGY))
    assert np.array_equal(plan.new.share, plan.new.even_share)


def test_decode_and_prefill_are_never_mixed() -> None:
    engine = Engine()
    idle = np.zeros((LAYERS, EXPERTS), np.int64)
    engine.window(skewed(0), prefill=skewed(8))
    assert np.array_equal(engine.solver.rebalancer.windows[-1], skewed(0))
    engine.window(idle, prefill=skewed(8))
    assert len(engine.solver.rebalancer.windows) == 1  # a gap between answers is no change of work
    engine.window(idle, prefill=skewed(8, seed=1))
    assert [w.tolist() for w in engine.solver.rebalancer.windows] == [skewed(8, seed=1).tolist()]
    engine.window(idle)
    engine.window(skewed(4))
    assert [w.tolist() for w in engine.solver.rebalancer.windows] == [skewed(4).tolist()]
    assert engine.solver.forgot == 3


def test_step_routing_is_judged_by_what_was_measured() -> None:
    engine = Engine(routing="step")
    settle(engine, windows=3)
    assert engine.balance.status()["routing"] == "step" and engine.moves()
    assert all(
        record["before"] for record in engine.balance.status()["rebalances"] if record["result"] == "applied"
    )


@pytest.fixture
def with_process() -> Callable[[int], tuple[Engine, OnlineBalancer]]:
    def start(restarts: int) -> tuple[Engine, OnlineBalancer]:
        engine = Engine()

        def service(placement: Placement) -> RebalanceService:
            return RebalanceService(placement, TOPOLOGY, Settings(), max_restarts=restarts)

        online = OnlineBalancer(engine.balance, engine.online.settings, service)
        engine.balance.online = engine.online = online
        return engine, online

    return start


@pytest.mark.multi_rank
def test_a_solver_killed_mid_solve_leaves_the_placement_and_dies_only_for_good(
    with_process: Callable[[int], tuple[Engine, OnlineBalancer]],
) -> None:
    engine, online = with_process(1)
    solver = online._solver
    assert isinstance(solver, RebalanceService)
    try:
        placement, former = engine.balance.placement, None
        for attempt in range(2):
            online._wait = 0
            engine.count(skewed(0, seed=attempt))
            assert online.state == "solving"
            wait(lambda: solver.pid not in (None, former))  # noqa: B023
            former = solver.pid
            assert former is not None
            os.kill(former, signal.SIGKILL)  # it has its question, and needs longer than this to begin
            wait(lambda: (online.tick(), not online._asked)[-1])
            assert engine.balance.placement is placement
            assert online.state == ("idle" if attempt == 0 else "dead")
        assert "crashed too often" in online.trouble
        failed = [record for record in engine.balance.status()["rebalances"] if record["result"] == "failed"]
        assert len(failed) == 2
        engine.count(skewed(0, seed=9))
        with pytest.raises(Busy, match="dead"):
            online.rebalance()
        online.resume()
        assert online.state == "idle"
        online.rebalance()
        wait(lambda: (engine.run(), engine.ranks.orders)[-1])
        assert engine.balance.placement.generation > 0
    finally:
        online.close()


def wait(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
