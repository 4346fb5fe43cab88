"""How much memory a model takes on one rank: the decoder is built on torch's meta device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch

from moeserve.comm.layout import ParallelLayout
from moeserve.comm.mesh import Mesh
from moeserve.eplb.types import Placement, Topology
from moeserve.layers.context import Piece
from moeserve.models.attention import kv_cache_shape
from moeserve.models.decoder import Decoder
from moeserve.models.sharding import check_layout, check_slots
from moeserve.models.spec import ModelSpec
from moeserve.moe.expert_map import ExpertMap
from moeserve.moe.layer import MoeLayer


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of weights on one rank, by part; kv_bytes_per_token is of the KV cache on that rank."""

    embedding: int  # and the output head
    attention: int
    dense: int
    router: int
    experts: int
    shared: int
    norms: int
    kv_bytes_per_token: int

    @property
    def weights(self) -> int:
        return (
            self.embedding
            + self.attention
            + self.dense
            + self.router
            + self.experts
            + self.shared
            + self.norms
        )


def weight_bytes(
    spec: ModelSpec, layout: ParallelLayout, num_slots: int | None, dtype: torch.dtype, rank: int = 0
) -> WeightBytes:
    """What `rank` holds. num_slots: physical expert slots of a layer; None is one an expert.

    Raises ValueError when the model cannot be cut so.
    """
    check_layout(spec, layout)
    model = Decoder(
        spec, _planned_mesh(layout, rank), dtype=dtype, device="meta", **_experts(spec, layout, num_slots)
    )
    blocks = [layer.feed_forward for layer in model.layers]
    moe = [block for block in blocks if isinstance(block, MoeLayer)]
    shapes = [kv_cache_shape(layer.attention, layout.tp, 1, 1) for layer in spec.layers]
    return WeightBytes(
        embedding=sum(matrix.weight.nbytes for matrix in model.matrices),
        attention=sum(_bytes(layer.attention.pieces()) for layer in model.layers),
        dense=sum(_bytes(block.pieces()) for block in blocks if not isinstance(block, MoeLayer)),
        router=sum(_bytes(block.router.pieces()) for block in moe),
        experts=sum(block.experts.gate_up.nbytes + block.experts.down.nbytes for block in moe),
        shared=sum(_bytes(block.shared.pieces()) for block in moe if block.shared is not None),
        norms=_bytes(model.norm.pieces())
        + sum(_bytes(norm.pieces()) for layer in model.layers for norm in layer.norms),
        kv_bytes_per_token=sum(planes * heads * size for planes, _, _, heads, size in shapes)
        * dtype.itemsize,
    )


def _bytes(pieces: Iterable[Piece]) -> int:
    return sum(target.nbytes for piece in pieces for target in piece.targets)


def _experts(spec: ModelSpec, layout: ParallelLayout, num_slots: int | None) -> dict[str, Any]:
    if spec.moe is None:
        return {}
    slots = num_slots or spec.moe.num_experts
    check_slots(spec.moe, slots, layout.ep)
    placement = Placement.identity(len(spec.moe_layers), spec.moe.num_experts, slots)
    topology = Topology.of(layout.ep, slots)
    return {"expert_map": ExpertMap(placement, topology, 0, "cpu"), "dispatcher": object()}


def _planned_mesh(layout: ParallelLayout, rank: int) -> Mesh:
    """Groups that know their sizes and cannot communicate: enough to make weights."""
    mesh = _PlannedMesh(layout)
    for axis in ("world", "stage", "pp", "dp", "cp", "tp", "ep", "etp"):
        ranks = layout.group_ranks(axis, rank)
        setattr(mesh, axis, _PlannedGroup(ranks.index(rank), len(ranks), ranks))
    return cast(Mesh, mesh)


@dataclass
class _PlannedMesh:
    layout: ParallelLayout


@dataclass(frozen=True)
class _PlannedGroup:
    rank: int
    size: int
    ranks: tuple[int, ...]
