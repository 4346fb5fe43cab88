"""No two things share a byte, everything is aligned, and sizes are those of the design, whatever the sizes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.comm.all_to_all.one_sided.layout import (
    CELLS,
    COMBINES,
    REGION_ALIGNMENT,
    ROW_ALIGNMENT,
    EpConfig,
    EpLayout,
    Region,
    RowFormat,
    mail_word,
    read_mail,
)

CONTAINERS = ("meta", "x", "result", "z", "y")
"""Names of the layout that are other regions under another name, or hold them."""


def formats() -> st.SearchStrategy[RowFormat]:
    dtypes = st.sampled_from([torch.bfloat16, torch.float32, torch.uint8, torch.float8_e4m3fn])
    scales = st.sampled_from([torch.float32, torch.uint8])
    return st.builds(RowFormat, st.integers(1, 70), dtypes, st.integers(0, 9), scales)


def configs(ranks: int, tokens: int, slots: int) -> st.SearchStrategy[EpConfig]:
    return st.builds(
        EpConfig,
        world=st.integers(1, ranks),
        max_tokens=st.integers(1, tokens),
        top_k=st.integers(1, 22),
        slots_per_rank=st.integers(1, slots),
        x=formats(),
        result=formats(),
        combine=st.sampled_from(COMBINES),
        cells=st.sampled_from(CELLS),
        num_experts=st.sampled_from([0, 1, 7, 256]),
    )


def elements(region: Region) -> np.ndarray:
    """Byte offset of every element."""
    offsets = np.array([region.offset])
    for size, stride in zip(region.shape, region.strides, strict=True):
        offsets = (offsets[:, None] + np.arange(size) * stride).reshape(-1)
    return offsets


def leaves(layout: EpLayout) -> dict[str, Region]:
    return {name: r for name, r in layout.regions.items() if name not in CONTAINERS}


@settings(max_examples=60)
@given(configs(4, 5, 9), st.sampled_from([0, 128, 12800]))
def test_no_byte_has_two_owners(config: EpConfig, base: int) -> None:
    layout = EpLayout(config, base)
    owned = np.zeros(base + layout.nbytes, dtype=np.int32)
    for region in leaves(layout).values():
        starts = elements(region)
        for i in range(region.dtype.itemsize):
            np.add.at(owned, starts + i, 1)
    assert owned.max() == 1 and not owned[:base].any()


@settings(max_examples=100)
@given(configs(128, 4096, 300), st.sampled_from([0, 1 << 20]))
def test_alignment_and_bounds(config: EpConfig, base: int) -> None:
    layout = EpLayout(config, base)
    assert layout.nbytes % REGION_ALIGNMENT == 0
    for name, region in layout.regions.items():
        assert base <= region.offset and region.end <= base + layout.nbytes, name
        for stride in (region.offset, *region.strides):
            assert stride % region.dtype.itemsize == 0, name
    for name in ("mail", "done", "ctl", "slot_cnt", "meta", "x", "result"):
        assert layout.regions[name].offset % REGION_ALIGNMENT == 0, name
    for rows in (layout.meta, layout.x, layout.result):
        assert all(stride % ROW_ALIGNMENT == 0 for stride in rows.strides[:-1])
    slices = [layout.meta, layout.x] + ([layout.result] if config.combine == "pull" else [])
    for region in slices:  # two ranks never write one cache line
        assert region.strides[0] % REGION_ALIGNMENT == 0 and region.shape[0] == config.world
    containers = sorted(
        (r for n, r in layout.regions.items() if "_" not in n or n == "slot_cnt"), key=lambda r: r.offset
    )
    distinct = {r.offset: r for r in containers if r not in (layout.z, layout.y)}
    for first, second in itertools.pairwise(distinct.values()):
        assert first.end <= second.offset


@settings(max_examples=60)
@given(configs(5, 6, 9), st.sampled_from([0, 256]), st.randoms(use_true_random=False))
def test_views_are_where_at_says(config: EpConfig, base: int, random: np.random.Generator) -> None:
    layout = EpLayout(config, base)
    block = torch.zeros(base + layout.nbytes, dtype=torch.uint8)
    for region in layout.regions.values():
        index = [random.randrange(size) for size in region.shape]  # type: ignore[attr-defined]
        view = region.view(block)
        assert view.dtype == region.dtype and tuple(view.shape) == region.shape
        assert view[tuple(index)].data_ptr() - block.data_ptr() == region.at(*index)
        assert region.at() == region.offset


def test_a_row_written_through_its_fields_reads_back() -> None:
    form = RowFormat(5, torch.float8_e4m3fn, 3, torch.float32)
    layout = EpLayout(EpConfig(2, 4, 3, 2, form, RowFormat(6, torch.bfloat16), cells="rank"))
    block = torch.zeros(layout.nbytes, dtype=torch.uint8)
    assert layout.x_scales is not None and layout.meta_weights is not None and layout.z is not None
    fields = list(leaves(layout).values())
    for i, region in enumerate(fields):
        region.view(block).copy_(torch.full(region.shape, i + 1).to(region.dtype))
    for i, region in enumerate(fields):
        assert bool((region.view(block).float() == i + 1).all())


@pytest.mark.parametrize("cells", CELLS)
def test_a_record_begins_with_one_word_of_8_bytes(cells: str) -> None:
    """Kernels store token, cell and version at once."""
    row = RowFormat(4, torch.bfloat16)
    layout = EpLayout(EpConfig(2, 4, 3, 2, row, row, cells=cells))
    fields = (layout.meta_token, layout.meta_cell, layout.meta_version)
    assert [field.offset - layout.meta.offset for field in fields] == [0, 4, 6]
    assert layout.meta.offset % 8 == layout.meta.strides[1] % 8 == 0


def test_sizes_of_the_design() -> None:
    """DeepSeek-V3 at EP72: 7392 + 64 bytes a row; at T = 512 275 MB of rows, z 59 MB, y 528 MB a rank."""
    fp8 = RowFormat(7168, torch.float8_e4m3fn, 56)
    bf16 = RowFormat(7168, torch.bfloat16)
    push = EpLayout(EpConfig(72, 512, 8, 4, fp8, bf16, "push", "rank"))
    pull = EpLayout(EpConfig(72, 512, 8, 4, fp8, bf16, "pull", "rank"))
    assert (push.config.x.nbytes, push.meta_bytes) == (7392, 64)
    assert round(72 * 512 * (7392 + 64) / 1e6) == 275
    assert round(push.nbytes / 1e6) == 275 + 59 and round(pull.nbytes / 1e6) == 275 + 528
    assert push.y is None and pull.z is None
    by_choice = EpLayout(EpConfig(4, 512, 8, 4, bf16, bf16, "push"))
    assert by_choice.z is not None and by_choice.z.shape == (512, 8, 7168)
    assert EpLayout(EpConfig(4, 512, 8, 4, bf16, bf16, "push", "rank")).z.shape == (512, 4, 7168)  # type: ignore[union-attr]
    many = EpLayout(EpConfig(4, 512, 22, 4, bf16, bf16, "pull"))
    assert many.y is not None and many.y.shape == (4, 512, 22, 7168)


def test_blocks_can_stand_one_after_another() -> None:
    config = EpConfig(3, 5, 2, 2, RowFormat(3, torch.bfloat16), RowFormat(3, torch.bfloat16))
    first = EpLayout(config)
    second = EpLayout(config, first.nbytes)
    assert second.nbytes == first.nbytes
    for name, region in first.regions.items():
        assert second.regions[name].offset == region.offset + first.nbytes


@given(st.integers(0, (1 << 43) - 1), st.integers(0, (1 << 20) - 1))
def test_mail_words(epoch: int, rows: int) -> None:
    word = mail_word(epoch, rows)
    assert -(1 << 63) <= word < 1 << 63 and read_mail(word) == (epoch, rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"world": 0}, "world = 0: must be from 1 to"),
        ({"max_tokens": 1 << 20}, "max_tokens = 1048576: must be from 1 to 1048575"),
        ({"slots_per_rank": 1 << 15}, "slots_per_rank = 32768: must be from 1 to 32767"),
        ({"combine": "throw"}, "combine = 'throw': must be one of push, pull"),
        ({"cells": "prison"}, "cells = 'prison': must be one of choice, rank"),
    ],
)
def test_wrong_sizes_are_named(change: dict[str, object], message: str) -> None:
    row = RowFormat(4, torch.bfloat16)
    sizes = {"world": 2, "max_tokens": 4, "top_k": 2, "slots_per_rank": 2, "x": row, "result": row}
    with pytest.raises(ValueError, match=message):
        EpConfig(**{**sizes, **change})  # type: ignore[arg-type]


def test_wrong_rows_are_named() -> None:
    with pytest.raises(ValueError, match="width = 0"):
        RowFormat(0, torch.uint8)
    with pytest.raises(ValueError, match="num_scales = -1"):
        RowFormat(1, torch.uint8, -1)
