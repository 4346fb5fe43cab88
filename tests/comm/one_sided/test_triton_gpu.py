"""The Triton engine on a real GPU, all ranks on one: in lock-step, a stream for each, and replayed from graphs.

Written without a GPU at hand: not run yet.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor

from moeserve.comm.all_to_all.one_sided.layout import EpConfig, RowFormat
from tests.comm.one_sided.interpreted import Case, Steps, make_case, make_config, make_table, same_bits

if TYPE_CHECKING:
    from moeserve.comm.all_to_all.one_sided.triton_engine import Received
    from moeserve.comm.all_to_all.one_sided.virtual import Inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
    pytest.mark.skipif(
        "TRITON_INTERPRET" in os.environ, reason="TRITON_INTERPRET is set: kernels run on the CPU"
    ),
]

WIDE = RowFormat(1024, torch.bfloat16)
BOTH = pytest.mark.parametrize("combine", ["push", "pull"])


@pytest.mark.parametrize("seed", range(24))
def test_lock_step_equals_the_reference(seed: int) -> None:
    """Field by field, as under the interpreter."""
    random = np.random.default_rng(seed)
    config = make_config(random, cells="rank" if seed % 8 == 7 else "choice")
    table = make_table(config, random) if seed % 2 else None
    steps = Steps(config, table, device="cuda")
    for number in range(3):
        steps.rotate(number)
        steps.run(make_case(config, seed + number, table))


@BOTH
def test_float8_results_equal_the_reference(combine: str) -> None:
    config = EpConfig(4, 9, 6, 5, WIDE, RowFormat(1024, torch.float8_e4m3fn, 8), combine)
    steps = Steps(config, device="cuda")
    for seed in (2, 3, 6):
        steps.run(make_case(config, seed))


@BOTH
@pytest.mark.parametrize("phase", ["send", "answer"])
def test_a_late_rank_is_masked(combine: str, phase: str) -> None:
    steps = Steps(EpConfig(4, 9, 6, 5, WIDE, WIDE, combine), device="cuda")
    late = {"late_to_send": [2]} if phase == "send" else {"late_to_answer": [2]}
    steps.run(make_case(steps.config, 6), **late)
    for seed in (8, 9, 10):
        steps.run(make_case(steps.config, seed))


def sums(steps: Steps, case: Case) -> list[Tensor]:
    """Of one step in lock-step, without looking in between."""
    from moeserve.comm.all_to_all.one_sided.virtual import step

    return step(steps.engines, on_gpu(case), results)


def on_gpu(case: Case) -> list[Inputs]:
    from moeserve.comm.all_to_all.one_sided.virtual import Inputs

    return [
        Inputs(x.cuda(), ids.cuda(), w.cuda())
        for x, ids, w in zip(case.xs, case.ids, case.weights, strict=True)
    ]


def results(rank: int, got: Received) -> Tensor:
    """[capacity, H] of the rows as they lie, by a fixed number of operations: can be captured."""
    tokens, top_k = got.x.shape[1], got.rows.shape[0] // (got.x.shape[0] * got.x.shape[1])
    cells = got.rows.to(torch.int64) // top_k
    return got.x[cells // tokens, cells % tokens] * (rank + 1)


@BOTH
def test_one_stream_a_rank(combine: str) -> None:
    """Real waits: every rank's kernels on a stream of their own. Few ranks, so that all that wait fit on the device."""
    config = EpConfig(4, 16, 6, 5, WIDE, WIDE, combine)
    cases = [make_case(config, seed) for seed in (3, 6, 8, 9, 10)]
    lock_step = Steps(config, device="cuda")
    expected = [
        sums(lock_step, case) for case in cases
    ]  # compiles and loads all kernels too: that may stop streams
    free = Steps(config, device="cuda")
    streams = [torch.cuda.Stream() for _ in free.engines]
    inputs = [on_gpu(case) for case in cases]
    outs = [[torch.empty_like(given.x) for given in of_case] for of_case in inputs]
    for engine in free.engines:
        engine.set_deadline(5.0)
    torch.cuda.synchronize()
    for of_case, out_of_case in zip(inputs, outs, strict=True):
        for engine, stream, given, out in zip(free.engines, streams, of_case, out_of_case, strict=True):
            with torch.cuda.stream(stream):
                engine.send(given.x, given.ids, given.weights)
                engine.send_back(results(engine.rank, engine.receive()))
                engine.receive_back(out)
    torch.cuda.synchronize()
    assert all(engine.query_fault() == [] for engine in free.engines)
    for got, wanted in zip(outs, expected, strict=True):
        assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True))


@BOTH
def test_a_graph_is_replayed_with_other_inputs(combine: str) -> None:
    """Captured once; then other rows, routes, numbers of tokens, and one rank fewer."""
    from moeserve.comm.all_to_all.one_sided.virtual import Inputs, step

    config = EpConfig(3, 16, 6, 5, WIDE, WIDE, combine)
    replayed, eager = Steps(config, device="cuda"), Steps(config, device="cuda")
    fixed = [
        Inputs(
            torch.zeros(16, 1024, dtype=torch.bfloat16, device="cuda"),
            torch.full((16, 6), -1, device="cuda"),
            torch.zeros(16, 6, device="cuda"),
            num_tokens=torch.zeros(1, dtype=torch.int64, device="cuda"),
        )
        for _ in replayed.engines
    ]
    step(replayed.engines, fixed, results)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = step(replayed.engines, fixed, results)
    for number, seed in enumerate((3, 6, 8, 9, 10)):
        case = make_case(config, seed)
        if number == 3:
            for engine in replayed.engines[:2] + eager.engines[:2]:
                engine.set_membership([True, True, False], generation=1, epoch=50)
        for given, x, ids, weights in zip(fixed, case.xs, case.ids, case.weights, strict=True):
            count = len(x)
            given.x[:count].copy_(x)
            given.ids[:count].copy_(ids)
            given.weights[:count].copy_(weights)
            given.num_tokens.fill_(count)
        graph.replay()
        wanted = sums(eager, case)
        torch.cuda.synchronize()
        alive = 3 if number < 3 else 2
        for out, expected in zip(outs[:alive], wanted[:alive], strict=True):
            assert same_bits(out[: len(expected)], expected)
            assert not out[len(expected) :].any()


def test_every_run_gives_the_same_bits() -> None:
    config = EpConfig(8, 64, 8, 5, WIDE, WIDE)
    case = make_case(config, 3)
    first = sums(Steps(config, device="cuda"), case)
    for _ in range(3):
        again = sums(Steps(config, device="cuda"), case)
        assert all(same_bits(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
def test_the_sanitizer_finds_nothing(tool: str) -> None:
    test = f"{__file__}::test_lock_step_equals_the_reference[0]"
    command = [
        "compute-sanitizer",
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "pytest",
        "-q",
        test,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:]
