"""Mixtral: experts in every layer, softmax routing with the chosen weights summing to 1, sliding window."""

from __future__ import annotations

from moeserve.models.family import check_routing, grouped_attention, model_spec
from moeserve.models.hf_config import HfConfig
from moeserve.models.spec import ExpertNames, LayerSpec, ModelSpec, MoeMlp, Routing

NAMES = ExpertNames(block="block_sparse_moe", gate="w1", up="w3", down="w2")


def read(config: HfConfig) -> ModelSpec:
    window = config.integer("sliding_window") if config.has("sliding_window") else None
    attention = grouped_attention(config, window=window)
    num_experts = config.integer("num_local_experts")
    routing = Routing("softmax", config.integer("num_experts_per_tok"), normalize=True)
    check_routing(config, num_experts, routing)
    moe = MoeMlp(num_experts, config.integer("intermediate_size"), routing, names=NAMES)
    layers = (LayerSpec(attention, moe),) * config.integer("num_hidden_layers")
    return model_spec(config, layers, attention.head_dim, norm_eps=1e-5)
