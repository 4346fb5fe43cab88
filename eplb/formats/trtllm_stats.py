"""TensorRT-LLM's statistics folder: meta_info.json and rank*.safetensors with "{iteration}_{layer}" -> counts [E]
of that rank's own tokens. The sum over ranks is the load; each iteration becomes a window."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from moeserve.eplb.formats.files import mapping, named, parse_json, read_bytes, whole_number
from moeserve.eplb.formats.safetensors import parse_safetensors
from moeserve.eplb.load import ExpertLoad, Window, check_counts

_META = "meta_info.json"
_MOST = 1 << 28  # counts of a folder


def read_folder(folder: Path) -> ExpertLoad:
    """ValueError where files are missing, iterations have gaps, or counts do not fit."""
    if not (folder / _META).exists():
        raise ValueError(f"no {_META} in the folder: not TensorRT-LLM's expert statistics")
    meta = named(folder / _META, lambda: mapping(parse_json(read_bytes(folder / _META))))
    experts = whole_number(meta.get("num_experts"), f"{_META}: num_experts", 1, 1 << 20)
    top_k = whole_number(meta.get("num_experts_per_token"), f"{_META}: num_experts_per_token", 1)
    ranks = {
        int(m[1]): path
        for path in sorted(folder.iterdir())
        if (m := re.fullmatch(r"rank(\d+)\.safetensors", path.name))
    }
    if sorted(ranks) != list(range(len(ranks))) or not ranks:
        raise ValueError(f"rank files are missing: there are {sorted(ranks)}, expected 0 and up without gaps")

    total: dict[tuple[int, int], np.ndarray[tuple[int, ...], np.dtype[np.int64]]] = {}
    for rank, path in sorted(ranks.items()):
        for name, tensor in named(path, lambda path=path: parse_safetensors(read_bytes(path))).items():  # type: ignore[misc]
            match = re.fullmatch(r"(\d{1,9})_(\d{1,6})", name)
            if not match:
                raise ValueError(f"{path.name}: tensor {name[:40]!r} is not named ITERATION_LAYER")
            if tensor.shape != (experts,):
                raise ValueError(
                    f"{path.name}: {name} has shape {tensor.shape}, expected num_experts = {experts}"
                )
            counts = check_counts(tensor, f"{path.name}: {name}")
            key = int(match[1]), int(match[2])
            if rank == 0:
                total[key] = counts
            elif key in total:
                total[key] = total[key] + counts
            else:
                raise ValueError(f"{path.name} has {name}, rank0.safetensors has not")
    iterations, layers = sorted({i for i, _ in total}), sorted({layer for _, layer in total})
    if not iterations:
        raise ValueError("the rank files are empty: nothing was recorded")
    if iterations != list(range(iterations[0], iterations[-1] + 1)):
        raise ValueError(f"iterations have gaps between {iterations[0]} and {iterations[-1]}")
    missing = next((f"{i}_{n}" for i in iterations for n in layers if (i, n) not in total), None)
    if missing:
        raise ValueError(f"tensor {missing} is missing")
    if len(iterations) * len(layers) * experts > _MOST:
        raise ValueError(f"{len(iterations)} iterations of {len(layers)} layers are too many")
    load = np.array([[total[i, layer] for layer in layers] for i in iterations])
    windows = tuple(
        Window(start_step=i, tokens=int(load[n, 0].sum()) // top_k) for n, i in enumerate(iterations)
    )
    return ExpertLoad(load, tuple(layers), windows, top_k=top_k, ep_size=len(ranks))
