"""The indexer: scores over all entries, and the best of them."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4c.ir.ops.index import IndexScores, TopK
from dsv4c.numerics.codec import Quantized, Value, round_once
from dsv4c.reference.attention import complete
from dsv4c.reference.linear import exact
from dsv4c.reference.registry import meaning


@meaning(IndexScores)
def index_scores(
    op: IndexScores, q: Value, keys: Value, weights: Tensor, positions: Tensor, slots: Tensor
) -> Tensor:
    """bf16 weights mean bf16 steps: the dots, the products and the sum over heads are each rounded; and bf16
    scores.
    """
    entries, queries = keys.shape[1], exact(q)
    dots = torch.empty(*q.shape[:2], entries, dtype=torch.float64)
    for slot in set(slots.tolist()):
        dots[slots == slot] = queries[slots == slot] @ exact(_of_slot(keys, slot)).mT
    steps = torch.bfloat16 if weights.dtype is torch.bfloat16 else torch.float64
    weighted = round_once(dots, steps).relu() * weights.to(steps)[..., None]
    scores = round_once(weighted.to(torch.float64).sum(1), steps)
    scores = scores if steps is torch.bfloat16 else scores.to(torch.float32)
    visible = torch.arange(entries) < complete(positions, op.ratio)[:, None]
    return torch.where(visible, scores, -torch.inf)


def _of_slot(keys: Value, slot: int) -> Value:
    return keys.map(lambda part: part[slot]) if isinstance(keys, Quantized) else keys[slot]


@meaning(TopK)
def top_k(op: TopK, scores: Tensor) -> Tensor:
    width = scores.shape[1]
    best = scores.sort(dim=1, descending=True, stable=True)
    chosen = (
        best.indices[:, : op.k].masked_fill(best.values[:, : op.k] == -torch.inf, width).sort(dim=1).values
    )
    return chosen.masked_fill(chosen == width, -1).to(torch.int32)
