"""DeepSeek V2 (and Lite), V3, R1 and Kimi-K2: latent attention, shared experts, first layers dense.

V2 chooses by softmax, greedily or within the best groups; V3 by sigmoid with a correction bias that counts
for the choice alone. Sources: arXiv 2405.04434 and 2412.19437, and the modelling files published with the
weights.
"""

from __future__ import annotations

from moeserve.models.family import check_routing, model_spec
from moeserve.models.hf_config import HfConfig, read_rope
from moeserve.models.spec import DenseMlp, LatentAttention, LayerSpec, ModelSpec, MoeMlp, Routing, YarnScaling


def read_v2(config: HfConfig) -> ModelSpec:
    method = config.one_of("topk_method", ("greedy", "group_limited_greedy"), "greedy")
    config.one_of("scoring_func", ("softmax",), "softmax")
    if config.flag("norm_topk_prob", False):
        raise config.error("norm_topk_prob", "DeepSeek-V2 weights are never normalized; give false")
    grouped = method == "group_limited_greedy"
    routing = Routing(
        "softmax",
        config.integer("num_experts_per_tok"),
        num_groups=config.integer("n_group") if grouped else 1,
        groups_kept=config.integer("topk_group") if grouped else 1,
        scaling=config.number("routed_scaling_factor", 1.0),
        float32_logits=True,
    )
    return _read(config, routing, interleaved=True)


def read_v3(config: HfConfig) -> ModelSpec:
    config.one_of("topk_method", ("noaux_tc",), "noaux_tc")
    config.one_of("scoring_func", ("sigmoid",), "sigmoid")
    routing = Routing(
        "sigmoid",
        config.integer("num_experts_per_tok"),
        num_groups=config.integer("n_group", 1),
        groups_kept=config.integer("topk_group", 1),
        group_score_terms=2,
        correction_bias=True,
        normalize=config.flag("norm_topk_prob", True),
        scaling=config.number("routed_scaling_factor", 1.0),
        float32_logits=True,
    )
    return _read(config, routing, interleaved=config.flag("rope_interleave", True))


def _read(config: HfConfig, routing: Routing, interleaved: bool) -> ModelSpec:
    attention = _attention(config)
    num_experts = config.integer("n_routed_experts")
    check_routing(config, num_experts, routing)
    expert_size = config.integer("moe_intermediate_size")
    shared = config.integer("n_shared_experts", 0, at_least=0) * expert_size
    moe = MoeMlp(num_experts, expert_size, routing, shared)
    dense = DenseMlp(config.integer("intermediate_size"))
    first = config.integer("first_k_dense_replace", 0, at_least=0)
    every = config.integer("moe_layer_freq", 1)
    layers = tuple(
        LayerSpec(attention, moe if i >= first and i % every == 0 else dense)
        for i in range(config.integer("num_hidden_layers"))
    )
    return model_spec(config, layers, attention.rope_dim, norm_eps=1e-6, interleaved=interleaved)


def _attention(config: HfConfig) -> LatentAttention:
    nope, rope = config.integer("qk_nope_head_dim"), config.integer("qk_rope_head_dim")
    scale = float((nope + rope) ** -0.5)
    scaling = read_rope(config, rope).scaling
    if isinstance(scaling, YarnScaling) and scaling.mscale_all_dim:
        scale *= scaling.temperature(scaling.mscale_all_dim) ** 2
    return LatentAttention(
        num_heads=config.integer("num_attention_heads"),
        q_lora_rank=config.integer("q_lora_rank") if config.has("q_lora_rank") else None,
        kv_lora_rank=config.integer("kv_lora_rank"),
        nope_dim=nope,
        rope_dim=rope,
        value_dim=config.integer("v_head_dim"),
        scale=scale,
        bias=config.flag("attention_bias", False),
    )
