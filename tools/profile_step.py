"""Where the time of one decode step goes, inside a real rank: scheduling, each op, Python around them, sampling.

    python tools/profile_step.py --batch 1 8 32

The benchmark's Qwen3-MoE (tools/bench_model.py) in bfloat16, one rank, 128 tokens of prompt. Medians over steps;
"around the ops" is the forward pass less its ops: Python and the eager torch calls between them.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_model import make_bench_model

from moeserve.comm import mesh
from moeserve.config import EngineConfig, parse
from moeserve.engine import runner as runner_module
from moeserve.engine.rank import Rank
from moeserve.engine.runner import Runner
from moeserve.launch import RankPlace
from moeserve.messages import AddRequest, FromRank, SamplingParams, encode
from moeserve.models import decoder as decoder_module
from moeserve.ops.table import OP_NAMES, Ops, choose_ops
from moeserve.plan import make_plan

STEPS = 48
Seconds = defaultdict[str, float]


class Letters:
    """Mail without a socket."""

    def __init__(self) -> None:
        self.waiting: list[bytes] = []

    def take(self, timeout: float) -> list[bytes]:
        waiting, self.waiting = self.waiting, []
        return waiting

    def send(self, message: FromRank) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(Path(tempfile.gettempdir()) / "moeserve-bench-model"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    flags = parser.parse_args()
    model = make_bench_model(Path(flags.model))
    clock: Seconds = defaultdict(float)
    rank, letters = start_rank(model, flags.threads, clock)
    columns = [profile(rank, letters, clock, batch) for batch in flags.batch]
    print(
        f"{'microseconds of a decode step':<32}" + "".join(f"{f'batch {batch}':>14}" for batch in flags.batch)
    )
    for name in columns[0]:
        print(f"{name:<32}" + "".join(f"{column[name] * 1e6:>14.0f}" for column in columns))


def start_rank(model: Path, threads: int, clock: Seconds) -> tuple[Rank, Letters]:
    """A rank in this process whose parts add their time to `clock`."""
    config = {
        "model": str(model),
        "dtype": "bfloat16",
        "device": "cpu",
        "num_threads": threads,
        "kv_cache_config": {"enable_block_reuse": False},
    }
    plan = make_plan(parse(EngineConfig, config))
    mesh.start(0, 1, "127.0.0.1", 0)
    decoder_module.choose_ops = lambda device: timed_ops(choose_ops(device), clock)  # type: ignore[assignment]
    runner = Runner(plan, RankPlace(0, 0, 1, 1, ("127.0.0.1", 0), ""))
    letters = Letters()
    rank = Rank(plan, runner, runner.new_scheduler(), letters)
    for owner, name, part in (
        (rank.scheduler, "next_batch", "schedule"),
        (runner_module, "make_batch", "make the batch"),
        (runner.model, "forward", "forward"),
        (runner_module, "sample", "sample"),
        (rank.scheduler, "finish", "record"),
        (rank, "answer", "answer"),
        (rank, "step", "step"),
    ):
        setattr(owner, name, timed(getattr(owner, name), part, clock))
    return rank, letters


def timed_ops(ops: Ops, clock: Seconds) -> Ops:
    return dataclasses.replace(
        ops, **{name: timed(getattr(ops, name), f"op {name}", clock) for name in OP_NAMES}
    )


def timed(function: Callable[..., Any], part: str, clock: Seconds) -> Callable[..., Any]:
    def call(*args: Any, **named: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **named)
        finally:
            clock[part] += time.perf_counter() - start

    return call


def profile(rank: Rank, letters: Letters, clock: Seconds, batch: int) -> dict[str, float]:
    """Median seconds of each part over the decode steps of `batch` sequences."""
    rng = random.Random(batch)
    params = SamplingParams(max_tokens=STEPS, temperature=0, ignore_eos=True)
    for number in range(batch):
        prompt = [rng.randrange(10, 4000) for _ in range(128)]
        letters.waiting.append(encode(AddRequest(f"{batch}-{number}", prompt, params)))
    rank.step()  # the prefill
    steps: list[dict[str, float]] = []
    while rank.scheduler.has_work:
        clock.clear()
        rank.step()
        steps.append(dict(clock))
    parts = {name: statistics.median(step.get(name, 0.0) for step in steps) for name in steps[0]}
    ops = {name: seconds for name, seconds in parts.items() if name.startswith("op ")}
    around = parts.pop("forward") - sum(ops.values())
    whole = parts.pop("step")
    table = {name: seconds for name, seconds in sorted(ops.items(), key=lambda item: -item[1]) if seconds}
    table["around the ops"] = around
    table |= {name: seconds for name, seconds in parts.items() if name not in ops}
    table["the rest"] = whole - sum(table.values())
    table["step"] = whole
    return table


if __name__ == "__main__":
    if "OMP_WAIT_POLICY" not in os.environ:  # as launch.py starts ranks; torch reads it when it is imported
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"OMP_WAIT_POLICY": "PASSIVE"})
    main()
