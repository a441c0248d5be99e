"""Exchanges between ranks. Their meanings take the operands of all ranks, rank after rank."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4c.errors import GraphError
from dsv4c.ir.ops.collective import AllGather, AllReduce
from dsv4c.numerics.codec import TORCH_DTYPES
from dsv4c.reference.registry import meaning


@meaning(AllReduce)
def all_reduce(op: AllReduce, *x: Tensor) -> Tensor:
    """In f32 and in order of the ranks: the same bits on all of them, whoever adds."""
    _expect_ranks(op, len(x))
    total = x[0].clone()
    for addend in x[1:]:
        total += addend
    return total.to(TORCH_DTYPES[op.out])


@meaning(AllGather)
def all_gather(op: AllGather, *x: Tensor) -> Tensor:
    _expect_ranks(op, len(x))
    return torch.cat(x, op.axis)


def _expect_ranks(op: AllReduce | AllGather, found: int) -> None:
    if found != op.ranks:
        raise GraphError(
            f"{op.name} got {found} values, expected those of {op.ranks} ranks; run the ranks together "
            "(dsv4c.reference.ranks)"
        )
