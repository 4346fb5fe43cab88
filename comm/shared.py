"""Byte streams between the ranks of one host: a ring in shared memory for each ordered pair. Knows no group.

Why beside gloo: a message through gloo wakes two threads of the receiver and crosses the socket layer three
times; here it is one copy in and one out, and a receiver that is not yet waiting never sleeps at all.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import select
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from moeserve.comm.wire import RankLost

COUNTER_BYTES = 128
"""Space of a ring's two counters, each on a cache line of its own."""
MAX_RING_BYTES = 1 << 20
HOST_BYTES = 64 << 20
"""Shared memory of all rings of a host at most."""
CHUNK_BYTES = 1 << 18
"""A long message is handed over in parts of this size, so that it is read while it is written."""
POLLS_BEFORE_SLEEP = 50
SLEEP_SECONDS = 50e-6
IDLE_SECONDS = 20e-3
IDLE_SLEEP_SECONDS = 1e-3
"""A rank that has waited so long sleeps so long: idle, polling as in a step would take a seventh of a core."""
CHECK_SECONDS = 0.1
"""How often a waiting rank looks whether the others still live."""

supported = platform.machine() in ("x86_64", "AMD64") and hasattr(os, "pidfd_open")
"""The rings rely on stores being seen in program order, which x86 promises and Arm does not."""


def ring_bytes(num_ranks: int) -> int:
    """Size of each ring when num_ranks share a host: a multiple of 4096."""
    pairs = max(1, num_ranks * (num_ranks - 1))
    return min(MAX_RING_BYTES, HOST_BYTES // pairs // 4096 * 4096)


def segment_bytes(num_ranks: int) -> int:
    return num_ranks * num_ranks * (COUNTER_BYTES + ring_bytes(num_ranks))


def host_identity() -> int:
    """The same number in processes that see one another by pid, another elsewhere: other machines, containers."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return zlib.crc32(boot.encode()) << 31 ^ os.stat("/proc/self/ns/pid").st_ino


def create_segment(num_ranks: int) -> int:
    """A new anonymous segment -> its file descriptor, which others open through /proc/PID/fd."""
    descriptor = os.memfd_create("moeserve-rings", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, segment_bytes(num_ranks))
    return descriptor


class _Ring:
    """One direction between two ranks; a single writer and a single reader, each with a counter of its own.

    Counters count bytes since the start; a message is its length in 8 bytes, then its bytes, padded to 8.
    """

    def __init__(self, memory: memoryview, address: int, size: int) -> None:
        self._counters = memory[:COUNTER_BYTES].cast("q")  # [0] written, [8] read
        self._words = memory[COUNTER_BYTES:].cast("q")
        self._address = address + COUNTER_BYTES
        self._size = size
        self._written = 0
        self._read = 0

    def begin_write(self, num_bytes: int) -> bool:
        """Announces a message of num_bytes if there is room for it to start."""
        if self._size - (self._written - self._counters[8]) < 16:
            return False
        self._words[self._written % self._size // 8] = num_bytes
        self._written += 8
        return True

    def write(self, source: int, num_bytes: int) -> int:
        """Copies a part of the message at address `source`, and makes it visible -> bytes copied."""
        start = self._written % self._size
        room = self._size - (self._written - self._counters[8])
        count = min(num_bytes, room, self._size - start, CHUNK_BYTES)
        ctypes.memmove(self._address + start, source, count)
        self._written += count if count < num_bytes else (count + 7) // 8 * 8
        self._counters[0] = self._written
        return count

    def begin_read(self) -> int | None:
        """Length of the message that comes next, if it has begun to arrive."""
        if self._counters[0] == self._read:
            return None
        num_bytes: int = self._words[self._read % self._size // 8]
        self._read += 8
        return num_bytes

    def read(self, target: int, num_bytes: int) -> int:
        """Copies what has arrived of the message to address `target` -> bytes copied."""
        start = self._read % self._size
        count = min(num_bytes, self._counters[0] - self._read, self._size - start)
        if count:
            ctypes.memmove(target, self._address + start, count)
            self._read += count if count < num_bytes else (count + 7) // 8 * 8
            self._counters[8] = self._read
        return count


class _Transfer:
    """A message under way."""

    def __init__(self, ring: _Ring, peer: int, tensor: Tensor) -> None:
        self.ring = ring
        self.peer = peer
        self.address = tensor.data_ptr()
        self.left = tensor.numel() * tensor.element_size()
        self.begun = False

    def push(self) -> bool:
        """Writes what there is room for -> whether anything moved."""
        if not self.begun:
            if not self.ring.begin_write(self.left):
                return False
            self.begun = True
        count = self.ring.write(self.address, self.left)
        self.address += count
        self.left -= count
        return count > 0

    def pull(self) -> bool:
        """Reads what has arrived -> whether anything moved."""
        if not self.begun:
            announced = self.ring.begin_read()
            if announced is None:
                return False
            assert announced == self.left, f"rank {self.peer} sent {announced} bytes, expected {self.left}"
            self.begun = True
        count = self.ring.read(self.address, self.left)
        self.address += count
        self.left -= count
        return count > 0


class SharedPairs:
    """This rank's rings to and from the other ranks of its host. Used by one thread."""

    def __init__(self, descriptor: int, ranks: Sequence[int], rank: int, pids: Sequence[int], timeout: float):
        """descriptor: the host's segment; ranks and pids of the host; timeout: seconds without progress."""
        self.ranks = frozenset(ranks)
        size = ring_bytes(len(ranks))
        self._map = mmap.mmap(descriptor, segment_bytes(len(ranks)))
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        memory = memoryview(self._map)
        stride = COUNTER_BYTES + size
        me = ranks.index(rank)

        def ring(source: int, target: int) -> _Ring:
            start = (source * len(ranks) + target) * stride
            return _Ring(memory[start : start + stride], base + start, size)

        # a word of the ring from the first rank to itself, which nobody else uses
        self._left = memory[:COUNTER_BYTES].cast("q")
        self._to = {r: ring(me, i) for i, r in enumerate(ranks) if i != me}
        self._from = {r: ring(i, me) for i, r in enumerate(ranks) if i != me}
        self._lives = {r: os.pidfd_open(pid) for r, pid in zip(ranks, pids, strict=True) if r != rank}
        self._timeout = timeout

    def __del__(self) -> None:
        for descriptor in getattr(self, "_lives", {}).values():
            os.close(descriptor)

    def exchange(self, sent: Sequence[tuple[int, Tensor]], got: Sequence[tuple[int, Tensor]]) -> None:
        """Sends each tensor to its rank and fills each tensor of `got` from its rank.

        Raises RankLost when a rank that owes or is owed a message died or any has left, RuntimeError when nothing
        moves for `timeout`.
        """
        sends = [_Transfer(self._to[r], r, x) for r, x in sent]
        receives = [_Transfer(self._from[r], r, x) for r, x in got]
        idle = 0
        last = 0.0
        while True:
            moved = False
            for transfer in sends:
                while transfer.left and transfer.push():
                    moved = True
            for transfer in receives:
                while transfer.left and transfer.pull():
                    moved = True
            sends = [t for t in sends if t.left]
            receives = [t for t in receives if t.left]
            if not sends and not receives:
                return
            idle = 0 if moved else idle + 1
            if idle > POLLS_BEFORE_SLEEP:
                now = time.monotonic()
                if idle == POLLS_BEFORE_SLEEP + 1:
                    since = last = now
                if now - last > CHECK_SECONDS:
                    last = now
                    self._check([t.peer for t in sends + receives], now - since)
                time.sleep(SLEEP_SECONDS if now - since < IDLE_SECONDS else IDLE_SLEEP_SECONDS)

    def _check(self, peers: Sequence[int], waited: float) -> None:
        for peer in peers:
            life = self._lives[peer]
            if select.select([life], [], [], 0)[0]:
                raise RankLost(f"rank {peer} has died")
        self.check()
        if waited > self._timeout:
            raise RuntimeError(f"no message from or to rank {peers[0]} moved for {waited:.1f} s")

    def check(self) -> None:
        """Raises RankLost when a rank of this host has left."""
        if self._left[0]:
            raise RankLost("a rank of this host has left, as another died")

    def leave(self) -> None:
        """Makes the others' waits, for whatever rank, end with RankLost."""
        self._left[0] = 1
