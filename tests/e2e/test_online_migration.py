"""Experts move while requests run: no token changes, and slots hold what a fresh start would have put there.

Whole engines step on a pool's ranks, from a script: requests and orders come at given steps, so a run without
migrations has the same batches as one with them.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from moeserve.comm.group import Group
from moeserve.comm.spawn import RankPool
from moeserve.comm.weight_mover import TransferError
from moeserve.comm.weight_mover.exchange import ExchangeMover
from moeserve.config import EMBEDDED_MODEL, EngineConfig, parse
from moeserve.engine.rank import Rank
from moeserve.engine.runner import Runner
from moeserve.eplb.migration import plan_migration
from moeserve.eplb.types import Placement, Topology
from moeserve.launch import RankPlace
from moeserve.messages import (
    AbortRequest,
    AddRequest,
    FromRank,
    LayerOrder,
    LayersSwitched,
    Migrate,
    Migrated,
    SamplingParams,
    Shutdown,
    StepDone,
    ToRank,
    encode,
)
from moeserve.moe import migrator as migrator_module
from moeserve.plan import EnginePlan, make_plan
from tests.models.conftest import make_model

GetPool = Callable[[int], RankPool]
pytestmark = pytest.mark.multi_rank

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp": {},
    "dp": {"enable_attention_dp": True},
    "etp": {"moe_tensor_parallel_size": 2, "moe_expert_parallel_size": 2},
    "dp etp": {
        "enable_attention_dp": True,
        "moe_tensor_parallel_size": 2,
        "moe_expert_parallel_size": 2,
    },
    "mixed": {"enable_attention_dp": True, "attention_tensor_parallel_size": 2},
    "etp alone": {"moe_tensor_parallel_size": 4},
    "dp, routed by step": {
        "enable_attention_dp": True,
        "moe_config": {"load_balancer": {"online": {"routing": "step"}}},
    },
}
SERVICE_PACE = {"agree_every": migrator_module.AGREE_EVERY, "bytes_per_second": None}
FAMILIES = {  # (layout, slots)
    "deepseek_v2": ("tp", 12),
    "deepseek_v2_groups": ("dp", 16),
    "deepseek_v3": ("dp etp", 10),
    "qwen3_moe": ("mixed", 12),
    "mixtral": ("etp", 6),
}


@dataclass
class Script:
    """What happens to an engine, step by step; the same on every rank.

    arrivals: (step, replica, request); aborts: (step, replica, request id). every: a new random placement is
    ordered so many steps after the last one is in force, 0: never. layers: that a random placement changes.
    """

    arrivals: list[tuple[int, int, AddRequest]]
    aborts: list[tuple[int, int, str]] = field(default_factory=list)
    every: int = 0
    layers_per_step: int = 4
    bytes_per_second: float | None = 1e10
    spoil: tuple[int, int] | None = None  # (order, rank): the first bytes that this rank gets in this order
    no_memory: bool = False  # instead of the wrong byte
    stop: tuple[int, int] | None = None  # (order, rank): this rank is stopped for a second once it has begun
    agree_every: int = 2  # more often than in service, for more orders in a short run
    most_steps: int = 4000

    @property
    def last_step(self) -> int:
        """At which something comes: orders come no later."""
        return max(event[0] for event in (*self.arrivals, *self.aborts))


@dataclass
class Outcome:
    tokens: dict[str, list[int]]
    answers: list[Migrated]
    switched: list[LayersSwitched]
    steps: int
    digest: str


class ScriptedMail:
    """Takes what the script brings at a step, keeps what the rank says."""

    def __init__(self) -> None:
        self.incoming: list[bytes] = []
        self.said: list[FromRank] = []

    def bring(self, message: ToRank) -> None:
        self.incoming.append(encode(message))

    def take(self, timeout: float) -> list[bytes]:
        taken, self.incoming = self.incoming, []
        return taken

    def send(self, message: FromRank) -> None:
        self.said.append(message)


def start_engine(rank: int, plan: EnginePlan, mail: ScriptedMail) -> Rank:
    size = plan.layout.world_size
    runner = Runner(plan, RankPlace(rank, rank, size, size, ("", 0), ""))
    return Rank(plan, runner, runner.new_scheduler(), mail)


def run_engine(rank: int, plan: EnginePlan, script: Script) -> Outcome:
    """The script to its end, then on without work until no order is left, then a shutdown."""
    migrator_module.AGREE_EVERY = script.agree_every
    mail = ScriptedMail()
    engine = start_engine(rank, plan, mail)
    replica = rank // plan.layout.tp
    contents = Contents(engine)
    orders = Orders(engine, script)
    unfinished = {request.request_id for _, _, request in script.arrivals}
    tokens: dict[str, list[int]] = {}
    step = 0
    leaving = False
    while True:
        if engine.is_leader:
            for at, where, request in script.arrivals:
                if (at, where) == (step, replica):
                    mail.bring(request)
            for at, where, name in script.aborts:
                if (at, where) == (step, replica):
                    mail.bring(AbortRequest(name))
            if (order := orders.due(step, replica)) is not None:
                mail.bring(order)
        if leaving and engine.is_leader:
            mail.bring(Shutdown())
        orders.meddle(rank)
        go_on = engine.step()
        step += 1
        for message in mail.said:
            if isinstance(message, StepDone):
                for output in message.outputs:
                    assert output.error is None, output.error
                    tokens.setdefault(output.request_id, []).extend(output.token_ids)
            elif isinstance(message, LayersSwitched | Migrated):
                orders.heard(message, step)
        mail.said.clear()
        contents.check()
        if not go_on:
            break
        leaving = step > script.last_step + plan.layout.dp and engine.agreed.quiet and orders.over
        assert step < script.most_steps, (step, unfinished - set(tokens), orders)
    assert engine.migrator is not None and engine.migrator.order == 0
    expert_map = engine.runner.model.expert_map
    assert expert_map is not None
    return Outcome(tokens, orders.answers, orders.switched, step, expert_map.digest)


class Orders:
    """Forces random placements, one after another, on an engine that is the same on all ranks."""

    def __init__(self, engine: Rank, script: Script) -> None:
        self.engine, self.script = engine, script
        self.number = 1
        self.next_at = script.every
        self.pending: Migrate | None = None
        self.answers: list[Migrated] = []
        self.switched: list[LayersSwitched] = []
        self.stopped = False
        self.spoiling = 0

    @property
    def over(self) -> bool:
        assert self.engine.migrator is not None
        return self.engine.migrator.order == 0 and self.pending is None

    def due(self, step: int, replica: int) -> Migrate | None:
        """Replicas get an order one step after another."""
        if not self.script.every or self.next_at > self.script.last_step or step < self.next_at + replica:
            return None
        if len(self.answers) >= self.number or self.pending is not None:
            return None
        expert_map = self.engine.runner.model.expert_map
        assert expert_map is not None
        current, topology = expert_map.placement, expert_map.topology
        self.pending = make_order(self.number, current, random_placement(current, self.number), topology)
        self.pending = replaced(self.pending, self.script)
        return self.pending

    def heard(self, message: LayersSwitched | Migrated, step: int) -> None:
        if isinstance(message, LayersSwitched):
            self.switched.append(message)
            return
        assert message.order == self.number
        self.answers.append(message)
        self.number += 1
        self.next_at = step + self.script.every
        self.pending = None

    def meddle(self, rank: int) -> None:
        """A stopped rank, a spoiled transfer."""
        migrator = self.engine.migrator
        assert migrator is not None
        running = migrator._run is not None and self.number
        if self.script.stop == (running, rank) and not self.stopped:
            self.stopped = True
            waker = f"import os, time; time.sleep(1); os.kill({os.getpid()}, {int(signal.SIGCONT)})"
            subprocess.Popen([sys.executable, "-c", waker])
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.script.spoil == (running, rank) and not self.spoiling:
            self.spoiling = 1
            assert migrator._run is not None
            for mover in migrator._run._movers:
                assert isinstance(mover, ExchangeMover)
                if self.script.no_memory:
                    mover.begin = no_memory  # type: ignore[method-assign]
                else:
                    mover._group = Spoiled(mover._group)


def no_memory(*args: object) -> None:
    raise TransferError("no memory")


class Spoiled(Group):
    """The first bytes that come are not what was sent."""

    def __init__(self, group: Group) -> None:
        super().__init__(group.rank, group.ranks, group._control, group._wires)
        self.left = 1

    def all_to_all(self, x: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]) -> Tensor:
        out = super().all_to_all(x, send_sizes, receive_sizes)
        if len(out) and self.left:
            self.left = 0
            out[len(out) // 2] ^= 1
        return out


def random_placement(current: Placement, seed: int) -> Placement:
    """Anything, for some of the layers; for the others perhaps other shares."""
    rng = np.random.default_rng(seed)
    experts, slots = current.num_experts, current.num_slots
    rows, shares = current.slot_to_expert.copy(), current.share.copy()
    for layer in range(current.num_layers):
        kind = rng.integers(4)
        if kind == 0:
            continue
        if kind > 1:
            more = rng.integers(0, experts, slots - experts)
            rows[layer] = rng.permutation(np.concatenate([np.arange(experts), more]))
        weight = rng.random(slots)
        total = np.bincount(rows[layer], weights=weight, minlength=experts)
        shares[layer] = weight / total[rows[layer]]
    return Placement(rows, experts, current.generation + 1, shares)


def make_order(number: int, old: Placement, new: Placement, topology: Topology) -> Migrate:
    plan = plan_migration(old, new, topology)
    layers = [
        LayerOrder(
            layer,
            new.slot_to_expert[layer].tolist(),
            new.share[layer].tolist(),
            [(move.source_slot, move.target_slot) for moves in rounds for move in moves],
        )
        for layer, rounds in plan.layers
    ]
    return Migrate(number, old.generation, old.digest, new.generation, new.digest, layers)


def replaced(order: Migrate, script: Script) -> Migrate:
    return msgspec.structs.replace(
        order, layers_per_step=script.layers_per_step, bytes_per_second=script.bytes_per_second
    )


class Contents:
    """What each expert's weights are, gathered at the start; whether the slots hold what the placement says."""

    def __init__(self, engine: Rank) -> None:
        expert_map = engine.runner.model.expert_map
        assert expert_map is not None
        self.map, self.mesh = expert_map, engine.runner.mesh
        self.weights = [experts.slot_tensors() for experts in engine.runner.model.expert_weights]
        self.experts: list[list[Tensor]] = []
        for layer, tensors in enumerate(self.weights):
            first = [
                list(expert_map.placement.slot_to_expert[layer]).index(e) for e in range(self.num_experts)
            ]
            self.experts.append([self.mesh.ep.all_gather(t.clone())[first] for t in tensors])
        self.checked = ""

    @property
    def num_experts(self) -> int:
        return self.map.placement.num_experts

    def check(self) -> None:
        if self.checked == self.map.digest:
            return
        self.checked = self.map.digest
        for layer, tensors in enumerate(self.weights):
            held = self.map.local_experts(layer)
            for tensor, experts in zip(tensors, self.experts[layer], strict=True):
                assert torch.equal(tensor, experts[held]), f"layer {layer} after {self.map.digest}"


def make_script(plan: EnginePlan, spread: int, requests: int = 32, **more: Any) -> Script:
    """Requests that come over `spread` steps, some of which are dropped half-way; prompts share beginnings."""
    rng = random.Random(0)
    vocab = plan.spec.vocab_size
    beginning = [rng.randrange(vocab) for _ in range(12)]
    script = Script([], **more)
    for number in range(requests):
        prompt = beginning[: rng.choice((0, 8, 12))] + [
            rng.randrange(vocab) for _ in range(rng.randint(1, 14))
        ]
        sampled = rng.random() < 0.5
        params = SamplingParams(
            max_tokens=rng.randint(1, 24), temperature=0.8 if sampled else 0.0, seed=number, ignore_eos=True
        )
        at, replica = rng.randrange(spread), number % plan.layout.dp
        script.arrivals.append((at, replica, AddRequest(f"{number}", prompt, params)))
        if rng.random() < 0.15:
            script.aborts.append((at + rng.randint(1, 20), replica, f"{number}"))
    return script


def engine_plan(model: Path, slots: int, **settings: Any) -> EnginePlan:
    values: dict[str, Any] = {
        "model": str(model),
        "tensor_parallel_size": 4,
        "max_num_tokens": 24,
        "max_batch_size": 16,
        "max_seq_len": 64,
        "kv_cache_config": {"max_tokens": 512, "tokens_per_block": 4},
        **settings,
    }
    moe = values.get("moe_config", {})
    balancer = {"num_slots": slots, **moe.get("load_balancer", {})}
    values["moe_config"] = {**moe, "load_balancer": balancer}
    return make_plan(parse(EngineConfig, values))


def run_script(pool: RankPool, plan: EnginePlan, script: Script) -> list[Outcome]:
    outcomes: list[Outcome] = pool.run(run_engine, plan, script, timeout=240)
    return outcomes


def all_tokens(outcomes: Sequence[Outcome]) -> dict[str, list[int]]:
    return {name: tokens for outcome in outcomes for name, tokens in outcome.tokens.items()}


def applied(outcomes: Sequence[Outcome]) -> list[Migrated]:
    """Rank 0's answers, after a look at what the others say."""
    first = outcomes[0].answers
    for outcome in outcomes:
        views = [(a.order, a.result, a.layers_done, a.generation, a.digest) for a in outcome.answers]
        assert views == [(a.order, a.result, a.layers_done, a.generation, a.digest) for a in first]
        assert outcome.digest == outcomes[0].digest
    return first


def check_same_tokens(pool: RankPool, plan: EnginePlan, spread: int = 80, **script: Any) -> list[Outcome]:
    """The requests of two runs, one with an order after another, to the same tokens."""
    still = make_script(plan, spread=spread)
    tokens = all_tokens(run_script(pool, plan, still))
    dropped = {name for _, _, name in still.aborts}
    for _, _, request in still.arrivals:
        if request.request_id not in dropped:
            assert len(tokens[request.request_id]) == request.params.max_tokens
    moved = run_script(pool, plan, make_script(plan, spread=spread, every=1, **script))
    assert all_tokens(moved) == tokens
    return moved


def check_all_applied(outcomes: Sequence[Outcome], orders: int) -> None:
    answers = applied(outcomes)
    assert len(answers) >= orders, "the run was too short to show anything"
    assert all(answer.result == "applied" for answer in answers), answers
    assert [answer.generation for answer in answers] == list(range(1, len(answers) + 1))
    assert sum(answer.moves for answer in answers) > 20 and answers[0].seconds > answers[0].stall_seconds > 0
    switched = [layer for message in outcomes[0].switched for layer in message.layers]
    assert len(switched) == sum(answer.layers_done for answer in answers)
    assert not any(outcome.switched for outcome in outcomes[1:])


def test_no_token_changes_while_experts_move(rank_pool: GetPool) -> None:
    plan = engine_plan(EMBEDDED_MODEL, 40, **LAYOUTS["dp"])
    check_all_applied(check_same_tokens(rank_pool(4), plan, spread=40), 3)


@pytest.mark.slow
def test_at_the_pace_of_service(rank_pool: GetPool) -> None:
    plan = engine_plan(EMBEDDED_MODEL, 40, **LAYOUTS["dp"])
    check_all_applied(check_same_tokens(rank_pool(4), plan, spread=200, layers_per_step=2, **SERVICE_PACE), 1)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "dp"])
def test_no_token_changes_in_any_layout(rank_pool: GetPool, layout: str) -> None:
    plan = engine_plan(EMBEDDED_MODEL, 40, **LAYOUTS[layout])
    check_all_applied(check_same_tokens(rank_pool(4), plan), 3)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_no_token_changes_in_any_family(rank_pool: GetPool, family: str, tmp_path: Path) -> None:
    layout, slots = FAMILIES[family]
    make_model(family).save_pretrained(tmp_path)
    plan = engine_plan(tmp_path, slots, **LAYOUTS[layout])
    check_all_applied(check_same_tokens(rank_pool(4), plan), 3)


@pytest.mark.slow
def test_a_rank_that_stands_still_for_a_second_holds_up_everyone_and_changes_nothing(
    rank_pool: GetPool,
) -> None:
    plan = engine_plan(EMBEDDED_MODEL, 40, **LAYOUTS["dp"])
    outcomes = check_same_tokens(rank_pool(4), plan, stop=(2, 1))
    check_all_applied(outcomes, 3)
    assert outcomes[0].answers[1].seconds > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp", "etp"])
def test_a_spoiled_transfer_is_never_served(rank_pool: GetPool, layout: str) -> None:
    """Rank 2 gets a wrong byte in the second order: all ranks leave that layer as it was, and say why. What follows
    starts from there."""
    plan = engine_plan(EMBEDDED_MODEL, 40, **LAYOUTS[layout])
    outcomes = check_same_tokens(rank_pool(4), plan, layers_per_step=1, spoil=(2, 2))
    answers = applied(outcomes)
    assert [answer.result for answer in answers[:3]] == ["applied", "partial", "applied"]
    assert [answer.generation for answer in answers[:3]] == [1, 1, 2]
    assert answers[1].layers_done == 3
    assert "the bytes that arrived have another checksum" in outcomes[2].answers[1].reason
    assert re.fullmatch(r"layers \[\d\]: failed on ranks \[2\]", answers[1].reason)


@pytest.mark.slow
def test_a_rank_without_memory_holds_up_nobody(rank_pool: GetPool) -> None:
    plan = engine_plan(EMBEDDED_MODEL, 40, **LAYOUTS["dp"])
    outcomes = check_same_tokens(rank_pool(4), plan, layers_per_step=1, spoil=(2, 2), no_memory=True)
    answers = applied(outcomes)
    assert [answer.result for answer in answers[:3]] == ["applied", "partial", "applied"]
    assert "layer" in outcomes[2].answers[1].reason and "no memory" in outcomes[2].answers[1].reason


@pytest.mark.slow
def test_layers_that_failed_together_are_tried_again_one_by_one(rank_pool: GetPool) -> None:
    plan = engine_plan(EMBEDDED_MODEL, 40, **LAYOUTS["dp"])
    outcomes = check_same_tokens(rank_pool(4), plan, spoil=(2, 2))
    check_all_applied(outcomes, 3)


# ------------------------------------------------------------------ engines without requests


def settle(engine: Rank, mail: ScriptedMail, most_steps: int = 500) -> Migrated:
    """Step on until the order is over."""
    for _ in range(most_steps):
        engine.step()
        assert engine.migrator is not None
        over = [message for message in mail.said if isinstance(message, Migrated)]
        if over:
            mail.said.clear()
            return over[0]
        assert not engine.agreed.may_sleep
    raise AssertionError(f"no end after {most_steps} steps")


def place_of(engine: Rank) -> tuple[Placement, Topology]:
    expert_map = engine.runner.model.expert_map
    assert expert_map is not None
    return expert_map.placement, expert_map.topology


def run_idle(rank: int, plan: EnginePlan) -> None:
    """No request ever comes; and the slots end up as a start with the placement has them."""
    mail = ScriptedMail()
    engine = start_engine(rank, plan, mail)
    engine.step()
    assert engine.agreed.may_sleep
    old, topology = place_of(engine)
    new = random_placement(old, 5)
    if engine.is_leader:
        mail.bring(make_order(1, old, new, topology))
    answer = settle(engine, mail)
    assert (answer.result, answer.generation, answer.digest) == ("applied", 1, new.digest)
    engine.step()
    assert engine.agreed.may_sleep
    fresh = start_engine(rank, replace(plan, placement=new), ScriptedMail())
    pairs = zip(engine.runner.model.expert_weights, fresh.runner.model.expert_weights, strict=True)
    for moved, loaded in pairs:
        for a, b in zip(moved.slot_tensors(), loaded.slot_tensors(), strict=True):
            assert torch.equal(a, b)
    ours, theirs = engine.runner.model.expert_map, fresh.runner.model.expert_map
    assert ours is not None and theirs is not None
    assert torch.equal(ours._table, theirs._table)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp", "dp etp", "mixed"])
def test_ranks_without_requests_end_up_as_if_they_had_started_so(rank_pool: GetPool, layout: str) -> None:
    rank_pool(4).run(run_idle, engine_plan(EMBEDDED_MODEL, 40, **LAYOUTS[layout]))


def run_leaving(rank: int, plan: EnginePlan, with_request: bool) -> int:
    """A shutdown comes while an order runs that would take minutes."""
    mail = ScriptedMail()
    engine = start_engine(rank, plan, mail)
    old, topology = place_of(engine)
    contents = Contents(engine)
    order = make_order(1, old, random_placement(old, 5), topology)
    if engine.is_leader:
        mail.bring(msgspec.structs.replace(order, bytes_per_second=10_000.0))
        if with_request:
            params = SamplingParams(max_tokens=10, ignore_eos=True)
            mail.bring(AddRequest(f"of {rank}", [1, 2, 3], params))
    for _ in range(20):
        assert engine.step()
    assert engine.migrator is not None and engine.migrator.order == 1
    if engine.is_leader:
        mail.bring(Shutdown())
    steps = 0
    while engine.step():
        steps += 1
    contents.checked = ""
    contents.check()
    return steps


@pytest.mark.parametrize("with_request", [False, True])
def test_a_shutdown_does_not_wait_for_a_migration(rank_pool: GetPool, with_request: bool) -> None:
    plan = engine_plan(EMBEDDED_MODEL, 40, **LAYOUTS["dp"])
    assert rank_pool(4).run(run_leaving, plan, with_request) == [0] * 4


def run_refused(rank: int, plan: EnginePlan, how: str) -> Migrated:
    """Rank 3 is at another generation, or would come to another placement than the others."""
    mail = ScriptedMail()
    engine = start_engine(rank, plan, mail)
    old, topology = place_of(engine)
    expert_map = engine.runner.model.expert_map
    assert expert_map is not None
    contents = Contents(engine)
    order = make_order(1, old, random_placement(old, 5), topology)
    if rank == 3 and how == "refused":
        expert_map.placement = old.with_generation(2)
    fingerprint = migrator_module.fingerprint
    if rank == 3 and how == "differs":
        migrator_module.fingerprint = lambda placement: fingerprint(placement) ^ 1
    try:
        if engine.is_leader:
            mail.bring(order)
        answer = settle(engine, mail)
    finally:
        migrator_module.fingerprint = fingerprint
    assert expert_map.digest == old.digest
    contents.checked = ""
    contents.check()
    if engine.is_leader:  # the engine goes on
        mail.bring(AddRequest("after", [1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True)))
    for _ in range(4):
        engine.step()
    said = [output for message in mail.said if isinstance(message, StepDone) for output in message.outputs]
    assert sum(len(output.token_ids) for output in said) == (2 if engine.is_leader else 0)
    return answer


@pytest.mark.slow
def test_ranks_that_do_not_agree_change_nothing_and_say_so(rank_pool: GetPool) -> None:
    plan = engine_plan(EMBEDDED_MODEL, 40, **LAYOUTS["mixed"])
    answers = rank_pool(4).run(run_refused, plan, "refused")
    assert [answer.result for answer in answers] == ["failed"] * 4
    assert [answer.reason for answer in answers[:3]] == ["refused by ranks 3"] * 3
    assert "it starts from generation 0" in answers[3].reason and answers[3].generation == 2
    answers = rank_pool(4).run(run_refused, plan, "differs")
    assert [answer.result for answer in answers] == ["failed"] * 4
    assert all("would not agree on the placement after layers" in answer.reason for answer in answers)
