"""SwiGLU: cut over the tp group, or whole on every rank."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from moeserve.layers.context import LayerContext, Piece, share
from moeserve.layers.linear import ColumnLinear, RowLinear, Rows


class TensorParallelMlp:
    """This rank's rows [T / tp, H] -> [T / tp, H], the intermediate dim cut over tp."""

    def __init__(self, context: LayerContext, prefix: str, hidden_size: int, size: int, bias: bool):
        self._ops = context.ops
        self._tp = context.mesh.tp
        kept = share(size, self._tp.rank, self._tp.size)
        parts = [Rows(f"{prefix}.{name}", size, kept) for name in ("gate_proj", "up_proj")]
        self.gate_up = ColumnLinear(context, hidden_size, parts, bias)
        self.down = RowLinear(context, f"{prefix}.down_proj", size, hidden_size, bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self._ops.silu_mul(self.gate_up(self._tp.all_gather(x))))

    def pieces(self) -> Iterator[Piece]:
        yield from self.gate_up.pieces()
        yield from self.down.pieces()


class ReplicatedMlp:
    """Any rows [T, H] -> [T, H]; the weights are whole, so nothing is communicated."""

    def __init__(self, context: LayerContext, prefix: str, hidden_size: int, size: int):
        self._ops = context.ops
        parts = [Rows.all(f"{prefix}.{name}", size) for name in ("gate_proj", "up_proj")]
        self.gate_up = ColumnLinear(context, hidden_size, parts)
        self.down = ColumnLinear(context, size, [Rows.all(f"{prefix}.down_proj", hidden_size)])

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self._ops.silu_mul(self.gate_up(x)))

    def pieces(self) -> Iterator[Piece]:
        yield from self.gate_up.pieces()
        yield from self.down.pieces()
