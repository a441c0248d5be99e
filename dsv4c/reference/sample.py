"""The next token."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4c.ir.ops.sample import Argmax
from dsv4c.reference.registry import meaning


@meaning(Argmax)
def argmax(op: Argmax, logits: Tensor) -> Tensor:
    """The lowest column of the maximum; NaN counts as the maximum."""
    top = (logits == logits.amax(-1, keepdim=True)) | logits.isnan()
    columns = torch.arange(logits.shape[-1], dtype=torch.int32)
    return torch.where(top, columns, logits.shape[-1]).amin(-1).to(torch.int32)
