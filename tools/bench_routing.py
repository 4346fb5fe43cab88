"""What counting and routing cost: their share of a decode step of the embedded model, and microseconds a layer.

    PYTHONPATH=. python tools/bench_routing.py [--ranks N] [--batch N] [--repeats N] [--json FILE]

Ways of routing take turns, step by step, on real ranks of this machine; figures are medians. Counting is what is
launched in the step and, every 32 steps, the sum of what has waited.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeserve.comm.all_to_all import make_dispatcher
from moeserve.comm.layout import ParallelLayout
from moeserve.comm.mesh import Mesh
from moeserve.comm.spawn import RankPool
from moeserve.config import EMBEDDED_MODEL
from moeserve.eplb import solve
from moeserve.eplb.synthetic import Traffic
from moeserve.eplb.types import Placement, Topology
from moeserve.forward_batch import ForwardBatch
from moeserve.models.checkpoint import load
from moeserve.models.decoder import Decoder
from moeserve.models.registry import read_spec
from moeserve.moe.expert_map import ExpertMap, Routing
from moeserve.moe.layer import MoeLayer
from moeserve.ops import native
from moeserve.stats.expert_load import MAX_STEPS, ExpertLoad

ROUTINGS: tuple[Routing, ...] = ("even", "shares", "step")
SHAPES = ((4, 40, 32, 4, 8), (8, 72, 64, 6, 64), (32, 288, 256, 8, 64), (32, 288, 256, 8, 128))
CONTEXT, PAGE_SIZE = 160, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="sequences a rank")
    parser.add_argument("--repeats", type=int, default=200, help="steps of each way of routing")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    steps = []
    with RankPool(arguments.ranks) as pool:
        for batch in arguments.batch:
            by_rank = pool.run(time_steps, batch, arguments.repeats, timeout=300)
            for routing in ROUTINGS:
                parts = [figures[routing] for figures in by_rank]
                row = {name: statistics.median(part[name] for part in parts) for name in parts[0]}
                steps.append({"step": f"decode {batch} a rank, {routing}", **row})
    show(["step", "step us", "route us", "count us", "route %", "count %"], steps)
    layers = [time_layer(*shape, arguments.repeats) for shape in SHAPES]
    show(["layer", "table us", "step us", "step plain us", "count us"], layers)
    if arguments.json:
        arguments.json.write_text(json.dumps(report(steps, layers), indent=2))


def time_steps(rank: int, batch_size: int, repeats: int) -> dict[str, dict[str, float]]:
    """Medians over decode steps on this rank, by the way of routing."""
    torch.set_num_threads(1)
    native.enable()
    spec = read_spec(EMBEDDED_MODEL)
    assert spec.moe is not None
    ranks = torch.distributed.get_world_size()
    mesh = Mesh(ParallelLayout(dp=ranks), rank)
    num_layers, experts = len(spec.moe_layers), spec.moe.num_experts
    topology = Topology.of(ranks, (-(-experts // ranks) + 2) * ranks)
    placement = Placement.identity(num_layers, experts, topology.num_slots)
    maps = {r: ExpertMap(placement, topology, mesh.ep.rank, "cpu", r) for r in ROUTINGS}
    counts = ExpertLoad(num_layers, experts, topology.num_slots)
    model = Decoder(
        spec,
        mesh,
        dtype=torch.float32,
        expert_map=maps["shares"],
        dispatcher=make_dispatcher("exchange", mesh.ep, topology.slots_per_rank),
        load=counts,
    )
    load(model, EMBEDDED_MODEL)
    batch = make_batch(batch_size, ranks, spec.vocab_size, rank)
    cache = model.new_kv_cache(int(batch.page_table.max()) + 1, PAGE_SIZE)
    clock: defaultdict[str, float] = defaultdict(float)
    for part, owners, names in (
        ("route", list(maps.values()), ("begin_step", "look_up")),
        ("count", [counts], ("begin_step", "add")),
    ):
        for owner in owners:
            for name in names:
                setattr(owner, name, timed(getattr(owner, name), part, clock))
    taken: dict[str, list[dict[str, float]]] = {routing: [] for routing in ROUTINGS}
    with torch.inference_mode():
        for number in range(len(ROUTINGS) * (repeats + 10)):
            routing = ROUTINGS[number // 50 % len(ROUTINGS)]
            model.expert_map = maps[routing]
            for layer in model.layers:
                if isinstance(layer.feed_forward, MoeLayer):
                    layer.feed_forward._expert_map = maps[routing]
            clock.clear()
            timed(model.forward, "step", clock)(batch, cache)
            taken[routing].append(dict(clock))
    return {routing: summary(steps[10:]) for routing, steps in taken.items()}


def summary(steps: list[dict[str, float]]) -> dict[str, float]:
    """Counting is a mean: most of it falls in one step of 32."""
    step = statistics.median(s["step"] for s in steps)
    route = statistics.median(s["route"] for s in steps)
    count = statistics.mean(s["count"] for s in steps)
    return {
        "step us": step * 1e6,
        "route us": route * 1e6,
        "count us": count * 1e6,
        "route %": 100 * route / step,
        "count %": 100 * count / step,
    }


def timed(function: Callable[..., Any], part: str, clock: defaultdict[str, float]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args)
        finally:
            clock[part] += time.perf_counter() - start

    return call


def make_batch(sequences: int, ranks: int, vocabulary: int, seed: int) -> ForwardBatch:
    """Decodes at CONTEXT tokens, each sequence on pages of its own."""
    generator = torch.Generator().manual_seed(seed)
    pages = -(-CONTEXT // PAGE_SIZE)
    page_table = torch.arange(sequences * pages, dtype=torch.int32).view(sequences, pages)
    return ForwardBatch(
        token_ids=torch.randint(0, vocabulary, (sequences,), generator=generator),
        positions=torch.full((sequences,), CONTEXT - 1),
        kv_slots=page_table[:, -1].long() * PAGE_SIZE + (CONTEXT - 1) % PAGE_SIZE,
        query_start=torch.arange(sequences + 1, dtype=torch.int32),
        context_len=torch.full((sequences,), CONTEXT, dtype=torch.int32),
        page_table=page_table,
        num_decode=sequences,
        max_query_len=1,
        max_context_len=CONTEXT,
        logit_rows=torch.arange(sequences),
        rows_per_rank=(sequences,) * ranks,
    )


def time_layer(ranks: int, slots: int, experts: int, top_k: int, tokens: int, repeats: int) -> dict[str, Any]:
    """One layer's look-up and counting on one source rank, no model around them."""
    torch.set_num_threads(1)
    native.enable()
    topology, traffic = Topology.of(ranks, slots), Traffic.make(1, experts)
    steps = traffic.counts(traffic.mixes("drift", 32), ranks * tokens * top_k)
    placement = solve(steps, topology)
    chance = steps.sum(axis=(0, 1)) / steps.sum()
    chosen = torch.tensor(np.random.default_rng(0).choice(experts, (tokens, top_k), p=chance))
    valid, decode = torch.ones(2, tokens, dtype=torch.bool).unbind()
    table, step = (ExpertMap(placement, topology, 0, "cpu", r) for r in ("shares", "step"))
    plain = ExpertMap(placement, topology, 0, "cpu", "step")
    plain._spread = native.reference.spread_tokens
    counts = ExpertLoad(1, experts, slots)

    def count() -> None:
        for _ in range(MAX_STEPS):
            counts.begin_step(valid, decode)
            counts.add(0, chosen, chosen)
        counts._counted()

    for expert_map in (table, step, plain):
        expert_map.begin_step(valid)
    figures: dict[str, Any] = {"layer": f"{ranks} ranks, {experts} in {slots}, top {top_k}, {tokens} rows"}
    for name, run, times in (
        ("table us", lambda: table.look_up(0, chosen), 1),
        ("step us", lambda: step.look_up(0, chosen), 1),
        ("step plain us", lambda: plain.look_up(0, chosen), 1),
        ("count us", count, MAX_STEPS),
    ):
        clock: defaultdict[str, float] = defaultdict(float)
        taken = []
        for _ in range(max(10, repeats // (10 if times > 1 else 1))):
            clock.clear()
            timed(run, name, clock)()
            taken.append(clock[name] / times)
        figures[name] = statistics.median(taken) * 1e6
    return figures


def show(columns: list[str], rows: list[dict[str, Any]]) -> None:
    width = max(len(str(row[columns[0]])) for row in rows) + 2
    print("\n" + f"{columns[0]:<{width}}" + "".join(f"{column:>15}" for column in columns[1:]))
    for row in rows:
        print(f"{row[columns[0]]:<{width}}" + "".join(f"{row[column]:>15.1f}" for column in columns[1:]))


def report(steps: list[dict[str, Any]], layers: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "command": " ".join(sys.argv),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.processor() or platform.machine()}, {platform.system()}",
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
        "steps": steps,
        "layers": layers,
    }


if __name__ == "__main__":
    main()
