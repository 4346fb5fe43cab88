"""Whether a model can be cut as a layout asks; each refusal names the field, its value and what would do."""

from __future__ import annotations

from moeserve.comm.layout import ParallelLayout
from moeserve.models.spec import DenseMlp, GroupedAttention, ModelSpec, MoeMlp


def check_layout(spec: ModelSpec, layout: ParallelLayout) -> None:
    """Raises ValueError unless every layer of `spec` can be cut over the layout's tp and etp."""
    if layout.pp > 1 or layout.cp > 1:
        raise ValueError(
            f"pipeline_parallel_size = {layout.pp}, context_parallel_size = {layout.cp}: "
            "models run on one pipeline stage without context parallelism; give 1 and 1"
        )
    for layer in dict.fromkeys(spec.layers):
        attention, feed_forward = layer.attention, layer.feed_forward
        _divides("num_attention_heads", attention.num_heads, "attention tensor parallel size", layout.tp)
        if isinstance(attention, GroupedAttention):
            heads = attention.num_kv_heads
            if heads % layout.tp and layout.tp % heads:
                raise ValueError(
                    f"num_key_value_heads = {heads}: must divide the attention tensor parallel size = "
                    f"{layout.tp} or be divisible by it"
                )
        if isinstance(feed_forward, DenseMlp):
            size = feed_forward.intermediate_size
            _divides("intermediate_size", size, "attention tensor parallel size", layout.tp)
        else:
            size = feed_forward.intermediate_size
            _divides("expert intermediate size", size, "moe_tensor_parallel_size", layout.etp)
    if layout.etp > 1 and spec.moe is None:
        raise ValueError(
            f"moe_tensor_parallel_size = {layout.etp}: {spec.architecture} has no experts; give 1"
        )


def check_slots(moe: MoeMlp, num_slots: int, ep_size: int) -> None:
    """Raises ValueError unless num_slots hold every expert and divide among the ep ranks."""
    if num_slots < moe.num_experts or num_slots % ep_size:
        fits = -(-max(num_slots, moe.num_experts) // ep_size) * ep_size
        raise ValueError(
            f"num_slots = {num_slots}: must be at least num_experts = {moe.num_experts} and divisible by "
            f"moe_expert_parallel_size = {ep_size}; {fits} would do"
        )


def _divides(field: str, value: int, name: str, parts: int) -> None:
    if value % parts:
        fits = [str(n) for n in range(1, parts + 1) if value % n == 0]
        raise ValueError(f"{field} = {value}: not divisible by {name} = {parts}; {', '.join(fits)} would do")
