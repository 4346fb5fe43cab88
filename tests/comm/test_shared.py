"""Rings in shared memory: two ranks played by two threads of this process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from moeserve.comm import shared
from moeserve.comm.shared import SharedPairs, create_segment, ring_bytes, segment_bytes

pytestmark = pytest.mark.skipif(not shared.supported, reason="shared memory needs x86 and Linux")
MakePairs = Callable[..., tuple[SharedPairs, SharedPairs]]


@pytest.fixture
def make_pairs() -> Iterator[MakePairs]:
    """Both ends; other_pid stands for the process of rank 1."""
    segment = create_segment(2)

    def make(timeout: float = 20, other_pid: int | None = None) -> tuple[SharedPairs, SharedPairs]:
        pids = [os.getpid(), other_pid or os.getpid()]
        return SharedPairs(segment, [0, 1], 0, pids, timeout), SharedPairs(segment, [0, 1], 1, pids, timeout)

    yield make
    os.close(segment)


def test_messages_of_all_lengths_arrive_in_order(make_pairs: MakePairs) -> None:
    ring = ring_bytes(2)
    lengths = [1, 7, 8, 9, ring - 8, ring - 7, ring, ring + 1, 3 * ring + 5, 2, 4096]
    lengths += np.random.default_rng(0).integers(1, 3000, 2000).tolist()
    messages = [torch.randint(0, 255, (n,), dtype=torch.uint8) for n in lengths]

    def play(end: SharedPairs, peer: int, salt: int) -> list[Tensor]:
        results = []
        for message in messages:
            got = torch.empty_like(message)
            end.exchange([(peer, message ^ salt)], [(peer, got)])
            results.append(got)
        return results

    a, b = make_pairs()
    with ThreadPoolExecutor() as threads:
        at_a, at_b = threads.submit(play, a, 1, 3), threads.submit(play, b, 0, 5)
        assert all(torch.equal(got, m ^ 5) for got, m in zip(at_a.result(), messages, strict=True))
        assert all(torch.equal(got, m ^ 3) for got, m in zip(at_b.result(), messages, strict=True))


def test_another_pid_namespace_is_another_host() -> None:
    show = [sys.executable, "-c", "from moeserve.comm.shared import host_identity; print(host_identity())"]
    inside = subprocess.run(["unshare", "-Urpf", *show], capture_output=True, text=True)
    if inside.returncode:
        pytest.skip(f"no namespaces here: {inside.stderr.strip()[-200:]}")
    assert int(inside.stdout) != shared.host_identity()


def test_short_messages_wait_in_the_ring(make_pairs: MakePairs) -> None:
    a, b = make_pairs()
    for i in range(100):
        a.exchange([(1, torch.tensor([i]))], [])
    for i in range(100):
        got = torch.empty(1, dtype=torch.int64)
        b.exchange([], [(0, got)])
        assert int(got) == i


def test_other_length_than_expected(make_pairs: MakePairs) -> None:
    a, b = make_pairs()
    a.exchange([(1, torch.zeros(3))], [])
    with pytest.raises(AssertionError, match="rank 0 sent 12 bytes, expected 16"):
        b.exchange([], [(0, torch.empty(4))])


def test_silent_rank(make_pairs: MakePairs) -> None:
    a, _ = make_pairs(timeout=0.3)
    start = time.thread_time()
    with pytest.raises(RuntimeError, match="no message from or to rank 1 moved for 0"):
        a.exchange([], [(1, torch.empty(4))])
    assert time.thread_time() - start < 0.02, "an idle rank must leave the cores to others"


def test_dead_rank(make_pairs: MakePairs) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        a, b = make_pairs(timeout=20, other_pid=other.pid)
        b.exchange([(0, torch.ones(1))], [])
        assert other.stdin is not None
        other.stdin.close()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        got = torch.zeros(1)
        a.exchange([], [(1, got)])  # what it sent before its death still arrives
        assert int(got) == 1
        with pytest.raises(RuntimeError, match="rank 1 has died"):
            a.exchange([], [(1, torch.empty(1))])


@pytest.mark.parametrize("num_ranks", [2, 4, 8, 64])
def test_segment_stays_small(num_ranks: int) -> None:
    assert segment_bytes(num_ranks) < 100 << 20
    assert ring_bytes(num_ranks) >= 4096 and ring_bytes(num_ranks) % 4096 == 0
