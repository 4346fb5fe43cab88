"""Matrix products whose weights are cut over the tp group; each layer names and cuts its own weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from moeserve.layers.context import LayerContext, Piece, share


@dataclass(frozen=True)
class Rows:
    """The rows `kept` of a checkpoint's matrix of `total` rows; `name` leaves out ".weight"."""

    name: str
    total: int
    kept: slice

    @classmethod
    def all(cls, name: str, total: int) -> Rows:
        return cls(name, total, slice(0, total))

    @property
    def count(self) -> int:
        return int(self.kept.stop - self.kept.start)


class ColumnLinear:
    """x [T, in] -> [T, out of this rank]: the outputs are cut, several matrices stacked into one product.

    A matrix kept whole on every rank is the replicated case.
    """

    def __init__(self, context: LayerContext, in_size: int, parts: Sequence[Rows], bias: bool = False):
        self._linear = context.ops.linear
        self._parts = tuple(parts)
        self._in_size = in_size
        out_size = sum(part.count for part in parts)
        self.weight = context.empty(out_size, in_size)
        self.bias = context.empty(out_size) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        return self._linear(x, self.weight, self.bias)

    def pieces(self) -> Iterator[Piece]:
        start = 0
        for part in self._parts:
            rows = slice(start, start + part.count)
            shape = (part.total, self._in_size)
            yield Piece(f"{part.name}.weight", shape, (part.kept, slice(None)), (self.weight[rows],))
            if self.bias is not None:
                yield Piece(f"{part.name}.bias", (part.total,), (part.kept,), (self.bias[rows],))
            start = rows.stop


class RowLinear:
    """x [T, in of this rank] -> this rank's rows [T / tp, out] of the sum over tp: the inputs are cut."""

    def __init__(self, context: LayerContext, name: str, in_size: int, out_size: int, bias: bool = False):
        self._linear = context.ops.linear
        self._tp = context.mesh.tp
        self._name = name
        self._shape = (out_size, in_size)
        self._kept = share(in_size, self._tp.rank, self._tp.size)
        self.weight = context.empty(out_size, in_size // self._tp.size)
        self.bias = context.empty(out_size) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        out = self._tp.reduce_scatter(self._linear(x, self.weight))
        return out if self.bias is None else out + self.bias  # once, after the sum

    def pieces(self) -> Iterator[Piece]:
        yield Piece(f"{self._name}.weight", self._shape, (slice(None), self._kept), (self.weight,))
        if self.bias is not None:
            yield Piece(f"{self._name}.bias", self._shape[:1], (slice(None),), (self.bias,))
