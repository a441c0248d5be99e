"""State: writes happen in place, and the written tensors come back."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4c.ir.ops.state import Advance, CacheExtend, CacheWrite, Owners, Positions
from dsv4c.numerics.codec import Quantized, Value, parts_of
from dsv4c.reference.registry import meaning


@meaning(CacheWrite)
def cache_write(op: CacheWrite, cache: Value, rows: Value, index: Tensor, slots: Tensor) -> Value:
    """Of two rows for the same place the later one stays."""
    count, capacity = cache.shape[:2]
    order = torch.arange(index.numel())
    place = slots.to(torch.int64) * capacity + index % capacity
    kept = index >= 0
    last = torch.full((count * capacity,), -1).scatter_reduce(0, place[kept], order[kept], "amax")
    written = (last >= 0).nonzero()[:, 0]
    for target, source in zip(parts_of(cache).values(), parts_of(rows).values(), strict=True):
        target[written // capacity, written % capacity] = source[last[written]]
    return cache


@meaning(CacheExtend)
def cache_extend(op: CacheExtend, cache: Value, rows: Value, positions: Tensor, slots: Tensor) -> Value:
    ring = cache.shape[1]
    by_sequence = positions.to(torch.int64).reshape(-1, op.tokens)
    last, at = by_sequence.max(1, keepdim=True)
    slot = slots.reshape(-1, op.tokens).gather(1, at)
    first = last + 1 - (by_sequence >= 0).sum(1, keepdim=True)
    held = last - (last - torch.arange(op.capacity)) % op.capacity  # the latest position of each residue
    new, old = held >= first, (held >= 0) & (held >= first - ring)
    row = torch.arange(by_sequence.shape[0])[:, None] * op.tokens + held - first

    def join(kept: Tensor, added: Tensor) -> Tensor:
        trailing = [1] * (kept.ndim - 2)
        of_ring, of_call = kept[slot, held % ring], added[torch.where(new, row, 0)]
        rest = torch.where(old.reshape(*old.shape, *trailing), of_ring, torch.zeros((), dtype=kept.dtype))
        return torch.where(new.reshape(*new.shape, *trailing), of_call, rest)

    if isinstance(cache, Tensor) and isinstance(rows, Tensor):
        return join(cache, rows)
    assert isinstance(cache, Quantized)
    assert isinstance(rows, Quantized)
    return cache.map(join, rows)


@meaning(Positions)
def positions(op: Positions, start: Tensor, slots: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    step = torch.arange(op.tokens, dtype=torch.int32)
    active = step < lengths[:, None]
    slot = torch.where(active, slots[:, None], 0)
    return torch.where(active, start[slot] + step, -1).reshape(-1), slot.reshape(-1)


@meaning(Owners)
def owners(op: Owners, lengths: Tensor) -> Tensor:
    return torch.arange(lengths.numel(), dtype=torch.int32).repeat_interleave(op.tokens)


@meaning(Advance)
def advance(op: Advance, start: Tensor, slots: Tensor, lengths: Tensor) -> Tensor:
    active = lengths > 0
    return start.index_add_(0, slots[active], lengths[active])
