"""What several subcommands share: the topology arguments, reading, and where a report goes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from moeserve.eplb.formats.detect import read_load
from moeserve.eplb.formats.files import write_text
from moeserve.eplb.formats.placement import PlacementFile
from moeserve.eplb.formats.placements import format_as
from moeserve.eplb.load import ExpertLoad
from moeserve.eplb.solver import explain
from moeserve.eplb.table import on_terminal, working
from moeserve.eplb.types import Placement, Topology

ReportPage = Callable[[ExpertLoad, Topology, dict[str, Placement], int], str]
"""From load, topology, placements by name (what stands first) and bytes of an expert's weights to a page."""


def stats_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stats", metavar="STATS", help="file or folder of expert load, of any engine")
    raw_shape_argument(parser)
    parser.add_argument("--phase", choices=("prefill", "decode", "all"), default="all", help="windows to use")


def raw_shape_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--raw-shape", type=_raw_shape, metavar="L,K", help="layers and top_k of raw int32 expert ids"
    )


def holdout_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--holdout",
        type=float,
        default=0.25,
        metavar="FRACTION",
        help="of windows, to measure on (default: 0.25)",
    )


def expert_bytes_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--expert-bytes", type=int, default=0, metavar="N", help="weights of one expert, for bytes moved"
    )


def engine_arguments(parser: argparse.ArgumentParser) -> None:
    """What some engines' placement files need; format_for hands it on."""
    parser.add_argument("--num-hidden-layers", type=int, metavar="N", help="of the model, for sglang")
    parser.add_argument("--layer-updates-per-iter", type=int, default=0, metavar="N", help="for trtllm")


def format_for(options: argparse.Namespace, file: PlacementFile, name: str) -> str:
    """The placement as text of the named format, with engine_arguments' options."""
    return format_as(
        file,
        name,
        num_hidden_layers=options.num_hidden_layers,
        layer_updates_per_iter=options.layer_updates_per_iter,
    )


def topology_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ep-size", type=int, metavar="N", help="ranks (default: as recorded)")
    slots = parser.add_mutually_exclusive_group()
    slots.add_argument("--num-slots", type=int, metavar="N", help="slots of a layer, over all ranks")
    slots.add_argument(
        "--redundant", type=int, metavar="N", help="slots beyond one an expert (default: ep_size)"
    )
    parser.add_argument(
        "--ranks-per-node", type=int, metavar="N", help="(default: as recorded, else one node)"
    )


def report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--report", type=_report_kind, default="table", metavar="KIND", help="table, json or html=FILE"
    )
    parser.add_argument("--quiet", action="store_true", help="no report and no progress")


def _report_kind(text: str) -> str:
    if text in ("table", "json") or (text.startswith("html=") and len(text) > 5):
        return text
    raise argparse.ArgumentTypeError(f"{text!r}: give table, json or html=FILE")


def _raw_shape(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: give layers,top_k")
    return int(parts[0]), int(parts[1])


def load_of(options: argparse.Namespace) -> ExpertLoad:
    with working("reading", options.quiet):
        load = read_load(options.stats, options.raw_shape)
    return load.of_phase(options.phase)


def topology_of(options: argparse.Namespace, load: ExpertLoad) -> Topology:
    """The wanted topology; what is not said is as recorded, with one redundant slot a rank."""
    ep_size = options.ep_size or load.ep_size
    if not ep_size:
        raise ValueError(f"{options.stats} does not say on how many ranks it was recorded: give --ep-size")
    if options.ep_size is not None and options.ep_size < 1:
        raise ValueError(f"--ep-size {options.ep_size}: give 1 or more")
    slots = options.num_slots
    if slots is None:
        slots = load.num_experts + options.redundant if options.redundant is not None else None
    if slots is None:  # one redundant slot a rank, and what fills the last rank
        slots = (-(-load.num_experts // ep_size) + 1) * ep_size if load.num_experts % ep_size else None
        slots = load.num_experts + ep_size if slots is None else slots
        if ep_size == 1:
            slots = load.num_experts
    if slots < load.num_experts:
        raise ValueError(
            f"{slots} slots are fewer than {load.num_experts} experts: every expert needs a slot; "
            f"give --num-slots {-(-load.num_experts // ep_size) * ep_size} or more"
        )
    per_node = options.ranks_per_node or (load.ranks_per_node if ep_size == load.ep_size else 0) or 0
    if options.ranks_per_node is not None and options.ranks_per_node < 1:
        raise ValueError(f"--ranks-per-node {options.ranks_per_node}: give 1 or more")
    return Topology.of(ep_size, slots, min(per_node, ep_size))


def in_force(load: ExpertLoad, topology: Topology) -> tuple[Placement, str]:
    """(the recorded placement if it has this shape, else the identity; its name)."""
    if load.placement is not None and load.placement.num_slots == topology.num_slots:
        return load.placement, "in force"
    return Placement.identity(load.num_layers, load.num_experts, topology.num_slots), "identity"


def deepseek_greedy(load: ExpertLoad, topology: Topology, groups: int) -> Placement:
    """What DeepSeek's code would place: for the summed load, replicas sharing evenly."""
    return explain(load.load, topology, policy="greedy", expert_groups=groups, routing="even").placement


def publish(kind: str, table: str, document: Any, page: str, stream: TextIO) -> None:
    """The report as it was asked for: on `stream`, or as a page in a file."""
    if kind == "json":
        print(json.dumps(document), file=stream)
    elif kind.startswith("html="):
        write_text(Path(kind[5:]), page)
        print(f"wrote {kind[5:]}", file=sys.stderr)
    else:
        print(table, file=stream)


def colours(stream: TextIO) -> bool:
    return on_terminal(stream)
