"""A process in which triton interprets its kernels on the CPU: that must be chosen before triton is imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from moeserve.comm.spawn import RankPool
from tests.comm.one_sided.interpreted import interpret_faster


@pytest.fixture(scope="session")
def interpreter() -> Iterator[RankPool]:
    """interpreter.run(function, *args): function(0, *args) in that process."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    with pytest.MonkeyPatch.context() as patch, RankPool(1) as pool:
        patch.setenv("TRITON_INTERPRET", "1")
        pool.run(interpret_faster)
        yield pool
