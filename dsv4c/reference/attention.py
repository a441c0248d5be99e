"""Attention over gathered keys.

Positions alone decide what is seen: cache rows that no index names may hold anything, NaN included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4c.ir.ops.attention import (
    AttentionScores,
    AttentionValues,
    Gather,
    SinkSoftmax,
    VisibleEntries,
    WindowIndex,
)
from dsv4c.numerics.codec import TORCH_DTYPES, Quantized, Value, round_once
from dsv4c.reference.registry import meaning


@meaning(WindowIndex)
def window_index(op: WindowIndex, positions: Tensor) -> Tensor:
    slots = torch.arange(op.window, dtype=torch.int32)
    last = (
        positions[:, None] - (positions[:, None] - slots) % op.window
    )  # latest p <= t with p % window = slot
    return torch.where((last >= 0) & (positions[:, None] >= 0), last, -1)


@meaning(VisibleEntries)
def visible_entries(op: VisibleEntries, positions: Tensor) -> Tensor:
    entries = torch.arange(op.capacity, dtype=torch.int32)
    return torch.where(entries < complete(positions, op.ratio)[:, None], entries, -1)


def complete(positions: Tensor, ratio: int) -> Tensor:
    """How many entries of `ratio` tokens are complete at each position; none without a token."""
    return torch.where(positions < 0, 0, (positions + 1) // ratio)


@meaning(Gather)
def gather(op: Gather, cache: Value, index: Tensor, slots: Tensor) -> Value:
    def take(part: Tensor) -> Tensor:
        chosen = part[slots[:, None], index % cache.shape[1]]
        absent = (index < 0).reshape(*index.shape, *[1] * (chosen.ndim - 2))
        return torch.where(absent, torch.zeros((), dtype=part.dtype), chosen)

    return cache.map(take) if isinstance(cache, Quantized) else take(cache)


@meaning(AttentionScores)
def attention_scores(op: AttentionScores, q: Tensor, keys: Tensor, index: Tensor) -> Tensor:
    dots = q.to(torch.float64) @ keys.to(torch.float64).mT
    return (dots * op.scale).to(torch.float32).masked_fill((index < 0)[:, None, :], -torch.inf)


@meaning(SinkSoftmax)
def sink_softmax(op: SinkSoftmax, scores: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """A row without keys gets p = 0 and the denominator exp(sink): its values come out as 0."""
    largest = scores.amax(-1, keepdim=True)
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    p = (scores - largest).to(torch.float64).exp().to(torch.float32)
    of_sink = (sink[None, :] - largest[..., 0]).to(torch.float64).exp()
    denominator = p.to(torch.float64).sum(-1) + of_sink
    return p.to(TORCH_DTYPES[op.out]), denominator.to(torch.float32)


@meaning(AttentionValues)
def attention_values(op: AttentionValues, p: Tensor, denominator: Tensor, keys: Tensor) -> Tensor:
    weighted = p.to(torch.float64) @ keys.to(torch.float64)
    return round_once(weighted / denominator.to(torch.float64)[..., None], keys.dtype)
