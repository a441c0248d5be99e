"""Writes to state happen in place, at the named places of the named slots and nowhere else."""

from __future__ import annotations

import pytest
import torch

from dsv4c.ir.ops.state import Advance, CacheExtend, CacheWrite, Owners, Positions
from dsv4c.numerics.codec import Quantized, quantize, view
from dsv4c.reference import run
from dsv4c.types import KV_FP8, MXFP4, QuantFormat, QuantType


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_rows_go_to_their_slots() -> None:
    cache, rows = torch.zeros(3, 4, 3), torch.arange(1.0, 7.0)[:, None].expand(6, 3)
    result = run(CacheWrite(), cache, rows, ints(0, -1, 5, 3, 2, -7), ints(2, 0, 2, 0, 0, 0))
    assert result is cache
    assert cache[..., 0].tolist() == [[0, 0, 5, 4], [0, 0, 0, 0], [1, 3, 0, 0]]


@pytest.mark.parametrize("format", [KV_FP8, MXFP4], ids=str)
def test_quantized_rows_go_with_all_their_parts(format: QuantFormat) -> None:
    type_ = QuantType(format, (2, 4, 128))
    storage = torch.zeros(type_.extent, dtype=torch.uint8)
    cache = view(storage, type_)
    rows = quantize(torch.randn(4, 128), format)
    run(CacheWrite(), cache, rows, ints(6, -1, 0, 1), ints(0, 0, 1, 1))
    again = view(storage, type_)
    assert isinstance(again, Quantized)
    for part, source in zip(again.parts, rows.parts, strict=True):
        assert torch.equal(part[0, 2].float(), source[0].float())
        assert torch.equal(part[1, :2].float(), source[2:].float())
        assert not part[0, [0, 1, 3]].float().any()
        assert not part[1, 2:].float().any()


def test_the_later_of_two_rows_stays() -> None:
    cache = torch.zeros(1, 4)
    run(CacheWrite(), cache, torch.arange(1.0, 101.0), torch.arange(100).int(), torch.zeros(100).int())
    assert cache.tolist() == [[97, 98, 99, 100]]
    run(CacheWrite(), cache, torch.tensor([1.0, 2.0, 3.0]), ints(1, 5, -1), ints(0, 0, 0))
    assert cache.tolist() == [[97, 2, 99, 100]]


def test_nothing_to_write() -> None:
    cache = torch.full((2, 3), 7.0)
    run(CacheWrite(), cache, torch.zeros(2), ints(-1, -1), ints(0, 0))
    assert (cache == 7).all()


def test_positions() -> None:
    result, slots = run(Positions(tokens=3), ints(9, 10, 5, 0), ints(3, 1, -1), ints(3, 1, 0))
    assert result.dtype is slots.dtype is torch.int32
    assert result.tolist() == [0, 1, 2, 10, -1, -1, -1, -1, -1]
    assert slots.tolist() == [3, 3, 3, 1, 0, 0, 0, 0, 0]


def test_owners() -> None:
    owners = run(Owners(tokens=3), ints(3, 0))
    assert owners.dtype is torch.int32
    assert owners.tolist() == [0, 0, 0, 1, 1, 1]


def test_advance_is_in_place() -> None:
    start = ints(0, 10, 20)
    assert run(Advance(), start, ints(2, -1, 0), ints(3, 0, 1)) is start
    assert start.tolist() == [1, 10, 23]
    assert start.dtype is torch.int32


def ring_at(position: int, capacity: int) -> torch.Tensor:
    """A ring [capacity, 2] that remembers the positions before `position`, each as its own number."""
    ring = torch.full((capacity, 2), torch.nan)
    for p in range(max(0, position - capacity), position):
        ring[p % capacity] = p
    return ring


@pytest.mark.parametrize("capacity", [5, 6, 9, 16])
@pytest.mark.parametrize("starts", [(0, 0), (1, 7), (5, 23)])
@pytest.mark.parametrize("lengths", [(5, 1), (0, 5), (3, 4)])
def test_a_ring_with_the_rows_of_a_call(
    capacity: int, starts: tuple[int, int], lengths: tuple[int, int]
) -> None:
    """Each sequence's last positions, as many as there is room for and the ring remembers."""
    slots = (2, 0)
    cache = torch.stack([ring_at(starts[slots.index(s)] if s in slots else 0, 6) for s in range(3)])
    before = cache.clone()
    start = torch.zeros(3, dtype=torch.int32)
    start[list(slots)] = ints(*starts)
    positions, row_slots = run(Positions(tokens=5), start, ints(*slots), ints(*lengths))
    rows = positions[:, None].expand(-1, 2).float()
    op = CacheExtend(capacity=capacity, tokens=5)
    extended = run(op, cache, rows, positions, row_slots)
    assert extended.shape == (2, capacity, 2)
    for sequence, (first, length) in enumerate(zip(starts, lengths, strict=True)):
        expected = torch.zeros(capacity)
        for p in range(max(0, first - 6), first + length) if length else ():
            expected[p % capacity] = p
        assert torch.equal(extended[sequence], expected[:, None].expand(-1, 2))
    assert torch.equal(cache.nan_to_num(-1), before.nan_to_num(-1))


def test_a_quantized_ring_with_the_rows_of_a_call() -> None:
    before, rows = torch.randn(1, 4, 128), torch.randn(3, 128)
    ring, added = quantize(before, KV_FP8), quantize(rows, KV_FP8)
    op = CacheExtend(capacity=8, tokens=3)
    extended = run(op, ring, added, ints(6, 7, 8), ints(0, 0, 0))
    assert isinstance(extended, Quantized)
    for joined, kept, new in zip(extended.parts, ring.parts, added.parts, strict=True):
        places = {2: kept[0, 2], 3: kept[0, 3], 4: kept[0, 0], 5: kept[0, 1], 6: new[0], 7: new[1], 0: new[2]}
        for place, row in places.items():
            assert torch.equal(joined[0, place].float(), row.float())
        assert not joined[0, 1].float().any()
