"""The dashboard as one file: the page, what was recorded, and what the solver found of it. Needs numpy alone."""

from __future__ import annotations

import json
from typing import Any

from moeserve.dashboard import advice, panels
from moeserve.dashboard.recording import Recording, Shown
from moeserve.eplb.formats.stats import format_stats
from moeserve.eplb.types import Placement
from moeserve.stats.dashboard import page_in_a_file

MAX_COUNTS = 40_000_000
"""Windows x layers x experts that a browser is given to unpack: 45 minutes of 58 layers of 256 experts, each second."""


def self_contained(source: Shown, recording: Recording) -> str:
    """The page's text. Solves, so it takes up to seconds. ValueError where there are too many windows."""
    if recording.load.load.size > MAX_COUNTS:
        raise ValueError(
            f"{recording.load.num_windows} windows are too many for a page: give a part of them, as one file of a "
            "recording or one --phase"
        )
    phases = recording.load.phases
    past = ("predicted", "rebalances")
    figures = {
        "summary": panels.summary(source, recording),
        "stats": format_stats(recording.load),
        "placement": _placement(recording.placement),
        "previous": None if recording.previous is None else _placement(recording.previous),
        "rebalances": panels.rebalances(source, recording),
        "past": {
            phase: {name: panels.history(recording, phase, 0)[name] for name in past}
            | {"measured": panels.measured_imbalance(recording, phase)}
            for phase in phases
        },
        "verdict": {phase: advice.verdict(recording, phase) for phase in phases},
        "what_if": {phase: advice.what_if_anywhere(recording, phase) for phase in phases},
    }
    return page_in_a_file(json.dumps(figures).encode())


def _placement(placement: Placement) -> dict[str, Any]:
    return {
        "generation": placement.generation,
        "slot_to_expert": placement.slot_to_expert.tolist(),
        "share": placement.share.tolist(),
    }
