"""What a placement does to recorded loads: the figures, as a table for people and as JSON.

Imbalance is always max rank load / mean rank load of a window and layer (1.0 is perfect), averaged over windows;
`mean` and `worst` are over layers. Held-out figures are on the last windows, with a placement solved without them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moeserve.eplb.load import ExpertLoad
from moeserve.eplb.metrics import FORMULA, Balance, balance, imbalance, moves_between, rank_load
from moeserve.eplb.routing import step_shares
from moeserve.eplb.solver import Solution
from moeserve.eplb.table import number, paint, render, wrap
from moeserve.eplb.types import Floats, Placement, Topology


@dataclass(frozen=True)
class Figures:
    mean: float
    worst: float
    peak: float
    by_layer: list[float]

    @classmethod
    def of(cls, found: Balance) -> Figures:
        return cls(found.mean, found.worst, found.peak, np.round(found.by_layer, 5).tolist())


@dataclass(frozen=True)
class Line:
    """One placement under one split. held_out is None where no window was held out."""

    placement: str
    split: str
    in_sample: Figures
    held_out: Figures | None
    moves: int | None = None


@dataclass(frozen=True)
class Report:
    """formula says how every imbalance here was made; lines compare placements; about is what was solved."""

    about: dict[str, Any]
    lines: list[Line]
    formula: str = FORMULA

    def document(self) -> dict[str, Any]:
        return asdict(self)


def make_report(
    load: ExpertLoad,
    topology: Topology,
    in_force: Placement,
    in_force_name: str,
    solver: Callable[[ExpertLoad], Solution],
    greedy: Callable[[ExpertLoad], Placement],
    solution: Solution,
    seconds: float,
    holdout: float,
) -> Report:
    """The report of solving `load`: in force, DeepSeek's greedy, and ours under every split."""
    early, late = load.split(holdout)
    held_solution = solver(early) if late is not None else None
    held_greedy = greedy(early) if late is not None else None

    def line(
        name: str, split: str, whole: Placement, part: Placement | None, even: bool, moves: int | None
    ) -> Line:
        held = None
        if late is not None and part is not None:
            held = Figures.of(balance(late.load, part, topology, even))
        return Line(name, split, Figures.of(balance(load.load, whole, topology, even)), held, moves)

    def by_window(whole: Placement, part: Placement | None) -> Line:
        held = None
        if late is not None and part is not None:
            held = Figures.of(_step_balance(late, part, topology))
        return Line(ours, "step", Figures.of(_step_balance(load, whole, topology)), held, moves)

    greedy_whole = greedy(load)
    ours = f"ours, {solution.policy}"
    moves = int(moves_between(in_force, solution.placement, topology).sum())
    held = None if held_solution is None else held_solution.placement
    even_force = in_force_name == "identity"
    lines = [
        line(in_force_name, "even" if even_force else "shares", in_force, in_force, even_force, None),
        line("DeepSeek greedy", "even", greedy_whole, held_greedy, True,
             int(moves_between(in_force, greedy_whole, topology).sum())),
        line(ours, "even", solution.placement, held, True, moves),
        line(ours, "shares", solution.placement, held, False, moves),
        by_window(solution.placement, held),
    ]  # fmt: skip
    about = {
        "model": load.model,
        "layers": load.num_layers,
        "num_experts": load.num_experts,
        "num_slots": topology.num_slots,
        "ep_size": topology.num_ranks,
        "slots_per_rank": topology.slots_per_rank,
        "redundant": topology.num_slots - load.num_experts,
        "num_nodes": topology.num_nodes,
        "windows": load.num_windows,
        "held_out": 0 if late is None else late.num_windows,
        "assignments": int(load.load.sum()),
        "policy": solution.policy,
        "reason": solution.reason,
        "seconds": round(seconds, 4),
        "moves": moves,
        "gain_per_move": _gain_per_move(lines[0], lines[3], moves),
        "survives_rank_loss": solution.placement.survives_rank_loss(topology),
        "digest": solution.placement.digest,
    }
    return Report(about, lines)


def _gain_per_move(before: Line, after: Line, moves: int) -> float | None:
    """Imbalance (in sample, mean over layers) that each move takes away."""
    return round((before.in_sample.mean - after.in_sample.mean) / moves, 7) if moves else None


def _step_balance(load: ExpertLoad, placement: Placement, topology: Topology) -> Balance:
    _, ranks = step_shares(placement, load.load, topology)
    each: Floats = imbalance(ranks)
    return Balance(each.mean(axis=0), float(each.max()))


def render_report(report: Report, colour: bool = False) -> str:
    """The report for a terminal."""
    about = report.about
    windows = f"{about['windows']} window{'s' if about['windows'] > 1 else ''}"
    lines = [
        wrap(
            f"{about['model'] or 'unnamed model'}: {about['layers']} MoE layers of {about['num_experts']} experts, "
            f"{about['assignments']:,} routed choices in {windows}"
        ),
        f"placed on {about['ep_size']} ranks ({about['num_nodes']} node{'s' if about['num_nodes'] > 1 else ''}), "
        f"{about['slots_per_rank']} slots each: {about['num_slots']} slots, {about['redundant']} redundant",
        wrap(f"policy {about['policy']}: {about['reason']}; {about['seconds']:.3f} s"),
        "",
        wrap(
            "imbalance = max rank load / mean rank load, per window, averaged over windows (1.0 is perfect); mean and "
            "worst over layers; held out: "
            + (
                f"solved without the last {about['held_out']} windows, measured on them"
                if about["held_out"]
                else "no window to spare"
            )
        ),
        "",
    ]
    head = ["placement", "split", "in-sample", "worst", "held-out", "worst", "moves"]
    rows = []
    for line in report.lines:
        held = line.held_out
        rows.append(
            [
                line.placement,
                line.split,
                number(line.in_sample.mean),
                number(line.in_sample.worst),
                number(held.mean if held else None),
                number(held.worst if held else None),
                "-" if line.moves is None else str(line.moves),
            ]
        )
    lines.append(render(head, rows, left=2, colour=colour, mark=len(rows) - 2))
    if about["gain_per_move"] is not None:
        lines += [
            "",
            f"{about['moves']} moves, {about['gain_per_move'] * about['layers']:.5f} of a layer's imbalance each",
        ]
    lines += [
        "",
        paint(
            wrap(
                "split: even = replicas share equally; shares = fixed parts from the placement; step = parts set anew "
                "for each window's own load. moves: expert weights that ranks must load, all layers together."
            ),
            "dim",
            colour,
        ),
    ]
    return "\n".join(lines)


def layer_table(
    load: ExpertLoad, topology: Topology, placements: dict[str, Placement], colour: bool = False
) -> str:
    """Imbalance of each layer under each placement."""
    found = {name: balance(load.load, p, topology) for name, p in placements.items()}
    head = ["layer", *found]
    rows = [
        [str(layer), *(number(float(b.by_layer[i])) for b in found.values())]
        for i, layer in enumerate(load.layers)
    ]
    rows.append(["mean", *(number(b.mean) for b in found.values())])
    rows.append(["worst", *(number(b.worst) for b in found.values())])
    return render(head, rows, colour=colour, mark=len(rows) - 2)


def rank_table(
    load: ExpertLoad, topology: Topology, placements: dict[str, Placement], colour: bool = False
) -> str:
    """Load of each rank over its mean, all layers and windows together: what the rank works more than its part."""
    loads = {
        name: rank_load(load.load.sum(axis=0), p, topology).sum(axis=0) for name, p in placements.items()
    }
    head = ["rank", *loads]
    rows = [
        [str(rank), *(number(float(x[rank] / x.mean()) if x.mean() > 0 else 1.0) for x in loads.values())]
        for rank in range(topology.num_ranks)
    ]
    return render(head, rows, colour=colour)
