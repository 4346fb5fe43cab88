"""eplb-offline: from a file of expert load to a placement, and what it would bring.

Exit codes: 0 done, 2 bad input (one line says what), 1 a fault of ours.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from moeserve import __version__
from moeserve.eplb.commands import convert, replay, report, simulate, solve, sweep
from moeserve.eplb.commands.common import ReportPage

_COMMANDS: dict[
    str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None], str]
] = {
    "solve": (solve.arguments, solve.run, "place the experts of a file of expert load (the default command)"),
    "report": (report.arguments, report.run, "imbalance by layer and rank of placements, moves between them"),
    "sweep": (
        sweep.arguments,
        sweep.run,
        "what-if over ranks and redundant slots, and where the gain flattens",
    ),
    "convert": (
        convert.arguments,
        convert.run,
        "rewrite a load or placement file in another engine's format",
    ),
    "replay": (replay.arguments, replay.run, "drive the online balancer over the windows in order"),
    "simulate": (simulate.arguments, simulate.run, "step time and tokens/s of placements on known hardware"),
}


def main(argv: Sequence[str] | None = None, report_page: ReportPage | None = None) -> int:
    """Run the command line; returns the exit code. report_page: makes the page of `report --report html=FILE` in
    place of ours."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if words and words[0] not in _COMMANDS and words[0] not in ("-h", "--help", "--version"):
        words.insert(0, "solve")
    options = parser.parse_args(words or ["--help"])
    options.report_page = report_page
    try:
        options.run(options)
        sys.stdout.flush()
    except ValueError as error:
        return _refuse(" ".join(str(error).split()))
    except MemoryError:
        return _refuse("the input does not fit in memory")
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _refuse(message: str) -> int:
    print(f"eplb-offline: {message}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="eplb-offline",
        description="Places the experts of mixture-of-experts models on ranks so that the ranks carry equal load.",
        epilog="eplb-offline STATS [-o placement.json] is short for eplb-offline solve STATS ...; "
        "eplb-offline COMMAND --help says more",
    )
    parser.add_argument("--version", action="version", version=f"eplb-offline {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (arguments, run, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        arguments(command)
        command.set_defaults(run=run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
