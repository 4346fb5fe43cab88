"""Random searches where a local search from one start falls short.

Small layers: counts and packing depend on each other there, so both are annealed together, from several seeds.
Routing step by step: what counts is what is left after replicas have evened out their ranks, which no estimate
that is cheap tells.
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
_STEEPNESS = (15.0, 30.0, 60.0) * 2  # of the penalty, one for each seed: none is best everywhere
_ENOUGH = 1.0005  # mean over the windows of max/mean at which a layer is as good as done

LEAST_SAMPLES = 32
"""Windows below which exploring would fit their chance rather than the load."""

_TRIED_SLOTS = 640_000  # tries of a layer times its slots, within the limits below
_TRIES = (500, 8000)
_OPEN = 1.02  # imbalance that routing leaves on the windows as they are stretched for exploring


def explore(problem: Problem, count: Ints, placed: Ints, node: Ints) -> None:
    """Improve count [L, E] and placed [L, K, G] in place for routing step by step; slots change within nodes."""
    assert problem.samples is not None
    load = problem.kernels.prepare(problem.samples, problem.topology.num_ranks)[0]
    tries = int(np.clip(_TRIED_SLOTS // problem.topology.num_slots, *_TRIES))
    problem.kernels.explore(load, count, placed, node, problem.least, tries, _OPEN, 0)


def search(problem: Problem, count: Ints, placed: Ints, node: Ints, connect: bool) -> None:
    """Improve count [L, E] and placed [L, K, G] in place; experts stay in the nodes [G] in which they stand."""
    load = problem.prepared[0]
    for layer in range(problem.num_layers):
        part = np.ascontiguousarray(load[layer : layer + 1])
        count[layer], placed[layer] = _search_layer(problem, part, count[layer], placed[layer], node, connect)


def _search_layer(
    problem: Problem, load: Singles, count: Ints, placed: Ints, node: Ints, connect: bool
) -> tuple[Ints, Ints]:
    options = Options(300.0, 1e-4, 40, 3, -1, connect, problem.redundant > 0, problem.least)
    best, best_score = (count, placed), _score(load, count, placed)
    for seed, beta in enumerate(_STEEPNESS):
        if best_score <= _ENOUGH:
            break
        trial_count, trial = count[None].copy(), placed[None].copy()
        problem.kernels.anneal(load, trial_count, trial, node, beta, _STEPS, connect, problem.least, seed)
        if load.shape[2] == 1:
            problem.kernels.improve(load, trial_count, trial, node, options)
        score = _score(load, trial_count[0], trial[0])
        if score < best_score - 1e-7:
            best, best_score = (trial_count[0], trial[0]), score
    return best


def _score(load: Singles, count: Ints, placed: Ints) -> float:
    each = load[0] / count[:, None]
    return float(each[placed].sum(axis=0).max(axis=0).mean())
