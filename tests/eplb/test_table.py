"""Tables are aligned, and progress shows on a terminal alone."""

from __future__ import annotations

import io
import sys
import time

import pytest

from moeserve.eplb.table import progress, render, size, working


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_columns_line_up() -> None:
    text = render(["name", "value"], [["a", "1.0"], ["longer", "12.50"]])
    assert text.splitlines() == ["name    value", "-------------", "a         1.0", "longer  12.50"]
    assert "\x1b" in render(["a"], [["b"]], colour=True, mark=0)


def test_sizes_have_units() -> None:
    assert [size(n) for n in (12, 1500, 44_000_000, 3e12)] == ["12 B", "1.5 kB", "44.0 MB", "3.0 TB"]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_on_a_terminal_when_work_is_long(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    stream = _Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    clock = iter(range(100))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    assert list(progress([1, 2, 3], 3, "work")) == [1, 2, 3]
    assert ("work [" in stream.getvalue()) == terminal


def test_working_counts_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = _Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with working("solving"):
        time.sleep(1.2)
    assert "solving 1 s" in stream.getvalue()
    quiet = _Terminal()
    monkeypatch.setattr(sys, "stderr", quiet)
    with working("solving", quiet=True):
        pass
    assert not quiet.getvalue()
