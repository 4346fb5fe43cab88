"""Shares each expert's tokens of one step among its replicas: water filling of a source rank's own counts.

Whole numbers only, so that every form gives the same slots. Knows neither ranks' messages nor where a placement
comes from. Letters: X experts with replicas on several ranks, M ranks that hold one of them at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

SWEEPS = 3
"""Times that each expert is poured anew; on a source rank's own counts more bring nothing (balancer.md, 4.8)."""
UNIT = 1024
"""Parts of a token in which levels are counted."""
_PHASES = (
    633,
    773,
    583,
    421,
)  # of UNIT for rank, step, expert and layer: near the golden section and its kin


@dataclass(frozen=True)
class SplitTable:
    """One layer's slots as one source rank sees them; int64 tensors.

    slot, rank: [E], the first slot of each expert and the rank it is on. row: [E], where the expert stands in the
    arrays of split experts, -1 when all its slots are on one rank. expert: [X]; num_hosts: [X]; hosts: [X, M] ranks,
    filled up with num_ranks; host_slots: [X, M] the slot used on each, filled up with -1. The source rank itself is
    the first host where it is one: what cannot be divided falls to it. rounds: (first row, last row + 1) of
    experts that share no host and can be poured side by side. num_ranks: of the group.
    """

    slot: Tensor
    rank: Tensor
    row: Tensor
    expert: Tensor
    num_hosts: Tensor
    hosts: Tensor
    host_slots: Tensor
    rounds: tuple[tuple[int, int], ...]
    num_ranks: int

    @classmethod
    def make(
        cls,
        slot_to_expert: npt.NDArray[np.integer],
        num_experts: int,
        num_ranks: int,
        source_rank: int,
        device: torch.device | str = "cpu",
    ) -> SplitTable:
        """slot_to_expert: [P] of one layer; of an expert's slots on one rank the first is used."""
        per_rank = len(slot_to_expert) // num_ranks
        first = np.full(num_experts, -1)
        hosts: dict[int, dict[int, int]] = {}  # by expert: rank -> slot
        for slot, expert in enumerate(slot_to_expert.tolist()):
            hosts.setdefault(expert, {}).setdefault(slot // per_rank, slot)
            if first[expert] < 0:
                first[expert] = slot
        order, rounds = _rounds({e: set(on) for e, on in hosts.items() if len(on) > 1})
        width = max((len(hosts[e]) for e in order), default=0)
        row = np.full(num_experts, -1)
        ranks, slots = np.full((len(order), width), num_ranks), np.full((len(order), width), -1)
        for i, expert in enumerate(order):
            on = sorted(hosts[expert].items(), key=lambda host: (host[0] != source_rank, host[0]))
            row[expert] = i
            ranks[i, : len(on)], slots[i, : len(on)] = zip(*on, strict=True)

        def tensor(values: object) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        return cls(
            slot=tensor(first),
            rank=tensor(first // per_rank),
            row=tensor(row),
            expert=tensor(order),
            num_hosts=tensor([len(hosts[expert]) for expert in order]),
            hosts=tensor(ranks),
            host_slots=tensor(slots),
            rounds=rounds,
            num_ranks=num_ranks,
        )


def _rounds(hosts: dict[int, set[int]]) -> tuple[list[int], tuple[tuple[int, int], ...]]:
    """The experts in an order in which each round's share no host, and the bounds of the rounds."""
    rounds: list[tuple[list[int], set[int]]] = []
    for expert in sorted(hosts):
        for experts, taken in rounds:
            if not taken & hosts[expert]:
                experts.append(expert)
                taken |= hosts[expert]
                break
        else:
            rounds.append(([expert], set(hosts[expert])))
    order = [expert for experts, _ in rounds for expert in experts]
    ends = np.cumsum([len(experts) for experts, _ in rounds]).tolist()
    return order, tuple(zip([0, *ends], ends, strict=False))


def phase(source_rank: int, step: int, layer: int) -> int:
    """Where the rounding of a step begins: it differs over ranks, steps and layers, so that errors do not add up."""
    return (source_rank * _PHASES[0] + step * _PHASES[1] + layer * _PHASES[3]) % UNIT


def spread_tokens(experts: Tensor, valid: Tensor, table: SplitTable, phase: int) -> Tensor:
    """experts int64 [T, K], valid bool [T] -> slots int64 [T, K], -1 for rows that are not valid.

    Levels begin at what experts on one rank bring; the others begin spread evenly and are poured anew one after
    another, each to the level surface that its hosts then have. The tokens of an expert go to its hosts in turn
    of their running number. Never waits for the device.
    """
    num_experts = len(table.slot)
    flat = experts.masked_fill(~valid.unsqueeze(1), num_experts).flatten()
    counts = flat.new_zeros(num_experts + 1).scatter_add_(0, flat, torch.ones_like(flat))
    number = _running_numbers(flat, counts)
    cuts = _cuts(counts[:-1], table, phase)  # [X, M]
    if not len(cuts):
        slots = table.slot[experts]
    else:
        row = table.row[experts]
        host = (number.view(-1, 1) >= cuts[row.flatten(), :-1]).sum(1).view(row.shape)
        slots = torch.where(row < 0, table.slot[experts], table.host_slots[row, host])
    return slots.masked_fill_(~valid.unsqueeze(1), -1)


def _running_numbers(flat: Tensor, counts: Tensor) -> Tensor:
    """flat [N], counts of each value -> how many equal values stand before each, [N]."""
    order = flat.argsort(stable=True)
    first = counts.cumsum(0) - counts
    places = torch.arange(len(flat), device=flat.device)
    return torch.empty_like(flat).scatter_(0, order, places - first[flat[order]])


def _cuts(counts: Tensor, table: SplitTable, phase: int) -> Tensor:
    """counts int64 [E] -> [X, M]: tokens of a split expert before cut i, from cut i - 1 on, go to host i."""
    single = counts.masked_fill(table.row >= 0, 0) * UNIT
    levels = counts.new_zeros(table.num_ranks + 1).scatter_add_(0, table.rank, single)
    load = (counts[table.expert] * UNIT).unsqueeze(1)  # [X, 1]
    there = table.hosts < table.num_ranks
    poured = _with_rest(load // table.num_hosts.unsqueeze(1) * there, load)
    levels.scatter_add_(0, table.hosts.flatten(), poured.flatten())
    parts = torch.arange(1, table.hosts.shape[1] + 1, device=counts.device)
    for _ in range(SWEEPS):
        for start, end in table.rounds:
            hosts, w = table.hosts[start:end], load[start:end]
            below = levels[hosts] - poured[start:end]
            below.masked_fill_(~there[start:end], torch.iinfo(torch.int64).max >> 20)
            # the surface is the least of the mean levels that 1, 2, ... of the lowest hosts would come to
            surface = ((below.sort(1).values.cumsum(1) + w) // parts).amin(1, keepdim=True)
            anew = _with_rest((surface - below).clamp_(min=0), w)
            levels.scatter_(0, hosts.flatten(), (below + anew).flatten())
            poured[start:end] = anew
    begin = (table.expert * _PHASES[2] + phase) % UNIT
    return (poured.cumsum(1) + begin.unsqueeze(1)) // UNIT


def _with_rest(poured: Tensor, load: Tensor) -> Tensor:
    """poured [X, M] with what is missing to load [X, 1] given to the first host."""
    poured[:, :1] += load - poured.sum(1, keepdim=True)
    return poured
