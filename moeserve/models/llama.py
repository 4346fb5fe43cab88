"""Llama 2 and 3: dense, grouped attention, optional biases, llama3 rotary scaling."""

from __future__ import annotations

from moeserve.models.family import grouped_attention, model_spec
from moeserve.models.hf_config import HfConfig
from moeserve.models.spec import DenseMlp, LayerSpec, ModelSpec


def read(config: HfConfig) -> ModelSpec:
    attention = grouped_attention(config, bias=config.flag("attention_bias", False))
    mlp = DenseMlp(config.integer("intermediate_size"), config.flag("mlp_bias", False))
    layers = (LayerSpec(attention, mlp),) * config.integer("num_hidden_layers")
    return model_spec(config, layers, attention.head_dim, norm_eps=1e-6)
