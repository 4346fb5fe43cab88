"""The one-sided dispatcher beyond what all dispatchers promise: windows, other hosts, lost ranks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

from moeserve.comm import shared
from moeserve.comm.all_to_all import make_dispatcher
from moeserve.comm.all_to_all.exchange import ExchangeDispatcher
from moeserve.comm.all_to_all.one_sided.dispatcher import (
    WINDOW_BYTES,
    OneSidedDispatcher,
    RowSizes,
    window_config,
)
from moeserve.comm.all_to_all.one_sided.layout import EpLayout
from moeserve.comm.layout import ParallelLayout
from moeserve.comm.mesh import Mesh
from moeserve.comm.spawn import RankError, RankPool
from moeserve.comm.wire import RankLost

pytestmark = pytest.mark.skipif(not shared.supported, reason="shared memory needs x86 and Linux")
GetPool = Callable[[int], RankPool]


@pytest.mark.parametrize("world", [2, 8, 64])
@pytest.mark.parametrize("width", [128, 7168])
def test_a_window_is_bounded(world: int, width: int) -> None:
    for max_rows in (1, 40, 8192):
        config = window_config(world, 8, RowSizes(max_rows, width, 8, torch.bfloat16))
        assert 1 <= config.max_tokens <= max_rows
        assert EpLayout(config).nbytes <= WINDOW_BYTES
    assert window_config(world, 8, RowSizes(4, width, 8, torch.bfloat16)).max_tokens == 4


def compare(rank: int, size: int, rows_a_window: int, compiled: bool) -> list[int]:
    """Steps of many rows in small windows give what exchange gives. -> parts of each step."""
    with mock.patch.dict(os.environ, MOESERVE_ONE_SIDED_NATIVE=str(int(compiled))):
        return compare_steps(rank, size, rows_a_window)


def compare_steps(rank: int, size: int, rows_a_window: int) -> list[int]:
    group = Mesh(ParallelLayout(dp=size), rank).ep
    exchange = make_dispatcher("exchange", group, 3)
    sizes = RowSizes(rows_a_window, 5, 4, torch.bfloat16)
    one_sided = OneSidedDispatcher(group, 3, sizes)
    parts = []
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(0, 6 * rows_a_window, (size,), generator=generator).tolist()
        if step == 2:
            rows[0] = 0
        generator.manual_seed(step * 100 + rank)
        x = torch.randn(rows[rank], 5, generator=generator).to(torch.bfloat16)
        slots = torch.randint(-1, 3 * size, (rows[rank], 4), generator=generator)
        weights = torch.randn(rows[rank], 4, generator=generator)
        results = []
        for dispatcher in (exchange, one_sided):
            dispatcher.begin_step(rows)
            got = dispatcher.dispatch(x, slots, weights).wait()
            out = dispatcher.combine(got.rows * (rank + 1), got).wait()
            results.append((got.rows, got.tokens_per_slot, out))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
        parts.append(-(-max(rows) // rows_a_window))
    return parts


@pytest.mark.multi_rank
@pytest.mark.parametrize(("size", "compiled"), [(2, False), (2, True), (4, True)])
def test_more_rows_than_a_window_go_in_parts(rank_pool: GetPool, size: int, compiled: bool) -> None:
    parts = rank_pool(size).run(compare, size, 3, compiled)[0]
    assert max(parts) >= 5 and min(parts) < max(parts)


def make_without_memory(rank: int, why: str, fall_back: bool) -> str:
    group = Mesh(ParallelLayout(dp=2), rank).ep
    patches = {
        "other hosts": mock.patch("moeserve.comm.shared.host_identity", return_value=rank),
        "full": mock.patch(
            "moeserve.comm.symm.shm.free_memory", return_value=(1 << 20, "this host has free")
        ),
    }
    with patches[why]:
        try:
            return type(make_dispatcher("one_sided", group, 2, fall_back=fall_back)).__name__
        except ValueError as error:
            return str(error)


@pytest.mark.multi_rank
@pytest.mark.parametrize(
    ("why", "named"),
    [("other hosts", "ranks 0 and 1 are on different hosts"), ("full", "this host has free 1.0 MiB")],
)
def test_where_memory_cannot_be_shared(rank_pool: GetPool, why: str, named: str) -> None:
    for said in rank_pool(2).run(make_without_memory, why, False):
        assert said.startswith("all_to_all = one_sided: ") and named in said
        assert said.endswith("use exchange or gather")
    assert rank_pool(2).run(make_without_memory, why, True) == [ExchangeDispatcher.__name__] * 2


def make_without_compiler(rank: int) -> list[str]:
    group = Mesh(ParallelLayout(dp=2), rank).ep
    with mock.patch.dict(os.environ, MOESERVE_ONE_SIDED_NATIVE=str(rank)):  # rank 1 has one
        made = [make_dispatcher("one_sided", group, 2, fall_back=fall_back) for fall_back in (False, True)]
    return [type(dispatcher).__name__ for dispatcher in made]


@pytest.mark.multi_rank
def test_without_a_compiler_only_who_asks_gets_the_plain_loops(rank_pool: GetPool) -> None:
    names = [OneSidedDispatcher.__name__, ExchangeDispatcher.__name__]
    assert rank_pool(2).run(make_without_compiler) == [names] * 2


def leave_or_wait(rank: int) -> float:
    """Rank 0 leaves its groups; -> how long rank 1 waited for its rows."""
    mesh = Mesh(ParallelLayout(dp=2), rank)
    dispatcher = OneSidedDispatcher(mesh.ep, 2, RowSizes(4, 2, 1, torch.float32))
    dispatcher.begin_step([1, 1])
    if rank == 0:
        mesh.leave()
        return 0.0
    start = time.monotonic()
    with pytest.raises(RankLost, match="has left"):
        dispatcher.dispatch(torch.ones(1, 2), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)).wait()
    return time.monotonic() - start


@pytest.mark.multi_rank
def test_a_rank_that_left_is_not_waited_for(rank_pool: GetPool) -> None:
    assert max(rank_pool(2).run(leave_or_wait)) < 5


def die_or_wait(rank: int, file: Path) -> None:
    mesh = Mesh(ParallelLayout(dp=2), rank)
    dispatcher = OneSidedDispatcher(mesh.ep, 2, RowSizes(4, 2, 1, torch.float32))
    dispatcher.begin_step([1, 1])
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RankLost) as loss:
        dispatcher.dispatch(torch.ones(1, 2), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)).wait()
    file.write_text(str(loss.value))


@pytest.mark.multi_rank
def test_a_dead_rank_is_named(tmp_path: Path) -> None:
    with RankPool(2) as pool, pytest.raises(RankError, match="rank 0 died of SIGKILL"):
        pool.run(die_or_wait, tmp_path / "said")
    assert (tmp_path / "said").read_text() == "rank 0 has died"
