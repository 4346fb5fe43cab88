"""Small layers: anneal replica counts and packing together, from several seeds, and keep the best.

Where a layer has few slots, counts and packing depend on each other; a local search from one start often misses
the best by some per cent.
"""

from __future__ import annotations

import numpy as np

from moeserve.eplb.native import Singles
from moeserve.eplb.plain import Options
from moeserve.eplb.policies.problem import Problem
from moeserve.eplb.types import Ints

SMALL = 64
"""Slots of a layer up to which the search is worth its time."""

_STEPS = 10_000
_STEEPNESS = (
    15.0,
    30.0,
    60.0,
    15.0,
    30.0,
    60.0,
)  # of the penalty, one for each seed: none is best everywhere
_ENOUGH = 1.0005  # mean over the windows of max/mean at which a layer is as good as done


def search(problem: Problem, count: Ints, placed: Ints, connect: bool) -> None:
    """Improve count [L, E] and placed [L, K, G] in place."""
    load = problem.prepared[0]
    for layer in range(problem.num_layers):
        part = np.ascontiguousarray(load[layer : layer + 1])
        count[layer], placed[layer] = _search_layer(problem, part, count[layer], placed[layer], connect)


def _search_layer(
    problem: Problem, load: Singles, count: Ints, placed: Ints, connect: bool
) -> tuple[Ints, Ints]:
    options = Options(300.0, 1e-4, 40, 3, -1, connect, problem.redundant > 0, problem.least)
    node = np.zeros(placed.shape[1], np.int32)
    best, best_score = (count, placed), _score(load, count, placed)
    for seed, beta in enumerate(_STEEPNESS):
        if best_score <= _ENOUGH:
            break
        trial_count, trial = count[None].copy(), placed[None].copy()
        problem.kernels.anneal(load, trial_count, trial, beta, _STEPS, connect, problem.least, seed)
        if load.shape[2] == 1:
            problem.kernels.improve(load, trial_count, trial, node, options)
        score = _score(load, trial_count[0], trial[0])
        if score < best_score - 1e-7:
            best, best_score = (trial_count[0], trial[0]), score
    return best


def _score(load: Singles, count: Ints, placed: Ints) -> float:
    each = load[0] / count[:, None]
    return float(each[placed].sum(axis=0).max(axis=0).mean())
