"""A better placement within a few slot changes of the current one."""

from __future__ import annotations

import numpy as np

from moeserve.eplb.plain import Options
from moeserve.eplb.policies.problem import Problem, rank_major, slot_major
from moeserve.eplb.policies.robust import node_of
from moeserve.eplb.types import Floats, Ints, Placement

_LEAST_GAIN = 2e-3
_LEAST_STEP_GAIN = 5e-4  # lower imbalance for each slot written


def improve_even(problem: Problem, current: Placement, max_moves: int, reassign: bool = True) -> Ints:
    """slots [L, P], at most max_moves of a layer changed, for replicas that share evenly. reassign: redundant slots
    may be given to other experts, else experts change places alone."""
    ranks = problem.topology.num_ranks
    placed = slot_major(current.slot_to_expert, ranks)
    count = current.replica_count.copy()
    beta = 30.0 if problem.num_windows > 1 else 300.0
    connect = problem.weighted and problem.redundant > 0
    options = Options(
        beta, _LEAST_GAIN, 60, 4, max_moves, connect, reassign and problem.redundant > 0, problem.least
    )
    problem.kernels.improve(problem.prepared[0], count, placed, node_of(problem.topology, False), options)
    slots = rank_major(placed)
    assert ((slots != current.slot_to_expert).sum(axis=1) <= max_moves).all()
    return np.ascontiguousarray(slots)


def improve_steps(
    problem: Problem, current: Placement, max_moves: int, target: float = 1.005, merge: bool = False
) -> tuple[Ints, Floats]:
    """(slots [L, P], imbalance [L]) for replicas whose parts are set anew for each step's load.

    The objective is the mean over the windows of the highest rank load after water filling. A layer at the target
    or better stays as it is: most of what drifts is taken up by routing, without a move. merge: for parts that stay,
    which fit the mean of the windows.
    """
    load = problem.prepared[0]
    if merge:
        load = load.mean(axis=2, keepdims=True)
    placed = slot_major(current.slot_to_expert, problem.topology.num_ranks)
    count = current.replica_count.copy()
    score = problem.kernels.follow(load, count, placed, problem.least, max_moves, target, _LEAST_STEP_GAIN)
    return np.ascontiguousarray(rank_major(placed)), score.astype(np.float64)
