"""Notices that the traffic has changed: windows from before say nothing any more of what comes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Loads = npt.NDArray[np.int64]

_LEAST = 0.05  # part of the load that must have gone to other experts
_TIMES = 3.0  # of the distance that neighbouring windows have lately had
_LATELY = 4  # windows that a new one is held against: slow drift is none of its distance
_GUESS = 1.5  # times as far apart as multinomial counts are windows of real traffic, until they were seen


class Shifts:
    """Tells window after window whether it is of other traffic than those before it.

    Distance of a window from the mean of the last few: the part of its tokens that goes to other experts, half the
    sum of the differences of their parts of the load, mean over layers. Multinomial counts of the same traffic
    have some distance too; how many times as far neighbours of this traffic are apart is learned as they come, also
    across shifts, so that traffic which changes with every window soon counts as one.
    """

    def __init__(self) -> None:
        self._scatter: deque[float] = deque([_GUESS], maxlen=16)
        self._lasted: deque[int] = deque(maxlen=4)
        self._age = 0

    def see(self, window: Loads, before: Sequence[Loads]) -> bool:
        """Whether the load [L, E] is of other traffic than the windows before."""
        self._age += 1
        if not before:
            return False
        mean = np.sum([*before][-_LATELY:], axis=0)
        usual = float(np.median(self._scatter)) * _expected(window, mean)
        self._scatter.append(_distance(window, before[-1]) / max(_expected(window, before[-1]), 1e-9))
        if _distance(window, mean) <= max(_LEAST, _TIMES * usual):
            return False
        self._lasted.append(self._age)
        self._age = 0
        return True

    @property
    def typical(self) -> float | None:
        """Windows for which traffic has lately stayed the same; None while it has not shifted twice."""
        return float(np.mean([*self._lasted][1:])) if len(self._lasted) > 1 else None


def _distance(window: Loads, mean: Loads) -> float:
    return float(0.5 * np.abs(_part(window) - _part(mean)).sum(axis=1).mean())


def _part(load: Loads) -> npt.NDArray[np.float64]:
    part: npt.NDArray[np.float64] = load / np.maximum(load.sum(axis=1, keepdims=True), 1)
    return part


def _expected(window: Loads, mean: Loads) -> float:
    """The mean distance of multinomial counts of the same traffic: E|x| = sqrt(2 / pi) sigma."""
    part = _part(mean)
    size = 1 / np.maximum(mean.sum(axis=1), 1) + 1 / np.maximum(window.sum(axis=1), 1)  # [L]
    sigma = np.sqrt(part * (1 - part) * size[:, None])
    return float(0.5 * np.sqrt(2 / np.pi) * sigma.sum(axis=1).mean())
