"""Which engines may be asked to go on without a rank."""

from __future__ import annotations

from typing import Any

import pytest

from moeserve.config import EngineConfig, parse
from moeserve.plan import make_plan

PAIRS = {layer: [slot // 2 for slot in range(64)] for layer in range(1, 5)}
"""Both slots of an expert on one rank."""


def config(slots: int | None = 64, online: dict[str, Any] | None = None, **settings: Any) -> EngineConfig:
    balancer: dict[str, Any] = {"on_rank_loss": "shrink", "num_slots": slots, **(online or {})}
    return parse(
        EngineConfig,
        {
            "device": "cpu",
            "tensor_parallel_size": 4,
            "enable_attention_dp": True,
            "moe_config": {"load_balancer": balancer},
            **settings,
        },
    )


def test_shrink_is_taken_where_every_expert_is_on_two_ranks() -> None:
    plan = make_plan(config())
    assert plan.placement is not None and plan.config.moe_config.load_balancer.on_rank_loss == "shrink"
    make_plan(config(online={"layer_updates_per_iter": 1, "online": {"survive_rank_loss": True}}))


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (config(slots=None), "num_slots = 64"),
        (config(slots=60), "num_slots = 64"),
        (config(online={"initial_global_assignments": PAIRS}), "--survive-rank-loss"),
        (config(enable_attention_dp=False), "enable_attention_dp"),
        (config(attention_tensor_parallel_size=2), "attention_tensor_parallel_size = 1"),
        (config(moe_tensor_parallel_size=2), "moe_tensor_parallel_size = 1"),
        (config(tensor_parallel_size=1), "2 ranks or more"),
        (config(online={"layer_updates_per_iter": 1}), "online.survive_rank_loss"),
    ],
)
def test_shrink_is_refused_where_a_rank_would_take_something_with_it(
    given: EngineConfig, wanted: str
) -> None:
    with pytest.raises(ValueError, match=f"on_rank_loss = shrink: .*{wanted}"):
        make_plan(given)
