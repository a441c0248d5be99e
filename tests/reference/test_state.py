"""Writes to state happen in place, at the named slots and nowhere else."""

from __future__ import annotations

import pytest
import torch

from dsv4c.ir.ops.state import Advance, CacheWrite, Positions
from dsv4c.numerics.codec import Quantized, quantize, view
from dsv4c.reference import run
from dsv4c.types import KV_FP8, MXFP4, QuantFormat, QuantType


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_rows_go_to_their_slots() -> None:
    cache, rows = torch.zeros(2, 4, 3), torch.arange(1.0, 7.0)[:, None].expand(6, 3)
    result = run(CacheWrite(), cache, rows, ints(0, -1, 5, 3, 2, -7))
    assert result is cache
    assert cache[..., 0].tolist() == [[1, 3, 0, 0], [0, 0, 5, 4]]


@pytest.mark.parametrize("format", [KV_FP8, MXFP4], ids=str)
def test_quantized_rows_go_with_all_their_parts(format: QuantFormat) -> None:
    type_ = QuantType(format, (2, 4, 128))
    storage = torch.zeros(type_.extent, dtype=torch.uint8)
    cache = view(storage, type_)
    rows = quantize(torch.randn(4, 128), format)
    run(CacheWrite(), cache, rows, ints(6, -1, 0, 1))
    again = view(storage, type_)
    assert isinstance(again, Quantized)
    for part, source in zip(again.parts, rows.parts, strict=True):
        assert torch.equal(part[0, 2].float(), source[0].float())
        assert torch.equal(part[1, :2].float(), source[2:].float())
        assert not part[0, [0, 1, 3]].float().any()
        assert not part[1, 2:].float().any()


def test_the_later_of_two_rows_stays() -> None:
    cache = torch.zeros(1, 4)
    run(CacheWrite(), cache, torch.arange(1.0, 101.0), torch.arange(100, dtype=torch.int32))
    assert cache.tolist() == [[97, 98, 99, 100]]
    run(CacheWrite(), cache, torch.tensor([1.0, 2.0, 3.0]), ints(1, 5, -1))
    assert cache.tolist() == [[97, 2, 99, 100]]


def test_nothing_to_write() -> None:
    cache = torch.full((2, 3), 7.0)
    run(CacheWrite(), cache, torch.zeros(2), ints(-1, -1))
    assert (cache == 7).all()


def test_positions() -> None:
    result = run(Positions(tokens=3), ints(0, 10, 5), ints(3, 1, 0))
    assert result.dtype is torch.int32
    assert result.tolist() == [0, 1, 2, 10, -1, -1, -1, -1, -1]


def test_advance_is_in_place() -> None:
    start = ints(0, 10)
    assert run(Advance(), start, ints(3, 1)) is start
    assert start.tolist() == [3, 11]
    assert start.dtype is torch.int32
