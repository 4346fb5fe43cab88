"""Dumps of the experts that were routed to, [tokens, layers, top_k]: vLLM's .npy, and SGLang's raw int32, whose
shape the reader must be told. Tokens in order are cut into windows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moeserve.eplb.load import ExpertLoad, Window

_WINDOWS = 32


def parse_raw(data: bytes, num_layers: int, top_k: int, num_experts: int | None = None) -> ExpertLoad:
    """SGLang's int32 bytes (what its base64 holds)."""
    row = num_layers * top_k * 4
    if num_layers < 1 or top_k < 1:
        raise ValueError(f"shape [tokens, {num_layers}, {top_k}]: give 1 or more layers and choices")
    if not data or len(data) % row:
        raise ValueError(f"{len(data)} bytes are not int32 of shape [tokens, {num_layers}, {top_k}]")
    return from_experts(np.frombuffer(data, "<i4").reshape(-1, num_layers, top_k), num_experts)


def from_experts(experts: npt.NDArray[np.generic], num_experts: int | None = None) -> ExpertLoad:
    """Expert ids [tokens, layers, top_k], -1 for none; layers where no token has a second expert id are dense in
    these dumps (all zeros) and are left out."""
    if experts.ndim != 3 or experts.dtype.kind not in "iu" or 0 in experts.shape:
        raise ValueError(
            f"the array is {experts.shape} of {experts.dtype}, expected whole numbers [tokens, layers, top_k]"
        )
    ids = experts.astype(np.int64)
    if ids.min() < -1 or ids.max() > 1 << 20:
        raise ValueError(f"expert ids run from {ids.min()} to {ids.max()}, expected 0 and up, -1 for none")
    count = num_experts or int(ids.max()) + 1
    if ids.max() >= count:
        raise ValueError(f"expert id {ids.max()} is not below num_experts = {count}")
    layers = [layer for layer in range(ids.shape[1]) if not (ids[:, layer] <= 0).all()]
    if not layers:
        raise ValueError("all expert ids are 0 or -1: nothing was recorded")
    tokens, windows = len(ids), min(_WINDOWS, len(ids))
    edges = np.arange(windows + 1) * tokens // windows
    load = np.zeros((windows, len(layers), count), np.int64)
    for w, (start, end) in enumerate(zip(edges, edges[1:], strict=False)):
        for i, layer in enumerate(layers):
            chosen = ids[start:end, layer].ravel()
            load[w, i] = np.bincount(chosen[chosen >= 0], minlength=count)
    about = tuple(
        Window(start_step=w, tokens=int(b - a))
        for w, (a, b) in enumerate(zip(edges, edges[1:], strict=False))
    )
    return ExpertLoad(load, tuple(layers), about, top_k=ids.shape[2])
