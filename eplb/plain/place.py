"""Loads scaled for solving, replica counts, and the first placement."""

from __future__ import annotations

import numpy as np

from moeserve.eplb.plain.common import F, Singles, in_order
from moeserve.eplb.types import Floats, Ints


def prepare(windows: Floats, ranks: int) -> tuple[Singles, Floats, Floats]:
    """(load [N, E, T], mean [N, E], std [N, E]) of windows [T, N, E], with a mean rank load of 1."""
    total = in_order(np.moveaxis(windows, 2, 0))[..., None]
    some = total > 0
    scale = np.where(some, ranks / np.where(some, total, 1.0), 0.0)
    scaled = windows * scale + np.where(some, 0.0, ranks / windows.shape[2])
    mean = in_order(scaled) / float(len(windows))
    load = np.ascontiguousarray(scaled.transpose(1, 2, 0), F)
    apart = load.transpose(2, 0, 1).astype(np.float64) - mean
    return load, mean, np.sqrt(in_order(apart * apart) / float(len(windows)))


def replicate(weight: Singles, ranks: int, slots: int, least: int) -> Ints:
    """Replica counts [N, E] for weight [N, E], `least` each and `slots` in all."""
    weight = np.asarray(weight, F)
    counts = np.full(weight.shape, least, np.int32)
    for w, count in zip(weight, counts, strict=True):
        each = w / F(least)
        for _ in range(slots - len(w) * least):
            free = np.where(count < ranks, each, F(-1))
            best = int(np.argmax(free if (count < ranks).any() else each))
            count[best] += 1
            each[best] = w[best] / F(count[best])
    return counts


def place(load: Singles, count: Ints, order: Ints, ranks: int, z: float, connect: bool) -> Ints:
    """slots [N, K, G] for load [N, E, T], the experts taken in order [N, E]."""
    rows = [
        _part_doubles(_place(x, c, o, ranks, F(z), connect), len(c))
        for x, c, o in zip(np.asarray(load, F), count, order, strict=True)
    ]
    return np.stack(rows)


def _place(load: Singles, count: Ints, order: Ints, ranks: int, z: F, connect: bool) -> Ints:
    windows, per_rank = load.shape[1], int(count.sum()) // ranks
    inverse = F(1) / F(windows)
    slots = np.full((per_rank, ranks), -1, np.int32)
    mean, dev = np.zeros(ranks, F), np.zeros((windows, ranks), F)
    used, degree, size = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64), np.ones(ranks, np.int64)
    parent = np.arange(ranks)
    for spread in (True, False) if connect else (False,):
        for e in order:
            if connect and (count[e] > 1) != spread:
                continue
            own = load[e] / F(count[e])
            each = in_order(own) * inverse
            own = own - each
            holds = np.zeros(ranks, bool)
            for _ in range(count[e]):
                if spread:
                    component = np.isin(parent, parent[holds])
                    cost = (mean + (100 * degree).astype(F)) + np.where(
                        component, F(1e8), (10000 * size[parent]).astype(F)
                    )
                else:
                    step = dev + own[:, None]
                    cost = (mean + each) + z * np.sqrt(in_order(step * step) * inverse)
                cost = np.where(holds, cost + F(1e9), cost)
                best = int(np.argmin(np.where(used < per_rank, cost, np.inf)))
                slots[used[best], best] = e
                used[best] += 1
                holds[best] = True
                mean[best] += each
                dev[:, best] += own
                degree[best] += spread
            if spread:
                first = parent[np.flatnonzero(holds)[0]]
                for g in np.flatnonzero(holds):
                    if parent[g] != first:
                        size[first] += size[parent[g]]
                        parent[parent == parent[g]] = first
    return slots


def _part_doubles(slots: Ints, num_experts: int) -> Ints:
    """Where an expert stands twice on a rank, swap one of the two for what another rank can give."""
    ranks = slots.shape[1]
    flat = slots.ravel()
    has = np.zeros((num_experts, ranks), np.int32)
    np.add.at(has, (flat, np.arange(len(flat)) % ranks), 1)
    for p in range(len(flat)):
        e, g = flat[p], p % ranks
        if has[e, g] < 2:
            continue
        for q in range(len(flat)):
            x, h = flat[q], q % ranks
            if not has[e, h] and (not has[x, g] or has[x, h] > 1):
                flat[p], flat[q] = x, e
                has[e, g] -= 1
                has[x, h] -= 1
                has[x, g] += 1
                has[e, h] += 1
                break
    return slots


def components(slots: Ints, count: Ints) -> int:
    """Number of components of the graph of ranks joined by a shared expert; slots [K, G]."""
    ranks = slots.shape[1]
    parent = np.arange(ranks)
    first: dict[int, int] = {}
    for p, e in enumerate(slots.ravel().tolist()):
        if count[e] < 2:
            continue
        a, b = parent[first.setdefault(e, p % ranks)], parent[p % ranks]
        if a != b:
            parent[parent == b] = a
    return len(set(parent.tolist()))
