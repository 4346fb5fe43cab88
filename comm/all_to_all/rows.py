"""Arithmetic on rows that the dispatchers share: order by slot, and the weighted sum. Knows no wire.

A token's choice (t, k) has the flat number t * K + k.
"""

from __future__ import annotations

import torch
from torch import Tensor

SUM_BLOCK = 1 << 17
"""Products that a weighted sum holds at once: 512 KiB of float32, which stays in a core's cache."""


def order_by_slot(slots: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """slots [T, K] -> (flat numbers of all T * K choices in order of slot, int64 bounds [last - first + 1]).

    The choices of slot s are order[bounds[s - first]:bounds[s - first + 1]], by token and choice.
    """
    by_slot, order = torch.sort(slots.reshape(-1), stable=True)
    edges = torch.arange(first, last + 1, dtype=by_slot.dtype, device=by_slot.device)
    return order, torch.searchsorted(by_slot, edges)


def choices_of_rows(rows: Tensor, order: Tensor, num_choices: int) -> Tensor:
    """rows [N, H] of the choices order [N] -> [num_choices, H] by flat number, zeros for the others."""
    complete = rows.shape[0] == num_choices
    out = (rows.new_empty if complete else rows.new_zeros)((num_choices, rows.shape[1]))
    return out.index_copy_(0, order, rows)


def weighted_sum(choices: Tensor, weights: Tensor, skipped: Tensor | None) -> Tensor:
    """choices [T * K, H], weights float32 [T, K] -> [T, H] in choices' dtype.

    The sum over k, in order, of weight * row in float32: products first and additions one by one, never fused
    or regrouped, so that each row has the same bits whatever T is. skipped: bool [T, K], choices that count
    nothing whatever their weight; None when there are none.
    """
    tokens, top_k = weights.shape
    width = choices.shape[1]
    if skipped is not None:
        weights = weights.masked_fill(skipped, 0.0)
    out = choices.new_empty((tokens, width))
    block = max(1, SUM_BLOCK // (top_k * width))
    for start in range(0, tokens, block):
        stop = min(start + block, tokens)
        rows = choices[start * top_k : stop * top_k].view(-1, top_k, width)
        products = rows * weights[start:stop, :, None]
        total = products[:, 0] + 0.0  # a sum starts at +0
        for k in range(1, top_k):
            total += products[:, k]
        out[start:stop] = total
    return out
