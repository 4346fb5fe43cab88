"""A rank is killed under load: the others go on, no text changes, and who lost something is told."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from moeserve.eplb.types import Placement
from moeserve.llm import LLM, Answer
from moeserve.messages import SamplingParams
from tests.e2e.conftest import ServerProcess, Start

pytestmark = [pytest.mark.slow, pytest.mark.multi_rank]
STREAMS, TOKENS = 32, 120
BALANCER = "--moe-config.load-balancer"
SHRINK = (
    *("--tp-size", "4", "--enable-attention-dp"),
    *(f"{BALANCER}.num-slots", "64", f"{BALANCER}.on-rank-loss", "shrink"),
)
LAYERS, EXPERTS, TOP_K = 4, 32, 4


def stream(
    server: ServerProcess, number: int, tokens: int, begun: threading.Semaphore
) -> tuple[str, dict[str, Any] | None]:
    """The text of one sampled stream, and the error that ended it. begun: released with the first text."""
    body = {"model": "tiny_model", "prompt": f"Once upon a time {number} there", "max_tokens": tokens}
    body |= {"temperature": 0.7, "seed": number, "ignore_eos": True, "stream": True}
    text = ""
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            data = json.loads(line[6:])
            if "error" in data:
                return text, data["error"]
            if not text:
                begun.release()
            text += data["choices"][0]["text"]
    return text, None


def streams(
    server: ServerProcess, tokens: int, killed: int | None = None
) -> list[tuple[str, dict[str, Any] | None]]:
    """All at once; the process `killed` dies when half of them have begun to speak."""
    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(STREAMS) as pool:
        running: list[Future[Any]] = [pool.submit(stream, server, n, tokens, begun) for n in range(STREAMS)]
        if killed is not None:
            for _ in range(STREAMS // 2):
                assert begun.acquire(timeout=30)
            os.kill(killed, signal.SIGKILL)
        return [each.result() for each in running]


def test_survivors_go_on_twice_and_a_third_loss_ends_it(start_server: Start) -> None:
    server = start_server(*SHRINK)
    ranks = server.rank_pids()
    undisturbed = streams(server, TOKENS)
    assert all(error is None for _, error in undisturbed)
    for lost, killed in (([0], 0), ([0, 1], 1)):  # rank 0 kept the store that all had met at
        disturbed = streams(server, TOKENS, ranks[killed])
        errors = [error for _, error in disturbed if error is not None]
        same = [now == then for now, then in zip(disturbed, undisturbed, strict=True)]
        assert 0 < len(errors) < STREAMS and sum(same) == STREAMS - len(errors)
        assert {(error["code"], error["type"]) for error in errors} == {
            ("rank_lost", "service_unavailable_error")
        }
        for (now, error), (then, _) in zip(disturbed, undisturbed, strict=True):
            assert error is None or then.startswith(now)
        ready = server.get("/readyz")
        assert ready.status_code == 200
        assert (ready.json()["phase"], ready.json()["ready"]) == ("degraded", True)
        assert f"lost ranks {lost}" in ready.json()["reason"]
        for (now, error), (then, _) in zip(streams(server, 10), undisturbed, strict=True):
            assert error is None and then.startswith(now)
        status = server.get("/eplb/status").json()
        assert (status["ep_size"], status["num_slots"]) == (4 - len(lost), 64 - 16 * len(lost))
        assert status["generation"] == len(lost) and not status["survives_rank_loss"]
        assert server.get("/eplb/placement").json()["digest"] == status["digest"]
        metrics = server.get("/metrics").text
        named = {n for n in range(4) if f'phase="decode",rank="{n}"' in metrics}
        assert named == set(range(4)) - set(lost)
    os.kill(ranks[2], signal.SIGKILL)  # rank 3 has half of the experts
    assert server.wait_exit() == 1
    assert f"rank 2 (pid {ranks[2]}) was killed by SIGKILL" in server.lines[-1]
    assert "has no slot on another rank" in server.output
    assert not [pid for pid in ranks if os.path.exists(f"/proc/{pid}")]


def balancer(**changes: Any) -> dict[str, Any]:
    return {"load_balancer": {"num_slots": 64, "on_rank_loss": "shrink", **changes}}


def kill(llm: LLM, rank: int) -> None:
    pid = llm._frontend._link.processes[rank].pid  # type: ignore[attr-defined]
    os.kill(pid, signal.SIGKILL)


def ask(llm: LLM, count: int, tokens: int) -> list[Answer]:
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, return_routed_experts=True)
    return llm.generate([f"{number} men went to mow" for number in range(count)], params)


def counted(llm: LLM) -> int:
    load = llm.expert_load()
    return 0 if load is None else sum(window.tokens for window in load.windows)


def test_a_step_that_is_run_again_counts_once() -> None:
    """The lost rank had no request, so nothing at all is missing."""
    with LLM(tensor_parallel_size=3, enable_attention_dp=True, moe_config=balancer(num_slots=66)) as llm:
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(ask, llm, 2, 300)
            wait_until(lambda: any(stats.generated_tokens > 20 for stats in llm.replica_stats()))
            assert not asking.done()
            kill(llm, 2)
            answers = asking.result()
        computed = sum(len(answer.prompt_token_ids) + len(answer.token_ids) - 1 for answer in answers)
        wait_until(lambda: counted(llm) >= computed)
        load = llm.expert_load()
        status = llm.balance_status()
        again = ask(llm, 2, 300)
    expected = np.zeros((LAYERS, EXPERTS), np.int64)
    for answer in answers:
        assert answer.routed_experts is not None
        rows = len(answer.prompt_token_ids) + len(answer.token_ids) - 1
        width = len(answer.routed_experts) // (rows * LAYERS * TOP_K)
        experts = np.frombuffer(answer.routed_experts, f"<u{width}").reshape(rows, LAYERS, TOP_K)
        for layer in range(LAYERS):
            expected[layer] += np.bincount(experts[:, layer].ravel(), minlength=EXPERTS)
    assert load is not None and np.array_equal(load.load.sum(axis=0), expected)
    assert status is not None and status["ep_size"] == 2
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in again]


def test_a_rank_dies_while_experts_move() -> None:
    """The migration ends where it is, with every layer whole; the ranks that are left can be given another."""
    online = {"window_steps": 100_000, "max_bytes_per_second": 4e6, "survive_rank_loss": True}
    with LLM(
        tensor_parallel_size=4,
        enable_attention_dp=True,
        moe_config=balancer(layer_updates_per_iter=1, online=online),
    ) as llm:
        undisturbed = [answer.token_ids for answer in ask(llm, 12, 100)]
        balance = llm._frontend.balance
        assert balance is not None

        def turned() -> Placement:
            """Every slot gets what the one before on the rank before has."""
            return Placement(np.roll(balance.placement.slot_to_expert, 16, axis=1), EXPERTS)

        def layers_done() -> int | None:
            status = llm.balance_status()
            assert status is not None
            return None if status["migration"] is None else int(status["migration"]["layers_done"])

        llm.apply_placement(turned())
        wait_until(lambda: layers_done() == 1)  # the next one takes most of a second
        made = sum(stats.generated_tokens for stats in llm.replica_stats())
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(ask, llm, 12, 400)
            wait_until(lambda: sum(s.generated_tokens for s in llm.replica_stats()) > made + 100)
            assert layers_done() in (1, 2, 3)
            kill(llm, 0)
            with pytest.raises(RuntimeError, match="the rank that worked on this request was lost"):
                asking.result()
        assert [answer.token_ids for answer in ask(llm, 12, 100)] == undisturbed
        status = llm.balance_status()
        assert status is not None and status["migration"] is None and status["state"] == "idle"
        assert (status["ep_size"], status["num_slots"]) == (3, 48)
        assert status["rebalances"][0]["result"] == "failed"
        assert status["rebalances"][0]["reason"] == "lost rank 0"

        wanted = turned()
        llm.apply_placement(wanted)
        assert [answer.token_ids for answer in ask(llm, 12, 100)] == undisturbed
        wait_until(lambda: layers_done() is None)
        assert np.array_equal(balance.placement.slot_to_expert, wanted.slot_to_expert)
        assert [answer.token_ids for answer in ask(llm, 12, 100)] == undisturbed


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)
