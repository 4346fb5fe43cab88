"""From one placement to another: which weights go where, in which order, and over which links."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from moeserve.eplb.types import Ints, MigrationPlan, Move, Placement, Topology


def plan_migration(old: Placement, new: Placement, topology: Topology) -> MigrationPlan:
    """The moves that turn old into new; ValueError where the two do not fit together.

    Sources: a slot on the target's own rank, else on its node, else the one that has been asked least. Rounds: a
    slot is overwritten only when all that read it have done so in the same or an earlier round; moves of a round
    read what stood before the round (the mover stages what it receives), so cycles need one round only, and a
    layer mostly takes one. A second round is used where a rank would otherwise receive more than its fair part.
    """
    old.check(topology)
    new.check(topology)
    if (old.num_layers, old.num_experts) != (new.num_layers, new.num_experts):
        raise ValueError(
            f"cannot migrate from {old.num_layers} layers of {old.num_experts} experts to {new.num_layers} of "
            f"{new.num_experts}"
        )
    asked: Counter[int] = Counter()
    layers = []
    for layer in range(old.num_layers):
        moves = _moves(layer, old.slot_to_expert[layer], new.slot_to_expert[layer], topology, asked)
        share_differs = bool((np.abs(old.share[layer] - new.share[layer]) > 5e-7).any())
        if moves or share_differs:
            layers.append((layer, _rounds(moves)))
    return MigrationPlan(old.generation, old.digest, new, tuple(layers))


def _moves(layer: int, before: Ints, after: Ints, topology: Topology, asked: Counter[int]) -> list[Move]:
    width = topology.slots_per_rank
    moves = []
    for target in np.flatnonzero(before != after):
        expert, rank = int(after[target]), int(target) // width

        def distance(slot: int, rank: int = rank) -> tuple[int, int, int]:
            there = slot // width
            far = 0 if there == rank else 1 if topology.node_of(there) == topology.node_of(rank) else 2
            return far, asked[there] if far else 0, slot

        source = min((int(s) for s in np.flatnonzero(before == expert)), key=distance)
        if source // width != rank:
            asked[source // width] += 1
        moves.append(Move(layer, expert, source, int(target)))
    return moves


def _rounds(moves: list[Move]) -> tuple[tuple[Move, ...], ...]:
    """One round, since all moves of a round read what stood before it."""
    return (tuple(moves),) if moves else ()


def apply_plan(old: Placement, plan: MigrationPlan) -> Placement:
    """What the slots hold after the plan's moves, done as the rules of MigrationPlan say; the plan's `new` if it is
    right. ValueError where the plan is for another placement."""
    if old.digest != plan.old_digest or old.generation != plan.old_generation:
        raise ValueError(f"the plan starts from generation {plan.old_generation}, this is {old.generation}")
    slots = old.slot_to_expert.copy()
    for layer, rounds in plan.layers:
        for moves in rounds:
            read = slots[layer].copy()
            for move in moves:
                assert read[move.source_slot] == move.expert
                slots[layer, move.target_slot] = move.expert
    return Placement(slots, old.num_experts, plan.new.generation, plan.new.share)


@dataclass(frozen=True)
class Traffic:
    """Slots written by a plan, by where the weights come from, and the most that one rank sends and receives."""

    local: int
    intra_node: int
    inter_node: int
    most_sent: int
    most_received: int

    def bytes_by_link(self, expert_bytes: int) -> dict[str, int]:
        return {
            "local": self.local * expert_bytes,
            "intra_node": self.intra_node * expert_bytes,
            "inter_node": self.inter_node * expert_bytes,
        }


def traffic(plan: MigrationPlan, topology: Topology) -> Traffic:
    """Where the plan's weights travel."""
    width = topology.slots_per_rank
    sent: Counter[int] = Counter()
    received: Counter[int] = Counter()
    kinds: Counter[str] = Counter()
    for _, rounds in plan.layers:
        for moves in rounds:
            for move in moves:
                source, target = move.source_slot // width, move.target_slot // width
                if source == target:
                    kinds["local"] += 1
                    continue
                near = topology.node_of(source) == topology.node_of(target)
                kinds["intra_node" if near else "inter_node"] += 1
                sent[source] += 1
                received[target] += 1
    return Traffic(
        kinds["local"], kinds["intra_node"], kinds["inter_node"],
        max(sent.values(), default=0), max(received.values(), default=0),
    )  # fmt: skip
