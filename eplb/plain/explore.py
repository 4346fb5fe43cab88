"""Random tries on a layer whose replicas' parts are set for each window."""

from __future__ import annotations

import numpy as np

from moeserve.eplb.plain.anneal import SplitMix
from moeserve.eplb.plain.common import F, Singles, in_order
from moeserve.eplb.plain.flow import LANES, routed
from moeserve.eplb.types import Ints

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
    blocks = -(-windows // LANES)
    flat = slots.reshape(-1)
    has = np.zeros((experts, ranks), np.int32)
    np.add.at(has, (flat, np.arange(len(flat)) % ranks), 1)
    spare = int(count.sum()) - experts * least
    mean = in_order(load.T) * (F(1) / F(windows))
    most, here, start = open_from * F(blocks * LANES), F(0), F(0)
    wide = np.empty((0, experts, LANES), F)
    for by in _STRETCH:
        if here >= most:
            break
        wide = _stretch(load, mean, blocks, ranks, F(by))
        each = [routed(block, count, flat, ranks).total for block in wide]
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
        first = now = routed(wide[0], count, flat, ranks).total
        if first < start:
            for block in wide[1:]:
                now = now + routed(block, count, flat, ranks).total
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
    at = (np.arange(LANES) * blocks + np.arange(blocks)[:, None]) % load.shape[1]
    wide = np.maximum(mean[:, None] + by * (load - mean[:, None]), F(0))[:, at].transpose(1, 0, 2)
    total: Singles = in_order(wide.transpose(1, 0, 2))
    return np.ascontiguousarray(wide * (F(ranks) / total)[:, None, :])
