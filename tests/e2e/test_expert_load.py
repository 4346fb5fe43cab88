"""What the ranks count is what the API returns, in every layout; and it makes a placement that balances better."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from moeserve.eplb import cli
from moeserve.eplb.load import ExpertLoad
from moeserve.llm import LLM
from moeserve.messages import SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.multi_rank]
LAYERS, EXPERTS, TOP_K = 4, 32, 4
LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "tp 2": {"tensor_parallel_size": 2},
    "dp 2": {"tensor_parallel_size": 2, "enable_attention_dp": True},
    "etp 2": {"tensor_parallel_size": 2, "moe_tensor_parallel_size": 2},
}
PROMPTS = ["It is a truth universally acknowledged, that", "def main(self", "Y dijo Dios: "]


def counted(llm: LLM, tokens: int, seconds: float = 10.0) -> ExpertLoad:
    """The engine's counts once they are complete, which takes a second or two."""
    deadline = time.monotonic() + seconds
    while True:
        load = llm.expert_load()
        if load is not None and sum(window.tokens for window in load.windows) >= tokens:
            return load
        assert time.monotonic() < deadline, "the counts did not arrive"
        time.sleep(0.05)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_counts_are_the_routed_experts_of_the_answers(layout: dict[str, Any]) -> None:
    """Uneven prompts in chunks of 8 tokens, and answers of uneven length: padding, and replicas with nothing."""
    params = [
        SamplingParams(max_tokens=length, temperature=0, ignore_eos=True, return_routed_experts=True)
        for length in (3, 17, 40)
    ]
    with LLM(**layout, max_num_tokens=8, max_batch_size=4) as llm:
        answers = llm.generate(PROMPTS, params)
        prompt_tokens = sum(len(answer.prompt_token_ids) for answer in answers)
        decoded = sum(len(answer.token_ids) - 1 for answer in answers)
        load = counted(llm, prompt_tokens + decoded)
    expected = np.zeros((LAYERS, EXPERTS), np.int64)
    for answer in answers:
        assert answer.routed_experts is not None
        rows = len(answer.prompt_token_ids) + len(answer.token_ids) - 1
        width = len(answer.routed_experts) // (rows * LAYERS * TOP_K)
        experts = np.frombuffer(answer.routed_experts, f"<u{width}").reshape(rows, LAYERS, TOP_K)
        for layer in range(LAYERS):
            expected[layer] += np.bincount(experts[:, layer].ravel(), minlength=EXPERTS)
    assert np.array_equal(load.load.sum(axis=0), expected)
    for phase, tokens in (("prefill", prompt_tokens), ("decode", decoded)):
        part = load.of_phase(phase)  # type: ignore[arg-type]
        assert sum(window.tokens for window in part.windows) == tokens
        assert (part.load.sum(axis=(0, 2)) == tokens * TOP_K).all()


SPANISH = [
    "Y dijo Dios: ",
    "En el principio",
    "Porque de tal manera",
    "Y aconteció que",
    "Bienaventurados los",
]


def serve_spanish(server: Any) -> dict[str, Any]:
    """The server's status after some greedy traffic, complete."""
    body = {"model": "tiny_model", "prompt": SPANISH, "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    decoded = answer["usage"]["completion_tokens"] - len(SPANISH)
    deadline = time.monotonic() + 10
    while True:
        stats = server.get("/eplb/stats.json")
        windows = stats.json()["windows"] if stats.status_code == 200 else []
        if sum(window["tokens"] for window in windows if window["phase"] == "decode") == decoded:
            return {
                "texts": [choice["text"] for choice in answer["choices"]],
                **server.get("/eplb/status").json(),
            }
        assert time.monotonic() < deadline, "the counts did not arrive"
        time.sleep(0.05)


def test_served_load_makes_a_placement_that_balances_it(
    start_server: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--tp-size", "4", "--ep-size", "4", "--enable-attention-dp")
    stats, placement = tmp_path / "stats.json", tmp_path / "placement.json"
    server = start_server(*flags)
    assert f"{server.url}/eplb/stats.json" in server.output
    before = serve_spanish(server)
    stats.write_bytes(server.get("/eplb/stats.json").content)
    assert f"{server.url}/dashboard" in server.output
    shown = server.get("/dashboard/api/verdict?phase=decode").json()
    assert shown["state"] == "helps"
    assert round(shown["recent"]["mean"], 6) == before["imbalance"]["decode"]["mean"]
    server.process.terminate()

    assert cli.main([str(stats), "-o", str(placement)]) == 0
    assert "imbalance" in capsys.readouterr().out.lower()

    server = start_server(*flags, "--moe-config.load-balancer.placement", str(placement))
    after = serve_spanish(server)
    assert after["texts"] == before["texts"]
    assert before["digest"] != after["digest"] == json.loads(placement.read_text())["digest"]
    assert server.get("/eplb/placement").json()["digest"] == after["digest"]
    worst = [status["imbalance"]["decode"]["worst"] for status in (before, after)]
    mean = [status["imbalance"]["decode"]["mean"] for status in (before, after)]
    print(f"decode imbalance, mean {mean}, worst {worst}")
    assert mean[1] < 1 + (mean[0] - 1) / 2
    assert worst[1] < worst[0]
