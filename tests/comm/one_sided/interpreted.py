"""Random cases for the Triton engine, virtual ranks looked at after each phase, and a faster interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moeserve.comm.all_to_all.one_sided.layout import CTL_EPOCH, EpConfig, EpLayout, RowFormat, mail_word
from moeserve.comm.all_to_all.protocol import Dispatched
from moeserve.comm.all_to_all.reference import Source, dispatch_all
from moeserve.comm.spawn import RankPool

if TYPE_CHECKING:
    from moeserve.comm.all_to_all.one_sided.triton_engine import Tiles

VERSION = 3
"""Of the routing table in force."""


class Interpreters:
    """Ranks in which triton interprets its kernels on the CPU: that must be chosen before triton is imported."""

    def __init__(self, pool: RankPool) -> None:
        self._pool = pool

    def run(self, function: Callable[..., None], *args: Any, timeout: float = 60.0) -> None:
        """function(rank, *args) on every rank, as RankPool.run does."""
        with pytest.MonkeyPatch.context() as patch:  # for the time in which the ranks may be started
            patch.setenv("TRITON_INTERPRET", "1")
            self._pool.run(run_interpreted, function, *args, timeout=timeout)


def run_interpreted(rank: int, function: Callable[..., None], *args: Any) -> None:
    interpret_faster()
    function(rank, *args)


def interpret_faster() -> None:
    """Has the interpreter prepare triton's language once and not at every call, which is much of its time."""
    from triton.runtime import interpreter

    assert os.environ["TRITON_INTERPRET"] == "1"
    prepare, prepared = interpreter._patch_lang, set()
    if prepare.__name__ == "prepare_once":
        return

    class Kept:
        def restore(self) -> None:
            """The language stays prepared until the process ends."""

    def prepare_once(function: Any) -> Kept:
        languages = (interpreter.tl, interpreter.tl.core)
        names = function.__globals__.values()
        found = frozenset(id(value) for value in names if any(value is one for one in languages))
        if found not in prepared:
            prepared.add(found)
            prepare(function)
        return Kept()

    interpreter._patch_lang = prepare_once


@dataclass(frozen=True)
class Case:
    """One step's inputs of all ranks. table: int32 [E, C] slots of experts, None where ids are slots."""

    config: EpConfig
    xs: list[Tensor]
    scales: list[Tensor] | None
    ids: list[Tensor]
    weights: list[Tensor]
    table: Tensor | None

    def slots(self, rotation: int = 0) -> list[Tensor]:
        """int64 [b, K] of each rank."""
        if self.table is None:
            return self.ids
        found = []
        for ids in self.ids:
            column = (torch.arange(len(ids)) + rotation) % self.table.shape[1]
            slots = self.table[ids.clamp(min=0), column[:, None]].to(torch.int64)
            found.append(slots.masked_fill(ids < 0, -1))
        return found


def make_config(random: np.random.Generator, **fixed: Any) -> EpConfig:
    """Random sizes; K is at times above R, above S, and no power of two."""
    width = int(random.choice([1, 3, 8, 40, 130]))
    dtype = [torch.float32, torch.bfloat16, torch.float16][int(random.integers(3))]
    sizes: dict[str, Any] = {
        "world": int(random.integers(1, 6)),
        "max_tokens": int(random.integers(1, 20)),
        "top_k": int(random.choice([1, 2, 3, 6, 8, 10, 22])),
        "slots_per_rank": int(random.integers(1, 7)),
        "x": RowFormat(width, dtype, int(random.choice([0, 0, 5]))),
        "result": RowFormat(width, dtype),
        "combine": ["push", "pull"][int(random.integers(2))],
    }
    return EpConfig(**(sizes | fixed))


def make_case(config: EpConfig, seed: int, table: Tensor | None = None) -> Case:
    """Random inputs; each kind of awkward one comes up every few seeds."""
    random, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    each = config.slots_per_rank
    tokens = random.integers(0, config.max_tokens + 1, config.world).tolist()
    low, high = 0, config.world * each if table is None else len(table)
    kind = seed % 6
    if kind == 1:
        tokens = [0] * config.world
    if kind == 2:
        tokens[int(random.integers(config.world))] = 0
    if kind == 3:  # as many as there can be, all to one rank
        tokens = [config.max_tokens] * config.world
        if table is None:
            low = int(random.integers(config.world)) * each
            high = low + each
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
    """int32 [E, 4]: every slot has an expert, every expert a slot; E rarely divides the slots."""
    num_slots = config.world * config.slots_per_rank
    num_experts = int(random.integers(-(-num_slots // 2), num_slots + 1))
    of_slot = np.concatenate(
        [np.arange(num_experts), random.integers(0, num_experts, num_slots - num_experts)]
    )
    random.shuffle(of_slot)
    rows = [np.resize(np.flatnonzero(of_slot == expert), 4) for expert in range(num_experts)]
    return torch.tensor(np.stack(rows), dtype=torch.int32)


def same_bits(got: Tensor, expected: Tensor) -> bool:
    """NaNs and the signs of zeros included; wherever the two are."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return False
    return torch.equal(
        got.cpu().contiguous().view(torch.uint8), expected.cpu().contiguous().view(torch.uint8)
    )


def experts(rows: Tensor, tokens_per_slot: Tensor, first_slot: int, dtype: torch.dtype) -> Tensor:
    """Something that differs by slot and by row."""
    slot = torch.repeat_interleave(
        torch.arange(first_slot, first_slot + len(tokens_per_slot)), tokens_per_slot
    )
    return (torch.sin(rows.float() * 3) * (slot + 1).sqrt().unsqueeze(1)).to(dtype)


def over_the_wire(y: Tensor, form: RowFormat) -> Tensor:
    """float32 [N, width] of what arrives when y [N, width] travels as form says."""
    if not form.num_scales:
        return y.to(form.dtype).to(torch.float32)
    wide = torch.zeros(len(y), form.num_scales * 128)
    wide[:, : y.shape[1]] = y
    blocks = wide.view(len(y), form.num_scales, 128)
    power = torch.frexp(blocks.abs().amax(2, keepdim=True) * (1.0 / 448.0))  # in [0.5, 1) * 2 ** exponent
    exponent = power.exponent - (power.mantissa == 0.5).int()
    scale = torch.ldexp(torch.ones_like(power.mantissa), exponent)
    scale = torch.where(power.mantissa == 0, torch.finfo(torch.float32).tiny, scale)
    return ((blocks / scale).to(form.dtype).to(torch.float32) * scale).view(len(y), -1)[:, : y.shape[1]]


def summed(
    answers: dict[Source, Tensor], slots: list[Tensor], weights: list[Tensor], config: EpConfig
) -> list[Tensor]:
    """float32 [b, width] of each rank. answers: float32 results as they were worked out, by choice."""
    result, width = [], config.result.width
    for rank, chosen in enumerate(slots):
        sums = torch.zeros(len(chosen), width)
        for token, of_token in enumerate(chosen.tolist()):
            parts: dict[int, Tensor] = {}
            for choice, slot in enumerate(of_token):
                if (row := answers.get((rank, token, choice))) is None:
                    continue
                target = slot // config.slots_per_rank if config.cells == "rank" else choice
                if config.cells == "choice":
                    row = over_the_wire(row[None], config.result)[0]
                part = parts.get(target, torch.zeros(width))
                parts[target] = part + weights[rank][token, choice] * row
            for part in parts.values():
                sums[token] += over_the_wire(part[None], config.result)[0] if config.cells == "rank" else part
        result.append(sums)
    return result


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
    return Sent(tokens, local[tokens], cells, torch.bincount(local[local >= 0], minlength=slots_per_rank))


class Steps:
    """Virtual ranks, and what all their steps so far must have led to.

    out: ranks that the others have masked or are about to, which take no further part.
    """

    def __init__(
        self,
        config: EpConfig,
        table: Tensor | None = None,
        *,
        keep_spare: bool = False,
        device: str = "cpu",
        tiles: Tiles | None = None,
    ) -> None:
        from moeserve.comm.all_to_all.one_sided.triton_engine import ExpertTable
        from moeserve.comm.all_to_all.one_sided.virtual import virtual_ranks

        self.config, self.device, self.epoch = config, device, 0
        num_ids = None if table is None else len(table)
        self.engines = virtual_ranks(config, device, num_ids=num_ids, keep_spare=keep_spare, tiles=tiles)
        self.layout = EpLayout(config)
        self.tables = [None if table is None else ExpertTable(table, device, VERSION) for _ in self.engines]
        self.counts = [torch.zeros(len(engine.counts), dtype=torch.int64) for engine in self.engines]
        self.out: set[int] = set()
        self.rotation = 0
        self.first_token = 0

    def rotate(self, rotation: int) -> None:
        self.rotation = rotation
        for table in self.tables:
            if table is not None:
                table.rotate(rotation)

    def run(
        self, case: Case, late_to_send: Collection[int] = (), late_to_answer: Collection[int] = ()
    ) -> list[Tensor | None]:
        """One step, looked at after each phase -> the sums of each rank that saw it through.

        late_to_send, late_to_answer: ranks that stop before they send rows, or results; they are out from then on.
        """
        self.epoch += 1
        world = self.config.world
        senders = [rank for rank in range(world) if rank not in self.out and rank not in late_to_send]
        slots = [self.without(chosen, self.out) for chosen in case.slots(self.rotation)]
        slots = [
            chosen if rank in senders else torch.full_like(chosen, -1) for rank, chosen in enumerate(slots)
        ]
        for rank in senders:
            self.send(rank, case)
        for rank in senders:
            self.check_source(rank, case)
            for target in set(range(world)) - self.out:
                self.check_sent(rank, target, case, slots[rank])
        self.out |= set(late_to_send)
        expected = dispatch_all(case.xs, slots, self.config.slots_per_rank)
        ys = {rank: self.check_received(rank, expected[rank], slots) for rank in senders}
        self.out |= set(late_to_answer)
        answering = [rank for rank in senders if rank not in self.out]
        for rank in answering:
            self.engines[rank].send_back(ys[rank].to(self.device))
        answers: dict[Source, Tensor] = {}
        for rank in answering:
            answers.update(zip(expected[rank].handle, ys[rank].to(torch.float32).unbind(), strict=True))
        sums = summed(answers, slots, case.weights, self.config)
        return [
            self.finish(rank, case, answers, sums[rank]) if rank in answering else None
            for rank in range(world)
        ]

    def send(self, rank: int, case: Case) -> None:
        scales = None if case.scales is None else case.scales[rank].to(self.device)
        inputs = [tensor[rank].to(self.device) for tensor in (case.xs, case.ids, case.weights)]
        self.engines[rank].send(*inputs, scales, self.tables[rank])
        self.counts[rank] += torch.bincount(
            case.ids[rank][case.ids[rank] >= 0], minlength=len(self.counts[rank])
        )

    def without(self, slots: Tensor, ranks: Collection[int]) -> Tensor:
        target = slots.div(self.config.slots_per_rank, rounding_mode="floor")
        return slots.masked_fill(torch.isin(target, torch.tensor(sorted(ranks), dtype=torch.int64)), -1)

    def check_source(self, rank: int, case: Case) -> None:
        from moeserve.comm.all_to_all.one_sided import device_words

        engine, slots = self.engines[rank], case.slots(self.rotation)[rank]
        assert torch.equal(engine.counts.cpu(), self.counts[rank])
        target = slots.div(self.config.slots_per_rank, rounding_mode="floor")
        lost = torch.isin(target, torch.tensor(sorted(self.out), dtype=torch.int64))
        assert torch.equal(engine.target[: len(slots)].cpu(), target.masked_fill(lost, -2).to(torch.int32))
        rows = engine.row.tolist()
        for token, chosen in enumerate(target.masked_fill(lost, -1).tolist()):
            for choice, rank_of in enumerate(chosen):  # a row travels once a rank
                assert rank_of < 0 or (rows[token][choice] >= 0) == (rank_of not in chosen[:choice])
        words = engine.words.tolist()
        assert words[device_words.EPOCH.value] == self.epoch
        assert words[device_words.PUT_ARRIVALS.value] == words[device_words.ANSWER_ARRIVALS.value] == 0
        assert words[device_words.MISMATCHES.value] == 0
        assert self.layout.ctl.view(engine.block)[CTL_EPOCH] == self.epoch

    def check_sent(self, source: int, target: int, case: Case, slots: Tensor) -> None:
        layout, block, parity = self.layout, self.engines[target].block, self.epoch & 1
        sent = expect_sent(slots, target, self.config.slots_per_rank)
        count = len(sent.tokens)
        assert self.engines[source].sent[target] == count
        assert layout.mail.view(block)[parity, source] == mail_word(self.epoch, count)
        assert torch.equal(layout.slot_cnt.view(block)[parity, source].cpu(), sent.counts.to(torch.int32))
        tokens = [self.first_token + token for token in sent.tokens]
        assert layout.meta_token.view(block)[source, :count].tolist() == tokens
        if self.tables[source] is not None:
            assert bool((layout.meta_version.view(block)[source, :count] == VERSION).all())
        assert same_bits(layout.meta_slots.view(block)[source, :count], sent.slots.to(torch.int16))
        assert same_bits(layout.x_values.view(block)[source, :count], case.xs[source][sent.tokens])
        if case.scales is not None:
            assert layout.x_scales is not None
            assert same_bits(layout.x_scales.view(block)[source, :count], case.scales[source][sent.tokens])
        if layout.meta_weights is not None:
            assert layout.meta_cell.view(block)[source, :count].tolist() == sent.cells
            here = sent.slots >= 0
            got = layout.meta_weights.view(block)[source, :count].cpu()
            assert torch.equal(got[here], case.weights[source][sent.tokens][here])
        if layout.stats is not None:
            got = layout.stats.view(block)[source].cpu()
            assert torch.equal(got, self.counts[source][: len(got)].to(torch.int32))

    def check_received(self, rank: int, expect: Dispatched, slots: list[Tensor]) -> Tensor:
        """-> the results, on the host."""
        config = self.config
        got = self.engines[rank].receive()
        assert torch.equal(got.slot_start.diff().cpu(), expect.tokens_per_slot.to(torch.int32))
        rows = got.in_order(config.top_k).cpu()
        assert same_bits(rows, expect.rows)
        sent = [expect_sent(chosen, rank, config.slots_per_rank) for chosen in slots]
        codes = [
            (source * config.max_tokens + sent[source].tokens.index(token)) * config.top_k + choice
            for source, token, choice in expect.handle
        ]
        assert got.rows[: len(codes)].tolist() == codes
        kind = config.x.dtype if config.result.num_scales else config.result.dtype
        return experts(rows, expect.tokens_per_slot, rank * config.slots_per_rank, kind)

    def finish(self, rank: int, case: Case, answers: dict[Source, Tensor], sums: Tensor) -> Tensor:
        engine, config = self.engines[rank], self.config
        kind = config.x.dtype if config.result.num_scales else config.result.dtype
        count = len(case.xs[rank])
        out = torch.full((count, config.result.width), 9.0, dtype=kind, device=self.device)
        assert engine.receive_back(out) is out
        assert same_bits(out, sums.to(kind))
        chosen, weights = case.slots(self.rotation)[rank], case.weights[rank]
        lost = torch.zeros(count)
        for token, choice in (chosen >= 0).nonzero().tolist():
            if (rank, token, choice) not in answers:
                lost[token] += weights[token, choice]
        torch.testing.assert_close(engine.lost[:count].cpu(), lost)
        return out.cpu()
