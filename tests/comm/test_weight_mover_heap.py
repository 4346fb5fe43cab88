"""Experts read out of other ranks' memory are whole, whoever writes meanwhile, or there is a named error."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from moeserve.comm import shared
from moeserve.comm.all_to_all.exchange import ExchangeDispatcher
from moeserve.comm.layout import ParallelLayout
from moeserve.comm.mesh import Mesh
from moeserve.comm.spawn import RankError, RankPool
from moeserve.comm.symm import SymmHeap, local_heaps
from moeserve.comm.weight_mover import TransferError, WrongChecksum
from moeserve.comm.weight_mover import heap as heap_module
from moeserve.comm.weight_mover.checksum import Checksum
from moeserve.comm.weight_mover.heap import HeapMover, SlotMemory, SourceLost, heap_bytes, writing

GetPool = Callable[[int], RankPool]
Moves = list[tuple[int, int]]
on_x86 = pytest.mark.skipif(not shared.supported, reason="shared memory needs x86 and Linux")
SLOTS = 4
SHAPES: list[tuple[tuple[int, ...], torch.dtype]] = [
    ((SLOTS, 7, 3), torch.float32),  # 84 bytes a slot: four of padding
    ((SLOTS, 3), torch.bfloat16),
    ((SLOTS,), torch.float32),  # a scale
    ((SLOTS, 16, 8), torch.uint8),
]
STRIDE = 88 + 8 + 8 + 128


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def fill(tensors: Sequence[Tensor], slot: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    for tensor in tensors:
        row = tensor[slot : slot + 1]
        nbytes = row.numel() * row.itemsize
        row.copy_(torch.from_numpy(random.integers(0, 256, nbytes, np.uint8)).view(row.dtype).view(row.shape))


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(first, second, strict=True))


class World:
    """Virtual ranks with a mover each; slot p of all of them holds what `fill` makes of seed p."""

    def __init__(self, size: int, timeout: float = 30.0) -> None:
        self.heaps = local_heaps(size, heap_bytes(SHAPES))
        self.tensors = [[memory.empty(*s) for s in SHAPES] for memory in map(SlotMemory, self.heaps)]
        self.movers = [HeapMover(heap, SLOTS, timeout) for heap in self.heaps]
        for slot in range(size * SLOTS):
            fill(self.tensors[slot // SLOTS], slot % SLOTS, slot)

    def slot(self, number: int) -> list[Tensor]:
        return [tensor[number % SLOTS].clone() for tensor in self.tensors[number // SLOTS]]

    def begin(self, moves: Moves) -> None:
        for mover, tensors in zip(self.movers, self.tensors, strict=True):
            mover.begin(tensors, moves)

    def advance(self, chunk: int) -> bool:
        done = [mover.advance(chunk) for mover in self.movers]  # of all, whatever the first says
        return all(done)

    def finish(self, chunk: int = 1 << 20) -> None:
        for _ in range(10_000):
            if self.advance(chunk):
                break
        for mover in self.movers:
            mover.commit()


@pytest.mark.parametrize("seed", range(12))
def test_slots_hold_what_their_sources_held(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(seed)
    size = int(random.integers(1, 5))
    world = World(size)
    chunk = int(random.choice([64, 100, 232, 240, 4096]))
    traffic = np.zeros((size, size), np.int64)
    plain = heap_module._Slots.read

    def read(self: heap_module._Slots, rank: int, slot: int, first: int, out: Tensor) -> None:
        traffic[rank, self._rank] += len(out) * (rank != self._rank)
        plain(self, rank, slot, first, out)

    monkeypatch.setattr(heap_module._Slots, "read", read)
    for _ in range(3):  # the second set finds checksums of the first
        count = int(random.integers(0, size * SLOTS + 1))
        targets = random.permutation(size * SLOTS)[:count].tolist()
        moves = [(int(random.integers(size * SLOTS)), target) for target in targets]
        before = [world.slot(number) for number in range(size * SLOTS)]
        world.begin(moves)
        while True:
            traffic[:] = 0
            done = world.advance(chunk)
            assert (traffic.sum(0) + traffic.sum(1)).max() <= max(chunk, 8 * 2 * size)
            assert all(same(world.slot(n), before[n]) for n in range(size * SLOTS)), "a slot changed early"
            if done:
                break
        for mover in world.movers:
            mover.commit()
        source_of = {number: number for number in range(size * SLOTS)} | {t: s for s, t in moves}
        for target, source in source_of.items():
            assert same(world.slot(target), before[source]), (moves, target)
        assert all(mover.restarts == 0 for mover in world.movers)


@contextlib.contextmanager
def meanwhile(act: Callable[[], None], at_read: int) -> Iterator[None]:
    """Runs act once in the middle of the copy of the at_read-th part that is read from another rank."""
    plain, count = heap_module._Slots.read, [0]

    def read(self: heap_module._Slots, rank: int, slot: int, first: int, out: Tensor) -> None:
        if rank == self._rank:
            return plain(self, rank, slot, first, out)
        count[0] += 1
        if count[0] != at_read:
            return plain(self, rank, slot, first, out)
        half = len(out) // 16 * 8
        plain(self, rank, slot, first, out[:half])
        act()
        return plain(self, rank, slot, first + half, out[half:])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heap_module._Slots, "read", read)
        yield


@pytest.mark.parametrize("at_read", [1, 2, 3])
def test_a_write_in_the_middle_of_a_read_is_seen(at_read: int) -> None:
    world = World(2)

    def rewrite() -> None:
        with writing(world.heaps[1], world.tensors[1], 0):
            fill(world.tensors[1], 0, 999)

    with meanwhile(rewrite, at_read):
        world.begin([(SLOTS, 1)])
        world.finish(96)
    assert world.movers[0].restarts == 1
    assert same(world.slot(1), world.slot(SLOTS)), "the new expert, whole"


def test_a_write_that_did_not_say_so_has_another_checksum() -> None:
    world = World(2)
    world.begin([(SLOTS, 1), (SLOTS, 2)])
    world.movers[1].advance(1 << 20)  # the checksum is out
    fill(world.tensors[1], 0, 999)
    with pytest.raises(WrongChecksum, match="slot 4 to 1, 2") as failure:
        world.movers[0].advance(1 << 20)
    assert (failure.value.source_slot, failure.value.target_slots) == (SLOTS, (1, 2))
    held = [world.slot(1), world.slot(2)]
    world.movers[0].abandon()
    assert same(world.slot(1), held[0]) and same(world.slot(2), held[1])


def test_nothing_is_read_while_a_slot_is_written_and_not_for_ever() -> None:
    world = World(2, timeout=0.2)
    world.begin([(SLOTS, 1)])
    write = writing(world.heaps[1], world.tensors[1], 0)
    write.__enter__()
    fill([tensor[:, :1] if tensor.ndim > 1 else tensor for tensor in world.tensors[1]], 0, 5)
    assert world.movers[1].advance(1 << 20) and not world.movers[0].advance(1 << 20)
    time.sleep(0.25)
    with pytest.raises(SourceLost, match=r"slot 4 of rank 1: it has been under write for 0.2 s") as failure:
        world.movers[0].advance(1 << 20)
    assert (failure.value.rank, failure.value.source_slot) == (1, SLOTS)
    write.__exit__(None, None, None)
    world.finish()
    assert same(world.slot(1), world.slot(SLOTS)) and world.movers[0].restarts == 0


def test_an_expert_waits_for_its_checksum() -> None:
    world = World(2)
    world.begin([(SLOTS, 1)])
    assert not world.movers[0].advance(1 << 20)  # read, but rank 1 has not said the checksum
    world.movers[1].advance(100)
    assert not world.movers[0].advance(1 << 20)  # nor all of it by now
    world.movers[1].advance(1 << 20)
    assert world.movers[0].advance(8)


def test_who_is_ahead_waits_for_the_set_before() -> None:
    """Rank 0 begins the next set while rank 1 has still to write its slot for the last: the old expert is whole,
    and has the right checksum, but is not the one to read."""
    world = World(2)
    expected = world.slot(2)
    world.begin([(2, SLOTS), (SLOTS, 1)])
    while not world.advance(1 << 20):
        pass
    world.movers[0].commit()
    world.movers[0].begin(world.tensors[0], [(SLOTS, 3)])
    assert not world.movers[0].advance(1 << 20)
    world.movers[1].commit()
    world.movers[1].begin(world.tensors[1], [(SLOTS, 3)])
    world.finish()
    assert same(world.slot(3), expected)


def test_no_memory_for_staging(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks abandon the set then, and begin the next together."""

    def full(*arguments: object, **options: object) -> Tensor:
        raise RuntimeError("can't allocate memory")

    world = World(2)
    expected = world.slot(SLOTS)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full)
        with pytest.raises(TransferError, match=f"no memory for {STRIDE} bytes of staging"):
            world.movers[0].begin(world.tensors[0], [(SLOTS, 1)])
    world.movers[1].begin(world.tensors[1], [(SLOTS, 1)])
    for mover in world.movers:
        mover.abandon()
    world.begin([(SLOTS, 1)])
    world.finish()
    assert same(world.slot(1), expected)


def test_memory_that_is_too_small() -> None:
    memory = SlotMemory(local_heaps(1, heap_bytes(SHAPES) - 128)[0])
    with pytest.raises(ValueError, match=r"nbytes = \d+: the weights need \d+ bytes of heap"):
        for shape in SHAPES:
            memory.empty(*shape)


def make(rank: int, size: int, nbytes: int) -> tuple[Mesh, SymmHeap, Tensor, HeapMover]:
    """uint8 weights [SLOTS, nbytes] in shared memory, zeroed."""
    mesh = Mesh(ParallelLayout(dp=size), rank)
    heap = SymmHeap.create("shm", rank, size, heap_bytes([((SLOTS, nbytes), torch.uint8)]), mesh.ep)
    return mesh, heap, SlotMemory(heap).empty((SLOTS, nbytes), torch.uint8), HeapMover(heap, SLOTS)


def race(rank: int, nbytes: int, seconds: float) -> tuple[int, int]:
    """Rank 1 writes its slot 0 over and over, without a word to rank 0, which reads it -> (experts, restarts)."""
    mesh, heap, weights, mover = make(rank, 2, nbytes)
    moves, random = [(SLOTS, 0)], np.random.default_rng(0)
    mesh.world.barrier()
    end, version, pulled = time.monotonic() + seconds, 0, 0
    if rank == 1:
        mover.begin([weights], moves)
        mover._slots.begun(1).fill_(1 << 40)  # rank 0 begins as often as it likes
        while time.monotonic() < end:
            version = (version + 1) % 251
            with writing(heap, [weights], 0):
                for part in weights[0].chunk(16):
                    part.fill_(version)
            mover.advance(nbytes)
            time.sleep(float(random.uniform(0, 2e-3)))
    while rank == 0 and time.monotonic() < end:
        mover.begin([weights], moves)
        while time.monotonic() < end and not mover.advance(nbytes // 4):
            pass
        if time.monotonic() < end:
            mover.commit()
            assert int(weights[0].min()) == int(weights[0].max()), "parts of two experts"
            pulled += 1
        mover.abandon()
    mesh.world.barrier()
    return pulled, mover.restarts


@on_x86
@pytest.mark.multi_rank
def test_processes_that_write_at_will(rank_pool: GetPool) -> None:
    pulled, restarts = rank_pool(2).run(race, 64 << 10, 0.6)[0]
    assert pulled > 3 and restarts > 3


def serve_and_move(rank: int, size: int, steps: int) -> int:
    """Steps of a MoE whose expert e multiplies by e + 1, read from all bytes of its slot, while slots move."""
    mesh, heap, weights, mover = make(rank, size, 5000)
    experts = list(range(size * SLOTS))  # by slot
    for slot in range(SLOTS):
        weights[slot].fill_(experts[rank * SLOTS + slot] + 1)
    dispatcher = ExchangeDispatcher(mesh.ep, SLOTS)
    random = np.random.default_rng(1)  # the same on all ranks
    moves: Moves = []
    committed = 0
    for step in range(steps):
        if not moves:
            targets = random.permutation(size * SLOTS)[:6].tolist()
            moves = [(int(random.integers(size * SLOTS)), target) for target in targets]
            mover.begin([weights], moves)
        slots = torch.from_numpy(random.integers(0, size * SLOTS, (size, 5, 2)))[rank]
        x = torch.randn(5, 8)
        got = dispatcher.dispatch(x, slots, torch.ones(5, 2)).wait()
        low, high = weights.amin(1), weights.amax(1)
        assert torch.equal(low, high), "a slot in use is half written"
        done = mover.advance(2000)
        scale = low.repeat_interleave(got.tokens_per_slot).float().unsqueeze(1)
        y = dispatcher.combine(got.rows * scale, got).wait()
        factors = torch.tensor(experts)[slots].float() + 1
        assert torch.allclose(y, x * factors.sum(1, keepdim=True)), step
        if all(row[0] for row in mesh.world.all_gather_ints([done])):
            mover.commit()
            source_of = {target: source for source, target in moves}
            experts = [experts[source_of.get(slot, slot)] for slot in range(len(experts))]
            moves, committed = [], committed + 1
    return committed


@on_x86
@pytest.mark.multi_rank
def test_serving_goes_on_while_weights_move(rank_pool: GetPool) -> None:
    for committed in rank_pool(4).run(serve_and_move, 4, 60):
        assert committed >= 3


def die(rank: int, while_writing: bool) -> None:
    """Rank 1 dies when rank 0 has read half of its slot."""
    mesh, heap, weights, mover = make(rank, 2, 4096)
    if rank == 1:
        weights[0].fill_(7)
    mover.begin([weights], [(SLOTS, 0)])
    if rank == 1:
        mover.advance(8192)
    mesh.world.barrier()
    if rank == 0:
        assert not mover.advance(2048)
    mesh.world.barrier()
    if rank == 1:
        if while_writing:
            writing(heap, [weights], 0).__enter__()
            weights[0, :100].fill_(9)
        os.kill(os.getpid(), signal.SIGKILL)
    while heap.is_alive(1):
        time.sleep(0.005)
    try:
        mover.advance(8192)
    except SourceLost as error:
        mover.abandon()
        assert str(error) == "slot 4 of rank 1: the rank has died" and not bool(weights[0].any())
        raise RuntimeError("as expected") from None


@on_x86
@pytest.mark.multi_rank
@pytest.mark.parametrize("while_writing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_source_that_was_killed(while_writing: bool) -> None:
    with RankPool(2) as pool, pytest.raises(RankError) as failure:
        pool.run(die, while_writing)
    assert "rank 1 died of SIGKILL" in str(failure.value)
    assert "also failed: rank 0" in str(failure.value)  # it only raises when all was as it should be


class Watched:
    """The words of a slot, each look at which runs `before` first."""

    def __init__(self, words: Tensor, before: Callable[[], None]) -> None:
        self._words, self._before = words, before

    def __getitem__(self, number: int) -> Tensor:
        self._before()
        return self._words[number]


def try_order(gaps: Sequence[int]) -> tuple[int, bool]:
    """Rank 0 reads a slot while rank 1 writes it, as commit does, in single stores; gaps[i] of these come before the
    i-th thing that rank 0 looks at -> (how often it started over, whether it has the new expert)."""
    world = World(2)
    slots = heap_module._Slots(world.heaps[1], world.tensors[1])
    old, new = world.slot(SLOTS), [tensor.clone() for tensor in world.slot(2 * SLOTS - 1)]
    words = slots.words(1)[0]
    parts = [(kept[0], value) for kept, value in zip(world.tensors[1], new, strict=True)]
    world.begin([(SLOTS, 1)])
    world.movers[1].advance(1 << 20)
    checksum = Checksum(torch.device("cpu"))
    stream = torch.zeros(STRIDE, dtype=torch.uint8)
    slots.read(1, SLOTS - 1, 0, stream)
    checksum.add(stream)

    def store(number: int, value: int) -> Callable[[], object]:
        return lambda: words[number].fill_(value)

    stores: list[Callable[[], object]] = [store(heap_module.GENERATION, 1)]
    stores += [lambda: [kept.copy_(value) for kept, value in parts[:1]]]
    stores += [lambda: [kept.copy_(value) for kept, value in parts[1:]]]
    stores += [store(heap_module.SUM, int(checksum.value)), store(heap_module.SUMMED, 3)]
    stores += [store(heap_module.GENERATION, 2)]
    left, looks = list(stores), iter(gaps)

    def before() -> None:
        for _ in range(min(next(looks, 0), len(left))):
            left.pop(0)()

    plain_words, plain_read = heap_module._Slots.words, heap_module._Slots.read

    def watched_words(self: heap_module._Slots, rank: int) -> object:
        of_slots = plain_words(self, rank)
        return [Watched(row, before) for row in of_slots] if rank == 1 else of_slots

    def read(self: heap_module._Slots, rank: int, slot: int, first: int, out: Tensor) -> None:
        before()
        plain_read(self, rank, slot, first, out[:88])
        before()
        plain_read(self, rank, slot, first + 88, out[88:])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heap_module._Slots, "words", watched_words)
        patch.setattr(heap_module._Slots, "read", read)
        world.movers[0].advance(1 << 20)
        while left:
            left.pop(0)()
        assert world.movers[0].advance(1 << 20) or world.movers[0].advance(1 << 20)
    world.movers[0].commit()
    got = world.slot(1)
    assert same(got, old) or same(got, new), f"parts of two experts: {gaps}"
    return world.movers[0].restarts, same(got, new)


def test_every_order_of_a_write_and_a_read() -> None:
    """Six stores between the six looks of one read: never parts of two experts, nor a checksum that seems wrong."""
    looks, count = 6, 6
    seen = set()
    for bars in itertools.combinations(range(looks + count), looks):
        edges = [-1, *bars]
        seen.add(try_order([b - a - 1 for a, b in itertools.pairwise(edges)]))
    assert seen == {(0, False), (0, True), (1, True)}
