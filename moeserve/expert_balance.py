"""What the ranks' counts say about the balance of their experts: counts, placement and formula put together.

Lives in the front process and is fed by messages: whoever asks costs no rank anything.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np

from moeserve.eplb.formats.placement import PlacementFile, format_placement
from moeserve.eplb.load import ExpertLoad, Window
from moeserve.eplb.loss import without_rank
from moeserve.eplb.metrics import FORMULA, imbalance, rank_load
from moeserve.eplb.types import Floats, Placement, Topology
from moeserve.messages import ExpertCounts
from moeserve.stats.snapshot import PHASES, Counts, LoadRing, LoadWindow, Phase

if TYPE_CHECKING:
    from moeserve.online.balancer import OnlineBalancer

log = logging.getLogger(__name__)
RECENT_SECONDS = 30.0


@dataclass(frozen=True)
class Imbalance:
    """max / mean rank load of each MoE layer, over the layers. steps: that they were counted in.

    worst, median, mean: of the logical load, spread as the placement in force says, which is what eplb-offline
    works out. measured_*: of what the ranks were really given; None where nobody told.
    """

    worst: float
    median: float
    mean: float
    steps: int
    measured_worst: float | None = None
    measured_mean: float | None = None


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
        routing: str = "shares",
    ):
        """layers: absolute ids of the MoE layers. expert_bytes: of one expert's weights in one layer on a rank, 0
        where unknown. routing: even, shares or step, as the engine was told."""
        self.routing = routing
        self.online: OnlineBalancer | None = None
        self.predicted: dict[Phase, float] = {}  # imbalance that was promised of the placement in force
        self.placement = self._whole = placement
        self.previous: Placement | None = None  # what was in force before the last change of generation
        self.topology = topology
        self.layers = tuple(layers)
        self.model = model
        self.top_k = top_k
        self.expert_groups = expert_groups
        self.expert_bytes = expert_bytes
        self.listeners: list[Callable[[int, LoadWindow], None]] = []  # told of each rank's reports
        self.ring = LoadRing()
        self.generations: dict[int, int] = {}  # of the placement, by rank
        self.rank_names = list(range(topology.num_ranks))  # numbers that those of the topology started with
        self.lost: list[int] = []  # numbers that ranks had that are no more
        self._rank_tokens: Floats = np.zeros((len(PHASES), topology.num_ranks))
        # a placement, and the imbalance [2, L] of windows under it; together, as several threads ask for them
        self._each: tuple[Placement, dict[LoadWindow, Floats]] = placement, {}
        self._next_line: float | None = None

    def follow(self, placement: Placement) -> None:
        """The placement that is in force from now on; layer by layer it keeps its generation until all are there."""
        if placement.generation != self._whole.generation:
            self.previous, self._whole = self._whole, placement
        self.placement = placement

    def regroup(self, placement: Placement, lost: Sequence[int]) -> None:
        """Ranks were lost, by the numbers that they started with; this placement is what the others go on with."""
        for name in lost:
            self._rank_tokens = np.delete(self._rank_tokens, self.rank_names.index(name), axis=1)
            self.rank_names.remove(name)
            self.generations.pop(name, None)
            self.lost.append(name)
        self.topology = Topology.of(len(self.rank_names), placement.num_slots)
        self.predicted = {}
        self.previous = None
        self.placement = self._whole = placement
        self.ring.forget_slots()
        if self.online is not None:
            self.online.regroup(f"lost rank {', '.join(map(str, lost))}")

    def missing_without(self, names: Sequence[int]) -> str:
        """What would be lost with these ranks, "" where every expert stands elsewhere too."""
        placement, topology, left = self.placement, self.topology, list(self.rank_names)
        try:
            for name in names:
                placement, topology = without_rank(placement, topology, left.index(name))
                left.remove(name)
        except ValueError as error:
            return str(error)
        return ""

    def name_of(self, rank: int) -> int:
        """The number that a rank started with."""
        return self.rank_names[rank] if self.lost else rank

    def add(self, message: ExpertCounts) -> None:
        """What one rank has counted since its last message."""
        now = time.time()
        shape = (len(PHASES), len(self.layers), self.placement.num_experts)
        counts = np.frombuffer(message.counts, "<u4").astype(np.int64).reshape(shape)
        start = message.step - message.steps
        slots = None
        if message.slot_counts:
            shape = (len(PHASES), len(self.layers), self.placement.num_slots)
            slots = np.frombuffer(message.slot_counts, "<u4").astype(np.int64).reshape(shape)
        report = LoadWindow(start, message.step, now - message.seconds, now, message.tokens, counts, slots)
        self.ring.add(message.rank, report)
        given = self._rank_load(counts) if slots is None else self._by_rank(slots)
        self._rank_tokens += given.sum(axis=1)  # at once: a placement holds for what was counted under it
        for listener in self.listeners:
            listener(message.rank, report)
        if self.online is not None:
            self.online.report(message.rank, report)
        self._tell(now)

    def imbalance(self, seconds: float = RECENT_SECONDS) -> dict[Phase, Imbalance]:
        """Of the newest window of the online balancer, without one of the last so many seconds of traffic; for the
        phases that had any."""
        if self.online is not None:
            return {phase: self.imbalance_of(window, phase) for phase, window in self.online.newest.items()}
        recent = self.ring.recent(seconds)
        if recent is None:
            return {}
        counted = [phase for phase, tokens in zip(PHASES, recent.tokens, strict=True) if tokens]
        return {phase: self.imbalance_of(recent, phase) for phase in counted}

    def imbalance_of(self, window: LoadWindow, phase: Phase, placement: Placement | None = None) -> Imbalance:
        """Of one window and phase under a placement, left out the one in force; and as measured."""
        at = PHASES.index(phase)
        ratios = self.by_layer(window.load[at], placement or self.placement)
        worst, median, mean = float(ratios.max()), float(np.median(ratios)), float(ratios.mean())
        if window.slots is None:
            return Imbalance(worst, median, mean, window.steps)
        measured = imbalance(self._by_rank(window.slots[at]))
        return Imbalance(worst, median, mean, window.steps, float(measured.max()), float(measured.mean()))

    def by_layer(self, load: Counts, placement: Placement) -> Floats:
        """[L] max / mean rank load for load [L, E]."""
        ratios: Floats = imbalance(rank_load(load, placement, self.topology))
        return ratios

    def rank_tokens(self) -> Floats:
        """[2, G]: (token, choice) pairs given to each expert-parallel rank since the start, over all layers."""
        tokens: Floats = self._rank_tokens.copy()
        return tokens

    def _rank_load(self, load: Counts) -> Floats:
        """[..., L, G]: replicas take their shares, as the engine's routing table has it."""
        return rank_load(load, self.placement, self.topology)

    def _by_rank(self, slots: Counts) -> Floats:
        """[..., L, G] of counts [..., L, P]."""
        shape = (*slots.shape[:-1], self.topology.num_ranks, self.topology.slots_per_rank)
        ranks: Floats = slots.reshape(shape).sum(axis=-1, dtype=np.float64)
        return ranks

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
            ep_size=placement.num_slots // self.topology.slots_per_rank,  # of then: ranks may be lost
            ranks_per_node=self.topology.ranks_per_node,
            placement=None if _is_identity(placement, self.topology.num_ranks) else placement,
        )

    def placement_text(self) -> str:
        """placement.json of the placement in force, with what was promised of it."""
        promised = [round(value, 6) for value in self.predicted.values()]
        predicted: dict[str, Any] = {"imbalance_mean": promised[0], "formula": FORMULA} if promised else {}
        file = PlacementFile(
            self.placement,
            self.topology.num_ranks,
            self.layers,
            self.model,
            ranks_per_node=self.topology.ranks_per_node,
            predicted=predicted,
        )
        return format_placement(file)

    @property
    def state(self) -> str:
        """What the balancer is doing: off where the placement stays."""
        return "off" if self.online is None else self.online.state

    @property
    def split(self) -> str:
        """How replicas share tokens: a placement that stays may have nothing but even shares."""
        if self.routing == "shares" and self.online is None:
            even = np.allclose(self.placement.share, self.placement.even_share, atol=1e-6)
            return "even" if even else "shares"
        return self.routing

    def status(self) -> dict[str, Any]:
        """The answer of /eplb/status. predicted is null where nobody has promised anything of the placement."""
        kept = self.kept()
        return {
            "generation": self.placement.generation,
            "digest": self.placement.digest,
            "state": self.state,
            "routing": self.split,
            "num_slots": self.placement.num_slots,
            "ep_size": self.topology.num_ranks,
            "survives_rank_loss": self.placement.survives_rank_loss(self.topology),
            "imbalance": {
                phase: self._figures(phase, found, kept) for phase, found in self.imbalance().items()
            },
            "migration": None if self.online is None else self.online.progress(),
            "rebalances": [] if self.online is None else self.online.history(),
        }

    def _figures(self, phase: Phase, found: Imbalance, kept: dict[Phase, dict[str, Any]]) -> dict[str, Any]:
        predicted = self.predicted.get(phase)
        measured = None
        if found.measured_mean is not None and found.measured_worst is not None:
            measured = {"mean": round(found.measured_mean, 6), "worst": round(found.measured_worst, 6)}
        return {
            "mean": round(found.mean, 6),
            "median": round(found.median, 6),
            "worst": round(found.worst, 6),
            "predicted": None if predicted is None else round(predicted, 6),
            "measured": measured,
            "window_steps": found.steps,
            "kept": kept.get(phase),
        }

    def kept(self) -> dict[Phase, dict[str, Any]]:
        """Over all windows of stats.json, each by itself: what eplb-offline report says of that file. Windows that
        are full are worked out once; may run in another thread."""
        windows, placement, topology = self.ring.windows, self.placement, self.topology
        under, former = self._each
        if under is not placement:
            former = {}
        each = {
            window: former[window]
            if window in former
            else imbalance(rank_load(window.load, placement, topology))  # [2, L]
            for window in windows
        }
        self._each = placement, each
        found: dict[Phase, dict[str, Any]] = {}
        for at, phase in enumerate(PHASES):
            ratios = [each[window][at] for window in windows if window.tokens[at]]
            if ratios:
                by_layer = np.stack(ratios).mean(axis=0)
                figures = {"mean": round(float(by_layer.mean()), 6), "worst": round(float(by_layer.max()), 6)}
                found[phase] = {**figures, "windows": len(ratios)}
        return found

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


def _is_identity(placement: Placement, num_ranks: int) -> bool:
    """Whether it is what a reader takes for the placement where none is named: experts in order, no more slots than
    the ranks need for them."""
    shape = (placement.num_layers, placement.num_experts, -(-placement.num_experts // num_ranks) * num_ranks)
    return placement.num_slots == shape[2] and Placement.identity(*shape).digest == placement.digest
