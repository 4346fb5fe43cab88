"""The balance of attention DP, on real schedulers and a clock that counts tokens."""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass

import pytest

from moeserve.config import AttentionDPConfig
from moeserve.engine.lockstep import Agreed, PrefillGate, ReplicaState
from moeserve.engine.page_pool import PagePool
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.sequence import StepResult
from moeserve.messages import AddRequest, SamplingParams
from moeserve.server.replicas import ReplicaLoads

REPLICAS = 4
STEP_COST = 16  # of a step, in the time of one token


@dataclass
class Outcome:
    balance: float  # mean / max tokens over replicas, weighted by tokens
    time: float
    median_first_token: float


def simulate(config: AttentionDPConfig, tokens_between_arrivals: float, seed: int = 0) -> Outcome:
    """100 requests through four replicas; a step takes STEP_COST plus its busiest replica's tokens."""
    rng = random.Random(seed)
    schedulers = [Scheduler(PagePool(4096, 32, False), 16, 512, 1024) for _ in range(REPLICAS)]
    gates = [PrefillGate(config) for _ in schedulers]
    loads = ReplicaLoads(REPLICAS, balance=config.enable_balance)
    arrivals, weights, started, latencies = [], {}, {}, []
    time = 0.0
    for number in range(100):
        time += rng.expovariate(1 / tokens_between_arrivals)
        prompt, answer = int(8 * 64 ** rng.random()), int(16 * 8 ** rng.random())
        arrivals.append((time, str(number), [5] * prompt, answer))
    agreed = Agreed((ReplicaState(),) * REPLICAS, (0,) * REPLICAS)
    time, tokens, busiest = 0.0, 0.0, 0
    while arrivals or any(scheduler.has_work for scheduler in schedulers):
        while arrivals and arrivals[0][0] <= time:
            _, name, prompt_ids, answer = arrivals.pop(0)
            replica, weight = loads.add(len(prompt_ids), answer)
            weights[name], started[name] = (replica, weight), time
            params = SamplingParams(max_tokens=answer, ignore_eos=True)
            schedulers[replica].add(AddRequest(name, prompt_ids, params))
        batches, states = [], []
        for number, scheduler in enumerate(schedulers):
            hold, gates[number] = gates[number].decide(
                agreed, scheduler.prefill_ready, scheduler.prefill_fills_step
            )
            batch = scheduler.next_batch(hold)
            batches.append(batch)
            waiting = scheduler.prefill_ready or len(batch.chunks) > batch.num_decode
            states.append(
                ReplicaState(batch.num_tokens, waiting, scheduler.has_queue, decoding=batch.num_decode > 0)
            )
        agreed = Agreed(tuple(states), tuple(state.rows for state in states))
        tokens += sum(agreed.rows_per_rank) / REPLICAS
        busiest += max(agreed.rows_per_rank)
        time += STEP_COST + max(agreed.rows_per_rank)
        for scheduler, batch in zip(schedulers, batches, strict=True):
            for output in scheduler.finish(batch, [StepResult(7) for _ in batch.chunks]):
                if output.request_id in started:
                    latencies.append(time - started.pop(output.request_id))
                if output.finish_reason:
                    loads.remove(*weights[output.request_id])
    return Outcome(tokens / busiest, time, statistics.median(latencies))


def test_balance_evens_a_burst() -> None:
    gains = []
    for seed in range(4):
        plain = simulate(AttentionDPConfig(enable_balance=False), 1.0, seed)
        balanced = simulate(AttentionDPConfig(), 1.0, seed)
        assert balanced.time < plain.time
        assert balanced.median_first_token < 1.05 * plain.median_first_token
        gains.append(balanced.balance / plain.balance)
    assert statistics.mean(gains) > 1.15


@pytest.mark.parametrize("seed", range(3))
def test_balance_delays_nobody_when_there_is_no_queue(seed: int) -> None:
    routed = simulate(AttentionDPConfig(timeout_iters=0, batching_wait_iters=0), 1000.0, seed)
    balanced = simulate(AttentionDPConfig(), 1000.0, seed)
    assert balanced.median_first_token == pytest.approx(routed.median_first_token, rel=0.02)


def test_a_replica_waits_only_as_long_as_it_was_told() -> None:
    gate = PrefillGate(AttentionDPConfig(timeout_iters=3, batching_wait_iters=2))
    busy = ReplicaState(rows=4, queued=True, decoding=True)
    mine = ReplicaState(rows=4, waiting_prefill=True, queued=True, decoding=True)
    alone = Agreed((mine, busy), (4, 4))
    held = []
    for _ in range(5):
        hold, gate = gate.decide(alone, waiting=True, batch_full=False)
        held.append(hold)
    assert held == [True, True, True, False, True]

    gate = PrefillGate(AttentionDPConfig(timeout_iters=3, batching_wait_iters=2))
    together = Agreed((mine, mine), (4, 4))
    held = []
    for _ in range(3):
        hold, gate = gate.decide(together, waiting=True, batch_full=False)
        held.append(hold)
    assert held == [True, True, False]
    assert gate.decide(together, waiting=True, batch_full=True)[0] is False
