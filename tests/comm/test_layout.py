"""ParallelLayout: every axis cuts the ranks into disjoint groups of the right size."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.comm.layout import ParallelLayout

AXES = ("world", "stage", "pp", "dp", "cp", "tp", "ep", "etp")


@st.composite
def layouts(draw: st.DrawFn) -> ParallelLayout:
    pp, dp, cp, tp = (draw(st.integers(1, 4)) for _ in range(4))
    stage = dp * cp * tp
    etp = draw(st.sampled_from([d for d in range(1, stage + 1) if stage % d == 0]))
    return ParallelLayout(pp, dp, cp, tp, etp)


@given(layouts())
def test_sizes(layout: ParallelLayout) -> None:
    assert layout.world_size == layout.pp * layout.stage_size
    assert layout.ep * layout.etp == layout.stage_size == layout.dp * layout.cp * layout.tp


@given(layouts())
def test_groups_of_an_axis_partition_the_ranks(layout: ParallelLayout) -> None:
    sizes = {"world": layout.world_size, "stage": layout.stage_size}
    for axis in AXES:
        groups = {layout.group_ranks(axis, rank) for rank in range(layout.world_size)}
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
        assert {len(group) for group in groups} == {sizes.get(axis) or getattr(layout, axis)}
        for group in groups:
            assert list(group) == sorted(group)
            assert all(layout.group_ranks(axis, rank) == group for rank in group)


@given(layouts())
def test_axes_meet_in_one_rank_and_span_the_world(layout: ParallelLayout) -> None:
    for axes in (("pp", "dp", "cp", "tp"), ("pp", "ep", "etp"), ("pp", "stage")):
        rank = layout.world_size // 2
        groups = [set(layout.group_ranks(axis, rank)) for axis in axes]
        assert set.intersection(*groups) == {rank}
        assert math.prod(len(group) for group in groups) == layout.world_size
        reached = {rank}
        for axis in axes:
            reached = {other for one in reached for other in layout.group_ranks(axis, one)}
        assert reached == set(range(layout.world_size))


@given(layouts())
def test_tp_and_etp_are_neighbours(layout: ParallelLayout) -> None:
    for axis in ("tp", "etp"):
        for rank in range(layout.world_size):
            group = layout.group_ranks(axis, rank)
            assert group == tuple(range(group[0], group[0] + len(group)))


def test_groups_by_hand() -> None:
    layout = ParallelLayout(pp=2, dp=2, tp=2, etp=2)
    assert layout.group_ranks("pp", 5) == (1, 5)
    assert layout.group_ranks("dp", 5) == (5, 7)
    assert layout.group_ranks("tp", 5) == (4, 5)
    assert layout.group_ranks("ep", 5) == (5, 7)
    assert layout.group_ranks("etp", 5) == (4, 5)
    assert layout.group_ranks("stage", 5) == (4, 5, 6, 7)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"tp": 0}, "tp = 0: must be at least 1"), ({"dp": 4, "etp": 3}, "etp = 3: must divide the 4 ranks")],
)
def test_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelLayout(**sizes)
