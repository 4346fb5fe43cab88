"""The oracle of all dispatchers: one process that sees the inputs of all ranks, in plain loops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeserve.comm.all_to_all.protocol import Dispatched

Source = tuple[int, int, int]
"""(rank, token, choice) that a row came from."""


def dispatch_all(xs: Sequence[Tensor], slots: Sequence[Tensor], slots_per_rank: int) -> list[Dispatched]:
    """xs [T_r, H] and slots [T_r, K] of each rank -> what each rank gets; handle lists the rows' sources."""
    num_slots = len(xs) * slots_per_rank
    sources: list[list[Source]] = [[] for _ in range(num_slots)]
    for rank, chosen in enumerate(slots):
        for token, choices in enumerate(chosen.tolist()):
            for choice, slot in enumerate(choices):
                if slot >= 0:
                    sources[slot].append((rank, token, choice))
    result = []
    for first in range(0, num_slots, slots_per_rank):
        own = sources[first : first + slots_per_rank]
        flat = [source for of_slot in own for source in of_slot]
        rows = [xs[rank][token] for rank, token, _ in flat]
        stacked = torch.stack(rows) if rows else xs[0].new_empty(0, xs[0].shape[1])
        counts = torch.tensor([len(of_slot) for of_slot in own], device=stacked.device)
        result.append(Dispatched(stacked, counts, flat))
    return result


def combine_all(
    ys: Sequence[Tensor], dispatched: Sequence[Dispatched], weights: Sequence[Tensor]
) -> list[Tensor]:
    """ys [N_r, H] in the order of dispatched[r].rows, weights [T_r, K] -> [T_r, H] of each rank."""
    answers: dict[Source, Tensor] = {}
    for y, got in zip(ys, dispatched, strict=True):
        answers.update(zip(got.handle, y.unbind(), strict=True))
    result = []
    for rank, of_rank in enumerate(weights):
        tokens, top_k = of_rank.shape
        sums = torch.zeros(tokens, ys[0].shape[1], device=of_rank.device)
        for token in range(tokens):
            for choice in range(top_k):
                row = answers.get((rank, token, choice))
                if row is not None:
                    product = of_rank[token, choice] * row.to(torch.float32)
                    sums[token] = sums[token] + product
        result.append(sums.to(ys[0].dtype))
    return result
