"""Makes the model of the serving benchmark: a Qwen3-MoE of 118 M random parameters with the embedded tokenizer.

python tools/bench_model.py DIRECTORY
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moeserve.config import EMBEDDED_MODEL


def make_bench_model(directory: Path) -> Path:
    """A Hugging Face directory in bfloat16; kept when it is there already."""
    if (directory / "model.safetensors").exists():
        return directory
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1024,
        moe_intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=4,
    )
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED_MODEL / name, directory / name)
    return directory


if __name__ == "__main__":
    print(make_bench_model(Path(sys.argv[1])))
