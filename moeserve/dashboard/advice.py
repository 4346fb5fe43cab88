"""What another placement would bring: the solver on the recorded windows. Takes up to seconds, so not for an event
loop."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moeserve.dashboard.panels import over_fair_share
from moeserve.dashboard.recording import Recording
from moeserve.eplb.load import ExpertLoad
from moeserve.eplb.metrics import FORMULA, balance, imbalance, moves_between, rank_load
from moeserve.eplb.solver import explain
from moeserve.eplb.types import Floats, Placement, Topology

HOLDOUT = 0.25
"""Part of the windows that are measured on and not solved with, as eplb-offline has it."""
MIN_GAIN = 0.02
"""Relative gain in imbalance from which a new placement is advised, as the rebalancer's min_gain."""
MAX_EXTRA = 4
KNEE = 0.1
"""Part of the whole gain below which another slot a rank is not worth its memory."""
POLICIES = ("auto", "greedy", "fast", "robust", "connected", "hierarchical")
MAX_RANKS = 1024


@dataclass(frozen=True)
class Proposal:
    """A solved placement. before and after: imbalance (mean over layers and windows) of the placement in force (of
    experts in order on another number of ranks) and of the solved one; held_out_*: on the last windows, with a
    placement solved without them. moves: experts that ranks would have to load, None where the number of slots
    differs; bytes: the same as weights. rank_bytes: the experts' weights on a rank, over all layers. Bytes are None
    where an expert's are unknown."""

    ep_size: int
    slots_per_rank: int
    redundant: int
    policy: str
    reason: str
    before: float
    after: float
    after_worst: float
    held_out_before: float | None
    held_out_after: float | None
    held_out_windows: int
    moves: int | None
    bytes: int | None
    rank_bytes: int | None
    survives_rank_loss: bool
    seconds: float
    digest: str

    @property
    def expected(self) -> float:
        return self.after if self.held_out_after is None else self.held_out_after


def verdict(recording: Recording, phase: str) -> dict[str, Any]:
    """Would another placement help? In the slots that there are, and with one redundant slot a rank if none is."""
    load, topology = recording.of_phase(phase), recording.topology
    now = balance(load.load, recording.placement, topology)
    was = _as_it_was(recording, phase)
    reference = now.mean if was is None else was
    answer: dict[str, Any] = {
        "phase": phase,
        "formula": FORMULA,
        "windows": load.num_windows,
        "tokens": sum(window.tokens for window in load.windows),
        "ep_size": topology.num_ranks,
        "mean": round(now.mean, 6),
        "worst": round(now.worst, 6),
        "worst_layer": load.layers[int(np.argmax(now.by_layer))],
        "waiting": round(1 - 1 / reference, 6),
        "recent": asdict(recording.recent[phase]) if phase in recording.recent else None,
        "bytes_per_second": _transfer_rate(recording),
        "as_it_was": was,
        "proposals": [],
    }
    if topology.num_ranks == 1:
        return answer | {"state": "one_rank"}
    sizes = [topology]
    if topology.num_slots == load.num_experts:
        sizes.append(Topology(topology.num_ranks, topology.ranks_per_node, topology.slots_per_rank + 1))
    found = [_propose(recording, load, size, "auto")[0] for size in sizes]
    gains = [(reference - proposal.after) / reference for proposal in found]
    held = [
        (p.held_out_before - p.held_out_after) / p.held_out_before
        for p in found
        if p.held_out_before is not None and p.held_out_after is not None
    ]
    helps = max(gains) >= MIN_GAIN and (not held or max(held) >= MIN_GAIN)
    return answer | {"state": "helps" if helps else "balanced", "proposals": [asdict(p) for p in found]}


def _as_it_was(recording: Recording, phase: str) -> float | None:
    """Mean imbalance of what the ranks were really given, where windows met other placements than the one in
    force; None where they did not, or where nobody measured."""
    measured = recording.measured.get(phase)
    if measured is None or recording.previous is None:
        return None
    return round(float(imbalance(measured).mean()), 6)


def _transfer_rate(recording: Recording) -> float | None:
    """Bytes a second at which experts moved so far, None where none did."""
    moved = [one for one in recording.rebalances if one["bytes"] and one["migration_seconds"]]
    seconds = sum(one["migration_seconds"] for one in moved)
    return sum(one["bytes"] for one in moved) / seconds if moved else None


def what_if(
    recording: Recording, phase: str, ep_size: int, extra: int, policy: str, layer: int
) -> dict[str, Any]:
    """Placements on ep_size ranks with 0 to MAX_EXTRA slots a rank more than the experts need, and of the one with
    `extra` more the ranks of a layer, as load over fair share."""
    if not 1 <= ep_size <= MAX_RANKS:
        raise ValueError(f"ep_size = {ep_size}: give 1 to {MAX_RANKS}")
    if policy not in POLICIES:
        raise ValueError(f"policy = {policy!r}: give {', '.join(POLICIES)}")
    if not 0 <= extra <= MAX_EXTRA:
        raise ValueError(f"extra = {extra}: give 0 to {MAX_EXTRA}")
    load = recording.of_phase(phase)
    if not 0 <= layer < load.num_layers:
        raise ValueError(f"layer = {layer}: give 0 to {load.num_layers - 1}")
    points, ranks = _solve_sizes(recording, load, ep_size, policy)
    chosen = min(extra, len(points) - 1)
    return {
        "phase": phase,
        "policy": policy,
        "layer": load.layers[layer],
        "chosen": chosen,
        "knee": knee([point.expected for point in points]),
        "points": [asdict(point) for point in points],
        "ranks": np.round(ranks[chosen][layer], 4).tolist(),
    }


def what_if_anywhere(recording: Recording, phase: str) -> dict[str, Any]:
    """what_if of the ranks that there are with every number of slots and, as `ranks`, all layers of each."""
    load = recording.of_phase(phase)
    points, ranks = _solve_sizes(recording, load, recording.topology.num_ranks, "auto")
    return {
        "phase": phase,
        "policy": "auto",
        "knee": knee([point.expected for point in points]),
        "points": [asdict(point) for point in points],
        "ranks": [np.round(each, 4).tolist() for each in ranks],
    }


def _solve_sizes(
    recording: Recording, load: ExpertLoad, ep_size: int, policy: str
) -> tuple[list[Proposal], list[Floats]]:
    """For each number of slots the proposal, and its load over fair share [L, G]."""
    points, ranks = [], []
    for size in _sizes(load.num_experts, ep_size, recording.topology):
        point, placement = _propose(recording, load, size, policy)
        points.append(point)
        ranks.append(over_fair_share(rank_load(load.load.sum(axis=0), placement, size)))
    return points, ranks


def _sizes(num_experts: int, ep_size: int, topology: Topology) -> list[Topology]:
    """From as few slots as hold the experts; on one rank, or where each rank holds all, more slots change nothing."""
    least = -(-num_experts // ep_size)
    per_node = topology.ranks_per_node if topology.num_nodes > 1 else 0
    sizes = range(least, min(least + MAX_EXTRA, num_experts) + 1)
    return [Topology(ep_size, min(per_node, ep_size), slots) for slots in sizes]


def knee(values: list[float]) -> int | None:
    """The first place after which a further step brings less than KNEE of all there is to gain; None without one."""
    gain = values[0] - min(values)
    if gain < MIN_GAIN * values[0]:
        return None
    steps = zip(values, values[1:], strict=False)
    return next((i for i, (a, b) in enumerate(steps) if a - b < KNEE * gain), None)


def _propose(
    recording: Recording, load: ExpertLoad, topology: Topology, policy: str
) -> tuple[Proposal, Placement]:
    """A placement solved for this topology, and its figures."""
    before, there = recording.placement, recording.topology
    if topology.num_ranks != there.num_ranks:
        there = _sizes(load.num_experts, topology.num_ranks, there)[0]
        before = Placement.identity(load.num_layers, load.num_experts, there.num_slots)
    same = topology == there
    begun = time.perf_counter()
    solution = explain(
        load.load,
        topology,
        policy=policy,
        expert_groups=load.expert_groups,
        current=before if same else None,
    )
    seconds = time.perf_counter() - begun
    after = balance(load.load, solution.placement, topology)
    early, late = load.split(HOLDOUT)
    if late is not None and not (early.load.any() and late.load.any()):
        late = None  # a measure of nothing
    held_before = held_after = None
    if late is not None:
        held = explain(early.load, topology, policy=policy, expert_groups=load.expert_groups).placement
        held_before = round(balance(late.load, before, there).mean, 6)
        held_after = round(balance(late.load, held, topology).mean, 6)
    moves = int(moves_between(before, solution.placement, topology).sum()) if same else None
    proposal = Proposal(
        ep_size=topology.num_ranks,
        slots_per_rank=topology.slots_per_rank,
        redundant=topology.num_slots - load.num_experts,
        policy=solution.policy,
        reason=solution.reason,
        before=round(balance(load.load, before, there).mean, 6),
        after=round(after.mean, 6),
        after_worst=round(after.worst, 6),
        held_out_before=held_before,
        held_out_after=held_after,
        held_out_windows=0 if late is None else late.num_windows,
        moves=moves,
        bytes=moves * recording.expert_bytes if moves is not None and recording.expert_bytes else None,
        rank_bytes=topology.slots_per_rank * load.num_layers * recording.expert_bytes or None,
        survives_rank_loss=solution.placement.survives_rank_loss(topology),
        seconds=round(seconds, 4),
        digest=solution.placement.digest,
    )
    return proposal, solution.placement
