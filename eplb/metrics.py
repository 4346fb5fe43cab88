"""How well a placement balances loads.

Imbalance is max rank load / mean rank load of one window and layer, 1.0 is perfect; then averaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeserve.eplb.types import Floats, Placement, Topology

FORMULA = "max/mean rank load, per window, averaged"


def rank_load(load: npt.NDArray[Any], placement: Placement, topology: Topology, even: bool = False) -> Floats:
    """Load of each rank [..., L, G] for load [..., L, E]; replicas take their share, or equal parts if even."""
    placement.check(topology)
    slots = slot_load(load, placement, even)
    ranks: Floats = slots.reshape(*load.shape[:-1], topology.num_ranks, -1).sum(axis=-1)
    return ranks


def slot_load(load: npt.NDArray[Any], placement: Placement, even: bool = False) -> Floats:
    """Load of each slot [..., L, P] for load [..., L, E]."""
    slots = placement.slot_to_expert
    part = placement.even_share if even else placement.share
    index = np.broadcast_to(slots, (*load.shape[:-1], slots.shape[1]))
    result: Floats = np.take_along_axis(load, index, axis=-1) * part
    return result


def imbalance(ranks: Floats) -> Floats:
    """max / mean over the last axis; 1.0 where there is no load."""
    mean = ranks.mean(axis=-1)
    safe = np.where(mean > 0, mean, 1.0)
    result: Floats = np.where(mean > 0, ranks.max(axis=-1) / safe, 1.0)
    return result


@dataclass(frozen=True)
class Balance:
    """Imbalance of windows [W, L, E] under a placement. by_layer [L]: mean over the windows.

    mean and worst are over layers (of by_layer); peak is the worst single window of any layer.
    """

    by_layer: Floats
    peak: float

    @property
    def mean(self) -> float:
        return float(self.by_layer.mean())

    @property
    def worst(self) -> float:
        return float(self.by_layer.max())


def balance(
    windows: npt.NDArray[Any], placement: Placement, topology: Topology, even: bool = False
) -> Balance:
    """The balance of windows [W, L, E]."""
    each = imbalance(rank_load(windows, placement, topology, even))
    return Balance(each.mean(axis=0), float(each.max()))


def moves_between(old: Placement, new: Placement, topology: Topology) -> npt.NDArray[np.int64]:
    """[L] expert weights that ranks must load: slots of `new` whose expert its rank did not hold before."""
    if old.slot_to_expert.shape != new.slot_to_expert.shape or old.num_experts != new.num_experts:
        raise ValueError(
            f"the placements differ in shape: {old.slot_to_expert.shape} of {old.num_experts} experts, "
            f"{new.slot_to_expert.shape} of {new.num_experts}"
        )
    layers, experts = old.num_layers, old.num_experts
    rank = np.arange(old.num_slots) // topology.slots_per_rank
    held = np.zeros((layers, topology.num_ranks, experts), np.int32)
    wanted = np.zeros_like(held)
    row = np.arange(layers)[:, None]
    np.add.at(held, (row, rank, old.slot_to_expert), 1)
    np.add.at(wanted, (row, rank, new.slot_to_expert), 1)
    moves: npt.NDArray[np.int64] = np.maximum(wanted - held, 0).sum(axis=(1, 2))
    return moves
