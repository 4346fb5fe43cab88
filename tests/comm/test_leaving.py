"""A rank leaves: the others learn of it whatever they wait for, and meet again in the same mesh."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from moeserve.comm import mesh as comm_mesh
from moeserve.comm.layout import ParallelLayout
from moeserve.comm.mesh import Meeting, Mesh, keep_store
from moeserve.comm.spawn import RankPool
from moeserve.comm.wire import RankLost

pytestmark = pytest.mark.multi_rank


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Its ranks leave its job and form another: nobody else's."""
    with RankPool(3) as ranks:
        yield ranks


def leave_and_meet(
    rank: int, shared_memory: bool, members: list[int], port: int, number: int
) -> list[object]:
    mesh = Mesh(ParallelLayout(dp=3), rank, shared_memory=shared_memory)
    seen: list[object] = [mesh.dp.all_gather_ints([rank])]
    if rank < 2:
        began = time.monotonic()
        with pytest.raises(RankLost):
            mesh.dp.all_gather(torch.full((400_000,), float(rank)))  # more than a ring holds
        seen.append(time.monotonic() - began < 5)
    mesh.leave()
    comm_mesh.stop()
    if rank not in members:
        return seen
    me, size = members.index(rank), len(members)
    comm_mesh.start(me, size, "127.0.0.1", port, timeout=20, meeting=Meeting(number, 10))
    mesh.join(ParallelLayout(dp=size), me)
    return [*seen, mesh.ep.all_gather(torch.tensor([rank])).tolist(), mesh.world.ranks]


def test_ranks_that_are_left_meet_in_the_same_mesh(pool: RankPool) -> None:
    store = keep_store("127.0.0.1")
    everyone = [[0], [1], [2]]
    for number, shared_memory in enumerate((False, True)):
        by_rank = pool.run(leave_and_meet, shared_memory, [0, 1, 2], store.port, number)
        assert by_rank[0] == by_rank[1] == [everyone, True, [0, 1, 2], (0, 1, 2)]
    by_rank = pool.run(leave_and_meet, True, [1, 2], store.port, 2)
    assert by_rank[0] == [everyone, True]
    assert by_rank[1] == [everyone, True, [1, 2], (0, 1)]
    assert by_rank[2] == [everyone, [1, 2], (0, 1)]


def meet_nobody(rank: int, port: int) -> str:
    comm_mesh.stop()
    if rank:
        return ""
    try:
        comm_mesh.start(0, 2, "127.0.0.1", port, timeout=60, meeting=Meeting(3, 0.5))
    except RuntimeError as error:
        return str(error)
    return "met nobody"


def test_who_meets_nobody_does_not_wait_for_long(pool: RankPool) -> None:
    store = keep_store("127.0.0.1")
    assert pool.run(meet_nobody, store.port)[0] == "not all 2 ranks came to meeting 3"
