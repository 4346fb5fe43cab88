"""Moves weights by reading them from the other ranks' memory: the source takes no part but for a checksum.

For weights that lie in a symmetric heap. Each slot has three words beside it, written by its own rank alone:
generation (odd while the slot is written), checksum, and which generation the checksum is of. Who reads a slot
reads the generation before and after and starts over when it changed, so a slot that is written meanwhile gives
the old expert or the new one, never some of both. One more word counts the sets of moves that the rank began: who
is ahead does not read what a rank still has to write for the set before. The order of stores and loads that this
takes is the heap's.

On GPUs each look at a word waits for the device; that has not been run.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.comm.symm import SymmHeap
from moeserve.comm.weight_mover.checksum import Checksum
from moeserve.comm.weight_mover.protocol import TransferError, WrongChecksum

ALIGNMENT = 128
WORD = 8
GENERATION, SUM, SUMMED = 0, 1, 2
"""Words of a slot; the last is 1 more than the generation that the checksum is of, 0 for none."""


class SourceLost(TransferError):
    """The rank that holds a source slot is gone, or it does not end writing it. rank, source_slot: which."""

    def __init__(self, rank: int, source_slot: int, why: str) -> None:
        super().__init__(f"slot {source_slot} of rank {rank}: {why}")
        self.rank = rank
        self.source_slot = source_slot


class SlotMemory:
    """Hands out per-slot weights in this rank's block of a heap, with the words of the slots before each tensor.

    Every rank of the heap asks for the same shapes in the same order: a tensor lies at the same place on all.
    """

    def __init__(self, heap: SymmHeap) -> None:
        self._heap = heap
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """[slots of a rank, ...], zeroed. Raises ValueError when the heap is full."""
        start = self._used + _words_bytes(shape[0])
        end = start + _bytes(shape, dtype)
        if end > self._heap.nbytes:
            raise ValueError(f"nbytes = {self._heap.nbytes}: the weights need {end} bytes of heap or more")
        self._used = _align(end)
        return self._heap.view(self._heap.rank, start, shape, dtype)


def heap_bytes(tensors: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> int:
    """What SlotMemory needs for tensors of these shapes and dtypes."""
    return sum(_words_bytes(shape[0]) + _align(_bytes(shape, dtype)) for shape, dtype in tensors)


@dataclass
class _Pull:
    """One expert under way into this rank: where from, which slots here get it, and how far it is."""

    rank: int
    slot: int
    targets: tuple[int, ...]
    staged: Tensor
    checksum: Checksum
    generation: int = -1
    position: int = 0
    is_good: bool = False
    written_since: float | None = None

    def restart(self) -> None:
        self.generation, self.position = -1, 0
        self.checksum = Checksum(self.staged.device)


class HeapMover:
    """A WeightMover over weights from SlotMemory. Staging holds each expert that this rank receives once.

    A source's checksum costs its rank one pass over the expert, at most max_bytes an advance, once until the slot
    is next written. A source that does not begin or advance is waited for; whoever drives says how long. timeout:
    seconds that a slot may be under write before that is an error. restarts: reads begun anew, so far.
    """

    def __init__(self, heap: SymmHeap, slots_per_rank: int, timeout: float = 30.0) -> None:
        self._heap = heap
        self._slots_per_rank = slots_per_rank
        self._timeout = timeout
        self._pulls: list[_Pull] = []
        self._outgoing: list[int] = []  # local slots that others read
        self._sums: dict[int, tuple[int, int, Checksum]] = {}  # local slot: generation, bytes done, sum
        self._shares: dict[int, int] = {}  # by source rank, into how many parts a budget goes
        self.restarts = 0

    def begin(self, tensors: Sequence[Tensor], moves: Sequence[tuple[int, int]]) -> None:
        """As the protocol says; tensors come from SlotMemory."""
        assert not self._pulls and not self._outgoing, "a set of moves is under way"
        assert len({target for _, target in moves}) == len(moves), f"two moves into one slot: {moves}"
        self._slots = _Slots(self._heap, tensors)
        self._slots.begun(self._heap.rank).add_(1)
        me, each = self._heap.rank, self._slots_per_rank
        targets: dict[int, list[int]] = {}
        for source, target in moves:
            if target // each == me:
                targets.setdefault(source, []).append(target)
        size = len(targets), self._slots.stride
        try:
            staging = torch.empty(size, dtype=torch.uint8, device=self._heap.device)
        except RuntimeError as error:
            raise TransferError(f"no memory for {size[0] * size[1]} bytes of staging") from error
        self._pulls = [
            _Pull(source // each, source % each, tuple(to), row, Checksum(row.device))
            for (source, to), row in zip(targets.items(), staging.unbind(), strict=True)
        ]
        self._outgoing = sorted({source % each for source, _ in moves if source // each == me})
        pairs = {(source // each, target // each) for source, target in moves}
        busy = {rank: sum(rank in pair for pair in pairs) for pair in pairs for rank in pair}
        self._shares = {source: max(busy[source], busy[me]) for source, target in pairs if target == me}

    def advance(self, max_bytes: int) -> bool:
        assert max_bytes >= WORD, f"max_bytes = {max_bytes}: nothing would move"
        self._publish_sums(max_bytes)
        left = {rank: max(WORD, max_bytes // parts // WORD * WORD) for rank, parts in self._shares.items()}
        for pull in self._pulls:
            if not pull.is_good:
                left[pull.rank] -= self._advance(pull, left[pull.rank])
        return all(pull.is_good for pull in self._pulls)

    def commit(self) -> None:
        assert all(pull.is_good for pull in self._pulls), "a commit before the end"
        each = self._slots_per_rank
        for pull in self._pulls:
            for target in pull.targets:
                with self._slots.writing(target % each) as words:
                    self._slots.write(target % each, pull.staged)
                    words[SUM] = pull.checksum.value
                    words[SUMMED] = words[GENERATION] + 2
        self.abandon()

    def abandon(self) -> None:
        self._pulls, self._outgoing, self._sums, self._shares = [], [], {}, {}

    def _advance(self, pull: _Pull, budget: int) -> int:
        """Reads up to budget bytes of an expert -> bytes read."""
        source = pull.rank * self._slots_per_rank + pull.slot
        if not self._heap.is_alive(pull.rank):
            raise SourceLost(pull.rank, source, "the rank has died")
        if int(self._slots.begun(pull.rank)) < int(self._slots.begun(self._heap.rank)):
            return 0  # it may have to write the slot yet
        words = self._slots.words(pull.rank)[pull.slot]
        generation = int(words[GENERATION])
        if generation != pull.generation:
            if pull.generation >= 0:
                self.restarts += 1
                pull.restart()
            if self._is_written(pull, generation, source):
                return 0
            pull.generation = generation
        count = min(budget, self._slots.stride - pull.position)
        if count:
            part = pull.staged[pull.position : pull.position + count]
            self._slots.read(pull.rank, pull.slot, pull.position, part)
            pull.checksum.add(part)
            pull.position += count
        if pull.position == self._slots.stride:
            self._compare(pull, words, source)
        return count

    def _is_written(self, pull: _Pull, generation: int, source: int) -> bool:
        """Whether the slot is being written now; too long is an error."""
        if generation % 2 == 0:
            pull.written_since = None
            return False
        now = time.monotonic()
        pull.written_since = now if pull.written_since is None else pull.written_since
        if now - pull.written_since > self._timeout:
            raise SourceLost(pull.rank, source, f"it has been under write for {self._timeout:g} s")
        return True

    def _compare(self, pull: _Pull, words: Tensor, source: int) -> None:
        """Holds a complete expert against the checksum of its generation, once that is there."""
        summed, expected = int(words[SUMMED]), int(words[SUM])
        if summed != pull.generation + 1 or int(words[GENERATION]) != pull.generation:
            return  # not there yet, or the slot has changed since
        if int(pull.checksum.value) != expected:
            raise WrongChecksum(source, pull.targets)
        pull.is_good = True

    def _publish_sums(self, max_bytes: int) -> None:
        """Goes on with the checksums of our slots that others read and that have none of their generation."""
        words = self._slots.words(self._heap.rank) if self._outgoing else None
        for slot in self._outgoing:
            assert words is not None
            generation = int(words[slot, GENERATION])
            if int(words[slot, SUMMED]) == generation + 1 or generation % 2 or not max_bytes:
                continue
            begun, position, checksum = self._sums.get(slot, (-1, 0, Checksum(self._heap.device)))
            if begun != generation:
                position, checksum = 0, Checksum(self._heap.device)
            count = min(max_bytes // WORD * WORD, self._slots.stride - position)
            part = torch.empty(count, dtype=torch.uint8, device=self._heap.device)
            self._slots.read(self._heap.rank, slot, position, part)
            checksum.add(part)
            max_bytes -= count
            self._sums[slot] = generation, position + count, checksum
            if position + count == self._slots.stride:
                words[slot, SUM] = checksum.value
                words[slot, SUMMED] = generation + 1


@contextlib.contextmanager
def writing(heap: SymmHeap, tensors: Sequence[Tensor], slot: int) -> Iterator[None]:
    """Around whatever writes a local slot of tensors from SlotMemory while others may read it."""
    with _Slots(heap, tensors).writing(slot):
        yield


class _Slots:
    """The slots of all ranks as streams of bytes, a slot's tensors one after another, each padded to 8 bytes.

    stride: bytes of a stream.
    """

    def __init__(self, heap: SymmHeap, tensors: Sequence[Tensor]) -> None:
        self._rank = heap.rank
        base, count = heap.block(heap.rank).data_ptr(), len(tensors[0])
        self._rows: list[list[Tensor]] = [[] for _ in range(heap.world)]
        self._starts: list[int] = []
        self.stride = 0
        for tensor in tensors:
            offset, width = tensor.data_ptr() - base, tensor[0].numel() * tensor.itemsize
            assert tensor.is_contiguous() and 0 <= offset <= heap.nbytes - count * width, "not in this heap"
            for rank, rows in enumerate(self._rows):
                rows.append(heap.view(rank, offset, (count, width), torch.uint8))
            self._starts.append(self.stride)
            self.stride += -(-width // WORD) * WORD
        place = tensors[0].data_ptr() - base - _words_bytes(count)
        self._words = [heap.view(rank, place, (count + 1, 3), torch.int64) for rank in range(heap.world)]

    def words(self, rank: int) -> Tensor:
        """int64 [slots, 3]"""
        return self._words[rank][:-1]

    def begun(self, rank: int) -> Tensor:
        """int64 [], sets of moves that the rank has begun on these tensors."""
        return self._words[rank][-1, 0]

    def read(self, rank: int, slot: int, first: int, out: Tensor) -> None:
        """Bytes first.. of a slot's stream into out."""
        last = first + len(out)
        for start, rows in zip(self._starts, self._rows[rank], strict=True):
            end = start + rows.shape[1]
            low, high = max(first, start), min(last, end)
            if low < high:
                out[low - first : high - first].copy_(rows[slot, low - start : high - start])
            low, high = max(first, end), min(last, -(-end // WORD) * WORD)
            if low < high:
                out[low - first : high - first].zero_()

    def write(self, slot: int, data: Tensor) -> None:
        """A whole stream into a slot of this rank."""
        for start, rows in zip(self._starts, self._rows[self._rank], strict=True):
            rows[slot].copy_(data[start : start + rows.shape[1]])

    @contextlib.contextmanager
    def writing(self, slot: int) -> Iterator[Tensor]:
        """Marks a slot of this rank as written meanwhile; gives its words. An exception leaves it marked."""
        words = self._words[self._rank][slot]
        words[GENERATION] += 1
        yield words
        words[GENERATION] += 1


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    count = dtype.itemsize
    for size in shape:
        count *= size
    return count


def _words_bytes(slots: int) -> int:
    return _align((slots + 1) * 3 * WORD)


def _align(value: int) -> int:
    return -(-value // ALIGNMENT) * ALIGNMENT
