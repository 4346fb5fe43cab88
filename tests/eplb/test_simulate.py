"""The simulator against TensorRT-LLM's published all-to-all timings, and its plain sense.

Tech blog 18, one-sided all-to-all on GB200 NVL72, DeepSeek-V3 shapes, BF16, balanced routing: microseconds of
dispatch and combine by tokens a rank. The constants are a fit to the rows from 128 tokens on at 8 and 64 ranks;
16 and 32 ranks are interpolated, so there the test is of the model and not of the fit.
"""

from __future__ import annotations

import numpy as np
import pytest

from moeserve.eplb import Placement, Topology, simulate, solve
from moeserve.eplb.migration import plan_migration
from moeserve.eplb.synthetic import Traffic

PUBLISHED = {  # ranks: {tokens a rank: (dispatch, combine)}
    8: {128: (31.7, 38.1), 512: (89.5, 91.7), 2048: (311.8, 322.6)},
    16: {128: (34.6, 39.9), 512: (97.1, 98.2), 2048: (343.3, 348.4)},
    32: {128: (37.8, 41.1), 512: (109.6, 102.5), 2048: (373.7, 369.5)},
    64: {128: (41.6, 44.5), 512: (115.7, 106.7), 2048: (399.2, 372.1)},
}


@pytest.mark.parametrize("ranks", PUBLISHED)
def test_all_to_all_is_within_8_percent_of_the_published_timings(ranks: int) -> None:
    hardware, model = simulate.hardware("gb200-nvl72"), simulate.model("deepseek-v3")
    errors = []
    for tokens, published in PUBLISHED[ranks].items():
        sent = simulate.remote_bytes(model, ranks, tokens)
        for timing, seconds in zip((hardware.dispatch, hardware.combine), published, strict=True):
            errors.append(simulate.all_to_all_seconds(timing, ranks, sent) * 1e6 / seconds - 1)
    assert np.abs(errors).max() < 0.08
    assert np.abs(errors).mean() < 0.04


def test_imbalance_costs_time_and_balance_saves_it() -> None:
    hardware, model = simulate.hardware("gb200-nvl72"), simulate.model("deepseek-v3")
    traffic, topology = Traffic.make(4, 256), Topology.of(32, 288)
    windows = traffic.counts(traffic.mixes("drift", 8), 32768)
    start = Placement.identity(4, 256, 288)
    ours = solve(windows, topology)
    times = [simulate.step_time(windows, p, topology, hardware, model, 1024) for p in (start, ours)]
    assert times[1].total < times[0].total
    assert times[1].tokens_per_second_per_rank > times[0].tokens_per_second_per_rank
    more = simulate.step_time(windows, ours, topology, hardware, model, 1024, other_seconds=1.0)
    assert more.total == pytest.approx(times[1].total + 1.0)
    assert simulate.migration_seconds(plan_migration(start, ours, topology), topology, hardware, model) > 0
    assert simulate.migration_seconds(plan_migration(start, start, topology), topology, hardware, model) == 0


def test_every_constant_has_a_unit_and_a_source() -> None:
    for entries in simulate.library().values():
        for constants in entries.values():
            assert all(constant["unit"] and constant["source"] for constant in constants.values())
    assert simulate.model("deepseek-v3").expert_bytes == 3 * 7168 * 2048
    with pytest.raises(ValueError, match="is not in the library: there are gb200-nvl72"):
        simulate.hardware("x")
