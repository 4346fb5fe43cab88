"""The model that bench_all_to_all prints: how many ranks a token reaches, and bounds, against independent counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(autouse=True)
def _tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TOOLS)


@pytest.mark.parametrize("ranks", [8, 32, 72])
def test_a_token_reaches_as_many_ranks_as_in_drawn_routings(ranks: int) -> None:
    from all_to_all_model import distinct_ranks

    rng = np.random.default_rng(0)
    rank_of = np.arange(256) * ranks // 256  # as evenly as 72 ranks can hold them
    drawn = [len(set(rank_of[rng.permutation(256)[:8]])) for _ in range(4000)]
    assert distinct_ranks(ranks, 8) == pytest.approx(np.mean(drawn), abs=0.06)


def test_bounds_are_bytes_over_the_link() -> None:
    from all_to_all_model import bounds, bytes_a_token

    links = {row["links"]: row for row in bounds()}
    assert links["NVLink 5, EP8"]["b = 128"] == "4.9 | 9.4"
    assert links["NVLink 4, EP8"]["b = 4096"] == "311.7 | 604.5"
    eight = bytes_a_token()[0]
    assert eight["least"] == pytest.approx(5.2946 * 7 / 8 * (7168 + 224) / 1e3, rel=1e-4)
    assert eight["least"] < eight["dispatch KB"] < 1.01 * eight["least"] < eight["without dedup"]


def test_the_fit_is_near_what_was_published() -> None:
    from all_to_all_model import beside_published

    errors = [row["dispatch error"] for row in beside_published() if row["tokens a rank"] >= 128]
    assert max(abs(error) for error in errors if error is not None) < 0.06
