"""eplb-offline simulate: step time of placements on hardware of the library, every constant with its source."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from html import escape
from typing import Any

from moeserve.eplb import html, simulate
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
from moeserve.eplb.load import ExpertLoad
from moeserve.eplb.migration import plan_migration
from moeserve.eplb.solver import explain
from moeserve.eplb.table import render, wrap
from moeserve.eplb.types import Placement, Topology

_FORMULA = (
    "milliseconds: step = other + sum over MoE layers of the busiest rank's experts + dispatch + combine; "
    "dispatch, combine = a + skew * bytes / bandwidth; stall: once, to get to the placement"
)
_MISSING = "attention and dense layers are not in the step: give --other-ms for tokens/s of a whole model"


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
    report_arguments(parser)


def run(options: argparse.Namespace) -> None:
    load = load_of(options)
    topology = topology_of(options, load)
    if options.other_ms < 0:
        raise ValueError(f"--other-ms {options.other_ms}: give 0 or more")
    machine, model = simulate.hardware(options.hardware), simulate.model(options.model)
    placements = _placements(options, load, topology)
    standing = next(iter(placements.values()))[0]
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
    about = (
        f"{options.model} on {options.hardware}: {topology.num_ranks} ranks, {options.tokens_per_rank} tokens a rank a "
        f"step, {model.moe_layers} MoE layers"
    )
    text = [wrap(about), wrap(_FORMULA), "", render(head, rows, colour=colours(sys.stdout)), "", "constants:"]
    known = [f"{key} = {_constant(c['value'])} ({c['unit']}): {c['source']}" for key, c in constants.items()]
    text += [wrap(f"  {line}", "    ") for line in known]
    if not options.other_ms:
        text.append(wrap(_MISSING))
    page = html.document(
        f"Step time of {load.model or 'an unnamed model'}",
        [
            f"<p>{about}.</p><p class=note>{_FORMULA}. {_MISSING if not options.other_ms else ''}</p>",
            html.table(head, rows),
            "<h2>Constants</h2>",
            *(f"<p class=note>{escape(line)}</p>" for line in known),
        ],
    )
    publish(options.report, "\n".join(text), document, page, sys.stdout)


def _placements(
    options: argparse.Namespace, load: ExpertLoad, topology: Topology
) -> dict[str, tuple[Placement, bool]]:
    """By name, and whether replicas share evenly; the first is what stands before."""
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
    return placements


def _constant(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else f"{value:g}"
