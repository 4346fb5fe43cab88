"""A better placement within a few slot changes of the current one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeserve.eplb.plain import Options
from moeserve.eplb.policies.problem import Problem, rank_major, slot_major
from moeserve.eplb.policies.robust import node_of
from moeserve.eplb.routing import rank_of_slot
from moeserve.eplb.types import Floats, Ints, Placement, count_replicas

_LEAST_GAIN = 2e-3
_SWEEPS = 6
_OMEGA = 1.5
_LEAST_STEP_GAIN = 5e-4  # lower imbalance for each slot written
_TRIALS = 8


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
    windows = np.ascontiguousarray(problem.prepared[0].transpose(0, 2, 1), np.float64)  # [L, W, E]
    windows = windows.mean(axis=1, keepdims=True) if merge else windows
    slots = current.slot_to_expert.copy()
    filled = _fill(problem, windows, slots)
    score = filled.score.copy()
    for layer in np.flatnonzero(score > target).tolist():
        search = _Layer(problem, windows[layer], slots[layer], filled.at(layer))
        score[layer] = search.run(max_moves, target)
        slots[layer] = search.slots
    return slots, score


@dataclass
class _Filled:
    """Water-filled windows: share [N, W, P], ranks [N, W, G], score [N] the mean over the windows of the highest."""

    share: Floats
    ranks: Floats
    score: Floats

    def at(self, n: int) -> _Filled:
        return _Filled(self.share[n], self.ranks[n], self.score[n])


def _fill(problem: Problem, windows: Floats, slots: Ints) -> _Filled:
    """For windows [N, W, E] over slots [N, P]."""
    count = count_replicas(slots, problem.num_experts)
    even = 1.0 / np.take_along_axis(count, slots, axis=1)
    share = np.repeat(even[:, None], windows.shape[1], axis=1)
    ranks = problem.kernels.fill(windows, slots, rank_of_slot(problem.topology), share, _SWEEPS, _OMEGA)
    return _Filled(share, ranks, ranks.max(axis=2).sum(axis=1) / windows.shape[1])


class _Layer:
    """One layer, given as its windows [W, E] are filled now."""

    def __init__(self, problem: Problem, windows: Floats, slots: Ints, filled: _Filled) -> None:
        self.problem, self.windows, self.here = problem, windows, filled
        self.rank_of = rank_of_slot(problem.topology)
        self.slots = slots.copy()

    def run(self, max_moves: int, target: float) -> float:
        left = max_moves
        while left > 0 and self.here.score > target:
            found = self._candidates(self.here, left)
            if not found:
                break
            trials = np.repeat(self.slots[None], len(found), axis=0)
            for trial, (cost, p, q) in zip(trials, found, strict=True):
                trial[q] = self.slots[p]
                if cost == 2:
                    trial[p] = self.slots[q]
            windows = np.broadcast_to(self.windows, (len(found), *self.windows.shape))
            filled = _fill(self.problem, windows, trials)
            gains = (self.here.score - filled.score) / [cost for cost, _, _ in found]
            best = int(gains.argmax())
            if gains[best] <= _LEAST_STEP_GAIN:
                break
            self.slots, self.here = trials[best], filled.at(best)
            left -= found[best][0]
        return float(self.here.score)

    def _candidates(self, here: _Filled, left: int) -> list[tuple[int, int, int]]:
        """(slots written, p, q) by estimated gain: the expert of slot p, on the hottest rank, goes into slot q; for
        two writes q's expert goes into p."""
        slots, rank_of = self.slots, self.rank_of
        count = np.bincount(slots, minlength=self.windows.shape[1])
        heat = np.maximum(1.0 + 60.0 * (here.ranks - here.ranks.max(axis=1, keepdims=True)) / 64, 0.0) ** 64
        heat = heat / heat.sum(axis=1, keepdims=True)  # [W, G]
        hot = int(np.argmax(heat.sum(axis=0)))
        load = self.windows[:, slots] * here.share  # [W, P]
        relief = (
            heat[:, [hot]] - heat[:, rank_of]
        )  # [W, P] what a unit of load gains by going from hot to a slot
        mine = np.flatnonzero(rank_of == hot)
        holds = np.zeros((count.size, self.problem.topology.num_ranks), bool)
        holds[slots, rank_of] = True
        free = ~holds[slots[mine]][:, rank_of]  # [mine, P] no copy of the expert there
        scores = []
        spare = free & (count[slots] > self.problem.least)[None, :]
        # half of the load moves over; what stood in the slot goes to its other hosts, at about the mean heat
        away = (load * (heat[:, rank_of] - heat.mean(axis=1, keepdims=True))).sum(axis=0)
        copy = 0.5 * load[:, mine].T @ relief + away[None, :]
        scores.append(np.where(spare, copy, -np.inf))
        lone = free & (count[slots] == 1)[None, :] & (count[slots[mine]] == 1)[:, None]
        swap = load[:, mine].T @ relief - (load * relief).sum(axis=0)[None, :]
        scores.append(np.where(lone & (left >= 2), 0.5 * swap, -np.inf))
        both = np.stack(scores)
        order = np.argsort(-both, axis=None, kind="stable")[:_TRIALS]
        found = []
        for flat in order:
            kind, i, q = (int(x) for x in np.unravel_index(flat, both.shape))
            if both[kind, i, q] > 0:
                found.append((1 + kind, int(mine[i]), q))
        return found
