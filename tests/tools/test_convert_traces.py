"""Recordings of others become what eplb-offline reads, count for count."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from moeserve.eplb.formats.detect import read_load

TOOL = Path(__file__).parents[2] / "tools" / "convert_traces.py"


def test_each_choice_is_counted_once_and_strange_files_are_named(tmp_path: Path) -> None:
    chosen = np.random.default_rng(0).integers(0, 64, (2500, 26, 6)).astype(np.uint8)
    np.savez(tmp_path / "esft_dsv2lite_law.npz", expert_ids=chosen)
    np.save(tmp_path / "other.npy", np.zeros(3))
    run = subprocess.run(
        [sys.executable, TOOL, tmp_path, "-o", tmp_path / "out"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(TOOL.parents[1])},
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == "other.npy: not known, left out\n"
    (file,) = (tmp_path / "out").iterdir()
    load = read_load(file)
    assert load.layers == tuple(range(1, 27)) and load.top_k == 6
    assert [window.tokens for window in load.windows] == [1024, 1024]
    for layer in (0, 25):
        expected = np.bincount(chosen[1024:2048, layer].ravel(), minlength=64)
        assert np.array_equal(load.load[1, layer], expected)
