"""State: writes happen in place, and the written tensors come back."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4c.ir.ops.state import Advance, CacheWrite, Positions
from dsv4c.numerics.codec import Quantized, Value
from dsv4c.reference.registry import meaning


@meaning(CacheWrite)
def cache_write(op: CacheWrite, cache: Value, rows: Value, index: Tensor) -> Value:
    """Of two rows for the same slot the later one stays."""
    sequences, slots = cache.shape[:2]
    order = torch.arange(index.numel())
    place = order // max(1, index.numel() // sequences) * slots + index % slots
    kept = index >= 0
    last = torch.full((sequences * slots,), -1).scatter_reduce(0, place[kept], order[kept], "amax")
    written = (last >= 0).nonzero()[:, 0]
    targets = cache.parts if isinstance(cache, Quantized) else (cache,)
    sources = rows.parts if isinstance(rows, Quantized) else (rows,)
    for target, source in zip(targets, sources, strict=True):
        target[written // slots, written % slots] = source[last[written]]
    return cache


@meaning(Positions)
def positions(op: Positions, start: Tensor, lengths: Tensor) -> Tensor:
    step = torch.arange(op.tokens, dtype=torch.int32)
    return torch.where(step < lengths[:, None], start[:, None] + step, -1).reshape(-1)


@meaning(Advance)
def advance(op: Advance, start: Tensor, lengths: Tensor) -> Tensor:
    return start.add_(lengths)
