"""Blocks of the processes of one host: anonymous shared memory, opened by the others through its owner's /proc.

Nothing has a name, so nothing is left behind when the ranks end, SIGKILL included, a crash never stands in the
way of the next start, and two engines on a host never meet. The size of /dev/shm does not matter: memory of
memfd_create counts against the container's memory limit alone. Pages come into being as they are written.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from moeserve.comm import shared
from moeserve.comm.symm.heap import Blocks, Control, HeapUnavailable, agree
from moeserve.comm.symm.lives import Lives, host_number

MEMORY_FILE = Path("/proc/meminfo")
SPARE_BYTES = 64 << 20
"""What must stay free beside the blocks."""


def allocate(nbytes: int, control: Control) -> Blocks:
    """One block of nbytes of each rank of control, all on this host.

    Raises HeapUnavailable, on all ranks, where they are not of one host, where it has too little memory, or where
    a rank may not open another's memory (processes of different users, a /proc that hides them).
    """
    host = host_number() if shared.supported else None
    table = control.all_gather_ints([-1 if host is None else host, os.getpid()])
    _check_hosts([row[0] for row in table])
    pids = [row[1] for row in table]
    agree(control, _shortage(nbytes * control.size, control.size))
    own, problem = -1, ""
    try:
        own = _create(nbytes)
    except OSError as error:
        problem = f"cannot make {_size(nbytes)} of shared memory: {error}"
    try:
        descriptors = [row[0] for row in control.all_gather_ints([own])]
        opened = None
        if min(descriptors) >= 0:
            opened, problem = _open_all(pids, descriptors, nbytes)
        agree(control, problem)
    finally:
        if own >= 0:
            os.close(own)
    assert opened is not None
    blocks, lives = opened
    return Blocks(blocks, lives.is_alive, lives.close)


def _open_all(
    pids: list[int], descriptors: list[int], nbytes: int
) -> tuple[tuple[list[Tensor], Lives] | None, str]:
    """All ranks' blocks and lives -> (them, ""), or (None, what stood in the way)."""
    blocks: list[Tensor] = []
    try:
        for pid, descriptor in zip(pids, descriptors, strict=True):
            blocks.append(_map(pid, descriptor, nbytes))
    except OSError as error:
        return None, f"cannot open the shared memory of rank {len(blocks)}: {error}"
    try:
        return (blocks, Lives(pids)), ""
    except OSError as error:  # a sandbox or kernel without pidfd_open
        return None, f"cannot watch the processes of this host: {error}"


def free_memory() -> tuple[int, str]:
    """Bytes that this process may still use, and what limits them: the host, or the container's memory limit."""
    best = sys.maxsize, "this host has free"
    with contextlib.suppress(
        OSError, LookupError, ValueError
    ):  # a sandbox that does not say: no limit is known
        rows = (line.split() for line in MEMORY_FILE.read_text().splitlines())
        sizes = {row[0]: int(row[1]) * 1024 for row in rows}
        best = sizes["MemAvailable:"], best[1]
    for folder, limit_file, used_file in _memory_groups():
        with contextlib.suppress(OSError, LookupError, ValueError):  # "max": no limit
            limit = int((folder / limit_file).read_text())
            used = int((folder / used_file).read_text())
            rows = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cache = int(dict(rows)["inactive_file"])  # given up by the kernel when memory runs short
            best = min(
                best, (limit - used + cache, f"the memory limit of {_size(limit)} of the container leaves")
            )
    return best


def _memory_groups() -> list[tuple[Path, str, str]]:
    """This process's control group and those above it -> (folder, file of the limit, file of the use)."""
    found = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current")
            elif "memory" in controllers.split(","):
                root, names = (
                    Path("/sys/fs/cgroup/memory"),
                    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
                )
            else:
                continue
            folder = root / path.lstrip("/")
            found += [(up, *names) for up in (folder, *folder.parents) if up == root or root in up.parents]
    return found


def _check_hosts(hosts: list[int]) -> None:
    if -1 in hosts:
        raise HeapUnavailable(
            "shared memory between ranks needs Linux on x86-64 (others reorder stores) and a /proc to read"
        )
    for rank, host in enumerate(hosts):
        if host != hosts[0]:
            raise HeapUnavailable(
                f"ranks 0 and {rank} are on different hosts or in containers that do not see one another's "
                "processes: shared memory joins the ranks of one host"
            )


def _shortage(needed: int, world: int) -> str:
    free, limit = free_memory()
    if needed + SPARE_BYTES <= free:
        return ""
    return (
        f"{world} ranks need {_size(needed)} of shared memory together, {limit} {_size(free)}: "
        "fewer ranks or tokens a step (max_num_tokens) need less"
    )


def _create(nbytes: int) -> int:
    descriptor = os.memfd_create("moeserve-heap", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, nbytes)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _map(pid: int, descriptor: int, nbytes: int) -> Tensor:
    """The memory behind a descriptor of process pid (our own too); unmapped with the last tensor made from it."""
    opened = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
    try:
        memory = mmap.mmap(opened, nbytes)
    finally:
        os.close(opened)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _size(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):,.1f} MiB"
