"""The Triton kernels under the interpreter: virtual ranks in lock-step against a dense reference, field by field."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moeserve.comm.all_to_all.one_sided.layout import EpConfig, RowFormat
from tests.comm.one_sided.interpreted import Interpreters, Steps, make_case, make_config, make_table

pytestmark = pytest.mark.multi_rank


@pytest.mark.parametrize("seed", [pytest.param(s, marks=pytest.mark.slow) if s > 3 else s for s in range(16)])
def test_a_step_leaves_what_the_reference_says(interpreter: Interpreters, seed: int) -> None:
    interpreter.run(check_seed, seed)


def check_seed(rank: int, seed: int) -> None:
    """Some steps of one random configuration, without a reset, each with other inputs."""
    random = np.random.default_rng(seed)
    config = make_config(random)
    table = make_table(config, random) if seed % 2 else None
    check_steps(config, table, range(seed, seed + 3), small_tiles=seed % 3 == 2)


def check_steps(
    config: EpConfig, table: torch.Tensor | None, seeds: range, small_tiles: bool = False
) -> None:
    """small_tiles: so that all loops of the kernels go round."""
    from moeserve.comm.all_to_all.one_sided.triton_engine import Tiles

    tiles = Tiles(programs=3, rows=2, nbytes=64, choices=4 * config.top_k) if small_tiles else None
    steps = Steps(config, table, tiles=tiles)
    for number, seed in enumerate(seeds):
        steps.rotate(number % 4)
        try:
            steps.run(make_case(config, seed, table))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {config}: {error}") from error


@pytest.mark.parametrize("combine", ["push", pytest.param("pull", marks=pytest.mark.slow)])
def test_a_rank_may_sum_its_choices_itself(interpreter: Interpreters, combine: str) -> None:
    interpreter.run(check_sums_of_ranks, combine, 1)


def check_sums_of_ranks(rank: int, combine: str, count: int) -> None:
    random = np.random.default_rng(count)
    for _ in range(count):
        config = make_config(random, combine=combine, cells="rank", world=3)
        check_steps(config, None, range(2, 5))


@pytest.mark.parametrize("combine", ["push", pytest.param("pull", marks=pytest.mark.slow)])
def test_results_may_travel_as_float8(interpreter: Interpreters, combine: str) -> None:
    interpreter.run(check_float8, combine)


def check_float8(rank: int, combine: str) -> None:
    for cells, width in (("choice", 300), ("choice", 128), ("rank", 40)):
        blocks = -(-width // 128)
        x, result = RowFormat(width, torch.bfloat16), RowFormat(width, torch.float8_e4m3fn, blocks)
        check_steps(EpConfig(3, 5, 4, 3, x, result, combine, cells), None, range(2, 4))


@pytest.mark.slow
def test_counts_of_experts_go_to_all_ranks(interpreter: Interpreters) -> None:
    interpreter.run(check_gathered_counts)


def check_gathered_counts(rank: int) -> None:
    random = np.random.default_rng(5)
    sizes = make_config(random, world=3, slots_per_rank=4)
    table = make_table(sizes, random)
    config = make_config(np.random.default_rng(5), world=3, slots_per_rank=4, num_experts=len(table))
    check_steps(config, table, range(2, 5))


@pytest.mark.slow
def test_72_ranks_and_22_choices(interpreter: Interpreters) -> None:
    interpreter.run(check_many_ranks, timeout=120.0)


def check_many_ranks(rank: int) -> None:
    form = RowFormat(8, torch.bfloat16)
    check_steps(EpConfig(72, 1, 22, 1, form, form), None, range(6, 7))
