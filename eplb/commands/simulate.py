"""eplb-offline simulate: step time of placements on hardware of the library, every constant with its source."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from moeserve.eplb import simulate
from moeserve.eplb.commands.common import (
    colours,
    deepseek_greedy,
    in_force,
    load_of,
    publish,
    report_arguments,
    stats_argument,
    topology_arguments,
    topology_of,
)
from moeserve.eplb.formats.placements import Known, read_any_placement
from moeserve.eplb.migration import plan_migration
from moeserve.eplb.solver import explain
from moeserve.eplb.table import render, wrap
from moeserve.eplb.types import Placement


def arguments(parser: argparse.ArgumentParser) -> None:
    stats_argument(parser)
    topology_arguments(parser)
    parser.add_argument(
        "--placement", action="append", default=[], metavar="P", help="in place of solving; may be repeated"
    )
    parser.add_argument("--hardware", default="gb200-nvl72", metavar="NAME", help="(default: gb200-nvl72)")
    parser.add_argument("--model", default="deepseek-v3", metavar="NAME", help="(default: deepseek-v3)")
    parser.add_argument(
        "--tokens-per-rank", type=int, default=128, metavar="N", help="in a step (default: 128)"
    )
    parser.add_argument(
        "--other-ms", type=float, default=0.0, metavar="MS", help="of a step outside the MoE layers"
    )
    report_arguments(parser, html=False)


def run(options: argparse.Namespace) -> None:
    load = load_of(options)
    topology = topology_of(options, load)
    if options.other_ms < 0:
        raise ValueError(f"--other-ms {options.other_ms}: give 0 or more")
    machine, model = simulate.hardware(options.hardware), simulate.model(options.model)
    standing, name = in_force(load, topology)
    placements: dict[str, tuple[Placement, bool]] = {name: (standing, name == "identity")}
    known = Known(topology.num_ranks, load.num_experts, load.layers)
    for path in options.placement:
        file = read_any_placement(path, known)
        file.placement.check(topology)
        placements[str(path)] = (file.placement, False)
    if not options.placement:
        placements["DeepSeek greedy, even"] = (deepseek_greedy(load, topology, load.expert_groups), True)
        solution = explain(load.load, topology, expert_groups=load.expert_groups)
        placements[f"ours, {solution.policy}, shares"] = (solution.placement, False)
    times = {
        key: simulate.step_time(
            load.load, p, topology, machine, model, options.tokens_per_rank, options.other_ms * 1e-3, even
        )
        for key, (p, even) in placements.items()
    }
    stalls = {
        key: simulate.migration_seconds(plan_migration(standing, p, topology), topology, machine, model)
        for key, (p, _) in placements.items()
    }
    constants = {
        f"{kind}.{key}": constant
        for kind, entry in (("hardware", options.hardware), ("models", options.model))
        for key, constant in simulate.library()[kind][entry].items()
    }
    if options.quiet:
        return
    document = {
        "hardware": options.hardware,
        "model": options.model,
        "constants": constants,
        "placements": {
            key: {**asdict(t), "total": t.total, "tokens_per_second_per_rank": t.tokens_per_second_per_rank,
                  "migration_stall": stalls[key]}
            for key, t in times.items()
        },
    }  # fmt: skip
    head = ["placement", "experts", "all-to-all", "other", "step", "tok/s/rank", "stall"]
    rows = [
        [key, *(f"{x * 1e3:.3f}" for x in (t.compute, t.all_to_all, t.other, t.total)),
         f"{t.tokens_per_second_per_rank:,.0f}", f"{stalls[key] * 1e3:.1f}"]
        for key, t in times.items()
    ]  # fmt: skip
    lines = [
        f"{options.model} on {options.hardware}: {topology.num_ranks} ranks, {options.tokens_per_rank} tokens a rank a "
        f"step, {model.moe_layers} MoE layers",
        wrap(
            "milliseconds: step = other + sum over MoE layers of the busiest rank's experts + dispatch + combine; "
            "dispatch, combine = a + skew * bytes / bandwidth; stall: once, to get to the placement"
        ),
        "",
        render(head, rows, colour=colours(sys.stdout)),
        "",
        "constants:",
        *(
            wrap(f"  {key} = {_constant(c['value'])} ({c['unit']}): {c['source']}", indent="    ")
            for key, c in constants.items()
        ),
    ]
    if not options.other_ms:
        lines.append(
            wrap(
                "attention and dense layers are not in the step: give --other-ms for tokens/s of a whole model"
            )
        )
    publish(options.report, "\n".join(lines), document, "", sys.stdout)


def _constant(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else f"{value:g}"
