"""The two moves every group operation is made of, rows to all and rows to each, over gloo and over NCCL.

Knows process groups and ranks; knows nothing of sums, layouts or why the rows travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor


class Wire(Protocol):
    """Rows of dim 0 between the members of one group, numbered 0..size-1; tensors are contiguous."""

    def all_gather(self, x: Tensor, out: Tensor, sizes: Sequence[int]) -> None:
        """x [sizes[me], ...] of every member, in order, into out [sum(sizes), ...]."""
        ...

    def all_to_all(self, x: Tensor, out: Tensor, send: Sequence[int], receive: Sequence[int]) -> None:
        """x [sum(send), ...] cut by send, part i to member i; parts received land in out in member order."""
        ...


class GlooWire:
    """CPU tensors: every pair of members exchanges its rows directly on the job's one gloo process group.

    One hop on the calling thread. gloo's own all_gather is a ring of size - 1 hops through a worker thread
    and takes 5 times as long for a few rows. No process group is made for a subgroup: the tag keeps groups
    apart, and messages of one pair and tag arrive in the order they were sent.
    """

    def __init__(self, gloo: Any, ranks: Sequence[int], me: int, tag: int) -> None:
        self._gloo = gloo
        self._ranks = tuple(ranks)
        self._me = me
        self._tag = tag
        # Each member starts with its own right-hand neighbour, so that no member is everyone's first target.
        self._peers = [(me + d) % len(ranks) for d in range(1, len(ranks))]

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
        gloo, ranks, tag = self._gloo, self._ranks, self._tag
        works = [gloo.recv([got[i]], ranks[i], tag) for i in self._peers if got[i].numel()]
        works += [gloo.send([sent[i]], ranks[i], tag) for i in self._peers if sent[i].numel()]
        for work in works:
            work.wait()

    def send(self, x: Tensor, target: int) -> Any:
        """Starts sending x to a member; the answer's wait() returns once x may be written again."""
        return self._gloo.send([x], self._ranks[target], self._tag)

    def receive(self, out: Tensor, source: int) -> None:
        self._gloo.recv([out], self._ranks[source], self._tag).wait()


class NcclWire:
    """GPU tensors: NCCL's collectives on a communicator of the group, on the current stream, no host sync."""

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self._process_group = process_group

    def all_gather(self, x: Tensor, out: Tensor, sizes: Sequence[int]) -> None:
        dist.all_gather(list(out.split_with_sizes(list(sizes))), x, group=self._process_group)

    def all_to_all(self, x: Tensor, out: Tensor, send: Sequence[int], receive: Sequence[int]) -> None:
        dist.all_to_all_single(out, x, list(receive), list(send), group=self._process_group)
