"""The live view of the placement in force: the one mutable thing about where experts are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from moeserve.eplb.types import Placement, RoutingTable, Topology
from moeserve.ops import table as ops
from moeserve.ops.spread import SplitTable, phase

Routing = Literal["even", "shares", "step"]


class ExpertMap:
    """Turns experts into slots for one source rank.

    routing says how replicas part the tokens of their expert: "even"; "shares", as the placement has it; "step",
    so that this rank's own tokens of the step load all ranks alike. Layers are counted among the MoE layers alone.
    Raises ValueError when the placement does not fit the topology.
    """

    def __init__(
        self,
        placement: Placement,
        topology: Topology,
        source_rank: int,
        device: torch.device | str,
        routing: Routing = "shares",
    ):
        self.routing = routing
        self._device = device
        self._step = 0
        self._spread = ops.get("spread_tokens", device)
        self.regroup(placement, topology, source_rank)

    def regroup(self, placement: Placement, topology: Topology, source_rank: int) -> None:
        """Go by a placement on other ranks from the next step on. Raises ValueError when it does not fit them."""
        placement.check(topology)
        self.placement = placement
        self.topology = topology
        self.source_rank = source_rank
        self._table = torch.empty(0)  # [L, E, C]; not for "step"
        self._splits: list[SplitTable] = []  # by layer; for "step" alone
        if self.routing == "step":
            self._splits = [self._split(placement, layer) for layer in range(placement.num_layers)]
        else:
            self._table = self._columns_of(placement).to(self._device)
        self._valid = torch.empty(0, dtype=torch.bool, device=self._device)
        self._columns = self._padding = torch.empty(0, 1, dtype=torch.int64, device=self._device)

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
        self._step += 1
        self._valid = valid
        if self.routing == "step":
            return
        width = self._table.shape[2]
        rotation = self._step % width
        self._columns = ((torch.arange(len(valid), device=valid.device) + rotation) % width).unsqueeze(1)
        self._padding = ~valid.unsqueeze(1)

    def look_up(self, layer: int, experts: Tensor) -> Tensor:
        """experts int64 [T, K] of this step's tokens -> slots int64 [T, K], -1 for padding."""
        if self.routing == "step":
            begin = phase(self.source_rank, self._step, layer)
            slots: Tensor = self._spread(experts, self._valid, self._splits[layer], begin)
            return slots
        return self._table[layer][experts, self._columns].masked_fill_(self._padding, -1)

    def local_experts(self, layer: int) -> list[int]:
        """The expert of each slot of this rank, in order."""
        start = self.source_rank * self.topology.slots_per_rank
        row = self.placement.slot_to_expert[layer, start : start + self.topology.slots_per_rank]
        return [int(expert) for expert in row]

    def view(self, layer: int, new: Placement) -> Tensor | SplitTable:
        """What look_up would go by for one layer under `new`: for switch. Changes nothing."""
        if self.routing == "step":
            return self._split(new, layer)
        row = slice(layer, layer + 1)
        alone = Placement(new.slot_to_expert[row], new.num_experts, new.generation, new.share[row])
        return self._columns_of(alone)[0].to(self._device)

    def switch(self, new: Placement, views: Mapping[int, Tensor | SplitTable]) -> None:
        """From the next look-up on `new` is in force. It differs from the placement until now in these layers
        alone; they follow their views of it, and its weights must already be in their slots."""
        for layer, view in views.items():
            if isinstance(view, SplitTable):
                self._splits[layer] = view
            else:
                self._table[layer].copy_(view)
        self.placement = new

    def _columns_of(self, placement: Placement) -> Tensor:
        """int64 [L, E, C]: the routing table of a placement, or of some of its layers."""
        if self.routing == "even":
            table = RoutingTable.even(placement, self.source_rank, self.topology)
        else:
            table = RoutingTable.weighted(placement, placement.share, self.source_rank, self.topology)
        return torch.tensor(table.slots, dtype=torch.int64)

    def _split(self, placement: Placement, layer: int) -> SplitTable:
        row, topology = placement.slot_to_expert[layer], self.topology
        return SplitTable.make(row, placement.num_experts, topology.num_ranks, self.source_rank, self._device)
