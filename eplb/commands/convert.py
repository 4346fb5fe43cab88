"""eplb-offline convert: a load or placement file in another format."""

from __future__ import annotations

import argparse
from pathlib import Path

from moeserve.eplb.commands.common import engine_arguments, format_for, raw_shape_argument
from moeserve.eplb.formats.detect import read_load
from moeserve.eplb.formats.files import named, read_bytes, write_text
from moeserve.eplb.formats.placements import FORMATS, Known, read_any_placement
from moeserve.eplb.formats.stats import write_stats

_STATS = {"stats.json": ".json", "stats.json.gz": ".gz", "stats.npz": ".npz"}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", metavar="FILE", help="file or folder of expert load, or a placement, of any engine"
    )
    parser.add_argument(
        "--to", required=True, choices=(*FORMATS, *_STATS), metavar="FORMAT",
        help=f"placement: {', '.join(FORMATS)}; expert load: {', '.join(_STATS)}",
    )  # fmt: skip
    parser.add_argument("-o", "--output", required=True, metavar="OUT")
    parser.add_argument("--ep-size", type=int, metavar="N", help="ranks, where the file does not say")
    parser.add_argument("--num-experts", type=int, metavar="N", help="experts, where the file does not say")
    parser.add_argument(
        "--layers", type=_layers, metavar="A-B", help="ids of the MoE layers, where the file does not say"
    )
    parser.add_argument("--ranks-per-node", type=int, default=0, metavar="N")
    engine_arguments(parser)
    raw_shape_argument(parser)


def _layers(text: str) -> list[int]:
    try:
        found: list[int] = []
        for part in text.split(","):
            first, _, last = part.partition("-")
            found += range(int(first), int(last or first) + 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give ids as 3-60 or 0,2,4") from None
    if found != sorted(set(found)) or not found or found[0] < 0 or len(found) > 100_000:
        raise argparse.ArgumentTypeError(f"{text!r}: give ascending layer ids")
    return found


def run(options: argparse.Namespace) -> None:
    output = Path(options.output)
    if options.to in _STATS:
        if output.suffix != _STATS[options.to]:
            raise ValueError(f"-o {output}: a {options.to} file ends in {_STATS[options.to]}")
        write_stats(output, read_load(options.file, options.raw_shape))
        return
    for name in ("ep_size", "num_experts"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give 1 or more")
    known = Known(options.ep_size, options.num_experts, options.layers, options.ranks_per_node)
    file = read_any_placement(options.file, known)
    write_text(output, format_for(options, file, options.to))
    named(output, lambda: read_bytes(output))
