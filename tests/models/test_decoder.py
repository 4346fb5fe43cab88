"""Logits of every family in every layout against transformers, by the real loader and the paged cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moeserve.comm.all_to_all import make_dispatcher
from moeserve.comm.layout import ParallelLayout
from moeserve.comm.mesh import Mesh
from moeserve.comm.spawn import RankPool
from moeserve.eplb.types import Placement, Topology
from moeserve.forward_batch import ForwardBatch
from moeserve.models.checkpoint import load
from moeserve.models.decoder import Decoder
from moeserve.models.registry import read_spec
from moeserve.moe.expert_map import ExpertMap
from moeserve.ops import native
from moeserve.ops.build import BuildError
from moeserve.ops.build import build as build_kernels
from moeserve.ops.table import OP_NAMES, Ops, choose_ops
from moeserve.stats.expert_load import ExpertLoad

GetPool = Callable[[int], RankPool]
Tiny = Callable[[str], Any]  # family -> conftest.Oracle

PAGE_SIZE, PAGES = 4, 24
# new tokens [step][sequence]: whole and chunked prefills, decodes, late starts
CHUNKS = ((13, 4, 0, 0, 7), (0, 3, 9, 5, 1), (0, 1, 1, 1, 1), (0, 1, 1, 0, 1))
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """A layout, how experts are placed, and which replica serves which sequence."""

    layout: dict[str, int] = field(default_factory=dict)
    redundant: int | None = None  # additional slots, filled at random; None is the identity
    dispatcher: str = "exchange"
    replicas: tuple[int, ...] | None = None  # replica of each sequence; None deals them round robin
    chunks: tuple[tuple[int, ...], ...] = CHUNKS
    kernels: bool = False  # the C kernels instead of the plain ops

    def replica(self, sequence: int) -> int:
        return self.replicas[sequence] if self.replicas else sequence % self.layout.get("dp", 1)


def random_placement(num_layers: int, num_experts: int, num_slots: int, seed: int) -> Placement:
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(num_layers):
        extra = random.integers(0, num_experts, num_slots - num_experts)
        rows.append(random.permutation(np.concatenate((np.arange(num_experts), extra))))
    return Placement(np.array(rows), num_experts)


def build(
    path: Path, case: Case, rank: int, dtype: torch.dtype = torch.float32
) -> tuple[Decoder, ExpertLoad | None]:
    spec = read_spec(path)
    mesh = Mesh(ParallelLayout(**case.layout), rank)
    experts: dict[str, Any] = {}
    if spec.moe is not None:
        layers, count = len(spec.moe_layers), spec.moe.num_experts
        slots = count + (case.redundant or 0)
        placement = (
            Placement.identity(layers, count, slots)
            if case.redundant is None
            else random_placement(layers, count, slots, seed=3)
        )
        topology = Topology.of(mesh.ep.size, slots)
        experts["expert_map"] = ExpertMap(placement, topology, mesh.ep.rank, "cpu")
        experts["dispatcher"] = make_dispatcher(case.dispatcher, mesh.ep, topology.slots_per_rank)
        experts["load"] = ExpertLoad(layers, count, slots)
    ops = kernel_ops() if case.kernels else choose_ops("cpu")
    model = Decoder(spec, mesh, dtype=dtype, ops=ops, **experts)
    load(model, path)
    return model, experts.get("load")


def kernel_ops() -> Ops:
    kernels = native.NativeOps(build_kernels())
    return Ops(**{name: getattr(kernels, name) for name in OP_NAMES})


def make_batch(
    case: Case, replica: int, step: int, done: Sequence[int], tokens: Sequence[Sequence[int]]
) -> tuple[ForwardBatch, list[tuple[int, int]]]:
    """The replica's batch of a step, and (sequence, position) of each of its logit rows."""
    tp, dp = case.layout.get("tp", 1), case.layout.get("dp", 1)
    totals = [sum(n for s, n in enumerate(case.chunks[step]) if case.replica(s) == r) for r in range(dp)]
    padded = [-(-total // tp) for total in totals]
    mine = [s for s, n in enumerate(case.chunks[step]) if n and case.replica(s) == replica]
    mine.sort(key=lambda s: case.chunks[step][s] != 1)  # decodes first
    ends = {s: done[s] + case.chunks[step][s] for s in mine}
    rows = [(s, position) for s in mine for position in range(done[s], ends[s])]
    padding = padded[replica] * tp - len(rows)
    pages = {s: [(7 * (s * 4 + i) + 5) % PAGES for i in range(4)] for s in mine}
    slots = [pages[s][p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for s, p in rows]
    lengths = [case.chunks[step][s] for s in mine]
    batch = ForwardBatch(
        token_ids=torch.tensor([tokens[s][p] for s, p in rows] + [0] * padding, dtype=torch.int64),
        positions=torch.tensor([p for _, p in rows] + [0] * padding, dtype=torch.int64),
        kv_slots=torch.tensor(slots + [-1] * padding, dtype=torch.int64),
        query_start=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        context_len=torch.tensor([ends[s] for s in mine], dtype=torch.int32),
        page_table=torch.tensor([pages[s] for s in mine], dtype=torch.int32).view(len(mine), 4),
        num_decode=sum(n == 1 for n in lengths),
        max_query_len=max(lengths, default=0),
        max_context_len=max((ends[s] for s in mine), default=0),
        logit_rows=torch.arange(len(rows)),
        rows_per_rank=tuple(n for n in padded for _ in range(tp)),
        want_experts=True,
    )
    return batch, rows


def run_case(
    rank: int, path: Path, case: Case, tokens: Sequence[Sequence[int]], expected: Sequence[Tensor]
) -> tuple[float, dict[tuple[int, int], list[list[int]]], Tensor | None]:
    """(largest logit error over the largest logit, the experts of each token, this rank's load [2, L, E])."""
    model, load_counts = build(path, case, rank)
    cache = model.new_kv_cache(PAGES, PAGE_SIZE)
    replica = rank // case.layout.get("tp", 1)
    done = [0] * len(tokens)
    error, chosen = 0.0, {}
    for step, chunks in enumerate(case.chunks):
        batch, rows = make_batch(case, replica, step, done, tokens)
        result = model.forward(batch, cache)
        for row, (sequence, position) in enumerate(rows):
            wanted = expected[sequence][position]
            error = max(error, float((result.logits[row] - wanted).abs().max()))
            if result.experts is not None:
                chosen[sequence, position] = result.experts[row].tolist()
        done = [n + m for n, m in zip(done, chunks, strict=True)]
    scale = max(float(x.abs().max()) for x in expected)
    counts = None if load_counts is None else torch.stack((load_counts.prefill, load_counts.decode))
    return error / scale, chosen, counts


def run_cases(rank: int, path: Path, cases: Sequence[Case], tokens: Any, expected: Any) -> list[Any]:
    return [run_case(rank, path, case, tokens, expected) for case in cases]


def check(oracle: Any, cases: Sequence[Case], pool: GetPool, size: int) -> None:
    """Run the cases on `size` ranks and compare logits, experts between layouts and ranks, and counters."""
    args = (oracle.path, cases, oracle.tokens, oracle.logits)
    by_rank = [run_cases(0, *args)] if size == 1 else pool(size).run(run_cases, *args, timeout=120)
    errors = [max(rank[number][0] for rank in by_rank) for number in range(len(cases))]
    print(f"{oracle.path.name} {size} ranks: largest error {max(errors):.1e} of the largest logit")
    for number, case in enumerate(cases):
        assert errors[number] <= TOLERANCE, f"{case}: {errors[number]}"
        chosen: dict[tuple[int, int], list[list[int]]] = {}
        for rank in by_rank:
            assert all(chosen.setdefault(key, value) == value for key, value in rank[number][1].items()), case
        if chosen:
            check_load(case, chosen, sum(rank[number][2] for rank in by_rank))


def check_load(case: Case, chosen: dict[tuple[int, int], list[list[int]]], counts: Tensor) -> None:
    """The counters hold each token's experts once, decode apart: padding is not in them."""
    wanted: Counter[tuple[int, int, int]] = Counter()
    done = [0] * len(case.chunks[0])
    for chunks in case.chunks:
        for sequence, new in enumerate(chunks):
            for position in range(done[sequence], done[sequence] + new):
                for layer, experts in enumerate(chosen[sequence, position]):
                    wanted.update((int(new == 1), layer, expert) for expert in experts)
            done[sequence] += new
    got = {tuple(place): int(counts[tuple(place)]) for place in counts.nonzero().tolist()}
    assert got == dict(wanted), case


MOE_FAMILIES = ("deepseek_v2", "deepseek_v2_groups", "deepseek_v3", "qwen3_moe", "mixtral")
DENSE_FAMILIES = ("llama", "qwen3")

LOCAL = [Case(), Case(redundant=5)]
TWO_RANKS = [
    Case({"tp": 2}),
    Case({"tp": 2}, redundant=4, dispatcher="gather"),
    Case({"tp": 2, "etp": 2}, redundant=3),
    Case({"dp": 2}, redundant=2),
    Case({"dp": 2}, dispatcher="gather", replicas=(0, 0, 0, 0, 0)),  # the other replica never has a token
    Case({"dp": 2, "etp": 2}),
]
FOUR_RANKS = [
    Case({"tp": 4}, redundant=4),
    Case({"tp": 4, "etp": 4}),
    Case({"tp": 4, "etp": 2}, redundant=2),
    Case({"tp": 4, "etp": 2}, redundant=2, dispatcher="gather"),
    Case({"dp": 4}, redundant=8),
    Case({"dp": 4}, redundant=4, dispatcher="gather", replicas=(2, 2, 0, 2, 3)),
    Case({"dp": 4, "etp": 2}, replicas=(1, 1, 1, 2, 2)),
    Case({"dp": 4, "etp": 4}),
    Case({"dp": 2, "tp": 2}, redundant=4),
    Case({"dp": 2, "tp": 2}, redundant=4, dispatcher="gather", replicas=(1, 1, 1, 1, 1)),
    Case({"dp": 2, "tp": 2, "etp": 2}, redundant=2),
    Case({"dp": 2, "tp": 2, "etp": 4}, replicas=(1, 0, 0, 0, 0)),
]
EIGHT_RANKS = [
    Case({"dp": 8}, redundant=8),
    Case({"dp": 4, "tp": 2, "etp": 2}, redundant=4, dispatcher="gather"),
    Case({"dp": 2, "tp": 4, "etp": 4}, redundant=2),
]
DENSE = {2: [Case({"tp": 2}), Case({"dp": 2})], 4: [Case({"tp": 4}), Case({"dp": 2, "tp": 2})]}


@pytest.mark.parametrize("family", [*MOE_FAMILIES, "embedded"])
def test_moe_on_one_rank(family: str, tiny: Tiny, rank_pool: GetPool) -> None:
    check(tiny(family), LOCAL, rank_pool, 1)


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_dense_on_one_rank(family: str, tiny: Tiny, rank_pool: GetPool) -> None:
    check(tiny(family), LOCAL[:1], rank_pool, 1)


@pytest.fixture(scope="module")
def kernels() -> None:
    try:
        build_kernels()
    except BuildError as error:
        pytest.skip(f"no C kernels here: {error}")


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("family", [*MOE_FAMILIES, *DENSE_FAMILIES, "embedded"])
def test_c_kernels(family: str, tiny: Tiny, rank_pool: GetPool) -> None:
    check(tiny(family), [Case(kernels=True)], rank_pool, 1)


@pytest.mark.multi_rank
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_c_kernels_on_two_ranks(family: str, tiny: Tiny, rank_pool: GetPool) -> None:
    layouts = [Case({"tp": 2}, kernels=True), Case({"tp": 2, "etp": 2}, kernels=True)]
    idle = Case({"dp": 2}, kernels=True, replicas=(1, 1, 1, 1, 1))
    check(tiny(family), [*layouts, idle], rank_pool, 2)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["embedded", "qwen3_moe"])
def test_a_row_has_the_same_bits_in_any_batch_and_chunk(family: str, dtype: torch.dtype, tiny: Tiny) -> None:
    oracle = tiny(family)
    together = all_logits(oracle, Case(kernels=True), dtype)
    for sequence in range(len(oracle.tokens)):
        whole = tuple(len(row) * (s == sequence) for s, row in enumerate(oracle.tokens))
        got = all_logits(oracle, Case(kernels=True, chunks=(whole,)), dtype)
        assert len(got) == len(oracle.tokens[sequence])
        assert all(torch.equal(got[key], together[key]) for key in got)


def all_logits(oracle: Any, case: Case, dtype: torch.dtype) -> dict[tuple[int, int], Tensor]:
    """Logits of each (sequence, position), on one rank."""
    model, _ = build(oracle.path, case, 0, dtype)
    cache = model.new_kv_cache(PAGES, PAGE_SIZE)
    done = [0] * len(oracle.tokens)
    logits = {}
    for step, chunks in enumerate(case.chunks):
        batch, rows = make_batch(case, 0, step, done, oracle.tokens)
        logits |= dict(zip(rows, model.forward(batch, cache).logits, strict=True))
        done = [n + m for n, m in zip(done, chunks, strict=True)]
    return logits


@pytest.mark.multi_rank
@pytest.mark.parametrize("size", DENSE)
@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_dense_on_several_ranks(family: str, size: int, tiny: Tiny, rank_pool: GetPool) -> None:
    check(tiny(family), DENSE[size], rank_pool, size)


@pytest.mark.multi_rank
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_moe_on_two_ranks(family: str, tiny: Tiny, rank_pool: GetPool) -> None:
    check(tiny(family), TWO_RANKS, rank_pool, 2)


SLOW = [
    pytest.param(family, marks=pytest.mark.slow)
    for family in (*MOE_FAMILIES, "embedded")
    if family != "deepseek_v3"
]


@pytest.mark.multi_rank
@pytest.mark.parametrize("family", ["deepseek_v3", *SLOW])
def test_moe_on_four_ranks(family: str, tiny: Tiny, rank_pool: GetPool) -> None:
    check(tiny(family), FOUR_RANKS, rank_pool, 4)


@pytest.mark.slow
@pytest.mark.multi_rank
def test_moe_on_eight_ranks(tiny: Tiny, rank_pool: GetPool) -> None:
    check(tiny("deepseek_v3"), EIGHT_RANKS, rank_pool, 8)
