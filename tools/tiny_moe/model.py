"""The training side of a tiny DeepSeek-V3. Names follow Hugging Face's `deepseek_v3`; experts are stacked.

Field names of `TinyConfig` are those of config.json. It knows no files and no optimiser.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class TinyConfig:
    vocab_size: int = 4096
    hidden_size: int = 128
    num_hidden_layers: int = 5
    first_k_dense_replace: int = 1
    intermediate_size: int = 384
    num_attention_heads: int = 4
    q_lora_rank: int = 64
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 16
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    n_routed_experts: int = 32
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 64
    n_group: int = 4
    topk_group: int = 2
    routed_scaling_factor: float = 2.0
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 1024


class TinyMoE(nn.Module):
    cos: Tensor  # [positions, rope head / 2]
    sin: Tensor

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        frequencies = config.rope_theta ** (
            -torch.arange(0, config.qk_rope_head_dim, 2) / config.qk_rope_head_dim
        )
        angles = torch.outer(torch.arange(config.max_position_embeddings).float(), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Unit-variance matrices, those that write into the residual stream scaled down by depth."""
        depth = 1 / math.sqrt(2 * self.config.num_hidden_layers)
        for name, p in self.named_parameters():
            if p.ndim < 2:
                continue
            std = 0.02 if "embed_tokens" in name or ".gate." in name else p.shape[-1] ** -0.5
            writes = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down"))
            nn.init.normal_(p, 0.0, std * depth if writes else std)

    @property
    def moe_blocks(self) -> list["MoE"]:
        return [m for m in self.modules() if isinstance(m, MoE)]

    def forward(self, ids: Tensor) -> Tensor:  # [B, T] -> logits [B, T, vocab]
        x = self.embed_tokens(ids)
        rope = self.cos[: ids.shape[1]].to(x.dtype), self.sin[: ids.shape[1]].to(x.dtype)
        for block in self.layers:
            x = block(x, rope)
        return F.linear(self.norm(x), self.embed_tokens.weight)


class Block(nn.Module):
    def __init__(self, config: TinyConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LatentAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        dense = index < config.first_k_dense_replace
        self.mlp = MLP(config.hidden_size, config.intermediate_size) if dense else MoE(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:  # [B, T, H]
        x = x + self.self_attn(self.input_layernorm(x), rope)
        return x + self.mlp(self.post_attention_layernorm(x))


class MLP(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1), not absorbed."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = c = config
        head = c.qk_nope_head_dim + c.qk_rope_head_dim
        self.q_a_proj = nn.Linear(c.hidden_size, c.q_lora_rank, bias=False)
        self.q_a_layernorm = nn.RMSNorm(c.q_lora_rank, c.rms_norm_eps)
        self.q_b_proj = nn.Linear(c.q_lora_rank, c.num_attention_heads * head, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(c.kv_lora_rank, c.rms_norm_eps)
        self.kv_b_proj = nn.Linear(
            c.kv_lora_rank, c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(c.num_attention_heads * c.v_head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:  # [B, T, H]
        c = self.config
        batch, length, _ = x.shape

        def heads(t: Tensor) -> Tensor:  # [B, T, heads * D] -> [B, heads, T, D]
            return t.view(batch, length, c.num_attention_heads, -1).transpose(1, 2)

        q = heads(self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))))
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        kv = heads(self.kv_b_proj(self.kv_a_layernorm(latent)))
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        k_rope = _rotate(k_rope.unsqueeze(1), *rope).expand(-1, c.num_attention_heads, -1, -1)
        q = torch.cat([q_nope, _rotate(q_rope, *rope)], -1)
        k = torch.cat([k_nope, k_rope], -1)
        # Plain masked softmax: at these lengths, on a CPU in bfloat16, twice as fast forward and backward as
        # scaled_dot_product_attention.
        mask = torch.full((length, length), float("-inf"), dtype=x.dtype).triu(1)
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2) + mask
        return self.o_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs; the result is in halves, which attention scores cannot see."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Gate(nn.Module):
    """Sigmoid scores, group-limited top-k by score plus correction bias (DeepSeek-V3, arXiv:2412.19437)."""

    e_score_correction_bias: Tensor  # [E]

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # [T, H] -> weights [T, K], experts [T, K]
        c = self.config
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        choice = scores.detach() + self.e_score_correction_bias
        groups = choice.view(-1, c.n_group, c.n_routed_experts // c.n_group)
        chosen = groups.topk(2, -1).values.sum(-1).topk(c.topk_group, -1, sorted=False).indices
        closed = torch.ones(groups.shape[:2], dtype=torch.bool).scatter_(1, chosen, False)
        choice = groups.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(1)
        experts = choice.topk(c.num_experts_per_tok, -1, sorted=False).indices
        weights = scores.gather(1, experts)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * c.routed_scaling_factor, experts


class Experts(nn.Module):
    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        num, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up = nn.Parameter(torch.empty(num, 2 * inner, hidden))
        self.down = nn.Parameter(torch.empty(num, hidden, inner))

    def forward(self, rows: Tensor, tokens_per_expert: Tensor) -> Tensor:  # rows [N, H] sorted by expert
        ends = tokens_per_expert.cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(rows, self.gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
        return F.grouped_mm(F.silu(gate) * up, self.down.transpose(1, 2), offs=ends)


class MoE(nn.Module):
    """`tokens_per_expert` is the load of the last forward pass, int64 [E]."""

    tokens_per_expert: Tensor

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = Gate(config)
        self.experts = Experts(config)
        self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, H]
        flat = x.flatten(0, 1)
        weights, experts = self.gate(flat)
        chosen = experts.flatten()
        order = chosen.argsort(stable=True)
        self.tokens_per_expert = torch.bincount(chosen, minlength=self.config.n_routed_experts)
        token = order // self.config.num_experts_per_tok
        rows = self.experts(flat[token], self.tokens_per_expert)
        rows = rows * weights.flatten()[order].unsqueeze(-1).to(rows.dtype)
        routed = torch.zeros_like(flat).index_add_(0, token, rows)
        return (routed + self.shared_experts(flat)).view_as(x)
