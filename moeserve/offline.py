"""The `eplb-offline` command: the balancer's own, and for its report the dashboard's page in one file.

The balancer knows no page of ours, so they meet here. Imports neither torch nor anything of the engine.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from moeserve.eplb import cli
from moeserve.eplb.load import ExpertLoad
from moeserve.eplb.metrics import balance
from moeserve.eplb.migration import plan_migration, traffic
from moeserve.eplb.types import MigrationPlan, Placement, Topology


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return cli.main(argv, report_page)


@dataclass(frozen=True)
class Written:
    """The dashboard's source of a page that is written once."""

    model: str
    file: str | None = None
    state: str | None = None
    version: str = "file"


def report_page(
    load: ExpertLoad, topology: Topology, placements: dict[str, Placement], expert_bytes: int
) -> str:
    """The dashboard on this load under the last placement, with the way there from the ones before."""
    from moeserve.dashboard.page import self_contained
    from moeserve.dashboard.recording import Recording

    last, *before = reversed(placements.values())
    steps = [_step(load, topology, a, b, placements, expert_bytes) for a, b in pairwise(placements)]
    recording = Recording(
        "file",
        lambda: load,
        last,
        topology,
        previous=before[0] if before else None,
        rebalances=tuple(reversed(steps)),
        expert_bytes=expert_bytes,
    )
    return self_contained(Written(load.model), recording)


def _step(
    load: ExpertLoad,
    topology: Topology,
    old: str,
    new: str,
    placements: dict[str, Placement],
    expert_bytes: int,
) -> dict[str, Any]:
    """A change of placement as the dashboard shows rebalances; without an expert's bytes it counts experts."""
    before, after = placements[old], placements[new]
    plan = plan_migration(before, after, topology)
    found = traffic(plan, topology)
    links = found.bytes_by_link(expert_bytes)
    return {
        "generation": after.generation,
        "trigger": Path(new).name,
        "phase": None,
        "result": "planned",
        "reason": f"from {old}",
        "before": round(balance(load.load, before, topology).mean, 6),
        "predicted": round(balance(load.load, after, topology).mean, 6),
        "after": None,
        "moves": plan.num_moves,
        "bytes": sum(links.values()),
        "bytes_by_link": links,
        "rank_bytes": (_rank_table(plan, topology) * expert_bytes).tolist() if expert_bytes else None,
        "solve_seconds": 0.0,
        "migration_seconds": 0.0,
        "stall_seconds": 0.0,
        "net_seconds": None,
        "time": 0.0,
    }


def _rank_table(plan: MigrationPlan, topology: Topology) -> np.ndarray[Any, np.dtype[np.int64]]:
    """[G, G] experts from rank to rank; none within a rank."""
    table = np.zeros((topology.num_ranks, topology.num_ranks), np.int64)
    for _, rounds in plan.layers:
        for move in (move for moves in rounds for move in moves):
            source, target = (
                slot // topology.slots_per_rank for slot in (move.source_slot, move.target_slot)
            )
            table[source, target] += source != target
    return table


if __name__ == "__main__":
    sys.exit(main())
