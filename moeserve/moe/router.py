"""Chooses the experts of each token, by the arithmetic of transformers' routers, float32 where theirs is."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moeserve.layers.context import LayerContext, Piece
from moeserve.models.spec import MoeMlp


class Router:
    """x [T, H] -> (weights float32 [T, K], experts int64 [T, K]), the best expert first."""

    def __init__(self, context: LayerContext, prefix: str, hidden_size: int, moe: MoeMlp):
        self._linear, self._choose = context.ops.linear, context.ops.choose_experts
        self._routing = moe.routing
        self._prefix = prefix
        dtype = torch.float32 if moe.routing.float32_logits else context.dtype
        self.weight = context.empty(moe.num_experts, hidden_size, dtype=dtype)
        self.bias = (
            context.empty(moe.num_experts, dtype=torch.float32) if moe.routing.correction_bias else None
        )

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._choose(self._linear(x.to(self.weight.dtype), self.weight), self.bias, self._routing)

    def pieces(self) -> Iterator[Piece]:
        yield Piece(f"{self._prefix}.weight", tuple(self.weight.shape), (), (self.weight,))
        if self.bias is not None:
            name = f"{self._prefix}.e_score_correction_bias"
            yield Piece(name, tuple(self.bias.shape), (), (self.bias,))
