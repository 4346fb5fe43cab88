"""Offline generation: every layout, placement and batch gives the text that one rank alone gives."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeserve.config import EMBEDDED_MODEL
from moeserve.eplb.formats.placement import PlacementFile, write_placement
from moeserve.eplb.types import Placement
from moeserve.llm import LLM
from moeserve.messages import SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.multi_rank]
PROMPTS = ["It is a truth", "def main(self", "In the beginning God", "#include <stdio.h>\n", "Y dijo Dios: "]
GREEDY = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True)
LAYERS, EXPERTS, SLOTS = (1, 2, 3, 4), 32, 40


@pytest.fixture(scope="module")
def alone() -> Iterator[LLM]:
    with LLM() as llm:
        yield llm


@pytest.fixture(scope="module")
def texts(alone: LLM) -> list[str]:
    """Each prompt continued by itself on one rank."""
    return [alone.generate([prompt], GREEDY)[0].text for prompt in PROMPTS]


def random_placement(seed: int) -> Placement:
    """Every expert once, 8 of them a second time, anywhere."""
    rng = np.random.default_rng(seed)
    rows = [
        rng.permutation(np.concatenate([np.arange(EXPERTS), rng.permutation(EXPERTS)[:8]])) for _ in LAYERS
    ]
    return Placement(np.array(rows), EXPERTS, generation=7)


def test_text_equals_transformers(alone: LLM, texts: list[str]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # as ignore_eos
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = torch.tensor([alone.tokenizer.encode(prompt)])
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=32)
        assert alone.tokenizer.decode(out[0, ids.shape[1] :].tolist()) == text


LAYOUTS: list[dict[str, Any]] = [
    {"tensor_parallel_size": 4},
    {"tensor_parallel_size": 4, "enable_attention_dp": True, "moe_config": {"all_to_all": "gather"}},
    {"tensor_parallel_size": 4, "moe_tensor_parallel_size": 2, "moe_expert_parallel_size": 2},
    {
        "tensor_parallel_size": 4,
        "enable_attention_dp": True,
        "attention_tensor_parallel_size": 2,
        "moe_config": {"all_to_all": "exchange"},
    },
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_gives_the_same_text(layout: dict[str, Any], texts: list[str]) -> None:
    with LLM(**layout) as llm:
        assert llm.plan.all_to_all == layout.get("moe_config", {}).get("all_to_all", "one_sided")
        assert [answer.text for answer in llm.generate(PROMPTS, GREEDY)] == texts


def test_a_placement_changes_where_experts_are_and_no_text(texts: list[str], tmp_path: Path) -> None:
    placement = random_placement(1)
    file = tmp_path / "placement.json"
    write_placement(file, PlacementFile(placement, ep_size=4, layers=LAYERS, model="tiny_model"))
    four = {"tensor_parallel_size": 4, "enable_attention_dp": True}
    with LLM(**four, moe_config={"load_balancer": {"placement": str(file)}}) as llm:
        assert llm.plan.placement is not None
        assert llm.plan.placement.digest == placement.digest
        assert [answer.text for answer in llm.generate(PROMPTS, GREEDY)] == texts

    other = random_placement(2)
    assignments = {layer: other.slot_to_expert[row].tolist() for row, layer in enumerate(LAYERS)}
    balancer = {"num_slots": SLOTS, "initial_global_assignments": assignments}
    with LLM(**four, moe_config={"load_balancer": balancer}) as llm:
        assert [answer.text for answer in llm.generate(PROMPTS, GREEDY)] == texts


@pytest.mark.parametrize(
    ("change", "named"),
    [({"ep_size": 8}, "ep_size"), ({"model": "other"}, "model"), ({"layers": (2, 3, 4, 5)}, "layers")],
)
def test_a_placement_for_something_else_is_refused(
    change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    made_for = {"ep_size": 4, "layers": LAYERS, "model": "tiny_model"} | change
    file = tmp_path / "placement.json"
    write_placement(file, PlacementFile(random_placement(1), **made_for))
    with pytest.raises(ValueError, match=f"placement.json: .*{named}"):
        LLM(tensor_parallel_size=4, moe_config={"load_balancer": {"placement": str(file)}})


def test_a_seed_decides_the_text_whatever_the_batch(alone: LLM) -> None:
    random = SamplingParams(max_tokens=24, temperature=0.8, top_p=0.9, seed=11, ignore_eos=True)
    (single,) = alone.generate(PROMPTS[:1], random)
    crowd = alone.generate([*PROMPTS, PROMPTS[0], *PROMPTS], random)
    assert crowd[0].text == crowd[5].text == crowd[6].text == single.text
    (other,) = alone.generate(PROMPTS[:1], SamplingParams(max_tokens=24, temperature=0.8, seed=12))
    assert other.text != single.text


def test_pressure_on_the_cache_changes_no_text(texts: list[str]) -> None:
    """Pages for two sequences, five of them: preemption and chunks of 16 tokens, twice with reuse of prefixes."""
    with LLM(
        kv_cache_config={"max_tokens": 96, "tokens_per_block": 8}, max_num_tokens=16, max_batch_size=5
    ) as llm:
        for _ in range(2):
            assert [answer.text for answer in llm.generate(PROMPTS, GREEDY)] == texts
        stats = llm.replica_stats()[0]
        assert stats.preemptions > 0
        assert stats.cached_tokens > 0


def test_what_cannot_run_is_refused_and_costs_nobody_else(alone: LLM, texts: list[str]) -> None:
    for prompts, stop, named in (
        ("Once", [], "prompts = 'Once': must be a list"),
        (["Once"], "end", "stop = 'end': must be a list"),
        (["Once"], [""], "empty"),
        (["Once", [5] * 5000], [], "at most 1023"),
        (["Once", [-1]], [], "token -1"),
    ):
        with pytest.raises(ValueError, match=named):
            alone.generate(prompts, SamplingParams(max_tokens=900, temperature=0, ignore_eos=True), stop)
    assert alone.generate(PROMPTS[:1], GREEDY)[0].text == texts[0]
    assert alone.replica_stats()[0].running == 0


def test_closing_ends_what_still_runs() -> None:
    long = SamplingParams(max_tokens=900, temperature=0, ignore_eos=True)
    with LLM(tensor_parallel_size=2, enable_attention_dp=True) as llm, ThreadPoolExecutor(1) as thread:
        running = thread.submit(llm.generate, ["Once"] * 50, long)
        while not sum(stats.running for stats in llm.replica_stats()):
            time.sleep(0.01)
        start = time.monotonic()
        llm.close()
        assert time.monotonic() - start < 5
        with pytest.raises(RuntimeError, match="shutting down"):
            running.result(5)


def test_a_plain_script_needs_no_main_guard(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from moeserve.llm import LLM\n"
        "from moeserve.messages import SamplingParams\n"
        "with LLM(tensor_parallel_size=2) as llm:\n"
        "    print(len(llm.generate(['Once'], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.returncode) == ("3\n", 0), done.stderr


def test_stop_strings_logprobs_and_routed_experts(alone: LLM, texts: list[str]) -> None:
    word = texts[0].split()[2]
    (stopped,) = alone.generate(PROMPTS[:1], GREEDY, stop=[word])
    assert stopped.finish_reason == "stop"
    assert stopped.text == texts[0][: texts[0].index(word)]

    asked = SamplingParams(
        max_tokens=4,
        temperature=0,
        logprobs=2,
        prompt_logprobs=0,
        return_routed_experts=True,
        ignore_eos=True,
    )
    (answer,) = alone.generate(PROMPTS[:1], asked)
    tokens = len(answer.prompt_token_ids) + len(answer.token_ids)
    assert [entry.token_id for entry in answer.logprobs] == answer.token_ids
    assert all(entry.rank == 1 and entry.logprob == entry.top[0][1] for entry in answer.logprobs)
    assert answer.prompt_logprobs is not None
    assert answer.prompt_logprobs[0] is None and len(answer.prompt_logprobs) == len(answer.prompt_token_ids)
    assert answer.routed_experts is not None
    width = len(answer.routed_experts) // ((tokens - 1) * len(LAYERS) * 4)
    experts = np.frombuffer(answer.routed_experts, f"<u{width}").reshape(tokens - 1, len(LAYERS), 4)
    assert experts.max() < EXPERTS
    assert all(len(set(row)) == 4 for row in experts.reshape(-1, 4).tolist())


def test_wrong_prompts_are_named(alone: LLM) -> None:
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        alone.generate(["Once", []])
    with pytest.raises(ValueError, match="params: 1 given for 2 prompts"):
        alone.generate(["Once", "upon"], [GREEDY])
