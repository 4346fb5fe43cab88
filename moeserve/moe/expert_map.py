"""The live view of the placement in force: the one mutable thing about where experts are."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moeserve.eplb.types import Placement, RoutingTable, Topology


class ExpertMap:
    """Turns experts into slots for one source rank.

    Layers are counted among the MoE layers alone. Raises ValueError when the placement does not fit the
    topology.
    """

    def __init__(
        self, placement: Placement, topology: Topology, source_rank: int, device: torch.device | str
    ):
        placement.check(topology)
        self.placement = placement
        self.topology = topology
        self.source_rank = source_rank
        table = RoutingTable.even(placement, source_rank, topology)
        self._table = torch.tensor(table.slots, device=device)  # int16 [L, E, C]
        self._rotation = 0

    @property
    def generation(self) -> int:
        return self.placement.generation

    @property
    def digest(self) -> str:
        return self.placement.digest

    def look_up(self, layer: int, experts: Tensor) -> Tensor:
        """experts int64 [T, K] -> slots int64 [T, K]: token t of the step uses column (t + rotation) % C."""
        columns = torch.arange(experts.shape[0], device=experts.device) + self._rotation
        columns = (columns % self._table.shape[2]).unsqueeze(1)
        return self._table[layer][experts, columns].long()

    def advance(self) -> None:
        """Once a step: the next step's tokens start at another column, so that small batches spread too."""
        self._rotation = (self._rotation + 1) % self._table.shape[2]

    def local_experts(self, layer: int) -> list[int]:
        """The expert of each slot of this rank, in order."""
        start = self.source_rank * self.topology.slots_per_rank
        row = self.placement.slot_to_expert[layer, start : start + self.topology.slots_per_rank]
        return [int(expert) for expert in row]

    def switch_layer(self, layer: int, new: Placement, table: RoutingTable) -> None:
        """From the next look-up on, one layer follows `new`; its weights must already be in their slots.

        The placement in force becomes the old one with this layer's row of the new one; its generation is the
        new one's once every row agrees.
        """
        slots = self.placement.slot_to_expert.copy()
        shares = self.placement.share.copy()
        slots[layer], shares[layer] = new.slot_to_expert[layer], new.share[layer]
        done = np.array_equal(slots, new.slot_to_expert) and np.array_equal(shares, new.share)
        generation = new.generation if done else self.placement.generation
        self.placement = Placement(slots, new.num_experts, generation, shares)
        self._table[layer].copy_(torch.tensor(table.slots[layer]))
