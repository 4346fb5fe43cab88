"""What the ranks' counts say about the balance of their experts: counts, placement and formula put together.

Lives in the front process and is fed by messages: whoever asks costs no rank anything.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np

from moeserve.eplb.formats.placement import PlacementFile, format_placement
from moeserve.eplb.load import ExpertLoad, Window
from moeserve.eplb.metrics import imbalance, rank_load
from moeserve.eplb.types import Floats, Placement, Topology
from moeserve.messages import ExpertCounts
from moeserve.stats.snapshot import PHASES, Counts, LoadRing, LoadWindow, Phase

log = logging.getLogger(__name__)
RECENT_SECONDS = 30.0


@dataclass(frozen=True)
class Imbalance:
    """max / mean rank load of each MoE layer, over the layers. steps: that they were counted in."""

    worst: float
    median: float
    mean: float
    steps: int


class ExpertBalance:
    """The expert load that was counted, and how the placement in force spreads it over the ranks."""

    def __init__(
        self,
        placement: Placement,
        topology: Topology,
        *,
        layers: Sequence[int],
        model: str,
        top_k: int,
        expert_groups: int,
        expert_bytes: int = 0,
    ):
        """layers: absolute ids of the MoE layers. expert_bytes: of one expert's weights in one layer on a rank, 0
        where unknown."""
        self.placement = placement
        self.topology = topology
        self.layers = tuple(layers)
        self.model = model
        self.top_k = top_k
        self.expert_groups = expert_groups
        self.expert_bytes = expert_bytes
        self.listeners: list[Callable[[int, LoadWindow], None]] = []  # told of each rank's reports
        self.ring = LoadRing()
        self.generations: dict[int, int] = {}  # of the placement, by rank
        self._is_even = bool(np.allclose(placement.share, placement.even_share, atol=1e-6))
        self._survives = placement.survives_rank_loss(topology)
        self._next_line: float | None = None

    def add(self, message: ExpertCounts) -> None:
        """What one rank has counted since its last message."""
        now = time.time()
        shape = (len(PHASES), len(self.layers), self.placement.num_experts)
        counts = np.frombuffer(message.counts, "<u4").astype(np.int64).reshape(shape)
        start = message.step - message.steps
        report = LoadWindow(start, message.step, now - message.seconds, now, message.tokens, counts)
        self.ring.add(message.rank, report)
        for listener in self.listeners:
            listener(message.rank, report)
        self._tell(now)

    def imbalance(self, seconds: float = RECENT_SECONDS) -> dict[Phase, Imbalance]:
        """Of the last so many seconds of traffic, for the phases that had any."""
        recent = self.ring.recent(seconds)
        if recent is None:
            return {}
        found: dict[Phase, Imbalance] = {}
        for phase, load, tokens in zip(PHASES, recent.load, recent.tokens, strict=True):
            if tokens:
                ratios = imbalance(self._rank_load(load))
                worst, median, mean = ratios.max(), np.median(ratios), ratios.mean()
                found[phase] = Imbalance(float(worst), float(median), float(mean), recent.steps)
        return found

    def rank_tokens(self) -> Floats:
        """[2, G]: (token, choice) pairs given to each expert-parallel rank since the start, over all layers."""
        total = self.ring.total
        if total is None:
            return np.zeros((len(PHASES), self.topology.num_ranks))
        tokens: Floats = self._rank_load(total).sum(axis=1)
        return tokens

    def _rank_load(self, load: Counts) -> Floats:
        """[..., L, G]: replicas take their shares, as the engine's routing table has it."""
        return rank_load(load, self.placement, self.topology)

    def expert_load(self) -> ExpertLoad | None:
        """All that is kept, as stats.json has it; None when nothing was counted yet."""
        windows = self.ring.windows
        return self.load_of(windows) if windows else None

    def load_of(self, kept: Sequence[LoadWindow], placement: Placement | None = None) -> ExpertLoad:
        """One window or more as stats.json has them, each phase by itself. May run in another thread.

        placement: that they met, the one in force if not given.
        """
        placement = placement or self.placement
        loads: list[Counts] = []
        windows: list[Window] = []
        for window in kept:
            begun = datetime.fromtimestamp(window.start, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
            for phase, load, tokens in zip(PHASES, window.load, window.tokens, strict=True):
                if tokens:
                    loads.append(load)
                    windows.append(Window(phase, window.start_step, window.steps, tokens, begun))
        return ExpertLoad(
            np.stack(loads),
            layers=self.layers,
            windows=tuple(windows),
            model=self.model,
            top_k=self.top_k,
            expert_groups=self.expert_groups,
            ep_size=self.topology.num_ranks,
            placement=None if _is_identity(placement) else placement,
        )

    def placement_text(self) -> str:
        """placement.json of the placement in force."""
        return format_placement(
            PlacementFile(self.placement, self.topology.num_ranks, self.layers, self.model)
        )

    @property
    def state(self) -> str:
        """What the balancer is doing: a given placement stays."""
        return "off"

    def status(self) -> dict[str, Any]:
        """The answer of /eplb/status. predicted is null: nobody has promised anything for a given placement."""
        balance = {
            phase: {
                "mean": round(found.mean, 6),
                "median": round(found.median, 6),
                "worst": round(found.worst, 6),
                "predicted": None,
                "window_steps": found.steps,
            }
            for phase, found in self.imbalance().items()
        }
        return {
            "generation": self.placement.generation,
            "digest": self.placement.digest,
            "state": self.state,
            "routing": "even" if self._is_even else "shares",
            "num_slots": self.placement.num_slots,
            "ep_size": self.topology.num_ranks,
            "survives_rank_loss": self._survives,
            "imbalance": balance,
            "rebalances": [],
        }

    def _tell(self, now: float) -> None:
        """A line in the log every RECENT_SECONDS while there is traffic."""
        if self.topology.num_ranks == 1:
            return
        if self._next_line is None:
            self._next_line = now + RECENT_SECONDS
        if now < self._next_line:
            return
        self._next_line = now + RECENT_SECONDS
        for phase, found in self.imbalance().items():
            log.info(
                "%s: busiest rank carries %.2fx the mean (max/mean rank load, mean of %d layers, last %.0f s)",
                *(phase, found.mean, len(self.layers), RECENT_SECONDS),
            )


def _is_identity(placement: Placement) -> bool:
    shape = (placement.num_layers, placement.num_experts, placement.num_slots)
    return Placement.identity(*shape).digest == placement.digest
