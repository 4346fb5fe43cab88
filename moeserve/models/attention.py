"""Attention over a paged cache, its heads cut over the tp group: grouped (GQA) and latent (MLA).

Both take this rank's residual rows [T / tp, H] and give back the same rows; all T rows of the replica pass
through each rank's heads in between.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moeserve.forward_batch import ForwardBatch
from moeserve.layers.context import LayerContext, Piece, share
from moeserve.layers.linear import ColumnLinear, RowLinear, Rows
from moeserve.layers.norm import RmsNorm
from moeserve.models.spec import GroupedAttention, LatentAttention, ModelSpec

_LATENT_NORM_EPS = 1e-6  # fixed in DeepSeek's modelling files, whatever rms_norm_eps says


class GroupedQueryAttention:
    """Cache [2, pages, page_size, KV heads of this rank, head_dim]: keys, then values."""

    def __init__(self, context: LayerContext, prefix: str, spec: GroupedAttention, model: ModelSpec):
        tp = context.mesh.tp
        self._ops, self._tp, self._spec = context.ops, tp, spec
        self._interleaved, self._eps = model.rope.interleaved, model.norm_eps
        self._kv_heads = local_kv_heads(spec, tp.size)
        size = spec.head_dim
        q_rows, kv_rows = spec.num_heads * size, spec.num_kv_heads * size
        first = tp.rank * spec.num_kv_heads // tp.size * size  # with fewer KV heads than ranks some share one
        kept = slice(first, first + self._kv_heads * size)
        parts = [Rows(f"{prefix}.q_proj", q_rows, share(q_rows, tp.rank, tp.size))]
        parts += [Rows(f"{prefix}.{name}", kv_rows, kept) for name in ("k_proj", "v_proj")]
        self.qkv = ColumnLinear(context, model.hidden_size, parts, spec.qkv_bias)
        self.output = RowLinear(context, f"{prefix}.o_proj", q_rows, model.hidden_size, spec.output_bias)
        self.norms = (
            [RmsNorm(context, f"{prefix}.{name}", size, model.norm_eps) for name in ("q_norm", "k_norm")]
            if spec.head_norm
            else []
        )

    def __call__(self, x: Tensor, batch: ForwardBatch, cache: Tensor, cos_sin: Tensor) -> Tensor:
        ops = self._ops
        q = ops.take_heads(
            self.qkv(self._tp.all_gather(x)),
            (self.norms[0].weight, self.norms[1].weight) if self.norms else None,
            self._eps,
            batch.positions,
            cos_sin,
            self._interleaved,
            cache[0],
            cache[1],
            batch.kv_slots,
        )
        out = ops.paged_attention(q, cache[0], cache[1], batch, self._spec.scale, self._spec.window)
        return self.output(out.flatten(1))

    def pieces(self) -> Iterator[Piece]:
        yield from self.qkv.pieces()
        yield from self.output.pieces()
        for norm in self.norms:
            yield from norm.pieces()


class MultiHeadLatentAttention:
    """Cache [1, pages, page_size, 1, kv_lora_rank + rope_dim], the same on each tp rank: latent, rotated key.

    Attention runs on the latent itself ("absorbed"): queries are mapped into its space and results out of
    it, so that a cached token is read once for all heads. The first projections are whole on every rank;
    with a query latent they see only the rank's own rows, and the short latents travel instead of the hidden
    state.
    """

    def __init__(self, context: LayerContext, prefix: str, spec: LatentAttention, model: ModelSpec):
        tp = context.mesh.tp
        self._ops, self._tp, self._spec = context.ops, tp, spec
        self._interleaved = model.rope.interleaved
        self._prefix = prefix
        self._heads = spec.num_heads // tp.size
        hidden, eps = model.hidden_size, _LATENT_NORM_EPS
        q_rows = spec.num_heads * (spec.nope_dim + spec.rope_dim)
        kept = share(q_rows, tp.rank, tp.size)
        latent = Rows.all(f"{prefix}.kv_a_proj_with_mqa", spec.kv_lora_rank + spec.rope_dim)
        if spec.q_lora_rank is None:
            self.first = ColumnLinear(context, hidden, [latent], spec.bias)
            self.q_norm = None
            self.q = ColumnLinear(context, hidden, [Rows(f"{prefix}.q_proj", q_rows, kept)])
        else:
            rank = spec.q_lora_rank
            self.first = ColumnLinear(
                context, hidden, [Rows.all(f"{prefix}.q_a_proj", rank), latent], spec.bias
            )
            self.q_norm = RmsNorm(context, f"{prefix}.q_a_layernorm", rank, eps)
            self.q = ColumnLinear(context, rank, [Rows(f"{prefix}.q_b_proj", q_rows, kept)])
        self.kv_norm = RmsNorm(context, f"{prefix}.kv_a_layernorm", spec.kv_lora_rank, eps)
        # kv_b_proj makes a head's keys and values from the latent; queries need its transpose
        self.to_latent = context.empty(self._heads, spec.kv_lora_rank, spec.nope_dim)
        self.from_latent = context.empty(self._heads, spec.value_dim, spec.kv_lora_rank)
        v_columns = spec.num_heads * spec.value_dim
        self.output = RowLinear(context, f"{prefix}.o_proj", v_columns, hidden, spec.bias)

    def __call__(self, x: Tensor, batch: ForwardBatch, cache: Tensor, cos_sin: Tensor) -> Tensor:
        ops, spec = self._ops, self._spec
        q, latent, key_rope = self._project(x)
        q_nope, q_rope = torch.split(q, [spec.nope_dim, spec.rope_dim], dim=2)
        q_rope = ops.rope(q_rope, batch.positions, cos_sin, self._interleaved)
        key_rope = ops.rope(key_rope.unsqueeze(1), batch.positions, cos_sin, self._interleaved)
        keys = torch.cat((self.kv_norm(latent).unsqueeze(1), key_rope), dim=2)  # [T, 1, kv_lora + rope]
        ops.write_kv(cache[0], keys, batch.kv_slots)
        q = torch.cat((ops.head_linear(q_nope, self.to_latent), q_rope), dim=2)  # [T, heads, kv_lora + rope]
        out = ops.paged_attention(q, cache[0], cache[0][..., : spec.kv_lora_rank], batch, spec.scale, None)
        return self.output(ops.head_linear(out, self.from_latent).flatten(1))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, heads, nope + rope], latent [T, kv_lora] before its norm, key [T, rope] before rotation."""
        spec = self._spec
        if self.q_norm is None:
            x = self._tp.all_gather(x)
            latent, key_rope = torch.split(self.first(x), [spec.kv_lora_rank, spec.rope_dim], dim=1)
            q = self.q(x)
        else:
            first = self._tp.all_gather(self.first(x))
            rank = spec.q_lora_rank or 0
            q_latent, latent, key_rope = torch.split(first, [rank, spec.kv_lora_rank, spec.rope_dim], dim=1)
            q = self.q(self.q_norm(q_latent))
        return q.view(q.shape[0], self._heads, spec.nope_dim + spec.rope_dim), latent, key_rope

    def pieces(self) -> Iterator[Piece]:
        yield from self.first.pieces()
        yield from self.q.pieces()
        if self.q_norm is not None:
            yield from self.q_norm.pieces()
        yield from self.kv_norm.pieces()
        name, height = f"{self._prefix}.kv_b_proj.weight", self._spec.nope_dim + self._spec.value_dim
        shape = (self._spec.num_heads * height, self._spec.kv_lora_rank)
        for head in range(self._heads):
            start = (self._tp.rank * self._heads + head) * height
            middle = start + self._spec.nope_dim
            keys, values = slice(start, middle), slice(middle, start + height)
            yield Piece(name, shape, (keys, slice(None)), (self.to_latent[head].T,))
            yield Piece(name, shape, (values, slice(None)), (self.from_latent[head],))
        yield from self.output.pieces()


def local_kv_heads(spec: GroupedAttention, tp_size: int) -> int:
    """KV heads on each of tp_size ranks: their share; one each when there are fewer heads than ranks."""
    return max(1, spec.num_kv_heads // tp_size)


def kv_cache_shape(
    attention: GroupedAttention | LatentAttention, tp_size: int, num_pages: int, page_size: int
) -> tuple[int, int, int, int, int]:
    """[planes, pages, page_size, heads, size] of one layer's cache on one rank; page p is cache[:, p]."""
    if isinstance(attention, LatentAttention):
        return (1, num_pages, page_size, 1, attention.kv_lora_rank + attention.rope_dim)
    return (2, num_pages, page_size, local_kv_heads(attention, tp_size), attention.head_dim)
