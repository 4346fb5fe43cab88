"""Simulated annealing of small layers."""

from __future__ import annotations

import numpy as np

from moeserve.eplb.plain.common import F, Singles, in_order, power
from moeserve.eplb.plain.place import components
from moeserve.eplb.types import Ints


def anneal(
    load: Singles,
    count: Ints,
    slots: Ints,
    node: Ints,
    beta: float,
    steps: int,
    connect: bool,
    least: int,
    seed: int,
) -> None:
    """Changes count [N, E] and slots [N, K, G] in place; experts stay in the nodes [G] in which they stand."""
    for x, c, s in zip(np.asarray(load, F), count, slots, strict=True):
        _anneal(x, c, s, np.asarray(node), F(beta), steps, connect, least, seed)


def _anneal(
    load: Singles,
    count: Ints,
    slots: Ints,
    node: Ints,
    beta: F,
    steps: int,
    connect: bool,
    least: int,
    seed: int,
) -> None:
    ranks = slots.shape[1]
    flat, experts = slots.reshape(-1), len(count)
    has = np.zeros((experts, ranks), np.int32)
    np.add.at(has, (flat, np.arange(len(flat)) % ranks), 1)
    at = np.zeros((experts, ranks), bool)
    at[flat, node[np.arange(len(flat)) % ranks]] = True
    each = load[slots] * (F(1) / count[slots].astype(F))[..., None]
    at_rank: Singles = in_order(each)
    highest = np.maximum(at_rank.max(), F(0))

    def penalty(x: Singles) -> Singles:
        found: Singles = power(beta * (x - highest))
        return found

    energy = in_order(penalty(at_rank).T)
    total, spare = in_order(energy), int(count.sum()) - experts * least
    best, parts = _highest_mean(at_rank), components(slots, count) if connect else 0
    kept = count.copy(), slots.copy()
    random = SplitMix(seed)
    for step in range(steps):
        left = F(steps - step) / F(steps)
        heat = F(4) * (left * left) + F(0.002)
        kind, one, two = random.next(), random.next(), random.next()
        chance = F(random.next() >> 40) * F(1 / 16777216)
        reassign = spare > 0 and kind % 2 == 0
        p, q = one % len(flat), two % len(flat)
        g, h, b = p % ranks, q % ranks, int(flat[p])
        a = two % experts if reassign else int(flat[q])
        if a == b or has[a, g] or not at[a, node[g]]:
            continue
        if count[b] <= least or count[a] >= ranks if reassign else has[b, h] or node[g] != node[h]:
            continue
        na, nb = F(count[a]), F(count[b])
        if reassign:
            ranks_touched = [g, *(int(x) for x in np.flatnonzero(has[a] + has[b]) if x != g)]
            fa = has[a, ranks_touched].astype(F) * (F(1) / (na + F(1)) - F(1) / na)
            fb = has[b, ranks_touched].astype(F) * (F(1) / (nb - F(1)) - F(1) / nb)
            fa[0], fb[0] = F(1) / (na + F(1)), fb[0] - F(1) / (nb - F(1))
        else:
            ranks_touched = [g, h]
            fa = np.array([F(1) / na, F(-1) / na], F)
            fb = np.array([F(-1) / nb, F(1) / nb], F)
        now = (at_rank[ranks_touched] + fa[:, None] * load[a]) + fb[:, None] * load[b]
        after = in_order(penalty(now).T)
        change = in_order(after - energy[ranks_touched])
        if change > 0 and not chance < power(-(change / (heat * total))):
            continue
        before = int(flat[q])
        flat[p] = a
        if reassign:
            count[a] += 1
            count[b] -= 1
        else:
            flat[q] = b
        if connect and components(slots, count) > parts:
            flat[p] = b
            if reassign:
                count[a] -= 1
                count[b] += 1
            else:
                flat[q] = before
            continue
        has[a, g] += 1
        has[b, g] -= 1
        if not reassign:
            has[b, h] += 1
            has[a, h] -= 1
        energy[ranks_touched], at_rank[ranks_touched] = after, now
        total = in_order(energy)
        score = _highest_mean(at_rank)
        if score < best:
            best, kept = score, (count.copy(), slots.copy())
    count[:], slots[:] = kept


def _highest_mean(at_rank: Singles) -> F:
    total: F = in_order(at_rank.max(axis=0)) / F(at_rank.shape[1])
    return total


class SplitMix:
    """Random 64-bit numbers (Steele, Lea, Flood 2014)."""

    def __init__(self, seed: int) -> None:
        self.state = seed

    def next(self) -> int:
        mask = (1 << 64) - 1
        self.state = (self.state + 0x9E3779B97F4A7C15) & mask
        z = ((self.state ^ (self.state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)
