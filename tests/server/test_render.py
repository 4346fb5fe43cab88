"""Pieces of answers that no client shows: widths of expert ids, names of tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moeserve.server.render import legacy_token, routed_experts
from moeserve.server.settings import ServerSettings

SETTINGS = ServerSettings(
    model_name="m", max_seq_len=8, max_batch_size=1, num_ranks=1, num_moe_layers=3, top_k=2
)


@pytest.mark.parametrize(("kind", "largest"), [("<u1", 255), ("<i2", 383)])
def test_expert_ids_of_either_width(kind: str, largest: int) -> None:
    given = np.arange(5 * 3 * 2).reshape(5, 3, 2)
    given[4, 2, 1] = largest
    assert routed_experts(given.astype(kind).tobytes(), 5, SETTINGS) == given.tolist()
    with pytest.raises(AssertionError, match="bytes of routed experts"):
        routed_experts(given.astype(kind).tobytes()[:-1], 5, SETTINGS)


def test_half_characters_have_names_of_their_own(tokenizer: Any) -> None:
    ids = tokenizer.encode("🦊")
    assert len(ids) > 1
    names = [legacy_token(tokenizer, i) for i in ids]
    assert "".join(names).replace("bytes:", "") == "\\xf0\\x9f\\xa6\\x8a"
    assert legacy_token(tokenizer, tokenizer.encode(" the")[0]) == " the"
