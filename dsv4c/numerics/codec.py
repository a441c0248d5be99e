"""Numbers in torch: quantize, dequantize, convert, and typed views of raw bytes.

Formulas of DeepSeek-V4 `inference/kernel.py` (FP8, FP4) and of the NVFP4 format. Scales are decided in f32,
powers of two from the float's bits, so every device can reproduce them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4c.types import (
    ALIGN,
    MXFP4,
    NVFP4,
    DType,
    GlobalScale,
    QuantFormat,
    QuantType,
    TensorType,
    Type,
)

TORCH_DTYPES: dict[DType, torch.dtype] = {
    DType.F32: torch.float32,
    DType.BF16: torch.bfloat16,
    DType.F16: torch.float16,
    DType.E4M3: torch.float8_e4m3fn,
    DType.UE8M0: torch.uint8,
    DType.I64: torch.int64,
    DType.I32: torch.int32,
    DType.U8: torch.uint8,
}
_DTYPES = {torch_dtype: dtype for dtype, torch_dtype in TORCH_DTYPES.items() if dtype is not DType.UE8M0}

E4M3_NAN, UE8M0_NAN = 0x7F, 0xFF
POISON_INT = -(1 << 30)  # what `nan_fill` writes into integers: far from any index, and no sum of two wraps


class ConversionError(ValueError):
    """A value cannot take the wanted type without rounding, or not at all."""


class Quantized(NamedTuple):
    """A quantized value: the parts of `QuantType.components` as tensors.

    data: float8_e4m3fn [..., K - tail], or uint8 [..., K/2] with the even element in the low nibble.
    scale: uint8 exponents (ue8m0), float8_e4m3fn or float32, of shape `QuantType.scale_shape`.
    tail: bfloat16 [..., tail]; global_scale: float32, one per matrix or row. None where absent.
    """

    format: QuantFormat
    data: Tensor
    scale: Tensor
    tail: Tensor | None = None
    global_scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, tail included."""
        pack = 2 if self.format.value is DType.E2M1 else 1
        return (*self.data.shape[:-1], self.data.shape[-1] * pack + self.format.tail)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors that are present, in memory order."""
        return tuple(parts_of(self).values())

    def map(self, function: Callable[..., Tensor], *others: Quantized) -> Quantized:
        """Apply `function` to every part, and the same part of `others`, values of the same format.

        For functions of leading dimensions that all parts share.
        """
        parts = zip(self[1:], *(other[1:] for other in others), strict=True)
        made = [None if part[0] is None else function(*part) for part in parts]
        return Quantized(self.format, *made)  # type: ignore[arg-type]


Value = Tensor | Quantized


def parts_of(value: Value) -> dict[str, Tensor]:
    """The tensors of a value by the names of its type's components, in memory order."""
    if not isinstance(value, Quantized):
        return {"data": value}
    named = zip(Quantized._fields[1:], value[1:], strict=True)
    return {name: part for name, part in named if part is not None}


def part_of(value: Value, axis: int, of: int, number: int) -> Value:
    """Part `number` of `of` equal ones along an axis, a view. A scale of elements of several parts is in each
    of them; so is a scale of the whole matrix.
    """
    if not isinstance(value, Quantized):
        size = value.shape[axis] // of
        return value.narrow(axis, number * size, size)
    from_last = len(value.shape) - 1 - axis
    size = value.shape[axis] // of
    block = value.format.block[1 - from_last] if from_last < 2 else 1
    first, count = number * size // block, -(-size // block)
    stored = value.data.shape[axis] // of
    scaled = value.global_scale is not None and axis < value.global_scale.dim()
    assert value.tail is None, "a row that ends in plain elements is not cut"
    return value._replace(
        data=value.data.narrow(axis, number * stored, stored),
        scale=value.scale.narrow(axis, first, count),
        global_scale=value.global_scale.narrow(axis, number * size, size)  # type: ignore[union-attr]
        if scaled
        else value.global_scale,
    )


def type_of(value: Value) -> Type:
    """The type a value has. Raises ConversionError for element types that dsv4c does not know."""
    if isinstance(value, Quantized):
        return QuantType(value.format, value.shape)
    if value.dtype not in _DTYPES:
        raise ConversionError(f"{value.dtype} is no element type; known: {', '.join(map(str, _DTYPES))}")
    return TensorType(_DTYPES[value.dtype], tuple(value.shape))


# --- rounding ---


def round_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 to `dtype`, ties to even. torch goes through f32 to bf16 and f16: two roundings."""
    if x.dtype is not torch.float64 or dtype not in (torch.bfloat16, torch.float16):
        return x.to(dtype)
    nearest = x.to(torch.float32)
    bits = nearest.view(torch.int32)
    inexact = nearest.to(torch.float64) != x
    toward_zero = bits - (nearest.to(torch.float64).abs() > x.abs()).to(torch.int32)
    # Rounded to odd, an f32 still tells the second rounding on which side of a tie x lies.
    to_odd = toward_zero | inexact.to(torch.int32)
    return to_odd.view(torch.float32).to(dtype)


# The largest f32 that rounds to e2m1 code 0..6: half way to the next code, with ties going to the even code.
_HALFWAY = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
_UPPER = torch.where(torch.arange(7) % 2 == 0, _HALFWAY, torch.nextafter(_HALFWAY, torch.tensor(0.0)))
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
_E2M1_PAIRS = torch.stack(
    [_E2M1.repeat(16), _E2M1.repeat_interleave(16)], dim=-1
)  # by byte: low, high nibble


def encode_e2m1(x: Tensor) -> Tensor:
    """f32 [..., K] to packed e2m1 uint8 [..., K/2]: nearest, ties to the even code, saturating at 6."""
    code = torch.bucketize(x.abs(), _upper(x.device), out_int32=True).to(torch.uint8)
    code |= torch.signbit(x).to(torch.uint8) << 3
    return code[..., 0::2] | code[..., 1::2] << 4


def decode_e2m1(packed: Tensor) -> Tensor:
    """Packed e2m1 uint8 [..., K/2] to f32 [..., K], exact."""
    return _pairs(packed.device)[packed.to(torch.int32)].flatten(-2)


@cache
def _upper(device: torch.device) -> Tensor:
    return _UPPER.to(device)


@cache
def _pairs(device: torch.device) -> Tensor:
    return _E2M1_PAIRS.to(device)


def decode_ue8m0(exponent: Tensor) -> Tensor:
    """uint8 exponents to f32: 2^(b - 127), 255 is NaN."""
    bits = exponent.to(torch.int32) << 23
    bits = bits.masked_fill(exponent == 0, 1 << 22)  # 2^-127 is an f32 subnormal
    return bits.masked_fill(exponent == UE8M0_NAN, 0x7FC00000).view(torch.float32)


def _e4m3(x: Tensor) -> Tensor:
    return x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


# --- blocks ---


def _split(x: Tensor, block: tuple[int, int]) -> Tensor:
    """[..., M, K] to [..., M/rows, rows, K/columns, columns], ragged edges padded with zeros."""
    rows, columns = block
    x = x.unsqueeze(0) if x.ndim == 1 else x
    pad_rows, pad_columns = -x.shape[-2] % rows, -x.shape[-1] % columns
    if pad_rows or pad_columns:
        x = torch.nn.functional.pad(x, (0, pad_columns, 0, pad_rows))
    return x.reshape(*x.shape[:-2], x.shape[-2] // rows, rows, x.shape[-1] // columns, columns)


def _join(blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo `_split`, cutting the padding off."""
    x = blocks.flatten(-4, -3).flatten(-2, -1)
    return x[..., : shape[-2] if len(shape) > 1 else 1, : shape[-1]].reshape(shape)


def _global_scale(body: Tensor, format: QuantFormat, given: Tensor | None) -> Tensor | None:
    if format.global_scale is GlobalScale.NONE:
        if given is not None:
            raise ValueError(f"{format} has no global scale, but one was given")
        return None
    if format.scale is DType.UE8M0:
        raise ValueError(f"{format}: power-of-two block scales take no global scale")
    lead = body.shape[:-1] if format.global_scale is GlobalScale.ROW else body.shape[:-2]
    if given is None:
        reduced = (-1,) if format.global_scale is GlobalScale.ROW else tuple(range(-min(2, body.ndim), 0))
        return body.abs().amax(reduced) / (format.largest * 448.0)
    if given.shape != lead:
        raise ValueError(
            f"{format} of {list(body.shape)} needs a global scale {list(lead)}, got {list(given.shape)}"
        )
    return given.to(torch.float32)


def _spread_global(global_scale: Tensor | None, format: QuantFormat) -> Tensor | None:
    """The global scale with the dimensions of `_split`'s result, or None."""
    if global_scale is None:
        return None
    if format.global_scale is GlobalScale.TENSOR:
        return global_scale[..., None, None, None, None]
    rows = global_scale.unsqueeze(0) if global_scale.ndim == 0 else global_scale
    return _split(rows.unsqueeze(-1), (format.block[0], 1))


def _bits(x: float) -> int:
    return int.from_bytes(struct.pack("<f", x), "little")


def _encode_scale(amax: Tensor, format: QuantFormat) -> Tensor:
    """Block maxima (already divided by the global scale, if any) to block scales."""
    if format.scale is DType.E4M3:
        return _e4m3(amax / format.largest)
    floor = 1e-4 if format.value is DType.E4M3 else 6 * 2.0**-126
    amax = amax.clamp(min=floor)
    if format.scale is DType.F32:
        return amax / format.largest
    # ceil(log2(amax / largest)), exactly: bits of positive floats are ordered and grow by 2^23 per doubling.
    doublings = (amax.view(torch.int32) - _bits(format.largest) + 0x7FFFFF) >> 23
    return (doublings + 127).masked_fill(~amax.isfinite(), UE8M0_NAN).to(torch.uint8)


def decode_scale(scale: Tensor) -> Tensor:
    """Block scales of any format as f32, exact."""
    return decode_ue8m0(scale) if scale.dtype is torch.uint8 else scale.to(torch.float32)


def decode_data(q: Quantized) -> Tensor:
    """The elements before scaling, without the tail: f32 [..., K - tail], exact."""
    return decode_e2m1(q.data) if q.format.value is DType.E2M1 else q.data.to(torch.float32)


def blocks_in_use(data: Tensor, format: QuantFormat) -> Tensor:
    """Which blocks of stored elements (uint8 [..., K/2] for e2m1) hold one that is not zero: bool, in the
    shape of the block scales.
    """
    packed = format.value is DType.E2M1
    rows, columns = format.block
    magnitude = data.view(torch.uint8) & (0x77 if packed else 0x7F)  # no sign: -0 is a zero
    blocks = _split(magnitude, (rows, columns // 2 if packed else columns))
    return blocks.amax((-3, -1)) > 0


# --- quantize and dequantize ---


def quantize(x: Tensor, format: QuantFormat, global_scale: Tensor | None = None) -> Quantized:
    """Quantize float [..., K] along the last dimension (or two, for blocks of several rows).

    With `largest` = 448 (e4m3) or 6 (e2m1) and amax over the block:
      ue8m0  scale = 2^ceil(log2(max(amax, floor) / largest)), floor = 1e-4 (e4m3) or 6 * 2^-126 (e2m1)
      f32    scale = max(amax, floor) / largest
      e4m3   scale = e4m3(amax / (largest * global)), where global, unless given, is
             amax of the matrix or row / (largest * 448)
      data   = round_to_nearest_even(x / (scale * global)), saturating
    A block whose scale rounds to zero becomes zeros. NaN makes its block NaN; so does infinity with ue8m0.
    """
    shape = tuple(x.shape)
    kind = QuantType(format, shape)
    x = x.to(torch.float32)
    width = shape[-1] - format.tail
    body, tail = x[..., :width], x[..., width:].to(torch.bfloat16) if format.tail else None
    blocks = _split(body, format.block)
    amax = blocks.abs().amax((-3, -1))
    global_scale = _global_scale(body, format, global_scale)
    spread = _spread_global(global_scale, format)
    if spread is None:
        scale = _encode_scale(amax, format)
        divisor = decode_scale(scale)[..., :, None, :, None]
    else:
        # The formula's order of operations, in f32: amax / (largest * global), then x / (scale * global).
        ratio = amax / (format.largest * spread.amax((-3, -1)))
        ratio = ratio.masked_fill(amax == 0, 0.0)
        scale = _e4m3(ratio)
        divisor = decode_scale(scale)[..., :, None, :, None] * spread
    scaled = (blocks / divisor).masked_fill(divisor == 0, 0.0)
    scaled = _join(scaled, (*shape[:-1], width))
    data = encode_e2m1(scaled) if format.value is DType.E2M1 else _e4m3(scaled)
    return Quantized(format, data, scale.reshape(kind.scale_shape), tail, global_scale)


def dequantize(q: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """data * scale * global_scale, computed exactly and rounded once to `dtype` (float64 is exact)."""
    format, shape = q.format, q.shape
    width = shape[-1] - format.tail
    # In f32 a product with a power of two is exact, and with any other scale it rounds once.
    narrow = dtype is torch.float32 or (format.scale is DType.UE8M0 and dtype is not torch.float64)
    wide = torch.float32 if narrow else torch.float64
    rows = q.scale.unsqueeze(0) if q.scale.ndim == 1 else q.scale
    blocks = _split(decode_data(q).to(wide), format.block) * decode_scale(rows)[..., :, None, :, None].to(
        wide
    )
    spread = _spread_global(q.global_scale, format)
    if spread is not None:
        blocks = blocks * spread.to(wide)
    body = round_once(_join(blocks, (*shape[:-1], width)), dtype)
    return body if q.tail is None else torch.cat([body, q.tail.to(dtype)], dim=-1)


# --- bytes ---


def view(storage: Tensor, type: Type, offset: int = 0) -> Value:
    """The value that `type` describes at byte `offset` of a one-dimensional uint8 tensor; shares its memory.

    Raises ValueError if the offset is not a multiple of 16 or the value does not fit.
    """
    if storage.dtype is not torch.uint8 or storage.ndim != 1:
        raise ValueError(f"views are taken of flat uint8 storage, not {storage.dtype}{list(storage.shape)}")
    last = type.components[-1]
    if offset % ALIGN or offset < 0 or offset + last.offset + last.nbytes > storage.numel():
        raise ValueError(
            f"{type} at byte {offset} of {storage.numel()}: it needs {last.offset + last.nbytes} bytes "
            f"from an offset that {ALIGN} divides"
        )
    parts = {}
    for component in type.components:
        start = offset + component.offset
        raw = storage[start : start + component.nbytes]
        parts[component.name] = raw.view(TORCH_DTYPES[component.dtype]).view(component.shape)
    return Quantized(type.format, **parts) if isinstance(type, QuantType) else parts["data"]


def nan_fill(value: Value) -> None:
    """Poison a value in place: NaN where the format has one, POISON_INT in integers, 6 in packed e2m1."""
    if isinstance(value, Quantized):
        _fill(value.data, 0x77)
        _fill(value.scale, UE8M0_NAN)
        for part in (value.tail, value.global_scale):
            if part is not None:
                _fill(part, UE8M0_NAN)
        return
    _fill(value, UE8M0_NAN)


def _fill(part: Tensor, byte: int) -> None:
    if part.dtype is torch.float8_e4m3fn:
        part.view(torch.uint8).fill_(E4M3_NAN)
    elif part.dtype is torch.uint8:
        part.fill_(byte)
    else:
        part.fill_(math.nan if part.dtype.is_floating_point else POISON_INT)


# --- conversion ---


def convert(value: Value, want: Type, *, requantize: bool = False) -> Value:
    """`value` as type `want`: exactly, or rounded to nearest if `requantize` allows it.

    Dequantizing into f32 counts as exact: it is what the formats mean. Raises ConversionError, naming both
    types, if the shapes differ, no conversion exists, an integer leaves its range, or a number would round.
    """
    have = type_of(value)
    if have == want:
        return value
    refusal = f"cannot convert {have} to {want}"
    if have.shape != want.shape:
        raise ConversionError(f"{refusal}: the shapes differ")
    if isinstance(value, Tensor) and not value.dtype.is_floating_point:
        return _convert_integers(value, want, refusal)
    recast = _recast_fp4(value, want) if isinstance(value, Quantized) else None
    if recast is not None:
        return recast
    result: Value
    if isinstance(want, QuantType):
        result = quantize(_as_float(value, torch.float32), want.format)
    elif want.dtype.is_float:
        result = _as_float(value, TORCH_DTYPES[want.dtype])
    else:
        raise ConversionError(f"{refusal}: there is no such conversion")
    exact_by_meaning = (
        isinstance(value, Quantized) and isinstance(want, TensorType) and want.dtype is DType.F32
    )
    if requantize or exact_by_meaning:
        return result
    if not _same(_as_float(value, torch.float64), _as_float(result, torch.float64)):
        raise ConversionError(
            f"{refusal} without rounding; keep the stored format, or ask for requantization"
        )
    return result


def _convert_integers(x: Tensor, want: Type, refusal: str) -> Tensor:
    if not isinstance(want, TensorType) or want.dtype not in (DType.I64, DType.I32, DType.U8):
        raise ConversionError(f"{refusal}: there is no such conversion")
    limits = torch.iinfo(TORCH_DTYPES[want.dtype])
    if x.numel() and not limits.min <= int(x.min()) <= int(x.max()) <= limits.max:
        raise ConversionError(f"{refusal}: values from {int(x.min())} to {int(x.max())} leave its range")
    return x.to(TORCH_DTYPES[want.dtype])


def _as_float(value: Value, dtype: torch.dtype) -> Tensor:
    return dequantize(value, dtype) if isinstance(value, Quantized) else value.to(dtype)


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _recast_fp4(q: Quantized, want: Type) -> Quantized | None:
    """MXFP4 to NVFP4 or back with the same codes, if the scales allow it; else None."""
    if not isinstance(want, QuantType) or q.data.ndim < 2 or q.data.numel() == 0:
        return None
    if (q.format, want.format) == (MXFP4, NVFP4):
        return _nvfp4_of_mxfp4(q, want)
    if (q.format, want.format) == (NVFP4, MXFP4):
        return _mxfp4_of_nvfp4(q)
    return None


def _nvfp4_of_mxfp4(q: Quantized, want: QuantType) -> Quantized | None:
    """With block exponents k_j of a matrix: global = 2^(k_max - 8), scale = 2^(k_j - k_max + 8), twice.

    Exact while k_max - k_j <= 17: the smallest e4m3 is 2^-9.
    """
    exponent = q.scale.to(torch.int32) - 127
    k_max = exponent.amax((-2, -1))
    relative = exponent - k_max[..., None, None] + 8
    if int(relative.min()) < -9 or int(exponent.max()) > 127:
        return None
    halves = _pow2(relative).repeat_interleave(2, dim=-1)[..., : want.scale_shape[-1]]
    return Quantized(want.format, q.data, _e4m3(halves), None, _pow2(k_max - 8))


def _mxfp4_of_nvfp4(q: Quantized) -> Quantized | None:
    """Possible when both halves of every 32-block share a power of two within the exponent's range."""
    assert q.global_scale is not None
    halves = q.scale.to(torch.float64) * q.global_scale[..., None, None].to(torch.float64)
    even, odd = halves[..., 0::2], halves[..., 1::2]
    mantissa, exponent = torch.frexp(even)
    shared = torch.equal(even[..., : odd.shape[-1]], odd) and bool((mantissa == 0.5).all())
    if not shared or int(exponent.min()) < -126 or int(exponent.max()) > 128:
        return None
    return Quantized(MXFP4, q.data, (exponent + 126).to(torch.uint8))


def _pow2(exponent: Tensor) -> Tensor:
    return torch.ldexp(torch.ones(exponent.shape, dtype=torch.float64), exponent).to(torch.float32)
