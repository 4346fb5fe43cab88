"""What the plain kernels share: precision, sums in a fixed order, the penalty, and the options of improve."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Singles = npt.NDArray[np.float32]
F = np.float32

_LANES = 16


class Options(NamedTuple):
    """How improve works.

    beta: steepness of the penalty. least_gain: smallest relative gain on the ranks concerned. rounds: tries at
    most. patience: hottest ranks without a gain before giving up. budget: changed slots at most, below 0 no
    limit. connect: the number of components does not rise. reassign: redundant slots may go to another expert.
    least: replicas that every expert keeps.
    """

    beta: float
    least_gain: float
    rounds: int
    patience: int
    budget: int
    connect: bool
    reassign: bool
    least: int


def in_order(values: npt.NDArray[Any]) -> Any:
    """Sum over axis 0 from first to last; numpy's own sum may go in another order."""
    return np.add.accumulate(values, axis=0)[-1]


def by_lanes(values: Singles) -> F:
    """Sum of [ranks, T], 16 lanes at a time, as kernels.c does."""
    short = -values.shape[1] % _LANES
    padded = np.pad(values, ((0, 0), (0, short))).reshape(len(values), -1, _LANES)
    lanes = in_order(np.concatenate([np.zeros((1, len(values), _LANES), F), padded.transpose(1, 0, 2)]))
    total: F = in_order(lanes.ravel())
    return total


def power(x: Any) -> Any:
    """(1 + x / 1024) ^ 1024 in place of exp(x): products only, the same bits everywhere; not below 8e-38."""
    y = np.maximum(F(1) + x * F(1 / 1024), F(0.92))
    for _ in range(10):
        y = y * y
    return y
