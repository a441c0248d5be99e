"""The small families: shapes, residual streams, lookups, argmax."""

from __future__ import annotations

import math

import pytest
import torch

from dsv4c.ir.ops.hyper import CollapseStreams, ExpandStreams, MixStreams, SpreadStreams
from dsv4c.ir.ops.moe import Embedding, TakeAlong
from dsv4c.ir.ops.sample import Argmax
from dsv4c.ir.ops.shape import Concat, Reshape, Slice
from dsv4c.numerics.codec import Quantized, quantize, type_of
from dsv4c.reference import run
from dsv4c.types import BF16, F32, FP8_WEIGHT, KV_FP8, NVFP4, QuantFormat, QuantType


def ints(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def test_reshape_slice_concat() -> None:
    x = torch.arange(24).reshape(2, 12)
    assert torch.equal(run(Reshape(shape=(4, 6)), x), torch.arange(24).reshape(4, 6))
    assert run(Slice(axis=1, start=2, stop=4), x).tolist() == [[2, 3], [14, 15]]
    assert run(Slice(axis=-1, start=0, stop=1), x).tolist() == [[0], [12]]
    assert torch.equal(run(Concat(axis=1), x[:, :5], x[:, 5:6], x[:, 6:]), x)


@pytest.mark.parametrize(("format", "axis"), [(KV_FP8, 0), (KV_FP8, 1), (FP8_WEIGHT, 0), (NVFP4, 0)], ids=str)
def test_concat_of_quantized_values(format: QuantFormat, axis: int) -> None:
    shape = (2, 3, 4, 128) if axis == 1 else (2, 4, 128)
    a, b = quantize(torch.randn(shape), format), quantize(torch.randn(shape), format)
    joined = run(Concat(axis=axis), a, b)
    assert isinstance(joined, Quantized)
    doubled = tuple(n * 2 if i == axis else n for i, n in enumerate(shape))
    assert type_of(joined) == QuantType(format, doubled)
    for part, first, second in zip(joined.parts, a.parts, b.parts, strict=True):
        assert torch.equal(part.float(), torch.cat([first.float(), second.float()], axis))


def test_streams() -> None:
    h, x = torch.randn(3, 8).to(torch.bfloat16), torch.randn(3, 4, 8).to(torch.bfloat16)
    assert torch.equal(run(ExpandStreams(streams=4), h), torch.stack([h] * 4, dim=1))
    weights, comb, post = torch.rand(3, 4), torch.rand(3, 4, 4), torch.rand(3, 4)
    wide = x.double()
    collapsed = torch.einsum("ns,nsh->nh", weights.double(), wide)
    assert torch.equal(run(CollapseStreams(out=F32), x, weights), collapsed.float())
    assert run(CollapseStreams(out=BF16), x, weights).dtype is torch.bfloat16
    mixed = run(MixStreams(), x, comb)
    assert mixed.dtype is torch.float32
    for k in range(4):  # comb[j, k]: from stream j to stream k
        expected = sum(comb[:, j, k, None].double() * wide[:, j] for j in range(4))
        torch.testing.assert_close(mixed[:, k].double(), expected, rtol=1e-6, atol=1e-6)
    spread = run(SpreadStreams(), h, post)
    assert torch.equal(spread, (post.double()[:, :, None] * h.double()[:, None]).float())


def test_embedding_serves_tokens_and_the_hash_router() -> None:
    table = torch.randn(10, 4).to(torch.bfloat16)
    assert torch.equal(run(Embedding(), table, ints([3, 0, 9])[0]), table[[3, 0, 9]])
    experts = torch.randint(0, 6, (10, 2), dtype=torch.int32)
    chosen = run(Embedding(), experts, ints([7, 7])[0])
    assert chosen.dtype is torch.int32
    assert torch.equal(chosen, experts[[7, 7]])


@pytest.mark.parametrize("bad", [-1, 10])
def test_lookups_do_not_wrap_around(bad: int) -> None:
    with pytest.raises(IndexError, match="in a table of 10"):
        run(Embedding(), torch.zeros(10, 4), ints([0, bad])[0])
    with pytest.raises(IndexError, match="in a table of 10"):
        run(TakeAlong(), torch.zeros(10), ints([0, bad]))


def test_take_along() -> None:
    x, index = torch.randn(3, 6), ints([5, 0], [1, 1], [2, 4])
    expected = [[x[n, j].item() for j in row] for n, row in enumerate(index.tolist())]
    assert run(TakeAlong(), x, index).tolist() == expected
    assert run(TakeAlong(), x[0], index).tolist() == [[x[0, j].item() for j in row] for row in index.tolist()]


def test_argmax_takes_the_lowest_of_equals() -> None:
    logits = torch.zeros(4, 1000)
    logits[0, [900, 30, 500]] = 2.0
    logits[1] = -math.inf
    logits[2, 999] = 1e-30
    logits[3, 7] = math.nan
    best = run(Argmax(), logits)
    assert best.dtype is torch.int32
    assert best.tolist() == [30, 0, 999, 7]
