"""Water filling of routing shares."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moeserve.eplb.types import Floats, Ints


def fill(load: Floats, slots: Ints, rank_of: Ints, share: Floats, sweeps: int, omega: float) -> Floats:
    """Changes share [N, B, P] in place for loads [N, B, E] over slots [N, P]; load of each rank [N, B, G]."""
    ranks = np.zeros((*load.shape[:2], int(rank_of.max()) + 1))
    for n, row in enumerate(slots):
        _fill(load[n], row, rank_of, share[n], sweeps, omega, ranks[n])
    return ranks


def _fill(
    load: Floats, slots: Ints, rank_of: Ints, share: Floats, sweeps: int, omega: float, ranks: Floats
) -> None:
    for p, e in enumerate(slots):
        ranks[:, rank_of[p]] += load[:, e] * share[:, p]
    hosts = []
    for e in range(load.shape[1]):
        at = np.flatnonzero(slots == e).astype(np.int32)
        on, first, which = np.unique(rank_of[at], return_index=True, return_inverse=True)
        for i, slot in enumerate(at):  # of slots on one rank the first takes all
            if sweeps and first[which[i]] != i:
                share[:, at[first[which[i]]]] += share[:, slot]
                share[:, slot] = 0.0
        if len(on) > 1:
            hosts.append((e, np.sort(at[first])))
    for s in range(sweeps):
        step = omega if 3 * s < 2 * sweeps and s + 1 < sweeps else 1.0
        for e, at in hosts:
            rows = np.flatnonzero(load[:, e] > 0)
            spread = _fill_two if len(at) == 2 else _fill_many
            spread(rows, load[rows, e], at, rank_of[at], step, share, ranks)


def _fill_two(
    rows: npt.NDArray[np.int64], w: Floats, at: Ints, rank: Ints, step: float, share: Floats, ranks: Floats
) -> None:
    x = share[rows, at[0]]
    a, b = ranks[rows, rank[0]] - w * x, ranks[rows, rank[1]] - w * (1.0 - x)
    y = np.clip(x + step * (((b - a) + w) / (2.0 * w) - x), 0.0, 1.0)
    share[rows, at[0]], share[rows, at[1]] = y, 1.0 - y
    ranks[rows, rank[0]], ranks[rows, rank[1]] = a + w * y, b + w * (1.0 - y)


def _fill_many(
    rows: npt.NDArray[np.int64], w: Floats, at: Ints, rank: Ints, step: float, share: Floats, ranks: Floats
) -> None:
    level = np.sort(ranks[rows[:, None], rank] - w[:, None] * share[rows[:, None], at], axis=1)
    water = (w[:, None] + np.cumsum(level, axis=1)) / np.arange(1.0, len(at) + 1)
    full = np.concatenate([water[:, :-1] <= level[:, 1:], np.ones((len(rows), 1), bool)], axis=1)
    surface = water[np.arange(len(rows)), np.argmax(full, axis=1)]
    total = np.zeros(len(rows))
    for slot, g in zip(at, rank, strict=True):
        x = share[rows, slot]
        b = ranks[rows, g] - w * x
        y = np.maximum(x + step * (np.maximum(surface - b, 0.0) / w - x), 0.0)
        ranks[rows, g], share[rows, slot] = b, y
        total += y
    for slot, g in zip(at, rank, strict=True):
        share[rows, slot] = share[rows, slot] / total
        ranks[rows, g] += w * share[rows, slot]
