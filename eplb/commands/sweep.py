"""eplb-offline sweep: what more ranks and more redundant slots would bring, and where the gain flattens."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from moeserve.eplb.commands.common import (
    colours,
    holdout_argument,
    load_of,
    publish,
    report_arguments,
    stats_argument,
)
from moeserve.eplb.html import document, lines, table
from moeserve.eplb.load import ExpertLoad
from moeserve.eplb.metrics import FORMULA, balance, imbalance
from moeserve.eplb.routing import step_shares
from moeserve.eplb.solver import explain
from moeserve.eplb.table import number, progress, render, wrap
from moeserve.eplb.types import Topology

_KNEE = 0.1  # part of the whole gain below which another step of redundancy is not worth its memory
_LEGEND = (
    "even = replicas share equally (best placement for that); shares = fixed parts; step = parts set anew for each "
    f"window's load. knee: another step gains under {_KNEE:.0%} of all there is to gain."
)


@dataclass(frozen=True)
class Point:
    """Held-out imbalance (mean over layers) at one size; None where the size is not possible."""

    ep_size: int
    redundant: int
    slots_per_rank: int
    policy: str
    even: float
    shares: float
    step: float
    knee: bool = False


def arguments(parser: argparse.ArgumentParser) -> None:
    stats_argument(parser)
    parser.add_argument("--ep-sizes", type=_numbers, metavar="N,N", help="ranks (default: as recorded)")
    parser.add_argument(
        "--redundant",
        type=_numbers,
        metavar="N,N",
        help="slots beyond one an expert (default: 0 to 4 a rank)",
    )
    parser.add_argument("--ranks-per-node", type=int, default=0, metavar="N", help="(default: one node)")
    holdout_argument(parser)
    report_arguments(parser)


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give whole numbers with commas between") from None
    if min(numbers) < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: give 0 or more")
    return sorted(set(numbers))


def run(options: argparse.Namespace) -> None:
    load = load_of(options)
    sizes = options.ep_sizes or ([load.ep_size] if load.ep_size else None)
    if not sizes or min(sizes) < 1:
        raise ValueError(
            "give --ep-sizes, one rank at least: the file does not say on how many it was recorded"
        )
    asked = sizes_of(load, sizes, options.redundant)
    points = measure(
        load, progress(asked, len(asked), "sweep", options.quiet), options.ranks_per_node, options.holdout
    )
    points = _mark_knees(points)
    if options.quiet:
        return
    left_out = [
        f"{n} on {ranks}" for ranks in sizes for n in options.redundant or () if (ranks, n) not in asked
    ]
    note = f" Left out, as slots do not divide among ranks: {', '.join(left_out)}." if left_out else ""
    head, rows = _cells(points)
    page = document(
        f"Redundancy of {load.model or 'an unnamed model'}",
        [
            f"<p class=note>Held-out imbalance: {FORMULA}. {_LEGEND}{note}</p>",
            table(head, rows),
            lines(curves_of(points), "redundant slots", "max / mean"),
        ],
    )
    document_ = {
        "formula": FORMULA,
        "held_out": True,
        "points": [asdict(p) for p in points],
        "left_out": left_out,
    }
    text = _table(points, note, colours(sys.stdout))
    publish(options.report, text, document_, page, sys.stdout)


def sizes_of(load: ExpertLoad, sizes: list[int], redundant: list[int] | None) -> list[tuple[int, int]]:
    """(ranks, redundant slots) that are possible; without redundant, 0 to 4 slots a rank. ValueError if none is."""
    asked = []
    for ranks in sizes:
        fill = -load.num_experts % ranks
        wanted = [fill + k * ranks for k in range(5)] if redundant is None else redundant
        most = load.num_experts * (ranks - 1)
        asked += [(ranks, r) for r in wanted if (load.num_experts + r) % ranks == 0 and r <= most]
    if not asked:
        raise ValueError(
            f"no size fits: num_experts + redundant must divide by the ranks, num_experts = {load.num_experts}"
        )
    return asked


def measure(load: ExpertLoad, sizes: Iterable[tuple[int, int]], per_node: int, holdout: float) -> list[Point]:
    return [_measure(load, ranks, redundant, per_node, holdout) for ranks, redundant in sizes]


def curves_of(points: list[Point]) -> dict[str, tuple[list[float], list[float]]]:
    """Imbalance over redundant slots, a curve for each number of ranks and split."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for point in points:
        for split, value in (("even", point.even), ("step", point.step)):
            xs, ys = curves.setdefault(f"{point.ep_size} ranks, {split}", ([], []))
            xs.append(point.redundant)
            ys.append(value)
    return curves


def _measure(load: ExpertLoad, ranks: int, redundant: int, per_node: int, holdout: float) -> Point:
    topology = Topology.of(ranks, load.num_experts + redundant, min(per_node, ranks))
    early, late = load.split(holdout)
    measured = (late or early).load
    solution = explain(early.load, topology, expert_groups=load.expert_groups)
    even = explain(early.load, topology, expert_groups=load.expert_groups, routing="even").placement
    _, by_step = step_shares(solution.placement, measured, topology)
    return Point(
        ranks,
        redundant,
        topology.slots_per_rank,
        solution.policy,
        balance(measured, even, topology, even=True).mean,
        balance(measured, solution.placement, topology).mean,
        float(imbalance(by_step).mean()),
    )


def _mark_knees(points: list[Point]) -> list[Point]:
    """For each number of ranks the first point after which a further step gains little of what there is to gain."""
    marked = []
    for ranks in sorted({p.ep_size for p in points}):
        row = [p for p in points if p.ep_size == ranks]
        gain = row[0].shares + row[0].step - min(p.shares + p.step for p in row)
        knee = len(row) - 1
        for i, (a, b) in enumerate(zip(row, row[1:], strict=False)):
            if a.shares + a.step - b.shares - b.step < _KNEE * gain:
                knee = i
                break
        marked += [Point(**{**asdict(p), "knee": i == knee and len(row) > 1}) for i, p in enumerate(row)]
    return marked


def _cells(points: list[Point]) -> tuple[list[str], list[list[str]]]:
    head = ["ranks", "redundant", "slots/rank", "policy", "even", "shares", "step", ""]
    rows = [
        [
            str(p.ep_size),
            str(p.redundant),
            str(p.slots_per_rank),
            p.policy,
            *map(number, (p.even, p.shares, p.step)),
            "<- knee" if p.knee else "",
        ]
        for p in points
    ]
    return head, rows


def _table(points: list[Point], note: str, colour: bool) -> str:
    head, rows = _cells(points)
    title = f"imbalance on held-out windows ({FORMULA}; mean over layers):"
    return "\n".join([wrap(title), render(head, rows, left=0, colour=colour), "", wrap(_LEGEND + note)])
