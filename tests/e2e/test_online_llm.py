"""The whole engine, its own processes and its balancer: the text stays while placements come and go."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from moeserve.comm import spawn
from moeserve.eplb.types import Placement
from moeserve.llm import LLM
from moeserve.messages import SamplingParams
from moeserve.online.balancer import Busy

pytestmark = [pytest.mark.slow, pytest.mark.multi_rank]
EXPERTS, LAYERS = 32, 4
STREAMS = 32
PROMPTS = [
    f"{beginning} {number}"
    for number in range(STREAMS // 4)
    for beginning in ("It is a truth", "def main(self", "Y dijo Dios: ", "#include <stdio.h>\n")
]
PARAMS = [
    SamplingParams(max_tokens=24 + 3 * number, temperature=0, ignore_eos=True) for number in range(STREAMS)
]


def random_placement(seed: int) -> Placement:
    rng = np.random.default_rng(seed)
    rows = [
        rng.permutation(np.concatenate([np.arange(EXPERTS), rng.integers(0, EXPERTS, 8)]))
        for _ in range(LAYERS)
    ]
    return Placement(np.array(rows), EXPERTS)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    with LLM() as alone:
        return [answer.text for answer in alone.generate(PROMPTS, PARAMS)]


@pytest.fixture
def llm() -> Iterator[LLM]:
    balancer = {"num_slots": 40, "layer_updates_per_iter": 2, "online": {"window_steps": 20}}
    four: dict[str, Any] = {"tensor_parallel_size": 4, "enable_attention_dp": True}
    with LLM(**four, moe_config={"load_balancer": balancer}) as running:
        yield running


def status(llm: LLM) -> dict[str, Any]:
    found = llm.balance_status()
    assert found is not None
    return found


def given(llm: LLM) -> list[str]:
    """What came of the placements that were ordered, the newest first."""
    return [record["result"] for record in status(llm)["rebalances"] if record["trigger"] == "placement"]


def apply(llm: LLM, placement: Placement, seconds: float = 30.0) -> None:
    """Until it was in force; the balancer may have ideas of its own before and after."""
    deadline, before = time.monotonic() + seconds, len(given(llm))
    while True:
        try:
            llm.apply_placement(placement)
            break
        except Busy:
            time.sleep(0.005)
        assert time.monotonic() < deadline, status(llm)
    while len(given(llm)) == before:
        assert time.monotonic() < deadline, status(llm)
        time.sleep(0.01)
    assert given(llm)[0] == "applied", status(llm)


def test_texts_stay_while_placements_change_and_a_rank_stands_still(llm: LLM, texts: list[str]) -> None:
    answers: list[list[str]] = []
    stop = threading.Event()

    def stream() -> None:
        while not stop.is_set():
            answers.append([answer.text for answer in llm.generate(PROMPTS, PARAMS)])

    reader = threading.Thread(target=stream)
    reader.start()
    try:
        for seed in range(4):
            if seed == 2:
                threading.Timer(0.1, stand_still, args=(1, 1.0)).start()
            apply(llm, random_placement(seed))
    finally:
        stop.set()
        reader.join(60)
    assert answers and all(each == texts for each in answers)
    assert given(llm) == ["applied"] * 4
    assert status(llm)["state"] != "dead"


def stand_still(rank: int, seconds: float) -> None:
    (pid,) = (p.pid for p in spawn._started if p.name == f"moeserve-rank-{rank}" and p.is_alive())
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    os.kill(pid, signal.SIGCONT)


def test_ranks_that_sleep_take_an_order(llm: LLM, texts: list[str]) -> None:
    time.sleep(1.5)  # no request: they wait for a message
    apply(llm, random_placement(7), seconds=5.0)
    assert [answer.text for answer in llm.generate(PROMPTS[:4], PARAMS[:4])] == texts[:4]


def test_closing_does_not_wait_for_an_order(llm: LLM) -> None:
    llm.apply_placement(random_placement(8))
    begun = time.monotonic()
    llm.close()
    assert time.monotonic() - begun < 5


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_texts_stay_while_placements_change_on_gpus() -> None:
    check_two_ranks("cuda")


def check_two_ranks(device: str) -> None:
    balancer = {"num_slots": 40, "layer_updates_per_iter": 2}
    two: dict[str, Any] = {"tensor_parallel_size": 2, "enable_attention_dp": True}
    with LLM(**two, device=device, dtype="float32", moe_config={"load_balancer": balancer}) as llm:
        texts = [answer.text for answer in llm.generate(PROMPTS, PARAMS)]
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(llm.generate, PROMPTS, PARAMS)
            for seed in range(3):
                apply(llm, random_placement(seed))
            assert [answer.text for answer in running.result(60)] == texts
