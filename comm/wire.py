"""The two moves every group operation is made of, rows to all and rows to each: pair by pair, or over NCCL.

Knows ranks and rows; knows nothing of sums, layouts or why the rows travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor


class RankLost(RuntimeError):
    """A rank of the group has ended, or has left it because another did: nothing can be done together any more."""


class Wire(Protocol):
    """Rows of dim 0 between the members of one group, numbered 0..size-1; tensors are contiguous."""

    def all_gather(self, x: Tensor, out: Tensor, sizes: Sequence[int]) -> None:
        """x [sizes[me], ...] of every member, in order, into out [sum(sizes), ...]."""
        ...

    def all_to_all(self, x: Tensor, out: Tensor, send: Sequence[int], receive: Sequence[int]) -> None:
        """x [sum(send), ...] cut by send, part i to member i; parts received land in out in member order."""
        ...


class Pairs(Protocol):
    """Messages between this process and single other ranks; those of one pair arrive in order."""

    def exchange(self, sent: Sequence[tuple[int, Tensor]], got: Sequence[tuple[int, Tensor]]) -> None:
        """Sends each tensor to its global rank, fills those of `got` from theirs; both ends know the sizes.

        Tensors are contiguous CPU tensors and not empty. Raises RankLost when a rank is gone, RuntimeError when one
        is too late.
        """
        ...

    def leave(self) -> None:
        """Makes the others' waits for this process end with RankLost."""
        ...

    def check(self) -> None:
        """Raises RankLost when a rank is known to have left."""
        ...


class GlooPairs:
    """Pairs over the job's one gloo process group; ranks with different tags are different streams.

    Runs on the calling thread. gloo's own collectives go through a worker thread, and its all_gather is a ring of
    size - 1 hops: five times as long for a few rows.
    """

    def __init__(self, gloo: Any, tag: int) -> None:
        self._gloo: Any | None = gloo
        self._tag = tag

    def exchange(self, sent: Sequence[tuple[int, Tensor]], got: Sequence[tuple[int, Tensor]]) -> None:
        if self._gloo is None:
            raise RankLost("this rank has left")
        try:
            works = [self._gloo.recv([x], rank, self._tag) for rank, x in got]
            works += [self._gloo.send([x], rank, self._tag) for rank, x in sent]
            for work in works:
                work.wait()
        except RuntimeError as error:  # one kind for a closed connection and for one that was silent too long
            raise RankLost(str(error)) from error

    def leave(self) -> None:
        """The connections end with the last that refers to them, once the job is left too."""
        self._gloo = None

    def check(self) -> None:
        """Nothing is known between messages."""


class PairWire:
    """CPU tensors: every member exchanges its rows with every other directly, in one hop."""

    def __init__(self, pairs: Pairs, ranks: Sequence[int], me: int) -> None:
        self._pairs = pairs
        self._me = me
        # Each member starts with its own right-hand neighbour, so that no member is everyone's first target.
        size = len(ranks)
        self._peers = [(i, ranks[i]) for i in ((me + d) % size for d in range(1, size))]

    def all_gather(self, x: Tensor, out: Tensor, sizes: Sequence[int]) -> None:
        parts = out.split_with_sizes(list(sizes))
        self.exchange([x] * len(parts), parts)
        parts[self._me].copy_(x)

    def all_to_all(self, x: Tensor, out: Tensor, send: Sequence[int], receive: Sequence[int]) -> None:
        sent, got = x.split_with_sizes(list(send)), out.split_with_sizes(list(receive))
        self.exchange(sent, got)
        got[self._me].copy_(sent[self._me])

    def exchange(self, sent: Sequence[Tensor], got: Sequence[Tensor]) -> None:
        """sent[i] to member i and got[i] from member i, all but our own; empty tensors do not travel."""
        self._pairs.exchange(
            [(rank, sent[i]) for i, rank in self._peers if sent[i].numel()],
            [(rank, got[i]) for i, rank in self._peers if got[i].numel()],
        )

    def check(self) -> None:
        self._pairs.check()

    def send_to_all(self, x: Tensor) -> None:
        """The same tensor to every other member; they call receive."""
        self._pairs.exchange([(rank, x) for _, rank in self._peers], [])

    def receive(self, out: Tensor, source: int) -> None:
        """Fills out with what member `source` sent to all."""
        self._pairs.exchange([], [(rank, out) for i, rank in self._peers if i == source])


class NcclWire:
    """GPU tensors: NCCL's collectives on a communicator of the group, on the current stream, no host sync."""

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self._process_group = process_group

    def all_gather(self, x: Tensor, out: Tensor, sizes: Sequence[int]) -> None:
        dist.all_gather(list(out.split_with_sizes(list(sizes))), x, group=self._process_group)

    def all_to_all(self, x: Tensor, out: Tensor, send: Sequence[int], receive: Sequence[int]) -> None:
        dist.all_to_all_single(out, x, list(receive), list(send), group=self._process_group)
