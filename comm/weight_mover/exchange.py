"""Moves weights by all-to-alls in which every rank of the group takes part: over any group, on any device.

Each advance is one all-to-all of the bytes that fit; both ends work out the same cut, so none of it is announced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.comm.group import Group
from moeserve.comm.weight_mover.checksum import Checksum
from moeserve.comm.weight_mover.protocol import TransferError, WrongChecksum

WORD = 8
"""Tensors of an expert begin at multiples of it in the stream, and its checksum is as long."""


@dataclass(frozen=True)
class _Item:
    """One expert for one rank: a slot there, and those of the rank's slots that get it."""

    source: int
    targets: tuple[int, ...]


@dataclass
class _Flow:
    """The experts from one rank to another (or the same), as one stream of bytes."""

    source_rank: int
    target_rank: int
    items: tuple[_Item, ...]
    done: int = 0


class ExchangeMover:
    """Staging holds each expert that this rank receives in one set of moves, once: (their bytes + 8) each, the
    expert's tensors rounded up to 8 bytes. It is kept for the next set; drop the mover to give it back. A set's
    checksums cost the sender and the receiver one pass over the bytes; moves inside the rank have none.
    """

    def __init__(self, group: Group, slots_per_rank: int) -> None:
        self._group = group
        self._slots_per_rank = slots_per_rank
        self._staging = torch.empty(0, dtype=torch.uint8)
        self._flows: list[_Flow] = []
        self._incoming: list[_Flow] = []
        self._staged: dict[int, Tensor] = {}  # by source rank
        self._sums: dict[_Item, Checksum] = {}
        self._verdict = _Verdict([], torch.device("cpu"))

    @property
    def staging_bytes(self) -> int:
        return self._staging.numel()

    def begin(self, tensors: Sequence[Tensor], moves: Sequence[tuple[int, int]]) -> None:
        assert not self._flows, "a set of moves is under way"
        self._bytes = _ExpertBytes(tensors)
        self._flows = _flows(moves, self._slots_per_rank)
        me, device = self._group.rank, tensors[0].device
        self._incoming = [flow for flow in self._flows if flow.target_rank == me]
        needed = sum(map(self._length, self._incoming))
        if self._staging.numel() < needed or self._staging.device != device:
            self._staging = torch.empty(0, dtype=torch.uint8, device=device)  # first give back what there is
            try:
                self._staging = torch.empty(needed, dtype=torch.uint8, device=device)
            except RuntimeError as error:
                raise TransferError(f"no memory for {needed} bytes of staging") from error
        start = 0
        for flow in self._incoming:
            stop = start + self._length(flow)
            self._staged[flow.source_rank], start = self._staging[start:stop], stop
        far = [item for flow in self._incoming if flow.source_rank != me for item in flow.items]
        self._verdict = _Verdict(far, device)

    def advance(self, max_bytes: int) -> bool:
        me, size = self._group.rank, self._group.size
        chunks = list(self._cut(max_bytes))
        for flow, start, stop in chunks:
            if flow.source_rank == flow.target_rank == me:
                self._pack(flow, start, stop, self._staged[me][start:stop])
        far = [chunk for chunk in chunks if chunk[0].source_rank != chunk[0].target_rank]
        if far:
            sent = {f.target_rank: (f, start, stop) for f, start, stop in far if f.source_rank == me}
            got = {f.source_rank: (f, start, stop) for f, start, stop in far if f.target_rank == me}
            self._exchange([sent.get(rank) for rank in range(size)], [got.get(rank) for rank in range(size)])
        return all(flow.done == self._length(flow) for flow in self._incoming) and self._verdict.is_good()

    def commit(self) -> None:
        me, stride = self._group.rank, self._bytes.stride
        for flow in self._flows:
            if flow.target_rank == me:
                assert flow.done == len(flow.items) * stride, "a commit before the end"
                for item, data in zip(
                    flow.items, self._staged[flow.source_rank].view(-1, stride), strict=True
                ):
                    for target in item.targets:
                        self._bytes.write(target - me * self._slots_per_rank, data)
        self.abandon()

    def abandon(self) -> None:
        self._flows, self._incoming, self._staged, self._sums = [], [], {}, {}
        self._verdict = _Verdict([], torch.device("cpu"))

    def _cut(self, max_bytes: int) -> Iterator[tuple[_Flow, int, int]]:
        """The parts of the flows that travel now, the same on every rank: (flow, from byte, to byte)."""
        assert max_bytes >= WORD, f"max_bytes = {max_bytes}: nothing would move"
        left = [max_bytes] * self._group.size
        for flow in self._flows:
            rest = self._length(flow) - flow.done
            count = min(rest, left[flow.source_rank], left[flow.target_rank]) // WORD * WORD
            if count:
                left[flow.source_rank] -= count
                if flow.target_rank != flow.source_rank:
                    left[flow.target_rank] -= count
                start, flow.done = flow.done, flow.done + count
                yield flow, start, flow.done

    def _exchange(
        self, sent: Sequence[tuple[_Flow, int, int] | None], got: Sequence[tuple[_Flow, int, int] | None]
    ) -> None:
        """One all-to-all, chunks by rank."""
        send_sizes, receive_sizes = ([0 if c is None else c[2] - c[1] for c in part] for part in (sent, got))
        x = torch.empty(sum(send_sizes), dtype=torch.uint8, device=self._bytes.device)
        for chunk, part in zip(sent, x.split_with_sizes(send_sizes), strict=True):
            if chunk is not None:
                self._pack(*chunk, part)
        y = self._group.all_to_all(x, send_sizes, receive_sizes)
        for chunk, part in zip(got, y.split_with_sizes(receive_sizes), strict=True):
            if chunk is not None:
                self._take(*chunk, part)

    def _pack(self, flow: _Flow, start: int, stop: int, out: Tensor) -> None:
        """Bytes start..stop of the flow's stream, each expert followed by its checksum."""
        stride, far = self._bytes.stride, flow.source_rank != flow.target_rank
        for item, first, last, place in _pieces(flow, start, stop, stride):
            part = out[place : place + last - first]
            data = part if last < stride else part[:-WORD]
            self._bytes.read(item.source - flow.source_rank * self._slots_per_rank, first, data)
            if far:
                checksum = self._sum(item)
                checksum.add(data)
                if last == stride:
                    part[-WORD:].copy_(checksum.value.view(1).view(torch.uint8))

    def _take(self, flow: _Flow, start: int, stop: int, part: Tensor) -> None:
        """Stages bytes start..stop of a stream and compares the checksum of each expert that is complete."""
        staged, stride = self._staged[flow.source_rank][start:stop], self._bytes.stride
        staged.copy_(part)
        for item, first, last, place in _pieces(flow, start, stop, stride):
            data = staged[place : place + last - first]
            checksum = self._sum(item)
            checksum.add(data if last < stride else data[:-WORD])
            if last == stride:
                self._verdict.add(item, data[-WORD:].view(torch.int64) == checksum.value)

    def _length(self, flow: _Flow) -> int:
        return len(flow.items) * self._bytes.stride

    def _sum(self, item: _Item) -> Checksum:
        if item not in self._sums:
            self._sums[item] = Checksum(self._bytes.device)
        return self._sums[item]


class _ExpertBytes:
    """The tensors of a slot as one stream of bytes. stride: its length with the checksum behind it."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        assert all(tensor.is_contiguous() for tensor in tensors), "weights to move must be contiguous"
        self._rows = [tensor.view(len(tensor), -1).view(torch.uint8) for tensor in tensors]
        self._starts = []
        end = 0
        for row in self._rows:
            self._starts.append(end)
            end += -(-row.shape[1] // WORD) * WORD
        self.stride = end + WORD
        self.device = tensors[0].device

    def read(self, slot: int, first: int, out: Tensor) -> None:
        """Bytes first.. of a local slot's stream into out."""
        last = first + len(out)
        for start, row in zip(self._starts, self._rows, strict=True):
            end = start + row.shape[1]
            low, high = max(first, start), min(last, end)
            if low < high:
                out[low - first : high - first].copy_(row[slot, low - start : high - start])
            if end % WORD:
                padded = -(-end // WORD) * WORD
                out[max(0, end - first) : max(0, min(last, padded) - first)].zero_()

    def write(self, slot: int, data: Tensor) -> None:
        """A whole stream into a local slot."""
        for start, row in zip(self._starts, self._rows, strict=True):
            row[slot].copy_(data[start : start + row.shape[1]])


class _Verdict:
    """Whether all experts that are to come have come with the right checksum. Does not wait for a GPU."""

    def __init__(self, expected: Sequence[_Item], device: torch.device) -> None:
        self._missing = len(expected)
        self._items: list[_Item] = []
        self._same: list[Tensor] = []
        self._on_host = torch.empty(len(expected), dtype=torch.bool, pin_memory=device.type == "cuda")
        self._copied: torch.cuda.Event | None = None
        self._is_good = not expected

    def add(self, item: _Item, same: Tensor) -> None:
        """same: bool [1] on the device."""
        self._items.append(item)
        self._same.append(same)
        if len(self._same) == self._missing:
            self._on_host.copy_(torch.cat(self._same), non_blocking=True)
            if same.device.type == "cuda":
                self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._copied.record()

    def is_good(self) -> bool:
        """Raises WrongChecksum for the first expert that has a wrong one, once all are there."""
        if not self._is_good and len(self._same) == self._missing:
            if self._copied is not None and not self._copied.query():  # type: ignore[no-untyped-call]
                return False
            for item, same in zip(self._items, self._on_host.tolist(), strict=True):
                if not same:
                    raise WrongChecksum(item.source, item.targets)
            self._is_good = True
        return self._is_good


def _flows(moves: Sequence[tuple[int, int]], slots_per_rank: int) -> list[_Flow]:
    """The moves by pair of ranks, in the same order on every rank; a slot goes to a rank once."""
    assert len({target for _, target in moves}) == len(moves), f"two moves into one slot: {moves}"
    targets: dict[tuple[int, int], dict[int, list[int]]] = {}
    for source, target in moves:
        pair = source // slots_per_rank, target // slots_per_rank
        targets.setdefault(pair, {}).setdefault(source, []).append(target)
    return [
        _Flow(*pair, tuple(_Item(source, tuple(to)) for source, to in items.items()))
        for pair, items in targets.items()
    ]


def _pieces(flow: _Flow, start: int, stop: int, stride: int) -> Iterator[tuple[_Item, int, int, int]]:
    """Bytes start..stop of a flow by expert: (item, from byte of it, to byte of it, place in the part)."""
    position = start
    while position < stop:
        number, first = divmod(position, stride)
        last = min(stride, first + stop - position)
        yield flow.items[number], first, last, position - start
        position += last - first
