"""Index lists, gather, and attention against a per-token loop; garbage in the cache must not show."""

from __future__ import annotations

import math

import pytest
import torch

from dsv4c.ir.ops.attention import (
    AttentionScores,
    AttentionValues,
    Gather,
    SinkSoftmax,
    VisibleEntries,
    WindowIndex,
)
from dsv4c.ir.ops.quant import Dequantize
from dsv4c.numerics.codec import Quantized, dequantize, nan_fill, quantize
from dsv4c.reference import run
from dsv4c.types import BF16, F32, KV_FP8


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_window_index() -> None:
    index = run(WindowIndex(window=4), ints(-1, 0, 2, 3, 5, 1_048_575))
    assert index.dtype is torch.int32
    assert index.tolist() == [
        [-1, -1, -1, -1],
        [0, -1, -1, -1],
        [0, 1, 2, -1],
        [0, 1, 2, 3],
        [4, 5, 2, 3],
        [1_048_572, 1_048_573, 1_048_574, 1_048_575],
    ]


def test_visible_entries() -> None:
    index = run(VisibleEntries(ratio=4, capacity=3), ints(-1, 0, 2, 3, 6, 7, 11, 100))
    assert index.dtype is torch.int32
    assert [[w for w in row if w >= 0] for row in index.tolist()] == [
        [], [], [], [0], [0], [0, 1], [0, 1, 2], [0, 1, 2],
    ]  # fmt: skip


@pytest.mark.parametrize("quantized", [False, True])
def test_gather_takes_rows_of_the_own_slot(quantized: bool) -> None:
    rows = torch.randn(2, 8, 128).to(torch.bfloat16)
    cache = quantize(rows, KV_FP8) if quantized else rows
    exact = dequantize(cache, torch.bfloat16) if quantized else rows
    index = ints(0, 9, -1, 7, 3, 15).reshape(2, 3)  # places wrap modulo 8
    keys = run(Gather(), cache, index, ints(1, 0))
    keys = run(Dequantize(out=BF16), keys) if quantized else keys
    assert torch.equal(keys[0], torch.stack([exact[1, 0], exact[1, 1], torch.zeros(128)]).to(torch.bfloat16))
    assert torch.equal(keys[1], torch.stack([exact[0, 7], exact[0, 3], exact[0, 7]]))


@pytest.mark.parametrize("quantized", [False, True])
def test_gather_of_nothing_is_zero_even_from_nan(quantized: bool) -> None:
    cache: torch.Tensor | Quantized = torch.randn(1, 4, 128).to(torch.bfloat16)
    cache = quantize(cache, KV_FP8) if quantized else cache
    nan_fill(cache)
    keys = run(Gather(), cache, torch.full((2, 3), -1, dtype=torch.int32), ints(0, 0))
    keys = dequantize(keys) if isinstance(keys, Quantized) else keys
    assert torch.equal(keys.float(), torch.zeros(2, 3, 128))


def attend(
    q: torch.Tensor, keys: torch.Tensor, index: torch.Tensor, sink: torch.Tensor, scale: float
) -> torch.Tensor:
    scores = run(AttentionScores(scale=scale), q, keys, index)
    p, denominator = run(SinkSoftmax(out=F32), scores, sink)
    return run(AttentionValues(), p, denominator, keys)


def test_attention_is_softmax_with_an_extra_logit() -> None:
    q, keys, sink = torch.randn(3, 2, 16), torch.randn(3, 5, 16), torch.tensor([0.5, -2.0])
    index = ints(0, 1, 2, 3, 4, 0, -1, 2, -1, -1, -1, -1, -1, -1, 4).reshape(3, 5)
    y = attend(q, keys, index, sink, 0.25)
    for n in range(3):
        for h in range(2):
            seen = [j for j in range(5) if index[n, j] >= 0]
            logits = [float(q[n, h].double() @ keys[n, j].double()) * 0.25 for j in seen]
            total = math.exp(sink[h].item()) + sum(map(math.exp, logits))
            weights = torch.tensor([math.exp(v) / total for v in logits], dtype=torch.float64)
            expected = (weights[:, None] * keys[n, seen].double()).sum(0)
            torch.testing.assert_close(y[n, h].double(), expected, rtol=1e-5, atol=1e-7)


def test_a_row_without_keys_is_zero() -> None:
    index = torch.full((2, 4), -1, dtype=torch.int32)
    keys = run(Gather(), torch.full((1, 4, 16), math.nan), index, ints(0, 0))
    y = attend(torch.randn(2, 3, 16), keys, index, torch.tensor([0.0, 100.0, -100.0]), 1.0)
    assert torch.equal(y, torch.zeros(2, 3, 16))


def test_probabilities_are_rounded_and_their_sum_is_not() -> None:
    scores, sink = torch.randn(2, 3, 40) * 4, torch.randn(3)
    p, denominator = run(SinkSoftmax(out=BF16), scores, sink)
    wide, same = run(SinkSoftmax(out=F32), scores, sink)
    assert torch.equal(p, wide.to(torch.bfloat16))
    assert torch.equal(denominator, same)
    assert wide.amax(-1).tolist() == [[1.0] * 3] * 2  # the maximum runs over keys, not over the sink
    largest = scores.amax(-1)
    expected = (scores - largest[..., None]).double().exp().sum(-1) + (sink - largest).double().exp()
    torch.testing.assert_close(denominator.double(), expected, rtol=1e-6, atol=0)


def test_a_dominant_sink_silences_the_row() -> None:
    scores = torch.full((1, 1, 4), -200.0)
    p, denominator = run(SinkSoftmax(out=BF16), scores, torch.tensor([100.0]))
    y = run(AttentionValues(), p, denominator, torch.randn(1, 4, 8))
    assert torch.equal(y, torch.zeros(1, 1, 8))


def test_unwritten_slots_do_not_leak() -> None:
    """A ring with three tokens, the rest NaN: attention at position 2 sees exactly those."""
    ring = torch.full((1, 8, 16), math.nan)
    ring[0, :3] = torch.randn(3, 16)
    positions = ints(2)
    index = run(WindowIndex(window=4), positions)
    y = attend(torch.randn(1, 2, 16), run(Gather(), ring, index, ints(0)), index, torch.zeros(2), 1.0)
    assert y.isfinite().all()
    assert (y != 0).any()
