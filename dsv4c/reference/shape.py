"""Changes of shape."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4c.ir.ops.shape import Concat, Reshape, Slice
from dsv4c.numerics.codec import Quantized, Value
from dsv4c.reference.registry import meaning


@meaning(Reshape)
def reshape(op: Reshape, x: Tensor) -> Tensor:
    return x.reshape(op.shape)


@meaning(Slice)
def slice_(op: Slice, x: Tensor) -> Tensor:
    return x.narrow(op.axis, op.start, op.stop - op.start)


@meaning(Concat)
def concat(op: Concat, *parts: Value) -> Value:
    """Quantized values join along a leading dimension, part by part."""
    first = parts[0]
    if not isinstance(first, Quantized):
        return torch.cat([p for p in parts if isinstance(p, Tensor)], op.axis)
    axis = op.axis % len(first.shape)  # a global scale has fewer dimensions: count from the front
    quantized = [p for p in parts if isinstance(p, Quantized)]
    _, datas, scales, tails, global_scales = zip(*quantized, strict=True)
    tail = None if tails[0] is None else torch.cat(tails, axis)
    global_scale = None if global_scales[0] is None else torch.cat(global_scales, axis)
    return Quantized(first.format, torch.cat(datas, axis), torch.cat(scales, axis), tail, global_scale)
