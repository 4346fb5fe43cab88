"""Collective operations of one group of ranks, on tensors of any device. Knows no axis and no model.

A group of one does nothing and costs nothing: every operation gives back its argument.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moeserve.comm.wire import PairWire, Wire

SMALL_ALL_REDUCE_BYTES = 64 * 1024
"""Up to here all_reduce sends the whole tensor to everyone, one hop; above, reduce_scatter and all_gather."""


class Group:
    """Ranks that work together, numbered 0..size-1 in the order of `ranks`.

    Every member calls the same operations in the same order, from one thread. Tensors are contiguous and
    rows are dim 0. Sums are taken in rank order in float32 (float64 and integers in their own type) and
    rounded once to x's dtype, so a row's result never depends on who came first, on how many rows travel
    with it or on the device. Results may be the argument itself (size 1): do not write into them.

    rank, size: this process's number in the group and how many there are; ranks: their global ranks.
    wires: by device type ("cpu", "cuda"); empty for a group of one.
    """

    def __init__(self, rank: int, ranks: Sequence[int], control: PairWire | None, wires: Mapping[str, Wire]):
        self.rank = rank
        self.ranks = tuple(ranks)
        self.size = len(self.ranks)
        assert self.size == 1 or control is not None, f"no wire for the group {self.ranks}"
        self._control = control
        self._wires = wires
        self._ints: dict[int, Tensor] = {}

    def __repr__(self) -> str:
        return f"Group(rank={self.rank}, ranks={self.ranks})"

    def all_reduce(self, x: Tensor) -> Tensor:
        """x, the same shape on every member -> their sum."""
        if self.size == 1:
            return x
        flat = x.view(-1)
        if flat.numel() * flat.element_size() <= SMALL_ALL_REDUCE_BYTES:
            return _ordered_sum(self.all_gather(flat).view(self.size, -1)).view(x.shape)
        sizes = _even(flat.numel(), self.size)
        return self.all_gather(self.reduce_scatter(flat, sizes), sizes).view(x.shape)

    def all_gather(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """x [sizes[rank], ...] of each member -> [sum(sizes), ...]; sizes is needed only when they differ."""
        if self.size == 1:
            return x
        rows = [x.shape[0]] * self.size if sizes is None else sizes
        out = x.new_empty((sum(rows), *x.shape[1:]))
        self._wire(x).all_gather(x, out, rows)
        return out

    def all_gather_last(self, x: Tensor) -> Tensor:
        """x [..., W], the same shape on every member -> [..., size * W], side by side in member order."""
        if self.size == 1:
            return x
        gathered = self.all_gather(x.unsqueeze(0))  # [size, ..., W]
        return gathered.movedim(0, -2).reshape(*x.shape[:-1], self.size * x.shape[-1])

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """x [sum(sizes), ...], the same shape on every member -> [sizes[rank], ...], our rows of their sum.

        sizes: rows of each member's result; left out, dim 0 is cut evenly and must divide by size.
        """
        if self.size == 1:
            return x
        if sizes is None:
            assert x.shape[0] % self.size == 0, f"{x.shape[0]} rows do not divide among {self.size} ranks"
            sizes = [x.shape[0] // self.size] * self.size
        mine = sizes[self.rank]
        out = x.new_empty((self.size * mine, *x.shape[1:]))
        self._wire(x).all_to_all(x, out, sizes, [mine] * self.size)
        return _ordered_sum(out.view(self.size, mine, *x.shape[1:]))

    def all_to_all(self, x: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]) -> Tensor:
        """x [sum(send_sizes), ...], rows for each member in turn -> [sum(receive_sizes), ...] by sender."""
        if self.size == 1:
            return x
        out = x.new_empty((sum(receive_sizes), *x.shape[1:]))
        self._wire(x).all_to_all(x, out, send_sizes, receive_sizes)
        return out

    def broadcast_bytes(self, data: bytes | None, source: int = 0) -> bytes:
        """The bytes that member `source` gave; the others give None. Travels over the host network."""
        if self.rank == source:
            assert data is not None, "the source of a broadcast must give the bytes"
            if self._control is not None:
                self._control.send_to_all(torch.tensor([len(data)]))
                if data:
                    self._control.send_to_all(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            return data
        assert self._control is not None
        length = torch.empty(1, dtype=torch.int64)
        self._control.receive(length, source)
        body = torch.empty(int(length), dtype=torch.uint8)
        if len(body):
            self._control.receive(body, source)
        return body.numpy().tobytes()

    def all_gather_ints(self, values: Sequence[int]) -> list[list[int]]:
        """A few numbers of each member, as many on every one -> [size] lists.

        Made for a header every step: one hop, buffers are kept, and it never waits for a GPU.
        """
        if self.size == 1:
            return [list(values)]
        assert self._control is not None
        table = self._ints.get(len(values))
        if table is None:
            table = self._ints[len(values)] = torch.empty(self.size, len(values), dtype=torch.int64)
        parts = table.unbind()
        table.numpy()[self.rank] = values
        self._control.exchange([parts[self.rank]] * self.size, parts)
        rows: list[list[int]] = table.tolist()
        return rows

    def barrier(self) -> None:
        """Returns once every member has called it. Orders hosts, not the work queued on their GPUs."""
        self.all_gather_ints((0,))

    def check(self) -> None:
        """For a rank that waits for the others in another way: raises RankLost if one of this host has left."""
        if self._control is not None:
            self._control.check()

    def _wire(self, x: Tensor) -> Wire:
        assert x.is_contiguous(), f"group operations take contiguous tensors, got strides {x.stride()}"
        return self._wires[x.device.type]


def _ordered_sum(parts: Tensor) -> Tensor:
    """parts [size, ...] -> their sum in order of the first dim, in float32 for the narrower float types."""
    wide = parts.to(torch.float32) if parts.dtype.itemsize < 4 and parts.is_floating_point() else parts
    total = wide[0] + wide[1]
    for part in wide[2:]:
        total += part
    return total.to(parts.dtype)


def _even(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]
