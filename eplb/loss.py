"""What is left of a placement when a rank is lost. Knows neither why nor what the others do about it."""

from __future__ import annotations

import numpy as np

from moeserve.eplb.types import Placement, Topology


def without_rank(placement: Placement, topology: Topology, rank: int) -> tuple[Placement, Topology]:
    """The placement of the other ranks, numbered anew without a gap, with the generation after this one.

    Every slot keeps its expert. The lost slots' tokens go to an expert's other slots in proportion to their
    shares, evenly where these had none. Nodes are forgotten: they may no longer be of one size.
    Raises ValueError where an expert stands on the lost rank alone.
    """
    placement.check(topology)
    if not 0 <= rank < topology.num_ranks:
        raise ValueError(f"rank = {rank}: expected 0 to {topology.num_ranks - 1}")
    if topology.num_ranks == 1:
        raise ValueError("rank 0 is the only one")
    width = topology.slots_per_rank
    lost = slice(rank * width, (rank + 1) * width)
    slots = np.delete(placement.slot_to_expert, lost, axis=1)
    experts = placement.num_experts
    for layer, row in enumerate(slots):
        missing = np.flatnonzero(np.bincount(row, minlength=experts) == 0)
        if len(missing):
            which = f"expert {int(missing[0])} of MoE layer {layer}, counted from 0,"
            raise ValueError(f"{which} has no slot on another rank")
    share = np.delete(placement.share, lost, axis=1)
    rows = np.arange(len(slots))[:, None]

    def total(
        values: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
    ) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        """[L, P] -> of each slot, the sum over the slots of its expert."""
        sums = np.zeros((len(slots), experts))
        np.add.at(sums, (rows, slots), values)
        return sums[rows, slots]

    share = np.where(total(share) > 0, share, 1.0)
    left = Placement(slots, experts, placement.generation + 1, share / total(share))
    return left, Topology(topology.num_ranks - 1, slots_per_rank=width)
