"""RankPool and start_process: results, failures of every kind, and no orphans."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moeserve.comm.layout import ParallelLayout
from moeserve.comm.mesh import Mesh
from moeserve.comm.spawn import RankError, RankPool

pytestmark = pytest.mark.multi_rank
GetPool = Callable[[int], RankPool]


def add(rank: int, a: int, b: int) -> tuple[int, int]:
    return rank, a + b


def raise_on_one(rank: int) -> None:
    if rank == 1:
        raise KeyError("a word to look for")
    Mesh(ParallelLayout(tp=2), rank).world.barrier()


def test_results_by_rank(rank_pool: GetPool) -> None:
    assert rank_pool(2).run(add, 2, 3) == [(0, 5), (1, 5)]


def test_exception(rank_pool: GetPool) -> None:
    with pytest.raises(RankError, match="a word to look for") as caught:
        rank_pool(2).run(raise_on_one)
    assert caught.value.rank == 1
    assert rank_pool(2).run(add, 2, 3) == [(0, 5), (1, 5)]
