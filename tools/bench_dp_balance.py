"""Attention data parallelism with and without its balance: how even the replicas' tokens are, and what it gives.

    python tools/bench_dp_balance.py --replicas 4

The embedded model, one rank a replica. Prompts of very different lengths arrive in bursts, as users' do. Token
balance = mean over replicas / busiest replica of the tokens of a step, weighted by tokens; 1.0 is perfect. Both
settings run in turns; figures are medians, the ratio is of medians.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

from bench_serving import record_of

from moeserve.llm import LLM
from moeserve.messages import SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    flags = parser.parse_args()
    turns: dict[str, list[dict[str, float]]] = {"in turn": [], "balanced": []}
    for turn in range(flags.repeats):
        for name, figures in turns.items():
            print(f"turn {turn + 1} of {flags.repeats}: {name}", file=sys.stderr, flush=True)
            figures.append(
                measure(flags.replicas, flags.requests, enable_balance=name == "balanced", seed=turn)
            )
    medians = {
        name: {key: statistics.median(figure[key] for figure in figures) for key in figures[0]}
        for name, figures in turns.items()
    }
    print(f"{'requests to replicas':<22}{'token balance':>15}{'steps':>8}{'tokens/s':>11}")
    for name, figure in medians.items():
        print(
            f"{name:<22}{figure['balance']:>15.3f}{figure['steps']:>8.0f}{figure['tokens_per_second']:>11.1f}"
        )
    ratio = medians["balanced"]["tokens_per_second"] / medians["in turn"]["tokens_per_second"]
    print(f"tokens/s, balanced / in turn: {ratio:.2f}")
    if flags.json:
        Path(flags.json).write_text(json.dumps(record_of(medians, turns), indent=1))


def measure(replicas: int, requests: int, enable_balance: bool, seed: int) -> dict[str, float]:
    """One engine, one burst of prompts of 8 to 512 tokens and answers of 4 to 64."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(10, 4000) for _ in range(int(8 * 64 ** rng.random()))] for _ in range(requests)]
    params = [
        SamplingParams(max_tokens=int(4 * 16 ** rng.random()), temperature=0, ignore_eos=True)
        for _ in prompts
    ]
    with LLM(
        tensor_parallel_size=replicas,
        enable_attention_dp=True,
        attention_dp_config={"enable_balance": enable_balance},
        max_batch_size=8,
        max_num_tokens=512,
        kv_cache_config={"enable_block_reuse": False},
    ) as llm:
        llm.generate(prompts[:replicas], SamplingParams(max_tokens=2))  # warm-up
        before = llm.replica_stats()
        start = time.perf_counter()
        answers = llm.generate(prompts, params)
        seconds = time.perf_counter() - start
        time.sleep(1.5)  # the idle replicas' next sign of life brings their counts
        after = llm.replica_stats()
    tokens = [b.replica_tokens - a.replica_tokens for a, b in zip(before, after, strict=True)]
    busiest = max(b.busiest_tokens - a.busiest_tokens for a, b in zip(before, after, strict=True))
    return {
        "balance": statistics.mean(tokens) / busiest,
        "steps": max(b.step - a.step for a, b in zip(before, after, strict=True)),
        "tokens_per_second": sum(len(answer.token_ids) for answer in answers) / seconds,
    }


if __name__ == "__main__":
    main()
