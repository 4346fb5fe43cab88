"""Heaps of one process and of the processes of one host."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from moeserve.comm import shared
from moeserve.comm.group import Group
from moeserve.comm.layout import ParallelLayout
from moeserve.comm.mesh import Mesh
from moeserve.comm.spawn import RankError, RankPool
from moeserve.comm.symm import HeapUnavailable, SymmHeap, local_heaps, shm

GetPool = Callable[[int], RankPool]
on_x86 = pytest.mark.skipif(not shared.supported, reason="shared memory needs x86 and Linux")
ALONE = Group(0, [0], None, {})


def test_virtual_ranks_share_their_blocks() -> None:
    heaps = local_heaps(3, 1000)
    for heap in heaps:
        assert (heap.world, heap.nbytes, heap.backend) == (3, 1000, "local")
        assert all(not bool(heap.block(rank).any()) for rank in range(3))
        assert all(address % 128 == 0 for address in heap.addresses.tolist())
    heaps[0].view(2, 8, (3, 2), torch.int64).copy_(torch.arange(6).view(3, 2))
    assert heaps[2].view(2, 8, (6,), torch.int64).tolist() == list(range(6))
    assert heaps[1].block(2)[8 + 8] == 1 and not bool(heaps[1].block(1).any())
    assert heaps[1].addresses[2] == heaps[0].block(2).data_ptr()


def test_a_view_stays_inside_its_block() -> None:
    heap = local_heaps(2, 64)[0]
    with pytest.raises(AssertionError, match="60 \\+ 8 in 64 bytes"):
        heap.view(0, 60, (2,), torch.int32)
    with pytest.raises(AssertionError, match="offset 2 for"):
        heap.view(0, 2, (1,), torch.int32)


@pytest.mark.parametrize("backend", ["local", pytest.param("shm", marks=on_x86)])
def test_a_group_of_one(backend: str) -> None:
    heap = SymmHeap.create(backend, 0, 1, 100, ALONE)
    heap.view(0, 0, (100,), torch.uint8).fill_(7)
    assert int(heap.block(0).sum()) == 700 and heap.is_alive(0)
    view = heap.block(0)
    heap.close()
    heap.close()
    assert int(view.sum()) == 700  # CPU memory lives as long as what was made from it


def test_wrong_arguments_are_named() -> None:
    for arguments, message in (
        (("stone", 0, 1, 8, ALONE), "backend = 'stone': must be one of local, shm, torch, fabric"),
        (("local", 0, 1, 0, ALONE), "nbytes = 0: must be at least 1"),
        (("local", 1, 2, 8, ALONE), "rank, world = 1, 2: control has 0, 1"),
    ):
        with pytest.raises(ValueError, match=message):
            SymmHeap.create(*arguments)
    with pytest.raises(ValueError, match="device = cuda: backend 'shm' is CPU memory"):
        SymmHeap.create("shm", 0, 1, 8, ALONE, "cuda")


class Faked:
    """Stands for a group of which this process is rank 0; changes what the other rank is seen to have said."""

    rank, size, ranks = 0, 2, (0, 1)

    def __init__(self, change: Callable[[int, Sequence[int]], Sequence[int]]) -> None:
        self._change = change
        self._calls = 0

    def all_gather_ints(self, values: Sequence[int]) -> list[list[int]]:
        self._calls += 1
        return [list(values), list(self._change(self._calls - 1, values))]


def test_the_virtual_ranks_of_several_processes_are_refused() -> None:
    with pytest.raises(ValueError, match="backend = 'local': is for one process, not 2"):
        SymmHeap.create("local", 0, 2, 8, Faked(lambda call, values: values))


def test_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"nbytes = 8: must be the same on every rank, got \[8, 9\]"):
        SymmHeap.create("shm", 0, 2, 8, Faked(lambda call, values: [9] if call == 0 else values))


@on_x86
def test_ranks_of_two_hosts_are_refused() -> None:
    other = Faked(lambda call, values: [values[0] + 1, values[1]] if call == 1 else values)
    with pytest.raises(HeapUnavailable, match="ranks 0 and 1 are on different hosts or in containers"):
        SymmHeap.create("shm", 0, 2, 8, other)


@on_x86
def test_a_rank_without_memory_stops_all() -> None:
    short = Faked(lambda call, values: [1] if call == 2 else values)
    with pytest.raises(HeapUnavailable, match="rank 1 has no memory to share"):
        SymmHeap.create("shm", 0, 2, 8, short)


@on_x86
def test_memory_that_may_not_be_opened_is_named() -> None:
    hidden = Faked(lambda call, values: [999_999] if call == 3 else values)
    with pytest.raises(HeapUnavailable, match="cannot open the shared memory of rank 1: .*No such file"):
        SymmHeap.create("shm", 0, 2, 8, hidden)


@on_x86
def test_a_sandbox_that_forbids_a_call_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    before = len(os.listdir("/proc/self/fd"))
    for call, message in (
        ("pidfd_open", "cannot watch the processes"),
        ("memfd_create", "cannot make 0.0 MiB"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, forbidden)
            with pytest.raises(HeapUnavailable, match=f"{message}.*Operation not permitted"):
                SymmHeap.create("shm", 0, 1, 8, ALONE)
    monkeypatch.setattr(shared, "host_identity", forbidden)
    with pytest.raises(HeapUnavailable, match="and a /proc to read"):
        SymmHeap.create("shm", 0, 1, 8, ALONE)
    assert len(os.listdir("/proc/self/fd")) == before


@on_x86
def test_too_little_memory_names_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        shm, "free_memory", lambda: (100 << 20, "the memory limit of 256.0 MiB of the container leaves")
    )
    SymmHeap.create("shm", 0, 1, 30 << 20, ALONE).close()
    message = (
        "1 ranks need 60.0 MiB of shared memory together, the memory limit of 256.0 MiB .* leaves 100.0 MiB"
    )
    with pytest.raises(HeapUnavailable, match=message):
        SymmHeap.create("shm", 0, 1, 60 << 20, ALONE)


def test_the_container_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free, limit = shm.free_memory()
    assert free > 0 and limit.startswith(("this host", "the memory limit"))
    (tmp_path / "memory.max").write_text("50000000\n")
    (tmp_path / "memory.current").write_text("20000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 4000000\n")
    unlimited = tmp_path / "above"
    unlimited.mkdir()
    (unlimited / "memory.max").write_text("max\n")
    groups = [(folder, "memory.max", "memory.current") for folder in (unlimited, tmp_path, tmp_path / "gone")]
    monkeypatch.setattr(shm, "_memory_groups", lambda: groups)
    assert shm.free_memory() == (34_000_000, "the memory limit of 47.7 MiB of the container leaves")
    for text in ("MemFree: 5 kB\n", "MemAvailable:\n", ""):  # sandboxes that say less
        (tmp_path / "meminfo").write_text(text)
        monkeypatch.setattr(shm, "MEMORY_FILE", tmp_path / "meminfo")
        assert shm.free_memory()[0] == 34_000_000


def use_heap(rank: int, size: int) -> tuple[list[str], list[str]]:
    """Each rank writes a word of every block; all see all. Two heaps at once keep apart."""
    before = sorted(os.listdir("/dev/shm"))
    group = Mesh(ParallelLayout(dp=size), rank).ep
    heap, other = (SymmHeap.create("shm", rank, size, 4096 * 3 + 5, group) for _ in range(2))
    assert not bool(heap.block(rank).any()), "blocks start zeroed"
    group.barrier()
    for peer in range(size):
        heap.view(peer, 8 * rank, (1,), torch.int64).fill_(100 * rank + peer)
    group.barrier()
    for owner in range(size):
        got = heap.view(owner, 0, (size,), torch.int64).tolist()
        assert got == [100 * source + owner for source in range(size)]
        assert not bool(other.block(owner).any()) and heap.is_alive(owner)
    group.barrier()
    listed = sorted(os.listdir("/dev/shm"))
    heap.close()
    other.close()
    return before, listed


@on_x86
@pytest.mark.multi_rank
@pytest.mark.parametrize("size", [2, 4])
def test_processes_share_their_blocks(rank_pool: GetPool, size: int) -> None:
    for before, after in rank_pool(size).run(use_heap, size):
        assert before == after, "memory without a name leaves nothing behind"


def outlive(rank: int) -> None:
    """Rank 1 is killed; rank 0 still reads and writes its block, and knows."""
    group = Mesh(ParallelLayout(dp=2), rank).ep
    heap = SymmHeap.create("shm", rank, 2, 4096, group)
    heap.view(1, 8 * rank, (1,), torch.int64).fill_(rank + 5)
    group.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    deadline = time.monotonic() + 20
    while heap.is_alive(1):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    block = heap.view(1, 0, (4,), torch.int64)
    block[3] = 9
    if block.tolist() == [5, 6, 0, 9] and heap.is_alive(0):
        raise RuntimeError("as expected")


@on_x86
@pytest.mark.multi_rank
def test_memory_outlives_its_owner() -> None:
    with RankPool(2) as pool, pytest.raises(RankError) as failure:
        pool.run(outlive)
    assert "died of SIGKILL" in str(failure.value) and failure.value.rank == 1
    assert "also failed: rank 0" in str(failure.value)  # it only raises when all was as it should be


kept: list[SymmHeap] = []  # by a rank, until it is killed


def keep_heap(rank: int) -> list[str]:
    """Files, as /proc knows them, behind a heap that is in use."""
    heap = SymmHeap.create("shm", rank, 2, 1 << 20, Mesh(ParallelLayout(dp=2), rank).ep)
    heap.block(0).fill_(1)
    kept.append(heap)
    return sorted(line.split()[4] for line in mappings(os.getpid()))


def mappings(pid: int) -> list[str]:
    """Lines of a process's memory map that are of heaps; [4] is the file's number."""
    try:
        return [
            line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "moeserve-heap" in line
        ]
    except OSError:  # it is gone
        return []


@on_x86
@pytest.mark.multi_rank
def test_ranks_that_are_killed_leave_nothing() -> None:
    with RankPool(2) as pool:
        files = pool.run(keep_heap)
        assert files[0] == files[1] and len(files[0]) == 2
    # the pool killed them: nobody maps those files any more, so the kernel has freed them
    everyone = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    still = {line.split()[4] for pid in everyone for line in mappings(pid)}
    assert still.isdisjoint(files[0])


TINY_DEV_SHM = """
import os, sys
import torch
from moeserve.comm.group import Group
from moeserve.comm.symm import SymmHeap
heap = SymmHeap.create("shm", 0, 1, 8 << 20, Group(0, [0], None, {}))
heap.block(0).fill_(1)
print(int(heap.block(0).sum()) >> 20, os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize >> 20)
"""


@on_x86
@pytest.mark.slow
def test_a_small_dev_shm_does_not_matter() -> None:
    """Containers come with 64 MiB of /dev/shm or less; here it is 1 MiB."""
    shrink = 'mount -t tmpfs -o size=1m none /dev/shm && exec "$0" -c "$1"'
    program = ["unshare", "-Urm", "sh", "-c", shrink, sys.executable, TINY_DEV_SHM]
    run = subprocess.run(program, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    if "unshare" in run.stderr or "mount" in run.stderr:
        pytest.skip(f"no namespaces here: {run.stderr.strip()[-200:]}")
    assert run.stdout == "8 1\n", run.stderr
