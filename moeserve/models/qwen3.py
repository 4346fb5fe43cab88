"""Qwen3, dense: grouped attention with a norm of each query and key head."""

from __future__ import annotations

from moeserve.models.family import grouped_attention, model_spec
from moeserve.models.hf_config import HfConfig
from moeserve.models.spec import DenseMlp, LayerSpec, ModelSpec


def read(config: HfConfig) -> ModelSpec:
    bias = config.flag("attention_bias", False)
    full = grouped_attention(config, bias, head_norm=True)
    mlp = DenseMlp(config.integer("intermediate_size"))
    kinds = _layer_types(config)
    layers = tuple(
        LayerSpec(grouped_attention(config, bias, head_norm=True, window=window), mlp) for window in kinds
    )
    return model_spec(config, layers, full.head_dim, norm_eps=1e-6)


def _layer_types(config: HfConfig) -> list[int | None]:
    """The window of each layer: a sliding one where layer_types (or max_window_layers) says so."""
    num_layers = config.integer("num_hidden_layers")
    if not config.flag("use_sliding_window", False) or not config.has("sliding_window"):
        return [None] * num_layers
    window = config.integer("sliding_window")
    types = config.fields.get("layer_types")
    if types is None:
        first = config.integer("max_window_layers", 28, at_least=0)
        return [window if i >= first else None for i in range(num_layers)]
    if len(types) != num_layers or not set(types) <= {"sliding_attention", "full_attention"}:
        raise config.error("layer_types", f"must be {num_layers} times sliding_attention or full_attention")
    return [window if kind == "sliding_attention" else None for kind in types]
