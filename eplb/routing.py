"""Which part of an expert's tokens each of its replicas takes: water filling over the replica graph.

Experts in turn spread their load over their ranks so that the levels become equal; sweeps with lengthened steps
come within 1e-3 of the linear program's optimum. Global shares use the counts of all ranks; local ones only what
a source rank knows by itself, so they cost no message.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moeserve.eplb.load import merge_windows
from moeserve.eplb.native import kernels
from moeserve.eplb.types import Floats, Ints, Placement, Topology

STATIC_SWEEPS = 60
STEP_SWEEPS = 12
LOCAL_SWEEPS = 6
_OMEGA = 1.5
_SCATTER = 16  # windows over which shares are judged
_WAYS = (1.0, 0.75, 0.5, 0.25, 0.0)  # from even parts to those of the mean


def static_shares(placement: Placement, load: npt.ArrayLike, topology: Topology) -> Floats:
    """Shares [L, P] for load [L, E] or windows [W, L, E]; experts without load share evenly.

    Those that even out the mean, or as much of the way there from even parts as does best over the windows: where
    windows scatter much, what is best for their mean can be worse than an even split.
    """
    windows = np.asarray(load, np.float64)
    if windows.ndim == 2:
        windows = windows[None]
    _check_load(windows, placement, topology, "windows")
    windows = merge_windows(windows, _SCATTER)
    total = windows.sum(axis=2, keepdims=True)
    windows = np.ascontiguousarray(
        (windows / np.where(total > 0, total, 1.0)).transpose(1, 0, 2)
    )  # [L, W, E]
    even = _even(placement)
    best, _ = _fill(placement, windows.mean(axis=1, keepdims=True), even[:, None], topology, STATIC_SWEEPS)
    part = np.ones(placement.num_layers)
    if windows.shape[1] > 1:
        every = (placement.num_layers, windows.shape[1], placement.num_slots)
        (_, from_even), (_, from_best) = (
            _fill(placement, windows, np.broadcast_to(share, every), topology, 0)
            for share in (even[:, None], best)
        )
        scores = [(from_even + (from_best - from_even) * way).max(axis=2).mean(axis=1) for way in _WAYS]
        part = np.array(_WAYS)[np.argmin(np.round(scores, 9), axis=0)]
    blended = even + (best[:, 0] - even) * part[:, None]
    return _whole(placement, np.round(blended, 6))  # to the grain of the digest


def step_shares(
    placement: Placement, steps: npt.ArrayLike, topology: Topology, sweeps: int = STEP_SWEEPS
) -> tuple[Floats, Floats]:
    """(shares [B, L, P], rank loads [B, L, G]) for each step's own load [B, L, E], starting from even parts."""
    load = np.asarray(steps, np.float64)
    _check_load(load, placement, topology, "steps")
    even = np.broadcast_to(_even(placement)[:, None], (placement.num_layers, len(load), placement.num_slots))
    shares, ranks = _fill(placement, load.transpose(1, 0, 2), even, topology, sweeps)
    return shares.transpose(1, 0, 2), ranks.transpose(1, 0, 2)


def _fill(
    placement: Placement, load: Floats, share: Floats, topology: Topology, sweeps: int
) -> tuple[Floats, Floats]:
    """(shares [L, B, P], ranks [L, B, G]) for load [L, B, E], starting from share [L, B, P]."""
    share = np.array(share, order="C")
    rank_of = rank_of_slot(topology)
    ranks = kernels().fill(load, placement.slot_to_expert, rank_of, share, sweeps, _OMEGA)
    return share, ranks


def _check_load(load: Floats, placement: Placement, topology: Topology, what: str) -> None:
    placement.check(topology)
    if load.ndim != 3 or load.shape[1:] != (placement.num_layers, placement.num_experts):
        raise ValueError(
            f"the load has shape {load.shape}, expected [{what}, {placement.num_layers}, {placement.num_experts}]"
        )


def _even(placement: Placement) -> Floats:
    even: Floats = 1.0 / np.take_along_axis(placement.replica_count, placement.slot_to_expert, axis=1)
    return even


def local_counts(
    slots: Ints,
    counts: npt.NDArray[np.int64],
    topology: Topology,
    seed: int = 0,
    sweeps: int = LOCAL_SWEEPS,
) -> npt.NDArray[np.int64]:
    """Tokens [S, P] that each of S source ranks sends to each slot of one layer, from its own counts [S, E] alone.

    Shares become whole numbers whose sums are exact; the rounding error of a rank is carried from expert to expert
    and starts at random in each source, so that it neither grows nor adds up over the sources.
    """
    rank_of = rank_of_slot(topology)
    load = np.ascontiguousarray(counts, np.float64)
    if load.ndim != 2 or load.shape[1] <= slots.max() or len(slots) != topology.num_slots:
        raise ValueError(
            f"the counts have shape {load.shape}, the layer {len(slots)} slots: expected [sources, experts] with "
            f"more than {slots.max()} experts, and {topology.num_slots} slots"
        )
    share = np.tile(1.0 / np.bincount(slots, minlength=load.shape[1])[slots], (len(load), 1))
    kernels().fill(load[None], slots[None], rank_of, share[None], sweeps, _OMEGA)
    wanted = share * load[:, slots]
    error = np.random.default_rng(seed).uniform(-0.5, 0.5, (len(load), topology.num_ranks))
    return _rounded(slots, wanted, load, rank_of, error)


def _rounded(
    slots: Ints, wanted: Floats, load: Floats, rank_of: Ints, error: Floats
) -> npt.NDArray[np.int64]:
    """Whole numbers near wanted [S, P] that add up to load [S, E] for each expert. What a rank has been given too
    much or too little so far (error [S, G]) decides who gets the odd tokens of the next expert."""
    result = np.rint(wanted).astype(np.int64)
    rows = np.arange(len(load))[:, None]
    for expert in np.flatnonzero(np.bincount(slots, minlength=load.shape[1]) > 1):
        at = np.flatnonzero(slots == expert)
        rank = rank_of[at]
        low = np.floor(wanted[:, at] + 1e-9)
        odd = load[:, expert] - low.sum(axis=1)  # tokens left, fewer than replicas
        order = np.argsort(low - wanted[:, at] + error[:, rank], axis=1, kind="stable")
        extra = np.zeros_like(low)
        extra[rows, order] = np.arange(len(at)) < odd[:, None]
        result[:, at] = low + extra
        for i, g in enumerate(rank):
            error[:, g] += low[:, i] + extra[:, i] - wanted[:, at[i]]
    return result


def rank_of_slot(topology: Topology) -> Ints:
    return (np.arange(topology.num_slots) // topology.slots_per_rank).astype(np.int32)


def _whole(placement: Placement, share: Floats) -> Floats:
    """share with the sum over each expert's slots brought to 1 again by its first slot."""
    flat = placement.slot_to_expert + np.arange(placement.num_layers)[:, None] * placement.num_experts
    flat, share = flat.ravel(), share.ravel().copy()
    total = np.bincount(flat, share)
    first = np.empty(len(total), np.int64)
    first[flat[::-1]] = np.arange(len(flat))[::-1]  # the last that is written stays
    share[first] = np.maximum(share[first] + 1.0 - total, 0.0)
    return share.reshape(placement.slot_to_expert.shape)
