"""Measures the expert all-to-all: one-sided memory against exchange over gloo and over rings, all in one run.

    PYTHONPATH=. python tools/bench_all_to_all.py [--ranks 2,4,8] [--repeats N] [--json FILE]
    PYTHONPATH=. python tools/bench_all_to_all.py --only model          # bytes, bounds and fits; measures nothing
    PYTHONPATH=. python tools/bench_all_to_all.py --device cuda         # the GPU kernels, 8 virtual ranks on one GPU

Ways take turns, so that all see the same machine; figures are medians over turns of the slowest rank. GB/s counts
what all ranks write, their own part included. With more ranks than cores the time is mostly that of waiting for a core.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from all_to_all_model import beside_published, bounds, bytes_a_token
from torch import Tensor
from tqdm import tqdm

from moeserve.comm.all_to_all import NAMES, make_dispatcher
from moeserve.comm.all_to_all.one_sided.cpu_engine import CpuEngine
from moeserve.comm.all_to_all.one_sided.dispatcher import OneSidedDispatcher, RowSizes
from moeserve.comm.all_to_all.one_sided.layout import EpConfig, EpLayout, RowFormat
from moeserve.comm.all_to_all.protocol import TokenDispatcher
from moeserve.comm.group import Group
from moeserve.comm.layout import ParallelLayout
from moeserve.comm.mesh import Mesh
from moeserve.comm.spawn import RankPool
from moeserve.comm.symm import SymmHeap

ROW = RowFormat(512, torch.float32)
KIB = (64, 1024)
"""Bytes of a pair of ranks in one all-to-all."""
DECODE = RowSizes(max_rows=4, width=128, top_k=4, dtype=torch.float32)
"""A decode step of the embedded model: 32 experts."""
PARTS = ("pairs", "steps", "model", "engine")
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ranks", default="2,4,8", help="numbers of ranks, with commas (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=40, help="of each way (default: %(default)s)")
    parser.add_argument("--only", choices=PARTS, help="one part alone; model measures nothing")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", metavar="FILE")
    flags = parser.parse_args()
    sizes = [int(size) for size in flags.ranks.split(",")]
    wanted: Sequence[str] = PARTS if flags.only is None else (flags.only,)
    tables: dict[str, list[Row]] = {}
    if flags.device == "cuda":
        from all_to_all_virtual import time_virtual

        wanted = ()
        tables["virtual"] = time_virtual(torch.device("cuda"), flags.repeats)
        show("8 virtual ranks on one GPU, DeepSeek-V3, microseconds a rank: no NVLink", tables["virtual"])
    if "pairs" in wanted:
        tables["pairs"] = measured(measure_pairs, sizes, flags.repeats)
        show("all-to-all of equal parts, milliseconds and GB/s", tables["pairs"])
    if "steps" in wanted:
        tables["steps"] = measured(measure_steps, sizes, flags.repeats * 5)
        show("latency, microseconds: nothing to send; a decode step's dispatch and combine", tables["steps"])
    if "engine" in wanted:
        tables["engine"] = measure_engine(4, max(3, flags.repeats // 10))
        show("embedded model, 4 attention replicas of one rank, through the real engine", tables["engine"])
    if "model" in wanted:
        tables["bytes"], tables["bounds"], tables["fit"] = bytes_a_token(), bounds(), beside_published()
        show("DeepSeek-V3, KB that a rank sends for a token (fp8 rows, bf16 results)", tables["bytes"])
        show("least microseconds a layer, dispatch fp8 | combine bf16", tables["bounds"])
        show("fit beside TensorRT-LLM's published GB200 NVL72 figures (tech blog 18)", tables["fit"])
        print("\nNone of these bounds and fits was measured here: no NVLink between GPUs was at hand.")
    if flags.json:
        from bench_serving import record_of  # here, as in run_engine

        Path(flags.json).write_text(json.dumps(record_of(tables, None), indent=1))


def measured(work: Callable[..., list[Row]], sizes: Sequence[int], repeats: int) -> list[Row]:
    """work(rank, size, repeats) on pools of each size: the slowest rank's figures."""
    table: list[Row] = []
    for size in tqdm(sizes, desc=work.__name__, disable=None, leave=False):
        with RankPool(size) as pool:
            table += [slowest(rows) for rows in zip(*pool.run(work, size, repeats, timeout=600), strict=True)]
    return table


def slowest(rows: Sequence[Row]) -> Row:
    """Times are the longest of the ranks'; everything else is the same on all."""
    row = {name: max(r[name] for r in rows) for name in rows[0]}
    for name in [name for name in row if name.endswith(" ms") and "bytes" in row]:
        row[name.replace(" ms", " GB/s")] = row["bytes"] / row[name] / 1e6
    if "gloo ms" in row:
        row["one-sided / gloo"] = row["gloo ms"] / row["one-sided ms"]
        row["one-sided / rings"] = row["rings ms"] / row["one-sided ms"]
    return {name: value for name, value in row.items() if name != "bytes"}


def in_turns(ways: dict[str, Callable[[], float]], repeats: int, unit: float) -> dict[str, float]:
    """Each way gives the seconds of one go -> medians in `unit` seconds, of runs of goes that take turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(5):
        for name, way in ways.items():
            way()
            times[name] += [way() for _ in range(-(-repeats // 5))]
    return {name: statistics.median(found) / unit for name, found in times.items()}


def groups(rank: int, size: int) -> dict[str, Group]:
    layout = ParallelLayout(dp=size)
    return {
        "gloo": Mesh(layout, rank, shared_memory=False).ep,
        "rings": Mesh(layout, rank).ep,
    }


# --- parts of equal size ------------------------------------------------------------------------------------------


def measure_pairs(rank: int, size: int, repeats: int) -> list[Row]:
    """All-to-all of KIB bytes a pair, alone, and the same rows as tokens: one choice on every rank, there and back."""
    table = []
    via = groups(rank, size)
    for kib in KIB:
        rows = kib * 1024 // ROW.nbytes
        parts = torch.randn(size * rows, ROW.width)
        engine = make_engine(via["rings"], rows)
        ways = {f"{name} ms": timed_exchange(group, parts, rows) for name, group in via.items()}
        ways["one-sided ms"] = timed_put(engine, parts[:rows])
        row: Row = {"ranks": size, "KiB a pair": kib, "bytes": size * size * kib * 1024}
        row |= in_turns(ways, repeats, 1e-3)
        slots = torch.arange(size).repeat(rows, 1)
        sizes = RowSizes(rows, ROW.width, size, ROW.dtype)
        for name, dispatcher in dispatchers(via, 1, sizes).items():
            ways = {name: timed_step(dispatcher, size, parts[:rows], slots)}
            row[f"{name}, there and back, ms"] = in_turns(ways, repeats, 1e-3)[name]
        table.append(row)
    return table


def make_engine(group: Group, rows: int) -> CpuEngine:
    layout = EpLayout(EpConfig(group.size, rows, group.size, 1, ROW, ROW))
    heap = SymmHeap.create("shm", group.rank, group.size, layout.nbytes, group)
    return CpuEngine(heap, layout, timeout=60, keep_spare=False)


def timed_exchange(group: Group, parts: Tensor, rows: int) -> Callable[[], float]:
    def go() -> float:
        group.barrier()
        start = time.perf_counter()
        group.all_to_all(parts, [rows] * group.size, [rows] * group.size)
        return time.perf_counter() - start

    return go


def timed_put(engine: CpuEngine, x: Tensor) -> Callable[[], float]:
    """Rows into all blocks until all have come; the rest of the step, which has no results, is not timed."""
    slots = torch.arange(engine.world).repeat(len(x), 1)
    none, weights = torch.empty(0, 2, dtype=torch.int64), torch.zeros(0, engine.world)

    def go() -> float:
        start = time.perf_counter()
        engine.put(x, slots)
        engine.await_rows()
        seconds = time.perf_counter() - start
        engine.push(x[:0], none, everyone=True)
        engine.finish(weights, slots[:0], everyone=True)
        return seconds

    return go


# --- dispatch and combine -----------------------------------------------------------------------------------------


def dispatchers(via: dict[str, Group], slots: int, sizes: RowSizes) -> dict[str, TokenDispatcher]:
    group = via["rings"]
    return {
        "exchange, gloo": make_dispatcher("exchange", via["gloo"], slots),
        "exchange, rings": make_dispatcher("exchange", group, slots),
        "gather, rings": make_dispatcher("gather", group, slots),
        "one-sided": OneSidedDispatcher(group, slots, sizes),
    }


def timed_step(dispatcher: TokenDispatcher, size: int, x: Tensor, slots: Tensor) -> Callable[[], float]:
    weights = torch.ones(slots.shape)

    def go() -> float:
        start = time.perf_counter()
        got = dispatcher.dispatch(x, slots, weights).wait()
        dispatcher.combine(got.rows, got).wait()
        return time.perf_counter() - start

    dispatcher.begin_step([len(x)] * size)
    return go


def measure_steps(rank: int, size: int, repeats: int) -> list[Row]:
    """A barrier, a step without tokens, and a step of a few tokens, with 32 experts on all ranks together."""
    via = groups(rank, size)
    experts = 32 // size
    engine = make_engine(via["rings"], 1)
    generator = torch.Generator().manual_seed(rank)
    row: Row = {"ranks": size}
    ways = {f"{name} barrier": timed_barrier(group) for name, group in via.items()}
    row |= in_turns(
        ways | {"one-sided empty put": timed_put(engine, torch.empty(0, ROW.width))}, repeats, 1e-6
    )
    x = torch.randn(DECODE.max_rows, DECODE.width)
    slots = torch.stack([torch.randperm(32, generator=generator)[: DECODE.top_k] for _ in x])
    ways = {}
    for name, dispatcher in dispatchers(via, experts, DECODE).items():
        ways[f"step: {name}"] = timed_step(dispatcher, size, x, slots)
    return [row | in_turns(ways, repeats, 1e-6)]


def timed_barrier(group: Group) -> Callable[[], float]:
    def go() -> float:
        start = time.perf_counter()
        group.barrier()
        return time.perf_counter() - start

    return go


# --- the engine ---------------------------------------------------------------------------------------------------


def measure_engine(replicas: int, turns: int) -> list[Row]:
    """Decode steps of 4 sequences a rank, and prompts of 900 tokens, with each transport."""
    found: dict[str, list[Row]] = {name: [] for name in NAMES}
    for turn in range(turns):
        for name, figures in found.items():
            print(f"engine, turn {turn + 1} of {turns}: {name}", file=sys.stderr, flush=True)
            figures.append(run_engine(name, replicas))
    table = []
    for name, figures in found.items():
        row: Row = {"all_to_all": name}
        row |= {key: statistics.median(figure[key] for figure in figures) for key in figures[0]}
        table.append(row)
    base = table[0]
    return [row | {"decode, of exchange": row["decode step ms"] / base["decode step ms"]} for row in table]


def run_engine(name: str, replicas: int) -> Row:
    from moeserve.llm import LLM  # here: ranks of the other parts import this file, and have no use for it
    from moeserve.messages import SamplingParams

    luck = random.Random(0)
    short = [[luck.randrange(10, 4000) for _ in range(16)] for _ in range(4 * replicas)]
    long = [[luck.randrange(10, 4000) for _ in range(900)] for _ in range(2 * replicas)]
    steps = 96
    with LLM(
        tensor_parallel_size=replicas,
        enable_attention_dp=True,
        max_num_tokens=2048,
        moe_config={"all_to_all": name},
        kv_cache_config={"enable_block_reuse": False},
    ) as llm:
        llm.generate(short[:replicas], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
        times = []
        for prompts, tokens in ((short, 1), (short, 1 + steps), (long, 1)):
            start = time.perf_counter()
            llm.generate(prompts, SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True))
            times.append(time.perf_counter() - start)
    first, all_steps, prefill = times
    return {
        "decode step ms": (all_steps - first) / steps * 1e3,
        "prompt tokens/s": sum(map(len, long)) / prefill,
    }


# --- results ------------------------------------------------------------------------------------------------------


def show(title: str, table: Sequence[Row]) -> None:
    """One block of lines a row of few columns; wide tables are turned."""
    print(f"\n{title}")
    names = list(table[0])
    if len(names) > 8:
        width = max(map(len, names))
        for name in names:
            print(f"{name:<{width}}" + "".join(f"{shown(row[name]):>14}" for row in table))
        return
    widths = [max(len(name), *(len(shown(row[name])) for row in table)) for name in names]
    print("  ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True)))
    for row in table:
        print("  ".join(f"{shown(row[name]):>{width}}" for name, width in zip(names, widths, strict=True)))


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return "-" if value is None else str(value)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
