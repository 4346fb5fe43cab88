"""From one placement to another: which weights go where, in which order, and over which links."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from moeserve.eplb.types import Ints, MigrationPlan, Move, Placement, Topology


def plan_migration(
    old: Placement, new: Placement, topology: Topology, staging_slots: int | None = None
) -> MigrationPlan:
    """The moves that turn old into new; ValueError where the two do not fit together.

    Sources: a slot on the target's own rank, else on its node, else anywhere; among equals the rank that has been
    asked least. Rounds: moves of a round read what stood before it (the mover stages what it receives and then
    writes), and a slot is overwritten in no earlier round than its last reader's. staging_slots: slots that a
    rank can stage in a round; without it a layer is one round. Moves that wait for each other in a circle stay
    together even where that is more.
    """
    if staging_slots is not None and staging_slots < 1:
        raise ValueError(f"staging_slots = {staging_slots}: give 1 or more")
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
            layers.append((layer, _rounds(moves, topology, staging_slots)))
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


def _rounds(moves: list[Move], topology: Topology, staging: int | None) -> tuple[tuple[Move, ...], ...]:
    """Each move in the earliest round that its target's readers and the staging allow."""
    if not moves:
        return ()
    if staging is None:
        return (tuple(moves),)
    readers: dict[int, list[Move]] = {}
    for move in moves:
        readers.setdefault(move.source_slot, []).append(move)
    round_of: dict[Move, int] = {}
    received: Counter[tuple[int, int]] = Counter()
    for unit in _units(moves):
        ranks = Counter(move.target_slot // topology.slots_per_rank for move in unit)
        before = (round_of[r] for move in unit for r in readers.get(move.target_slot, []) if r in round_of)
        number = max(before, default=0)
        while any(
            received[number, rank] and received[number, rank] + n > staging for rank, n in ranks.items()
        ):
            number += 1
        for move in unit:
            round_of[move] = number
        for rank, n in ranks.items():
            received[number, rank] += n
    last = max(round_of.values())
    rounds = (tuple(move for move in moves if round_of[move] == number) for number in range(last + 1))
    return tuple(moves for moves in rounds if moves)


def _units(moves: list[Move]) -> list[list[Move]]:
    """Moves, readers of a slot before its writer; those in a circle as one unit.

    A move reads one slot, so it precedes at most one other move: the one that writes that slot.
    """
    writer = {move.target_slot: move for move in moves}
    waiting = Counter(move.source_slot for move in moves if move.source_slot in writer)
    ready = [move for move in moves if not waiting[move.target_slot]]
    units = []
    done: set[Move] = set()
    for move in ready:
        units.append([move])
        done.add(move)
        after = writer.get(move.source_slot)
        if after is not None:
            waiting[move.source_slot] -= 1
            if not waiting[move.source_slot]:
                ready.append(after)
    for move in moves:
        circle = []
        while move not in done:
            circle.append(move)
            done.add(move)
            move = writer[move.source_slot]
        if circle:
            units.append(circle)
    return units


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
