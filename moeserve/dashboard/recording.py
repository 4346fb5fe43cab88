"""Where the dashboard's figures come from: a running engine, or a file of recorded expert load."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from moeserve.eplb.formats.detect import read_load
from moeserve.eplb.load import ExpertLoad
from moeserve.eplb.metrics import rank_load
from moeserve.eplb.types import Floats, Placement, Topology
from moeserve.expert_balance import ExpertBalance, Imbalance


@dataclass(frozen=True, eq=False)
class Recording:
    """Windows of expert load and the placement that they met. It does not change; version tells it from others.

    make_load: called once, from any thread. last_time: seconds since the epoch, of the newest count. recent:
    imbalance of the last seconds of a running engine, by phase.
    """

    version: str
    make_load: Callable[[], ExpertLoad]
    placement: Placement
    topology: Topology
    last_time: float | None = None
    recent: dict[str, Imbalance] = field(default_factory=dict)
    _ranks: dict[str, Floats] = field(default_factory=dict, init=False)

    @cached_property
    def load(self) -> ExpertLoad:
        return self.make_load()

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


class Source(Protocol):
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

    def read(self) -> Recording | None:
        """What there is now; None before the first count. Cheap."""


class LiveSource:
    """The counts of a running engine."""

    file: str | None = None

    def __init__(self, balance: ExpertBalance) -> None:
        self.model = balance.model
        self._balance = balance
        self._begun = time.time_ns() // 1_000_000  # a server that starts again has other versions

    @property
    def state(self) -> str | None:
        return self._balance.state

    @property
    def version(self) -> str:
        windows = self._balance.ring.windows
        newest = f"{len(windows)}.{windows[-1].end:.3f}" if windows else "0"
        return f"{self._begun}.{self._balance.placement.generation}.{newest}"

    def read(self) -> Recording | None:
        balance, windows = self._balance, self._balance.ring.windows
        if not windows:
            return None
        return Recording(
            self.version,
            lambda: balance.load_of(windows),
            balance.placement,
            balance.topology,
            windows[-1].end,
            {str(phase): found for phase, found in balance.imbalance().items()},
        )


class FileSource:
    """A recorded file, of any engine whose format eplb-offline reads."""

    state: str | None = None
    version = "file"

    def __init__(self, path: Path, ep_size: int | None = None, ranks_per_node: int | None = None) -> None:
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
        self._recording = Recording(self.version, lambda: load, in_force, topology)

    def read(self) -> Recording:
        return self._recording
