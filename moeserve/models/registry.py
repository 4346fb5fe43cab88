"""From a model directory to its spec: one entry an architecture, one file a family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moeserve.models import deepseek, llama, mixtral, qwen3, qwen3_moe
from moeserve.models.hf_config import HfConfig, check_silu
from moeserve.models.spec import ModelSpec

FAMILIES: dict[str, Callable[[HfConfig], ModelSpec]] = {
    "DeepseekV2ForCausalLM": deepseek.read_v2,
    "DeepseekV3ForCausalLM": deepseek.read_v3,  # V3, V3.1, R1 and Kimi-K2
    "LlamaForCausalLM": llama.read,
    "MixtralForCausalLM": mixtral.read,
    "Qwen3ForCausalLM": qwen3.read,
    "Qwen3MoeForCausalLM": qwen3_moe.read,
}


def read_spec(model_dir: str | Path) -> ModelSpec:
    """The spec of the model in `model_dir`, from its config.json alone.

    Raises ValueError that names the file and the field: missing or broken file, unknown architecture, a
    missing or odd field, or one that asks for what this engine does not do.
    """
    config = HfConfig.read(model_dir)
    names = config.fields.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in FAMILIES:
        raise config.error("architectures", f"unknown architecture; known are {', '.join(FAMILIES)}")
    check_silu(config)
    return FAMILIES[names[0]](config)
