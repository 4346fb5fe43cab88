"""Tiny random checkpoints of each family, saved by transformers, and transformers' logits for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moeserve

LENGTHS = (13, 9, 11, 6, 10)
"""Tokens of the test sequences."""

_COMMON: dict[str, Any] = {
    "vocab_size": 99,  # not divisible by any tp
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 8,
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}
_GQA = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": (
        "DeepseekV2Config",
        _MLA | {"q_lora_rank": None, "n_shared_experts": 2, "rope_parameters": _YARN},
    ),
    "deepseek_v2_groups": (
        "DeepseekV2Config",
        _MLA
        | {
            "q_lora_rank": 24,
            "n_shared_experts": 1,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        _MLA
        | {
            "q_lora_rank": 24,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "attention_bias": True,
            "rope_parameters": _YARN,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        _GQA
        | {
            "moe_intermediate_size": 16,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "mixtral": (
        "MixtralConfig",
        _GQA | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
    ),
    "llama": (
        "LlamaConfig",
        _GQA | {"rope_parameters": _LLAMA3, "attention_bias": True, "mlp_bias": True},
    ),
    "qwen3": (
        "Qwen3Config",
        _GQA
        | {
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 2,
        },
    ),
}


@dataclass(frozen=True)
class Oracle:
    """A checkpoint, sequences of token ids, and transformers' float32 logits [length, vocab] of each."""

    path: Path
    tokens: list[list[int]]
    logits: list[Tensor]


def make_model(family: str) -> Any:
    """A transformers model whose weights are large enough that every part of it shows in the logits."""
    import transformers

    class_name, fields = CONFIGS[family]
    config = getattr(transformers, class_name)(**(_COMMON | fields))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name:
                continue
            mean = 1.0 if "norm" in name else 0.0
            wide = 0.5 if weight.dim() == 1 or "embed" in name or "gate.weight" in name else 0.15
            weight.copy_(
                mean + torch.randn(weight.shape, generator=generator) * wide * (0.4 if mean else 1.0)
            )
    return model


@torch.no_grad()
def ask(model: Any, path: Path) -> Oracle:
    """The oracle of random sequences of LENGTHS tokens."""
    generator = torch.Generator().manual_seed(5)
    vocab = model.config.vocab_size
    tokens = [torch.randint(vocab, (n,), generator=generator).tolist() for n in LENGTHS]
    return Oracle(path, tokens, [model(torch.tensor([row])).logits[0].float() for row in tokens])


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """tiny(family): the Oracle of a tiny random model of the family; "embedded" is the shipped one."""

    @cache
    def make(family: str) -> Oracle:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        if family == "embedded":
            path = Path(moeserve.__file__).parent / "tiny_model"
            model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            return ask(model, path)
        path = tmp_path_factory.mktemp(family)
        model = make_model(family)
        model.save_pretrained(path)
        return ask(model, path)

    return make
