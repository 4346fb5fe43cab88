"""The policies by name, and the choice among them. A policy turns a Problem into slots [L, P]."""

from __future__ import annotations

from collections.abc import Callable

from moeserve.eplb.policies.exact import exact
from moeserve.eplb.policies.greedy import greedy
from moeserve.eplb.policies.hierarchical import hierarchical, node_imbalance, not_hierarchical
from moeserve.eplb.policies.problem import Problem
from moeserve.eplb.policies.robust import SKEWED, connected, fast, robust
from moeserve.eplb.policies.search import SMALL
from moeserve.eplb.types import Ints

Policy = Callable[[Problem], Ints]

_EVEN_NODES = 1.05  # imbalance between nodes up to which it is worth keeping groups together

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
    ranks, nodes = problem.topology.num_ranks, problem.topology.num_nodes
    if ranks == 1:
        return "fast", "one rank holds everything"
    if nodes == 1 or problem.expert_groups == 1 or not_hierarchical(problem):
        return _choose_flat(problem)
    groups, uneven = problem.expert_groups, node_imbalance(problem)
    if uneven <= _EVEN_NODES:
        return "hierarchical", f"{groups} expert groups pack on {nodes} nodes with imbalance {uneven:.3f}"
    name, reason = _choose_flat(problem)
    return name, f"{reason} ({groups} expert groups leave {nodes} nodes with imbalance {uneven:.3f} at best)"


def _choose_flat(problem: Problem) -> tuple[str, str]:
    ranks, per_rank, redundant = (
        problem.topology.num_ranks,
        problem.topology.slots_per_rank,
        problem.redundant,
    )
    if redundant == 0:
        return "robust", "no redundant slot: nothing for routing weights to choose from"
    if not problem.weighted:
        hottest = float(problem.prepared[1].max())
        skew = (
            f"; one expert fills {hottest:.2f} ranks, other replica counts are tried"
            if hottest > SKEWED
            else ""
        )
        return "robust", f"replicas will share evenly{skew}"
    if problem.num_windows == 1 and problem.topology.num_slots <= SMALL:
        return (
            "robust",
            f"one window and {problem.topology.num_slots} slots: small enough to search for the best",
        )
    if per_rank < 3:
        return "robust", f"{per_rank} slots a rank leave no room to join the ranks"
    if redundant < ranks - 1:
        return "robust", f"{redundant} redundant slots cannot join {ranks} ranks"
    return "connected", f"{redundant} redundant slots join all {ranks} ranks for routing weights"
