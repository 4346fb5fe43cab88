"""The memory that a plan promises is the memory that a model takes, and what cannot be cut is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from moeserve.comm.layout import ParallelLayout
from moeserve.comm.mesh import Mesh
from moeserve.eplb.types import Placement, Topology
from moeserve.models.decoder import Decoder
from moeserve.models.memory import weight_bytes
from moeserve.models.registry import read_spec
from moeserve.models.spec import (
    DenseMlp,
    GroupedAttention,
    LatentAttention,
    LayerSpec,
    ModelSpec,
    MoeMlp,
    RopeSpec,
    Routing,
)  # fmt: skip
from moeserve.moe.expert_map import ExpertMap

Tiny = Callable[[str], Any]  # family -> conftest.Oracle
ROUTING = Routing(
    "sigmoid", 8, 8, 4, 2, correction_bias=True, normalize=True, scaling=2.5, float32_logits=True
)


def tensors_of(thing: object, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor reachable from an object of this project."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, (list, tuple)):
        for part in thing:
            yield from tensors_of(part, seen)
    elif type(thing).__module__.startswith(("moeserve.layers", "moeserve.models", "moeserve.moe.")):
        for part in vars(thing).values():
            yield from tensors_of(part, seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "qwen3_moe", "mixtral", "llama", "qwen3"])
def test_plan_equals_what_is_allocated(family: str, dtype: torch.dtype, tiny: Tiny) -> None:
    spec = read_spec(tiny(family).path)
    experts: dict[str, Any] = {}
    if spec.moe is not None:
        placement = Placement.identity(len(spec.moe_layers), spec.moe.num_experts, 10)
        experts["expert_map"] = ExpertMap(placement, Topology.of(1, 10), 0, "cpu")
    model = Decoder(spec, Mesh(ParallelLayout(), 0), dtype=dtype, **experts)
    not_weights = list(tensors_of(model.expert_map, set())) + [model.cos_sin]
    known = {id(tensor) for tensor in not_weights}
    held = sum(tensor.nbytes for tensor in tensors_of(model, set()) if id(tensor) not in known)
    plan = weight_bytes(spec, ParallelLayout(), 10 if spec.moe else None, dtype)
    assert plan.weights == held
    assert plan.kv_bytes_per_token * 12 == sum(cache.nbytes for cache in model.new_kv_cache(3, 4))


def deepseek_v3() -> ModelSpec:
    attention = LatentAttention(128, 1536, 512, 128, 64, 128, scale=0.1)
    moe = MoeMlp(256, 2048, ROUTING, shared_size=2048)
    dense = DenseMlp(18432)
    layers = tuple(LayerSpec(attention, dense if i < 3 else moe) for i in range(61))
    return ModelSpec("V3", 7168, 129280, 4096, 1e-6, RopeSpec(1e4, 64), layers, False, "bfloat16")


def test_deepseek_v3_has_671_billion_weights() -> None:
    plan = weight_bytes(deepseek_v3(), ParallelLayout(), None, torch.float32)
    assert plan.weights / 4 == pytest.approx(671.03e9, rel=1e-3)
    assert plan.kv_bytes_per_token == 61 * 576 * 4


def test_deepseek_v3_on_72_ranks() -> None:
    plan = weight_bytes(deepseek_v3(), ParallelLayout(dp=72), 288, torch.bfloat16)
    assert plan.experts == 58 * 4 * 3 * 7168 * 2048 * 2  # four slots a rank
    assert plan.shared == 58 * 3 * 7168 * 2048 * 2
    assert plan.dense == 3 * 3 * 7168 * 18432 * 2


LLAMA = ModelSpec(
    "L", 64, 100, 32, 1e-6, RopeSpec(1e4, 16), (LayerSpec(GroupedAttention(6, 2, 16), DenseMlp(10)),), False, "float32"
)  # fmt: skip
WRONG: list[tuple[ModelSpec, ParallelLayout, int | None, str]] = [
    (
        LLAMA,
        ParallelLayout(tp=4),
        None,
        r"num_attention_heads = 6: not divisible by .* = 4; 1, 2, 3 would do",
    ),
    (LLAMA, ParallelLayout(tp=3), None, "num_key_value_heads = 2: must divide .* = 3 or be divisible"),
    (LLAMA, ParallelLayout(tp=6), None, "intermediate_size = 10: not divisible by .* = 6"),
    (LLAMA, ParallelLayout(tp=2, etp=2), None, "moe_tensor_parallel_size = 2: L has no experts; give 1"),
    (LLAMA, ParallelLayout(pp=2), None, "pipeline_parallel_size = 2"),
    (LLAMA, ParallelLayout(cp=2), None, "context_parallel_size = 2"),
    (
        deepseek_v3(),
        ParallelLayout(dp=3, etp=3),
        258,
        "expert intermediate size = 2048: not divisible by .* = 3",
    ),
    (deepseek_v3(), ParallelLayout(dp=72), 256, "num_slots = 256: .*divisible by .* = 72; 288 would do"),
    (deepseek_v3(), ParallelLayout(dp=2), 100, "num_slots = 100: must be at least num_experts = 256"),
]


@pytest.mark.parametrize(("spec", "layout", "slots", "message"), WRONG, ids=range(len(WRONG)))
def test_what_cannot_be_cut_is_refused(
    spec: ModelSpec, layout: ParallelLayout, slots: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        weight_bytes(spec, layout, slots, torch.bfloat16)
