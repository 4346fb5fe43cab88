"""Plain-torch form of every op: runs on any device, and is the oracle of the fast forms.

Pure functions on tensors of one dtype (float32 or bfloat16); sums and softmaxes run in float32. Letters:
T rows, H hidden, D head size, S local slots, F expert intermediate, K choices a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from moeserve.forward_batch import ForwardBatch
from moeserve.ops.spread import spread_tokens as spread_tokens

if TYPE_CHECKING:
    from moeserve.models.spec import Routing

_QUERY_BLOCK = 512  # rows of a prefill whose scores exist at once: bounds memory at heads * 512 * context


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K], weight [N, K], bias [N] -> [T, N]."""
    return F.linear(x, weight, bias)


def head_linear(x: Tensor, weight: Tensor) -> Tensor:
    """A matrix a head: x [T, heads, K] (any strides), weight [heads, N, K] -> [T, heads, N]."""
    return torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1).contiguous()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H] over its root mean square, times weight [H]; the mean in float32."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), both [T, H]."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2F] -> silu(first half) * second half, [T, F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rope(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding of x [T, heads, D] at positions int64 [T] by cos_sin float32 [max position, D].

    cos_sin holds cos of the D/2 angles, then sin. Pairs are (i, i + D/2), or (2i, 2i + 1) when interleaved;
    a rotated pair stays where it was.
    """
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)  # [T, 1, D/2]
    wide = x.float()
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
        pairs = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return pairs.flatten(-2).to(x.dtype)
    first, second = wide.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def write_kv(cache: Tensor, values: Tensor, kv_slots: Tensor) -> None:
    """Write values [T, heads, D] at the flat token slots kv_slots int64 [T] of cache [pages, page, heads, D].

    A row of slot -1 is skipped.
    """
    kept = kv_slots >= 0
    page_size = cache.shape[1]
    slots = kv_slots[kept]
    cache[slots // page_size, slots % page_size] = values[kept]


def take_heads(
    qkv: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    positions: Tensor,
    cos_sin: Tensor,
    interleaved: bool,
    key_cache: Tensor,
    value_cache: Tensor,
    kv_slots: Tensor,
) -> Tensor:
    """Split a fused projection [T, (Hq + 2 Hkv) * D] into heads: queries [T, Hq, D] are given back, keys and
    values go to the cache at kv_slots.

    Queries and keys are rotated, before that normed by the two weights [D] of `norms`.
    """
    kv_heads, size = key_cache.shape[2:]
    heads = qkv.view(qkv.shape[0], qkv.shape[1] // size, size)
    q, keys, values = torch.split(heads, [heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    if norms is not None:
        q, keys = rms_norm(q, norms[0], eps), rms_norm(keys, norms[1], eps)
    write_kv(key_cache, rope(keys, positions, cos_sin, interleaved), kv_slots)
    write_kv(value_cache, values, kv_slots)
    return rope(q, positions, cos_sin, interleaved)


def choose_experts(logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """logits [T, E], bias float32 [E] -> (weights float32 [T, K], experts int64 [T, K]), the best first."""
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


def paged_attention(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, batch: ForwardBatch, scale: float, window: int | None
) -> Tensor:
    """Causal attention of each sequence's new tokens over its cached ones (this step's are already written).

    q [T, Hq, D], key_cache [pages, page, Hkv, D], value_cache [pages, page, Hkv, Dv] (any strides)
    -> [T, Hq, Dv]; rows of no sequence are zero. Query head h uses KV head h * Hkv // Hq. With a window a
    token at position p sees positions p - window + 1 .. p.
    """
    out = q.new_zeros(q.shape[0], q.shape[1], value_cache.shape[3])
    if batch.num_decode:
        rows = slice(0, batch.num_decode)  # decodes come first and have one row each
        keys, values = (_pages(cache, batch.page_table[rows]) for cache in (key_cache, value_cache))
        last = batch.context_len[rows].long().unsqueeze(1) - 1  # [B, 1] position of the query
        out[rows] = _attend(q[rows].unsqueeze(1), keys, values, last, scale, window).squeeze(1)
    starts, lengths = batch.query_start.tolist(), batch.context_len.tolist()
    for sequence in range(batch.num_decode, len(lengths)):
        context = lengths[sequence]
        num_pages = -(-context // key_cache.shape[1])
        table = batch.page_table[sequence : sequence + 1, :num_pages]
        keys, values = (_pages(cache, table)[:, :context] for cache in (key_cache, value_cache))
        first, end = starts[sequence], starts[sequence + 1]
        for row in range(first, end, _QUERY_BLOCK):
            stop = min(row + _QUERY_BLOCK, end)
            positions = torch.arange(context - end + row, context - end + stop, device=q.device)
            block = q[row:stop].unsqueeze(0)
            out[row:stop] = _attend(block, keys, values, positions.unsqueeze(0), scale, window).squeeze(0)
    return out


def _pages(cache: Tensor, page_table: Tensor) -> Tensor:
    """cache [pages, page, heads, D], page_table [B, n] -> [B, n * page, heads, D]."""
    return cache[page_table.long()].flatten(1, 2)


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float, window: int | None
) -> Tensor:
    """q [B, n, Hq, D] at positions [B, n], keys [B, C, Hkv, D], values [B, C, Hkv, Dv] -> [B, n, Hq, Dv]."""
    sequences, rows, heads, size = q.shape
    kv_heads = keys.shape[2]
    grouped = q.reshape(sequences, rows, kv_heads, heads // kv_heads, size).permute(0, 2, 3, 1, 4)
    grouped = grouped.reshape(sequences, kv_heads, -1, size)  # [B, Hkv, G * n, D]
    scores = grouped @ keys.permute(0, 2, 3, 1)  # [B, Hkv, G * n, C]
    scores = scores.float().view(sequences, kv_heads, -1, rows, keys.shape[1]) * scale
    columns = torch.arange(keys.shape[1], device=q.device)
    seen = columns <= positions.unsqueeze(-1)  # [B, n, C]
    if window is not None:
        seen &= columns > positions.unsqueeze(-1) - window
    scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
    shares = scores.softmax(-1).to(q.dtype).flatten(2, 3)
    out = shares @ values.permute(0, 2, 1, 3)  # [B, Hkv, G * n, Dv]
    return out.view(sequences, heads, rows, -1).transpose(1, 2)


def grouped_experts(rows: Tensor, tokens_per_slot: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU experts over rows [N, H] sorted by slot, tokens_per_slot int64 [S] of them each -> [N, H].

    gate_up [S, 2F, H] (gate rows first), down [S, H, F].
    """
    out = torch.empty_like(rows)
    start = 0
    for slot, count in enumerate(tokens_per_slot.tolist()):
        if count:
            hidden = silu_mul(rows[start : start + count] @ gate_up[slot].T)
            out[start : start + count] = hidden @ down[slot].T
            start += count
    return out


def fused_experts(x: Tensor, slots: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The experts of tokens that stay on this rank: x [T, H] -> [T, H].

    slots int64 [T, K] (-1 contributes nothing), weights float32 [T, K]. A token's result is the sum over its
    choices, in top-k order, of weight * row, in float32.
    """
    flat = slots.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat + 1, minlength=gate_up.shape[0] + 1)
    order = order[int(counts[0]) :]
    rows = x.new_zeros(flat.shape[0], x.shape[1])
    rows[order] = grouped_experts(x[order // slots.shape[1]], counts[1:], gate_up, down)
    choices = rows.view(*slots.shape, x.shape[1])  # [T, K, H]
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for k in range(slots.shape[1]):
        total += weights[:, k : k + 1] * choices[:, k].float()
    return total.to(x.dtype)
