"""Give a new placement rank numbers and slot order so that most of what stands stays where it is."""

from __future__ import annotations

import numpy as np

from moeserve.eplb.types import Ints, Topology


def keep_in_place(old: Ints, new: Ints, topology: Topology) -> Ints:
    """new [L, P] with its ranks exchanged (within a node where there are several) and slots reordered, so that
    as few slots as possible differ from old [L, P]. What each rank holds together stays together."""
    # imported here: it takes longer than all else that the command line imports
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    ranks, width = topology.num_ranks, topology.ranks_per_node
    whole = topology.num_nodes == 1 or ranks % width != 0
    result = np.empty_like(new)
    for layer, (before, after) in enumerate(zip(old, new, strict=True)):
        was, now = before.reshape(ranks, -1), after.reshape(ranks, -1)
        same = _overlap(was, now)
        place = np.arange(ranks)
        for start in (0,) if whole else range(0, ranks, width):
            part = slice(0, ranks) if whole else slice(start, start + width)
            at, of = linear_sum_assignment(-same[part, part])
            place[part.start + at] = part.start + of
        result[layer] = np.concatenate([align(was[g], now[place[g]]) for g in range(ranks)])
    return result


def align(before: Ints, after: Ints) -> Ints:
    """The experts of `after` in an order in which those that stay keep their slot of `before`."""
    left = after.tolist()
    row = np.full(len(before), -1, after.dtype)
    for slot, expert in enumerate(before.tolist()):
        if expert in left:
            left.remove(expert)
            row[slot] = expert
    row[row < 0] = left
    return row


def _overlap(was: Ints, now: Ints) -> Ints:
    """[G, G] experts that rank i held and row j has."""
    experts = int(max(was.max(), now.max())) + 1
    held, has = (np.stack([np.bincount(r, minlength=experts) for r in rows]) for rows in (was, now))
    common: Ints = np.minimum(held[:, None, :], has[None, :, :]).sum(axis=2).astype(np.int32)
    return common
