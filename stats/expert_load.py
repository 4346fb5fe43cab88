"""Counts how often each expert is chosen, on the device and without waiting for it. Knows no model."""

from __future__ import annotations

import torch
from torch import Tensor


class ExpertLoad:
    """Routed (token, choice) counts of logical experts in each MoE layer, prefill and decode apart.

    Counts grow until `reset` or `take`; `add` launches no copy to the host, so reading them is the caller's
    moment to wait.
    """

    def __init__(self, num_layers: int, num_experts: int, device: torch.device | str = "cpu"):
        self.num_experts = num_experts
        # two phases of E counts, and E places where padding falls
        self._counts = torch.zeros(num_layers, 3 * num_experts, dtype=torch.int64, device=device)
        self._rows = list(self._counts)
        self._one = torch.ones(1, dtype=torch.int64, device=device)
        self._offsets = torch.empty(0, 1, dtype=torch.int64, device=device)

    @property
    def prefill(self) -> Tensor:
        """int64 [L, E], a view."""
        return self._counts[:, : self.num_experts]

    @property
    def decode(self) -> Tensor:
        """int64 [L, E], a view."""
        return self._counts[:, self.num_experts : 2 * self.num_experts]

    def begin_step(self, valid: Tensor, decode: Tensor) -> None:
        """valid, decode: bool [T], the rows of the coming step that are real, and those that decode."""
        offsets = decode * self.num_experts
        self._offsets = offsets.masked_fill(~valid, 2 * self.num_experts).unsqueeze(1)

    def add(self, layer: int, experts: Tensor) -> None:
        """Count experts int64 [T, K] that one layer chose for the step's rows."""
        place = (experts + self._offsets).flatten()
        self._rows[layer].scatter_add_(0, place, self._one.expand(place.shape))

    def take(self) -> Tensor:
        """The counts, int64 [2, L, E] on the host (prefill, decode), which then begin at 0 again.

        On a GPU it waits for all that was launched before: little, right after a step whose result was read.
        """
        layers, width = self._counts.shape[0], 2 * self.num_experts
        taken = torch.empty(2, layers, self.num_experts, dtype=torch.int64)
        taken.copy_(self._counts[:, :width].view(layers, 2, self.num_experts).transpose(0, 1))
        self.reset()
        return taken

    def reset(self) -> None:
        self._counts.zero_()
