"""Settings: what is read, and what each mistake is answered with."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from moeserve.comm.all_to_all.one_sided.dispatcher import RowSizes
from moeserve.config import EngineConfig, add_model_and_flags, parse, parse_arguments
from moeserve.eplb.formats.placement import PlacementFile, write_placement
from moeserve.eplb.types import Placement
from moeserve.plan import check_local_ranks, describe, make_plan
from moeserve.serving import api_keys, server_settings

LAYERS = "--moe-config.load-balancer.layer-updates-per-iter"
ONLINE = "--moe-config.load-balancer.online"
BAD_SETTINGS = [  # command line, and what the answer must name
    (["--tensor-parallel-size", "0"], "tensor_parallel_size = 0: must be at least 1"),
    (["--tensor-parallel-size", "-4"], "tensor_parallel_size = -4"),
    (["--tensor-parallel-size", "two"], "tensor_parallel_size = 'two': must be a whole number"),
    (["--tensor-parallel-size", "1.5"], "tensor_parallel_size = 1.5: must be a whole number"),
    (["--tensor-parallel-size", "true"], "tensor_parallel_size = True"),
    (["--tensor-parallel-size", "null"], "tensor_parallel_size = None"),
    (["--tensor-parallel-size", "3"], "3"),
    (["--tp-size", "4", "--moe-tensor-parallel-size", "3"], "must divide tensor_parallel_size = 4"),
    (["--tp-size", "4", "--ep-size", "8"], "moe_expert_parallel_size = 8: must divide"),
    (
        ["--tp-size", "4", "--ep-size", "4", "--moe-tensor-parallel-size", "2"],
        "must equal tensor_parallel_size",
    ),
    (
        ["--tp-size", "4", "--attention-tensor-parallel-size", "2"],
        "attention_tensor_parallel_size = 2: without",
    ),
    (
        ["--tp-size", "4", "--enable-attention-dp", "--attention-tensor-parallel-size", "3"],
        "attention_tensor_parallel_size = 3: must divide tensor_parallel_size = 4",
    ),
    (["--enable-attention-dp", "maybe"], "enable_attention_dp = 'maybe': must be true or false"),
    (["--attention-dp-config.timeout-iters", "3"], "attention_dp_config: has no effect without"),
    (["--pipeline-parallel-size", "2"], "pipeline_parallel_size = 2"),
    (["--context-parallel-size", "2"], "context_parallel_size = 2"),
    (["--dtype", "int8"], "dtype = 'int8': must be one of auto, float32, bfloat16"),
    (["--device", "tpu"], "device = 'tpu': must be one of"),
    (["--max-batch-size", "0"], "max_batch_size = 0"),
    (["--max-num-tokens", "-1"], "max_num_tokens = -1"),
    (["--max-seq-len", "1"], "max_seq_len = 1: must be at least 2"),
    (["--max-seq-len", "4096"], "max_seq_len = 4096: the model knows 1024 positions"),
    (
        ["--max-seq-len", "512", "--kv-cache-config.max-tokens", "256"],
        "max_seq_len = 512: kv_cache_config.max",
    ),
    (["--port", "70000"], "port = 70000: must be from 0 to 65535"),
    (["--host", ""], "host = '': is empty"),
    (["--api-key", ""], "api_key = '': is empty"),
    (
        ["--kv-cache-config.free-gpu-memory-fraction", "0"],
        "free_gpu_memory_fraction = 0.0: must be from 0.01",
    ),
    (["--kv-cache-config.free-gpu-memory-fraction", "1.5"], "free_gpu_memory_fraction = 1.5"),
    (["--kv-cache-config.free-gpu-memory-fraction", ".nan"], "free_gpu_memory_fraction = nan"),
    (["--kv-cache-config.tokens-per-block", "0"], "tokens_per_block = 0"),
    (["--moe-config.all-to-all", "magic"], "moe_config.all_to_all = 'magic': must be one of"),
    (["--moe-config.all-to-all", "one_sided"], "moe_config.all_to_all = one_sided: there are no experts"),
    (["--moe-config.all-to-all", "gather"], "moe_config.all_to_all = gather: there are no experts on"),
    (["--moe-config.load-balancer.num-slots", "31"], "num_slots = 31: must be at least 32"),
    (["--tp-size", "4", "--moe-config.load-balancer.num-slots", "33"], "num_slots = 33"),
    ([LAYERS, "2"], "layer_updates_per_iter = 2: one expert-parallel rank holds all experts"),
    ([LAYERS, "-1"], "layer_updates_per_iter = -1: must be at least 0"),
    (
        [f"{ONLINE}.window-steps", "20"],
        "online.window_steps = 20: has no effect while layer_updates_per_iter",
    ),
    ([f"{ONLINE}.survive-rank-loss"], "online.survive_rank_loss = True: has no effect"),
    ([f"{ONLINE}.windows", "1"], "online.windows = 1: must be from 2"),
    ([f"{ONLINE}.min-gain", "1"], "online.min_gain = 1.0: must be from 0 to 0.9"),
    ([f"{ONLINE}.policy", "best"], "online.policy = 'best': must be one of auto, greedy"),
    ([f"{ONLINE}.routing", "random"], "online.routing = 'random': must be one of even, shares, step"),
    ([f"{ONLINE}.max-bytes-per-second", "0"], "online.max_bytes_per_second = 0.0: must be at least 1000"),
    (
        ["--tp-size", "4", LAYERS, "1", f"{ONLINE}.policy", "greedy", f"{ONLINE}.max-moves-per-layer", "2"],
        "max_moves_per_layer = 2: policy = greedy solves from scratch",
    ),
    (
        ["--tp-size", "4", LAYERS, "1", f"{ONLINE}.max-moves-per-layer", "0"],
        "max_moves_per_layer = 0: with num_slots = 32 there are no shares",
    ),
    (
        ["--tp-size", "4", LAYERS, "1", f"{ONLINE}.survive-rank-loss"],
        "survive_rank_loss = True: the placement at start keeps some experts on one rank only; give num_slots = 64",
    ),
    (["--moe-config.load-balancer.placement", "missing.json"], "missing.json"),
    (["--moe-config.load-balancer.initial-global-assignments", "[1, 2]"], "must map layer ids"),
    (["--moe-config.load-balancer.initial-global-assignments", "{1: [0, 1]}"], "has layers [1]"),
    (["--moe-config.load-balancer.initial-global-assignments", "{one: [0, 1]}"], "'one' is no layer id"),
    (["--config", "missing.yaml"], "missing.yaml: cannot be read"),
    (["no/such/model"], "no/such/model"),
]


@pytest.mark.parametrize(("arguments", "named"), BAD_SETTINGS, ids=[" ".join(a) for a, _ in BAD_SETTINGS])
def test_a_bad_setting_is_named_with_its_value(arguments: list[str], named: str) -> None:
    with pytest.raises(ValueError) as failure:
        make_plan(
            parse_arguments([*arguments, "--device", "cpu"] if "--device" not in arguments else arguments)
        )
    assert named in str(failure.value)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("tensor_paralel_size: 4", "tensor_paralel_size: unknown setting; known are"),
        ("moe_config: {load_balancer: {slots: 3}}", "moe_config.load_balancer.slots: unknown setting"),
        ("moe_config: 3", "moe_config = 3: must be a table"),
        ("- 1", "must be a table of settings, is list"),
        ("a: [", "not YAML"),
        ("port: '80'", "port = '80': must be a whole number"),
        ("served_model_name: 3", "served_model_name = 3: must be text"),
        ("moe_config: {load_balancer: {initial_global_assignments: {1: [a]}}}", "layer 1 has ['a']"),
    ],
)
def test_a_bad_file_is_named(text: str, named: str, tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as failure:
        parse_arguments(["--config", str(file)])
    assert named in str(failure.value)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text(
        "tensor_parallel_size: 2\nport: 9000\nkv_cache_config: {tokens_per_block: 16, max_tokens: 640}"
    )
    config = parse_arguments(["--config", str(file), "--port", "9001", "--kv-cache-config.max-tokens", "320"])
    assert (config.tensor_parallel_size, config.port) == (2, 9001)
    assert (config.kv_cache_config.tokens_per_block, config.kv_cache_config.max_tokens) == (16, 320)


def test_a_flag_of_a_section_that_the_file_spoils(tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text("moe_config: {load_balancer: 3}")
    with pytest.raises(ValueError, match="moe_config.load_balancer = 3: must be a table"):
        parse_arguments(["--config", str(file), "--moe-config.load-balancer.num-slots", "40"])


def test_every_spelling_of_a_flag() -> None:
    for flag in ("--tensor-parallel-size", "--tensor_parallel_size", "--tp-size", "--tp_size"):
        assert parse_arguments([flag, "4"]).tensor_parallel_size == 4
    assert parse_arguments(["--enable-attention-dp"]).enable_attention_dp
    assert not parse_arguments(["--enable_attention_dp", "false"]).enable_attention_dp
    assert parse_arguments(["--served-model-name", "123"]).served_model_name == "123"


def test_a_list_of_keys_holds_one_at_least() -> None:
    assert api_keys(" a, b,") == ("a", "b")
    with pytest.raises(ValueError, match="api_key = ' ,': holds no key"):
        api_keys(" ,")


def test_one_request_may_bring_no_more_than_can_ever_wait() -> None:
    small = ["--device", "cpu", "--max-batch-size", "4", "--max-queued-requests", "3"]
    settings = server_settings(make_plan(parse_arguments(small)))
    assert settings.max_choices == settings.max_sequences == 7
    settings = server_settings(make_plan(parse_arguments(["--device", "cpu"])))
    assert (settings.max_choices, settings.max_sequences) == (128, 1024)


def test_the_public_fingerprint_does_not_depend_on_the_key() -> None:
    settings = [
        server_settings(make_plan(parse_arguments(["--device", "cpu", *key])))
        for key in (["--api-key", "a"], [])
    ]
    assert settings[0].config_hash == settings[1].config_hash


def test_online_balancing_is_told_what_it_can_do() -> None:
    ranks = ["--device", "cpu", "--tp-size", "4"]
    slots = ["--moe-config.load-balancer.num-slots"]
    assert "the placement stays; routing step" in describe(
        make_plan(parse_arguments([*ranks, f"{ONLINE}.routing", "step"]))
    )
    swaps = describe(make_plan(parse_arguments([*ranks, LAYERS, "2"])))
    assert "up to 4 moves a layer, 2 layers a step" in swaps and "experts can only change places" in swaps
    spare = describe(make_plan(parse_arguments([*ranks, *slots, "36", LAYERS, "2"])))
    assert "online: windows of 50 steps" in spare and "change places" not in spare
    make_plan(parse_arguments([*ranks, *slots, "64", LAYERS, "1", f"{ONLINE}.survive-rank-loss"]))


def test_the_plan_names_the_all_to_all() -> None:
    ranks = ["--device", "cpu", "--tensor-parallel-size", "4"]
    auto = make_plan(parse_arguments([*ranks, "--max-num-tokens", "64"]))
    assert auto.all_to_all == "one_sided"
    assert auto.dispatch_sizes() == RowSizes(max_rows=16, width=128, top_k=4, dtype=torch.float32)
    assert "one_sided (exchange between hosts), 0.1 MiB of shared memory a rank at most" in describe(auto)
    asked = make_plan(parse_arguments([*ranks, "--moe-config.all-to-all", "one_sided"]))
    assert "all-to-all one_sided, " in describe(asked)
    gather = make_plan(parse_arguments([*ranks, "--moe-config.all-to-all", "gather"]))
    assert "all-to-all gather\n" in describe(gather)


def test_even_routing_takes_the_shares_from_a_given_placement(tmp_path: Path) -> None:
    slots = np.tile(np.r_[np.arange(32), 0, 1], (4, 1))
    share = np.where(slots < 2, 0.5, 1.0)
    share[:, [0, 32]] = [0.25, 0.75]
    file = tmp_path / "placement.json"
    write_placement(file, PlacementFile(Placement(slots, 32, 3, share), 2, (1, 2, 3, 4)))
    arguments = ["--device", "cpu", "--tp-size", "2", "--moe-config.load-balancer.placement", str(file)]
    given = make_plan(parse_arguments(arguments)).placement
    even = make_plan(parse_arguments([*arguments, f"{ONLINE}.routing", "even"])).placement
    assert given is not None and even is not None
    assert np.array_equal(given.share, share) and np.array_equal(even.share, even.even_share)
    assert even.generation == 3 and np.array_equal(even.slot_to_expert, slots)


def test_a_cache_beyond_the_memory_is_refused_before_it_is_filled() -> None:
    plan = make_plan(parse_arguments(["--device", "cpu", "--kv-cache-config.max-tokens", "1000000000"]))
    with pytest.raises(
        ValueError, match=r"max_tokens = 1000000000: .* of 1\.00 GiB free holds \d+; lower it"
    ):
        plan.kv_tokens(1 << 30)


@pytest.mark.parametrize("max_seq_len", [20, 100])
def test_the_cache_of_a_single_seat_holds_the_longest_sequence(max_seq_len: int) -> None:
    arguments = ["--device", "cpu", "--max-batch-size", "1", "--max-seq-len", str(max_seq_len)]
    plan = make_plan(parse_arguments(arguments))
    assert max_seq_len <= plan.kv_tokens(1 << 30) < max_seq_len + plan.config.kv_cache_config.tokens_per_block


def test_the_contract_s_example_is_read() -> None:
    example = """
tensor_parallel_size: 8
enable_attention_dp: true
attention_tensor_parallel_size: 1
moe_tensor_parallel_size: 1
moe_expert_parallel_size: 8
pipeline_parallel_size: 1
context_parallel_size: 1
dtype: auto
device: auto
max_batch_size: 256
max_num_tokens: 8192
max_seq_len: null
enable_chunked_prefill: true
attention_dp_config: {enable_balance: true, timeout_iters: 50, batching_wait_iters: 10}
kv_cache_config: {free_gpu_memory_fraction: 0.9, tokens_per_block: 32, enable_block_reuse: true, max_tokens: null}
moe_config:
  all_to_all: auto
  load_balancer:
    num_slots: 40
    layer_updates_per_iter: 2
    online: {window_steps: 50, windows: 16, policy: auto, max_moves_per_layer: 4, min_gain: 0.02, routing: shares}
host: 127.0.0.1
port: 8000
api_key: null
"""
    plan = make_plan(parse(EngineConfig, yaml.safe_load(example)))
    assert (plan.layout.dp, plan.layout.ep, plan.layout.etp) == (8, 8, 1)
    assert plan.num_slots == 40
    assert "8 replicas of 1 ranks" in describe(plan)


@pytest.mark.parametrize(
    ("arguments", "dp", "tp", "ep", "etp"),
    [
        (["--tp-size", "8", "--enable-attention-dp"], 8, 1, 8, 1),
        (["--tp-size", "8", "--ep-size", "8"], 1, 8, 8, 1),
        (["--tp-size", "8", "--moe-tensor-parallel-size", "8"], 1, 8, 1, 8),
        (["--tp-size", "8", "--moe-tensor-parallel-size", "4", "--ep-size", "2"], 1, 8, 2, 4),
        (["--tp-size", "8", "--enable-attention-dp", "--attention-tensor-parallel-size", "2"], 4, 2, 8, 1),
    ],
)
def test_layouts_of_the_field(
    arguments: list[str], dp: int, tp: int, ep: int, etp: int, tmp_path: Path
) -> None:
    config = qwen3_moe_config(tmp_path)
    layout = make_plan(parse_arguments([str(config), *arguments])).layout
    assert (layout.dp, layout.tp, layout.ep, layout.etp) == (dp, tp, ep, etp)


def qwen3_moe_config(directory: Path) -> Path:
    """A model directory with a config.json alone: enough for a plan."""
    (directory / "config.json").write_text(
        '{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 64, "vocab_size": 128, '
        '"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8, '
        '"intermediate_size": 64, "moe_intermediate_size": 32, "num_experts": 16, "num_experts_per_tok": 2, '
        '"norm_topk_prob": true, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 512, '
        '"decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": false}'
    )
    return directory


def test_more_ranks_than_sense(tmp_path: Path) -> None:
    plan = make_plan(parse_arguments([str(qwen3_moe_config(tmp_path)), "--tp-size", "8", "--device", "cpu"]))
    with pytest.raises(ValueError, match="tensor_parallel_size = 100000: this host has"):
        check_local_ranks(plan, 100_000)


def test_every_setting_has_a_line_of_help() -> None:
    parser = argparse.ArgumentParser()
    add_model_and_flags(parser)
    assert all(action.help for action in parser._actions)
