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
        table = RoutingTable.weighted(placement, placement.share, source_rank, topology)
        self._table = torch.tensor(table.slots, dtype=torch.int64, device=device)  # [L, E, C]
        self._rotation = 0
        self._columns = self._padding = torch.empty(0, 1, dtype=torch.int64, device=device)

    @property
    def generation(self) -> int:
        return self.placement.generation

    @property
    def digest(self) -> str:
        return self.placement.digest

    def begin_step(self, valid: Tensor) -> None:
        """valid: bool [T], false for padding. Token t of the step uses column (t + rotation) % C of the table.

        The rotation grows with each step, so that small batches spread over the replicas too.
        """
        width = self._table.shape[2]
        self._rotation = (self._rotation + 1) % width
        self._columns = ((torch.arange(len(valid), device=valid.device) + self._rotation) % width).unsqueeze(
            1
        )
        self._padding = ~valid.unsqueeze(1)

    def look_up(self, layer: int, experts: Tensor) -> Tensor:
        """experts int64 [T, K] of this step's tokens -> slots int64 [T, K], -1 for padding."""
        return self._table[layer][experts, self._columns].masked_fill_(self._padding, -1)

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
