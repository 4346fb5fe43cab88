"""Chooses the experts of each token, by the arithmetic of transformers' routers, float32 where theirs is."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moeserve.layers.context import LayerContext, Piece
from moeserve.models.spec import MoeMlp, Routing


class Router:
    """x [T, H] -> (weights float32 [T, K], experts int64 [T, K]), the best expert first."""

    def __init__(self, context: LayerContext, prefix: str, hidden_size: int, moe: MoeMlp):
        self._linear = context.ops.linear
        self._routing = moe.routing
        self._prefix = prefix
        dtype = torch.float32 if moe.routing.float32_logits else context.dtype
        self.weight = context.empty(moe.num_experts, hidden_size, dtype=dtype)
        self.bias = (
            context.empty(moe.num_experts, dtype=torch.float32) if moe.routing.correction_bias else None
        )

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return choose_experts(self._linear(x.to(self.weight.dtype), self.weight), self.bias, self._routing)

    def pieces(self) -> Iterator[Piece]:
        yield Piece(f"{self._prefix}.weight", tuple(self.weight.shape), (), (self.weight,))
        if self.bias is not None:
            name = f"{self._prefix}.e_score_correction_bias"
            yield Piece(name, tuple(self.bias.shape), (), (self.bias,))


def choose_experts(logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """logits [T, E], bias float32 [E] -> (weights float32 [T, K], experts int64 [T, K])."""
    logits = logits.float()
    scores = logits.sigmoid() if routing.scoring == "sigmoid" else logits.softmax(-1)
    choice = scores if bias is None else scores + bias
    if routing.num_groups > 1:
        choice = _best_groups_only(choice, routing)
    experts = choice.topk(routing.top_k, dim=-1).indices
    weights = scores.gather(1, experts)
    if routing.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * routing.scaling, experts


def _best_groups_only(choice: Tensor, routing: Routing) -> Tensor:
    """choice [T, E] with -inf for the experts outside the groups_kept best groups."""
    grouped = choice.view(choice.shape[0], routing.num_groups, choice.shape[1] // routing.num_groups)
    group_scores = grouped.topk(routing.group_score_terms, dim=-1).values.sum(-1)
    kept = group_scores.topk(routing.groups_kept, dim=-1).indices
    dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, kept, False)
    return grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(1)
