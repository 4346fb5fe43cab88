"""What config.json turns into, and the error for each thing it may get wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moeserve.models.registry import FAMILIES, read_spec
from moeserve.models.spec import BlockFp8, DenseMlp, GroupedAttention, LatentAttention, MoeMlp

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}
MIXTRAL = LLAMA | {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN = MIXTRAL | {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "moe_intermediate_size": 16}
DEEPSEEK: dict[str, Any] = LLAMA | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
}
DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def write(path: Path, fields: dict[str, Any]) -> Path:
    (path / "config.json").write_text(json.dumps(fields))
    return path


def test_deepseek_v3_as_published(tmp_path: Path) -> None:
    spec = read_spec(write(tmp_path, DEEPSEEK_V3))
    assert spec.moe_layers == tuple(range(3, 61))
    attention = spec.layers[0].attention
    assert isinstance(attention, LatentAttention)
    assert attention.scale == pytest.approx(192**-0.5 * (0.1 * 3.6888794541139363 + 1) ** 2)
    assert spec.quantization == BlockFp8(128, 128)
    assert spec.rope.interleaved and spec.rope.dim == 64
    assert spec.moe is not None and spec.moe.routing.group_score_terms == 2


def test_kimi_k2_differs_in_groups_alone(tmp_path: Path) -> None:
    kimi = {"model_type": "kimi_k2", "n_group": 1, "topk_group": 1, "n_routed_experts": 384}
    spec = read_spec(write(tmp_path, DEEPSEEK_V3 | kimi))
    assert spec.moe is not None and (spec.moe.num_experts, spec.moe.routing.num_groups) == (384, 1)


def test_which_layers_of_qwen3_moe_have_experts(tmp_path: Path) -> None:
    spec = read_spec(
        write(tmp_path, QWEN | {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]})
    )
    assert spec.moe_layers == (1, 5)
    assert isinstance(spec.layers[3].feed_forward, DenseMlp)
    assert isinstance(spec.layers[5].feed_forward, MoeMlp)


def test_moe_layer_frequency(tmp_path: Path) -> None:
    fields = DEEPSEEK | {"num_hidden_layers": 7, "first_k_dense_replace": 1, "moe_layer_freq": 2}
    assert read_spec(write(tmp_path, fields)).moe_layers == (2, 4, 6)


def test_window_needs_use_sliding_window(tmp_path: Path) -> None:
    attention = read_spec(write(tmp_path, QWEN | {"sliding_window": 8})).layers[0].attention
    assert isinstance(attention, GroupedAttention) and attention.window is None


YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
WRONG: list[tuple[dict[str, Any], str]] = [
    (LLAMA | {"architectures": ["GPT2LMHeadModel"]}, "architectures = .'GPT2LMHeadModel'.: unknown .* known are Deep"),
    (LLAMA | {"architectures": None}, "architectures = None"),
    (LLAMA | {"hidden_size": None}, "hidden_size is missing"),
    (LLAMA | {"hidden_size": "64"}, "hidden_size = '64': must be a whole number"),
    (LLAMA | {"hidden_size": 0}, "hidden_size = 0: must be a whole number, 1 or more"),
    (LLAMA | {"num_hidden_layers": 2.5}, "num_hidden_layers = 2.5"),
    (LLAMA | {"hidden_act": "gelu"}, "hidden_act = 'gelu': must be silu"),
    (LLAMA | {"num_key_value_heads": 3}, "num_key_value_heads = 3: must divide num_attention_heads = 4"),
    (LLAMA | {"rms_norm_eps": -1}, "rms_norm_eps = -1: must be a number above 0"),
    (LLAMA | {"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes': must be true or false"),
    (LLAMA | {"torch_dtype": "int8"}, "torch_dtype = 'int8': must be bfloat16 or float16 or float32"),
    (LLAMA | {"rope_scaling": []}, "rope_scaling = .*must be an object"),
    (LLAMA | {"rope_scaling": {"type": "longrope"}}, "rope_scaling: type = 'longrope': must be default or"),
    (LLAMA | {"rope_scaling": YARN | {"factor": None}}, "rope_scaling: factor is missing"),
    (LLAMA | {"rope_parameters": {**YARN, "rope_theta": "x"}}, "rope_parameters: rope_theta = 'x'"),
    (
        LLAMA | {"rope_scaling": YARN | {"rope_type": "llama3", "low_freq_factor": 4, "high_freq_factor": 1}},
        "high_freq_factor = 1: must be above low_freq_factor = 4",
    ),
    (LLAMA | {"rope_scaling": YARN | {"mscale": "1"}}, "rope_scaling: mscale = '1': must be a number"),
    (LLAMA | {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5: only 1.0"),
    (LLAMA | {"head_dim": 7}, "rotary dimension 7 is odd"),
    (LLAMA | {"quantization_config": {"quant_method": "awq"}}, "quant_method = 'awq'.*only fp8"),
    (
        LLAMA | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 1]}},
        "weight_block_size = .0, 1.: must be two",
    ),
    (MIXTRAL | {"num_experts_per_tok": 5}, "num_experts_per_tok = 5: must be at most 4"),
    (MIXTRAL | {"sliding_window": -1}, "sliding_window = -1"),
    (QWEN | {"mlp_only_layers": 3}, "mlp_only_layers = 3: must be a list"),
    (DEEPSEEK | {"scoring_func": "softmax"}, "scoring_func = 'softmax': must be sigmoid"),
    (DEEPSEEK | {"topk_method": "greedy"}, "topk_method = 'greedy': must be noaux_tc"),
    (DEEPSEEK | {"n_group": 3}, "n_group = 3: must divide the 8 experts"),
    (DEEPSEEK | {"n_group": 8}, "n_group = 8: leaves 1 expert in a group"),
    (DEEPSEEK | {"topk_group": 5}, "topk_group = 5: must be at most n_group = 4"),
    (DEEPSEEK | {"num_experts_per_tok": 5}, "num_experts_per_tok = 5: must be at most 4"),
    (DEEPSEEK | {"architectures": ["DeepseekV2ForCausalLM"], "norm_topk_prob": True}, "norm_topk_prob = True"),
    (
        DEEPSEEK | {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True, "sliding_window": 4,
                    "layer_types": ["full_attention"]},
        "layer_types = .*must be 2 times",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=range(len(WRONG)))
def test_odd_fields_are_named(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_spec(write(tmp_path, fields))
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize("text", ["", '{"architectures": [', "[]", "\0"])
def test_broken_config(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: (not valid JSON|holds a list)"):
        read_spec(tmp_path)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: cannot be read .No such file"):
        read_spec(tmp_path)


def test_every_family_has_a_good_config(tmp_path: Path) -> None:
    for architecture in FAMILIES:
        fields = (DEEPSEEK | QWEN if "Qwen" in architecture else DEEPSEEK | {"num_local_experts": 8}) | {
            "architectures": [architecture]
        }
        assert read_spec(write(tmp_path, fields)).architecture == architecture
