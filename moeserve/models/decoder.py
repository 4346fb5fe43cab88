"""The decoder: embedding, layers of attention and feed-forward, head. No layout and no family shows here.

Between blocks each rank holds its own T / tp rows of the replica's T rows.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.comm.all_to_all.protocol import TokenDispatcher
from moeserve.comm.mesh import Mesh
from moeserve.forward_batch import ForwardBatch
from moeserve.layers.context import LayerContext, Piece
from moeserve.layers.embedding import Embedding, Head, VocabMatrix
from moeserve.layers.norm import RmsNorm
from moeserve.layers.rope import cos_sin_table
from moeserve.models.attention import GroupedQueryAttention, MultiHeadLatentAttention, kv_cache_shape
from moeserve.models.mlp import TensorParallelMlp
from moeserve.models.sharding import check_layout
from moeserve.models.spec import DenseMlp, GroupedAttention, LayerSpec, ModelSpec
from moeserve.moe.expert_map import ExpertMap
from moeserve.moe.expert_weights import ExpertWeights
from moeserve.moe.layer import MoeLayer, StepRows, step_rows
from moeserve.ops.table import Ops, choose_ops
from moeserve.stats.expert_load import ExpertLoad


@dataclass(frozen=True)
class ForwardResult:
    """logits: float32 [M, vocab] of batch.logit_rows, the same on every tp rank of the replica.

    experts: int16 [T, L, K], the logical experts of each row in each MoE layer, when batch.want_experts;
    rows of padding mean nothing.
    """

    logits: Tensor
    experts: Tensor | None = None


class Decoder:
    """One rank's part of a model. Weights are uninitialised until a checkpoint is loaded."""

    def __init__(
        self,
        spec: ModelSpec,
        mesh: Mesh,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        expert_map: ExpertMap | None = None,
        dispatcher: TokenDispatcher | None = None,
        load: ExpertLoad | None = None,
        max_positions: int | None = None,
        ops: Ops | None = None,
    ):
        """expert_map: needed when the model has experts. dispatcher: over mesh.ep, needed when that is
        several ranks.

        load: counts the routed experts. max_positions: longest sequence, at most (and left out) the model's
        own. Raises ValueError when the model cannot be cut as the mesh's layout asks.
        """
        check_layout(spec, mesh.layout)
        self.spec = spec
        self.expert_map = expert_map
        self._load = load
        self._dispatcher = dispatcher if mesh.ep.size > 1 else None
        self._context = LayerContext(mesh, ops or choose_ops(device), dtype, torch.device(device))
        context = self._context
        vocab, hidden = spec.vocab_size, spec.hidden_size
        embedding = VocabMatrix(context, "model.embed_tokens", vocab, hidden)
        head = embedding if spec.tied_embeddings else VocabMatrix(context, "lm_head", vocab, hidden)
        self.embedding, self.head = Embedding(context, embedding), Head(context, head)
        self.matrices = [embedding] if spec.tied_embeddings else [embedding, head]
        self.norm = RmsNorm(context, "model.norm", hidden, spec.norm_eps)
        self.layers: list[DecoderLayer] = []
        moe_index = 0
        for i, layer in enumerate(spec.layers):
            prefix = f"model.layers.{i}"
            block: MoeLayer | TensorParallelMlp
            if isinstance(layer.feed_forward, DenseMlp):
                mlp = layer.feed_forward
                block = TensorParallelMlp(context, f"{prefix}.mlp", hidden, mlp.intermediate_size, mlp.bias)
            else:
                assert expert_map is not None, "a model with experts needs an expert map"
                assert dispatcher is not None or mesh.ep.size == 1, "several ep ranks need a dispatcher"
                moe = layer.feed_forward
                block = MoeLayer(context, prefix, moe_index, hidden, moe, expert_map, self._dispatcher, load)
                moe_index += 1
            self.layers.append(DecoderLayer(context, spec, i, layer, block))
        positions = spec.max_positions if max_positions is None else max_positions
        if positions > spec.max_positions:
            raise ValueError(f"max_seq_len = {positions}: the model goes to {spec.max_positions}")
        self.cos_sin = cos_sin_table(spec.rope, positions, device)

    def forward(self, batch: ForwardBatch, kv_cache: Sequence[Tensor]) -> ForwardResult:
        """Run one step. kv_cache: one cache a layer (`new_kv_cache`), written at batch.kv_slots.

        Every rank of the stage calls it for every step, with no tokens too.
        """
        tp = self._context.mesh.tp
        rows = step_rows(batch, self._context)
        self._begin_step(rows)
        hidden, residual = self.embedding(batch.token_ids), None
        chosen: list[Tensor] = []
        for layer, cache in zip(self.layers, kv_cache, strict=True):
            hidden, residual, experts = layer(hidden, residual, batch, rows, cache, self.cos_sin)
            if experts is not None and batch.want_experts:
                chosen.append(experts)
        normed, _ = self.norm.add(hidden, residual)
        logits = self.head(tp.all_gather(normed)[batch.logit_rows])
        if not chosen:
            return ForwardResult(logits)
        experts = tp.all_gather(torch.stack(chosen, dim=1).int())  # NCCL knows no int16
        return ForwardResult(logits, experts.to(torch.int16))

    def regroup(self, dispatcher: TokenDispatcher | None) -> None:
        """Carry tokens by a dispatcher over what has become of mesh.ep; None when that is one rank."""
        self._dispatcher = dispatcher
        for layer in self.layers:
            if isinstance(layer.feed_forward, MoeLayer):
                layer.feed_forward.regroup(dispatcher)

    def _begin_step(self, rows: StepRows) -> None:
        if self.expert_map is not None:
            self.expert_map.begin_step(rows.valid)
        if self._load is not None:
            self._load.begin_step(rows.valid, rows.decode)
        if self._dispatcher is not None:
            self._dispatcher.begin_step(rows.ep_sizes)

    def new_kv_cache(self, num_pages: int, page_size: int) -> list[Tensor]:
        """One zeroed cache a layer, shaped as kv_cache_shape says."""
        size, context = self._context.mesh.tp.size, self._context
        shapes = [kv_cache_shape(layer.attention, size, num_pages, page_size) for layer in self.spec.layers]
        return [torch.zeros(shape, dtype=context.dtype, device=context.device) for shape in shapes]

    @property
    def expert_weights(self) -> list[ExpertWeights]:
        """Of each MoE layer."""
        blocks = (layer.feed_forward for layer in self.layers)
        return [block.experts for block in blocks if isinstance(block, MoeLayer)]

    def pieces(self, present: Container[str]) -> Iterator[Piece]:
        """Every tensor that the model's checkpoint must have; present: the names it does have."""
        for matrix in self.matrices:
            yield from matrix.pieces()
        for layer in self.layers:
            yield from layer.pieces(present)
        yield from self.norm.pieces()


class DecoderLayer:
    """Attention, then experts or a dense MLP; the norm before each also adds to the residual."""

    def __init__(
        self,
        context: LayerContext,
        model: ModelSpec,
        index: int,
        layer: LayerSpec,
        feed_forward: MoeLayer | TensorParallelMlp,
    ):
        prefix = f"model.layers.{index}"
        attention_prefix = f"{prefix}.self_attn"
        self.attention: GroupedQueryAttention | MultiHeadLatentAttention
        if isinstance(layer.attention, GroupedAttention):
            self.attention = GroupedQueryAttention(context, attention_prefix, layer.attention, model)
        else:
            self.attention = MultiHeadLatentAttention(context, attention_prefix, layer.attention, model)
        self.feed_forward = feed_forward
        names = ("input_layernorm", "post_attention_layernorm")
        size, eps = model.hidden_size, model.norm_eps
        self.norms = [RmsNorm(context, f"{prefix}.{name}", size, eps) for name in names]

    def __call__(
        self,
        hidden: Tensor,
        residual: Tensor | None,
        batch: ForwardBatch,
        rows: StepRows,
        cache: Tensor,
        cos_sin: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """hidden, residual [rows, H] -> (hidden, residual, experts chosen int64 [rows, K] or None)."""
        normed, residual = self.norms[0].add(hidden, residual)
        hidden = self.attention(normed, batch, cache, cos_sin)
        normed, residual = self.norms[1].add(hidden, residual)
        if isinstance(self.feed_forward, MoeLayer):
            hidden, experts = self.feed_forward(normed, rows)
            return hidden, residual, experts
        return self.feed_forward(normed), residual, None

    def pieces(self, present: Container[str]) -> Iterator[Piece]:
        yield from self.attention.pieces()
        for norm in self.norms:
            yield from norm.pieces()
        if isinstance(self.feed_forward, MoeLayer):
            yield from self.feed_forward.pieces(present)
        else:
            yield from self.feed_forward.pieces()
