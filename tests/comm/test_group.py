"""Group operations on 2 and 4 ranks against plain torch on the ranks' inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moeserve.comm import shared
from moeserve.comm.group import SMALL_ALL_REDUCE_BYTES, Group
from moeserve.comm.layout import ParallelLayout
from moeserve.comm.mesh import Mesh, interface_to, start
from moeserve.comm.spawn import RankPool

GetPool = Callable[[int], RankPool]
DTYPES = (torch.float32, torch.bfloat16, torch.int64)


def inputs(size: int, rows: list[int], width: int, dtype: torch.dtype) -> list[Tensor]:
    """What each rank holds; the same on all ranks."""
    generator = torch.Generator().manual_seed(sum(rows) + width)
    return [(torch.randn(r, width, generator=generator) * 50).to(dtype) for r in rows[:size]]


def ordered_sum(xs: list[Tensor]) -> Tensor:
    wide = torch.float32 if xs[0].is_floating_point() else torch.int64
    total = xs[0].to(wide)
    for x in xs[1:]:
        total = total + x.to(wide)
    return total.to(xs[0].dtype)


def same(name: str, got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape, name
    assert torch.equal(got, expected), name


def check_operations(rank: int, size: int, shared_memory: bool) -> None:
    group = Mesh(ParallelLayout(tp=size), rank, shared_memory=shared_memory).tp
    assert (group.rank, group.size, group.ranks) == (rank, size, tuple(range(size)))
    for dtype in DTYPES:
        for width in (1, 7, 64):
            even, uneven = [5] * size, [3, 0, 6, 1][:size]
            total = sum(uneven)
            xs = inputs(size, even, width, dtype)
            same("all_gather", group.all_gather(xs[rank]), torch.cat(xs))
            same("all_gather_last", group.all_gather_last(xs[rank]), torch.cat(xs, dim=-1))
            same("all_reduce", group.all_reduce(xs[rank]), ordered_sum(xs))
            us = inputs(size, uneven, width, dtype)
            same("all_gather uneven", group.all_gather(us[rank], uneven), torch.cat(us))
            nothing = us[rank][:0]
            same("all_gather nothing", group.all_gather(nothing), nothing)
            xs = inputs(size, [size * 3] * size, width, dtype)
            same("reduce_scatter", group.reduce_scatter(xs[rank]), ordered_sum(xs).chunk(size)[rank])
            xs = inputs(size, [total] * size, width, dtype)
            got = group.reduce_scatter(xs[rank], uneven)
            same("reduce_scatter uneven", got, ordered_sum(xs).split(uneven)[rank])
            counts = torch.randint(0, 4, (size, size), generator=torch.Generator().manual_seed(width))
            sends = counts.tolist()
            xs = inputs(size, [sum(s) for s in sends], width, dtype)
            parts = [x.split(s) for x, s in zip(xs, sends, strict=True)]
            got = group.all_to_all(xs[rank], sends[rank], [s[rank] for s in sends])
            same("all_to_all", got, torch.cat([p[rank] for p in parts]))


def check_large_all_reduce(rank: int, size: int, shared_memory: bool) -> None:
    group = Mesh(ParallelLayout(tp=size), rank, shared_memory=shared_memory).tp
    rows = SMALL_ALL_REDUCE_BYTES // 64 + 1
    xs = inputs(size, [rows] * size, 67, torch.bfloat16)
    same("all_reduce", group.all_reduce(xs[rank]), ordered_sum(xs))
    small = ordered_sum([x[:2].contiguous() for x in xs])
    same("rows do not depend on their company", group.all_reduce(xs[rank][:2].contiguous()), small)


def check_host_operations(rank: int, size: int, shared_memory: bool) -> list[list[int]]:
    group = Mesh(ParallelLayout(tp=size), rank, shared_memory=shared_memory).tp
    for source in range(size):
        for data in (b"", b"x", bytes(range(256)) * 1000):
            assert group.broadcast_bytes(data if rank == source else None, source) == data
    group.barrier()
    first = group.all_gather_ints([rank, -1, 2**40])
    assert group.all_gather_ints([7, 7, 7]) == [[7, 7, 7]] * size
    return first  # not overwritten by the second


def mesh_sums(rank: int, layout: ParallelLayout) -> dict[str, int]:
    mesh = Mesh(layout, rank)
    axes = ("world", "stage", "pp", "dp", "cp", "tp", "ep", "etp")
    return {axis: int(getattr(mesh, axis).all_reduce(torch.tensor([10**rank]))) for axis in axes}


@pytest.mark.multi_rank
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("shared_memory", [False, True])
@pytest.mark.parametrize("check", [check_operations, check_large_all_reduce])
def test_tensor_operations(
    rank_pool: GetPool, size: int, check: Callable[..., None], shared_memory: bool
) -> None:
    rank_pool(size).run(check, size, shared_memory)


@pytest.mark.multi_rank
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("shared_memory", [False, True])
def test_host_operations(rank_pool: GetPool, size: int, shared_memory: bool) -> None:
    expected = [[rank, -1, 2**40] for rank in range(size)]
    assert rank_pool(size).run(check_host_operations, size, shared_memory) == [expected] * size


def kind_of_wire(rank: int, shared_memory: bool) -> str:
    group = Mesh(ParallelLayout(tp=2), rank, shared_memory=shared_memory).world
    return type(group._control._pairs).__name__  # type: ignore[union-attr]


@pytest.mark.multi_rank
@pytest.mark.skipif(not shared.supported, reason="shared memory needs x86 and Linux")
def test_ranks_of_a_host_share_memory(rank_pool: GetPool) -> None:
    assert rank_pool(2).run(kind_of_wire, True) == ["SharedPairs"] * 2
    assert rank_pool(2).run(kind_of_wire, False) == ["GlooPairs"] * 2


def sums_on_two_hosts(rank: int, layout: ParallelLayout) -> tuple[dict[str, str], dict[str, int]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "host_identity", lambda: rank // 2)
        mesh = Mesh(layout, rank)
    groups = {axis: getattr(mesh, axis) for axis in ("world", "dp", "tp")}
    wires = {axis: type(group._control._pairs).__name__ for axis, group in groups.items()}
    return wires, {axis: int(group.all_reduce(torch.tensor([10**rank]))) for axis, group in groups.items()}


@pytest.mark.multi_rank
@pytest.mark.skipif(not shared.supported, reason="shared memory needs x86 and Linux")
def test_two_hosts(rank_pool: GetPool) -> None:
    """Groups within a host share memory, groups across hosts go over gloo."""
    layout = ParallelLayout(dp=2, tp=2)
    for rank, (wires, sums) in enumerate(rank_pool(4).run(sums_on_two_hosts, layout)):
        assert wires == {"world": "GlooPairs", "dp": "GlooPairs", "tp": "SharedPairs"}
        assert sums == {axis: sum(10**r for r in layout.group_ranks(axis, rank)) for axis in sums}


@pytest.mark.multi_rank
@pytest.mark.parametrize(
    "sizes",
    [
        {"tp": 4},
        {"dp": 4},
        {"dp": 2, "tp": 2},
        {"tp": 4, "etp": 2},
        {"pp": 2, "tp": 2},
        {"pp": 2, "cp": 2},
        {"dp": 4, "etp": 4},
    ],
)
def test_mesh_groups(rank_pool: GetPool, sizes: dict[str, int]) -> None:
    layout = ParallelLayout(**sizes)
    for rank, sums in enumerate(rank_pool(4).run(mesh_sums, layout)):
        assert sums == {axis: sum(10**r for r in layout.group_ranks(axis, rank)) for axis in sums}


def test_group_of_one_is_the_identity() -> None:
    group = Mesh(ParallelLayout(), 0).world
    assert isinstance(group, Group)
    x = torch.randn(3, 4)
    results: list[Any] = [
        group.all_reduce(x),
        group.all_gather(x),
        group.all_gather(x, [3]),
        group.all_gather_last(x),
        group.reduce_scatter(x),
        group.all_to_all(x, [3], [3]),
    ]
    assert all(result is x for result in results)
    assert group.all_gather_ints([1, 2]) == [[1, 2]]
    assert group.broadcast_bytes(b"data") == b"data"
    group.barrier()


def test_mesh_refuses_a_layout_of_another_size() -> None:
    with pytest.raises(ValueError, match="layout has 2 ranks, the job has 1"):
        Mesh(ParallelLayout(tp=2), 0)


@pytest.mark.parametrize(
    ("rank", "size", "backend", "message"),
    [(0, 2, "mpi", "backend = 'mpi'"), (2, 2, "gloo", "rank = 2"), (-1, 1, "gloo", "rank = -1")],
)
def test_start_refuses(rank: int, size: int, backend: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start(rank, size, "127.0.0.1", 1, backend)


def test_interface_of_a_loopback_address() -> None:
    assert interface_to("127.0.0.1") == "lo"
    assert interface_to("localhost") == "lo"
