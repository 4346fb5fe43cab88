"""Online balancing of experts: how fast it follows a change of traffic, what it moves, and what steps notice of it.

    PYTHONPATH=. python tools/bench_online.py --ranks 4 --seconds 30 --json figures.json
    PYTHONPATH=. python tools/bench_online.py --traces DIR          # recorded loads, 8 to 72 ranks, no engine

With an engine: the embedded model, one rank an attention replica, streams that decode all the time. Every --seconds
the running answers end and new ones begin in another domain, so that windows are of one domain alone; the window in
which that happens counts for neither. Modes: experts in order; a placement that eplb-offline would find for the load
of all domains; online, but new routes only; online with moves; the same with each step's own shares. Imbalance is max
/ mean of the tokens that ranks were really given in a window of decode steps, mean over the MoE layers; floor is what
chance leaves of it where every rank is as likely as the next. Back: full windows until it is at --target. Steps: time
between answers of one replica, decode steps alone; the ratios compare steps while experts move with the others of the
same run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from bench_serving import note, record_of
from online_replay import replay_table
from online_traffic import PROMPTS

from moeserve.config import EngineConfig, parse
from moeserve.eplb import solve
from moeserve.eplb.types import Placement
from moeserve.expert_balance import ExpertBalance
from moeserve.messages import FromRank, SamplingParams, StepDone
from moeserve.online.balancer import OnlineBalancer
from moeserve.plan import make_plan
from moeserve.server.errors import ApiError
from moeserve.server.frontend import Frontend
from moeserve.server.generation import Generation
from moeserve.serving import running_engine, server_settings, until_ready, with_tokenizer

MODES = ("in order", "offline placement", "online routes", "online + moves", "online, step routing")


@dataclass
class Seen:
    """One window of one domain alone. number: full windows since the change of traffic, from 1."""

    domain: int
    number: int
    seconds: float  # since the change, when it ended
    measured: float
    worst: float
    tokens: int


@dataclass
class Steps:
    """Seconds of decode steps, those while experts moved apart."""

    steady: list[float] = field(default_factory=list)
    moving: list[float] = field(default_factory=list)


@dataclass
class Run:
    mode: str
    windows: list[Seen]
    steps: Steps
    moves: int
    bytes: int
    rebalances: int
    load: np.ndarray[Any, Any]  # [W, L, E] decode


def main() -> None:
    flags = parse_flags()
    if flags.traces:
        text, figures = replay_table(Path(flags.traces), flags.target, note)
    else:
        runs = asyncio.run(measure(flags))
        figures = {run.mode: figures_of(run, flags) for run in runs}
        text = table(figures, runs, flags)
    print(text)
    if flags.json:
        Path(flags.json).write_text(json.dumps(record_of(figures, []), indent=1))


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--slots", type=int, default=0, help="default: two a rank more than one an expert")
    parser.add_argument("--streams", type=int, default=64, help="sequences that decode at a time, all ranks")
    parser.add_argument("--seconds", type=float, default=30.0, help="between changes of the domain")
    parser.add_argument("--domains", default="spanish,c,prose,python")
    parser.add_argument("--window-steps", type=int, default=50)
    parser.add_argument("--layers-per-step", type=int, default=2)
    parser.add_argument("--target", type=float, default=1.05)
    parser.add_argument("--modes", default=",".join(MODES), help="some of the modes, by name")
    parser.add_argument("--traces", metavar="DIR", help="replay these recorded loads instead")
    parser.add_argument("--json", metavar="FILE")
    flags = parser.parse_args()
    flags.modes = [name.strip() for name in flags.modes.replace("online, step", "online step").split(",")]
    flags.modes = [name.replace("online step", "online, step") for name in flags.modes]
    if unknown := [name for name in flags.modes if name not in MODES]:
        parser.error(f"--modes: {', '.join(unknown)} not among {'; '.join(MODES)}")
    flags.domains = flags.domains.split(",")
    flags.slots = flags.slots or 32 + 2 * flags.ranks
    return flags


async def measure(flags: argparse.Namespace) -> list[Run]:
    runs: list[Run] = []
    first: Run | None = None
    for mode in dict.fromkeys((MODES[0], *flags.modes)):
        note(f"{mode}: {len(flags.domains)} domains of {flags.seconds:g} s")
        online: dict[str, Any] = {"window_steps": flags.window_steps}
        if mode == "online routes":
            online["max_moves_per_layer"] = 0
        if mode == "online, step routing":
            online["routing"] = "step"
        async with engine(flags, online) as (frontend, balance):
            assert balance.online is not None
            if mode in MODES[:2]:
                balance.online.pause()
            if mode == "offline placement":
                assert first is not None
                await bring_in(balance.online, solve(first.load, balance.topology))
            run = await drive(mode, frontend, balance, flags)
        first = first or run
        runs.append(run)
    return runs


@contextlib.asynccontextmanager
async def engine(
    flags: argparse.Namespace, online: dict[str, Any]
) -> AsyncIterator[tuple[Frontend, ExpertBalance]]:
    balancer = {
        "num_slots": flags.slots,
        "layer_updates_per_iter": flags.layers_per_step,
        "online": online,
    }
    config = {
        "device": "cpu",
        "tensor_parallel_size": flags.ranks,
        "enable_attention_dp": True,
        "max_batch_size": max(1, -(-flags.streams // flags.ranks)) + 2,
        "max_num_tokens": 512,
        "num_threads": 1,
        "kv_cache_config": {"enable_block_reuse": False},
        "moe_config": {"load_balancer": balancer},
    }
    plan, tokenizer = with_tokenizer(make_plan(parse(EngineConfig, config)))
    async with running_engine(plan, tokenizer, server_settings(plan)) as frontend:
        await until_ready(frontend)
        assert frontend.balance is not None
        yield frontend, frontend.balance


async def bring_in(online: OnlineBalancer, placement: Placement) -> None:
    online.apply(online.plan(placement))
    while online.progress() is not None:
        await asyncio.sleep(0.05)


class Watch:
    """Looks at windows as they close and at the steps of one replica as they are answered."""

    def __init__(self, frontend: Frontend, balance: ExpertBalance) -> None:
        assert balance.online is not None
        self.balance, self.online = balance, balance.online
        self.windows: list[Seen] = []
        self.loads: list[np.ndarray[Any, Any]] = []
        self.steps = Steps()
        self.domain, self.changed, self.counted = -1, time.time(), 0
        self._last: tuple[float, int, int, bool] | None = None
        self._end = 0
        self._handle = frontend.handle
        frontend.handle = self.handle  # type: ignore[method-assign]

    def change(self) -> None:
        self.domain, self.changed, self.counted = self.domain + 1, time.time(), 0

    def handle(self, replica: int, message: FromRank) -> None:
        self._handle(replica, message)
        if replica == 0 and isinstance(message, StepDone) and message.outputs:
            self._step(message)
        self._look()

    def _step(self, message: StepDone) -> None:
        stats, now = message.stats, time.perf_counter()
        moving = self.online.state == "migrating"
        if self._last is not None:
            then, step, prompt_tokens, moved = self._last
            if stats.step == step + 1 and stats.prompt_tokens == prompt_tokens:
                (self.steps.moving if moving or moved else self.steps.steady).append(now - then)
        self._last = (now, stats.step, stats.prompt_tokens, moving)

    def _look(self) -> None:
        window = self.online.newest.get("decode")
        if window is None or window.end_step <= self._end:
            return
        self._end = window.end_step
        if self.domain < 0 or window.start < self.changed:
            return
        self.counted += 1
        found = self.balance.imbalance_of(window, "decode")
        assert found.measured_mean is not None and found.measured_worst is not None
        self.loads.append(window.load[1])
        self.windows.append(
            Seen(
                *(self.domain, self.counted, window.end - self.changed),
                *(found.measured_mean, found.measured_worst, window.tokens[1]),
            )
        )


async def drive(mode: str, frontend: Frontend, balance: ExpertBalance, flags: argparse.Namespace) -> Run:
    """All domains in turn, each for flags.seconds."""
    watch = Watch(frontend, balance)
    prompts = {name: [frontend.tokenizer.encode(text) for text in PROMPTS[name]] for name in flags.domains}
    running: dict[int, Generation] = {}
    domain = [flags.domains[0]]
    streams = [
        asyncio.create_task(stream(frontend, number, prompts, domain, running))
        for number in range(flags.streams)
    ]
    for name in flags.domains:
        domain[0] = name
        for generation in list(running.values()):
            generation.cancel()
        watch.change()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(frontend.dead.wait(), flags.seconds)
            raise RuntimeError(f"the engine died: {frontend.failure}")
        settled = [w.measured for w in watch.windows if w.domain == watch.domain][2:]
        note(f"  {name}: {watch.counted} windows, imbalance {median(settled):.3f} from the third on")
    for task in streams:
        task.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    ledger = watch.online.ledger
    applied = sum(count for (_, result), count in ledger.results.items() if result == "applied")
    moved = sum(record.bytes for record in ledger.newest_first() if record.trigger != "placement")
    moves = sum(record.moves for record in ledger.newest_first() if record.trigger != "placement")
    return Run(mode, watch.windows, watch.steps, moves, moved, applied, np.stack(watch.loads))


async def stream(
    frontend: Frontend,
    number: int,
    prompts: dict[str, list[list[int]]],
    domain: list[str],
    running: dict[int, Generation],
) -> None:
    rng = random.Random(number)
    while True:
        params = SamplingParams(
            max_tokens=rng.randint(100, 300),
            temperature=0.8,
            top_p=0.9,
            repetition_penalty=1.1,
            ignore_eos=True,
            seed=rng.getrandbits(60),
        )
        try:
            running[number] = generation = frontend.submit([rng.choice(prompts[domain[0]])], params)
        except ApiError:
            await asyncio.sleep(0.01)
            continue
        while await generation.next():
            pass


def figures_of(run: Run, flags: argparse.Namespace) -> dict[str, Any]:
    """What the table shows of a run, and its windows."""
    later = [w for w in run.windows if w.domain > 0] or run.windows
    number = max(w.domain for w in run.windows) + 1
    back = [recovery([w for w in later if w.domain == d], flags.target) for d in range(1, number)]
    reached = [found for found in back if found is not None]
    steady, moving = run.steps.steady, run.steps.moving
    usual = median(steady)
    return {
        "first": median([w.measured for w in later if w.number == 1]),
        "second": median([w.measured for w in later if w.number == 2]),
        "third": median([w.measured for w in later if w.number == 3]),
        "settled": median([w.measured for w in later if w.number > 3]),
        "floor": floor(int(median([w.tokens for w in later])) * 4, flags.ranks),
        "back_windows": median([float(windows) for windows, _ in reached]),
        "back_seconds": median([seconds for _, seconds in reached]),
        "back_of": f"{len(reached)}/{len(back)}",
        "rebalances": run.rebalances,
        "moves": run.moves,
        "megabytes": run.bytes / 1e6,
        "step_ms": usual * 1e3,
        "step_p99": quantile(steady, 0.99) / usual if steady else float("nan"),
        "moving_p50": median(moving) / usual if moving else float("nan"),
        "moving_p99": quantile(moving, 0.99) / quantile(steady, 0.99) if moving else float("nan"),
        "steady_over_2x": share_over(steady, 2 * usual),
        "moving_over_2x": share_over(moving, 2 * usual),
        "steps": {"steady": len(steady), "moving": len(moving)},
        "windows": [asdict(window) for window in run.windows],
    }


def recovery(windows: Sequence[Seen], target: float) -> tuple[int, float] | None:
    """(full windows, seconds) after the change until the imbalance is at the target; None where it never is."""
    for window in windows:
        if window.measured <= target:
            return window.number, window.seconds
    return None


def floor(tokens: int, ranks: int) -> float:
    """Max / mean that chance leaves when `tokens` fall on ranks that are equally likely."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(max(tokens, 1), np.full(ranks, 1 / ranks), size=4000)
    return float((counts.max(axis=1) / counts.mean(axis=1)).mean())


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")


def quantile(values: Sequence[float], part: float) -> float:
    return float(np.quantile(values, part)) if values else float("nan")


def share_over(values: Sequence[float], limit: float) -> float:
    return sum(value > limit for value in values) / len(values) if values else float("nan")


def table(figures: dict[str, dict[str, Any]], runs: Sequence[Run], flags: argparse.Namespace) -> str:
    head = (
        f"{flags.ranks} ranks, {flags.slots} slots, {flags.streams} streams, windows of {flags.window_steps} decode "
        f"steps, {len(flags.domains)} domains of {flags.seconds:g} s"
    )
    names = ("window 1", "2", "3", "later", "floor", "back at", "s", "moves", "MB")
    lines = [head, "", f"{'imbalance (max/mean)':<22}" + "".join(f"{name:>10}" for name in names)]
    for mode, f in figures.items():
        never = f["back_of"][0] == "0"
        back = "never" if never else f"{f['back_windows']:.0f} ({f['back_of']})"
        seconds = "-" if never else f"{f['back_seconds']:.1f}"
        lines.append(
            f"{mode:<22}{f['first']:>10.3f}{f['second']:>10.3f}{f['third']:>10.3f}{f['settled']:>10.3f}"
            f"{f['floor']:>10.3f}{back:>10}{seconds:>10}{f['moves']:>10}{f['megabytes']:>10.2f}"
        )
    names = ("ms", "p99/p50", "over 2x", "moving p50", "p99", "over 2x", "steps moving")
    lines += ["", f"{'decode steps':<22}" + "".join(f"{name:>13}" for name in names)]
    for mode, f in figures.items():
        lines.append(
            f"{mode:<22}{f['step_ms']:>13.2f}{f['step_p99']:>13.2f}{f['steady_over_2x']:>13.2%}"
            + (
                f"{f['moving_p50']:>12.2f}x{f['moving_p99']:>12.2f}x{f['moving_over_2x']:>13.2%}"
                if f["steps"]["moving"]
                else f"{'-':>13}{'-':>13}{'-':>13}"
            )
            + f"{f['steps']['moving']:>13}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
