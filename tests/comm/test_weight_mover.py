"""Experts travel between slots exactly, whatever the moves, the sizes and the chunks; a wrong byte is found."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moeserve.comm.group import Group
from moeserve.comm.layout import ParallelLayout
from moeserve.comm.mesh import Mesh
from moeserve.comm.spawn import RankPool
from moeserve.comm.weight_mover import TransferError, WrongChecksum
from moeserve.comm.weight_mover.checksum import Checksum
from moeserve.comm.weight_mover.exchange import ExchangeMover

GetPool = Callable[[int], RankPool]
Moves = list[tuple[int, int]]
SLOTS = 5
SHAPES: list[tuple[tuple[int, ...], torch.dtype]] = [
    ((7, 3), torch.float32),  # 84 bytes: four of padding
    ((3,), torch.bfloat16),
    ((), torch.float32),  # a scale
    ((16, 8), torch.uint8),
]


def weights(size: int, seed: int) -> list[Tensor]:
    """What all slots of all ranks hold, [P, ...] of each shape; bits of any kind."""
    random = np.random.default_rng(seed)
    full = []
    for shape, dtype in SHAPES:
        count = size * SLOTS * int(np.prod(shape)) * dtype.itemsize
        bits = torch.from_numpy(random.integers(0, 256, count, dtype=np.uint8))
        full.append(bits.view(dtype).view(size * SLOTS, *shape))
    return full


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def random_moves(size: int, seed: int) -> Moves:
    """Any slots into any others, a slot to several too; circles come by themselves."""
    random = np.random.default_rng(seed)
    count = int(random.integers(0, size * SLOTS + 1))
    targets = random.permutation(size * SLOTS)[:count].tolist()
    return [(int(random.integers(size * SLOTS)), target) for target in targets]


def after(full: Sequence[Tensor], moves: Moves) -> list[Tensor]:
    expected = [tensor.clone() for tensor in full]
    for source, target in moves:
        for new, old in zip(expected, full, strict=True):
            new[target] = old[source]
    return expected


def meshes(rank: int, size: int) -> list[Mesh]:
    layout = ParallelLayout(dp=size)
    return [Mesh(layout, rank), Mesh(layout, rank, shared_memory=False)]


class Recording(Group):
    """The group, but it notes the bytes that each all_to_all sends and receives, and may spoil one of them."""

    def __init__(self, group: Group, spoil: int | None = None) -> None:
        super().__init__(group.rank, group.ranks, group._control, group._wires)
        self.spoil = spoil
        self.most = self.total = 0

    def all_to_all(self, x: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]) -> Tensor:
        out = super().all_to_all(x, send_sizes, receive_sizes)
        if self.spoil is not None and self.total <= self.spoil < self.total + len(out):
            out[self.spoil - self.total] ^= 64
        self.total += len(out)
        self.most = max(self.most, len(x) + len(out))
        return out


def move(
    mover: ExchangeMover, rank: int, tensors: list[Tensor], moves: Moves, chunk: int, world: Group
) -> int:
    """All of it but commit, on every rank -> advances."""
    held = [bits(tensor).clone() for tensor in tensors]
    mover.begin(tensors, moves)
    steps = 0
    while True:
        steps += 1
        done = mover.advance(chunk)
        if all(other for (other,) in world.all_gather_ints([done])):
            break
        assert steps < 100_000
    assert all(torch.equal(bits(t), h) for t, h in zip(tensors, held, strict=True)), "a slot changed early"
    return steps


def run_random(rank: int, size: int, seeds: list[int], chunks: list[int]) -> None:
    for mesh in meshes(rank, size):
        group = Recording(mesh.ep)
        mover = ExchangeMover(group, SLOTS)
        mine = slice(rank * SLOTS, (rank + 1) * SLOTS)
        for seed, chunk in zip(seeds, chunks, strict=True):
            full, moves = weights(size, seed), random_moves(size, seed)
            tensors = [tensor[mine].clone() for tensor in full]
            group.most = 0
            move(mover, rank, tensors, moves, chunk, mesh.world)
            assert group.most <= chunk
            mover.commit()
            for got, expected in zip(tensors, after(full, moves), strict=True):
                assert torch.equal(bits(got), bits(expected[mine])), (seed, chunk)
            sources = {source for source, target in moves if target // SLOTS == rank}
            assert mover.staging_bytes <= SLOTS * (88 + 8 + 8 + 128 + 8)
            assert mover.staging_bytes >= len(sources) * (88 + 8 + 8 + 128 + 8)


@pytest.mark.multi_rank
@pytest.mark.parametrize("size", [1, 2, 4])
def test_slots_hold_what_their_sources_held(rank_pool: GetPool, size: int) -> None:
    chunks = [100, 232, 240, 241, 1000, 4096, 1 << 20]
    rank_pool(size).run(run_random, size, list(range(len(chunks))), chunks)


CIRCLES: dict[str, Moves] = {
    "nothing": [],
    "swap over ranks": [(0, SLOTS), (SLOTS, 0)],
    "swap inside a rank": [(1, 2), (2, 1)],
    "circle with a chain": [(0, SLOTS), (SLOTS, 2 * SLOTS), (2 * SLOTS, 0), (0, 1), (1, 2)],
    "one source, targets everywhere": [(0, target) for target in range(1, 3 * SLOTS)],
    "into itself": [(3, 3)],
}


def run_circles(rank: int) -> None:
    (mesh, _) = meshes(rank, 3)
    mine = slice(rank * SLOTS, (rank + 1) * SLOTS)
    for moves in CIRCLES.values():
        group = Recording(mesh.ep)
        full = weights(3, 5)
        tensors = [tensor[mine].clone() for tensor in full]
        mover = ExchangeMover(group, SLOTS)
        chunk = 8 if moves == [(0, SLOTS), (SLOTS, 0)] else 1 << 20
        steps = move(mover, rank, tensors, moves, chunk, mesh.world)
        assert steps == (2 * 240 // 8 if chunk == 8 else 1)
        mover.commit()
        for got, expected in zip(tensors, after(full, moves), strict=True):
            assert torch.equal(bits(got), bits(expected[mine]))
        far = {(s, t // SLOTS) for s, t in moves if s // SLOTS != t // SLOTS and t // SLOTS == rank}
        assert group.total == len(far) * 240, "a slot goes to a rank once"


@pytest.mark.multi_rank
def test_circles_and_several_targets(rank_pool: GetPool) -> None:
    rank_pool(3).run(run_circles)


def run_abandon(rank: int) -> None:
    (mesh, _) = meshes(rank, 2)
    mine = slice(rank * SLOTS, (rank + 1) * SLOTS)
    full = weights(2, 1)
    tensors = [tensor[mine].clone() for tensor in full]
    mover = ExchangeMover(mesh.ep, SLOTS)
    mover.begin(tensors, [(0, SLOTS), (SLOTS, 0)])
    mover.advance(64)
    mover.abandon()
    assert all(torch.equal(bits(t), bits(f[mine])) for t, f in zip(tensors, full, strict=True))
    moves = [(1, SLOTS + 1), (SLOTS + 2, 2)]
    move(mover, rank, tensors, moves, 64, mesh.world)
    mover.commit()
    for got, expected in zip(tensors, after(full, moves), strict=True):
        assert torch.equal(bits(got), bits(expected[mine]))


@pytest.mark.multi_rank
def test_what_was_abandoned_leaves_no_trace(rank_pool: GetPool) -> None:
    rank_pool(2).run(run_abandon)


def run_spoiled(rank: int, where: int, chunk: int) -> None:
    """Rank 1 receives slot 0 twice over and slot 1; the byte at `where` of what it receives is spoiled."""
    (mesh, _) = meshes(rank, 2)
    tensors = [tensor[rank * SLOTS : (rank + 1) * SLOTS].clone() for tensor in weights(2, 3)]
    group = Recording(mesh.ep, spoil=where if rank == 1 else None)
    mover = ExchangeMover(group, SLOTS)
    moves = [(0, SLOTS), (0, SLOTS + 1), (1, SLOTS + 3), (SLOTS, 0)]
    mover.begin(tensors, moves)
    found: WrongChecksum | None = None
    for _ in range(3 * 240 * 2 // (chunk // 8 * 8) + 3):
        try:
            mover.advance(chunk)
        except WrongChecksum as error:  # the others need this rank until all have agreed to stop
            found = error
    assert (found is not None) == (rank == 1)
    if found is not None:
        expected = [(0, (SLOTS, SLOTS + 1)), (1, (SLOTS + 3,))][where // 240]
        assert (found.source_slot, found.target_slots) == expected
        assert f"slot {expected[0]} to" in str(found)


@pytest.mark.multi_rank
def test_a_wrong_byte_is_found_by_who_received_it(rank_pool: GetPool) -> None:
    for chunk in (56, 1000):
        for where in (0, 83, 100, 231, 232, 239, 240, 479):
            rank_pool(2).run(run_spoiled, where, chunk)


def test_nothing_is_committed_before_its_end() -> None:
    mover = ExchangeMover(Mesh(ParallelLayout(), 0).ep, SLOTS)
    mover.begin([tensor.clone() for tensor in weights(1, 3)], [(0, 1)])
    assert not mover.advance(64)
    with pytest.raises(AssertionError, match="a commit before the end"):
        mover.commit()


def test_without_memory_for_staging_nothing_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    mover = ExchangeMover(Mesh(ParallelLayout(), 0).ep, SLOTS)
    tensors = [tensor.clone() for tensor in weights(1, 3)]
    with monkeypatch.context() as patch:

        def empty(*size: int, **kind: object) -> Tensor:
            if size[0]:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return torch.zeros(0, dtype=torch.uint8)

        patch.setattr(torch, "empty", empty)
        with pytest.raises(TransferError, match="no memory for 480 bytes of staging"):
            mover.begin(tensors, [(0, 1), (2, 3)])
    mover.abandon()
    mover.begin(tensors, [(0, 1)])
    assert mover.advance(1000)


class Threads(Group):
    """Two ranks in one process, a thread each, on any device."""

    def __init__(self, rank: int, boxes: list[queue.SimpleQueue[Tensor]]) -> None:
        super().__init__(rank, (0,), None, {})
        self.ranks, self.size, self.boxes = (0, 1), 2, boxes

    def all_to_all(self, x: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]) -> Tensor:
        self.boxes[1 - self.rank].put(x.clone())
        got = self.boxes[self.rank].get(timeout=20)
        assert len(got) == sum(receive_sizes)
        return got


GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("spoiled", [False, True])
def test_on_any_device_the_answer_comes_without_waiting_for_it(device: str, spoiled: bool) -> None:
    full, moves = weights(2, 4), [(0, SLOTS), (SLOTS, 0), (1, 2), (SLOTS + 1, 3), (4, SLOTS + 2)]
    boxes: list[queue.SimpleQueue[Tensor]] = [queue.SimpleQueue(), queue.SimpleQueue()]

    def work(rank: int) -> list[Tensor]:
        group: Group = Threads(rank, boxes)
        if spoiled and rank == 1:
            group.all_to_all = spoil(group.all_to_all)  # type: ignore[method-assign]
        mover = ExchangeMover(group, SLOTS)
        tensors = [tensor[rank * SLOTS : (rank + 1) * SLOTS].clone().to(device) for tensor in full]
        mover.begin(tensors, moves)
        found: WrongChecksum | None = None
        for _ in range(40):  # both do as many, as engines do
            try:
                mover.advance(200)
            except WrongChecksum as error:
                found = error
        if found is not None:
            raise found
        mover.commit()
        return [tensor.cpu() for tensor in tensors]

    with ThreadPoolExecutor(2) as threads:
        ranks = [threads.submit(work, rank) for rank in range(2)]
        if spoiled:
            with pytest.raises(WrongChecksum, match="slot . to 5|slot 4 to 7"):
                ranks[1].result(30)
            return
        got = [torch.cat(pair) for pair in zip(*(rank.result(30) for rank in ranks), strict=True)]
    for held, expected in zip(got, after(full, moves), strict=True):
        assert torch.equal(bits(held), bits(expected))


def spoil(all_to_all: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def spoiled(*args: object) -> Tensor:
        out = all_to_all(*args)
        out[len(out) // 2 :] ^= 1
        return out

    return spoiled


@pytest.mark.parametrize("device", [GPU])
def test_the_checksum_is_the_same_on_every_device(device: str) -> None:
    data = torch.randint(0, 256, (9_000_004,), dtype=torch.uint8)
    sums = [Checksum(torch.device(name)) for name in ("cpu", device)]
    for total, part in zip(sums, (data, data.to(device)), strict=True):
        total.add(part)
    assert int(sums[0].value) == int(sums[1].value)


def checksum(data: bytes, cuts: Sequence[int] = ()) -> int:
    whole = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
    total = Checksum(torch.device("cpu"))
    for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True):
        total.add(whole[start:stop])
    return int(total.value)


WORDS = st.lists(
    st.sampled_from([0, 1, -1, 2**31 - 1, -(2**31), 2**30]) | st.integers(-(2**31), 2**31 - 1), min_size=1
)


@given(WORDS, st.data())
def test_the_checksum_sees_a_changed_word_and_words_that_changed_places(
    words: list[int], data: st.DataObject
) -> None:
    first = np.array(words, "<i4")
    whole = checksum(first.tobytes())
    cut = data.draw(st.integers(0, len(words)))
    assert checksum(first.tobytes(), [4 * cut]) == whole, "parts do not matter"
    i, j = (data.draw(st.integers(0, len(words) - 1)) for _ in range(2))
    changed = first.copy()
    changed[i] ^= data.draw(st.sampled_from([1 << bit for bit in range(31)] + [-(2**31)]))
    assert checksum(changed.tobytes()) != whole
    swapped = first.copy()
    swapped[[i, j]] = first[[j, i]]
    assert (checksum(swapped.tobytes()) != whole) == (first[i] != first[j])


def test_the_checksum_goes_on_over_its_blocks() -> None:
    data = np.random.default_rng(0).integers(0, 256, 600_000, dtype=np.uint8)
    whole = checksum(data.tobytes())
    assert checksum(data.tobytes(), [4, 300_000, 300_004]) == whole
    words = data.view("<i4").astype(object)
    expected = sum(int(w) * (0x1E3779B97F4A7C15 + i * 0x3F58476D1CE4E5BA) for i, w in enumerate(words))
    assert (whole - expected) % 2**64 == 0
