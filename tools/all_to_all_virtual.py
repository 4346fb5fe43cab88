"""Times the one-sided kernels of GPUs: all ranks of an all-to-all on one GPU, in lock-step, for bench_all_to_all.

Each kernel runs alone, with the whole GPU, and "peers" are other parts of the same memory: this shows what the kernels
can move, and nothing of NVLink. With few tokens the time is that of the launches. Never run on a GPU so far, only under
Triton's interpreter.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moeserve.comm.all_to_all.one_sided.layout import EpConfig, RowFormat
from moeserve.comm.all_to_all.one_sided.triton_engine import TritonEngine
from moeserve.comm.all_to_all.one_sided.virtual import virtual_ranks
from moeserve.eplb import simulate

RANKS, EXPERTS, TOKENS = 8, 256, (32, 128, 512, 2048)
COPY_BYTES = 1 << 30


def time_virtual(device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """DeepSeek-V3's shapes, 8 ranks, fp8 rows with scales, bf16 results; by tokens a rank."""
    model = simulate.model("deepseek-v3")
    x = RowFormat(model.hidden, torch.float8_e4m3fn, model.hidden // 128)
    y = RowFormat(model.hidden, torch.bfloat16)
    copies = copy_bandwidth(device)
    table = []
    for tokens in TOKENS:
        config = EpConfig(RANKS, tokens, model.top_k, EXPERTS // RANKS, x, y)
        table.append(time_step(config, device, repeats, copies))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return table


def time_step(config: EpConfig, device: torch.device, repeats: int, copies: float) -> dict[str, Any]:
    """Medians of one rank's phases, microseconds, and the bytes that they write against a plain copy's."""
    engines = virtual_ranks(config, device)
    tokens, slots = config.max_tokens, config.world * config.slots_per_rank
    generator = torch.Generator().manual_seed(0)
    ids = [
        torch.rand(tokens, slots, generator=generator).topk(config.top_k).indices.to(device) for _ in engines
    ]
    values = torch.randn(tokens, config.x.width, device=device).to(config.x.dtype)
    scales = torch.ones(tokens, config.x.num_scales, device=device) if config.x.num_scales else None
    weights = torch.ones(tokens, config.top_k, device=device)
    out = torch.empty(tokens, config.result.width, dtype=config.result.dtype, device=device)
    sizes = [sum(int((i // config.slots_per_rank == r).sum()) for i in ids) for r in range(config.world)]
    results = torch.zeros(max(sizes), config.result.width, dtype=config.result.dtype, device=device)
    phases: dict[str, Callable[[TritonEngine], object]] = {
        "send": lambda e: e.send(values, ids[e.rank], weights, scales),
        "receive": lambda e: e.receive(),
        "send back": lambda e: e.send_back(results, sizes[e.rank]),
        "receive back": lambda e: e.receive_back(out),
    }
    times: dict[str, list[float]] = {name: [] for name in phases}
    for turn in range(repeats + 2):
        for name, phase in phases.items():
            seconds = elapsed(device, lambda phase=phase: [phase(e) for e in engines])
            if turn >= 2:
                times[name].append(seconds / config.world)
    row: dict[str, Any] = {"tokens a rank": tokens}
    row |= {f"{name} us": statistics.median(found) * 1e6 for name, found in times.items()}
    rows = statistics.mean(len(set_rows(i, config)) for i in ids)
    for name, written in (
        ("send", rows * config.x.nbytes),
        ("send back", statistics.mean(sizes) * config.result.nbytes),
    ):
        row[f"{name} GB/s"] = written / row[f"{name} us"] / 1e3
        row[f"{name}, of a copy"] = row[f"{name} GB/s"] * 1e9 / copies
    return row


def set_rows(ids: Tensor, config: EpConfig) -> Tensor:
    """The different (token, rank) pairs of a rank's choices."""
    token = torch.arange(len(ids), device=ids.device)[:, None]
    return torch.unique(token * config.world + ids // config.slots_per_rank)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy on the device writes."""
    count = COPY_BYTES if device.type == "cuda" else COPY_BYTES >> 4
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return count / min(elapsed(device, lambda: target.copy_(source)) for _ in range(10))


def elapsed(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of what `work` queues on the device."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
