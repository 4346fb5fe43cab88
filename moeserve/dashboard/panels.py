"""The panels that show what was counted, as JSON values. Knows no solver.

Every ratio is load over fair share, which is the mean of its layer; the largest one over ranks is the imbalance.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moeserve.dashboard.recording import Recording, Source
from moeserve.eplb.metrics import FORMULA, imbalance, rank_load, slot_load
from moeserve.eplb.types import Floats

COLUMNS = ("rank", "expert", "slot")


def summary(source: Source, recording: Recording | None) -> dict[str, Any]:
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
        "routing": "even" if np.allclose(placement.share, placement.even_share, atol=1e-6) else "shares",
        "survives_rank_loss": placement.survives_rank_loss(topology),
        "last_time": recording.last_time,
        "windows": windows,
        "recent": {
            phase: {"mean": found.mean, "median": found.median, "worst": found.worst, "steps": found.steps}
            for phase, found in recording.recent.items()
        },
    }


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
    number in the file, from 0)."""
    each = imbalance(recording.rank_load(phase))  # [W, L]
    index = _layer(recording, layer)
    return {
        "phase": phase,
        "layer": recording.load.layers[index],
        "worst": _rounded(each.max(axis=1)),
        "median": _rounded(np.median(each, axis=1)),
        "mean": _rounded(each.mean(axis=1)),
        "chosen": _rounded(each[:, index]),
    }


def layer_detail(recording: Recording, phase: str, layer: int, window: int | None) -> dict[str, Any]:
    """One layer: its ranks, and where each expert stands."""
    index = _layer(recording, layer)
    counts = _counts(recording, phase, window)[index : index + 1]
    placement, topology = recording.placement, recording.topology
    ranks = np.zeros((1, topology.num_ranks))
    slots = placement.slot_to_expert[index]
    load = (counts[0, slots] * placement.share[index]).reshape(topology.num_ranks, -1)
    ranks[0] = load.sum(axis=1)
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
        "experts": _rounded(over_fair_share(counts.astype(np.float64))[0]),
        "counts": counts[0].tolist(),
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
