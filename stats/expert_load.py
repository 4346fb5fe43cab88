"""Counts how often each expert is chosen and each slot is given a token, on the device and without waiting for it.

Knows no model.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_STEPS, MAX_ROWS = 32, 1024
"""Steps and rows that wait to be counted together: launching an operation costs more than what it counts."""


class ExpertLoad:
    """Routed (token, choice) counts in each MoE layer, prefill and decode apart: of logical experts, and of the
    slots that this rank's own rows were sent to.

    Counts grow until `reset` or `take`; `add` launches no copy to the host, so reading them is the caller's
    moment to wait. The tensors that it is given are kept for some steps: nobody may write to them.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        num_slots: int,
        device: torch.device | str = "cpu",
        *,
        gather_steps: bool | None = None,
    ):
        """gather_steps: count some steps together; left out, on CPUs alone. Else each layer is counted as it
        comes, by operations that a graph can hold."""
        self.num_experts, self.num_slots = num_experts, num_slots
        self._gather_steps = torch.device(device).type == "cpu" if gather_steps is None else gather_steps
        # two phases of E experts, E places where padding falls, two phases of P slots
        width = 3 * num_experts + 2 * num_slots
        self._counts = torch.zeros(num_layers, width, dtype=torch.int64, device=device)
        self._one = torch.ones(1, dtype=torch.int64, device=device)
        self._valid: list[Tensor] = []
        self._decode: list[Tensor] = []
        self._experts: list[list[Tensor]] = [[] for _ in range(num_layers)]
        self._slots: list[list[Tensor]] = [[] for _ in range(num_layers)]
        self._offsets = torch.empty(0, 1, dtype=torch.int64, device=device)
        self._num_rows = 0

    @property
    def prefill(self) -> Tensor:
        """int64 [L, E]."""
        return self._counted()[:, : self.num_experts]

    @property
    def decode(self) -> Tensor:
        """int64 [L, E]."""
        return self._counted()[:, self.num_experts : 2 * self.num_experts]

    @property
    def slots(self) -> Tensor:
        """int64 [2, L, P], prefill and decode: rows that this rank gave to each slot."""
        counts = self._counted()[:, 3 * self.num_experts :]
        return counts.view(len(counts), 2, self.num_slots).transpose(0, 1)

    def regroup(self, num_slots: int) -> None:
        """Count in so many slots from the next step on; what was counted must have been taken."""
        assert not self._counted().any()
        self.num_slots = num_slots
        self._counts = self._counts.new_zeros(len(self._counts), 3 * self.num_experts + 2 * num_slots)

    def begin_step(self, valid: Tensor, decode: Tensor) -> None:
        """valid, decode: bool [T], the rows of the coming step that are real, and those that decode.

        Each layer's `add` must follow once.
        """
        if not self._gather_steps:
            self._offsets = self._place(valid, decode)
            return
        if len(self._valid) >= MAX_STEPS or self._num_rows >= MAX_ROWS:
            self._counted()
        self._valid.append(valid)
        self._decode.append(decode)
        self._num_rows += len(valid)

    def add(self, layer: int, experts: Tensor, slots: Tensor) -> None:
        """Count experts and slots int64 [T, K] of one layer for the step's rows; padding has slot -1."""
        if self._gather_steps:
            self._experts[layer].append(experts)
            self._slots[layer].append(slots)
        else:
            self._count(self._counts[layer], [experts], [slots], self._offsets)

    def drop_step(self) -> None:
        """Forget the step that began last, however far it came: it will be run again. Only where steps are
        gathered."""
        assert self._gather_steps, "a step that was counted as it came cannot be taken back"
        before = len(self._valid) - 1
        self._num_rows -= len(self._valid.pop())
        self._decode.pop()
        for waiting in (*self._experts, *self._slots):
            del waiting[before:]

    def _place(self, valid: Tensor, decode: Tensor) -> Tensor:
        """int64 [2 T, 1], what is added to an expert, then to a slot, for its place in the counts of a layer."""
        start, padding, phase = 3 * self.num_experts, ~valid, decode.long()
        experts = (phase * self.num_experts).masked_fill_(padding, 2 * self.num_experts)
        slots = (phase * self.num_slots + start).masked_fill_(
            padding, start
        )  # slot -1: the padding's last place
        return torch.cat((experts, slots)).unsqueeze(1)

    def _count(self, counts: Tensor, experts: list[Tensor], slots: list[Tensor], place: Tensor) -> None:
        at = torch.cat([*experts, *slots]).add_(place).flatten()
        counts.scatter_add_(0, at, self._one.expand(at.shape))

    def _counted(self) -> Tensor:
        """int64 [L, 3 E + 2 P], once nothing waits any more."""
        if self._valid:
            place = self._place(torch.cat(self._valid), torch.cat(self._decode))
            for counts, experts, slots in zip(self._counts, self._experts, self._slots, strict=True):
                self._count(counts, experts, slots, place)
                experts.clear()
                slots.clear()
            self._valid.clear()
            self._decode.clear()
            self._num_rows = 0
        return self._counts

    def take(self) -> tuple[Tensor, Tensor]:
        """The counts on the host, experts int64 [2, L, E] and slots int64 [2, L, P] (prefill, decode), which then
        begin at 0 again.

        On a GPU it waits for all that was launched before: little, right after a step whose result was read.
        """
        taken = self._counted().to("cpu", copy=True)
        experts, slots = taken[:, : 2 * self.num_experts], taken[:, 3 * self.num_experts :]
        self._counts.zero_()
        return _by_phase(experts), _by_phase(slots)

    def reset(self) -> None:
        self._counted().zero_()


def _by_phase(counts: Tensor) -> Tensor:
    """[L, 2 N] -> [2, L, N], contiguous."""
    return counts.reshape(len(counts), 2, -1).transpose(0, 1).contiguous()
