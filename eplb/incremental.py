"""A better placement within a few slot changes of the current one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeserve.eplb.native import Kernels
from moeserve.eplb.plain import Options
from moeserve.eplb.policies.problem import Problem, rank_major, slot_major
from moeserve.eplb.policies.robust import node_of
from moeserve.eplb.routing import rank_of_slot
from moeserve.eplb.types import Floats, Ints, Placement

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
    problem: Problem, current: Placement, max_moves: int, target: float = 1.005
) -> tuple[Ints, Floats]:
    """(slots [L, P], imbalance [L]) for replicas whose parts are set anew for each step's load.

    The objective is the mean over the windows of the highest rank load after water filling. A layer at the target
    or better stays as it is: most of what drifts is taken up by routing, without a move.
    """
    load = problem.prepared[0]
    slots = current.slot_to_expert.copy()
    score = np.empty(problem.num_layers)
    for layer in range(problem.num_layers):
        windows = np.ascontiguousarray(load[layer].T, np.float64)
        search = _Layer(problem, windows, slots[layer])
        score[layer] = search.run(max_moves, target)
        slots[layer] = search.slots
    return slots, score


@dataclass
class _Filled:
    """Water-filled windows: share [W, P], ranks [W, G], score the mean of the highest."""

    share: Floats
    ranks: Floats
    score: float


class _Layer:
    def __init__(self, problem: Problem, windows: Floats, slots: Ints) -> None:
        self.problem, self.windows = problem, windows
        self.kernel: Kernels = problem.kernels
        self.rank_of = rank_of_slot(problem.topology)
        self.slots = slots.copy()

    def run(self, max_moves: int, target: float) -> float:
        here = self._fill(self.slots)
        left = max_moves
        while left > 0 and here.score > target:
            best: tuple[float, Ints, _Filled, int] | None = None
            for cost, p, q in self._candidates(here, left):
                trial = self.slots.copy()
                trial[q] = self.slots[p]
                if cost == 2:
                    trial[p] = self.slots[q]
                filled = self._fill(trial)
                gain = (here.score - filled.score) / cost
                if gain > max(_LEAST_STEP_GAIN, best[0] if best else 0.0):
                    best = gain, trial, filled, cost
            if best is None:
                break
            _, self.slots, here, cost = best
            left -= cost
        return here.score

    def _fill(self, slots: Ints) -> _Filled:
        even = 1.0 / np.bincount(slots, minlength=self.windows.shape[1])[slots]
        share = np.tile(even, (len(self.windows), 1))
        ranks = self.kernel.fill(self.windows[None], slots[None], self.rank_of, share[None], _SWEEPS, _OMEGA)[
            0
        ]
        return _Filled(share, ranks, float(ranks.max(axis=1).sum()) / len(ranks))

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
