"""The plain ops against independent, slower or torch's own forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moeserve.forward_batch import ForwardBatch
from moeserve.ops import reference, table


def make_batch(queries: list[int], contexts: list[int], page_size: int, padding: int) -> ForwardBatch:
    """Sequences on pages in descending order; the ones with one token come first."""
    num_pages = -(-max(contexts) // page_size)
    pages = torch.arange(len(queries) * num_pages - 1, -1, -1).view(len(queries), num_pages)
    rows = sum(queries) + padding
    unused = torch.zeros(rows, dtype=torch.int64)
    return ForwardBatch(
        token_ids=unused,
        positions=unused,
        kv_slots=unused,
        query_start=torch.tensor([0, *torch.tensor(queries).cumsum(0)], dtype=torch.int32),
        context_len=torch.tensor(contexts, dtype=torch.int32),
        page_table=pages.int(),
        num_decode=sum(n == 1 for n in queries),
        max_query_len=max(queries),
        max_context_len=max(contexts),
        logit_rows=unused,
        rows_per_rank=(rows,),
    )


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_paged_attention_is_masked_attention(kv_heads: int, window: int | None) -> None:
    torch.manual_seed(0)
    queries, contexts, page_size = [1, 1, 5, 7], [9, 1, 12, 7], 4
    batch = make_batch(queries, contexts, page_size, padding=2)
    shape = (int(batch.page_table.max()) + 1, page_size, kv_heads)
    keys, values = torch.randn(*shape, 6), torch.randn(*shape, 10)
    q = torch.randn(sum(queries) + 2, 4, 6)
    out = reference.paged_attention(q, keys, values, batch, 0.3, window)
    assert not out[-2:].any()
    for sequence, (new, context) in enumerate(zip(queries, contexts, strict=True)):
        start = int(batch.query_start[sequence])
        pages = batch.page_table[sequence].long()
        k, v = (cache[pages].flatten(0, 1)[:context].transpose(0, 1) for cache in (keys, values))
        mask = torch.ones(context, context, dtype=torch.bool).tril()
        if window:
            mask &= ~torch.ones(context, context, dtype=torch.bool).tril(-window)
        k, v = (x.repeat_interleave(4 // kv_heads, 0) for x in (k, v))
        part = q[start : start + new].transpose(0, 1)
        wanted = F.scaled_dot_product_attention(part, k, v, attn_mask=mask[context - new :], scale=0.3)
        torch.testing.assert_close(out[start : start + new], wanted.transpose(0, 1))


def test_long_prefills_are_attended_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    batch = make_batch([9], [11], 4, padding=0)
    cache, q = torch.randn(3, 4, 1, 6), torch.randn(9, 2, 6)
    whole = reference.paged_attention(q, cache, cache, batch, 0.3, None)
    monkeypatch.setattr(reference, "_QUERY_BLOCK", 4)
    torch.testing.assert_close(reference.paged_attention(q, cache, cache, batch, 0.3, None), whole)


def test_write_kv_skips_padding() -> None:
    cache, values = torch.zeros(3, 4, 2, 5), torch.randn(3, 2, 5)
    reference.write_kv(cache, values, torch.tensor([9, -1, 0]))
    assert torch.equal(cache[2, 1], values[0]) and torch.equal(cache[0, 0], values[2])
    assert int((cache != 0).sum()) == 20


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_turns_pairs_as_complex_numbers(interleaved: bool) -> None:
    torch.manual_seed(0)
    x, positions, angles = torch.randn(5, 2, 8), torch.tensor([3, 0, 7, 7, 1]), torch.rand(8, 4) * 6
    table_ = torch.cat((angles.cos(), angles.sin()), dim=1)
    pairs = x.view(5, 2, 4, 2) if interleaved else x.view(5, 2, 2, 4).transpose(2, 3)
    turned = (
        torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones(8, 4), angles)[positions, None]
    )
    parts = torch.view_as_real(turned)
    wanted = parts.flatten(2) if interleaved else parts.transpose(2, 3).flatten(2)
    torch.testing.assert_close(reference.rope(x, positions, table_, interleaved), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, residual, weight = torch.randn(4, 16).to(dtype), torch.randn(4, 16).to(dtype), torch.rand(16).to(dtype)
    wanted = F.rms_norm((x + residual).float(), (16,), eps=1e-5).to(dtype) * weight
    normed, total = reference.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(normed, wanted)
    assert torch.equal(reference.rms_norm(total, weight, 1e-5), normed)


def test_head_linear_is_one_product_a_head() -> None:
    x, weight = torch.randn(5, 3, 4), torch.randn(3, 6, 4)
    wanted = torch.stack([x[:, head] @ weight[head].T for head in range(3)], dim=1)
    torch.testing.assert_close(reference.head_linear(x, weight), wanted)


def expert(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ down.T


def test_experts_token_by_token() -> None:
    torch.manual_seed(0)
    gate_up, down = torch.randn(5, 6, 4), torch.randn(5, 4, 3)
    x, weights = torch.randn(7, 4), torch.rand(7, 2)
    slots = torch.randint(-1, 5, (7, 2))
    slots[0] = -1
    wanted = torch.zeros(7, 4)
    for token in range(7):
        for k, slot in enumerate(slots[token].tolist()):
            if slot >= 0:
                wanted[token] += weights[token, k] * expert(x[token], gate_up[slot], down[slot])
    torch.testing.assert_close(reference.fused_experts(x, slots, weights, gate_up, down), wanted)
    empty = reference.fused_experts(x[:0], slots[:0], weights[:0], gate_up, down)
    assert empty.shape == (0, 4)


def test_table_prefers_the_registered_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_fast_forms", {})
    table.register("linear", "cuda", max)
    assert table.get("linear", "cuda:0") is max
    assert table.get("linear", "cpu") is reference.linear
    assert table.choose_ops("cuda").linear is max and table.choose_ops("cpu").rope is reference.rope
