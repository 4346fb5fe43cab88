"""Fixtures and settings that several parts' tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from hypothesis import settings

from moeserve.comm.spawn import RankPool

settings.register_profile("moeserve", deadline=None)  # other work on the machine must not fail a test
settings.load_profile("moeserve")


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[Callable[[int], RankPool]]:
    """rank_pool(n).run(function, *args): function(rank, *args) on n gloo ranks, started once a session."""
    pools: dict[int, RankPool] = {}
    with ExitStack() as stack:

        def get(size: int) -> RankPool:
            if size not in pools:
                pools[size] = stack.enter_context(RankPool(size))
            return pools[size]

        yield get
