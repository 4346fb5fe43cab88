"""The Triton kernels under the interpreter: virtual ranks in lock-step against a dense reference, field by field.

The interpreter must be chosen before triton is imported, so the checks run in a process of their own.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor

from moeserve.comm.all_to_all.one_sided.layout import (
    CTL_EPOCH,
    EpConfig,
    EpLayout,
    RowFormat,
    mail_word,
)
from moeserve.comm.all_to_all.protocol import Dispatched
from moeserve.comm.all_to_all.reference import combine_all, dispatch_all
from moeserve.comm.spawn import RankPool

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.multi_rank,
]

if TYPE_CHECKING:
    from moeserve.comm.all_to_all.one_sided.triton_engine import TritonEngine

LOST, NONE = -2, -1


# --- in the test's process ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreter() -> Iterator[RankPool]:
    """interpreter.run(function, *args): function(0, *args) where triton interprets its kernels."""
    with pytest.MonkeyPatch.context() as patch, RankPool(1) as pool:
        patch.setenv("TRITON_INTERPRET", "1")
        pool.run(interpret_faster)
        yield pool


def interpret_faster(rank: int) -> None:
    """Has the interpreter prepare triton's language once and not at every call, which is most of its time."""
    from triton.runtime import interpreter

    prepared = set()
    prepare = interpreter._patch_lang

    class Kept:
        def restore(self) -> None:
            """The language stays as it is until the process ends."""

    def prepare_once(function: object) -> Kept:
        names = getattr(function, "__globals__", {})
        modules = frozenset(
            id(names[name]) for name in names if names[name] in (interpreter.tl, interpreter.tl.core)
        )
        if modules not in prepared:
            prepared.add(modules)
            prepare(function)
        return Kept()

    assert os.environ["TRITON_INTERPRET"] == "1"
    interpreter._patch_lang = prepare_once


@pytest.mark.parametrize("seed", range(6))
def test_a_step_leaves_what_the_reference_says(interpreter: RankPool, seed: int) -> None:
    interpreter.run(check_seed, seed)


# --- in the interpreter's process -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Sizes, and a step's inputs of all ranks. table: int32 [E, C] slots of experts, None where ids are slots."""

    config: EpConfig
    xs: list[Tensor]
    scales: list[Tensor] | None
    ids: list[Tensor]
    weights: list[Tensor]
    table: Tensor | None

    def slots(self) -> list[Tensor]:
        """int64 [b, K] of each rank."""
        if self.table is None:
            return self.ids
        found = []
        for ids in self.ids:
            column = torch.arange(len(ids)) % self.table.shape[1]
            slots = self.table[ids.clamp(min=0), column[:, None]].to(torch.int64)
            found.append(slots.masked_fill(ids < 0, -1))
        return found


def make_config(random: np.random.Generator, **fixed: object) -> EpConfig:
    """Random sizes; K beyond R, S and what a power of two holds, all of them at times 1."""
    world = int(random.integers(1, 6))
    width = int(random.choice([1, 3, 8, 40, 130]))
    dtype = [torch.float32, torch.bfloat16, torch.float16][int(random.integers(3))]
    form = RowFormat(width, dtype, int(random.choice([0, 0, 5])))
    sizes: dict[str, object] = {
        "world": world,
        "max_tokens": int(random.integers(1, 20)),
        "top_k": int(random.choice([1, 2, 3, 6, 8, 10, 22])),
        "slots_per_rank": int(random.integers(1, 7)),
        "x": form,
        "result": RowFormat(width, dtype),
        "combine": ["push", "pull"][int(random.integers(2))],
    }
    return EpConfig(**(sizes | fixed))  # type: ignore[arg-type]


def make_inputs(config: EpConfig, seed: int, table: Tensor | None = None) -> Case:
    """Random inputs; each kind of awkward one comes up every few seeds."""
    random, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    num_slots = config.world * config.slots_per_rank
    tokens = random.integers(0, config.max_tokens + 1, config.world).tolist()
    low, high = 0, num_slots if table is None else len(table)
    kind = seed % 6
    if kind == 1:
        tokens = [0] * config.world
    if kind == 2:
        tokens[int(random.integers(config.world))] = 0
    if kind == 3:  # as many as fit, all to one rank
        tokens = [config.max_tokens] * config.world
        if table is None:
            low = int(random.integers(config.world)) * config.slots_per_rank
            high = low + config.slots_per_rank
    ids = [torch.randint(low, high, (count, config.top_k), generator=generator) for count in tokens]
    if kind in (4, 5):
        share = 0.3 if kind == 4 else 1.0
        ids = [i.masked_fill(torch.rand(i.shape, generator=generator) < share, -1) for i in ids]
    form = config.x
    xs = [torch.randn(count, form.width, generator=generator).to(form.dtype) for count in tokens]
    scales = None
    if form.num_scales:
        scales = [torch.rand(count, form.num_scales, generator=generator) for count in tokens]
    weights = [torch.randn(count, config.top_k, generator=generator) for count in tokens]
    return Case(config, xs, scales, ids, weights, table)


def make_table(config: EpConfig, random: np.random.Generator) -> Tensor:
    """Every slot has an expert, experts have 1 to 4 replicas, in a table of 4 columns."""
    num_slots = config.world * config.slots_per_rank
    num_experts = int(random.integers(max(1, num_slots // 2), num_slots + 1))
    of_slot = np.concatenate(
        [np.arange(num_experts), random.integers(0, num_experts, num_slots - num_experts)]
    )
    random.shuffle(of_slot)
    rows = [np.resize(np.flatnonzero(of_slot == expert), 4) for expert in range(num_experts)]
    return torch.tensor(np.stack(rows), dtype=torch.int32)


def same_bits(got: Tensor, expected: Tensor) -> bool:
    kinds = got.dtype == expected.dtype and got.shape == expected.shape
    return kinds and torch.equal(got.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def experts(rows: Tensor, tokens_per_slot: Tensor, first_slot: int, dtype: torch.dtype) -> Tensor:
    """Something that differs by slot and by row."""
    slot = torch.repeat_interleave(
        torch.arange(first_slot, first_slot + len(tokens_per_slot)), tokens_per_slot
    )
    return (torch.sin(rows.float() * 3) * (slot + 1).sqrt().unsqueeze(1)).to(dtype)


@dataclass(frozen=True)
class Sent:
    """What a source must have put to one rank."""

    tokens: list[int]
    slots: Tensor  # [rows, K] local
    cells: list[int]  # ranks that each token's earlier choices went to
    counts: Tensor  # [S]


def expect_sent(slots: Tensor, rank: int, slots_per_rank: int) -> Sent:
    target = slots.div(slots_per_rank, rounding_mode="floor")
    tokens = (target == rank).any(1).nonzero()[:, 0].tolist()
    local = torch.where(target == rank, slots - rank * slots_per_rank, -1)
    cells = []
    for token in tokens:
        order = list(dict.fromkeys(t for t in target[token].tolist() if t >= 0))
        cells.append(order.index(rank))
    counts = torch.bincount(local[local >= 0], minlength=slots_per_rank)
    return Sent(tokens, local[tokens], cells, counts)


class Steps:
    """Virtual ranks, and what all their steps so far must have led to."""

    def __init__(self, config: EpConfig, table: Tensor | None = None, keep_spare: bool = False) -> None:
        from moeserve.comm.all_to_all.one_sided.triton_engine import ExpertTable
        from moeserve.comm.all_to_all.one_sided.virtual import virtual_ranks

        self.config, self.table, self.epoch = config, table, 0
        num_ids = None if table is None else len(table)
        self.engines = virtual_ranks(config, num_ids=num_ids, keep_spare=keep_spare)
        self.layout = EpLayout(config)
        self.blocks = [engine.block for engine in self.engines]
        self.tables = [None if table is None else ExpertTable(table, "cpu", version=3) for _ in self.engines]
        self.counts = [torch.zeros_like(engine.counts) for engine in self.engines]
        self.alive = [True] * config.world

    def run(self, case: Case, version: int = 3) -> list[Tensor]:
        """One step, looked at after each phase -> the sums of each rank."""
        self.epoch += 1
        slots = case.slots()
        for engine, table, x, ids, weights in zip(
            self.engines, self.tables, case.xs, case.ids, case.weights, strict=True
        ):
            engine.send(x, ids, weights, None if case.scales is None else case.scales[engine.rank], table)
        for rank, chosen in enumerate(slots):
            self.check_source(rank, case.ids[rank], chosen)
            for target in range(self.config.world):
                self.check_sent(rank, target, case, chosen, version)
        expected = dispatch_all(case.xs, slots, self.config.slots_per_rank)
        ys = [self.check_received(engine, expected, slots) for engine in self.engines]
        for engine, y in zip(self.engines, ys, strict=True):
            engine.send_back(y)
        outs = []
        for engine, x in zip(self.engines, case.xs, strict=True):
            out = engine.receive_back(torch.full((len(x), self.config.result.width), 9.0, dtype=ys[0].dtype))
            assert not engine.lost[: len(x)].any()
            assert engine.query_fault() == []
            outs.append(out)
        self.check_sums(outs, ys, expected, case)
        return outs

    def check_source(self, rank: int, ids: Tensor, slots: Tensor) -> None:
        from moeserve.comm.all_to_all.one_sided import device_words

        engine, each = self.engines[rank], self.config.slots_per_rank
        self.counts[rank] += torch.bincount(ids[ids >= 0], minlength=len(self.counts[rank]))
        assert torch.equal(engine.counts, self.counts[rank])
        assert torch.equal(
            engine.target[: len(slots)], slots.div(each, rounding_mode="floor").to(torch.int32)
        )
        words = engine.words.tolist()
        assert words[device_words.EPOCH.value] == self.epoch
        assert words[device_words.PUT_ARRIVALS.value] == words[device_words.ANSWER_ARRIVALS.value] == 0
        assert words[device_words.MISMATCHES.value] == words[device_words.UNSAFE.value] == 0
        assert self.layout.ctl.view(self.blocks[rank])[CTL_EPOCH] == self.epoch

    def check_sent(self, source: int, target: int, case: Case, slots: Tensor, version: int) -> None:
        layout, block, parity = self.layout, self.blocks[target], self.epoch & 1
        sent = expect_sent(slots, target, self.config.slots_per_rank)
        count = len(sent.tokens)
        assert self.engines[source].sent[target] == count
        assert layout.mail.view(block)[parity, source] == mail_word(self.epoch, count)
        assert torch.equal(layout.slot_cnt.view(block)[parity, source], sent.counts.to(torch.int32))
        assert layout.meta_token.view(block)[source, :count].tolist() == sent.tokens
        if self.table is not None:
            assert (layout.meta_version.view(block)[source, :count] == version).all()
        assert torch.equal(layout.meta_slots.view(block)[source, :count], sent.slots.to(torch.int16))
        assert same_bits(layout.x_values.view(block)[source, :count], case.xs[source][sent.tokens])
        if case.scales is not None:
            assert same_bits(layout.x_scales.view(block)[source, :count], case.scales[source][sent.tokens])
        if layout.meta_weights is not None:
            assert layout.meta_cell.view(block)[source, :count].tolist() == sent.cells
            got = layout.meta_weights.view(block)[source, :count]
            assert torch.equal(got[sent.slots >= 0], case.weights[source][sent.tokens][sent.slots >= 0])
        if layout.stats is not None:
            got = layout.stats.view(block)[source]
            assert torch.equal(got, self.counts[source][: len(got)].to(torch.int32))

    def check_received(self, engine: TritonEngine, expected: list[Dispatched], slots: list[Tensor]) -> Tensor:
        """Receives, and gives the results."""
        from moeserve.comm.all_to_all.one_sided.virtual import rows_of

        config = self.config
        got = engine.receive()
        expect = expected[engine.rank]
        assert torch.equal(got.slot_start.diff(), expect.tokens_per_slot.to(torch.int32))
        rows = rows_of(got, config.top_k)
        assert same_bits(rows, expect.rows)
        first = engine.rank * config.slots_per_rank
        sent = [expect_sent(chosen, engine.rank, config.slots_per_rank) for chosen in slots]
        codes = [
            (source * config.max_tokens + sent[source].tokens.index(token)) * config.top_k + choice
            for source, token, choice in expect.handle
        ]
        assert got.rows[: len(codes)].tolist() == codes
        kind = config.x.dtype if config.result.num_scales else config.result.dtype
        return experts(rows, expect.tokens_per_slot, first, kind)

    def check_sums(
        self, outs: list[Tensor], ys: list[Tensor], expected: list[Dispatched], case: Case
    ) -> None:
        sums = combine_all(ys, expected, case.weights)
        for out, total in zip(outs, sums, strict=True):
            assert same_bits(out, total)


def check_seed(rank: int, seed: int) -> None:
    """Some steps of one random configuration, without a reset, each with other inputs."""
    random = np.random.default_rng(seed)
    config = make_config(random)
    table = make_table(config, random) if seed % 2 else None
    steps = Steps(config, table)
    for number in range(3):
        try:
            steps.run(make_inputs(config, seed + number, table))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, step {number}, {config}: {error}") from error
