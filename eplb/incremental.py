"""A better placement within a few slot changes of the current one."""

from __future__ import annotations

import numpy as np

from moeserve.eplb.plain import Options
from moeserve.eplb.policies.problem import Problem, rank_major, slot_major
from moeserve.eplb.policies.robust import node_of
from moeserve.eplb.types import Ints, Placement

_LEAST_GAIN = 2e-3


def improve_from(problem: Problem, current: Placement, max_moves: int) -> Ints:
    """slots [L, P] that differ from current in at most max_moves slots a layer; the others keep their place."""
    ranks = problem.topology.num_ranks
    load = problem.prepared[0]
    placed = slot_major(current.slot_to_expert, ranks)
    count = current.replica_count.copy()
    beta = 30.0 if problem.num_windows > 1 else 300.0
    connect = problem.weighted and problem.redundant > 0
    options = Options(beta, _LEAST_GAIN, 60, 4, max_moves, connect, problem.redundant > 0, problem.least)
    problem.kernels.improve(load, count, placed, node_of(problem.topology, False), options)
    slots = rank_major(placed)
    assert ((slots != current.slot_to_expert).sum(axis=1) <= max_moves).all()
    return np.ascontiguousarray(slots)
