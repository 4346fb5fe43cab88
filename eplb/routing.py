"""Which part of an expert's tokens each of its replicas takes: water filling over the replica graph.

Experts in turn spread their load over their ranks so that the levels become equal; sweeps with lengthened steps
come within 1e-3 of the linear program's optimum. Global shares use the counts of all ranks; local ones only what
a source rank knows by itself, so they cost no message.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moeserve.eplb.native import kernels
from moeserve.eplb.types import Floats, Ints, Placement, Topology

STATIC_SWEEPS = 60
STEP_SWEEPS = 12
LOCAL_SWEEPS = 3
_OMEGA = 1.5
_WAYS = (1.0, 0.75, 0.5, 0.25, 0.0)  # from even parts to those of the mean


def static_shares(placement: Placement, load: npt.ArrayLike, topology: Topology) -> Floats:
    """Shares [L, P] for load [L, E] or windows [W, L, E]; experts without load share evenly.

    Those that even out the mean, or as much of the way there from even parts as does best over the windows: where
    windows scatter much, what is best for their mean can be worse than an even split.
    """
    windows = np.asarray(load, np.float64)
    if windows.ndim == 2:
        windows = windows[None]
    placement.check(topology)
    total = windows.sum(axis=2, keepdims=True)
    windows = windows / np.where(total > 0, total, 1.0)
    shares, _ = step_shares(placement, windows.mean(axis=0)[None], topology, STATIC_SWEEPS)
    even = 1.0 / np.take_along_axis(placement.replica_count, placement.slot_to_expert, axis=1)
    part = np.ones(placement.num_layers)
    if len(windows) > 1:
        from_even, from_mean = (_ranks_of(placement, windows, share, topology) for share in (even, shares[0]))
        scores = [(from_even + (from_mean - from_even) * way).max(axis=2).mean(axis=0) for way in _WAYS]
        part = np.array(_WAYS)[np.argmin(np.round(scores, 9), axis=0)]
    blended = even + (shares[0] - even) * part[:, None]
    return _whole(placement, np.round(blended, 6))  # to the grain of the digest


def _ranks_of(placement: Placement, windows: Floats, share: Floats, topology: Topology) -> Floats:
    """[W, L, G] rank loads under the given shares [L, P]."""
    kernel, rank_of = kernels(), rank_of_slot(topology)
    ranks = np.empty((len(windows), placement.num_layers, topology.num_ranks))
    for layer, slots in enumerate(placement.slot_to_expert):
        parts = np.tile(share[layer], (len(windows), 1))
        ranks[:, layer], _ = kernel.fill(windows[:, layer], slots, rank_of, parts, None, 0, _OMEGA)
    return ranks


def step_shares(
    placement: Placement, steps: npt.ArrayLike, topology: Topology, sweeps: int = STEP_SWEEPS
) -> tuple[Floats, Floats]:
    """(shares [B, L, P], rank loads [B, L, G]) for each step's own load [B, L, E], starting from even parts."""
    placement.check(topology)
    load = np.asarray(steps, np.float64)
    if load.ndim != 3 or load.shape[1:] != (placement.num_layers, placement.num_experts):
        raise ValueError(
            f"the load has shape {load.shape}, expected [steps, {placement.num_layers}, {placement.num_experts}]"
        )
    kernel, rank_of = kernels(), rank_of_slot(topology)
    shares = np.empty((len(load), placement.num_layers, placement.num_slots))
    ranks = np.empty((len(load), placement.num_layers, topology.num_ranks))
    even = 1.0 / np.take_along_axis(placement.replica_count, placement.slot_to_expert, axis=1)
    for layer, slots in enumerate(placement.slot_to_expert):
        share = np.tile(even[layer], (len(load), 1))
        ranks[:, layer], _ = kernel.fill(load[:, layer], slots, rank_of, share, None, sweeps, _OMEGA)
        shares[:, layer] = share
    return shares, ranks


def local_counts(
    slots: Ints,
    counts: npt.NDArray[np.int64],
    topology: Topology,
    seed: int = 0,
    *,
    base: Floats | None = None,
    sweeps: int = LOCAL_SWEEPS,
) -> npt.NDArray[np.int64]:
    """Tokens [S, P] that each of S source ranks sends to each slot of one layer, from its own counts [S, E] alone.

    base [G]: what each rank is expected to receive beyond its equal part; see expected_tilt. Shares become whole
    numbers by systematic rounding with a start of its own for each source and expert, so sums are exact and the
    rounding of the sources does not add up.
    """
    rank_of = rank_of_slot(topology)
    load = np.ascontiguousarray(counts, np.float64)
    share = np.tile(1.0 / np.bincount(slots, minlength=load.shape[1])[slots], (len(load), 1))
    kernels().fill(load, slots, rank_of, share, base, sweeps, _OMEGA)
    wanted = share * load[:, slots]
    start = np.random.default_rng(seed).random(load.shape)
    return _rounded(slots, wanted, load, start)


def _rounded(slots: Ints, wanted: Floats, load: Floats, start: Floats) -> npt.NDArray[np.int64]:
    """Whole numbers near wanted [S, P] that add up to load [S, E] for each expert."""
    order = np.argsort(slots, kind="stable")
    first = np.flatnonzero(np.diff(slots[order], prepend=-1))
    upto = np.cumsum(wanted[:, order], axis=1)
    before = upto[:, first] - wanted[:, order][:, first]
    group = np.cumsum(np.diff(slots[order], prepend=-1) > 0) - 1
    expert = slots[order]
    edge = np.floor(upto - before[:, group] + start[:, expert] + 1e-9)
    last = np.append(first[1:], len(slots)) - 1
    edge[:, last] = load[:, expert[last]]
    low = np.concatenate([np.zeros((len(load), 1)), edge[:, :-1]], axis=1)
    low[:, first] = 0
    counts = np.minimum(edge, load[:, expert]) - np.minimum(low, load[:, expert])
    result = np.empty(wanted.shape, np.int64)
    result[:, order] = counts
    return result


def rank_of_slot(topology: Topology) -> Ints:
    return (np.arange(topology.num_slots) // topology.slots_per_rank).astype(np.int32)


def _whole(placement: Placement, share: Floats) -> Floats:
    """share with the sum over each expert's slots brought to 1 again by its first slot."""
    lists = placement.slot_lists
    row = np.arange(placement.num_layers)[:, None]
    by_expert = np.where(lists >= 0, share[row[:, :, None], lists], 0.0)
    share = share.copy()
    share[row, lists[:, :, 0]] = np.maximum(share[row, lists[:, :, 0]] + 1.0 - by_expert.sum(axis=2), 0.0)
    return share
