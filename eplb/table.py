"""Aligned tables for a terminal or a file, and a progress bar for long work."""

from __future__ import annotations

import os
import sys
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO, TypeVar

T = TypeVar("T")

_COLOURS = {"good": "32", "bad": "31", "dim": "2", "bold": "1"}


def render(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1, colour: bool = False, mark: int = -1
) -> str:
    """Lines of a table: the first `left` columns to the left, the others to the right; row `mark` stands out."""
    cells = [list(head), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = []
    for number, row in enumerate(cells):
        parts = [
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        line = "  ".join(parts).rstrip()
        style = "bold" if number == 0 or number - 1 == mark else ""
        lines.append(paint(line, style, colour))
        if number == 0:
            lines.append(paint("-" * (sum(widths) + 2 * (len(widths) - 1)), "dim", colour))
    return "\n".join(lines)


def wrap(text: str, indent: str = "") -> str:
    """Text for a terminal of 80 columns; all lines but the first begin with indent."""
    return textwrap.fill(text, 79, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def paint(text: str, style: str, colour: bool) -> str:
    return f"\x1b[{_COLOURS[style]}m{text}\x1b[0m" if colour and style else text


def on_terminal(stream: TextIO) -> bool:
    """Whether colours and progress are wanted there (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def progress(items: Iterable[T], total: int, name: str, quiet: bool = False) -> Iterator[T]:
    """The items, with a bar on standard error when that is a terminal and the work takes over a second."""
    stream, start, drawn = sys.stderr, time.monotonic(), False
    show = not quiet and stream.isatty()
    for done, item in enumerate(items):
        now = time.monotonic() - start
        if show and now > 1.0:
            filled = 30 * done // max(total, 1)
            stream.write(f"\r{name} [{'#' * filled}{'.' * (30 - filled)}] {done}/{total} {now:.0f} s ")
            stream.flush()
            drawn = True
        yield item
    if drawn:
        stream.write("\r\x1b[K")
        stream.flush()


@contextmanager
def working(name: str, quiet: bool = False) -> Iterator[None]:
    """A line on standard error that counts seconds, when that is a terminal and the block takes over a second."""
    done = threading.Event()

    def count() -> None:
        start, stream = time.monotonic(), sys.stderr
        while not done.wait(1.0):
            stream.write(f"\r{name} {time.monotonic() - start:.0f} s ")
            stream.flush()
        if time.monotonic() - start > 1.0:
            stream.write("\r\x1b[K")
            stream.flush()

    thread = threading.Thread(target=count, daemon=True)
    if not quiet and sys.stderr.isatty():
        thread.start()
    try:
        yield
    finally:
        done.set()
        if thread.ident is not None:
            thread.join()


def number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def size(num_bytes: float) -> str:
    """Bytes with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(num_bytes) < 1000 or unit == "TB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError
