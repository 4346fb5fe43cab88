"""Qwen3-MoE: Qwen3's attention; experts in every decoder_sparse_step-th layer, softmax routing."""

from __future__ import annotations

from moeserve.models.family import check_routing, grouped_attention, model_spec
from moeserve.models.hf_config import HfConfig
from moeserve.models.spec import DenseMlp, LayerSpec, ModelSpec, MoeMlp, Routing


def read(config: HfConfig) -> ModelSpec:
    sliding = config.flag("use_sliding_window", False) and config.has("sliding_window")
    window = config.integer("sliding_window") if sliding else None
    attention = grouped_attention(config, config.flag("attention_bias", False), head_norm=True, window=window)
    # transformers 5 saves num_experts under its common name
    num_experts = config.integer("num_experts" if config.has("num_experts") else "num_local_experts")
    normalize = config.flag("norm_topk_prob", False)
    routing = Routing("softmax", config.integer("num_experts_per_tok"), normalize=normalize)
    check_routing(config, num_experts, routing)
    moe = MoeMlp(num_experts, config.integer("moe_intermediate_size"), routing)
    dense_layers = config.fields.get("mlp_only_layers") or []
    if not isinstance(dense_layers, list) or not all(isinstance(i, int) for i in dense_layers):
        raise config.error("mlp_only_layers", "must be a list of layer numbers")
    step = config.integer("decoder_sparse_step", 1)
    layers = []
    for index in range(config.integer("num_hidden_layers")):
        if index not in dense_layers and (index + 1) % step == 0:
            layers.append(LayerSpec(attention, moe))
        else:
            layers.append(LayerSpec(attention, DenseMlp(config.integer("intermediate_size"))))
    return model_spec(config, tuple(layers), attention.head_dim, norm_eps=1e-6)
