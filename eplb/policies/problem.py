"""What a policy is given: loads scaled for solving, the topology and the constraints."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from moeserve.eplb.load import merge_windows
from moeserve.eplb.native import Kernels, kernels
from moeserve.eplb.types import Floats, Ints, Placement, Topology

Routing = Literal["even", "shares", "step"]
"""How replicas split their expert's tokens: equally, by the placement's shares, or anew for each step's load."""

ROUTINGS: tuple[Routing, ...] = get_args(Routing)

MOST_WINDOWS = {"even": 64, "shares": 32, "step": 32}
"""Windows that a solver looks at; more are summed into this many. An even split gains longer from more of them:
nothing evens out later what the placement did not foresee."""

MOST_SAMPLES = 1024
"""Windows as given that a search for routing step by step looks at; of more, some are left out."""


@dataclass(frozen=True, eq=False)
class Problem:
    """Windows [W, L, E] of load to place on a topology.

    routing: how replicas will share. samples: windows as given, for routing step by step: what that has to even out
    in one step does not show in sums of many. expert_groups: consecutive experts that routing picks
    as a group (1: none). survive_rank_loss: every expert stands on two ranks at least.
    """

    windows: Floats
    topology: Topology
    expert_groups: int = 1
    survive_rank_loss: bool = False
    routing: Routing = "shares"
    samples: Floats | None = None

    def __post_init__(self) -> None:
        if self.windows.ndim != 3 or 0 in self.windows.shape:
            raise ValueError(f"the load has shape {self.windows.shape}, expected [windows, layers, experts]")
        if not np.isfinite(self.windows).all() or (self.windows < 0).any():
            raise ValueError("the load holds negative or non-finite numbers")
        ranks, slots = self.topology.num_ranks, self.topology.num_slots
        if slots < self.num_experts:
            raise ValueError(
                f"num_slots = {slots} is less than num_experts = {self.num_experts}: every expert needs a slot; "
                f"give {-(-self.num_experts // ranks) * ranks} or more"
            )
        if self.expert_groups < 1 or self.num_experts % self.expert_groups:
            raise ValueError(
                f"expert_groups = {self.expert_groups} does not divide num_experts = {self.num_experts}"
            )
        if self.survive_rank_loss and (ranks < 2 or slots < 2 * self.num_experts):
            raise ValueError(
                f"surviving a rank loss needs two ranks and num_slots >= {2 * self.num_experts} (each expert "
                f"twice); there are {ranks} ranks and {slots} slots"
            )

    @classmethod
    def of(
        cls,
        load: npt.ArrayLike,
        topology: Topology,
        *,
        objective: str = "windows",
        expert_groups: int = 1,
        survive_rank_loss: bool = False,
        routing: Routing = "shares",
    ) -> Problem:
        """load [L, E], or windows [W, L, E]; objective "mean" sums the windows into one."""
        if objective not in ("windows", "mean"):
            raise ValueError(f"objective = {objective!r}: give windows or mean")
        windows = np.asarray(load)
        if windows.dtype.kind not in "iuf":
            raise ValueError(f"the load holds {windows.dtype}, expected numbers")
        if windows.ndim == 2:
            windows = windows[None]
        if windows.ndim != 3 or 0 in windows.shape:
            raise ValueError(
                f"the load has shape {windows.shape}, expected [layers, experts] or [windows, ...]"
            )
        if objective == "mean":
            windows = merge_windows(windows, 1)
        samples = _some(windows, MOST_SAMPLES) if routing == "step" else None
        windows = merge_windows(windows, MOST_WINDOWS[routing])
        return cls(windows, topology, expert_groups, survive_rank_loss, routing, samples)

    @property
    def num_layers(self) -> int:
        return int(self.windows.shape[1])

    @property
    def num_experts(self) -> int:
        return int(self.windows.shape[2])

    @property
    def num_windows(self) -> int:
        return int(self.windows.shape[0])

    @property
    def redundant(self) -> int:
        return self.topology.num_slots - self.num_experts

    @property
    def weighted(self) -> bool:
        """Whether replicas can take unequal parts."""
        return self.routing != "even"

    @property
    def least(self) -> int:
        """Replicas that every expert has at least."""
        return 2 if self.survive_rank_loss else 1

    @property
    def kernels(self) -> Kernels:
        return kernels()

    @cached_property
    def prepared(self) -> tuple[npt.NDArray[np.float32], Floats, Floats]:
        """(load [L, E, W] with a mean rank load of 1, its mean and its standard deviation [L, E])."""
        return self.kernels.prepare(self.windows, self.topology.num_ranks)

    def placement(self, slots: Ints) -> Placement:
        """Slots [L, P], rank-major, as a placement."""
        return Placement(slots, self.num_experts)


def _some(windows: npt.NDArray[Any], most: int) -> Floats:
    """At most so many of the windows, from all over."""
    count = len(windows)
    return np.asarray(windows if count <= most else windows[np.arange(most) * count // most], np.float64)


def rank_major(slots: Ints) -> Ints:
    """[L, K, G] of the kernels to [L, P]."""
    return np.ascontiguousarray(slots.transpose(0, 2, 1)).reshape(len(slots), -1)


def slot_major(slots: Ints, ranks: int) -> Ints:
    """[L, P] to [L, K, G] of the kernels, always a copy: they write into it."""
    return np.array(slots.reshape(len(slots), ranks, -1).transpose(0, 2, 1), np.int32, order="C")
