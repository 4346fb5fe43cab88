"""Weights' memory: whole tensors of the asked shape that never overlap."""

from __future__ import annotations

import torch

from moeserve.ops.memory import _BLOCK, WeightMemory


def test_weights_do_not_overlap_and_are_aligned() -> None:
    memory = WeightMemory()
    shapes = [
        (3,),
        (7, 5),
        (0, 4),
        (1,),
        (2, 3, 11),
        (_BLOCK // 8, 1),
        (_BLOCK // 4 + 1,),
        (1000, 1000),
        (9,),
    ]
    weights = []
    for number, shape in enumerate(shapes):
        dtype = torch.float32 if number % 2 else torch.bfloat16
        weight = memory.empty(shape, dtype)
        assert weight.shape == shape and weight.dtype is dtype and weight.is_contiguous()
        assert weight.data_ptr() % 64 == 0 or not weight.numel()
        weights.append(weight.fill_(number))
    for number, weight in enumerate(weights):
        assert bool((weight == number).all())


def test_more_small_weights_than_one_block_holds() -> None:
    memory = WeightMemory()
    weights = [memory.empty((_BLOCK // 5,), torch.uint8) for _ in range(7)]
    starts = sorted(weight.data_ptr() for weight in weights)
    assert all(later - start >= _BLOCK // 5 for start, later in zip(starts, starts[1:], strict=False))
