"""The compressor's pooling against a per-entry, per-channel loop."""

from __future__ import annotations

import math

import pytest
import torch

from dsv4c.ir.ops.compress import CompletedEntries, CompressPool
from dsv4c.reference import run


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("tokens", [1, 3, 4, 9, 130])
@pytest.mark.parametrize("start", [0, 1, 3, 127, 1000])
@pytest.mark.parametrize("missing", [0, 1, 200])
def test_completed_entries(ratio: int, tokens: int, start: int, missing: int) -> None:
    length = max(0, tokens - missing)
    row = [start + t if t < length else -1 for t in range(tokens)]
    entries, slots = run(CompletedEntries(ratio=ratio, tokens=tokens), ints(*row), ints(*[5] * tokens))
    assert entries.dtype is slots.dtype is torch.int32
    assert entries.shape == slots.shape == (-(-tokens // ratio),)
    expected = [p // ratio for p in row if p >= 0 and p % ratio == ratio - 1]
    assert [w for w in entries.tolist() if w >= 0] == expected
    assert all(w == -1 for w in entries.tolist()[len(expected) :])
    assert slots.tolist() == [5 if w >= 0 else 0 for w in entries.tolist()]


def test_completed_entries_of_two_sequences() -> None:
    op, slots = CompletedEntries(ratio=4, tokens=4), ints(3, 3, 3, 3, 1, 1, 1, 1)
    entries, places = run(op, ints(2, 3, 4, 5, 6, -1, -1, -1), slots)
    assert (entries.tolist(), places.tolist()) == ([0, -1], [3, 0])
    entries, places = run(op, ints(2, -1, -1, -1, 7, 8, 9, 10), slots)
    assert (entries.tolist(), places.tolist()) == ([-1, 1], [0, 1])


def naive_pool(kv: torch.Tensor, score: torch.Tensor, entry: int, ratio: int, overlap: bool) -> torch.Tensor:
    ring, width = kv.shape
    d = width // 2 if overlap else width
    slots = [(p, 0) for p in range(entry * ratio, (entry + 1) * ratio)]
    if overlap:
        slots = [(p - ratio, 0) for p, _ in slots] + [(p, d) for p, _ in slots]
    result = torch.zeros(d, dtype=torch.float64)
    for channel in range(d):
        seen = [(p % ring, offset + channel) for p, offset in slots if p >= 0]
        scores = [score[place].item() for place in seen]
        top = max(scores)
        weights = [math.exp(s - top) for s in scores]
        result[channel] = sum(w * kv[place].item() for w, place in zip(weights, seen, strict=True)) / sum(
            weights
        )
    return result


@pytest.mark.parametrize(
    ("ratio", "overlap", "ring"), [(4, True, 8), (4, True, 20), (8, False, 8), (8, False, 24)]
)
def test_pool(ratio: int, overlap: bool, ring: int) -> None:
    kv, score = torch.randn(2, ring, 6), torch.randn(2, ring, 6) * 5
    entries = ints(3, -1, 0, 17)
    pooled = run(CompressPool(ratio, overlap, tokens=4), kv, score, entries, ints(1, 0, 0, 1))
    assert pooled.shape == (4, 3 if overlap else 6)
    assert torch.equal(pooled[1], torch.zeros_like(pooled[1]))
    for row, (sequence, entry) in {0: (1, 3), 2: (0, 0), 3: (1, 17)}.items():
        expected = naive_pool(kv[sequence], score[sequence], entry, ratio, overlap)
        torch.testing.assert_close(pooled[row].double(), expected, rtol=1e-6, atol=1e-7)


def test_tokens_before_the_start_weigh_nothing_even_as_nan() -> None:
    kv, score = torch.full((1, 8, 6), math.nan), torch.full((1, 8, 6), math.nan)
    kv[:, :4], score[:, :4] = torch.randn(1, 4, 6), torch.randn(1, 4, 6)
    pooled = run(CompressPool(ratio=4, overlap=True, tokens=4), kv, score, ints(0), ints(0))
    expected = naive_pool(kv[0], score[0], 0, 4, True)
    torch.testing.assert_close(pooled[0].double(), expected, rtol=1e-6, atol=1e-7)


def test_no_entry_pools_to_zero_from_a_poisoned_ring() -> None:
    poisoned = torch.full((2, 8, 6), math.nan)
    pooled = run(
        CompressPool(ratio=4, overlap=True, tokens=4),
        poisoned,
        poisoned,
        ints(-1, -1, -1, -1),
        ints(0, 0, 0, 0),
    )
    assert torch.equal(pooled, torch.zeros(4, 3))
