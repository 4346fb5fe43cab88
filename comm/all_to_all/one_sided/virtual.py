"""All ranks of a one-sided all-to-all in one process, in lock-step: no rank ever waits for one behind it.

For tests and benchmarks: on one GPU, or on the CPU under Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeserve.comm.all_to_all.one_sided.layout import EpConfig, EpLayout
from moeserve.comm.all_to_all.one_sided.triton_engine import ExpertTable, Received, Tiles, TritonEngine
from moeserve.comm.symm import local_heaps

Experts = Callable[[int, Received], Tensor]
"""(rank, what it was sent) -> results [N, width], or more rows, in the order of Received.rows."""


@dataclass(frozen=True)
class Inputs:
    """What one rank gives to a step; see TritonEngine.send."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    scales: Tensor | None = None
    table: ExpertTable | None = None
    num_tokens: Tensor | None = None


def virtual_ranks(
    config: EpConfig,
    device: torch.device | str = "cpu",
    *,
    num_ids: int | None = None,
    keep_spare: bool = False,
    tiles: Tiles | None = None,
) -> list[TritonEngine]:
    """Engines whose waits look once: all that they wait for must have been sent before."""
    layout = EpLayout(config)
    heaps = local_heaps(config.world, layout.nbytes, device)
    return [
        TritonEngine(heap, layout, num_ids=num_ids, deadline=0, keep_spare=keep_spare, tiles=tiles)
        for heap in heaps
    ]


def step(engines: Sequence[TritonEngine], inputs: Sequence[Inputs], experts: Experts) -> list[Tensor]:
    """One step of all ranks -> each rank's sums [b, width], of the results' dtype."""
    for engine, given in zip(engines, inputs, strict=True):
        engine.send(given.x, given.ids, given.weights, given.scales, given.table, given.num_tokens)
    results = [experts(engine.rank, engine.receive()) for engine in engines]
    for engine, y in zip(engines, results, strict=True):
        engine.send_back(y)
    outs = []
    for engine, given, y in zip(engines, inputs, results, strict=True):
        outs.append(engine.receive_back(y.new_empty(given.x.shape[0], y.shape[1])))
    return outs
