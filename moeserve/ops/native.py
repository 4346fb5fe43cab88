"""The CPU's fast forms of the ops: C kernels reached through ctypes.

A row's result does not depend on the other rows of a call nor on the number of threads. A call that the
kernels are not made for (another dtype, a weight that is not contiguous) goes to the plain form.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moeserve.forward_batch import ForwardBatch
from moeserve.ops import build, reference, table
from moeserve.ops.spread import SplitTable

if TYPE_CHECKING:
    from moeserve.models.spec import Routing

logger = logging.getLogger(__name__)

_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "linear": (*[_POINTER] * 4, *[_LONG] * 6, _INT),
    "rms_norm": (*[_POINTER] * 3, *[_LONG] * 5, _FLOAT, _INT),
    "add_rms_norm": (*[_POINTER] * 5, *[_LONG] * 2, _FLOAT, _INT),
    "silu_mul": (*[_POINTER] * 2, *[_LONG] * 3, _INT),
    "rope": (*[_POINTER] * 4, *[_LONG] * 5, _INT, _INT),
    "write_kv": (*[_POINTER] * 3, *[_LONG] * 9),
    "take_heads": (*[_POINTER] * 11, _FLOAT, _INT, _INT),
    "choose_experts": (*[_POINTER] * 4, *[_LONG] * 6, _FLOAT, _INT, _INT, _INT),
    "paged_attention": (*[_POINTER] * 9, _FLOAT, _INT),
    "grouped_experts": (*[_POINTER] * 5, *[_LONG] * 4, _INT),
    "fused_experts": (*[_POINTER] * 6, *[_LONG] * 5, _INT),
}
_SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_MOST_EXPERTS = 1024  # of router.h
_threads = torch.get_num_threads

Kernel = Callable[..., int]


def enable() -> bool:
    """Register the kernels as the CPU's forms in ops.table; False, with a log line, where they cannot be
    built."""
    try:
        ops = NativeOps(build.build())
    except (build.BuildError, OSError) as error:
        logger.warning("the plain-torch ops serve, the C kernels could not be built: %s", error)
        return False
    for name in (*_SIGNATURES, "head_linear", "spread_tokens"):
        table.register(name, "cpu", getattr(ops, name))
    return True


class NativeOps:
    """The ops of one compiled library. Shapes and meanings are those of moeserve.ops.reference."""

    def __init__(self, library: Path) -> None:
        # PyDLL keeps the interpreter's lock: calls last microseconds to milliseconds, and giving the lock
        # away at each would let any other Python thread stall a step by its whole switch interval.
        loaded = ctypes.PyDLL(str(library))
        loaded.moeserve_set_team.argtypes = (_POINTER,)
        loaded.moeserve_set_team(_find_team())
        self._kernels = {op: _bind(loaded, op) for op in _SIGNATURES}
        (
            self._linear,
            self._rms_norm,
            self._add_rms_norm,
            self._silu_mul,
            self._rope,
            self._write_kv,
            self._take_heads,
            self._choose_experts,
            self._paged_attention,
            self._grouped_experts,
            self._fused_experts,
        ) = self._kernels.values()
        self._spread_tokens = loaded.moeserve_spread_tokens
        self._spread_tokens.argtypes = (*[_POINTER] * 4, _LONG)
        self._spread_tokens.restype = _INT

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        kernel = self._linear.get(x.dtype)
        if kernel is None or weight.dtype is not x.dtype or x.dim() != 2 or not weight.is_contiguous():
            return reference.linear(x, weight, bias)
        if x.stride(1) != 1:
            x = x.contiguous()
        rows, size = x.shape
        columns = weight.shape[0]
        out = x.new_empty((rows, columns))
        bias_pointer = None if bias is None else bias.data_ptr()
        kernel(
            x.data_ptr(), weight.data_ptr(), bias_pointer, out.data_ptr(),
            rows, 1, columns, size, x.stride(0), 0, _threads(),
        )  # fmt: skip
        return out

    def head_linear(self, x: Tensor, weight: Tensor) -> Tensor:
        kernel = self._linear.get(x.dtype)
        if kernel is None or weight.dtype is not x.dtype or not weight.is_contiguous():
            return reference.head_linear(x, weight)
        if x.stride(2) != 1:
            x = x.contiguous()
        rows, heads, size = x.shape
        columns = weight.shape[1]
        out = x.new_empty((rows, heads, columns))
        kernel(
            x.data_ptr(), weight.data_ptr(), None, out.data_ptr(),
            rows, heads, columns, size, x.stride(0), x.stride(1), _threads(),
        )  # fmt: skip
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        kernel = self._rms_norm.get(x.dtype)
        if kernel is None or weight.dtype is not x.dtype:
            return reference.rms_norm(x, weight, eps)
        if x.dim() == 3 and x.stride(2) == 1:
            rows, heads, size = x.shape
            row_stride, head_stride = x.stride(0), x.stride(1)
        else:
            x = x.contiguous()
            heads, size = 1, x.shape[-1]
            rows, row_stride, head_stride = x.numel() // size, size, 0
        out = x.new_empty(x.shape)
        kernel(
            x.data_ptr(), weight.data_ptr(), out.data_ptr(),
            rows, heads, size, row_stride, head_stride, eps, _threads(),
        )  # fmt: skip
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        kernel = self._add_rms_norm.get(x.dtype)
        if kernel is None or weight.dtype is not x.dtype or residual.dtype is not x.dtype:
            return reference.add_rms_norm(x, residual, weight, eps)
        x, residual = x.contiguous(), residual.contiguous()
        out, total = torch.empty_like(x), torch.empty_like(x)
        rows, size = x.shape
        kernel(
            x.data_ptr(), residual.data_ptr(), weight.data_ptr(), out.data_ptr(), total.data_ptr(),
            rows, size, eps, _threads(),
        )  # fmt: skip
        return out, total

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        kernel = self._silu_mul.get(gate_up.dtype)
        if kernel is None or gate_up.dim() != 2 or gate_up.stride(1) != 1:
            return reference.silu_mul(gate_up)
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty((rows, size))
        kernel(gate_up.data_ptr(), out.data_ptr(), rows, size, gate_up.stride(0), _threads())
        return out

    def rope(self, x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> Tensor:
        kernel = self._rope.get(x.dtype)
        if kernel is None or cos_sin.dtype is not torch.float32 or not cos_sin.is_contiguous():
            return reference.rope(x, positions, cos_sin, interleaved)
        if x.stride(2) != 1:
            x = x.contiguous()
        rows, heads, size = x.shape
        out = x.new_empty((rows, heads, size))
        kernel(
            x.data_ptr(), positions.data_ptr(), cos_sin.data_ptr(), out.data_ptr(),
            rows, heads, size, x.stride(0), x.stride(1), interleaved, _threads(),
        )  # fmt: skip
        return out

    def write_kv(self, cache: Tensor, values: Tensor, kv_slots: Tensor) -> None:
        kernel = self._write_kv.get(cache.dtype)
        if kernel is None or values.dtype is not cache.dtype or cache.stride(3) != 1:
            return reference.write_kv(cache, values, kv_slots)
        if values.stride(2) != 1:
            values = values.contiguous()
        rows, heads, size = values.shape
        page_stride, slot_stride, head_stride, _ = cache.stride()
        kernel(
            cache.data_ptr(), values.data_ptr(), kv_slots.data_ptr(), rows, heads, size, cache.shape[1],
            page_stride, slot_stride, head_stride, values.stride(0), values.stride(1),
        )  # fmt: skip
        return None

    def take_heads(
        self,
        qkv: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
        positions: Tensor,
        cos_sin: Tensor,
        interleaved: bool,
        key_cache: Tensor,
        value_cache: Tensor,
        kv_slots: Tensor,
    ) -> Tensor:
        kernel = self._take_heads.get(qkv.dtype)
        if kernel is None or key_cache.dtype is not qkv.dtype or not cos_sin.is_contiguous():
            return reference.take_heads(
                qkv, norms, eps, positions, cos_sin, interleaved, key_cache, value_cache, kv_slots
            )
        _, page_size, kv_heads, size = key_cache.shape
        rows = qkv.shape[0]
        heads = qkv.shape[1] // size - 2 * kv_heads
        key_page, key_slot, key_head, _ = key_cache.stride()
        value_page, value_slot, value_head, _ = value_cache.stride()
        q = qkv.new_empty((rows, heads, size))
        sizes = (ctypes.c_int64 * 6)(rows, heads, kv_heads, size, qkv.stride(0), page_size)
        strides = (ctypes.c_int64 * 6)(key_page, key_slot, key_head, value_page, value_slot, value_head)
        q_norm, k_norm = (None, None) if norms is None else (norms[0].data_ptr(), norms[1].data_ptr())
        kernel(
            qkv.data_ptr(), q_norm, k_norm, positions.data_ptr(), kv_slots.data_ptr(), cos_sin.data_ptr(),
            q.data_ptr(), key_cache.data_ptr(), value_cache.data_ptr(), sizes, strides,
            eps, interleaved, _threads(),
        )  # fmt: skip
        return q

    def choose_experts(self, logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
        kernel = self._choose_experts.get(logits.dtype)
        tokens, num_experts = logits.shape
        if kernel is None or num_experts > _MOST_EXPERTS or not logits.is_contiguous():
            return reference.choose_experts(logits, bias, routing)
        weights = logits.new_empty((tokens, routing.top_k), dtype=torch.float32)
        experts = logits.new_empty((tokens, routing.top_k), dtype=torch.int64)
        kernel(
            logits.data_ptr(), None if bias is None else bias.data_ptr(), weights.data_ptr(),
            experts.data_ptr(), tokens, num_experts, routing.top_k,
            routing.num_groups, routing.groups_kept, routing.group_score_terms,
            routing.scaling, routing.scoring == "sigmoid", routing.normalize, _threads(),
        )  # fmt: skip
        return weights, experts

    def paged_attention(
        self,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: ForwardBatch,
        scale: float,
        window: int | None,
    ) -> Tensor:
        kernel = self._paged_attention.get(q.dtype)
        if kernel is None or key_cache.dtype is not q.dtype or value_cache.dtype is not q.dtype:
            return reference.paged_attention(q, key_cache, value_cache, batch, scale, window)
        if q.stride(2) != 1:
            q = q.contiguous()
        rows, heads, size = q.shape
        key_page, key_slot, key_head, key_element = key_cache.stride()
        value_page, value_slot, value_head, value_element = value_cache.stride()
        assert key_element == 1 and value_element == 1, "the cache's heads are contiguous"
        page_size, kv_heads, value_size = value_cache.shape[1:]
        table_stride = batch.page_table.stride(0)
        out = q.new_empty((rows, heads, value_size))
        strides = (ctypes.c_int64 * 8)(
            q.stride(0), q.stride(1), key_page, key_slot, key_head, value_page, value_slot, value_head
        )
        sizes = (ctypes.c_int64 * 9)(
            rows, batch.context_len.shape[0], kv_heads, heads // kv_heads, size, value_size, page_size,
            table_stride, window or 0,
        )  # fmt: skip
        status = kernel(
            q.data_ptr(), key_cache.data_ptr(), value_cache.data_ptr(), out.data_ptr(),
            batch.query_start.data_ptr(), batch.context_len.data_ptr(), batch.page_table.data_ptr(),
            strides, sizes, scale, _threads(),
        )  # fmt: skip
        _check(status)
        return out

    def grouped_experts(self, rows: Tensor, tokens_per_slot: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        kernel = self._grouped_experts.get(rows.dtype)
        if kernel is None or not _are_weights(rows.dtype, gate_up, down):
            return reference.grouped_experts(rows, tokens_per_slot, gate_up, down)
        rows = rows.contiguous()
        tokens_per_slot = tokens_per_slot.to(torch.int64).contiguous()
        out = torch.empty_like(rows)
        slots, size, inner = down.shape
        status = kernel(
            rows.data_ptr(), tokens_per_slot.data_ptr(), gate_up.data_ptr(), down.data_ptr(), out.data_ptr(),
            rows.shape[0], slots, size, inner, _threads(),
        )  # fmt: skip
        _check(status)
        return out

    def fused_experts(
        self, x: Tensor, slots: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
    ) -> Tensor:
        kernel = self._fused_experts.get(x.dtype)
        if kernel is None or not _are_weights(x.dtype, gate_up, down):
            return reference.fused_experts(x, slots, weights, gate_up, down)
        x, slots, weights = x.contiguous(), slots.contiguous(), weights.contiguous()
        assert slots.dtype is torch.int64 and weights.dtype is torch.float32
        out = torch.empty_like(x)
        tokens, choices = slots.shape
        num_slots, size, inner = down.shape
        status = kernel(
            x.data_ptr(), slots.data_ptr(), weights.data_ptr(), gate_up.data_ptr(), down.data_ptr(),
            out.data_ptr(), tokens, choices, num_slots, size, inner, _threads(),
        )  # fmt: skip
        _check(status)
        return out

    def spread_tokens(self, experts: Tensor, valid: Tensor, table: SplitTable, phase: int) -> Tensor:
        experts = experts.contiguous()
        slots = torch.empty_like(experts)
        tokens, top_k = experts.shape
        split, width = table.hosts.shape
        arrays = (
            table.slot, table.rank, table.row, table.expert, table.num_hosts, table.hosts, table.host_slots
        )  # fmt: skip
        operands = (ctypes.c_int64 * 13)(
            tokens, top_k, len(table.slot), table.num_ranks, split, width, *[a.data_ptr() for a in arrays]
        )
        status = self._spread_tokens(experts.data_ptr(), valid.data_ptr(), slots.data_ptr(), operands, phase)
        _check(status)
        return slots


def _bind(library: ctypes.PyDLL, op: str) -> dict[torch.dtype, Kernel]:
    kernels: dict[torch.dtype, Kernel] = {}
    for dtype, suffix in _SUFFIXES.items():
        kernel = getattr(library, f"moeserve_{op}_{suffix}")
        kernel.argtypes = _SIGNATURES[op]
        kernel.restype = _INT if op in ("paged_attention", "grouped_experts", "fused_experts") else None
        kernels[dtype] = kernel
    return kernels


def _find_team() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime of torch, so that one pool of threads serves both.

    The search order is the loader's own: libraries of the global scope (a preloaded runtime), then torch's.
    None where torch was built without such a runtime: the kernels then run on the calling thread.
    """
    libraries = [None, *sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))]
    for library in libraries:
        try:
            function = ctypes.CDLL(None if library is None else str(library)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, _POINTER).value
    return None


def _are_weights(dtype: torch.dtype, gate_up: Tensor, down: Tensor) -> bool:
    return gate_up.dtype is dtype and down.dtype is dtype and gate_up.is_contiguous() and down.is_contiguous()


def _check(status: int) -> None:
    if status == -1:
        raise MemoryError("no memory for the scratch space of a kernel")
    assert status == 0, "tokens_per_slot counts more rows than there are"
