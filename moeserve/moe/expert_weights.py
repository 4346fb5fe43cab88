"""The weights of one layer's slots on this rank, cut over the etp group."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

from torch import Tensor

from moeserve.layers.context import LayerContext, Piece, share
from moeserve.models.spec import MoeMlp


class ExpertWeights:
    """gate_up [S, 2F / etp, H] (gate rows first) and down [S, H, F / etp] of the slots of this rank."""

    def __init__(
        self, context: LayerContext, prefix: str, hidden_size: int, moe: MoeMlp, slot_experts: Sequence[int]
    ):
        etp = context.mesh.etp
        self._prefix = f"{prefix}.experts"
        self._moe = moe
        self._hidden_size = hidden_size
        self._slot_experts = tuple(slot_experts)
        self._kept = share(moe.intermediate_size, etp.rank, etp.size)
        self._width = moe.intermediate_size // etp.size
        self.gate_up = context.empty(len(slot_experts), 2 * self._width, hidden_size)
        self.down = context.empty(len(slot_experts), hidden_size, self._width)

    def slot_tensors(self) -> list[Tensor]:
        """All that the expert of a slot consists of on this rank, each [S, ...]."""
        return [self.gate_up, self.down]

    def pieces(self, present: Container[str]) -> Iterator[Piece]:
        """One tensor an expert, or stacked [E, ...] tensors where the checkpoint has these."""
        stacked = f"{self._prefix}.gate_up_proj" in present
        for expert in range(self._moe.num_experts):
            yield from self._stacked(expert) if stacked else self._single(expert)

    def _single(self, expert: int) -> Iterator[Piece]:
        names, size, hidden = self._moe.names, self._moe.intermediate_size, self._hidden_size
        slots = self._slots(expert)
        gates = tuple(self.gate_up[slot, : self._width] for slot in slots)
        ups = tuple(self.gate_up[slot, self._width :] for slot in slots)
        start, rows = f"{self._prefix}.{expert}", (self._kept, slice(None))
        yield Piece(f"{start}.{names.gate}.weight", (size, hidden), rows, gates)
        yield Piece(f"{start}.{names.up}.weight", (size, hidden), rows, ups)
        columns = (slice(None), self._kept)
        downs = tuple(self.down[slot] for slot in slots)
        yield Piece(f"{start}.{names.down}.weight", (hidden, size), columns, downs)

    def _stacked(self, expert: int) -> Iterator[Piece]:
        count, size, hidden = self._moe.num_experts, self._moe.intermediate_size, self._hidden_size
        slots = self._slots(expert)
        for half in (0, 1):
            rows = slice(half * size + self._kept.start, half * size + self._kept.stop)
            width = slice(half * self._width, (half + 1) * self._width)
            targets = tuple(self.gate_up[slot, width] for slot in slots)
            shape = (count, 2 * size, hidden)
            yield Piece(f"{self._prefix}.gate_up_proj", shape, (expert, rows, slice(None)), targets)
        downs = tuple(self.down[slot] for slot in slots)
        cut = (expert, slice(None), self._kept)
        yield Piece(f"{self._prefix}.down_proj", (count, hidden, size), cut, downs)

    def _slots(self, expert: int) -> list[int]:
        return [slot for slot, held in enumerate(self._slot_experts) if held == expert]
