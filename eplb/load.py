"""Expert loads: routed counts of logical experts by window and layer, and what was known when they were taken."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moeserve.eplb.types import Floats, Placement

Phase = Literal["prefill", "decode", "mixed"]
PHASES: tuple[Phase, ...] = ("prefill", "decode", "mixed")


@dataclass(frozen=True)
class Window:
    """When a window was recorded: steps counted from start_step, over which `tokens` tokens were routed."""

    phase: Phase = "mixed"
    start_step: int = 0
    steps: int = 1
    tokens: int = 0
    start_time: str | None = None


@dataclass(frozen=True, eq=False)
class ExpertLoad:
    """load [W, L, E]: routed (token, choice) counts of logical experts, padding excluded, over all ranks.

    layers: absolute layer ids of the MoE layers, ascending. top_k, ep_size and ranks_per_node are 0 and
    expert_groups is 1 where unknown. placement: the one in force while recording, None for the identity.
    """

    load: npt.NDArray[np.int64]
    layers: tuple[int, ...]
    windows: tuple[Window, ...]
    model: str = ""
    top_k: int = 0
    expert_groups: int = 1
    ep_size: int = 0
    ranks_per_node: int = 0
    placement: Placement | None = None

    def __post_init__(self) -> None:
        load = check_counts(self.load, "load")
        if load.ndim != 3:
            raise ValueError(f"load has shape {load.shape}, expected [windows, layers, experts]")
        windows, layers, experts = load.shape
        if windows < 1:
            raise ValueError("there is no window: nothing was recorded")
        if experts < 1 or layers < 1:
            raise ValueError(f"load has {layers} layers and {experts} experts, expected one at least of each")
        if len(self.layers) != layers:
            raise ValueError(f"layers has {len(self.layers)} entries, load has {layers} layers")
        if any(a >= b for a, b in zip(self.layers, self.layers[1:], strict=False)):
            raise ValueError("layers must be ascending layer ids")
        if len(self.windows) != windows:
            raise ValueError(f"there are {len(self.windows)} windows, load has {windows}")
        load.setflags(write=False)
        object.__setattr__(self, "load", load)

    @property
    def num_windows(self) -> int:
        return int(self.load.shape[0])

    @property
    def num_layers(self) -> int:
        return int(self.load.shape[1])

    @property
    def num_experts(self) -> int:
        return int(self.load.shape[2])

    def take(self, which: slice | npt.NDArray[Any]) -> ExpertLoad:
        """The chosen windows; ValueError when there is none among them."""
        index = np.arange(self.num_windows)[which]
        return replace(self, load=self.load[index], windows=tuple(self.windows[i] for i in index))

    def of_phase(self, phase: Literal["prefill", "decode", "all"]) -> ExpertLoad:
        """The windows of the phase; mixed windows belong to both."""
        if phase == "all":
            return self
        wanted = np.array([w.phase in (phase, "mixed") for w in self.windows])
        if not wanted.any():
            raise ValueError(f"no window of phase {phase}: there are only {', '.join(self.phases)}")
        return self.take(np.flatnonzero(wanted))

    @property
    def phases(self) -> tuple[Phase, ...]:
        return tuple(phase for phase in PHASES if any(w.phase == phase for w in self.windows))

    def split(self, holdout: float) -> tuple[ExpertLoad, ExpertLoad | None]:
        """(the earlier windows, the last ones); the second is None when one window is all there is."""
        if not 0 <= holdout < 1:
            raise ValueError(f"holdout = {holdout}: give a fraction from 0 to below 1")
        last = min(int(round(self.num_windows * holdout)) or int(holdout > 0), self.num_windows - 1)
        if last < 1:
            return self, None
        return self.take(slice(0, -last)), self.take(slice(-last, None))


def check_counts(values: Any, name: str) -> npt.NDArray[np.int64]:
    """values as whole numbers of 0 and up, else ValueError naming the first that is not."""
    array = np.asarray(values)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{name} holds {array.dtype}, expected numbers in rows of equal length")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{_place(name, ~np.isfinite(array))} is not a finite number")
    if array.size and array.min() < 0:
        raise ValueError(
            f"{_place(name, array < 0)} = {array[array < 0][0]} is negative, counts are 0 or more"
        )
    if array.size and array.max() > 2**53:
        raise ValueError(f"{_place(name, array > 2**53)} is larger than 2^53")
    if array.dtype.kind == "f" and (array != np.rint(array)).any():
        raise ValueError(f"{_place(name, array != np.rint(array))} is not a whole number, loads are counts")
    return np.array(array, dtype=np.int64)


def _place(name: str, wrong: npt.NDArray[np.bool_]) -> str:
    return name + "".join(f"[{i}]" for i in np.argwhere(wrong)[0])


def merge_windows(windows: npt.NDArray[Any], most: int) -> Floats:
    """[W, L, E] to at most `most` windows: neighbours are summed into groups of (almost) equal number."""
    count = len(windows)
    if count <= most:
        return np.asarray(windows, np.float64)
    if count % most == 0:
        groups = np.asarray(windows).reshape(most, count // most, *windows.shape[1:])
        merged: Floats = groups.sum(axis=1, dtype=np.float64)
        return merged
    starts = np.arange(most) * count // most
    return np.add.reduceat(np.asarray(windows, np.float64), starts, axis=0)
