"""The policies by name, and the choice among them. A policy turns a Problem into slots [L, P]."""

from __future__ import annotations

from collections.abc import Callable

from moeserve.eplb.policies.exact import exact
from moeserve.eplb.policies.greedy import greedy
from moeserve.eplb.policies.hierarchical import hierarchical, not_hierarchical
from moeserve.eplb.policies.problem import Problem
from moeserve.eplb.policies.robust import SKEWED, connected, fast, robust
from moeserve.eplb.policies.search import SMALL
from moeserve.eplb.types import Ints

Policy = Callable[[Problem], Ints]

POLICIES: dict[str, Policy] = {
    "greedy": greedy,
    "fast": fast,
    "robust": robust,
    "connected": connected,
    "hierarchical": hierarchical,
    "exact": exact,
}


def choose(problem: Problem) -> tuple[str, str]:
    """(name of the policy that `auto` takes, why)."""
    topology = problem.topology
    ranks, redundant = topology.num_ranks, problem.redundant
    if ranks == 1:
        return "fast", "one rank holds everything"
    if topology.num_nodes > 1 and problem.expert_groups > 1 and not not_hierarchical(problem):
        return (
            "hierarchical",
            f"{problem.expert_groups} expert groups divide among {topology.num_nodes} nodes",
        )
    if redundant == 0:
        return "robust", "no redundant slot: nothing for routing weights to choose from"
    if not problem.weighted:
        hottest = float(problem.prepared[1].max())
        skew = (
            f"; an expert of {hottest:.2f} rank loads: other replica counts are tried"
            if hottest > SKEWED
            else ""
        )
        return "robust", f"replicas will share evenly{skew}"
    if problem.num_windows == 1 and topology.num_slots <= SMALL:
        return "robust", f"one window and {topology.num_slots} slots: small enough to search for the best"
    if topology.slots_per_rank < 3:
        return "robust", f"{topology.slots_per_rank} slots a rank leave no room to join the ranks"
    if redundant < ranks - 1:
        return "robust", f"{redundant} redundant slots cannot join {ranks} ranks"
    return "connected", f"{redundant} redundant slots join all {ranks} ranks for routing weights"
