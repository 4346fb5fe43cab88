"""RankPool and start_process: results, failures of every kind, and no orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moeserve.comm.group import Group
from moeserve.comm.layout import ParallelLayout
from moeserve.comm.mesh import Mesh
from moeserve.comm.spawn import RankError, RankPool

pytestmark = pytest.mark.multi_rank
GetPool = Callable[[int], RankPool]


class OurError(Exception):
    """An error whose class only this module knows."""


def add(rank: int, a: int, b: int) -> tuple[int, int]:
    return rank, a + b


def pid(rank: int) -> int:
    return os.getpid()


def environment(rank: int, name: str) -> str | None:
    return os.environ.get(name)


def join(rank: int, shared_memory: bool = True) -> Group:
    return Mesh(ParallelLayout(tp=2), rank, shared_memory=shared_memory).world


def meet(rank: int) -> None:
    join(rank).barrier()


def raise_on_one(rank: int) -> None:
    if rank == 1:
        raise OurError("a word to look for")
    meet(rank)


def die_on_one(rank: int, shared_memory: bool) -> None:
    group = join(rank, shared_memory)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    group.barrier()


def sleep_on_one(rank: int) -> None:
    if rank == 1:
        time.sleep(1000)
    meet(rank)


def late_on_one(rank: int, shared_memory: bool) -> None:
    group = join(rank, shared_memory)
    if rank == 1:
        time.sleep(30)
    group.barrier()


def unpicklable(rank: int) -> Callable[[], int]:
    return lambda: rank


def still_works(pool: RankPool) -> None:
    assert pool.run(add, 2, 3) == [(0, 5), (1, 5)]


def test_ranks_stay_between_runs(rank_pool: GetPool) -> None:
    pool = rank_pool(2)
    first = pool.run(pid)
    assert len(set(first)) == 2 and os.getpid() not in first
    assert pool.run(pid) == first
    still_works(pool)


def test_exception(rank_pool: GetPool) -> None:
    with pytest.raises(RankError, match="OurError: a word to look for") as caught:
        rank_pool(2).run(raise_on_one)
    assert caught.value.rank == 1
    assert "in raise_on_one" in str(caught.value)
    still_works(rank_pool(2))


@pytest.mark.parametrize("shared_memory", [False, True])
def test_killed_rank(rank_pool: GetPool, shared_memory: bool) -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 1 died of SIGKILL") as caught:
        rank_pool(2).run(die_on_one, shared_memory)
    assert caught.value.rank == 1
    assert time.monotonic() - start < 10
    still_works(rank_pool(2))


def test_rank_killed_between_runs(rank_pool: GetPool) -> None:
    pool = rank_pool(2)
    os.kill(pool.run(pid)[0], signal.SIGKILL)
    with pytest.raises(RankError, match="rank 0 died of SIGKILL"):
        pool.run(meet)
    still_works(pool)


def test_hanging_rank(rank_pool: GetPool) -> None:
    with pytest.raises(RankError, match="late after 1 s") as caught:
        rank_pool(2).run(sleep_on_one, timeout=1)
    assert "in sleep_on_one" in str(caught.value) and "in meet" in str(caught.value)
    still_works(rank_pool(2))


@pytest.mark.parametrize("shared_memory", [False, True])
def test_operation_timeout(shared_memory: bool) -> None:
    with RankPool(2, operation_timeout=1) as pool:
        start = time.monotonic()
        with pytest.raises(RankError, match="in barrier") as caught:
            pool.run(late_on_one, shared_memory)
        assert caught.value.rank == 0
        assert time.monotonic() - start < 20


def test_result_that_cannot_be_pickled(rank_pool: GetPool) -> None:
    with pytest.raises(RankError, match="unpicklable"):
        rank_pool(2).run(unpicklable)


def test_function_must_be_at_top_level(rank_pool: GetPool) -> None:
    with pytest.raises(ValueError, match="must stand at the top level of its module"):
        rank_pool(2).run(lambda rank: rank)


def test_ranks_have_our_environment(monkeypatch: pytest.MonkeyPatch, rank_pool: GetPool) -> None:
    still_works(rank_pool(2))  # the fork server is up before the variable is set
    monkeypatch.setenv("MOESERVE_TEST_WORD", "here")
    with RankPool(1) as pool:
        assert pool.run(environment, "MOESERVE_TEST_WORD") == ["here"]


FAMILY = """
    import os, sys, time
    from moeserve.comm.spawn import start_process

    def live(generations):
        if generations:
            start_process(live, (generations - 1,))
        print(os.getpid(), flush=True)
        time.sleep(1000)

    if __name__ == "__main__":
        start_process(live, (0,))
        start_process(live, (1,))
        sys.stdin.readline()
        {end}
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "sys.exit(3)"])
def test_no_orphans(tmp_path: Path, end: str) -> None:
    script = tmp_path / "family.py"
    script.write_text(textwrap.dedent(FAMILY.format(end=end)))
    path = os.pathsep.join(p for p in sys.path if p)
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
    ) as parent:
        assert parent.stdout is not None and parent.stdin is not None
        pids = [int(parent.stdout.readline()) for _ in range(3)]
        assert all(alive(p) for p in pids)
        parent.stdin.close()
        assert parent.wait(20) in (-signal.SIGKILL, 3)
        deadline = time.monotonic() + 10
        while any(alive(p) for p in pids):
            assert time.monotonic() < deadline, "orphans"
            time.sleep(0.02)


def alive(process: int) -> bool:
    """Whether a process runs: not gone, and not a zombie that waits to be reaped."""
    try:
        with open(f"/proc/{process}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
