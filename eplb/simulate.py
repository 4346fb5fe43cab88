"""Step time of the MoE layers under a placement, from recorded load and published constants.

A layer takes the compute of its busiest rank, and a dispatch and a combine of `a + skew * bytes / bandwidth`, or of
their floor if that is more, with the skew of what the busiest rank receives. Attention, dense layers and the rest
come as one number from the caller. The all-to-all constants are a fit to published timings
(tests/eplb/test_simulate.py gives the errors); the rest of the step has not been held against a measurement.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeserve.eplb.metrics import rank_load, slot_load
from moeserve.eplb.migration import traffic
from moeserve.eplb.types import Floats, MigrationPlan, Placement, Topology

Timing = dict[int, tuple[float, float, float]]
"""ranks: (seconds, bytes a second, least seconds) of a dispatch or combine"""


@dataclass(frozen=True)
class Hardware:
    """flops and bandwidths as reached, not peaks; most_ranks: as far as the fast links reach."""

    flops: float
    memory_bandwidth: float
    link_bandwidth: float
    most_ranks: int
    dispatch: Timing
    combine: Timing


@dataclass(frozen=True)
class Model:
    hidden: int
    expert_width: int
    top_k: int
    moe_layers: int
    weight_bytes: float
    activation_bytes: float

    @property
    def expert_bytes(self) -> int:
        """Gate, up and down projections."""
        return int(3 * self.hidden * self.expert_width * self.weight_bytes)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, mean over the windows: experts' compute, all-to-all, and what the caller gave."""

    compute: float
    all_to_all: float
    other: float
    tokens_per_rank: int

    @property
    def total(self) -> float:
        return self.compute + self.all_to_all + self.other

    @property
    def tokens_per_second_per_rank(self) -> float:
        return self.tokens_per_rank / self.total


@lru_cache(maxsize=1)
def library() -> dict[str, Any]:
    """The constants with their units and sources."""
    found: dict[str, Any] = json.loads(Path(__file__).with_name("library.json").read_text())
    return found


def hardware(name: str) -> Hardware:
    c = _entry("hardware", name)
    return Hardware(
        c["flops"] * c["gemm_efficiency"],
        c["memory_bandwidth"] * c["memory_efficiency"],
        c["link_bandwidth"],
        c["most_ranks"],
        {int(n): (a, b, least) for n, (a, b, least) in c["dispatch"].items()},
        {int(n): (a, b, least) for n, (a, b, least) in c["combine"].items()},
    )


def model(name: str) -> Model:
    return Model(**_entry("models", name))


def _entry(kind: str, name: str) -> dict[str, Any]:
    entries = library()[kind]
    if name not in entries:
        raise ValueError(f"{kind} {name!r} is not in the library: there are {', '.join(entries)}")
    return {key: constant["value"] for key, constant in entries[name].items()}


def all_to_all_seconds(timing: Timing, ranks: int, num_bytes: float) -> float:
    """a + bytes / bandwidth, no less than the floor; the constants between those of the smallest and the largest size
    on a scale of log(ranks)."""
    few, many = min(timing), max(timing)
    way = math.log(max(ranks, 1) / few) / math.log(many / few) if many > few else 0.0
    way = min(max(way, 0.0), 1.0)
    a, bandwidth, least = (x + (y - x) * way for x, y in zip(timing[few], timing[many], strict=True))
    return max(a + num_bytes / bandwidth, least)


def remote_bytes(model: Model, ranks: int, tokens_per_rank: float) -> float:
    """Bytes that a rank sends to others in a dispatch as they are timed: every token to min(K, ranks) ranks."""
    copies = min(model.top_k, ranks) * (ranks - 1) / ranks
    return tokens_per_rank * copies * model.hidden * model.activation_bytes


def remote_rows(ranks: int, top_k: int) -> float:
    """Other ranks that a token goes to, when each of its experts may stand on any rank; it goes once to a rank."""
    return float((ranks - 1) * (1 - (1 - 1 / ranks) ** top_k))


def step_time(
    windows: npt.NDArray[Any],
    placement: Placement,
    topology: Topology,
    hardware: Hardware,
    model: Model,
    tokens_per_rank: int,
    other_seconds: float = 0.0,
    even: bool = False,
) -> StepTime:
    """The step at tokens_per_rank tokens on every rank, for load windows [W, L, E] of any scale."""
    if tokens_per_rank < 1:
        raise ValueError(f"tokens_per_rank = {tokens_per_rank}: give 1 or more")
    ranks = topology.num_ranks
    if ranks > hardware.most_ranks:
        raise ValueError(
            f"ep_size = {ranks}: the hardware joins {hardware.most_ranks} ranks by its fast links"
        )
    load = rank_load(windows, placement, topology, even)
    mean = load.mean(axis=2, keepdims=True)
    skew = np.where(mean > 0, load / np.where(mean > 0, mean, 1.0), 1.0)  # [W, L, G]
    rows = skew * tokens_per_rank * model.top_k
    arithmetic = rows * 6 * model.hidden * model.expert_width / hardware.flops
    reading = _slots_used(windows, placement, topology, tokens_per_rank, model, even) * model.expert_bytes
    compute = np.maximum(arithmetic, reading / hardware.memory_bandwidth).max(axis=2)  # [W, L]
    sent = tokens_per_rank * remote_rows(ranks, model.top_k) * model.hidden * model.activation_bytes
    worst = skew.max(axis=2)
    wire: Floats = np.array([
        [sum(all_to_all_seconds(t, ranks, sent * x) for t in (hardware.dispatch, hardware.combine)) for x in row]
        for row in worst
    ]) if ranks > 1 else np.zeros_like(worst)  # fmt: skip
    layers = model.moe_layers
    return StepTime(
        float(compute.mean()) * layers, float(wire.mean()) * layers, other_seconds, tokens_per_rank
    )


def _slots_used(
    windows: npt.NDArray[Any], placement: Placement, topology: Topology, tokens: int, model: Model, even: bool
) -> Floats:
    """[W, L, G] slots that get a token at all in a step, in expectation: their weights are read."""
    slots = slot_load(windows, placement, even)
    total = slots.sum(axis=2, keepdims=True)
    part = np.where(total > 0, slots / np.where(total > 0, total, 1.0), 1.0 / slots.shape[2])
    routed = tokens * topology.num_ranks * model.top_k
    used = 1.0 - np.exp(-part * routed)
    by_rank: Floats = used.reshape(*used.shape[:2], topology.num_ranks, -1).sum(axis=3)
    return by_rank


def migration_seconds(
    plan: MigrationPlan, topology: Topology, hardware: Hardware, model: Model, stall_part: float = 0.2
) -> float:
    """What a plan adds to the steps it runs under: the part of the busiest rank's transfer that does not overlap."""
    found = traffic(plan, topology)
    most = max(found.most_received, found.most_sent)
    return stall_part * most * model.expert_bytes / hardware.link_bandwidth
