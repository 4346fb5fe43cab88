"""A rank's groups, one for each axis of the layout, and the start and end of the job's process group."""

from __future__ import annotations

import fcntl
import ipaddress
import itertools
import logging
import os
import socket
import struct
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moeserve.comm.group import Group
from moeserve.comm.host import share_host
from moeserve.comm.layout import ParallelLayout
from moeserve.comm.shared import SharedPairs
from moeserve.comm.wire import GlooPairs, NcclWire, Pairs, PairWire, Wire

logger = logging.getLogger(__name__)

AXES = ("world", "stage", "pp", "dp", "cp", "tp", "ep", "etp")
BACKENDS = {"gloo": "cpu:gloo", "nccl": "cpu:gloo,cuda:nccl"}

_tags = itertools.count()  # of this process's meshes since it joined: the same number on every rank


@dataclass(frozen=True)
class Meeting:
    """number: no other meeting at the same store has it. timeout: seconds in which all come, or nobody starts."""

    number: int
    timeout: float


def start(
    rank: int,
    world_size: int,
    address: str,
    port: int,
    backend: str = "gloo",
    timeout: float = 60.0,
    *,
    meeting: Meeting | None = None,
) -> None:
    """Joins this process to the job; returns once all `world_size` processes did.

    address, port: where rank 0 listens (the same on all ranks). backend: "gloo" for CPU tensors alone,
    "nccl" for GPU tensors too (set the CUDA device first). timeout: seconds that the start, and later any one
    operation on the host network, waits for the others before it raises. meeting: the ranks come together at a store
    of keep_store instead, and wait there no longer than it says. GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME are set to
    the interface on the way to `address` where they are unset.

    Raises ValueError for an unknown backend or rank, RuntimeError when the others do not come in time.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend = {backend!r}: must be one of {', '.join(BACKENDS)}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank = {rank}: must be at least 0 and below world_size = {world_size}")
    global _tags
    _tags = itertools.count()
    if world_size == 1:
        return
    name = interface_to(address)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if name is not None and not os.environ.get(variable):
            os.environ[variable] = name
            level = logging.DEBUG if name == "lo" else logging.INFO
            logger.log(level, "%s set to %s, the interface on the way to %s", variable, name, address)
    where: dict[str, Any] = {"init_method": f"tcp://{address}:{port}"}
    if meeting is not None:
        where = {"store": _assemble(rank, world_size, address, port, meeting)}
    dist.init_process_group(
        BACKENDS[backend],
        **where,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )


def keep_store(address: str) -> Any:
    """A store at a free port of `address`, its attribute `port`, where ranks can meet; it lives as long as it is held.

    Kept by a process that is no rank, it outlives all of them.
    """
    return dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]


def _assemble(rank: int, world_size: int, address: str, port: int, meeting: Meeting) -> Any:
    """The store of one meeting, once all its ranks are there: then nobody waits for one that will never come."""
    waits = timedelta(seconds=meeting.timeout)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address, port, is_master=False, wait_for_workers=False, timeout=waits
    )
    own = dist.PrefixStore(f"meeting {meeting.number}", store)  # type: ignore[attr-defined]
    own.set(f"rank {rank}", "")
    deadline = time.monotonic() + meeting.timeout
    while not own.check([f"rank {other}" for other in range(world_size)]):
        if time.monotonic() > deadline:
            raise RuntimeError(f"not all {world_size} ranks came to meeting {meeting.number}")
        time.sleep(0.002)
    return own


def stop() -> None:
    """Leaves the job. Harmless when start did nothing or failed."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Mesh:
    """The groups that a rank belongs to: pp, dp, cp, tp, ep, etp, stage and world.

    Every rank makes the same meshes in the same order, after start. Groups of one need no process group; over
    NCCL, groups with the same ranks share one communicator. The groups of one mesh are used by one thread:
    another thread that talks to other ranks needs a mesh of its own.

    shared_memory: whether CPU tensors pass through shared memory in groups whose ranks are all on this host;
    where that is not to be had (Arm, containers that do not see one another) they go over gloo as all others.

    Raises ValueError when the layout does not have as many ranks as the job.
    """

    def __init__(self, layout: ParallelLayout, rank: int, *, shared_memory: bool = True) -> None:
        self._shared_memory = shared_memory
        self.join(layout, rank)

    def leave(self) -> None:
        """Ends the others' waits for this rank with RankLost: it found that one of them is gone. Then stop."""
        for pairs in self._pairs:
            pairs.leave()

    def join(self, layout: ParallelLayout, rank: int) -> None:
        """New groups in place of the old: after leave, stop, and start in a job of other ranks.

        Whoever keeps the mesh sees them; who keeps a group of several ranks must be given the new one.
        """
        joined = dist.get_world_size() if dist.is_initialized() else 1
        if layout.world_size != joined:
            raise ValueError(f"layout has {layout.world_size} ranks, the job has {joined}: {layout}")
        self.layout = layout
        self.rank = rank
        far = _gloo_pairs() if joined > 1 else None
        near = _shared_pairs(far, rank, joined) if far and self._shared_memory else None
        self._pairs: list[Pairs] = [pairs for pairs in (near, far) if pairs is not None]
        nccl = _nccl_groups(layout)

        def group(axis: str) -> Group:
            ranks = layout.group_ranks(axis, rank)
            me = ranks.index(rank)
            if far is None or len(ranks) == 1:
                return Group(me, ranks, None, {})
            wire = PairWire(near if near and near.ranks.issuperset(ranks) else far, ranks, me)
            wires: dict[str, Wire] = {"cpu": wire}
            if ranks in nccl:
                wires["cuda"] = NcclWire(nccl[ranks])
            return Group(me, ranks, wire, wires)

        self.world, self.stage, self.pp, self.dp, self.cp, self.tp, self.ep, self.etp = map(group, AXES)


def _gloo() -> Any:
    world = dist.group.WORLD
    assert world is not None
    return world._get_backend(torch.device("cpu"))


def _gloo_pairs() -> GlooPairs:
    return GlooPairs(_gloo(), next(_tags))


def _shared_pairs(far: GlooPairs, rank: int, size: int) -> SharedPairs | None:
    wire = PairWire(far, range(size), rank)
    timeout = _gloo().options._timeout.total_seconds()
    return share_host(Group(rank, range(size), wire, {"cpu": wire}), timeout)


def _nccl_groups(layout: ParallelLayout) -> dict[tuple[int, ...], dist.ProcessGroup]:
    """One process group for each set of ranks that some axis joins, made in the same order on every rank."""
    if not dist.is_initialized() or "nccl" not in dist.get_backend_config():
        return {}
    everyone = range(layout.world_size)
    sets = dict.fromkeys(layout.group_ranks(axis, rank) for axis in AXES for rank in everyone)
    groups = {}
    for ranks in sets:
        if len(ranks) > 1:
            groups[ranks] = dist.new_group(list(ranks), backend="nccl")
    return groups


def interface_to(address: str) -> str | None:
    """Name of the network interface whose IPv4 address this host uses to reach `address`; None if unknown."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing: asks the kernel for the route
            own = probe.getsockname()[0]
            if ipaddress.ip_address(own).is_loopback:
                if address != "localhost" and not address.startswith("127."):
                    logger.warning("%s is a loopback address here: other hosts cannot join", address)
                return "lo"
            for _, name in socket.if_nameindex():
                if _address_of(probe, name) == own:
                    return name
    except OSError as error:
        logger.warning("no IPv4 route to %s: %s", address, error)
    return None


def _address_of(probe: socket.socket, interface: str) -> str | None:
    get_address = 0x8915  # SIOCGIFADDR, Linux
    request = struct.pack("256s", interface.encode()[:15])
    try:
        return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), get_address, request)[20:24])
    except OSError:  # the interface has no IPv4 address
        return None
