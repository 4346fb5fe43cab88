"""The agreement on handles and the whole exchange, over a driver whose GPU memory is files of this host's memory.

The CUDA driver itself has not been run: what is marked gpu waits for a machine with one.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from moeserve.comm import shared
from moeserve.comm.group import Group
from moeserve.comm.layout import ParallelLayout
from moeserve.comm.mesh import Mesh
from moeserve.comm.spawn import RankError, RankPool
from moeserve.comm.symm import HeapUnavailable, SymmHeap, descriptors, local_heaps
from moeserve.comm.symm.cuda_driver import CudaDriver, _FabricInfo, nvml_clique
from moeserve.comm.symm.fabric import Clique, DriverError, allocate, choose_handles, probe

GetPool = Callable[[int], RankPool]
on_linux = pytest.mark.skipif(not shared.supported, reason="needs x86 and Linux, as shared memory does")
UNIT = mmap.PAGESIZE


class FakeDriver:
    """A driver whose allocations are anonymous files, addresses are a reserved range, and faults can be set.

    A fabric handle is 64 bytes that say which process holds the file under which number.
    """

    def __init__(
        self,
        clique: Clique | None = None,
        offers: Sequence[bool] = (True, True),
        broken: Sequence[str] = (),
        unit: int = UNIT,
    ) -> None:
        self._clique = clique
        self._offers = offers  # files, fabric
        self._broken = broken
        self._unit = unit
        self._maps: dict[int, mmap.mmap] = {}
        self._reserved: dict[int, int] = {}
        self.open: set[int] = set()

    def can_export(self, fabric: bool) -> bool:
        return self._offers[fabric]

    def clique(self) -> Clique | None:
        return self._clique

    def granularity(self, fabric: bool) -> int:
        return self._unit

    def create(self, nbytes: int, fabric: bool) -> int:
        self._fail_if("create fabric" if fabric else "create")
        assert nbytes % self._unit == 0
        handle = os.memfd_create("fake")
        os.ftruncate(handle, nbytes)
        os.pwrite(handle, b"\xff" * nbytes, 0)  # GPU memory comes with whatever was in it
        return self._opened(handle)

    def export(self, handle: int, fabric: bool) -> bytes | int:
        if fabric:
            return struct.pack("<2q", os.getpid(), handle).ljust(64, b"\x07")
        return os.dup(handle)

    def import_handle(self, exported: bytes | int, fabric: bool) -> int:
        self._fail_if("import")
        if not fabric:
            assert isinstance(exported, int)
            return self._opened(os.dup(exported))
        assert isinstance(exported, bytes) and len(exported) == 64 and exported[-1] == 7
        pid, handle = struct.unpack("<2q", exported[:16])
        return self._opened(os.open(f"/proc/{pid}/fd/{handle}", os.O_RDWR))

    def reserve(self, nbytes: int) -> int:
        address = 1 << 40
        self._reserved[address] = nbytes
        return address

    def map(self, address: int, nbytes: int, handle: int) -> None:
        self._fail_if("map")
        assert any(a <= address and address + nbytes <= a + n for a, n in self._reserved.items())
        self._maps[address] = mmap.mmap(handle, nbytes)

    def release(self, handle: int) -> None:
        self.open.remove(handle)
        os.close(handle)

    def unmap(self, address: int, nbytes: int) -> None:
        assert len(self._maps.pop(address)) == nbytes

    def free(self, address: int, nbytes: int) -> None:
        assert not self._maps and self._reserved.pop(address) == nbytes

    def tensor(self, address: int, nbytes: int) -> Tensor:
        return torch.frombuffer(self._maps[address], dtype=torch.uint8)

    def left(self) -> tuple[int, int, int]:
        """Handles, mappings and address ranges that were not given back."""
        return len(self.open), len(self._maps), len(self._reserved)

    def _opened(self, handle: int) -> int:
        self.open.add(handle)
        return handle

    def _fail_if(self, call: str) -> None:
        if call in self._broken:
            raise DriverError(f"{call}: CUDA_ERROR_NOT_PERMITTED")


class Threads:
    """The ranks of a group, played by threads that meet in all_gather_ints."""

    def __init__(self, size: int, change: Callable[[int, list[int]], list[int]] | None = None) -> None:
        self.size = size
        self._change = change
        self._rows: list[list[int]] = [[]] * size
        self._barrier = threading.Barrier(size, timeout=20)

    def run(self, function: Callable[[Any], Any]) -> list[Any]:
        """function(control) of every rank at once -> result or exception of each."""

        def play(rank: int) -> Any:
            try:
                return function(_Rank(self, rank))
            except Exception as error:
                return error

        with ThreadPoolExecutor(self.size) as threads:
            return list(threads.map(play, range(self.size)))

    def gather(self, rank: int, values: Sequence[int]) -> list[list[int]]:
        row = list(values)
        self._rows[rank] = self._change(rank, row) if self._change else row
        self._barrier.wait()
        rows = [list(other) for other in self._rows]
        self._barrier.wait()
        return rows


class _Rank:
    def __init__(self, threads: Threads, rank: int) -> None:
        self._threads = threads
        self.rank, self.size, self.ranks = rank, threads.size, tuple(range(threads.size))

    def all_gather_ints(self, values: Sequence[int]) -> list[list[int]]:
        return self._threads.gather(self.rank, values)


HERE, THERE = Clique(5 << 100 | 3, 7), Clique(5 << 100 | 3, 8)


def choose(drivers: Sequence[FakeDriver], hosts: Sequence[int] | None = None) -> list[Any]:
    """What each rank gets from choose_handles; hosts: number of each rank's host, all on one if left out."""

    def place(rank: int, row: list[int]) -> list[int]:
        return row if hosts is None else [hosts[rank], *row[1:]]

    def decide(control: Any) -> bool:
        return choose_handles(drivers[control.rank], control)[0]

    return Threads(len(drivers), place).run(decide)


def test_fabric_where_all_ranks_have_it_in_one_clique() -> None:
    assert choose([FakeDriver(HERE)] * 3) == [True] * 3
    assert choose([FakeDriver(HERE)] * 3, hosts=[1, 1, 2]) == [True] * 3


@pytest.mark.parametrize(
    "odd",
    [
        FakeDriver(THERE),
        FakeDriver(Clique(1, 7)),
        FakeDriver(None),
        FakeDriver(HERE, offers=(True, False)),
        FakeDriver(HERE, broken=["create fabric"]),
    ],
)
def test_one_rank_without_the_fabric_moves_all_to_files(odd: FakeDriver) -> None:
    assert choose([FakeDriver(HERE), odd, FakeDriver(HERE)]) == [False] * 3


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (FakeDriver(THERE), "in 2 NVLink cliques"),
        (FakeDriver(None), "the GPU of rank 1 is in no NVLink clique"),
        (FakeDriver(HERE, broken=["create fabric"]), "rank 1 has no fabric handles"),
        (FakeDriver(HERE, offers=(True, False)), "rank 1 has no fabric handles"),
    ],
)
def test_between_hosts_only_one_clique_will_do(odd: FakeDriver, message: str) -> None:
    """Imports between hosts may well work; that is not asked."""
    results = choose([FakeDriver(HERE), odd], hosts=[1, 2])
    assert all(isinstance(r, HeapUnavailable) and message in str(r) for r in results), results
    own = str(results[1])
    assert "NVLink clique" in own or "trial allocation failed" in own or "does not offer it" in own


def test_no_kind_at_all_is_said_with_the_reason() -> None:
    results = choose([FakeDriver(), FakeDriver(broken=["create"])])
    assert all("rank 1 cannot hand over GPU memory as a file" in str(r) for r in results), results
    assert "create: CUDA_ERROR_NOT_PERMITTED" in str(results[1])


def test_a_probe_leaves_nothing() -> None:
    for fabric in (True, False):
        driver = FakeDriver(HERE)
        assert probe(driver, fabric) == "" and driver.left() == (0, 0, 0)
    assert "IMEX" in probe(FakeDriver(HERE, broken=["create fabric"]), fabric=True)


def make_heap(driver: FakeDriver, nbytes: int, control: Any) -> SymmHeap:
    return SymmHeap("fabric", control.rank, nbytes, allocate(nbytes, control, lambda: driver))


def test_failures_on_one_rank_reach_all_and_leave_nothing() -> None:
    for call in ("create", "import", "map"):
        drivers = [FakeDriver(), FakeDriver(broken=[call])]
        results = Threads(2).run(lambda control: make_heap(drivers[control.rank], 100, control))  # noqa: B023
        assert all(isinstance(result, HeapUnavailable) for result in results), (call, results)
        assert "CUDA_ERROR_NOT_PERMITTED" in str(results[1])
        assert [driver.left() for driver in drivers] == [(0, 0, 0)] * 2, call


def test_a_rank_that_cannot_listen_stops_all(monkeypatch: pytest.MonkeyPatch) -> None:
    listen, calls = descriptors._listen, []

    def fail_once(listener: socket.socket, address: str, ranks: int) -> str:
        calls.append(address)
        return "cannot listen" if len(calls) == 1 else listen(listener, address, ranks)

    monkeypatch.setattr(descriptors, "_listen", fail_once)
    drivers = [FakeDriver(), FakeDriver()]

    def twice(control: Any) -> bool:
        with pytest.raises(HeapUnavailable, match=r"cannot listen|rank \d has no memory to share"):
            make_heap(drivers[control.rank], 100, control)
        make_heap(drivers[control.rank], 100, control).close()  # all ranks are still in step
        return True

    assert Threads(2).run(twice) == [True, True]
    assert [driver.left() for driver in drivers] == [(0, 0, 0)] * 2


def test_granularities_that_differ() -> None:
    """The stride suits the coarsest."""
    drivers = [FakeDriver(unit=UNIT), FakeDriver(unit=4 * UNIT)]

    def build(control: Any) -> list[int]:
        heap = make_heap(drivers[control.rank], 100, control)
        sizes = [len(m) for m in drivers[control.rank]._maps.values()]
        heap.close()
        return sizes

    assert Threads(2).run(build) == [[4 * UNIT] * 2] * 2


def no_gpu() -> FakeDriver:
    raise DriverError("torch finds no CUDA device")


def test_no_driver_on_one_rank() -> None:
    def build(control: Any) -> Any:
        return allocate(8, control, FakeDriver if control.rank else no_gpu)

    results = Threads(2).run(build)
    assert "torch finds no CUDA device" in str(results[0])
    assert all(isinstance(result, HeapUnavailable) for result in results)


def use_blocks(rank: int, size: int, fabric: bool) -> None:
    """Each rank writes into every block; all see all; all is given back."""
    group = Mesh(ParallelLayout(dp=size), rank).ep
    driver = FakeDriver(HERE if fabric else None)
    before = len(os.listdir("/proc/self/fd"))
    heap = make_heap(driver, 3 * UNIT - 5, group)
    assert not bool(heap.block(rank).any()), "blocks start zeroed"
    group.barrier()
    for peer in range(size):
        heap.view(peer, 8 * rank, (1,), torch.int64).fill_(100 * rank + peer)
    group.barrier()
    for owner in range(size):
        got = heap.view(owner, 0, (size,), torch.int64).tolist()
        assert got == [100 * source + owner for source in range(size)]
        assert heap.is_alive(owner)
    assert driver.left() == (0, size, 1), "mappings keep the memory, handles are not needed"
    group.barrier()
    heap.close()
    assert driver.left() == (0, 0, 0)
    assert len(os.listdir("/proc/self/fd")) == before


@on_linux
@pytest.mark.multi_rank
@pytest.mark.parametrize("fabric", [True, False])
def test_processes_exchange_handles(rank_pool: GetPool, fabric: bool) -> None:
    rank_pool(4).run(use_blocks, 4, fabric)


class FakeNvml:
    """libnvidia-ml of one device."""

    def __init__(
        self, state: int = 3, status: int = 0, cluster: bytes = b"\x01" * 16, missing: str = ""
    ) -> None:
        self._info = (state, status, cluster)
        self._missing = missing

    def __getattr__(self, name: str) -> Any:
        if name == self._missing:
            raise AttributeError(name)
        return lambda *arguments: 0

    def nvmlDeviceGetGpuFabricInfo(self, device: Any, reference: Any) -> int:
        if self._missing == "nvmlDeviceGetGpuFabricInfo":
            raise AttributeError(self._missing)
        info = ctypes.cast(reference, ctypes.POINTER(_FabricInfo)).contents
        info.state, info.status, cluster = self._info
        info.cluster[:] = list(cluster)
        info.clique = 9
        return 0


def test_nvml_says_the_clique() -> None:
    assert nvml_clique(b"0000:01:00.0", FakeNvml()) == Clique(int.from_bytes(b"\x01" * 16, "big"), 9)
    for none in (
        FakeNvml(state=2),
        FakeNvml(status=1),
        FakeNvml(cluster=bytes(16)),
        FakeNvml(missing="nvmlDeviceGetGpuFabricInfo"),
    ):
        assert nvml_clique(b"0000:01:00.0", none) is None


def test_without_a_gpu_both_backends_say_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    for backend in ("torch", "fabric"):
        with pytest.raises(HeapUnavailable, match="torch finds no"):
            SymmHeap.create(backend, 0, 1, 8, Group(0, [0], None, {}), "cuda")
        with pytest.raises(ValueError, match=f"device = cpu: backend '{backend}' is GPU memory"):
            SymmHeap.create(backend, 0, 1, 8, Group(0, [0], None, {}), "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fabric", [True, False])
def test_a_real_allocation(fabric: bool) -> None:
    driver = CudaDriver(torch.device("cuda", 0))
    why = probe(driver, fabric)
    if why:
        pytest.skip(f"no such handles here: {why}")
    blocks = allocate(1 << 20, Group(0, [0], None, {}), lambda: driver)
    assert not bool(blocks.blocks[0].any())
    blocks.blocks[0].fill_(3)
    assert int(blocks.blocks[0].sum()) == 3 * len(blocks.blocks[0])
    blocks.close()


def use_gpu_heap(rank: int, size: int, backend: str) -> None:
    """Several processes on one GPU: exchange, writes of all into all."""
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    group = Mesh(ParallelLayout(dp=size), rank).ep
    heap = SymmHeap.create(backend, rank, size, 1 << 20, group, torch.device("cuda", 0))
    for peer in range(size):
        heap.view(peer, 8 * rank, (1,), torch.int64).fill_(100 * rank + peer)
    torch.cuda.synchronize()
    group.barrier()
    for owner in range(size):
        got = heap.view(owner, 0, (size,), torch.int64).tolist()
        assert got == [100 * source + owner for source in range(size)]
    group.barrier()
    heap.close()


@pytest.mark.gpu
@pytest.mark.multi_rank
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["torch", "fabric"])
def test_processes_on_one_gpu(rank_pool: GetPool, backend: str) -> None:
    rank_pool(2).run(use_gpu_heap, 2, backend)


def read_after_death(rank: int) -> None:
    """Rank 1 is killed while rank 0 has its GPU memory mapped, and goes on reading and writing it."""
    group = Mesh(ParallelLayout(dp=2), rank).ep
    heap = SymmHeap.create("fabric", rank, 2, 1 << 20, group, torch.device("cuda", 0))
    heap.view(1, 8 * rank, (1,), torch.int64).fill_(rank + 5)
    torch.cuda.synchronize()
    group.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while heap.is_alive(1):
        time.sleep(0.01)
    block = heap.view(1, 0, (4,), torch.int64)
    block[3] = 9
    if block.tolist() == [5, 6, 0, 9]:
        raise RuntimeError("as expected")


@pytest.mark.gpu
@pytest.mark.multi_rank
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_memory_outlives_its_owner() -> None:
    with RankPool(2) as pool, pytest.raises(RankError) as failure:
        pool.run(read_after_death)
    assert "died of SIGKILL" in str(failure.value) and "also failed: rank 0" in str(failure.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_virtual_ranks_on_one_gpu() -> None:
    heaps = local_heaps(3, 1000, "cuda")
    assert heaps[0].addresses.is_cuda and not bool(heaps[0].block(2).any())
    heaps[0].view(2, 8, (2,), torch.int64).fill_(7)
    assert heaps[1].view(2, 8, (2,), torch.int64).tolist() == [7, 7]
    assert heaps[1].addresses[2] == heaps[0].block(2).data_ptr()
