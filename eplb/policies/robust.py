"""Placements that stay balanced: risk over recent windows, and a replica graph that routing can use.

Replicas by mean + z * std of an expert's load, placing by mean + z * std of a rank's load (which carries the
covariance of experts), then swaps that lower a steep penalty over all ranks and windows. `connected` first joins
the ranks into one component by shared experts, so that weighted routing can carry load from any rank to any other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeserve.eplb.native import Singles
from moeserve.eplb.plain import Options
from moeserve.eplb.policies.problem import Problem, rank_major
from moeserve.eplb.policies.search import LEAST_SAMPLES, SMALL, explore, search
from moeserve.eplb.types import Floats, Ints, Topology

SKEWED = 0.8  # mean load of one expert, in rank loads, from which other replica counts are tried
_LEVELS = (1.25, 1.12, 1.06, 1.03, 1.01, 0.95, 0.85, 0.75, 0.65, 0.5, 0.4, 0.3)


@dataclass(frozen=True)
class Effort:
    """z: standard deviations of risk. rounds: tries of the refinement a layer; 0 leaves the first placement."""

    z: float = 1.0
    rounds: int = 96
    patience: int = 2
    least_gain: float = 1e-2


QUICK = Effort(rounds=0)


def robust(problem: Problem, effort: Effort | None = None) -> Ints:
    """slots [L, P] for replicas that share evenly."""
    return place(problem, connect=False, effort=effort or effort_for(problem))


def connected(problem: Problem, effort: Effort | None = None) -> Ints:
    """slots [L, P] for replicas that share by weights; ranks form one component where redundancy allows."""
    return place(problem, connect=True, effort=effort or effort_for(problem))


def fast(problem: Problem) -> Ints:
    """slots [L, P] without refinement: heaviest first on the summed load, no two replicas on a rank."""
    return place(problem, connect=False, effort=Effort(z=0.0, rounds=0))


def effort_for(problem: Problem) -> Effort:
    """One window says nothing of scatter; there the highest rank alone counts, and it pays to look longer."""
    return Effort() if problem.num_windows > 1 else Effort(z=0.0, rounds=200, patience=4, least_gain=1e-4)


def place(problem: Problem, connect: bool, effort: Effort) -> Ints:
    load, mean, std = problem.prepared
    ranks, slots = problem.topology.num_ranks, problem.topology.num_slots
    weight = (mean + effort.z * std).astype(np.float32)
    count = problem.kernels.replicate(weight, ranks, slots, problem.least)
    if not connect and effort.rounds:
        count = _screen(problem, weight, count, mean, effort.z)
    placed = problem.kernels.place(load, count, order_of(weight, count), ranks, effort.z, connect)
    if effort.rounds:
        refine(problem, load, count, placed, connect, effort)
        if explores(problem):
            explore(problem, count, placed, node_of(problem.topology, False))
        elif slots <= SMALL:
            search(problem, count, placed, node_of(problem.topology, False), connect)
    return rank_major(placed)


def explores(problem: Problem) -> bool:
    """Whether there are replicas whose parts follow each step, and windows enough to see what that leaves."""
    samples = problem.samples
    return samples is not None and len(samples) >= LEAST_SAMPLES and problem.redundant > 0


def order_of(weight: Singles, count: Ints) -> Ints:
    """Experts [L, E], the heaviest replicas first."""
    order: Ints = np.argsort(-(weight / count), axis=1, kind="stable").astype(np.int32)
    return order


def refine(
    problem: Problem,
    load: Singles,
    count: Ints,
    placed: Ints,
    connect: bool,
    effort: Effort,
    by_node: bool = False,
) -> None:
    """Swap slots of placed [L, K, G] in place, within nodes only if by_node."""
    beta = 30.0 if load.shape[2] > 1 else 300.0
    options = Options(
        beta, effort.least_gain, effort.rounds, effort.patience, -1, connect, False, problem.least
    )
    problem.kernels.improve(load, count, placed, node_of(problem.topology, by_node), options)


def node_of(topology: Topology, by_node: bool) -> Ints:
    ranks = np.arange(topology.num_ranks, dtype=np.int32)
    node: Ints = ranks // np.int32(topology.ranks_per_node if by_node else topology.num_ranks)
    return node


def _screen(problem: Problem, weight: Singles, count: Ints, mean: Floats, z: float) -> Ints:
    """Other replica counts for layers where one expert fills most of a rank.

    For a level tau the hot experts get as many replicas as bring each below tau, and what is left goes one each
    to the largest experts that have a single one. The best by mean over the windows of the highest rank load.
    """
    skewed = np.flatnonzero(mean.max(axis=1) > SKEWED)
    if not len(skewed) or problem.redundant == 0:
        return count
    ranks, slots = problem.topology.num_ranks, problem.topology.num_slots
    load = np.ascontiguousarray(problem.prepared[0][skewed])
    best, best_score = count[skewed].copy(), np.full(len(skewed), np.inf)
    for level in (None, *_LEVELS):
        trial = count[skewed].copy()
        fits = np.ones(len(skewed), bool)
        if level is not None:
            trial = np.clip(np.ceil(weight[skewed] / level), problem.least, ranks).astype(np.int32)
            for row, w in zip(trial, weight[skewed], strict=True):
                left = slots - int(row.sum())
                lone = [
                    e for e in np.argsort(-w, kind="stable") if row[e] == problem.least and row[e] < ranks
                ]
                row[lone[: max(left, 0)]] += 1
            fits = trial.sum(axis=1) == slots
        if not fits.any():
            continue
        some = np.ascontiguousarray(trial[fits])
        part = np.ascontiguousarray(load[fits])
        placed = problem.kernels.place(part, some, order_of(weight[skewed][fits], some), ranks, z, False)
        score = highest_load(part, some, placed)
        better = score < best_score[fits] * (1 - 1e-6)
        at = np.flatnonzero(fits)[better]
        best[at], best_score[at] = some[better], score[better]
    result: Ints = count.copy()
    result[skewed] = best
    return result


def highest_load(load: Singles, count: Ints, placed: Ints) -> Floats:
    """[L] mean over the windows of the highest rank load; load [L, E, W], placed [L, K, G]."""
    row = np.arange(len(load))[:, None, None]
    each = load[row, placed] / count[row, placed][..., None]
    highest: Floats = each.sum(axis=1).max(axis=1).mean(axis=1)
    return highest
