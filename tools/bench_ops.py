"""Times the CPU's ops and whole model steps: the C kernels against the plain-torch forms, in one run.

    PYTHONPATH=. python tools/bench_ops.py [--threads N] [--repeats N] [--json FILE]

The model is that of the serving benchmark (Qwen3-MoE, 118 M parameters, bfloat16) with random weights. Forms
take turns, so that both see the same machine; figures are medians. The roofline is the time in which the
memory delivers what a step must read: weights of the experts chosen, the other weights and the cached
context.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from moeserve.comm.layout import ParallelLayout
from moeserve.comm.mesh import Mesh
from moeserve.eplb.types import Placement, Topology
from moeserve.forward_batch import ForwardBatch
from moeserve.models.decoder import Decoder
from moeserve.models.registry import read_spec
from moeserve.models.spec import Routing
from moeserve.moe.expert_map import ExpertMap
from moeserve.ops import build, reference
from moeserve.ops.memory import WeightMemory
from moeserve.ops.native import NativeOps
from moeserve.ops.table import OP_NAMES, Ops
from moeserve.stats.expert_load import ExpertLoad

LAYERS, EXPERTS, CHOICES, HIDDEN, INNER, VOCABULARY = 8, 32, 4, 512, 256, 8192
HEADS, KV_HEADS, HEAD_SIZE, PAGE_SIZE = 8, 2, 64, 16
DTYPE = torch.bfloat16
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "moe_intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_SIZE,
    "num_experts": EXPERTS,
    "num_experts_per_tok": CHOICES,
    "norm_topk_prob": True,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "hidden_act": "silu",
}
CONTEXT = 160  # of a decode: the mean over 64 tokens after a prompt of 128
# name: (sequences, new tokens each, context)
STEPS = {
    "decode 1": (1, 1, CONTEXT),
    "decode 8": (8, 1, CONTEXT),
    "decode 32": (32, 1, CONTEXT),
    "prefill 128": (1, 128, 128),
    "prefill 8 x 128": (8, 128, 128),
    "prefill 1024": (1, 1024, 1024),
}
Form = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    native, plain = NativeOps(build.build()), Ops()
    fast = Ops(**{name: getattr(native, name) for name in OP_NAMES})
    bandwidth = stream_bandwidth()
    print(f"{arguments.threads} threads, memory reads {bandwidth / 1e9:.1f} GB/s")
    with torch.inference_mode():
        cases = tqdm(op_cases().items(), disable=None, leave=False)
        ops = [time_op(name, case, fast, plain, arguments.repeats) for name, case in cases]
        show(["op", "native us", "plain us", "plain / native"], ops)
        steps = time_steps(fast, plain, bandwidth, arguments.repeats)
        show(["step", "native ms", "plain ms", "plain / native", "read MB", "roofline"], steps)
    if arguments.json:
        arguments.json.write_text(json.dumps(report(arguments.threads, bandwidth, ops, steps), indent=2))


def stream_bandwidth() -> float:
    """Bytes a second that all threads read together from memory: the best of ten sums over 256 MiB."""
    data = WeightMemory().empty((64 << 20,), torch.float32).fill_(1.0)
    return data.nbytes / min(seconds(lambda: data.sum()) for _ in range(10))


def seconds(run: Form) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(native: Form, plain: Form, repeats: int) -> tuple[float, float]:
    """Median seconds of both, taking turns, after two unmeasured turns."""
    turns = [(seconds(native), seconds(plain)) for _ in range(repeats + 2)][2:]
    return statistics.median(turn[0] for turn in turns), statistics.median(turn[1] for turn in turns)


# --- single ops ---------------------------------------------------------------------------------------------

Case = Callable[[Ops, int], object]  # (the forms, number of the layer whose weights to use)


class OpWeights:
    """Weights of the model's shapes. Layers take turns, so that they come from memory as in a step."""

    def __init__(self) -> None:
        self._memory = WeightMemory()
        self.qkv = self._random(LAYERS, (HEADS + 2 * KV_HEADS) * HEAD_SIZE, HIDDEN)
        self.head = self._random(VOCABULARY, HIDDEN)
        self.gate_up = self._random(LAYERS, EXPERTS, 2 * INNER, HIDDEN)
        self.down = self._random(LAYERS, EXPERTS, HIDDEN, INNER)
        self.norm, self.head_norm = self._random(HIDDEN), self._random(HEAD_SIZE)
        self.cos_sin = torch.randn(2048, HEAD_SIZE)

    def _random(self, *shape: int) -> Tensor:
        return self._memory.empty(shape, DTYPE).normal_(std=shape[-1] ** -0.5)


def op_cases() -> dict[str, Case]:
    weights = OpWeights()
    return {
        f"{name}, {rows} rows": case
        for rows in (1, 8, 32, 128)
        for name, case in row_cases(weights, rows).items()
    }


def row_cases(weights: OpWeights, rows: int) -> dict[str, Case]:
    x = torch.randn(rows, HIDDEN).to(DTYPE)
    qkv = torch.randn(rows, weights.qkv.shape[1]).to(DTYPE)
    q = torch.randn(rows, HEADS, HEAD_SIZE).to(DTYPE)
    logits = torch.randn(rows, EXPERTS).to(DTYPE)
    routing = Routing("softmax", CHOICES, normalize=True)
    chosen, slots = reference.choose_experts(logits, None, routing)
    batch = make_batch(1, rows, rows) if rows == 128 else make_batch(rows, 1, CONTEXT)
    pages = int(batch.page_table.max()) + 1
    keys, values = torch.randn(2, pages, PAGE_SIZE, KV_HEADS, HEAD_SIZE).to(DTYPE).unbind(0)
    norms, cos_sin = (weights.head_norm, weights.head_norm), weights.cos_sin
    return {
        "linear qkv": lambda ops, i: ops.linear(x, weights.qkv[i]),
        "linear head": lambda ops, i: ops.linear(x, weights.head),
        "add_rms_norm": lambda ops, i: ops.add_rms_norm(x, x, weights.norm, 1e-6),
        "take_heads": lambda ops, i: ops.take_heads(
            qkv, norms, 1e-6, batch.positions, cos_sin, False, keys, values, batch.kv_slots
        ),
        "paged_attention": lambda ops, i: ops.paged_attention(q, keys, values, batch, 0.125, None),
        "choose_experts": lambda ops, i: ops.choose_experts(logits, None, routing),
        "fused_experts": lambda ops, i: ops.fused_experts(
            x, slots, chosen, weights.gate_up[i], weights.down[i]
        ),
    }


def time_op(name: str, case: Case, fast: Ops, plain: Ops, repeats: int) -> dict[str, Any]:
    layers = [itertools.cycle(range(LAYERS)) for _ in range(2)]
    native_s, plain_s = compare(
        lambda: case(fast, next(layers[0])), lambda: case(plain, next(layers[1])), repeats
    )
    return {
        "op": name,
        "native us": native_s * 1e6,
        "plain us": plain_s * 1e6,
        "plain / native": plain_s / native_s,
    }


# --- whole steps --------------------------------------------------------------------------------------------


def time_steps(fast: Ops, plain: Ops, bandwidth: float, repeats: int) -> list[dict[str, Any]]:
    load = ExpertLoad(LAYERS, EXPERTS, EXPERTS)
    native_model, plain_model = (
        make_model(fast, load),
        make_model(plain, ExpertLoad(LAYERS, EXPERTS, EXPERTS)),
    )
    pages = 1 + max(count * -(-context // PAGE_SIZE) for count, _, context in STEPS.values())
    native_cache, plain_cache = (
        model.new_kv_cache(pages, PAGE_SIZE) for model in (native_model, plain_model)
    )
    figures = []
    for name, (sequences, queries, context) in tqdm(STEPS.items(), disable=None, leave=False):
        batch = make_batch(sequences, queries, context)
        load.reset()
        native_model.forward(batch, native_cache)
        read = step_bytes(int((load.prefill + load.decode > 0).sum()), sequences, context)
        native_s, plain_s = compare(
            partial(native_model.forward, batch, native_cache),
            partial(plain_model.forward, batch, plain_cache),
            repeats if queries == 1 else max(3, repeats // 5),
        )
        figures.append(
            {
                "step": name,
                "native ms": native_s * 1e3,
                "plain ms": plain_s * 1e3,
                "plain / native": plain_s / native_s,
                "read MB": read / 1e6,
                "roofline": read / bandwidth / native_s,
            }
        )
    return figures


def step_bytes(experts_touched: int, sequences: int, context: int) -> int:
    """What a step cannot avoid reading; experts_touched is summed over the layers."""
    attention = (2 * HEADS + 2 * KV_HEADS) * HEAD_SIZE * HIDDEN
    dense = LAYERS * (attention + EXPERTS * HIDDEN) + VOCABULARY * HIDDEN
    cached = LAYERS * sequences * context * 2 * KV_HEADS * HEAD_SIZE
    return (dense + experts_touched * 3 * INNER * HIDDEN + cached) * DTYPE.itemsize


def make_model(ops: Ops, load: ExpertLoad) -> Decoder:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(CONFIG))
        spec = read_spec(directory)
    placement = Placement.identity(LAYERS, EXPERTS, EXPERTS)
    experts = ExpertMap(placement, Topology.of(1, EXPERTS), 0, "cpu")
    model = Decoder(spec, Mesh(ParallelLayout(), 0), dtype=DTYPE, expert_map=experts, load=load, ops=ops)
    torch.manual_seed(1)
    for piece in model.pieces(()):
        for target in piece.targets:
            target.fill_(1.0) if target.dim() == 1 else target.normal_(std=target.shape[-1] ** -0.5)
    return model


def make_batch(sequences: int, queries: int, context: int) -> ForwardBatch:
    """Sequences of `context` tokens of which the last `queries` are new, each on pages of its own."""
    pages = -(-context // PAGE_SIZE)
    page_table = torch.arange(1, sequences * pages + 1, dtype=torch.int32).view(sequences, pages)
    positions = torch.arange(context - queries, context)
    kv_slots = page_table[:, positions // PAGE_SIZE].long() * PAGE_SIZE + positions % PAGE_SIZE
    rows = sequences * queries
    return ForwardBatch(
        token_ids=torch.randint(0, VOCABULARY, (rows,)),
        positions=positions.repeat(sequences),
        kv_slots=kv_slots.flatten(),
        query_start=torch.arange(0, rows + 1, queries, dtype=torch.int32),
        context_len=torch.full((sequences,), context, dtype=torch.int32),
        page_table=page_table,
        num_decode=sequences if queries == 1 else 0,
        max_query_len=queries,
        max_context_len=context,
        logit_rows=torch.arange(queries - 1, rows, queries),
        rows_per_rank=(rows,),
    )


# --- results ------------------------------------------------------------------------------------------------


def show(columns: list[str], rows: list[dict[str, Any]]) -> None:
    print("\n" + f"{columns[0]:<26}" + "".join(f"{column:>16}" for column in columns[1:]))
    for row in rows:
        print(f"{row[columns[0]]:<26}" + "".join(f"{row[column]:>16.2f}" for column in columns[1:]))


def report(
    threads: int, bandwidth: float, ops: list[dict[str, Any]], steps: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "command": " ".join(sys.argv),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.processor() or platform.machine()}, {platform.system()}",
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
        "threads": threads,
        "bandwidth_bytes_per_second": bandwidth,
        "ops": ops,
        "steps": steps,
    }


if __name__ == "__main__":
    main()
