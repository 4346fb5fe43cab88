"""Random tries on a layer whose replicas' parts are set for each window."""

from __future__ import annotations

import numpy as np

from moeserve.eplb.plain.anneal import SplitMix
from moeserve.eplb.plain.common import F, Singles, in_order
from moeserve.eplb.types import Ints

_LANES = 64
_SWEEPS = 6
_STRETCH = (1.0, 1.5, 2.0, 3.0, 4.0)


def explore(
    load: Singles, count: Ints, slots: Ints, node: Ints, least: int, tries: int, open_from: float, seed: int
) -> None:
    """Changes count [N, E] and slots [N, K, G] in place; load [N, E, T], node [G]."""
    for x, c, s in zip(np.asarray(load, F), count, slots, strict=True):
        _explore(x, c, s, np.asarray(node), least, tries, F(open_from), seed)


def _explore(
    load: Singles, count: Ints, slots: Ints, node: Ints, least: int, tries: int, open_from: F, seed: int
) -> None:
    ranks, experts, windows = slots.shape[1], len(count), load.shape[1]
    blocks = -(-windows // _LANES)
    flat = slots.reshape(-1)
    has = np.zeros((experts, ranks), np.int32)
    np.add.at(has, (flat, np.arange(len(flat)) % ranks), 1)
    spare = int(count.sum()) - experts * least
    mean = in_order(load.T) * (F(1) / F(windows))
    most, here, start = open_from * F(blocks * _LANES), F(0), F(0)
    wide = np.empty((0, experts, _LANES), F)
    for by in _STRETCH:
        if here >= most:
            break
        wide = _stretch(load, mean, blocks, ranks, F(by))
        each = [_flow(block, count, flat, ranks) for block in wide]
        start, here = each[0], in_order(np.array(each))
    random = SplitMix(seed)
    for _ in range(tries if here >= most else 0):
        kind, one, two = random.next(), random.next(), random.next()
        reassign = spare > 0 and kind % 4 == 0
        p, q = one % len(flat), two % len(flat)
        g, h, a, b = p % ranks, q % ranks, int(flat[q]), int(flat[p])
        if a == b or has[a, g] or node[g] != node[h]:
            continue
        if count[b] <= least or count[a] >= ranks if reassign else has[b, h]:
            continue
        flat[p] = a
        if reassign:
            count[a] += 1
            count[b] -= 1
        else:
            flat[q] = b
        first = now = _flow(wide[0], count, flat, ranks)
        if first < start:
            for block in wide[1:]:
                now = now + _flow(block, count, flat, ranks)
        if first < start and now < here * (F(1) - F(1e-6)):
            start, here = first, now
            has[a, g] += 1
            has[b, g] -= 1
            if not reassign:
                has[b, h] += 1
                has[a, h] -= 1
            continue
        flat[p] = b
        if reassign:
            count[a] -= 1
            count[b] += 1
        else:
            flat[q] = a


def _stretch(load: Singles, mean: Singles, blocks: int, ranks: int, by: F) -> Singles:
    """The windows of load [E, T] with their distance from the mean stretched, [blocks, E, lanes]."""
    at = (np.arange(_LANES) * blocks + np.arange(blocks)[:, None]) % load.shape[1]
    wide = np.maximum(mean[:, None] + by * (load - mean[:, None]), F(0))[:, at].transpose(1, 0, 2)
    total: Singles = in_order(wide.transpose(1, 0, 2))
    return np.ascontiguousarray(wide * (F(ranks) / total)[:, None, :])


def _flow(load: Singles, count: Ints, flat: Ints, ranks: int) -> F:
    """Sum over the lanes of load [E, lanes] of the highest rank load, after replicas have evened out their ranks."""
    at_rank = np.zeros((ranks, _LANES), F)
    parts: list[Singles] = []
    ranks_of: list[int] = []
    edges: list[tuple[int, int]] = []
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for p, e in enumerate(flat.tolist()):
        part = load[e]
        if count[e] > 1:
            part = part * (F(1) / F(count[e]))
            if e in last:
                edges.append((last[e], len(parts)))
            first.setdefault(e, len(parts))
            last[e] = len(parts)
            parts.append(part)
            ranks_of.append(p % ranks)
        at_rank[p % ranks] += part
    edges += [(last[e], first[e]) for e in sorted(last) if count[e] > 2]
    edges = [(i, j) for i, j in edges if ranks_of[i] != ranks_of[j]]
    for s in range(_SWEEPS):
        half = F(0.75) if 3 * s < 2 * _SWEEPS else F(0.5)
        for i, j in edges:
            x, z = at_rank[ranks_of[i]], at_rank[ranks_of[j]]
            d = np.maximum(np.minimum(half * (z - x), parts[j]), -parts[i])
            parts[i], parts[j] = parts[i] + d, parts[j] - d
            x += d
            z -= d
    total: F = in_order(at_rank.max(axis=0))
    return total
