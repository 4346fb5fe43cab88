"""The compiled kernels give the same bits as their plain numpy forms."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from moeserve.eplb import native
from moeserve.eplb.native import Native, Plain
from moeserve.eplb.plain import Options

SHAPES = [  # layers, experts, windows, ranks, slots a rank
    (2, 12, 1, 8, 2),
    (2, 24, 8, 6, 5),
    (2, 20, 19, 5, 7),
    (1, 64, 33, 16, 5),
    (1, 8, 3, 1, 9),
    (1, 3, 4, 4, 3),
    (1, 16, 2, 16, 1),
]


@pytest.fixture(scope="module")
def compiled() -> Native:
    library = native._library()
    if library is None:
        pytest.skip("no C compiler here")
    return Native(library)


def _load(rng: np.random.Generator, shape: tuple[int, int, int, int, int]) -> np.ndarray:
    layers, experts, windows, ranks, _ = shape
    load = rng.lognormal(0, 1.0, (layers, experts, 1)) * rng.lognormal(0, 0.3, (layers, experts, windows))
    return (load * (ranks / load.sum(axis=1, keepdims=True))).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("connect", [False, True])
def test_same_placement(compiled: Native, shape: tuple[int, int, int, int, int], connect: bool) -> None:
    rng = np.random.default_rng(hash(shape) % 1000)
    layers, experts, _, ranks, per_rank = shape
    load = _load(rng, shape)
    weight = load.mean(axis=2) + load.std(axis=2)
    count = compiled.replicate(weight, ranks, ranks * per_rank, 1)
    assert (count == Plain.replicate(weight, ranks, ranks * per_rank, 1)).all()
    assert (count.sum(axis=1) == ranks * per_rank).all()
    order = np.argsort(-(weight / count), axis=1, kind="stable").astype(np.int32)
    slots = compiled.place(load, count, order, ranks, 1.0, connect)
    assert (slots == Plain.place(load, count, order, ranks, 1.0, connect)).all()
    assert compiled.components(slots[0], count[0]) == Plain.components(slots[0], count[0])
    for n in range(layers):
        assert (np.bincount(slots[n].ravel(), minlength=experts) == count[n]).all()
    node = (np.arange(ranks) * 2 // ranks).astype(np.int32)
    for budget, reassign, least, nodes in (
        (-1, False, 1, 0 * node),
        (-1, True, 1, 0 * node),
        (3, True, 1, 0 * node),
        (-1, True, 1, node),
    ):
        options = Options(30.0, 1e-4, 30, 4, budget, connect, reassign, least)
        a, b = (count.copy(), slots.copy()), (count.copy(), slots.copy())
        first = compiled.improve(load, *a, nodes, options)
        second = Plain.improve(load, *b, nodes, options)
        assert (first == second).all()
        assert (a[0] == b[0]).all()
        assert (a[1] == b[1]).all()
        written = (a[1] != slots).sum(axis=(1, 2))
        assert (written <= first).all()
        if budget >= 0:
            assert (first <= budget).all()


@pytest.mark.parametrize("shape", SHAPES[:3] + SHAPES[4:], ids=str)
@pytest.mark.parametrize("connect", [False, True])
def test_same_annealing(compiled: Native, shape: tuple[int, int, int, int, int], connect: bool) -> None:
    load = _load(np.random.default_rng(3), shape)
    ranks, per_rank = shape[3:]
    weight = load.mean(axis=2)
    count = compiled.replicate(weight, ranks, ranks * per_rank, 1)
    order = np.argsort(-(weight / count), axis=1, kind="stable").astype(np.int32)
    slots = compiled.place(load, count, order, ranks, 0.0, connect)
    whole, halves = np.zeros(ranks, np.int32), (np.arange(ranks) * 2 // ranks).astype(np.int32)
    for node in (whole, halves):
        a, b = (count.copy(), slots.copy()), (count.copy(), slots.copy())
        compiled.anneal(load, *a, node, 40.0, 400, connect, 1, 7)
        Plain.anneal(load, *b, node, 40.0, 400, connect, 1, 7)
        assert (a[0] == b[0]).all()
        assert (a[1] == b[1]).all()
        at = np.broadcast_to(node, slots.shape[1:])
        for before, after in zip(slots, a[1], strict=True):
            assert {*zip(after.flat, at.flat, strict=True)} <= {*zip(before.flat, at.flat, strict=True)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("open_from", [1.0, 1.3])
def test_same_exploring(compiled: Native, shape: tuple[int, int, int, int, int], open_from: float) -> None:
    """open_from 1.3 makes it stretch the windows, or leave layers alone that routing evens out even so."""
    rng = np.random.default_rng(5)
    load = _load(rng, shape)
    if shape[2] > 20:
        load = np.concatenate([load] * 3, axis=2) * rng.lognormal(0, 0.4, (1, 1, 3 * shape[2]))
        load = (load * (shape[3] / load.sum(axis=1, keepdims=True))).astype(np.float32)
    ranks, per_rank = shape[3:]
    count = compiled.replicate(load.mean(axis=2), ranks, ranks * per_rank, 1)
    order = np.argsort(-(load.mean(axis=2) / count), axis=1, kind="stable").astype(np.int32)
    slots = compiled.place(load, count, order, ranks, 0.0, True)
    node = (np.arange(ranks) * 2 // ranks).astype(np.int32)
    a, b = (count.copy(), slots.copy()), (count.copy(), slots.copy())
    compiled.explore(load, *a, node, 1, 120, open_from, 9)
    Plain.explore(load, *b, node, 1, 120, open_from, 9)
    assert (a[0] == b[0]).all()
    assert (a[1] == b[1]).all()
    for n in range(len(load)):
        assert (np.bincount(a[1][n].ravel(), minlength=shape[1]) == a[0][n]).all()
    if shape == (1, 64, 33, 16, 5):
        assert (a[1] != slots).any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("budget", [0, 3, 40])
def test_same_few_moves(compiled: Native, shape: tuple[int, int, int, int, int], budget: int) -> None:
    load = _load(np.random.default_rng(6), shape)
    layers, experts, _, ranks, per_rank = shape
    spread = np.arange(ranks * per_rank, dtype=np.int32) % experts
    slots = np.tile(spread.reshape(per_rank, ranks), (layers, 1, 1))
    count = np.stack([np.bincount(row.ravel(), minlength=experts) for row in slots]).astype(np.int32)
    a, b = (count.copy(), slots.copy()), (count.copy(), slots.copy())
    one = compiled.follow(load, *a, 1, budget, 1.001, 1e-4)
    two = Plain.follow(load, *b, 1, budget, 1.001, 1e-4)
    assert (one == two).all()
    assert (a[0] == b[0]).all()
    assert (a[1] == b[1]).all()
    assert ((a[1] != slots).sum(axis=(1, 2)) <= budget).all()
    for n in range(layers):
        assert (np.bincount(a[1][n].ravel(), minlength=experts) == a[0][n]).all()
    before = compiled.follow(load, count, slots, 1, 0, 1.001, 1e-4)
    assert (one <= before).all()
    if budget and shape == (1, 64, 33, 16, 5):
        assert (one < before - 0.01).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_shares(compiled: Native, shape: tuple[int, int, int, int, int]) -> None:
    rng = np.random.default_rng(1)
    _, experts, windows, ranks, per_rank = shape
    load = np.ascontiguousarray(_load(rng, shape)[0].T.astype(np.float64))
    load[0, : experts // 2] = 0
    slots = np.concatenate([np.arange(experts), rng.integers(0, experts, ranks * per_rank)])
    slots = slots[: max(experts, ranks * per_rank)].astype(np.int32)
    rank_of = rng.permutation(np.arange(len(slots)) % ranks).astype(np.int32)
    even = 1.0 / np.bincount(slots, minlength=experts)[slots]
    slots, load = np.stack([slots, slots[::-1]]), np.stack([load, load * 2])
    even = np.stack([even, even[::-1]])[:, None]
    a, b = np.tile(even, (1, windows, 1)), np.tile(even, (1, windows, 1))
    one = compiled.fill(load, slots, rank_of, a, 5, 1.5)
    two = Plain.fill(load, slots, rank_of, b, 5, 1.5)
    assert (a == b).all()
    assert (one == two).all()


def test_same_preparation(compiled: Native) -> None:
    windows = np.random.default_rng(2).integers(0, 1000, (7, 3, 50)).astype(np.float64)
    windows[2, 1] = 0
    for a, b in zip(compiled.prepare(windows, 8), Plain.prepare(windows, 8), strict=True):
        assert (a == b).all()
    load, mean, std = compiled.prepare(windows, 8)
    assert np.allclose(load.sum(axis=1), 8)
    assert np.allclose(mean, load.mean(axis=2))
    assert np.allclose(std, load.std(axis=2), atol=1e-6)


def test_no_library_from_a_folder_that_others_write_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "moeserve"
    assert next(native._folders()) == folder and folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o770)
    assert folder not in native._folders()
    folder.rmdir()
    folder.symlink_to(tmp_path / "elsewhere")
    assert folder not in native._folders()


def test_calls_from_many_threads(compiled: Native) -> None:
    rng = np.random.default_rng(4)
    load, slots = rng.random((6, 8, 64)), np.tile(np.arange(80, dtype=np.int32) % 64, (6, 1))
    rank_of = np.arange(80, dtype=np.int32) // 5

    def filled(_: int) -> bytes:
        share = np.tile(1.0 / np.bincount(slots[0])[slots][:, None], (1, 8, 1))
        return compiled.fill(load, slots, rank_of, share, 12, 1.5).tobytes() + share.tobytes()

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(filled, range(200)))) == 1


def test_ids_out_of_range_never_reach_the_kernels(compiled: Native) -> None:
    load, rank_of, share = np.ones((1, 1, 4)), np.zeros(4, np.int32), np.ones((1, 1, 4))
    for wrong in ([0, 1, 2, 4], [0, 1, 2, -1]):
        with pytest.raises(AssertionError):
            compiled.fill(load, np.array([wrong], np.int32), rank_of, share, 1, 1.0)
    slots, count = np.arange(4, dtype=np.int32).reshape(1, 1, 4), np.ones((1, 4), np.int32)
    load32 = np.ones((1, 4, 1), np.float32)
    compiled.follow(load32, count, slots, 1, 1, 1.0, 0.0)
    with pytest.raises(AssertionError):  # counts of other slots
        compiled.follow(load32, count[:, ::-1] * np.array([2, 0, 1, 1], np.int32), slots, 1, 1, 1.0, 0.0)
    slots.setflags(write=False)
    with pytest.raises(AssertionError):  # what is in force
        compiled.follow(load32, count, slots, 1, 1, 1.0, 0.0)
    with pytest.raises(AssertionError):
        compiled.fill(load, np.arange(4, dtype=np.int32)[None], rank_of, share[:, :, :3].copy(), 1, 1.0)


def test_a_library_in_use_is_never_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A running process may be mapped from it; and kernels.c as it was imported decides, not as it is now."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_SOURCE", b"int eplb = 1;\n")
    if native._load.__wrapped__() is None:
        pytest.skip("no C compiler here")
    (library,) = (tmp_path / "moeserve").iterdir()
    before = library.stat()
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(lambda _: native._load.__wrapped__(), range(4)))
    assert (library.stat().st_ino, library.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    monkeypatch.setattr(native, "_SOURCE", b"int eplb = 2;\n")
    native._load.__wrapped__()
    assert len(list((tmp_path / "moeserve").iterdir())) == 2
    assert library.stat().st_ino == before.st_ino
