"""Orders to the ranks: from a plan to a message, and from their answers to the placement in force."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from moeserve.eplb.migration import plan_migration
from moeserve.eplb.types import MigrationPlan, Placement, Topology
from moeserve.messages import LayerOrder, Migrate, Migrated
from moeserve.online.records import Rebalance

Pairs = tuple[tuple[int, int], ...]
"""(source slot, target slot) of the moves of a layer."""

Moves = tuple[tuple[int, Pairs], ...]
"""(layer, its moves), in the order in which the layers are to be moved; without moves its shares alone change."""


@dataclass
class Order:
    """One order that the ranks were given: `target` differs from `start` in the layers of `moves` alone.

    then: what to order next, once this one is in force. heard: when the ranks gave the last sign of life. resumes:
    how often it was tried again. lost: they were silent for too long. switched: layers that are in force.
    """

    number: int
    start: Placement
    target: Placement
    moves: Moves
    record: Rebalance
    then: tuple[Placement, Moves] | None
    heard: float
    resumes: int = 0
    lost: bool = False
    switched: set[int] = field(default_factory=set)
    answers: dict[int, Migrated] = field(default_factory=dict)

    def message(self, layers_per_step: int, bytes_per_second: float | None) -> Migrate:
        slots, shares = self.target.slot_to_expert, self.target.share
        return Migrate(
            order=self.number,
            old_generation=self.start.generation,
            old_digest=self.start.digest,
            generation=self.target.generation,
            digest=self.target.digest,
            layers=[
                LayerOrder(layer, slots[layer].tolist(), shares[layer].tolist(), list(pairs))
                for layer, pairs in self.moves
            ],
            layers_per_step=layers_per_step,
            bytes_per_second=bytes_per_second,
        )

    @property
    def done(self) -> Moves:
        return tuple((layer, pairs) for layer, pairs in self.moves if layer in self.switched)

    @property
    def left(self) -> Moves:
        return tuple((layer, pairs) for layer, pairs in self.moves if layer not in self.switched)


def plan_to(here: Placement, there: Placement, topology: Topology) -> MigrationPlan:
    """From one placement to another, to the grain of the digest: what results has the digest of `there`."""
    plan = plan_migration(here, there, topology)
    planned = {layer for layer, _ in plan.layers}
    differ = (np.rint(here.share * 1e6) != np.rint(there.share * 1e6)).any(axis=1)
    finer = [(int(layer), ()) for layer in np.flatnonzero(differ) if layer not in planned]
    return replace(plan, layers=tuple(sorted((*plan.layers, *finer), key=lambda item: item[0])))


def moves_of(plan: MigrationPlan) -> Moves:
    return tuple(
        (layer, tuple((move.source_slot, move.target_slot) for moves in rounds for move in moves))
        for layer, rounds in plan.layers
    )


def rank_bytes(moves: Moves, topology: Topology, size: int) -> npt.NDArray[np.int64]:
    """[G, G] bytes from rank to rank that moves of experts of `size` bytes take; none within a rank."""
    table = np.zeros((topology.num_ranks, topology.num_ranks), np.int64)
    for _, pairs in moves:
        for source, target in pairs:
            table[source // topology.slots_per_rank, target // topology.slots_per_rank] += size
    np.fill_diagonal(table, 0)
    return table


def by_link(table: npt.NDArray[np.int64], topology: Topology) -> dict[str, int]:
    """Bytes [G, G] within nodes and between them."""
    node = np.arange(topology.num_ranks) // topology.ranks_per_node
    near = node[:, None] == node[None, :]
    return {"intra_node": int(table[near].sum()), "inter_node": int(table[~near].sum())}
