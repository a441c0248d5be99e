"""The KV compressor's pooling."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4c.ir.ops.compress import AddPositionBias, CompletedEntries, CompressPool
from dsv4c.reference.registry import meaning


@meaning(CompletedEntries)
def completed_entries(op: CompletedEntries, positions: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Of the entries that T tokens can reach from the first one, those whose last token is among them."""
    by_sequence = positions.reshape(-1, op.tokens)
    places = -(-op.tokens // op.ratio)
    first = by_sequence.masked_fill(by_sequence < 0, torch.iinfo(torch.int32).max).amin(1, keepdim=True)
    entries = first // op.ratio + torch.arange(places, dtype=torch.int32)
    last_token = (entries.to(torch.int64) + 1) * op.ratio - 1
    completes = last_token[:, :, None] == by_sequence[:, None, :]  # at most one token each
    slot = (completes * slots.reshape(-1, 1, op.tokens)).sum(-1, dtype=torch.int32)
    return torch.where(completes.any(-1), entries, -1).reshape(-1), slot.reshape(-1)


@meaning(CompressPool)
def compress_pool(op: CompressPool, kv: Tensor, score: Tensor, entries: Tensor, slots: Tensor) -> Tensor:
    _, ring, width = kv.shape
    first = entries.to(torch.int64)[:, None] * op.ratio
    current = first + torch.arange(op.ratio)
    windows = [(current, slice(0, width))]
    if op.overlap:
        windows = [(current - op.ratio, slice(0, width // 2)), (current, slice(width // 2, width))]

    def rows(buffer: Tensor, absent: float) -> Tensor:
        """The pooled tokens of each entry, [M, tokens, d]; tokens that do not exist read `absent`."""
        parts = []
        for tokens, channels in windows:
            chosen = buffer[slots[:, None], tokens % ring][..., channels].to(torch.float64)
            exists = (tokens >= 0) & (entries >= 0)[:, None]
            parts.append(torch.where(exists[..., None], chosen, absent))
        return torch.cat(parts, dim=1)

    weights = torch.softmax(rows(score, -torch.inf), dim=1)
    pooled = (weights * rows(kv, 0.0)).sum(1)
    return torch.where((entries >= 0)[:, None], pooled, 0.0).to(torch.float32)


@meaning(AddPositionBias)
def add_position_bias(op: AddPositionBias, score: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
    return score + bias[positions.to(torch.int64) % bias.shape[0]]
