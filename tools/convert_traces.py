"""Recorded expert loads in their owners' forms -> files that `eplb-offline` and `moeserve dashboard` read.

    PYTHONPATH=. python tools/convert_traces.py DIR -o OUT

Per-token routing is cut into windows as it comes, counts stay as they are; frequencies become counts of 10,000 tokens a
window; a rank-size profile becomes made-up steady traffic. Files that it does not know are named and left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moeserve.eplb.formats.stats import write_stats
from moeserve.eplb.load import ExpertLoad, Window
from moeserve.eplb.synthetic import Traffic

Windows = npt.NDArray[np.int64]  # [W, L, E]
WINDOW_TOKENS = 1024
FREQUENCY_TOKENS = 10_000
Made = tuple[str, int, int, Windows]  # name, top_k, first layer with experts, windows


def tokens(chosen: npt.NDArray[np.integer], num_experts: int) -> Windows:
    """[tokens, L, K] expert ids -> counts of windows of WINDOW_TOKENS; what is left at the end makes none."""
    layers, step = chosen.shape[1], np.arange(chosen.shape[1])[None, :, None] * num_experts
    starts = range(0, len(chosen) - WINDOW_TOKENS + 1, WINDOW_TOKENS)
    flat = ((chosen[start : start + WINDOW_TOKENS].astype(np.int64) + step).ravel() for start in starts)
    return np.stack([np.bincount(row, minlength=layers * num_experts).reshape(layers, -1) for row in flat])


def esft(file: Path) -> Iterator[Made]:
    yield "deepseek-v2-lite", 6, 1, tokens(np.load(file)["expert_ids"], 64)


def tiny(file: Path) -> Iterator[Made]:
    data = np.load(file)
    yield "tiny_model", int(data["top_k"]), int(data["moe_layer_index"][0]), data["counts"].astype(np.int64)


def olmoe(file: Path) -> Iterator[Made]:
    """A window a corpus; its three layers are numbered from 0."""
    data = np.load(file)
    for name, prefix, top_k in (("olmoe-1b-7b", "olmoe_", 8), ("mixtral-8x7b", "mistral_", 2)):
        yield name, top_k, 0, np.stack([data[key] for key in sorted(data) if key.startswith(prefix)])


def gpt_oss(file: Path) -> Iterator[Made]:
    """A window a topic."""
    data = np.load(file)
    frequency = np.concatenate([data[key] for key in sorted(data) if key.endswith("_freq")])
    share = frequency / frequency.sum(-1, keepdims=True)
    yield "gpt-oss-20b", 4, 0, np.rint(share * 4 * FREQUENCY_TOKENS).astype(np.int64)


def profile(file: Path) -> Iterator[Made]:
    made = Traffic.make(58, 256, profiles=np.load(file), seed=1)
    domains = made.popularity.shape[0]
    yield "deepseek-r1", 8, 3, made.counts(np.full((16, domains), 1 / domains), 8 * 32 * 128)


KNOWN: dict[str, Callable[[Path], Iterator[Made]]] = {
    "esft_dsv2lite_intent.npz": esft,
    "esft_dsv2lite_law.npz": esft,
    "tiny_moe_domains.npz": tiny,
    "olmoe_mixtral_expert_counts.npz": olmoe,
    "gptoss20b_topic_count_frequency.npz": gpt_oss,
    "dsr1_rank_profiles_58x256.npy": profile,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("-o", "--out", type=Path, required=True)
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    for file in sorted(flags.folder.glob("*.np[yz]")):
        if file.name not in KNOWN:
            print(f"{file.name}: not known, left out", file=sys.stderr)
            continue
        for name, top_k, first, counts in KNOWN[file.name](file):
            per_window = counts[:, 0].sum(-1) // top_k
            windows = tuple(Window("mixed", i, 1, int(n)) for i, n in enumerate(per_window))
            load = ExpertLoad(
                counts,
                layers=tuple(range(first, first + counts.shape[1])),
                windows=windows,
                model=name,
                top_k=top_k,
            )
            target = flags.out / f"{file.stem}.{name}.npz"
            write_stats(target, load)
            print(f"{target}: {len(counts)} windows, {counts.shape[1]} layers, {counts.shape[2]} experts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
