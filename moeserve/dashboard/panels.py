"""The panels that show what was counted and what the balancer did, as JSON values. Knows no solver.

Every ratio is load over fair share, which is the mean of its layer; the largest one over ranks is the imbalance.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from moeserve.dashboard.recording import Recording, Shown
from moeserve.eplb.metrics import FORMULA, imbalance, rank_load, slot_load
from moeserve.eplb.types import Floats, Placement, Topology

COLUMNS = ("rank", "expert", "slot")


def summary(source: Shown, recording: Recording | None) -> dict[str, Any]:
    """The head of the page: what is served or was recorded, and its windows by phase."""
    head = {
        "model": source.model,
        "file": source.file,
        "balancer": source.state,
        "formula": FORMULA,
        "version": source.version,
        "state": "waiting" if recording is None else "ready",
    }
    if recording is None:
        return head
    load, placement, topology = recording.load, recording.placement, recording.topology
    windows: dict[str, list[dict[str, Any]]] = {phase: [] for phase in load.phases}
    for window in load.windows:
        windows[window.phase].append(
            {
                "start_step": window.start_step,
                "steps": window.steps,
                "tokens": window.tokens,
                "start_time": window.start_time,
            }
        )
    return head | {
        "version": recording.version,
        "layers": list(load.layers),
        "num_experts": load.num_experts,
        "num_slots": topology.num_slots,
        "ep_size": topology.num_ranks,
        "num_nodes": topology.num_nodes,
        "ranks_per_node": topology.ranks_per_node,
        "top_k": load.top_k,
        "generation": placement.generation,
        "digest": placement.digest,
        "routing": recording.routing
        or ("even" if np.allclose(placement.share, placement.even_share, atol=1e-6) else "shares"),
        "survives_rank_loss": placement.survives_rank_loss(topology),
        "on_one_rank": _on_one_rank(placement, topology),
        "expert_bytes": recording.expert_bytes,
        "lost": list(recording.lost),
        "last_time": recording.last_time,
        "windows": windows,
        "recent": {
            phase: {
                "mean": round(found.mean, 6),
                "median": round(found.median, 6),
                "worst": round(found.worst, 6),
                "measured": found.measured_mean,
                "steps": found.steps,
            }
            for phase, found in recording.recent.items()
        },
    }


def _on_one_rank(placement: Placement, topology: Topology) -> int:
    """(layer, expert) pairs that are lost with a rank."""
    held = np.zeros((placement.num_layers, placement.num_experts, topology.num_ranks), bool)
    rank = np.arange(placement.num_slots) // topology.slots_per_rank
    held[np.arange(placement.num_layers)[:, None], placement.slot_to_expert, rank] = True
    return int((held.sum(axis=2) == 1).sum())


def load_map(recording: Recording, phase: str, by: str, window: int | None) -> dict[str, Any]:
    """Load over fair share of each layer's ranks, experts or slots. window: None for all of the phase's."""
    counts = _counts(recording, phase, window)
    if by == "rank":
        columns: Floats = rank_load(counts, recording.placement, recording.topology)
    elif by == "expert":
        columns = counts.astype(np.float64)
    elif by == "slot":
        columns = slot_load(counts, recording.placement)
    else:
        raise ValueError(f"by = {by!r}: give {', '.join(COLUMNS)}")
    return {
        "phase": phase,
        "by": by,
        "window": window,
        "layers": list(recording.load.layers),
        "loads": counts.sum(axis=1).tolist(),
        "values": [_rounded(row) for row in over_fair_share(columns)],
    }


def history(recording: Recording, phase: str, layer: int) -> dict[str, Any]:
    """Imbalance of each window: the worst layer, the median of the layers, their mean, and the chosen layer (its
    number in the file, from 0).

    basis: "measured" where it is of what the ranks were really given, window by window; "placement" where all
    windows are seen under the placement in force, as eplb-offline sees them: `in_force` is always the mean of that.
    predicted: what the last rebalance before a window promised. rebalances: those applied, `at` the window from
    which they were in force.
    """
    in_force = imbalance(recording.rank_load(phase))  # [W, L]
    measured = recording.measured.get(phase)
    each = in_force if measured is None else imbalance(measured)
    index = _layer(recording, layer)
    applied = _applied(recording, phase)
    predicted: list[float | None] = [None] * len(each)
    for one in applied:
        predicted[one["at"] :] = [one["predicted"]] * (len(each) - one["at"])
    return {
        "phase": phase,
        "layer": recording.load.layers[index],
        "basis": "placement" if measured is None else "measured",
        "worst": _rounded(each.max(axis=1)),
        "median": _rounded(np.median(each, axis=1)),
        "mean": _rounded(each.mean(axis=1)),
        "chosen": _rounded(each[:, index]),
        "in_force": _rounded(in_force.mean(axis=1)),
        "predicted": predicted,
        "rebalances": applied,
    }


def measured_imbalance(recording: Recording, phase: str) -> list[list[float]] | None:
    """[W][L] of what the ranks were really given; None where nobody measured."""
    measured = recording.measured.get(phase)
    return None if measured is None else [_rounded(row) for row in imbalance(measured)]


def _applied(recording: Recording, phase: str) -> list[dict[str, Any]]:
    """The rebalances that were applied while the phase's windows were counted, oldest first."""
    starts = [_seconds(window.start_time) for window in recording.of_phase(phase).windows]
    found = []
    for one in reversed(recording.rebalances):
        if one["result"] != "applied" or not starts or None in starts:
            continue
        at = sum(start <= one["time"] for start in starts if start is not None)
        if at:
            known = one["predicted"] if one.get("phase") == phase else None
            found.append(
                {"at": at, "generation": one["generation"], "predicted": known, "after": one["after"]}
            )
    return found


def _seconds(time: str | None) -> float | None:
    return None if time is None else datetime.fromisoformat(time.replace("Z", "+00:00")).timestamp()


def rebalances(source: Shown, recording: Recording) -> dict[str, Any]:
    """What the balancer decided, newest first, as /eplb/status has it, and what it brought in all."""
    every = list(recording.rebalances)
    applied = [one for one in every if one["result"] == "applied"]
    net = [one["net_seconds"] for one in applied if one.get("net_seconds") is not None]
    return {
        "state": source.state,
        "rebalances": every,
        "applied": len(applied),
        "net_seconds": round(sum(net), 6) if net else None,
        "ranks_per_node": recording.topology.ranks_per_node,
    }


def layer_detail(recording: Recording, phase: str, layer: int, window: int | None) -> dict[str, Any]:
    """One layer: its ranks, where each expert stands, and what the last change of placement changed there."""
    index = _layer(recording, layer)
    counts = _counts(recording, phase, window)[index]
    placement, topology = recording.placement, recording.topology
    slots = placement.slot_to_expert[index]
    load = counts[slots] * placement.share[index]
    ranks = load.reshape(1, topology.num_ranks, -1).sum(axis=-1)
    return {
        "phase": phase,
        "window": window,
        "layer": recording.load.layers[index],
        "imbalance": round(float(imbalance(ranks)[0]), 6),
        "load": int(counts.sum()),
        "ranks": _rounded(over_fair_share(ranks)[0]),
        "slot_to_expert": slots.tolist(),
        "slots": _rounded(over_fair_share(load.reshape(1, -1))[0]),
        "share": [round(float(part), 4) for part in placement.share[index]],
        "experts": _rounded(over_fair_share(counts[None].astype(np.float64))[0]),
        "counts": counts.tolist(),
        "previous": _previous(recording, index, counts),
    }


def _previous(recording: Recording, index: int, counts: npt.NDArray[np.int64]) -> dict[str, Any] | None:
    """The same counts under the placement before: its experts, and its ranks' load over fair share."""
    before, topology = recording.previous, recording.topology
    if before is None or before.num_slots != recording.placement.num_slots:
        return None
    slots = before.slot_to_expert[index]
    ranks = (counts[slots] * before.share[index]).reshape(1, topology.num_ranks, -1).sum(axis=-1)
    return {
        "generation": before.generation,
        "slot_to_expert": slots.tolist(),
        "ranks": _rounded(over_fair_share(ranks)[0]),
        "imbalance": round(float(imbalance(ranks)[0]), 6),
    }


def over_fair_share(loads: Floats) -> Floats:
    """[L, N] over the mean of each row; 1.0 where a row has no load."""
    mean = loads.mean(axis=-1, keepdims=True)
    ratios: Floats = np.where(mean > 0, loads / np.where(mean > 0, mean, 1.0), 1.0)
    return ratios


def _counts(recording: Recording, phase: str, window: int | None) -> npt.NDArray[np.int64]:
    """[L, E]."""
    load = recording.of_phase(phase)
    counts: npt.NDArray[np.int64]
    if window is None:
        counts = load.load.sum(axis=0)
        return counts
    if not 0 <= window < load.num_windows:
        raise ValueError(f"window = {window}: give 0 to {load.num_windows - 1}")
    counts = load.load[window]
    return counts


def _layer(recording: Recording, layer: int) -> int:
    if not 0 <= layer < recording.load.num_layers:
        raise ValueError(f"layer = {layer}: give 0 to {recording.load.num_layers - 1}")
    return layer


def _rounded(values: Floats) -> list[float]:
    rounded: list[float] = np.round(values, 4).tolist()
    return rounded
