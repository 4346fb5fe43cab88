"""Few slot changes for replicas whose parts are set for each window."""

from __future__ import annotations

import numpy as np

from moeserve.eplb.plain.common import F, Singles, in_order
from moeserve.eplb.plain.flow import FEW, LANES, Routed, routed
from moeserve.eplb.types import Ints

_CANDIDATES = 24
_SLOPE = F(60) / F(64)


def follow(
    load: Singles, count: Ints, slots: Ints, least: int, budget: int, target: float, least_gain: float
) -> Singles:
    """Changes count [N, E] and slots [N, K, G] in place; imbalance [N]. load [N, E, T], T 64 at most."""
    layers = zip(np.asarray(load, F), count, slots, strict=True)
    return np.array([_follow(x, c, s, least, budget, F(target), F(least_gain)) for x, c, s in layers], F)


def _follow(load: Singles, count: Ints, slots: Ints, least: int, left: int, target: F, least_gain: F) -> F:
    ranks, flat = slots.shape[1], slots.reshape(-1)
    lanes = FEW if load.shape[1] <= FEW else LANES
    wide = load[:, np.arange(lanes) % load.shape[1]]
    here = routed(wide, count, flat, ranks)
    while left > 0 and here.total > target * F(lanes):
        chosen, best = None, least_gain * F(lanes)
        for n, (kind, p, q) in enumerate(_candidates(wide, count, flat, ranks, here, least, left)):
            if n >= 8 and chosen is not None:
                break
            trial_count, trial = count.copy(), flat.copy()
            _move(trial_count, trial, kind, p, q)
            gain = here.total - routed(wide, trial_count, trial, ranks).total
            if not kind:
                gain = gain * F(0.5)
            if gain > best:
                chosen, best = (kind, p, q), gain
        if chosen is None:
            break
        _move(count, flat, *chosen)
        here = routed(wide, count, flat, ranks)
        left -= 1 if chosen[0] else 2
    score: F = here.total * (F(1) / F(lanes))
    return score


def _move(count: Ints, flat: Ints, kind: int, p: int, q: int) -> None:
    a, b = flat[p], flat[q]
    flat[q] = a
    if kind:
        count[a] += 1
        count[b] -= 1
    else:
        flat[p] = b


def _candidates(
    wide: Singles, count: Ints, flat: Ints, ranks: int, here: Routed, least: int, left: int
) -> list[tuple[int, int, int]]:
    """(kind, p, q) by estimated gain: kind 1 puts a replica of slot p's expert, on the hottest rank, into slot q; kind
    0 swaps the two."""
    top = here.at_rank.max(axis=0)
    heat = np.maximum(F(1) + _SLOPE * (here.at_rank - top), F(0))
    for _ in range(6):
        heat = heat * heat
    heat = heat / in_order(heat)
    h = int(np.argmax(in_order(heat.T)))
    even = np.full(wide.shape[1], F(1) / F(ranks), F)
    load = np.stack([here.parts.get(p, wide[e]) for p, e in enumerate(flat.tolist())])
    at = np.arange(len(flat)) % ranks
    own, hot, mean = _dot(load, heat[at]), _dot(load, heat[h]), _dot(load, even)
    has = np.zeros((len(count), ranks), bool)
    has[flat, at] = True
    found: list[tuple[F, tuple[int, int, int]]] = []
    for p in range(h, len(flat), ranks):
        to = _dot(load[p], heat)
        relief = to[h] - to[at]
        copy = F(0.5) * relief + (own - mean)
        swap = F(0.5) * (relief - (hot - own))
        alone = count[flat[p]] == 1
        for q in np.flatnonzero(~has[flat[p], at]):
            b = flat[q]
            if count[b] > least and copy[q] > 0:
                found.append((-copy[q], (1, p, int(q))))
            if left >= 2 and alone and count[b] == 1 and swap[q] > 0:
                found.append((-swap[q], (0, p, int(q))))
    order = np.argsort(np.array([score for score, _ in found], F), kind="stable")[:_CANDIDATES]
    return [found[n][1] for n in order]


def _dot(a: Singles, b: Singles) -> Singles:
    """Over the lanes, sixteen at a time as kernels.c does; [..., lanes] each."""
    product = (a * b).reshape(*np.broadcast_shapes(a.shape, b.shape)[:-1], -1, 16)
    lanes = in_order(np.moveaxis(product, -2, 0))
    total: Singles = in_order(np.moveaxis(lanes, -1, 0))
    return total
