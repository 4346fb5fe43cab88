"""The CPU engine between real processes: no barriers, ranks that die or sleep at every phase, and what survives."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moeserve.comm import shared
from moeserve.comm.all_to_all.one_sided.cpu_engine import CpuEngine, Evicted, Received
from moeserve.comm.all_to_all.one_sided.layout import EpConfig, EpLayout, RowFormat
from moeserve.comm.all_to_all.one_sided.membership import Membership, State
from moeserve.comm.all_to_all.rows import weighted_sum
from moeserve.comm.layout import ParallelLayout
from moeserve.comm.mesh import Mesh
from moeserve.comm.spawn import RankPool, start_process
from moeserve.comm.symm import Control, SymmHeap

pytestmark = [
    pytest.mark.multi_rank,
    pytest.mark.slow,
    pytest.mark.skipif(not shared.supported, reason="shared memory needs x86 and Linux"),
]
GetPool = Callable[[int], RankPool]
FORM = RowFormat(24, torch.float32)
EXPERTS, SLOTS, TOP_K, TOKENS = 5, 3, 4, 6
PHASES = ("before put", "before receive", "before push", "before finish")


class StoreControl:
    """Enough of a group to make a heap with."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self.rank, self.size, self.ranks = rank, size, range(size)
        self._store, self._round = store, 0

    def all_gather_ints(self, values: Sequence[int]) -> list[list[int]]:
        self._round += 1
        self._store.set(f"control/{self._round}/{self.rank}", json.dumps(list(values)))
        return [json.loads(self._store.get(f"control/{self._round}/{rank}")) for rank in self.ranks]


def make_engine(control: Control, timeout: float) -> CpuEngine:
    layout = EpLayout(EpConfig(control.size, 2 * TOKENS, TOP_K, SLOTS, FORM, FORM))
    heap = SymmHeap.create("shm", control.rank, control.size, layout.nbytes, control)
    return CpuEngine(heap, layout, timeout)


def inputs(rank: int, step: int, world: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rows tagged with rank, step and token; slots; weights) of one rank in one step, by the table of that step."""
    generator = torch.Generator().manual_seed(step * 64 + rank)
    tokens = int(torch.randint(0, TOKENS + 1, (1,), generator=generator))
    x = torch.randn(tokens, FORM.width, generator=generator)
    x[:, 0], x[:, 1], x[:, 2] = rank, step, torch.arange(tokens)
    experts = torch.randint(-1, EXPERTS, (tokens, TOP_K), generator=generator)
    table = torch.randint(
        0, world * SLOTS, (EXPERTS,), generator=torch.Generator().manual_seed(version(step))
    )
    slots = torch.where(experts < 0, -1, table[experts])
    return x, slots, torch.randn(tokens, TOP_K, generator=generator)


def version(step: int) -> int:
    return step // 7


def answers(x: Tensor, slot: Tensor) -> Tensor:
    return x * (slot + 1).unsqueeze(1)


def check_received(engine: CpuEngine, received: Received, step: int) -> Tensor:
    """Every row is the one that its source sent to that slot, each once. -> the results."""
    mine = torch.arange(SLOTS).repeat_interleave(received.counts.per_slot) + engine.rank * SLOTS
    given = [inputs(rank, step, engine.world) for rank in range(engine.world)]
    for n, (source, cell) in enumerate(received.origin.tolist()):
        token, choice = divmod(cell, TOP_K)
        x, slots, _ = given[source]
        token %= TOKENS  # cells of the other half
        assert torch.equal(received.x[n], x[token]), f"{received.x[n]} from {source}, token {token}"
        assert slots[token, choice] == mine[n]
    assert len(torch.unique(received.origin, dim=0)) == len(received.origin)
    for source, (_, slots, _) in enumerate(given):
        wanted = int((slots.div(SLOTS, rounding_mode="floor") == engine.rank).sum())
        count = int(received.counts.each[source].sum())
        assert count == (wanted if engine.alive[source] else 0), f"{count} of {wanted} from {source}"
    return answers(received.x, mine)


def check_result(engine: CpuEngine, out: Tensor, step: int) -> None:
    """Exact, but for the slots of ranks that are out; what these would have weighed is known."""
    x, slots, weights = inputs(engine.rank, step, engine.world)
    gone = (slots < 0) | (engine.alive[slots.div(SLOTS, rounding_mode="floor")] == 0)
    y = answers(x.repeat_interleave(TOP_K, 0), slots.flatten())
    assert torch.equal(out, weighted_sum(y, weights, gone)), f"step {step}, rank {engine.rank}"
    lost = (weights * (gone & (slots >= 0))).sum(1)
    assert engine.lost_weight is None or torch.equal(engine.lost_weight, lost)
    assert engine.lost_weight is not None or not lost.any()


def run_step(engine: CpuEngine, step: int, pause: Callable[[str], None]) -> None:
    x, slots, weights = inputs(engine.rank, step, engine.world)
    pause(PHASES[0])
    engine.put(x, slots, version=version(step))
    pause(PHASES[1])
    received = engine.receive(version(step))
    y = check_received(engine, received, step)
    pause(PHASES[2])
    engine.push(y, received.origin)
    pause(PHASES[3])
    check_result(engine, engine.finish(weights), step)


# --- no barriers ----------------------------------------------------------------------------------------------


def run_freely(rank: int, size: int) -> int:
    """50 steps; every rank sleeps when it likes, and changes tables when it comes to it."""
    engine = make_engine(Mesh(ParallelLayout(dp=size), rank).ep, timeout=30)
    luck = random.Random(rank)

    def pause(phase: str) -> None:
        if luck.random() < 0.4:
            time.sleep(luck.random() * 0.004)

    for step in range(50):
        run_step(engine, step, pause)
    assert not engine.query_fault()
    return engine.foreign_versions


@pytest.mark.parametrize("size", [2, 3, 4])
def test_fifty_steps_without_a_barrier(rank_pool: GetPool, size: int) -> None:
    assert rank_pool(size).run(run_freely, size) == [0] * size


# --- faults ---------------------------------------------------------------------------------------------------

WORLD, VICTIM, FAULT_STEP, WAKE_STEP, LAST_STEP = 3, 1, 5, 12, 30


def live(rank: int, port: int, phase: str, how: int, pipe: Connection) -> None:
    """One rank of a job whose rank VICTIM sends itself `how` at a phase of FAULT_STEP."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, WORLD, False, timedelta(seconds=30))
    engine = make_engine(StoreControl(store, rank, WORLD), timeout=0.3)
    membership = Membership(engine, store, rank, WORLD, patience=1.0)
    decisions = []

    def pause(now: str) -> None:
        if (rank, step, now) == (VICTIM, FAULT_STEP, phase):
            os.kill(os.getpid(), how)

    try:
        for step in range(LAST_STEP):
            run_step(engine, step, pause)
            if rank != VICTIM and step >= WAKE_STEP:
                store.set(f"step/{step}", "")
                time.sleep(0.01)
            if membership.called:
                decisions.append(membership.reconcile())
    except Evicted as error:
        pipe.send(f"evicted: {error}")
        return
    except BaseException as error:
        pipe.send(f"{type(error).__name__}: {error}")
        raise
    pipe.send((decisions, membership.state, engine.generation))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_survivors_stay_exact(how: signal.Signals, phase: str) -> None:
    """Survivors check each result against the slots that are left; a sleeper wakes amidst their later steps."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30))
    pipes, ranks = [], []
    for rank in range(WORLD):
        ours, theirs = Pipe()
        pipes.append(ours)
        ranks.append(start_process(live, (rank, store.port, phase, int(how), theirs)))
        theirs.close()
    try:
        if how is signal.SIGSTOP:
            store.wait([f"step/{WAKE_STEP}"], timedelta(seconds=30))
            pid = ranks[VICTIM].pid
            assert pid is not None
            os.kill(pid, signal.SIGCONT)
        ends = {}
        for rank in range(WORLD):
            if rank != VICTIM or how is signal.SIGSTOP:
                assert pipes[rank].poll(30), f"rank {rank} does not answer"
                ends[rank] = pipes[rank].recv()
    finally:
        for process in ranks:
            process.kill()
            process.join()
    sleeper = ends.pop(VICTIM, None)
    assert ends[0] == ends[2]
    decisions, state, generation = ends[0]
    assert [d.members for d in decisions] == [(True, False, True)]
    assert (state, generation) == (State.DEGRADED, 1)
    if how is signal.SIGSTOP:
        assert isinstance(sleeper, str) and sleeper.startswith("evicted"), sleeper
