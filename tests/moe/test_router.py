"""The choice of experts against transformers' routers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from moeserve.models.spec import Routing
from moeserve.ops.reference import choose_experts

GREEDY = Routing("softmax", 3, scaling=1.5, float32_logits=True)
GROUPED = Routing("softmax", 3, num_groups=4, groups_kept=2, scaling=1.5, float32_logits=True)
SIGMOID = Routing(
    "sigmoid", 3, 4, 2, 2, correction_bias=True, normalize=True, scaling=2.5, float32_logits=True
)


def v2(method: str) -> Any:
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

    return DeepseekV2TopkRouter(
        DeepseekV2Config(
            hidden_size=16,
            num_attention_heads=4,
            n_routed_experts=16,
            num_experts_per_tok=3,
            topk_method=method,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=1.5,
        )
    )


def v3() -> Any:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(
        hidden_size=16, n_routed_experts=16, num_experts_per_tok=3, n_group=4, topk_group=2
    )
    router = DeepseekV3TopkRouter(config)
    router.e_score_correction_bias.copy_(torch.randn(16) * 0.3)
    return router


def qwen3(normalize: bool) -> Any:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    fields = {"hidden_size": 16, "num_experts": 16, "num_experts_per_tok": 3, "norm_topk_prob": normalize}
    return Qwen3MoeTopKRouter(Qwen3MoeConfig(**fields))


CASES = {
    "greedy": (GREEDY, lambda: v2("greedy")),
    "groups": (GROUPED, lambda: v2("group_limited_greedy")),
    "sigmoid": (SIGMOID, v3),
    "softmax": (Routing("softmax", 3), lambda: qwen3(False)),
    "normalized": (Routing("softmax", 3, normalize=True), lambda: qwen3(True)),
}


@pytest.mark.parametrize("name", CASES)
def test_same_experts_and_weights_as_transformers(name: str) -> None:
    torch.manual_seed(0)
    routing, make = CASES[name]
    router = make()
    with torch.no_grad():
        router.weight.copy_(torch.randn(16, 16))
        x = torch.randn(500, 16)
        _, wanted_weights, wanted_experts = router(x)
        bias = getattr(router, "e_score_correction_bias", None)
        weights, experts = choose_experts(F.linear(x, router.weight), bias, routing)
    order, wanted_order = experts.argsort(1), wanted_experts.argsort(1)
    assert torch.equal(experts.gather(1, order), wanted_experts.gather(1, wanted_order))
    assert torch.equal(weights.gather(1, order), wanted_weights.gather(1, wanted_order))


def test_groups_leave_experts_out() -> None:
    torch.manual_seed(0)
    logits = torch.randn(200, 16)
    _, experts = choose_experts(logits, torch.zeros(16), SIGMOID)
    assert all(len({expert // 4 for expert in row}) <= 2 for row in experts.tolist())
    free = Routing("sigmoid", 3, correction_bias=True)
    assert not torch.equal(choose_experts(logits, torch.zeros(16), free)[1], experts)


def test_no_tokens() -> None:
    weights, experts = choose_experts(torch.zeros(0, 16), torch.zeros(16), SIGMOID)
    assert weights.shape == experts.shape == (0, 3)
