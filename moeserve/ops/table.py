"""One table (op, device kind) -> function. The plain form serves wherever no fast form is registered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from moeserve.ops import reference


@dataclass(frozen=True)
class Ops:
    """The forms chosen for one device; shapes and meanings are those of moeserve.ops.reference."""

    linear: Callable[..., Tensor] = reference.linear
    head_linear: Callable[..., Tensor] = reference.head_linear
    rms_norm: Callable[..., Tensor] = reference.rms_norm
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]] = reference.add_rms_norm
    silu_mul: Callable[..., Tensor] = reference.silu_mul
    rope: Callable[..., Tensor] = reference.rope
    write_kv: Callable[..., None] = reference.write_kv
    take_heads: Callable[..., Tensor] = reference.take_heads
    choose_experts: Callable[..., tuple[Tensor, Tensor]] = reference.choose_experts
    paged_attention: Callable[..., Tensor] = reference.paged_attention
    grouped_experts: Callable[..., Tensor] = reference.grouped_experts
    fused_experts: Callable[..., Tensor] = reference.fused_experts
    spread_tokens: Callable[..., Tensor] = reference.spread_tokens


OP_NAMES = tuple(field.name for field in fields(Ops))
_fast_forms: dict[tuple[str, str], Callable[..., Any]] = {}


def register(op: str, device_kind: str, function: Callable[..., Any]) -> None:
    """Use `function` for `op` on devices of that kind ("cpu", "cuda") instead of the plain form."""
    assert op in OP_NAMES, op
    _fast_forms[op, device_kind] = function


def get(op: str, device: torch.device | str) -> Callable[..., Any]:
    """The function for `op` on `device`: the registered fast form, else the plain one."""
    plain: Callable[..., Any] = getattr(reference, op)
    return _fast_forms.get((op, torch.device(device).type), plain)


def choose_ops(device: torch.device | str) -> Ops:
    """Every op's form for `device`, chosen once when a model is made."""
    return Ops(**{op: get(op, device) for op in OP_NAMES})
