"""The next token, and the rows it is read from."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4c.ir.ops.sample import Argmax, LastRows
from dsv4c.reference.registry import meaning


@meaning(LastRows)
def last_rows(op: LastRows, x: Tensor, lengths: Tensor) -> Tensor:
    sequences = lengths.numel()
    by_sequence = x.reshape(sequences, -1, *x.shape[1:])
    last = by_sequence[torch.arange(sequences), (lengths - 1).clamp(min=0)]
    return torch.where((lengths > 0).reshape(-1, *[1] * (x.ndim - 1)), last, torch.zeros((), dtype=x.dtype))


@meaning(Argmax)
def argmax(op: Argmax, logits: Tensor) -> Tensor:
    """The lowest column of the maximum; NaN counts as the maximum."""
    top = (logits == logits.amax(-1, keepdim=True)) | logits.isnan()
    columns = torch.arange(logits.shape[-1], dtype=torch.int32)
    return torch.where(top, columns, logits.shape[-1]).amin(-1).to(torch.int32)
