"""Where the dashboard's figures come from: what was recorded, and where it stands. Needs numpy alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from moeserve.eplb.formats.detect import read_load
from moeserve.eplb.load import ExpertLoad
from moeserve.eplb.metrics import rank_load
from moeserve.eplb.types import Floats, Placement, Topology

if TYPE_CHECKING:
    from moeserve.expert_balance import Imbalance


@dataclass(frozen=True, eq=False)
class Recording:
    """Windows of expert load and the placement that they met. It does not change; version tells it from others.

    make_load: called once, from any thread. last_time: seconds since the epoch, of the newest count. recent:
    imbalance of the last seconds of a running engine, by phase. previous: the placement before the one in force.
    rebalances: as /eplb/status has them, newest first. measured: by phase what the ranks were really given in each
    window, [W, L, G], where slots were counted. expert_bytes: weights of an expert in a layer, 0 where unknown.
    lost: numbers of ranks that the engine started with and goes on without.
    """

    version: str
    make_load: Callable[[], ExpertLoad]
    placement: Placement
    topology: Topology
    last_time: float | None = None
    recent: Mapping[str, Imbalance] = field(default_factory=dict)
    previous: Placement | None = None
    rebalances: tuple[dict[str, Any], ...] = ()
    make_measured: Callable[[], dict[str, Floats]] = dict
    expert_bytes: int = 0
    routing: str | None = None
    lost: tuple[int, ...] = ()
    _ranks: dict[str, Floats] = field(default_factory=dict, init=False)

    @cached_property
    def load(self) -> ExpertLoad:
        return self.make_load()

    @cached_property
    def measured(self) -> dict[str, Floats]:
        return self.make_measured()

    def of_phase(self, phase: str) -> ExpertLoad:
        """The windows of this phase alone: mixed ones are a phase of their own here."""
        chosen = np.flatnonzero([window.phase == phase for window in self.load.windows])
        if not len(chosen):
            raise ValueError(f"phase = {phase!r}: there are windows of {', '.join(self.load.phases)}")
        return self.load.take(chosen)

    def rank_load(self, phase: str) -> Floats:
        """[W, L, G] of the phase's windows."""
        if phase not in self._ranks:
            self._ranks[phase] = rank_load(self.of_phase(phase).load, self.placement, self.topology)
        return self._ranks[phase]


class Shown(Protocol):
    """file: the name of what is shown, None for a running engine. state: of its balancer."""

    @property
    def model(self) -> str: ...

    @property
    def file(self) -> str | None: ...

    @property
    def state(self) -> str | None: ...

    @property
    def version(self) -> str:
        """Another one when there is more to show."""


class Source(Shown, Protocol):
    def read(self) -> Recording | None:
        """What there is now; None before the first count. Cheap."""


class FileSource:
    """A recorded file, of any engine whose format eplb-offline reads."""

    state: str | None = None
    version = "file"

    def __init__(
        self,
        path: Path,
        ep_size: int | None = None,
        ranks_per_node: int | None = None,
        expert_bytes: int = 0,
    ) -> None:
        """ep_size, ranks_per_node: in place of the recorded ones. Raises ValueError as read_load does, and where
        the file does not say on how many ranks it was recorded."""
        load = read_load(path)
        ranks = ep_size or load.ep_size
        if ranks < 1:
            raise ValueError(f"{path} does not say on how many ranks it was recorded: give --ep-size")
        slots = -(-load.num_experts // ranks) * ranks
        if load.placement is not None and ranks == load.ep_size:
            slots = load.placement.num_slots
        per_node = ranks_per_node or (load.ranks_per_node if ranks == load.ep_size else 0)
        topology = Topology.of(ranks, slots, min(per_node, ranks))
        in_order = Placement.identity(load.num_layers, load.num_experts, slots)
        in_force = load.placement if load.placement is not None and ranks == load.ep_size else in_order
        self.model = load.model
        self.file: str | None = path.name
        self._recording = Recording(self.version, lambda: load, in_force, topology, expert_bytes=expert_bytes)

    def read(self) -> Recording:
        return self._recording
