"""Random weights and caches, made on the device in the forms that kernels read: for timing, and for checks
that need no model's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4c.numerics.codec import Quantized, Value, view
from dsv4c.numerics.forms import UNIT_BYTES, parse_packing
from dsv4c.numerics.resident import PLAIN, WIDENED
from dsv4c.runtime.residence import Resident
from dsv4c.types import DType, Type

STEP = 1 << 26  # bytes filled at once


def pieces(target: Tensor) -> tuple[Tensor, ...]:
    """A flat tensor in parts, so that what fills one needs little memory beside it."""
    return torch.split(target, STEP)


def random_bytes(target: Tensor) -> None:
    """Uniform bytes, a piece at a time."""
    for piece in pieces(target):
        piece.random_(0, 256)


def random_e4m3(target: Tensor) -> None:
    """Uniform codes without NaN."""
    for piece in pieces(target):
        piece.random_(0, 256)
        piece.sub_(((piece & 0x7F) == 0x7F).to(torch.uint8))


def random_floats(target: Tensor, dtype: torch.dtype, spread: float, center: float = 0.0) -> None:
    """Normal numbers in the bytes of `target`."""
    for piece in pieces(target.view(dtype)):
        piece.normal_(center, spread)


def random_packed(target: Tensor, form: str) -> None:
    """Units of a packing whose weights are of the size of 1/64: rows of 4,096 give results around 1."""
    format = parse_packing(form).format
    if format == "bf16":
        random_floats(target, torch.bfloat16, 0.02)
    elif format == "fp8":
        random_e4m3(target)
    else:
        random_bytes(target)
        scales = target.view(-1, UNIT_BYTES[format])[:, 1024:]
        scales.fill_(119 if format == "mxfp4" else 0x38)


def fill_weight(block: Tensor, resident: Resident, experts: int) -> None:
    """Random contents for a parameter in the form the kernels read."""
    type_ = resident.record.type
    packed = resident.form not in (PLAIN, WIDENED)
    dtypes = {c.name: c.dtype for c in type_.components}
    for name, offset, nbytes in resident.components:
        target = block[offset : offset + nbytes]
        dtype = DType.F32 if resident.form == WIDENED else dtypes[name]
        if name == "data" and packed:
            random_packed(target, resident.form)
        elif name == "scale" and dtype is DType.UE8M0:
            target.random_(112, 117)
        elif name == "global_scale":
            target.view(torch.float32).fill_(2.0**-7)
        elif dtype is DType.I32:
            target.view(torch.int32).random_(0, experts)
        elif dtype in (DType.E4M3, DType.E2M1):
            random_e4m3(target)
        else:
            flat = len(type_.shape) == 1
            kind = torch.float32 if dtype is DType.F32 else torch.bfloat16
            random_floats(target, kind, 0.1 if flat else 0.02, 1.0 if flat else 0.0)


def fill_state(block: Tensor, type_: Type, offset: int) -> None:
    """A cache as if tokens had been there."""
    fill_value(view(block, type_, offset))


def fill_value(value: Value) -> None:
    """Random numbers of the size of 1 where there are floats; others stay."""
    if isinstance(value, Quantized):
        random_e4m3(value.data.view(torch.uint8).view(-1))
        if value.scale.dtype is torch.uint8:
            value.scale.random_(117, 121)
        if value.tail is not None:
            value.tail.normal_()
    elif value.is_floating_point():
        value.normal_()
