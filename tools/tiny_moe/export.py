"""The training model as a Hugging Face directory, and back."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from tiny_moe.model import TinyConfig, TinyMoE
from tiny_moe.tokens import CHAT_TEMPLATE, END, END_OF_TEXT, SPECIAL_TOKENS

_BIAS = "e_score_correction_bias"


def export_checkpoint(
    weights: dict[str, Tensor], config: TinyConfig, tokenizer: Tokenizer, out: Path
) -> None:
    """Writes config, weights (bfloat16), tokenizer with chat template and generation defaults into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, w in weights.items():
        name = f"model.{name}"
        if name.endswith(_BIAS):
            tensors[name] = exported_bias(w)
        elif name.endswith("experts.gate_up"):
            for expert, (gate, up) in enumerate(w.bfloat16().unflatten(1, (2, -1)).unbind(0)):
                prefix = name.removesuffix("gate_up") + str(expert)
                tensors[f"{prefix}.gate_proj.weight"] = gate
                tensors[f"{prefix}.up_proj.weight"] = up
        elif name.endswith("experts.down"):
            for expert, down in enumerate(w.bfloat16()):
                tensors[f"{name.removesuffix('down')}{expert}.down_proj.weight"] = down
        else:
            tensors[name] = w.bfloat16()
    contiguous = {name: t.detach().contiguous() for name, t in tensors.items()}
    save_file(contiguous, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save(str(out / "tokenizer.json"))
    _write(out / "config.json", _hf_config(config))
    _write(out / "generation_config.json", _generation_config())
    _write(out / "tokenizer_config.json", _tokenizer_config(config))


def exported_bias(bias: Tensor) -> Tensor:
    """Shifted to be positive, which changes no ranking: older transformers masks closed groups with 0. Exact
    in bfloat16, so that no reader's dtype changes the routing."""
    return (bias - bias.min() + 2**-7).bfloat16().float()


def load_checkpoint(model_dir: Path) -> TinyMoE:
    """The training model, in float32, of a directory written by `export_checkpoint`."""
    found = json.loads((model_dir / "config.json").read_text())
    config = TinyConfig(**{f.name: found[f.name] for f in fields(TinyConfig)})
    tensors = {
        n.removeprefix("model."): t.float() for n, t in load_file(model_dir / "model.safetensors").items()
    }
    model = TinyMoE(config)
    for name in model.state_dict():
        experts = range(config.n_routed_experts)
        if name.endswith("experts.gate_up"):
            prefix = name.removesuffix("gate_up")
            pairs = [[tensors.pop(f"{prefix}{e}.{p}_proj.weight") for p in ("gate", "up")] for e in experts]
            tensors[name] = torch.stack([torch.cat(pair) for pair in pairs])
        elif name.endswith("experts.down"):
            prefix = name.removesuffix("down")
            tensors[name] = torch.stack([tensors.pop(f"{prefix}{e}.down_proj.weight") for e in experts])
    model.load_state_dict(tensors)
    return model


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _hf_config(config: TinyConfig) -> dict[str, Any]:
    return asdict(config) | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_key_value_heads": config.num_attention_heads,
        "n_shared_experts": 1,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 0,
        "hidden_act": "silu",
        "rope_scaling": None,
        "rope_interleave": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": END,
        "pad_token_id": END_OF_TEXT,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def _generation_config() -> dict[str, Any]:
    return {
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": [END, END_OF_TEXT],
        "pad_token_id": END_OF_TEXT,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
        "max_new_tokens": 200,
    }


def _tokenizer_config(config: TinyConfig) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[END_OF_TEXT],
        "eos_token": SPECIAL_TOKENS[END],
        "pad_token": SPECIAL_TOKENS[END_OF_TEXT],
        "additional_special_tokens": SPECIAL_TOKENS[1:],
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "chat_template": CHAT_TEMPLATE,
    }
