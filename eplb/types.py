"""The values of the balancer: topology, placement, routing table, moves.

Immutable and checked when made, over read-only numpy arrays. Knows neither how a placement is found nor how
weights travel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]

TABLE_WIDTH = 60
"""Columns of a routing table: divisible by 1 to 6, 10, 12, 15, 20 and 30, so an even split is exact there."""

_TABLE_STRIDE = 37  # coprime to TABLE_WIDTH and near its golden section: neighbouring columns fall far apart


@dataclass(frozen=True)
class Topology:
    """Ranks that share the experts of a layer, and the slots each of them owns.

    ranks_per_node: consecutive ranks that share a fast link; 0 means one node holds them all.
    """

    num_ranks: int
    ranks_per_node: int = 0
    slots_per_rank: int = 1

    def __post_init__(self) -> None:
        if self.num_ranks < 1:
            raise ValueError(f"num_ranks = {self.num_ranks}: at least 1 rank is needed")
        if self.slots_per_rank < 1:
            raise ValueError(f"slots_per_rank = {self.slots_per_rank}: at least 1 slot a rank is needed")
        if self.ranks_per_node == 0:
            object.__setattr__(self, "ranks_per_node", self.num_ranks)
        if self.ranks_per_node < 1:
            raise ValueError(f"ranks_per_node = {self.ranks_per_node}: give 1 to {self.num_ranks}")

    @classmethod
    def of(cls, num_ranks: int, num_slots: int, ranks_per_node: int = 0) -> Topology:
        """The topology of num_slots slots spread over num_ranks ranks."""
        if num_ranks < 1 or num_slots % num_ranks:
            raise ValueError(
                f"num_slots = {num_slots} is not divisible by ep_size = {num_ranks}: "
                f"give {_next_multiple(num_slots, max(num_ranks, 1))}"
            )
        return cls(num_ranks, ranks_per_node, num_slots // num_ranks)

    @property
    def num_slots(self) -> int:
        return self.num_ranks * self.slots_per_rank

    @property
    def num_nodes(self) -> int:
        """Nodes, the last one possibly with fewer ranks."""
        return -(-self.num_ranks // self.ranks_per_node)

    def node_of(self, rank: int) -> int:
        return rank // self.ranks_per_node


def _next_multiple(number: int, step: int) -> int:
    return max(step, -(-number // step) * step)


@dataclass(frozen=True)
class Placement:
    """Which expert each slot holds, and which part of its expert's tokens each slot takes.

    slot_to_expert [L, P] int32: slot j lives on rank j // slots_per_rank.
    share [L, P] float64: sums to 1 over the slots of an expert; left out, replicas share evenly.
    Every expert stands in every layer at least once, else ValueError.
    """

    slot_to_expert: Ints
    num_experts: int
    generation: int = 0
    share: Floats = field(default=None)  # type: ignore[arg-type]  # filled in below

    def __post_init__(self) -> None:
        given = _integers(self.slot_to_expert, "slot_to_expert")
        if given.ndim != 2 or given.shape[0] < 1:
            raise ValueError(
                f"slot_to_expert has shape {given.shape}, expected [layers, slots] with a layer at least"
            )
        if self.num_experts < 1:
            raise ValueError(f"num_experts = {self.num_experts}: at least 1 expert is needed")
        if self.generation < 0:
            raise ValueError(f"generation = {self.generation}: give 0 or more")
        bad = np.argwhere((given < 0) | (given >= self.num_experts))
        if len(bad):
            layer, slot = (int(i) for i in bad[0])
            raise ValueError(
                f"slot_to_expert[{layer}][{slot}] = {int(given[layer, slot])} is not an expert, "
                f"expected 0 to {self.num_experts - 1}"
            )
        slots = given.astype(np.int32)
        count = count_replicas(slots, self.num_experts)
        missing = np.argwhere(count == 0)
        if len(missing):
            layer, expert = (int(i) for i in missing[0])
            raise ValueError(f"slot_to_expert[{layer}]: expert {expert} has no slot; every expert needs one")
        even = 1.0 / np.take_along_axis(count, slots, axis=1)
        share = even if self.share is None else _shares(self.share, slots, self.num_experts)
        object.__setattr__(self, "slot_to_expert", _frozen(slots))
        object.__setattr__(self, "share", _frozen(share))
        object.__setattr__(self, "_count", _frozen(count))

    @classmethod
    def identity(cls, num_layers: int, num_experts: int, num_slots: int) -> Placement:
        """Round robin in logical order: slot j holds expert j % E, as engines start without a placement."""
        if num_slots < num_experts:
            raise ValueError(
                f"num_slots = {num_slots} is less than num_experts = {num_experts}: each needs a slot"
            )
        row = np.arange(num_slots, dtype=np.int32) % num_experts
        return cls(np.tile(row, (num_layers, 1)), num_experts)

    @property
    def num_layers(self) -> int:
        return int(self.slot_to_expert.shape[0])

    @property
    def num_slots(self) -> int:
        return int(self.slot_to_expert.shape[1])

    @property
    def replica_count(self) -> Ints:
        """[L, E] slots that hold each expert, 1 or more."""
        count: Ints = self.__dict__["_count"]
        return count

    @cached_property
    def slot_lists(self) -> Ints:
        """[L, E, M] slots of each expert, ascending, filled up with -1; M = the largest replica count."""
        order = np.argsort(self.slot_to_expert, axis=1, kind="stable")
        experts = np.take_along_axis(self.slot_to_expert, order, axis=1)
        first = np.cumsum(self.replica_count, axis=1) - self.replica_count
        place = np.arange(self.num_slots)[None, :] - np.take_along_axis(first, experts, axis=1)
        lists = np.full((self.num_layers, self.num_experts, int(self.replica_count.max())), -1, np.int32)
        lists[np.arange(self.num_layers)[:, None], experts, place] = order
        return _frozen(lists)

    def slots_of(self, layer: int, expert: int) -> Ints:
        """The slots that hold the expert, ascending."""
        return np.flatnonzero(self.slot_to_expert[layer] == expert).astype(np.int32)

    def check(self, topology: Topology) -> None:
        """Raise ValueError unless the placement has as many slots as the topology."""
        if self.num_slots != topology.num_slots:
            raise ValueError(
                f"the placement has {self.num_slots} slots, but {topology.num_ranks} ranks with "
                f"{topology.slots_per_rank} slots each make {topology.num_slots}"
            )

    def survives_rank_loss(self, topology: Topology) -> bool:
        """True if every expert of every layer stands on two ranks at least."""
        self.check(topology)
        lists = self.slot_lists
        rank = np.where(
            lists >= 0, lists // topology.slots_per_rank, lists[:, :, :1] // topology.slots_per_rank
        )
        return bool((rank.max(axis=2) > rank.min(axis=2)).all())

    @property
    def even_share(self) -> Floats:
        """[L, P]: replicas of an expert take equal parts."""
        even: Floats = 1.0 / np.take_along_axis(self.replica_count, self.slot_to_expert, axis=1)
        return even

    def with_generation(self, generation: int) -> Placement:
        return Placement(self.slot_to_expert, self.num_experts, generation, self.share)

    def with_layers(self, layers: Sequence[int], new: Placement) -> Placement:
        """This one with these layers as in `new`; its generation is the new one's once every layer agrees."""
        slots, shares, rows = self.slot_to_expert.copy(), self.share.copy(), list(layers)
        slots[rows], shares[rows] = new.slot_to_expert[rows], new.share[rows]
        found = Placement(slots, self.num_experts, self.generation, shares)
        return found.with_generation(new.generation) if found.digest == new.digest else found

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of "moeserve.placement 1 L P E\\n", slot_to_expert and round(share * 1e6), both as
        little-endian int32 in row order. Equal on every platform; the generation is not part of it."""
        head = f"moeserve.placement 1 {self.num_layers} {self.num_slots} {self.num_experts}\n".encode()
        shares = np.rint(self.share * 1e6).astype("<i4")
        return hashlib.sha256(
            head + self.slot_to_expert.astype("<i4").tobytes() + shares.tobytes()
        ).hexdigest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Placement):
            return NotImplemented
        return self.generation == other.generation and self.digest == other.digest

    def __hash__(self) -> int:
        return hash((self.digest, self.generation))


@dataclass(frozen=True, eq=False)
class RoutingTable:
    """What one source rank uses to pick a slot: token t of a step takes column (t + rotation) % C.

    slots [L, E, C] int16. With shares s the replica i of an expert stands in n_i columns, with
    |n_i / C - s_i| < 1 / C (the worst over- and under-shoot of one table); the rounding differs by source
    rank, so that the mean over the source ranks comes nearer to s_i.
    """

    slots: npt.NDArray[np.int16]

    def __post_init__(self) -> None:
        if self.slots.ndim != 3 or self.slots.dtype != np.int16:
            raise ValueError(
                f"slots has shape {self.slots.shape} of {self.slots.dtype}, expected int16 [L, E, C]"
            )
        object.__setattr__(self, "slots", _frozen(self.slots))

    @property
    def width(self) -> int:
        return int(self.slots.shape[2])

    @classmethod
    def even(
        cls, placement: Placement, source_rank: int, topology: Topology, width: int = TABLE_WIDTH
    ) -> RoutingTable:
        """Every replica of an expert equally often."""
        return cls.weighted(placement, placement.even_share, source_rank, topology, width)

    @classmethod
    def nearest(
        cls, placement: Placement, source_rank: int, topology: Topology, width: int = TABLE_WIDTH
    ) -> RoutingTable:
        """Replicas on the source rank alone if there are any, else on its node, else all; evenly."""
        placement.check(topology)
        rank = np.arange(placement.num_slots) // topology.slots_per_rank
        far = np.where(
            rank == source_rank,
            0,
            np.where(rank // topology.ranks_per_node == topology.node_of(source_rank), 1, 2),
        )
        lists = placement.slot_lists
        distance = np.where(lists >= 0, far[lists], 3)
        near = distance == distance.min(axis=2, keepdims=True)
        return _fill(lists, near / near.sum(axis=2, keepdims=True), source_rank, width)

    @classmethod
    def weighted(
        cls,
        placement: Placement,
        share: Floats,
        source_rank: int,
        topology: Topology,
        width: int = TABLE_WIDTH,
    ) -> RoutingTable:
        """Replicas in proportion to share [L, P], which sums to 1 over the slots of an expert."""
        placement.check(topology)
        lists = placement.slot_lists
        by_expert = np.where(
            lists >= 0, np.take_along_axis(share, lists.reshape(len(lists), -1), 1).reshape(lists.shape), 0.0
        )
        return _fill(lists, by_expert, source_rank, width)


def _fill(lists: Ints, share: Floats, source_rank: int, width: int) -> RoutingTable:
    """Systematic rounding of share [L, E, M] to width columns; the columns of a replica lie far apart."""
    if lists.shape[2] and int(lists.max()) > np.iinfo(np.int16).max:
        raise ValueError(f"slot {int(lists.max())} does not fit the routing table, 32768 slots at most")
    if width < 1:
        raise ValueError(f"width = {width}: at least 1 column is needed")
    golden = 0.6180339887498949
    dither = (source_rank * golden) % 1.0
    stride = _TABLE_STRIDE if width == TABLE_WIDTH else 1
    position = (np.arange(width) * stride + int(((source_rank * golden) % 1.0) * width)) % width
    edge = np.floor(np.cumsum(share, axis=2) * width + dither + 1e-9)
    edge[:, :, -1] = width
    replica = np.zeros((*lists.shape[:2], width), np.int32)
    for m in range(lists.shape[2] - 1):
        replica += position >= np.minimum(edge[:, :, m, None], width)
    chosen = np.take_along_axis(lists, np.minimum(replica, (lists >= 0).sum(axis=2)[..., None] - 1), axis=2)
    return RoutingTable(chosen.astype(np.int16))


@dataclass(frozen=True)
class Move:
    """Carry an expert's weights of one layer from a slot that holds them into another slot."""

    layer: int
    expert: int
    source_slot: int
    target_slot: int


@dataclass(frozen=True)
class MigrationPlan:
    """How the placement `new` is reached from the one of old_generation.

    layers[i] = (layer, rounds), layer being a row of the placement; only layers that change are named, those
    whose shares alone change with no round. Each round is a tuple of moves that may run at the same time. In
    order of the rounds no slot is overwritten before its last reader has finished: sources are read as they
    stood before the round, so a round may also swap slots if the mover stages what it receives.
    """

    old_generation: int
    old_digest: str
    new: Placement
    layers: tuple[tuple[int, tuple[tuple[Move, ...], ...]], ...]

    @property
    def num_moves(self) -> int:
        return sum(len(moves) for _, rounds in self.layers for moves in rounds)


def count_replicas(slot_to_expert: Ints, num_experts: int) -> Ints:
    """[L, E] int32: how often each expert stands in each row."""
    num_layers = slot_to_expert.shape[0]
    flat = slot_to_expert + np.arange(num_layers)[:, None] * num_experts
    return (
        np.bincount(flat.ravel(), minlength=num_layers * num_experts)
        .reshape(num_layers, num_experts)
        .astype(np.int32)
    )


def _integers(values: Any, name: str) -> npt.NDArray[np.int64]:
    array = np.asarray(values)
    if array.dtype == object or array.dtype.kind not in "iu":
        raise ValueError(f"{name} holds {array.dtype}, expected rows of equal length of whole numbers")
    return array.astype(np.int64)


def _shares(values: Any, slots: Ints, num_experts: int) -> Floats:
    share = np.asarray(values, dtype=np.float64)
    if share.shape != slots.shape:
        raise ValueError(f"share has shape {share.shape}, expected that of slot_to_expert, {slots.shape}")
    if not np.isfinite(share).all() or (share < 0).any() or (share > 1 + 1e-6).any():
        layer, slot = (int(i) for i in np.argwhere(~((share >= 0) & (share <= 1 + 1e-6)))[0])
        raise ValueError(f"share[{layer}][{slot}] = {share[layer, slot]} is not a fraction from 0 to 1")
    layers = np.arange(len(slots))[:, None]
    total = np.bincount(
        (slots + layers * num_experts).ravel(), weights=share.ravel(), minlength=len(slots) * num_experts
    ).reshape(len(slots), num_experts)
    off = np.argwhere(np.abs(total - 1.0) > 1e-4)
    if len(off):
        layer, expert = (int(i) for i in off[0])
        raise ValueError(
            f"share[{layer}]: the shares of expert {expert} add up to {total[layer, expert]:.6f}, expected 1"
        )
    return share


def _frozen(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    array = np.ascontiguousarray(array)
    if array.base is not None or array.flags.writeable:
        array = array.copy()
    array.setflags(write=False)
    return array
