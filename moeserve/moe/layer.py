"""A MoE block, the same for every layout: route, count, look up slots, carry tokens there and back."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.comm.all_to_all.protocol import TokenDispatcher
from moeserve.forward_batch import ForwardBatch
from moeserve.layers.context import LayerContext, Piece
from moeserve.models.mlp import ReplicatedMlp
from moeserve.models.spec import MoeMlp
from moeserve.moe.expert_map import ExpertMap
from moeserve.moe.expert_weights import ExpertWeights
from moeserve.moe.router import Router
from moeserve.stats.expert_load import ExpertLoad


@dataclass(frozen=True)
class StepRows:
    """Which of this rank's own residual rows are what, worked out once a step.

    valid: bool [rows], false for padding. decode: bool [rows]. etp_sizes: rows of each rank of the etp group;
    ep_sizes: rows that each rank of the ep group dispatches, those of its whole etp group.
    """

    valid: Tensor
    decode: Tensor
    etp_sizes: tuple[int, ...]
    ep_sizes: tuple[int, ...]


class MoeLayer:
    """This rank's rows [rows, H] -> the experts' sum for them, [rows, H].

    The shared experts' weights are on every rank whole: they work on the rank's own rows without
    communication, while the tokens travel. With etp the tokens of the group are gathered before they are
    sent, and the partial results summed on their way back to the owners: less traffic than gathering each of
    their K copies.
    """

    def __init__(
        self,
        context: LayerContext,
        prefix: str,
        index: int,
        hidden_size: int,
        moe: MoeMlp,
        expert_map: ExpertMap,
        dispatcher: TokenDispatcher | None,
        load: ExpertLoad | None,
    ):
        """index: number among the MoE layers. dispatcher: over the ep group; None when that is one rank."""
        self._ops = context.ops
        self._mesh = context.mesh
        self._index = index
        self._expert_map = expert_map
        self._dispatcher = dispatcher
        self._load = load
        block = f"{prefix}.{moe.names.block}"
        self.router = Router(context, f"{block}.gate", hidden_size, moe)
        self.experts = ExpertWeights(context, block, hidden_size, moe, expert_map.local_experts(index))
        shared_name = f"{block}.shared_experts"
        self.shared = (
            ReplicatedMlp(context, shared_name, hidden_size, moe.shared_size) if moe.shared_size else None
        )

    def regroup(self, dispatcher: TokenDispatcher | None) -> None:
        """Carry tokens by another dispatcher: the ep group has become another."""
        self._dispatcher = dispatcher

    def __call__(self, x: Tensor, rows: StepRows) -> tuple[Tensor, Tensor]:
        """x [rows, H] -> (out [rows, H], the experts chosen int64 [rows, K])."""
        weights, experts = self.router(x)
        slots = self._expert_map.look_up(self._index, experts)
        if self._load is not None:
            self._load.add(self._index, experts, slots)
        etp = self._mesh.etp
        tokens = etp.all_gather(x, rows.etp_sizes)
        slots = etp.all_gather(slots, rows.etp_sizes)
        weights = etp.all_gather(weights, rows.etp_sizes)
        out, shared = self._run(tokens, slots, weights, x)
        out = etp.reduce_scatter(out, rows.etp_sizes)
        return (out if shared is None else out + shared), experts

    def _run(self, tokens: Tensor, slots: Tensor, weights: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(the routed experts' part of every token of the etp group, the shared experts' part of x)."""
        gate_up, down = self.experts.gate_up, self.experts.down
        if self._dispatcher is None:
            out = self._ops.fused_experts(tokens, slots, weights, gate_up, down)
            return out, self._shared(x)
        pending = self._dispatcher.dispatch(tokens, slots, weights)
        shared = self._shared(x)  # while the tokens travel
        got = pending.wait()
        y = self._ops.grouped_experts(got.rows, got.tokens_per_slot, gate_up, down)
        return self._dispatcher.combine(y, got).wait(), shared

    def _shared(self, x: Tensor) -> Tensor | None:
        return None if self.shared is None else self.shared(x)

    def pieces(self, present: Container[str]) -> Iterator[Piece]:
        yield from self.router.pieces()
        yield from self.experts.pieces(present)
        if self.shared is not None:
            yield from self.shared.pieces()


def step_rows(batch: ForwardBatch, context: LayerContext) -> StepRows:
    """Describe this rank's rows: rank t of a replica owns the t-th of tp equal parts of its T rows."""
    mesh = context.mesh
    count = batch.token_ids.shape[0] // mesh.tp.size
    start = mesh.tp.rank * count
    number = torch.arange(start, start + count, device=batch.token_ids.device)
    valid = batch.kv_slots[start : start + count] >= 0
    width, sizes = mesh.etp.size, batch.rows_per_rank
    groups = [sizes[start : start + width] for start in range(0, len(sizes), width)]  # one an ep rank
    ep_sizes = tuple(sum(group) for group in groups)
    return StepRows(valid, number < batch.num_decode, groups[mesh.ep.rank], ep_sizes)
