"""Rotary embedding in f32, with the tables of `precompute_freqs_cis` in DeepSeek-V4 `inference/model.py`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv4c.ir.ops.rope import Rope, RopeFrequencies
from dsv4c.reference.registry import meaning


@meaning(RopeFrequencies)
def rope_frequencies(op: RopeFrequencies) -> Tensor:
    """theta^(-2i/dims); YaRN divides slow pairs by `factor`, keeps fast ones, and blends in between.

    Every step is rounded to f32: at position 1e6 the last bit of a frequency moves its angle by 0.06.
    """
    exponents = torch.arange(0, op.dims, 2, dtype=torch.float32) / op.dims
    powers = (op.theta ** exponents.to(torch.float64)).to(torch.float32)
    frequencies = 1.0 / powers
    if op.factor == 1:
        return frequencies
    low = max(math.floor(_pair_of(op.beta_fast, op)), 0)
    high = min(math.ceil(_pair_of(op.beta_slow, op)), op.dims - 1)
    span = high - low if high != low else 0.001
    slow = ((torch.arange(op.dims // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    fast = 1 - slow
    return frequencies / op.factor * (1 - fast) + frequencies * fast


def _pair_of(turns: float, op: RopeFrequencies) -> float:
    """The (fractional) pair that makes `turns` turns over the original context."""
    wavelengths = op.original_max_position / (turns * 2 * math.pi)
    return op.dims * math.log(wavelengths) / (2 * math.log(op.theta))


@meaning(Rope)
def rope(op: Rope, x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    pairs = frequencies.shape[0]
    angle = (positions * op.stride).to(torch.float32)[:, None] * frequencies
    angle = angle.reshape(-1, *[1] * (x.ndim - 2), pairs)
    wide = (-angle if op.inverse else angle).to(
        torch.float64
    )  # cosine and sine of the f32 angle, rounded once
    cos, sin = wide.cos().to(torch.float32), wide.sin().to(torch.float32)
    plain, rotated = x[..., : -2 * pairs], x[..., -2 * pairs :].to(torch.float32)
    even, odd = rotated[..., 0::2], rotated[..., 1::2]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
    return torch.cat([plain, turned.to(x.dtype)], dim=-1)
