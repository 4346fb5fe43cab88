"""eplb-offline report: what given placements do to recorded loads, and what lies between them."""

from __future__ import annotations

import argparse
import sys
from itertools import pairwise
from typing import Any

import numpy as np

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
from moeserve.eplb.formats.placements import Known, read_any_placement
from moeserve.eplb.html import placements_page, table
from moeserve.eplb.load import ExpertLoad
from moeserve.eplb.metrics import FORMULA, balance, rank_load
from moeserve.eplb.migration import plan_migration, traffic
from moeserve.eplb.report import layer_table, rank_table
from moeserve.eplb.table import render, size, wrap
from moeserve.eplb.types import Placement, Topology


def arguments(parser: argparse.ArgumentParser) -> None:
    stats_argument(parser)
    parser.add_argument(
        "--placement",
        action="append",
        default=[],
        metavar="P",
        help="placement file of any engine; may be repeated",
    )
    topology_arguments(parser)
    expert_bytes_argument(parser)
    report_arguments(parser)


def run(options: argparse.Namespace) -> None:
    load = load_of(options)
    topology, placements = _placements(options, load)
    if options.quiet:
        return
    colour = colours(sys.stdout)
    migrations = [
        _migration(a, b, placements, topology, options.expert_bytes) for a, b in pairwise(placements)
    ]
    document = {
        "formula": FORMULA,
        "layers": list(load.layers),
        "placements": {key: _figures(load, p, topology) for key, p in placements.items()},
        "migrations": migrations,
    }
    parts = [
        f"imbalance by layer ({FORMULA}):",
        layer_table(load, topology, placements, colour),
        "",
        "load of each rank / mean rank load, all layers and windows:",
        rank_table(load, topology, placements, colour),
    ]
    moves = ""
    if migrations:
        head = ["from", "to", "slots", "local", "in node", "across", "most a rank"]
        rows = [_row(m, options.expert_bytes) for m in migrations]
        title = (
            "moves between placements (slots written; read from the same rank, from its node, from another node; the "
            "most that one rank receives):"
        )
        parts += ["", wrap(title), render(head, rows, left=2)]
        moves = f"<p class=note>{title}</p>{table(head, rows)}"
    page = ""
    if options.report.startswith("html="):
        page = (
            placements_page(load, topology, placements, moves)
            if options.report_page is None
            else options.report_page(load, topology, placements, options.expert_bytes)
        )
    publish(options.report, "\n".join(parts), document, page, sys.stdout)


def _placements(options: argparse.Namespace, load: ExpertLoad) -> tuple[Topology, dict[str, Placement]]:
    """The topology, as asked for, else that of the first file; what stands before, then the files' placements."""
    known = Known(
        options.ep_size or load.ep_size or None, load.num_experts, load.layers, options.ranks_per_node or 0
    )
    files = {path: read_any_placement(path, known) for path in options.placement}
    for path, file in files.items():
        if file.placement.num_layers != load.num_layers or file.placement.num_experts != load.num_experts:
            raise ValueError(
                f"{path}: {file.placement.num_layers} layers of {file.placement.num_experts} experts, the load has "
                f"{load.num_layers} of {load.num_experts}"
            )
    if files:
        first = next(iter(files.values()))
        if options.ep_size is None:
            options.ep_size = first.ep_size
        if options.num_slots is None and options.redundant is None:
            options.num_slots = first.placement.num_slots
        if options.ranks_per_node is None and first.ranks_per_node:
            options.ranks_per_node = first.ranks_per_node
    elif options.num_slots is None and options.redundant is None and options.ep_size in (None, load.ep_size):
        recorded, ranks = load.placement, load.ep_size or 1
        options.num_slots = -(-load.num_experts // ranks) * ranks if recorded is None else recorded.num_slots
    topology = topology_of(options, load)
    standing, name = in_force(load, topology)
    placements = {name: standing}
    for path, file in files.items():
        if file.placement.num_slots != topology.num_slots:
            raise ValueError(
                f"{path}: {file.placement.num_slots} slots, the others have {topology.num_slots}"
            )
        if file.ep_size != topology.num_ranks:
            raise ValueError(f"{path}: made for {file.ep_size} ranks, the others for {topology.num_ranks}")
        placements[path] = file.placement
    return topology, placements


def _figures(load: ExpertLoad, placement: Placement, topology: Topology) -> dict[str, Any]:
    found = balance(load.load, placement, topology)
    ranks = rank_load(load.load.sum(axis=0), placement, topology).sum(axis=0)
    return {
        "by_layer": np.round(found.by_layer, 6).tolist(),
        "mean": found.mean,
        "worst": found.worst,
        "peak": found.peak,
        "by_rank": np.round(ranks, 3).tolist(),
    }


def _migration(
    a: str, b: str, placements: dict[str, Placement], topology: Topology, expert_bytes: int
) -> dict[str, Any]:
    plan = plan_migration(placements[a], placements[b], topology)
    found = traffic(plan, topology)
    return {
        "from": a,
        "to": b,
        "slots_written": plan.num_moves,
        "local": found.local,
        "intra_node": found.intra_node,
        "inter_node": found.inter_node,
        "most_received": found.most_received,
        "bytes": found.bytes_by_link(expert_bytes) if expert_bytes else None,
    }


def _row(found: dict[str, Any], expert_bytes: int) -> list[str]:
    def amount(key: str) -> str:
        number = int(found[key])
        return f"{number} ({size(number * expert_bytes)})" if expert_bytes else str(number)

    return [
        found["from"],
        found["to"],
        str(found["slots_written"]),
        *map(amount, ("local", "intra_node", "inter_node", "most_received")),
    ]
