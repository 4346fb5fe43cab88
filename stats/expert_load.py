"""Counts how often each expert is chosen, on the device and without waiting for it. Knows no model."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_STEPS, MAX_ROWS = 32, 1024
"""Steps and rows that wait to be counted together: launching an operation costs more than what it counts."""


class ExpertLoad:
    """Routed (token, choice) counts of logical experts in each MoE layer, prefill and decode apart.

    Counts grow until `reset` or `take`; `add` launches no copy to the host, so reading them is the caller's
    moment to wait. The tensors that it is given are kept for some steps: nobody may write to them.
    """

    def __init__(self, num_layers: int, num_experts: int, device: torch.device | str = "cpu"):
        self.num_experts = num_experts
        # two phases of E counts, and E places where padding falls
        self._counts = torch.zeros(num_layers, 3 * num_experts, dtype=torch.int64, device=device)
        self._one = torch.ones(1, dtype=torch.int64, device=device)
        self._valid: list[Tensor] = []
        self._decode: list[Tensor] = []
        self._experts: list[list[Tensor]] = [[] for _ in range(num_layers)]
        self._num_rows = 0

    @property
    def prefill(self) -> Tensor:
        """int64 [L, E]."""
        return self._counted()[:, : self.num_experts]

    @property
    def decode(self) -> Tensor:
        """int64 [L, E]."""
        return self._counted()[:, self.num_experts : 2 * self.num_experts]

    def begin_step(self, valid: Tensor, decode: Tensor) -> None:
        """valid, decode: bool [T], the rows of the coming step that are real, and those that decode.

        Each layer's `add` must follow once.
        """
        if len(self._valid) >= MAX_STEPS or self._num_rows >= MAX_ROWS:
            self._counted()
        self._valid.append(valid)
        self._decode.append(decode)
        self._num_rows += len(valid)

    def add(self, layer: int, experts: Tensor) -> None:
        """Count experts int64 [T, K] that one layer chose for the step's rows."""
        self._experts[layer].append(experts)

    def _counted(self) -> Tensor:
        """int64 [L, 3 E], once nothing waits any more."""
        if self._valid:
            offsets = torch.cat(self._decode) * self.num_experts
            offsets = offsets.masked_fill_(~torch.cat(self._valid), 2 * self.num_experts).unsqueeze(1)
            for counts, experts in zip(self._counts, self._experts, strict=True):
                place = (torch.cat(experts) + offsets).flatten()
                counts.scatter_add_(0, place, self._one.expand(place.shape))
                experts.clear()
            self._valid.clear()
            self._decode.clear()
            self._num_rows = 0
        return self._counts

    def take(self) -> Tensor:
        """The counts, int64 [2, L, E] on the host (prefill, decode), which then begin at 0 again.

        On a GPU it waits for all that was launched before: little, right after a step whose result was read.
        """
        layers, width = self._counts.shape[0], 2 * self.num_experts
        taken = torch.empty(2, layers, self.num_experts, dtype=torch.int64)
        taken.copy_(self._counted()[:, :width].view(layers, 2, self.num_experts).transpose(0, 1))
        self.reset()
        return taken

    def reset(self) -> None:
        self._counted().zero_()
