"""eplb-offline STATS: solve, write the placement, report."""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

from moeserve import __version__
from moeserve.eplb.commands.common import (
    colours,
    deepseek_greedy,
    engine_arguments,
    format_for,
    holdout_argument,
    in_force,
    load_of,
    publish,
    report_arguments,
    stats_argument,
    topology_arguments,
    topology_of,
)
from moeserve.eplb.commands.sweep import curves_of, measure, sizes_of
from moeserve.eplb.formats import placements
from moeserve.eplb.formats.files import write_text
from moeserve.eplb.formats.placement import PlacementFile, read_placement
from moeserve.eplb.html import page
from moeserve.eplb.load import ExpertLoad
from moeserve.eplb.metrics import FORMULA
from moeserve.eplb.policies import POLICIES
from moeserve.eplb.policies.problem import ROUTINGS, Routing
from moeserve.eplb.report import Report, make_report, render_report
from moeserve.eplb.solver import Solution, explain
from moeserve.eplb.table import working
from moeserve.eplb.types import Topology


def arguments(parser: argparse.ArgumentParser) -> None:
    stats_argument(parser)
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="where the placement goes (default: standard output)"
    )
    parser.add_argument("--format", choices=placements.FORMATS, default="moeserve", help="of the placement")
    topology_arguments(parser)
    parser.add_argument(
        "--expert-groups", type=int, metavar="N", help="of group-limited routing (default: recorded)"
    )
    parser.add_argument("--policy", choices=("auto", *POLICIES), default="auto", help="(default: auto)")
    parser.add_argument(
        "--objective",
        choices=("windows", "mean"),
        default="windows",
        help="weigh the scatter over windows, or not",
    )
    parser.add_argument(
        "--routing",
        choices=ROUTINGS,
        help="how replicas will split tokens; step: anew for each step, searched longer (default: shares, even for "
        "the formats of other engines)",
    )
    parser.add_argument("--current", metavar="FILE", help="placement to start from")
    parser.add_argument(
        "--max-moves", type=int, metavar="N", help="slot changes a layer at most, with --current"
    )
    parser.add_argument("--survive-rank-loss", action="store_true", help="every expert on two ranks at least")
    holdout_argument(parser)
    engine_arguments(parser)
    report_arguments(parser)


def run(options: argparse.Namespace) -> None:
    load = load_of(options)
    topology = topology_of(options, load)
    groups = options.expert_groups if options.expert_groups is not None else load.expert_groups
    routing: Routing = options.routing or ("shares" if options.format == "moeserve" else "even")
    current = None
    if options.current is not None:
        file = read_placement(
            options.current, ep_size=topology.num_ranks, num_experts=load.num_experts, layers=load.layers
        )
        current = file.placement

    def solver(part: ExpertLoad) -> Solution:
        return explain(
            part.load,
            topology,
            policy=options.policy,
            objective=options.objective,
            current=current,
            max_moves=options.max_moves,
            expert_groups=groups,
            survive_rank_loss=options.survive_rank_loss,
            routing=routing,
        )

    start = time.perf_counter()
    with working("solving", options.quiet):
        solution = solver(load)
    seconds = time.perf_counter() - start
    standing, name = (current, "current") if current is not None else in_force(load, topology)
    greedy = partial(deepseek_greedy, topology=topology, groups=groups)
    report = make_report(load, topology, standing, name, solver, greedy, solution, seconds, options.holdout)
    _write(options, load, topology, solution, report)
    if not options.quiet:
        stream = sys.stdout if options.output else sys.stderr
        table = render_report(report, colours(stream))
        html = ""
        if options.report.startswith("html="):
            points = measure(
                load, sizes_of(load, [topology.num_ranks], None), topology.ranks_per_node, options.holdout
            )
            shown = {
                name: standing,
                "DeepSeek greedy": greedy(load),
                f"ours, {solution.policy}": solution.placement,
            }
            html = page(load, topology, shown, report, curves_of(points))
        publish(options.report, table, report.document(), html, stream)


def _write(
    options: argparse.Namespace, load: ExpertLoad, topology: Topology, solution: Solution, report: Report
) -> None:
    shares = next(
        line for line in report.lines if line.split == "shares" and line.placement.startswith("ours")
    )
    best = shares.held_out or shares.in_sample
    file = PlacementFile(
        solution.placement,
        topology.num_ranks,
        load.layers,
        load.model,
        topology.ranks_per_node,
        predicted={
            "imbalance_mean": round(best.mean, 6),
            "imbalance_worst": round(best.worst, 6),
            "formula": FORMULA,
        },
        solver={
            "policy": solution.policy,
            "windows": load.num_windows,
            "seconds": report.about["seconds"],
            "version": __version__,
        },
    )
    text = format_for(options, file, options.format)
    if options.output:
        write_text(Path(options.output), text)
    else:
        sys.stdout.write(text)
