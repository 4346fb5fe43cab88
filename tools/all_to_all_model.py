"""What the expert all-to-all must move and how long that takes on NVLink: bytes, bounds and fits, for bench_all_to_all.

DeepSeek-V3's shapes. Fits and link speeds are eplb/library.json's, with their sources. Nothing here ran on NVLink.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from moeserve.comm.all_to_all.one_sided.layout import EpConfig, EpLayout, RowFormat
from moeserve.eplb import simulate

HARDWARE, MODEL, EXPERTS = "gb200-nvl72", "deepseek-v3", 256
NVLINK4 = 450e9
"""Bytes a second and direction of a GPU with NVLink 4 (H100, H200 data sheets: 900 GB/s both ways)."""
TOKENS = (32, 128, 256, 512, 1024, 4096)
RANKS = (8, 16, 32, 64, 72)
PUBLISHED = {
    8: {1: (18.9, 31.0), 32: (18.2, 32.7), 128: (31.7, 38.1), 512: (89.5, 91.7), 2048: (311.8, 322.6)},
    16: {1: (18.8, 30.8), 32: (20.2, 34.2), 128: (34.6, 39.9), 512: (97.1, 98.2), 2048: (343.3, 348.4)},
    32: {1: (19.8, 31.4), 32: (21.1, 34.6), 128: (37.8, 41.1), 512: (109.6, 102.5), 2048: (373.7, 369.5)},
    64: {1: (27.8, 32.6), 32: (23.1, 36.1), 128: (41.6, 44.5), 512: (115.7, 106.7), 2048: (399.2, 372.1)},
}
"""TensorRT-LLM tech blog 18: GB200 NVL72, one-sided, bf16 both ways, every token to 8 ranks. ranks: {tokens a rank:
(dispatch, combine) in microseconds}."""


def distinct_ranks(ranks: int, top_k: int, experts: int = EXPERTS) -> float:
    """Ranks that hold top_k different experts, in expectation: any equally likely, experts spread evenly."""
    few = experts // ranks
    more = experts - few * ranks  # ranks that hold one more
    missed = [math.comb(experts - held, top_k) / math.comb(experts, top_k) for held in (few, few + 1)]
    return (ranks - more) * (1 - missed[0]) + more * (1 - missed[1])


@dataclass(frozen=True)
class Wire:
    """Bytes that a rank sends to others for one token of the model."""

    ranks: int

    @property
    def remote(self) -> float:
        return (self.ranks - 1) / self.ranks

    def rows(self) -> float:
        """Distinct ranks of a token that are not its own."""
        return distinct_ranks(self.ranks, simulate.model(MODEL).top_k) * self.remote


def bytes_a_token() -> list[dict[str, Any]]:
    """By ranks: what layout.py's memory receives for a token, against the least that any protocol must send."""
    model = simulate.model(MODEL)
    table = []
    for ranks in RANKS:
        x = RowFormat(model.hidden, torch.float8_e4m3fn, model.hidden // 128)
        y = RowFormat(model.hidden, torch.bfloat16)
        layout = EpLayout(EpConfig(ranks, 128, model.top_k, -(-EXPERTS // ranks), x, y))
        wire = Wire(ranks)
        choices = model.top_k * wire.remote
        table.append(
            {
                "ranks": ranks,
                "ranks a token": distinct_ranks(ranks, model.top_k),
                "dispatch KB": wire.rows() * (x.nbytes + layout.meta_bytes) / 1e3,
                "least": wire.rows() * x.nbytes / 1e3,
                "without dedup": choices * (x.nbytes + layout.meta_bytes) / 1e3,
                "combine KB": choices * y.nbytes / 1e3,
                "least, summed": wire.rows() * y.nbytes / 1e3,
            }
        )
    return table


def bounds() -> list[dict[str, Any]]:
    """Least microseconds of dispatch (fp8) | combine (bf16) of a layer, by ranks and tokens a rank."""
    model, five = simulate.model(MODEL), simulate.hardware(HARDWARE).link_bandwidth
    x_bytes, y_bytes = model.hidden * (1 + 4 / 128), model.hidden * 2
    table = []
    for name, ranks, link in (("NVLink 4", 8, NVLINK4), *(("NVLink 5", ranks, five) for ranks in RANKS)):
        row: dict[str, Any] = {"links": f"{name}, EP{ranks}"}
        for tokens in TOKENS:
            sent = tokens * Wire(ranks).rows() / link * 1e6
            row[f"b = {tokens}"] = f"{sent * x_bytes:.1f} | {sent * y_bytes:.1f}"
        table.append(row)
    return table


def beside_published() -> list[dict[str, Any]]:
    """The fit `a + bytes / bandwidth` beside what TensorRT-LLM published, microseconds."""
    hardware, model = simulate.hardware(HARDWARE), simulate.model(MODEL)
    table = []
    for ranks in (*PUBLISHED, 72):
        for tokens in PUBLISHED[8]:
            sent = simulate.remote_bytes(model, ranks, tokens)
            row: dict[str, Any] = {"ranks": ranks, "tokens a rank": tokens}
            figures = PUBLISHED.get(ranks, {}).get(tokens)
            for i, (name, fit) in enumerate((("dispatch", hardware.dispatch), ("combine", hardware.combine))):
                modelled = simulate.all_to_all_seconds(fit, ranks, sent) * 1e6
                row[f"{name} us"] = modelled
                row[f"{name}, published"] = figures[i] if figures else None
                row[f"{name} error"] = modelled / figures[i] - 1 if figures else None
            table.append(row)
    return table
