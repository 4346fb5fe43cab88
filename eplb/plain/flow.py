"""What is left of windows after replicas have evened out their ranks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeserve.eplb.plain.common import F, Singles, in_order
from moeserve.eplb.types import Ints

LANES = 64
"""Windows that are worked on side by side, at most."""

FEW = 16

_SWEEPS = 6


class Routed(NamedTuple):
    """total: over the lanes, of the highest rank load. at_rank [G, lanes]. parts: loads [lanes] of replicas by slot."""

    total: F
    at_rank: Singles
    parts: dict[int, Singles]


def routed(load: Singles, count: Ints, flat: Ints, ranks: int) -> Routed:
    """For load [E, lanes] over slots flat [K * G]."""
    at_rank = np.zeros((ranks, load.shape[1]), F)
    parts: list[Singles] = []
    ranks_of: list[int] = []
    where: list[int] = []
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
            where.append(p)
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
    return Routed(total, at_rank, dict(zip(where, parts, strict=True)))
