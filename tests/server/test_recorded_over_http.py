"""`moeserve record` against a server of ours: what its API returns is what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moeserve.__main__ import main
from moeserve.eplb.formats.detect import read_load


def test_the_experts_of_the_answers(server: Any, tmp_path: Path) -> None:
    """The toy engine's experts are 0, 1, ... 31 again and again, over four layers of four choices."""
    requests, output = tmp_path / "requests.txt", tmp_path / "stats.npz"
    requests.write_text("one two three\n" * 4)
    given = ["--url", f"{server.url}/v1", "--requests", str(requests), "-o", str(output), "--max-tokens", "5"]
    assert main(["record", *given]) == 0
    load = read_load(output)
    assert (load.num_layers, load.top_k, load.num_experts, load.model) == (4, 4, 32, "toy/model")
    prompt = len(server.frontend.tokenizer.encode("one two three"))
    assert sum(window.tokens for window in load.of_phase("prefill").windows) == 4 * prompt
    rows = prompt + 5 - 1
    chosen = (np.arange(rows * 16) % 32).reshape(rows, 4, 4)
    expected = np.stack([np.bincount(chosen[:, layer].ravel(), minlength=32) for layer in range(4)])
    assert np.array_equal(load.load.sum(axis=0), 4 * expected)
