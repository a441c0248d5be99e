"""Index scores against a loop with the model's roundings; selection against a sort by hand."""

from __future__ import annotations

import math

import pytest
import torch

from dsv4c.ir.ops.index import IndexScores, TopK
from dsv4c.numerics.codec import dequantize, nan_fill, quantize
from dsv4c.reference import run
from dsv4c.types import MXFP4


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_scores_in_f32() -> None:
    q, keys, weights = torch.randn(4, 3, 32), torch.randn(2, 5, 32), torch.randn(4, 3)
    scores = run(IndexScores(ratio=4), q, keys, weights, ints(3, 19, 7, -1), ints(1, 0, 1, 0))
    assert scores.dtype is torch.float32
    visible = [1, 5, 2, 0]
    for n in range(4):
        dots = (q[n].double() @ keys[1 - n % 2].double().T).relu()
        expected = (dots * weights[n].double()[:, None]).sum(0)
        torch.testing.assert_close(
            scores[n, : visible[n]].double(), expected[: visible[n]], rtol=1e-5, atol=1e-6
        )
        assert (scores[n, visible[n] :] == -math.inf).all()


@pytest.mark.parametrize("quantized", [False, True])
def test_scores_in_bf16_steps(quantized: bool) -> None:
    q, keys = torch.randn(3, 4, 64).to(torch.bfloat16), torch.randn(1, 6, 64).to(torch.bfloat16)
    weights = torch.randn(3, 4).to(torch.bfloat16)
    operands = (quantize(q, MXFP4), quantize(keys, MXFP4)) if quantized else (q, keys)
    exact = [dequantize(o, torch.float64) if quantized else o.double() for o in operands]
    scores = run(IndexScores(ratio=2), *operands, weights, ints(11, 11, 11), ints(0, 0, 0))
    for n in range(3):
        dots = (exact[0][n] @ exact[1][0].T).to(torch.float32).to(torch.bfloat16).relu()
        products = dots * weights[n][:, None]
        assert torch.equal(scores[n], products.double().sum(0).to(torch.bfloat16).float())


@pytest.mark.parametrize("quantized", [False, True])
def test_unwritten_keys_do_not_leak(quantized: bool) -> None:
    q, keys = torch.randn(2, 4, 64).to(torch.bfloat16), torch.randn(1, 6, 64).to(torch.bfloat16)
    fresh = quantize(torch.randn(1, 6, 64), MXFP4) if quantized else torch.randn(1, 6, 64).to(torch.bfloat16)
    nan_fill(fresh)
    written = quantize(keys, MXFP4) if quantized else keys
    for target, source in zip(
        fresh.parts if quantized else (fresh,), written.parts if quantized else (written,), strict=True
    ):
        target[:, :2] = source[:, :2]
    scores = run(IndexScores(ratio=4), q, fresh, torch.randn(2, 4), ints(8, -1), ints(0, 0))
    assert scores[0, :2].isfinite().all()
    assert (scores[0, 2:] == -math.inf).all()
    assert (scores[1] == -math.inf).all()


def test_top_k_is_ascending_padded_and_prefers_lower_columns() -> None:
    inf = -math.inf
    scores = torch.tensor(
        [
            [1.0, 5.0, 3.0, 5.0, 2.0],
            [1.0, 1.0, 1.0, 1.0, 1.0],
            [inf, 0.5, inf, -9.0, inf],
            [inf, inf, inf, inf, inf],
            [0.0, -0.0, 0.0, 1.0, -0.0],
        ]
    )
    chosen = run(TopK(k=3), scores)
    assert chosen.dtype is torch.int32
    assert chosen.tolist() == [[1, 2, 3], [0, 1, 2], [1, 3, -1], [-1, -1, -1], [0, 1, 3]]


def test_top_k_of_fewer_columns_than_k() -> None:
    assert run(TopK(k=8), torch.tensor([[2.0, -math.inf, 1.0]])).tolist() == [[0, 2, -1]]


def test_top_k_against_sorting_by_hand() -> None:
    scores = torch.randint(0, 20, (50, 40)).float()
    for row, chosen in zip(scores.tolist(), run(TopK(k=7), scores).tolist(), strict=True):
        assert chosen == sorted(sorted(range(40), key=lambda c: (-row[c], c))[:7])
