"""The table of rotary angles, with the ways to stretch it: yarn, llama3, linear.

Sources: YaRN, arXiv 2309.00071; llama3 scaling as published with Llama 3.1. The arithmetic follows
transformers' modeling_rope_utils, bit for bit where float32 allows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moeserve.models.spec import LinearScaling, Llama3Scaling, RopeSpec, YarnScaling


def cos_sin_table(rope: RopeSpec, max_positions: int, device: torch.device | str) -> Tensor:
    """float32 [max_positions, dim]: the cosines of the dim / 2 angles of each position, then their sines."""
    frequencies = inverse_frequencies(rope)
    angles = torch.arange(max_positions, dtype=torch.float32).unsqueeze(1) * frequencies
    factor = attention_factor(rope)
    return torch.cat((angles.cos() * factor, angles.sin() * factor), dim=1).to(device)


def inverse_frequencies(rope: RopeSpec) -> Tensor:
    """float32 [dim / 2]: radians a position."""
    wavelengths = rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim)
    plain = 1.0 / wavelengths
    if isinstance(rope.scaling, YarnScaling):
        return _yarn(plain, wavelengths, rope, rope.scaling)
    if isinstance(rope.scaling, Llama3Scaling):
        return _llama3(plain, rope.scaling)
    if isinstance(rope.scaling, LinearScaling):
        return plain / rope.scaling.factor
    return plain


def attention_factor(rope: RopeSpec) -> float:
    """What the cosines and sines are multiplied by (1 but for yarn)."""
    scaling = rope.scaling
    if not isinstance(scaling, YarnScaling):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return scaling.temperature(scaling.mscale) / scaling.temperature(scaling.mscale_all_dim)
    return scaling.temperature(1.0)


def _yarn(plain: Tensor, wavelengths: Tensor, rope: RopeSpec, scaling: YarnScaling) -> Tensor:
    """High frequencies stay, low ones are divided by factor, a linear ramp between."""

    def dim_of(rotations: float) -> float:
        span = scaling.original_positions / (rotations * 2 * math.pi)
        return rope.dim * math.log(span) / (2 * math.log(rope.theta))

    low, high = dim_of(scaling.beta_fast), dim_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    high += 0.001 if low == high else 0.0
    ramp = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (scaling.factor * wavelengths) * (1 - kept) + plain * kept


def _llama3(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Wavelengths beyond original / low are stretched, those below original / high stay, smooth between."""
    wavelength = 2 * math.pi / plain
    long = wavelength > scaling.original_positions / scaling.low_freq_factor
    short = wavelength < scaling.original_positions / scaling.high_freq_factor
    span = scaling.high_freq_factor - scaling.low_freq_factor
    smooth = (scaling.original_positions / wavelength - scaling.low_freq_factor) / span
    between = (1 - smooth) * plain / scaling.factor + smooth * plain
    return torch.where(long, plain / scaling.factor, torch.where(short, plain, between))
