"""The tensors of one step, as the model and its ops are given them. Knows no request and no policy."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ForwardBatch:
    """One step of one attention replica; the same on each of its tp ranks.

    T counts the replica's new tokens, padded to a multiple of tp with rows that belong to no sequence; B its
    sequences. All may be zero: an idle replica still takes part in the experts' exchange.
    """

    token_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    kv_slots: Tensor  # int64 [T], page * page_size + offset where the token's keys go; -1 for padding
    query_start: Tensor  # int32 [B + 1], rows query_start[b]:query_start[b+1] belong to sequence b
    context_len: Tensor  # int32 [B], tokens of sequence b in the cache once this step's are written
    page_table: Tensor  # int32 [B, max pages], pages of sequence b in order; unused entries 0
    num_decode: int  # the first num_decode sequences have exactly one new token each
    max_query_len: int
    max_context_len: int
    logit_rows: Tensor  # int64 [M], rows of [T] whose logits are wanted, ascending
    rows_per_rank: tuple[int, ...]  # residual rows of each rank of the stage; rows_per_rank[me] * tp == T
    want_experts: bool = False  # record each token's routed experts
