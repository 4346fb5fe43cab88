"""However replicas part the tokens: the same answers, and exact counts of experts and slots, phases apart."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from moeserve.llm import LLM, Answer
from moeserve.messages import SamplingParams
from moeserve.stats.snapshot import LoadWindow

pytestmark = [pytest.mark.slow, pytest.mark.multi_rank]
LAYERS, EXPERTS, SLOTS, TOP_K = 4, 32, 48, 4
PROMPTS = ["It is a truth universally acknowledged, that", "def main(self", "Y dijo Dios: ", "1 2 3"]
LENGTHS = (3, 17, 40, 25)
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp 2": {"tensor_parallel_size": 2, "enable_attention_dp": True},
    "tp 2": {"tensor_parallel_size": 2},
}


def ask(layout: dict[str, Any], routing: str) -> tuple[list[Answer], LoadWindow]:
    """The answers, and all that the ranks have counted for them."""
    balancer: dict[str, Any] = {"num_slots": SLOTS, "online": {"routing": routing}}
    params = [
        SamplingParams(max_tokens=n, temperature=0, ignore_eos=True, return_routed_experts=True)
        for n in LENGTHS
    ]
    with LLM(**layout, moe_config={"load_balancer": balancer}) as llm:
        answers = llm.generate(PROMPTS, params)
        wanted = sum(len(answer.prompt_token_ids) + len(answer.token_ids) - 1 for answer in answers)
        deadline = time.monotonic() + 10
        while True:
            load = llm.expert_load()
            if load is not None and sum(window.tokens for window in load.windows) >= wanted:
                break
            assert time.monotonic() < deadline, "the counts did not arrive"
            time.sleep(0.05)
        balance = llm._frontend.balance
        assert balance is not None
        windows = balance.ring.windows
    return answers, sum(windows[1:], windows[0])


def expected(answers: list[Answer]) -> np.ndarray:
    """int64 [2, L, E] by the routed experts of the answers: a sequence's prompt, then what it went on with."""
    counts = np.zeros((2, LAYERS, EXPERTS), np.int64)
    for answer in answers:
        assert answer.routed_experts is not None
        rows = len(answer.prompt_token_ids) + len(answer.token_ids) - 1
        width = len(answer.routed_experts) // (rows * LAYERS * TOP_K)
        experts = np.frombuffer(answer.routed_experts, f"<u{width}").reshape(rows, LAYERS, TOP_K)
        prompt = len(answer.prompt_token_ids)
        for phase, part in enumerate((experts[:prompt], experts[prompt:])):
            for layer in range(LAYERS):
                counts[phase, layer] += np.bincount(part[:, layer].ravel(), minlength=EXPERTS)
    return counts


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_same_answers_and_exact_counts_by_any_routing(layout: dict[str, Any]) -> None:
    texts, ranks = {}, {}
    for routing in ("even", "shares", "step"):
        answers, window = ask(layout, routing)
        texts[routing] = [answer.token_ids for answer in answers]
        assert np.array_equal(window.load, expected(answers))
        assert window.slots is not None and window.slots.shape == (2, LAYERS, SLOTS)
        by_expert = np.zeros_like(window.load)
        np.add.at(by_expert, (..., np.arange(SLOTS) % EXPERTS), window.slots)  # as the identity places them
        assert np.array_equal(by_expert, window.load)
        ranks[routing] = window.slots
    assert texts["even"] == texts["shares"] == texts["step"]
    assert not np.array_equal(ranks["even"], ranks["step"])
