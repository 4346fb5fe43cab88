"""GPU memory of all ranks in every rank's addresses: fabric handles in an NVLink domain, else files of one host.

Which of the two is decided by all ranks together, from what each can be seen to do: the attribute of the device,
the clique that the fabric manager put it in, and a trial allocation, which fails where a container has no channel
to the fabric. That an import works says nothing about a domain: on MNNVL machines imports work between hosts.

Memory is made of physical allocations mapped into reserved addresses, so it lives as long as someone has it mapped:
the death of its maker does not take it from a kernel that still reads. Never run on more than a fake driver so far.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moeserve.comm.symm.descriptors import exchange_descriptors
from moeserve.comm.symm.heap import Blocks, Control, HeapUnavailable, agree
from moeserve.comm.symm.lives import Lives, host_number

HANDLE_BYTES = 64
"""Of a fabric handle."""


class DriverError(Exception):
    """A call of the GPU driver failed; says which and why."""


@dataclass(frozen=True)
class Clique:
    """The NVLink domain of a device: GPUs of one cluster and one clique reach one another's memory."""

    cluster: int  # 128 bits
    number: int


class Driver(Protocol):
    """The few calls of the GPU driver that this needs, on one device. All but `clique` raise DriverError.

    fabric: whether a handle is for the fabric (64 bytes) or a file descriptor (int).
    """

    def can_export(self, fabric: bool) -> bool:
        """The device's own word."""
        ...

    def clique(self) -> Clique | None:
        """None where the device is in none, is not there yet, or none can be asked."""
        ...

    def granularity(self, fabric: bool) -> int:
        """Allocations are multiples of it."""
        ...

    def create(self, nbytes: int, fabric: bool) -> int: ...

    def export(self, handle: int, fabric: bool) -> bytes | int: ...

    def import_handle(self, exported: bytes | int, fabric: bool) -> int: ...

    def reserve(self, nbytes: int) -> int:
        """Addresses that nothing is behind yet."""
        ...

    def map(self, address: int, nbytes: int, handle: int) -> None:
        """Puts an allocation behind reserved addresses, to read and write."""
        ...

    def release(self, handle: int) -> None:
        """Gives a handle up; the memory stays while it is mapped."""
        ...

    def unmap(self, address: int, nbytes: int) -> None: ...

    def free(self, address: int, nbytes: int) -> None:
        """Gives reserved addresses back."""
        ...

    def tensor(self, address: int, nbytes: int) -> Tensor:
        """uint8 [nbytes] at mapped addresses."""
        ...


def allocate(nbytes: int, control: Control, make_driver: Callable[[], Driver]) -> Blocks:
    """One block of at least nbytes of each rank of control.

    Raises HeapUnavailable, on all ranks, with what stands in the way on this rank or the number of one where it is.
    """
    driver, problem = _start(make_driver)
    agree(control, problem)
    assert driver is not None
    fabric, pids = choose_handles(driver, control)
    memory = _Memory(driver, nbytes, fabric, control)
    try:
        agree(control, memory.attempt(memory.create))
        memory.exchange(pids)
        agree(control, memory.attempt(memory.map_peers))
        memory.drop_handles()
    except BaseException:
        memory.close()
        raise
    try:
        lives = Lives(pids) if pids else None
    except OSError:  # a sandbox that forbids it: nobody can tell then
        lives = None
    if lives is None:
        return Blocks(memory.blocks, close=memory.close)

    def close() -> None:
        memory.close()
        lives.close()

    return Blocks(memory.blocks, lives.is_alive, close)


def choose_handles(driver: Driver, control: Control) -> tuple[bool, list[int]]:
    """The handles that work between all ranks -> (fabric?, pids of the ranks; empty where not all are on this host).

    Every rank calls it and all get the same answer. Raises HeapUnavailable where neither kind does.
    """
    clique, why_no_fabric = driver.clique(), probe(driver, fabric=True)
    why_no_files = probe(driver, fabric=False)
    words = [-1] * 5
    if clique is not None:
        words = [clique.cluster >> shift & 0xFFFFFFFF for shift in range(0, 128, 32)] + [clique.number]
    host = host_number()
    host = -1 - control.rank if host is None else host
    row = [host, os.getpid(), not why_no_fabric, not why_no_files, *words]
    table = control.all_gather_ints(row)
    one_host = all(other[0] == host for other in table)
    pids = [other[1] for other in table] if one_host else []
    one_clique = clique is not None and all(other[4:] == words for other in table)
    if one_clique and all(other[2] for other in table):
        return True, pids
    if one_host and all(other[3] for other in table):
        return False, pids
    if one_host:
        lacking = [rank for rank, other in enumerate(table) if not other[3]]
        why = f"rank {lacking[0]} cannot hand over GPU memory as a file"
        if why_no_files:
            why += f" ({why_no_files})"
    elif lacking := [rank for rank, other in enumerate(table) if not other[2]]:
        why = f"rank {lacking[0]} has no fabric handles"
        if why_no_fabric:
            why += f" ({why_no_fabric})"
    elif outside := [rank for rank, other in enumerate(table) if other[4] < 0]:
        why = f"the GPU of rank {outside[0]} is in no NVLink clique: is the fabric manager done with it?"
    else:
        cliques = {tuple(other[4:]) for other in table}
        why = f"the ranks' GPUs are in {len(cliques)} NVLink cliques: only those of one reach one another"
    raise HeapUnavailable(f"GPU memory cannot be shared by all ranks: {why}")


def probe(driver: Driver, fabric: bool) -> str:
    """What stands in the way of this kind of handle on this rank; "" if one can really be made."""
    try:
        if not driver.can_export(fabric):
            return "the device does not offer it"
        handle = driver.create(driver.granularity(fabric), fabric)
        try:
            exported = driver.export(handle, fabric)
        finally:
            driver.release(handle)
        if isinstance(exported, int):
            os.close(exported)
    except DriverError as error:
        hint = ": are IMEX and its channel device there?" if fabric else ""
        return f"a trial allocation failed, {error}{hint}"
    return ""


def _start(make_driver: Callable[[], Driver]) -> tuple[Driver | None, str]:
    try:
        return make_driver(), ""
    except DriverError as error:
        return None, f"no GPU memory to share: {error}"


class _Memory:
    """The blocks while they come into being, and what must be undone in the end."""

    def __init__(self, driver: Driver, nbytes: int, fabric: bool, control: Control) -> None:
        self.blocks: list[Tensor] = []
        self._driver = driver
        self._fabric = fabric
        self._control = control
        unit = max(row[0] for row in control.all_gather_ints([driver.granularity(fabric)]))
        self._stride = -(-nbytes // unit) * unit
        self._base = 0
        self._own = 0
        self._exported: bytes | int = -1
        self._handles: list[bytes | int] = []
        self._mapped: list[int] = []

    def attempt(self, step: Callable[[], None]) -> str:
        """Runs a step -> what went wrong, "" if nothing."""
        try:
            step()
        except (DriverError, OSError) as error:
            return f"GPU memory cannot be shared by all ranks: {error}"
        return ""

    def create(self) -> None:
        """Our own block, zeroed before anyone else can have it."""
        self._base = self._driver.reserve(self._stride * self._control.size)
        self._own = self._driver.create(self._stride, self._fabric)
        self._exported = self._driver.export(self._own, self._fabric)
        own = self._map(self._control.rank, self._own)
        own.zero_()
        if own.is_cuda:
            torch.cuda.synchronize(own.device)

    def exchange(self, pids: Sequence[int]) -> None:
        """The handles of all ranks. A rank that fails here leaves the others to time out."""
        if isinstance(self._exported, bytes):
            ints = [int.from_bytes(self._exported[i : i + 4], "little") for i in range(0, HANDLE_BYTES, 4)]
            rows = self._control.all_gather_ints(ints)
            self._handles = [b"".join(word.to_bytes(4, "little") for word in row) for row in rows]
            return
        problem = ""
        try:
            self._handles = list(exchange_descriptors(self._control, pids, self._exported))
        except OSError as error:
            problem = f"GPU memory cannot be handed over: {error}"
        agree(self._control, problem)

    def map_peers(self) -> None:
        blocks = []
        for rank, exported in enumerate(self._handles):
            if rank == self._control.rank:
                blocks.append(self._driver.tensor(self._base + rank * self._stride, self._stride))
                continue
            handle = self._driver.import_handle(exported, self._fabric)
            try:
                blocks.append(self._map(rank, handle))
            finally:
                self._driver.release(handle)
        self.blocks = blocks

    def drop_handles(self) -> None:
        """They are needed until all ranks have mapped all; the memory then lives by its mappings."""
        if self._own:
            self._driver.release(self._own)
            self._own = 0
        for exported in [*self._handles, self._exported]:
            if isinstance(exported, int) and exported >= 0:
                os.close(exported)
        self._handles, self._exported = [], -1

    def close(self) -> None:
        """No kernel may touch the blocks any more."""
        self.blocks = []
        self.drop_handles()
        for address in self._mapped:
            self._driver.unmap(address, self._stride)
        self._mapped = []
        if self._base:
            self._driver.free(self._base, self._stride * self._control.size)
            self._base = 0

    def _map(self, rank: int, handle: int) -> Tensor:
        address = self._base + rank * self._stride
        self._driver.map(address, self._stride, handle)
        self._mapped.append(address)
        return self._driver.tensor(address, self._stride)
