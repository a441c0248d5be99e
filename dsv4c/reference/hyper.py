"""Residual streams of the hyper-connections."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4c.ir.ops.hyper import CollapseStreams, ExpandStreams, MixStreams, SpreadStreams
from dsv4c.numerics.codec import TORCH_DTYPES, round_once
from dsv4c.reference.registry import meaning


@meaning(ExpandStreams)
def expand_streams(op: ExpandStreams, h: Tensor) -> Tensor:
    return h[:, None, :].repeat(1, op.streams, 1)


@meaning(CollapseStreams)
def collapse_streams(op: CollapseStreams, x: Tensor, weights: Tensor) -> Tensor:
    weighted = weights.to(torch.float64)[..., None] * x.to(torch.float64)
    return round_once(weighted.sum(1), TORCH_DTYPES[op.out])


@meaning(MixStreams)
def mix_streams(op: MixStreams, x: Tensor, comb: Tensor) -> Tensor:
    return (comb.to(torch.float64).mT @ x.to(torch.float64)).to(torch.float32)


@meaning(SpreadStreams)
def spread_streams(op: SpreadStreams, f: Tensor, post: Tensor) -> Tensor:
    return post[:, :, None] * f.to(torch.float32)[:, None, :]
