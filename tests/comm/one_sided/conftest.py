"""Processes in which triton interprets its kernels, for the tests of the Triton engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moeserve.comm.spawn import RankPool
from tests.comm.one_sided.interpreted import Interpreters


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreters]:
    """interpreter.run(function, *args): function(0, *args) in a process of its own."""
    pytest.importorskip("triton", reason="triton is not installed")
    with RankPool(1) as pool:
        yield Interpreters(pool)


@pytest.fixture(scope="session")
def two_interpreters() -> Iterator[Interpreters]:
    """Two ranks joined by gloo."""
    pytest.importorskip("triton", reason="triton is not installed")
    with RankPool(2) as pool:
        yield Interpreters(pool)
