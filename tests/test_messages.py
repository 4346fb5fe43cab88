"""What may be asked of a sequence."""

import math
from typing import Any

import pytest

from moeserve.messages import (
    AddRequest,
    LayerOrder,
    LayersSwitched,
    Migrate,
    Migrated,
    SamplingParams,
    decode_from_rank,
    decode_to_rank,
    encode,
)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", -1),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 2.0),
        ("presence_penalty", math.nan),
        ("frequency_penalty", math.inf),
        ("repetition_penalty", 0.0),
        ("logit_bias", {3: math.nan}),
        ("logprobs", -1),
        ("prompt_logprobs", -1),
    ],
)
def test_what_no_sampler_can_do_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} = .*: must be "):
        SamplingParams(**{name: value})


def test_a_request_survives_the_way_to_a_rank() -> None:
    params = SamplingParams(max_tokens=0, top_p=0.0, logit_bias={3: -100.0}, logprobs=0, prompt_logprobs=0)
    request = AddRequest("1", [1, 2], params)
    assert decode_to_rank(encode(request)) == request


def test_an_order_to_migrate_survives_the_way_to_a_rank_and_its_answers_the_way_back() -> None:
    layers = [
        LayerOrder(3, [0, 1, 1], [1.0, 0.3, 0.7], [(1, 2)]),
        LayerOrder(0, [0, 1, 0], [0.25, 1, 0.75], []),
    ]
    order = Migrate(7, 1, "abc", 2, "def", layers, 2, 1e9)
    assert decode_to_rank(encode(order)) == order
    for answer in (
        LayersSwitched(0, 7, [0, 3]),
        Migrated(1, 7, "partial", "layer 3: late", 1, 1, "abd", 0, 0, 0.5, 0.01),
    ):
        assert decode_from_rank(encode(answer)) == answer
