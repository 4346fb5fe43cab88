"""eplb-offline replay: the online balancer over recorded windows in order.

Each window is first served by the placement in force, then shown to the balancer; what it decides is in force from
the next window on.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from moeserve.eplb.commands.common import (
    colours,
    expert_bytes_argument,
    in_force,
    load_of,
    publish,
    report_arguments,
    stats_argument,
    topology_arguments,
    topology_of,
)
from moeserve.eplb.html import document, lines, table
from moeserve.eplb.load import ExpertLoad
from moeserve.eplb.metrics import FORMULA, imbalance, rank_load
from moeserve.eplb.policies import POLICIES
from moeserve.eplb.policies.problem import ROUTINGS, Routing
from moeserve.eplb.rebalancer import Costs, Rebalancer, Settings
from moeserve.eplb.routing import step_shares
from moeserve.eplb.table import number, progress, render, size, wrap
from moeserve.eplb.types import Placement, Topology

_LEGEND = (
    "worst: of the windows. decisions: to move something. per layer: moves a layer a window. gain: expert time "
    "saved against `never` when it stands first, less the stall of moves where --expert-bytes and --step-seconds are "
    "given."
)


@dataclass(frozen=True)
class Outcome:
    """Of one policy: imbalance while serving (mean over layers), by window and on average; net_gain is the part of
    the expert time saved against never moving, less the moves' stall where costs are known."""

    policy: str
    imbalance: float
    worst_window: float
    moves: int
    moves_per_layer_window: float
    bytes: int | None
    rebalances: int
    solve_seconds: float
    net_gain: float
    by_window: list[float]


def arguments(parser: argparse.ArgumentParser) -> None:
    stats_argument(parser)
    topology_arguments(parser)
    parser.add_argument(
        "--policies", default="never,greedy,auto", metavar="P,P",
        help=f"never, auto (bounded moves), or from scratch: {', '.join(POLICIES)} (default: never,greedy,auto)",
    )  # fmt: skip
    parser.add_argument("--routing", choices=ROUTINGS, default="shares", help="split over replicas")
    parser.add_argument("--windows", type=int, default=16, metavar="N", help="windows the balancer remembers")
    parser.add_argument(
        "--max-moves", type=int, default=4, metavar="N", help="slot changes a layer a window, for auto"
    )
    parser.add_argument(
        "--min-gain", type=float, default=0.02, metavar="FRACTION", help="least gain acted on"
    )
    expert_bytes_argument(parser)
    parser.add_argument(
        "--bandwidth", type=float, default=50e9, metavar="B/S", help="a rank receives with, for costs"
    )
    parser.add_argument(
        "--step-seconds", type=float, default=0.0, metavar="S", help="length of a step, for costs"
    )
    report_arguments(parser)


def run(options: argparse.Namespace) -> None:
    load = load_of(options)
    topology = topology_of(options, load)
    names = options.policies.split(",")
    unknown = [name for name in names if name not in ("never", "auto", *POLICIES)]
    if unknown:
        raise ValueError(f"--policies {unknown[0]}: give never, auto, {', '.join(POLICIES)}")
    start, _ = in_force(load, topology)
    costs = None
    if options.expert_bytes > 0 and options.step_seconds > 0:
        steps = max(1, int(np.mean([w.steps for w in load.windows])))
        costs = Costs(
            options.expert_bytes,
            options.bandwidth,
            options.step_seconds,
            horizon_steps=steps * options.windows,
        )
    outcomes: list[Outcome] = []
    for name in names:
        settings = Settings(
            windows=options.windows,
            min_windows=min(2, options.windows),
            policy="auto" if name == "never" else name,
            max_moves_per_layer=options.max_moves,
            min_gain=options.min_gain,
            routing=options.routing,
            expert_groups=load.expert_groups,
            costs=costs,
        )
        still = outcomes[0].by_window if outcomes and outcomes[0].policy == "never" else None
        outcomes.append(_drive(name, load, start, topology, settings, options, still))
    if options.quiet:
        return
    windows = list(range(load.num_windows))
    page = document(
        f"Replay of {load.model or 'an unnamed model'}",
        [f"<p class=note>{_about(options.routing)}</p>", table(*_cells(outcomes)), f"<p class=note>{_LEGEND}</p>",
         lines({o.policy: (windows, o.by_window) for o in outcomes}, "window", "max / mean")],
    )  # fmt: skip
    data = {"formula": FORMULA, "routing": options.routing, "outcomes": [asdict(o) for o in outcomes]}
    publish(options.report, _table(outcomes, options.routing, colours(sys.stdout)), data, page, sys.stdout)


def _drive(
    name: str, load: ExpertLoad, start: Placement, topology: Topology, settings: Settings,
    options: argparse.Namespace, still: list[float] | None,
) -> Outcome:  # fmt: skip
    balancer = Rebalancer(start, topology, settings)
    by_window, moves, rebalances, seconds, stall = [], 0, 0, 0.0, 0.0
    for window in progress(load.load, load.num_windows, name, options.quiet):
        by_window.append(served(window, balancer.placement, topology, settings.routing))
        balancer.observe(window)
        if name == "never":
            continue
        begin = time.perf_counter()
        decision = balancer.decide()
        seconds += time.perf_counter() - begin
        if decision.plan is not None:
            balancer.applied(decision.plan.new)
            moves += decision.moves
            rebalances += 1
            stall += decision.cost_seconds or 0.0
    mean = float(np.mean(by_window))
    net = 0.0
    if still is not None:
        net = 1.0 - mean / float(np.mean(still))
        if settings.costs is not None:
            total = settings.costs.step_seconds * settings.costs.moe_part * sum(w.steps for w in load.windows)
            net -= stall / total
    return Outcome(
        name, mean, max(by_window), moves, moves / load.num_layers / load.num_windows,
        moves * options.expert_bytes if options.expert_bytes else None, rebalances, seconds, net,
        [round(x, 5) for x in by_window],
    )  # fmt: skip


def served(
    window: npt.NDArray[np.int64], placement: Placement, topology: Topology, routing: Routing
) -> float:
    """Imbalance of one window [L, E], mean over layers."""
    if routing == "step":
        _, ranks = step_shares(placement, window[None], topology)
    else:
        ranks = rank_load(window[None], placement, topology, even=routing == "even")
    return float(imbalance(ranks).mean())


def _about(routing: str) -> str:
    return (
        f"imbalance: {FORMULA}; mean over layers; each window under the placement that stood before it, "
        f"routing {routing}"
    )


def _cells(outcomes: list[Outcome]) -> tuple[list[str], list[list[str]]]:
    head = ["policy", "imbalance", "worst", "decisions", "moves", "per layer", "bytes", "solve s", "gain"]
    rows = [
        [
            o.policy, number(o.imbalance), number(o.worst_window), str(o.rebalances), str(o.moves),
            f"{o.moves_per_layer_window:.2f}", "-" if o.bytes is None else size(o.bytes), f"{o.solve_seconds:.2f}",
            f"{o.net_gain:+.2%}",
        ]
        for o in outcomes
    ]  # fmt: skip
    return head, rows


def _table(outcomes: list[Outcome], routing: str, colour: bool) -> str:
    head, rows = _cells(outcomes)
    return "\n".join([wrap(_about(routing)), "", render(head, rows, colour=colour), "", wrap(_LEGEND)])
