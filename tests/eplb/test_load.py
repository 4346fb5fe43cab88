"""Expert loads: checks, phases, splits, and the metrics on them against published definitions."""

from __future__ import annotations

import numpy as np
import pytest

from moeserve.eplb import Placement, Topology
from moeserve.eplb.load import ExpertLoad, Window, merge_windows
from moeserve.eplb.metrics import balance, imbalance, rank_load


def _load() -> ExpertLoad:
    windows = tuple(Window(phase) for phase in ("prefill", "decode", "mixed", "decode"))  # type: ignore[arg-type]
    return ExpertLoad(np.arange(4 * 2 * 3).reshape(4, 2, 3), (0, 5), windows)


def test_phases_and_splits() -> None:
    load = _load()
    assert load.phases == ("prefill", "decode", "mixed")
    assert load.of_phase("decode").load[:, 0, 0].tolist() == [6, 12, 18]
    assert load.of_phase("all") is load
    early, late = load.split(0.25)
    assert late is not None
    assert (early.num_windows, late.num_windows) == (3, 1)
    assert load.split(0.0) == (load, None)
    one = load.take(slice(0, 1))
    assert one.split(0.25) == (one, None)
    with pytest.raises(ValueError, match="no window of phase decode: there are only prefill"):
        one.of_phase("decode")
    with pytest.raises(ValueError, match="read-only"):
        load.load[0, 0, 0] = 1


@pytest.mark.parametrize(
    ("counts", "layers", "message"),
    [
        (np.zeros((1, 2)), (0, 1), "shape"),
        (np.zeros((0, 2, 3)), (0, 1), "no window"),
        (np.full((1, 2, 3), np.inf), (0, 1), r"load\[0\]\[0\]\[0\] is not a finite number"),
        (np.full((1, 2, 3), 2.0**60), (0, 1), "larger than"),
        (np.zeros((1, 2, 3)), (1, 1), "ascending"),
        (np.zeros((1, 2, 3)), (1,), "layers has 1 entries"),
    ],
    ids=str,
)
def test_refused(counts: np.ndarray, layers: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertLoad(counts, layers, tuple(Window() for _ in counts))


@pytest.mark.parametrize(("number", "most"), [(12, 4), (13, 4), (3, 8), (1, 1), (7, 1)])
def test_merging_windows_keeps_every_count(number: int, most: int) -> None:
    windows = np.random.default_rng(0).integers(0, 9, (number, 2, 5))
    merged = merge_windows(windows, most)
    assert len(merged) == min(number, most)
    assert (merged.sum(axis=0) == windows.sum(axis=0)).all()


def test_imbalance_is_max_over_mean() -> None:
    # two layers of ranks [100, 0, 0, 0]: max/mean 4 (TensorRT-LLM says 3.0, which is this - 1; vLLM 0.25, its inverse)
    placement, topology = Placement.identity(2, 4, 4), Topology.of(4, 4)
    load = np.array([[[100, 0, 0, 0], [100, 0, 0, 0]]])
    assert rank_load(load, placement, topology).tolist() == [[[100, 0, 0, 0]] * 2]
    found = balance(load, placement, topology)
    assert (found.mean, found.worst, found.peak) == (4.0, 4.0, 4.0)
    assert imbalance(np.zeros((2, 3))).tolist() == [1.0, 1.0]


def test_shares_weigh_the_slots() -> None:
    placement = Placement(np.array([[0, 1, 0, 2]]), 3, share=np.array([[0.25, 1, 0.75, 1]]))
    topology, load = Topology.of(2, 4), np.array([[[8, 2, 4]]])
    assert rank_load(load, placement, topology).tolist() == [[[4.0, 10.0]]]
    assert rank_load(load, placement, topology, even=True).tolist() == [[[6.0, 8.0]]]
