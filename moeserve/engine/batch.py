"""From what was scheduled to the tensors that the model is given. Knows no policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeserve.engine.scheduler import ScheduledBatch
from moeserve.forward_batch import ForwardBatch


def make_batch(
    scheduled: ScheduledBatch,
    page_size: int,
    num_rows: int,
    rows_per_rank: Sequence[int],
    device: torch.device | str = "cpu",
) -> ForwardBatch:
    """The tensors of a scheduled step, before `finish` is told of it. num_rows: T, scheduled.num_tokens or
    more."""
    chunks = scheduled.chunks
    num_tokens = scheduled.num_tokens
    assert num_rows >= num_tokens
    starts = np.array([chunk.start for chunk in chunks], dtype=np.int64)
    lengths = np.array([chunk.num_tokens for chunk in chunks], dtype=np.int64)
    query_start = np.zeros(len(chunks) + 1, dtype=np.int64)
    np.cumsum(lengths, out=query_start[1:])

    page_table = np.zeros((len(chunks), max((len(c.sequence.pages) for c in chunks), default=0)), np.int32)
    for row, chunk in enumerate(chunks):
        pages = chunk.sequence.pages
        page_table[row, : len(pages)] = pages

    token_ids = np.zeros(num_rows, dtype=np.int64)
    positions = np.zeros(num_rows, dtype=np.int64)
    kv_slots = np.full(num_rows, -1, dtype=np.int64)
    num_decode = scheduled.num_decode
    token_ids[:num_decode] = [chunk.sequence.tokens[chunk.start] for chunk in chunks[:num_decode]]
    for row, chunk in zip(query_start[num_decode:].tolist(), chunks[num_decode:], strict=False):
        end = chunk.start + chunk.num_tokens
        token_ids[row : row + chunk.num_tokens] = chunk.sequence.tokens[chunk.start : end]
    sequence_of_row = np.repeat(np.arange(len(chunks)), lengths)
    position = np.arange(num_tokens) + (starts - query_start[:-1])[sequence_of_row]
    positions[:num_tokens] = position
    kv_slots[:num_tokens] = (
        page_table[sequence_of_row, position // page_size] * np.int64(page_size) + position % page_size
    )

    context_len = starts + lengths
    return ForwardBatch(
        token_ids=_tensor(token_ids, device),
        positions=_tensor(positions, device),
        kv_slots=_tensor(kv_slots, device),
        query_start=_tensor(query_start.astype(np.int32), device),
        context_len=_tensor(context_len.astype(np.int32), device),
        page_table=_tensor(page_table, device),
        num_decode=num_decode,
        max_query_len=int(lengths.max(initial=0)),
        max_context_len=int(context_len.max(initial=0)),
        logit_rows=_tensor(_logit_rows(scheduled, query_start), device),
        rows_per_rank=tuple(rows_per_rank),
        want_experts=scheduled.want_experts,
    )


def _logit_rows(scheduled: ScheduledBatch, query_start: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows that score a prompt token or sample the next one: the order in which the sampler takes the
    logits."""
    rows: list[int] = []
    for first, chunk in zip(query_start.tolist(), scheduled.chunks, strict=False):
        if chunk.num_scored:
            scored = first + chunk.score_start - chunk.start
            rows.extend(range(scored, scored + chunk.num_scored))
        if chunk.samples:
            rows.append(first + chunk.num_tokens - 1)
    return np.array(rows, dtype=np.int64)


def _tensor(values: NDArray[Any], device: torch.device | str) -> Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)
