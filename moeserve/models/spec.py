"""What a model is, as data: sizes and kinds of its layers. Knows no tensor, no rank and no file."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class YarnScaling:
    factor: float
    original_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0  # 0: not given
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True

    def temperature(self, mscale: float) -> float:
        """YaRN's attention temperature (arXiv 2309.00071, section 3.3): 0.1 mscale ln(factor) + 1."""
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0


@dataclass(frozen=True)
class Llama3Scaling:
    factor: float
    original_positions: int
    low_freq_factor: float
    high_freq_factor: float


@dataclass(frozen=True)
class LinearScaling:
    factor: float


@dataclass(frozen=True)
class RopeSpec:
    """dim: rotated part of a head. interleaved: pairs are (2i, 2i + 1), otherwise (i, i + dim / 2)."""

    theta: float
    dim: int
    interleaved: bool = False
    scaling: YarnScaling | Llama3Scaling | LinearScaling | None = None


@dataclass(frozen=True)
class GroupedAttention:
    """Attention whose query heads share KV heads (GQA). window: positions a token sees; None is all."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    head_norm: bool = False  # RMS norm of each query and key head before the rotation
    window: int | None = None

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (MLA; DeepSeek-V2, arXiv 2405.04434). scale includes yarn's temperature."""

    num_heads: int
    q_lora_rank: int | None  # None: queries come straight from the hidden state
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    scale: float
    bias: bool = False  # of the down-projections and the output


@dataclass(frozen=True)
class DenseMlp:
    """SwiGLU: down(silu(gate x) * up x)."""

    intermediate_size: int
    bias: bool = False


@dataclass(frozen=True)
class Routing:
    """How a token chooses its experts.

    scoring: "softmax" or "sigmoid" of the logits. With correction_bias a learnt bias is added for the choice
    only. With num_groups > 1 only the groups_kept best groups of experts may be chosen, a group scoring the
    sum of its group_score_terms best experts. normalize: weights of the chosen sum to 1; then all are
    multiplied by scaling. float32_logits: logits are computed in float32, otherwise in the model's dtype.
    """

    scoring: str
    top_k: int
    num_groups: int = 1
    groups_kept: int = 1
    group_score_terms: int = 1
    correction_bias: bool = False
    normalize: bool = False
    scaling: float = 1.0
    float32_logits: bool = False


@dataclass(frozen=True)
class ExpertNames:
    """How a checkpoint calls the tensors of a MoE block."""

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True)
class MoeMlp:
    """SwiGLU experts, and one shared SwiGLU MLP of shared_size (0: none) that every token passes."""

    num_experts: int
    intermediate_size: int
    routing: Routing
    shared_size: int = 0
    names: ExpertNames = ExpertNames()


@dataclass(frozen=True)
class LayerSpec:
    attention: GroupedAttention | LatentAttention
    feed_forward: DenseMlp | MoeMlp


@dataclass(frozen=True)
class BlockFp8:
    """Weights stored as float8 e4m3 with one float32 scale for each block of rows x columns."""

    rows: int
    columns: int


@dataclass(frozen=True)
class ModelSpec:
    architecture: str
    hidden_size: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope: RopeSpec
    layers: tuple[LayerSpec, ...]
    tied_embeddings: bool
    dtype: str  # of the checkpoint: "bfloat16", "float16" or "float32"
    quantization: BlockFp8 | None = None

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Absolute ids of the MoE layers, ascending."""
        return tuple(i for i, layer in enumerate(self.layers) if isinstance(layer.feed_forward, MoeMlp))

    @property
    def moe(self) -> MoeMlp | None:
        """The experts' spec, the same in every MoE layer; None for a dense model."""
        return next((x.feed_forward for x in self.layers if isinstance(x.feed_forward, MoeMlp)), None)
