"""The GPUs' token dispatcher, between processes: under the interpreter, over the CPU ranks' shared memory."""

from __future__ import annotations

import pytest
import torch

from moeserve.comm.all_to_all.one_sided.dispatcher import RowSizes
from moeserve.comm.all_to_all.one_sided.gpu_dispatcher import GpuDispatcher
from moeserve.comm.layout import ParallelLayout
from moeserve.comm.mesh import Mesh
from moeserve.comm.symm import HeapUnavailable
from tests.comm.one_sided.interpreted import Interpreters
from tests.comm.test_all_to_all import check, make_case

pytestmark = pytest.mark.multi_rank


def check_steps(rank: int, seeds: range) -> None:
    """Real waits, no barriers: several dispatchers, several steps of each, two dispatches in flight at times."""
    group = Mesh(ParallelLayout(dp=2), rank).ep
    for seed in seeds:
        case = make_case(seed, 2, torch.bfloat16 if seed % 2 else torch.float32)
        x = case.xs[rank]
        sizes = RowSizes(12, x.shape[1], case.slots[rank].shape[1], x.dtype)
        dispatcher = GpuDispatcher(
            group, case.slots_per_rank, sizes, torch.device("cpu"), timeout=50.0, backends=("shm",)
        )
        check(dispatcher, rank, case)
        first = dispatcher.dispatch(x, case.slots[rank], case.weights[rank]).wait()
        second = dispatcher.dispatch(-x, case.slots[rank], case.weights[rank]).wait()
        a = dispatcher.combine(first.rows, first).wait()
        b = dispatcher.combine(second.rows, second).wait()
        assert torch.equal(a, -b)
        check(dispatcher, rank, case)


@pytest.mark.slow
def test_equals_reference(two_interpreters: Interpreters) -> None:
    two_interpreters.run(check_steps, range(6), timeout=100.0)


def check_refusal(rank: int) -> None:
    group = Mesh(ParallelLayout(dp=2), rank).ep
    with pytest.raises(HeapUnavailable, match="fabric: .*; torch: "):
        GpuDispatcher(group, 1, RowSizes(2, 8, 1, torch.float32), torch.device("cuda"))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_why_there_is_no_memory_between_gpus(two_interpreters: Interpreters) -> None:
    two_interpreters.run(check_refusal)


def check_late(rank: int) -> None:
    group = Mesh(ParallelLayout(dp=2), rank).ep
    sizes = RowSizes(4, 8, 1, torch.float32)
    dispatcher = GpuDispatcher(group, 1, sizes, torch.device("cpu"), timeout=0.01, backends=("shm",))
    if rank == 0:
        x, slots = torch.randn(4, 8), torch.tensor([[0], [1], [1], [0]])
        with pytest.raises(RuntimeError, match=r"no rows or results of rank 1 came for 0\.0 s"):
            dispatcher.dispatch(x, slots, torch.ones(4, 1)).wait()
    group.barrier()


@pytest.mark.slow
def test_a_late_rank_is_an_error(two_interpreters: Interpreters) -> None:
    two_interpreters.run(check_late)
