"""Root-mean-square norm, alone or after adding the residual."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from moeserve.layers.context import LayerContext, Piece


class RmsNorm:
    """x [..., H] -> [..., H]; the weight is the same on every rank."""

    def __init__(self, context: LayerContext, name: str, size: int, eps: float):
        self._ops = context.ops
        self._name = name
        self._eps = eps
        self.weight = context.empty(size)

    def __call__(self, x: Tensor) -> Tensor:
        return self._ops.rms_norm(x, self.weight, self._eps)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(the norm of x + residual, x + residual); no residual counts as zero."""
        if residual is None:
            return self(x), x
        return self._ops.add_rms_norm(x, residual, self.weight, self._eps)

    def pieces(self) -> Iterator[Piece]:
        yield Piece(f"{self._name}.weight", tuple(self.weight.shape), (slice(None),), (self.weight,))
