"""The command line: what each command prints, without a server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeserve.__main__ import main
from moeserve.bench import percentile

DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}


def test_plan_of_deepseek_v3_on_72_ranks_needs_its_config_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    arguments = ["--tp-size", "72", "--ep-size", "72", "--enable-attention-dp", "--dtype", "bfloat16"]
    assert main(["plan", str(tmp_path), *arguments, "--memory-gib", "180"]) == 0
    printed = capsys.readouterr().out
    assert "dp 72, tp 1" in printed
    assert "288 for 256 experts (32 redundant), 4 a rank, in 58 MoE layers" in printed
    # 61 layers of a latent of 512 + 64 in bfloat16
    assert f"{61 * 576 * 2} bytes a token" in printed
    experts = 58 * 4 * 3 * 7168 * 2048 * 2 / 1024**3
    assert f"{experts:.4f} GiB a rank" in printed


def test_plan_says_when_the_weights_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    assert main(["plan", str(tmp_path), "--tp-size", "8", "--memory-gib", "80"]) == 0
    assert "does not fit" in capsys.readouterr().out


def test_bad_arguments_end_with_2_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["plan", "--memory-gib", "-1"],
        ["plan", "no/such/model"],
        ["generate", "--prompt", "x", "--max-tokens", "0"],
        ["generate", "--prompt", "x", "--temperature", "nan"],
        ["bench", "--model", "m", "--concurrency", "one"],
        ["bench", "--model", "m", "--num-requests", "-1"],
        ["bench", "--model", "m", "--vocab-size", "5"],
        ["bench", "--model", "m", "--json", "no/such/folder/figures.json"],
        ["bench", "--model", "m", "--concurrency", "1", "--url", "127.0.0.1:9"],
        ["bench", "--model", "m", "--concurrency", "1", "--url", "https://127.0.0.1:9"],
    ):
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        error = error.removeprefix("4 requests, 1 at once ...\n")  # a progress line
        assert error.startswith("moeserve: ") and error.count("\n") == 1, error


def test_a_percentile_is_the_smallest_that_enough_do_not_exceed() -> None:
    assert percentile(range(1, 101), 0.99) == 99
    assert percentile([3.0, 1.0, 2.0], 0.99) == 3.0
    assert percentile([5.0], 0.99) == 5.0


def test_bench_without_a_server_says_where_it_looked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--model", "m", "--url", "http://127.0.0.1:9", "--concurrency", "1"]) == 1
    assert "http://127.0.0.1:9" in capsys.readouterr().err
