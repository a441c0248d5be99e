"""Table lookups, and which rows have experts. An index outside its table raises IndexError: nothing wraps
around.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4c.ir.ops.moe import Embedding, Present, TakeAlong
from dsv4c.reference.registry import meaning


@meaning(Embedding)
def embedding(op: Embedding, table: Tensor, ids: Tensor) -> Tensor:
    _check(ids, table.shape[0])
    return table[ids.to(torch.int64)]


@meaning(TakeAlong)
def take_along(op: TakeAlong, x: Tensor, index: Tensor) -> Tensor:
    _check(index, x.shape[-1])
    return x[index.to(torch.int64)] if x.ndim == 1 else x.gather(1, index.to(torch.int64))


@meaning(Present)
def present(op: Present, weights: Tensor, positions: Tensor) -> Tensor:
    return weights.where((positions >= 0)[:, None], 0.0)


def _check(index: Tensor, size: int) -> None:
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < size:
        raise IndexError(f"indices from {int(index.min())} to {int(index.max())} in a table of {size}")
