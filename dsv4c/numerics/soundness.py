"""What the numbers of a checkpoint must be, whatever their format.

A scale that is zero, negative or absurd is a number like any other to every later step: a weight vanishes or
turns round, and nothing says so. These are the sentences that do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsv4c.numerics.codec import blocks_in_use, decode_scale
from dsv4c.types import QuantFormat

CHUNK = 1 << 22  # elements looked at together, so that the mask stays small
SMALLEST, LARGEST = 2.0**-64, 2.0**64
"""The largest scale of a tensor of trained weights, or of activations, lies far inside of these."""


def not_finite(tensor: Tensor) -> str | None:
    """The sentence about the first element, in row-major order, that is no finite number; None if all are.
    Bytes are ue8m0 exponents.
    """
    flat = tensor.contiguous().view(-1)
    for start in range(0, flat.numel(), CHUNK):
        chunk = flat[start : start + CHUNK]
        if tensor.dtype is torch.uint8:
            bad = chunk == 0xFF
        elif tensor.dtype is torch.float8_e4m3fn:
            bad = (chunk.view(torch.uint8) & 0x7F) == 0x7F
        else:
            bad = ~torch.isfinite(chunk)
        if bool(bad.any()):
            place = _place(tensor, start + int(bad.to(torch.uint8).argmax()))
            return f"is not finite (NaN or infinity){place}"
    return None


def scale_fault(scale: Tensor, format: QuantFormat, data: Callable[[], Tensor] | None) -> str | None:
    """The sentence about a scale that cannot be right; None if every one can.

    `scale` holds the block scales of a matrix of `format` (uint8 is ue8m0), or its one global scale. `data`
    gives the elements under it as stored: a zero is right over nothing but zeros. It is None for the scale
    of activations, and called only where the answer hangs on it.
    """
    fault = not_finite(scale)
    if fault is not None:
        return fault
    if scale.dtype is torch.uint8:  # a power of two is neither negative nor zero
        largest = float(decode_scale(scale.amax()))
    else:
        values = scale.to(torch.float32)
        if bool((negative := values < 0).any()):
            return f"{_found(values, negative)}; expected positive numbers"
        zeros = values == 0
        wrong = zeros & _in_use(scale, format, data) if bool(zeros.any()) else zeros
        if bool(wrong.any()):
            over = "" if data is None else " over weights that are not"
            return f"{_found(values, wrong)}{over}; expected positive numbers"
        largest = float(values.amax())
    if largest > LARGEST or (largest < SMALLEST and bool(_in_use(scale, format, data).any())):
        what = "weight" if data is not None else "activation"
        return (
            f"is at most {largest:.3g}, which scales no {what}; expected between {SMALLEST:.1g} "
            f"and {LARGEST:.1g}"
        )
    return None


def _in_use(scale: Tensor, format: QuantFormat, data: Callable[[], Tensor] | None) -> Tensor:
    """Where `scale` applies to something other than zero: bool, in its shape."""
    if data is None:
        return torch.ones_like(scale, dtype=torch.bool)
    blocks = blocks_in_use(data(), format)
    return blocks.any() if scale.ndim == 0 else blocks.reshape(scale.shape)


def _found(values: Tensor, wrong: Tensor) -> str:
    first = int(wrong.view(-1).to(torch.uint8).argmax())
    return f"is {float(values.view(-1)[first]):g}{_place(values, first)}"


def _place(tensor: Tensor, flat: int) -> str:
    if tensor.ndim == 0:
        return ""
    return f" at {[int(i) for i in torch.unravel_index(torch.tensor(flat), tensor.shape)]}"
