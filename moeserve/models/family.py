"""What the families share when they turn a config into a spec."""

from __future__ import annotations

from moeserve.models.hf_config import HfConfig, read_dtype, read_quantization, read_rope
from moeserve.models.spec import GroupedAttention, LayerSpec, ModelSpec, Routing


def model_spec(
    config: HfConfig, layers: tuple[LayerSpec, ...], rope_dim: int, norm_eps: float, interleaved: bool = False
) -> ModelSpec:
    """The spec around `layers`; norm_eps is the family's default."""
    return ModelSpec(
        architecture=str(config.fields["architectures"][0]),
        hidden_size=config.integer("hidden_size"),
        vocab_size=config.integer("vocab_size"),
        max_positions=config.integer("max_position_embeddings"),
        norm_eps=config.number("rms_norm_eps", norm_eps),
        rope=read_rope(config, rope_dim, interleaved),
        layers=layers,
        tied_embeddings=config.flag("tie_word_embeddings", False),
        dtype=read_dtype(config),
        quantization=read_quantization(config),
    )


def grouped_attention(
    config: HfConfig, bias: bool = False, head_norm: bool = False, window: int | None = None
) -> GroupedAttention:
    """The attention of Llama and its kin. bias: of all four projections."""
    num_heads = config.integer("num_attention_heads")
    num_kv_heads = config.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise config.error("num_key_value_heads", f"must divide num_attention_heads = {num_heads}")
    head_dim = config.integer("head_dim", config.integer("hidden_size") // num_heads)
    return GroupedAttention(num_heads, num_kv_heads, head_dim, bias, bias, head_norm, window)


def check_routing(config: HfConfig, num_experts: int, routing: Routing) -> Routing:
    """Raises ValueError unless the choice of experts can be made."""
    if num_experts % routing.num_groups:
        raise config.error("n_group", f"must divide the {num_experts} experts")
    if routing.groups_kept > routing.num_groups:
        raise config.error("topk_group", f"must be at most n_group = {routing.num_groups}")
    group_size = num_experts // routing.num_groups
    if routing.group_score_terms > group_size:
        raise config.error("n_group", f"leaves {group_size} expert in a group; give a smaller one")
    if routing.top_k > routing.groups_kept * group_size:
        raise config.error("num_experts_per_tok", f"must be at most {routing.groups_kept * group_size} here")
    return routing
