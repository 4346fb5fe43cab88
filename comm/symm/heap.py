"""One block of bytes on every rank, mapped by all of them. Knows where blocks are, not what lies in them.

Memory order. On x86 the stores of a core become visible to the others in program order, and loads are not
reordered with loads: data written before a flag is there for whoever sees the flag, provided that flag and data
are plain stores and loads of aligned words and that the compiler keeps their order; between separate calls into
torch, numpy or ctypes it does. This holds for `local` and `shm`, which therefore refuse other processors. On
GPUs the kernels release and acquire at system scope.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

ALIGNMENT = 128
BACKENDS = ("local", "shm", "torch", "fabric")


class HeapUnavailable(RuntimeError):
    """This memory is not to be had here; says why. Raised on every rank of the group, so that all do without."""


class Control(Protocol):
    """What a heap's ranks agree through while it is made: a comm.group.Group, or anything like it."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def ranks(self) -> Sequence[int]:
        """Their numbers in the job."""
        ...

    def all_gather_ints(self, values: Sequence[int]) -> list[list[int]]:
        """A few numbers of each rank, as many on every one -> those of all, by rank."""
        ...


def agree(control: Control, problem: str) -> None:
    """Every rank says what its problem is, "" for none. Raises HeapUnavailable on all of them if one has any."""
    failed = [rank for rank, row in enumerate(control.all_gather_ints([bool(problem)])) if row[0]]
    if failed:
        raise HeapUnavailable(problem or f"rank {failed[0]} has no memory to share: its own message says why")


@dataclass(frozen=True)
class Blocks:
    """What a backend hands to SymmHeap.

    blocks: uint8 [at least nbytes] of each rank, 128 B aligned, zeroed before any rank has them.
    is_alive: see SymmHeap.is_alive. close: gives the memory back.
    """

    blocks: list[Tensor]
    is_alive: Callable[[int], bool] = field(default=lambda rank: True)
    close: Callable[[], None] = field(default=lambda: None)


class SymmHeap:
    """`nbytes` bytes of each of `world` ranks, zeroed at the start; every rank reads and writes all of them.

    rank: whose heap object this is. backend: "local", "shm", "torch" or "fabric". device: where the blocks are.
    addresses: int64 [world] on device: where each block begins as this process sees it. Other processes see the
    blocks at other addresses; offsets in a block are the same everywhere. Blocks never move nor grow.
    """

    def __init__(self, backend: str, rank: int, nbytes: int, memory: Blocks) -> None:
        self.backend = backend
        self.rank = rank
        self.world = len(memory.blocks)
        self.nbytes = nbytes
        self.device = memory.blocks[rank].device
        self.addresses = torch.tensor([b.data_ptr() for b in memory.blocks], device=self.device)
        self._blocks = [block[:nbytes] for block in memory.blocks]
        self._is_alive = memory.is_alive
        self._close = memory.close

    @staticmethod
    def create(
        backend: str, rank: int, world: int, nbytes: int, control: Control, device: torch.device | str = "cpu"
    ) -> SymmHeap:
        """Makes the block of this rank and maps the others'. Every rank of control calls it, with equal arguments.

        local: a group of one (several ranks in one process: local_heaps). shm: processes of one host, CPU.
        torch: torch.distributed's symmetric memory, GPUs it can join. fabric: GPU memory shared by fabric
        handles in one NVLink domain, by file descriptors inside one host.

        Raises ValueError for a wrong argument; HeapUnavailable, on all ranks, where the backend cannot work.
        """
        if backend not in BACKENDS:
            raise ValueError(f"backend = {backend!r}: must be one of {', '.join(BACKENDS)}")
        if nbytes < 1:
            raise ValueError(f"nbytes = {nbytes}: must be at least 1")
        if (rank, world) != (control.rank, control.size):
            raise ValueError(f"rank, world = {rank}, {world}: control has {control.rank}, {control.size}")
        kind = torch.device(device)
        sizes = [row[0] for row in control.all_gather_ints([nbytes])]
        if len(set(sizes)) > 1:
            raise ValueError(f"nbytes = {nbytes}: must be the same on every rank, got {sizes}")
        return SymmHeap(backend, rank, nbytes, _allocate(backend, nbytes, control, kind))

    def block(self, rank: int) -> Tensor:
        """uint8 [nbytes]: all memory of `rank`. Tensors made from it are good until close."""
        return self._blocks[rank]

    def view(self, rank: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor at byte `offset` of rank's block; offset is a multiple of dtype's size."""
        nbytes = dtype.itemsize
        for size in shape:
            nbytes *= size
        assert offset >= 0 and offset + nbytes <= self.nbytes, f"{offset} + {nbytes} in {self.nbytes} bytes"
        assert offset % dtype.itemsize == 0, f"offset {offset} for {dtype}"
        return self._blocks[rank][offset : offset + nbytes].view(dtype).view(tuple(shape))

    def is_alive(self, rank: int) -> bool:
        """False once the process that made rank's block has ended, where the backend can tell: shm. A system call.

        Its memory stays readable and writable all the same, as it was left.
        """
        return self._is_alive(rank)

    def close(self) -> None:
        """Gives the memory back. CPU memory lives on while tensors made from it do; GPU memory does not."""
        self._blocks = []
        close, self._close = self._close, lambda: None
        close()


def local_heaps(world: int, nbytes: int, device: torch.device | str = "cpu") -> list[SymmHeap]:
    """The heaps of `world` virtual ranks, all in this process: on the CPU, or on one GPU."""
    from moeserve.comm.symm import local

    if world < 1 or nbytes < 1:
        raise ValueError(f"world, nbytes = {world}, {nbytes}: must be at least 1")
    blocks = local.allocate(world, nbytes, torch.device(device))
    return [SymmHeap("local", rank, nbytes, Blocks(blocks)) for rank in range(world)]


def _allocate(backend: str, nbytes: int, control: Control, device: torch.device) -> Blocks:
    if backend == "local":
        from moeserve.comm.symm import local

        if control.size > 1:
            raise ValueError(
                f"backend = 'local': is for one process, not {control.size}; use local_heaps or shm"
            )
        return Blocks(local.allocate(1, nbytes, device))
    if backend == "shm":
        from moeserve.comm.symm import shm

        if device.type != "cpu":
            raise ValueError(f"device = {device}: backend 'shm' is CPU memory; use torch or fabric")
        return shm.allocate(nbytes, control)
    if device.type != "cuda":
        raise ValueError(f"device = {device}: backend {backend!r} is GPU memory; use shm")
    if backend == "torch":
        from moeserve.comm.symm import torch_symm

        return torch_symm.allocate(nbytes, control, device)
    from moeserve.comm.symm import fabric
    from moeserve.comm.symm.cuda_driver import CudaDriver

    return fabric.allocate(nbytes, control, lambda: CudaDriver(device))
