"""What a value is: element types, quantized formats, and their bytes in memory.

The bottom of the house: standard library only, imported by the IR, the reference and the runtime alike.
A quantized tensor is one value, data with scales and what goes with them; its text names the whole format:

    bf16[1,4096]                             a plain tensor
    q[e4m3,ue8m0,1x128][1,4096]              FP8 activations, one power-of-two scale per 128 elements
    q[e4m3,ue8m0,128x128][1024,4096]         the release's FP8 weights
    q[e2m1,ue8m0,1x32][2048,4096]            MXFP4
    q[e2m1,e4m3,1x16,tensor][2048,4096]      NVFP4 with one f32 global scale per matrix
    q[e4m3,ue8m0,1x64,tail=64][1,128,512]    the KV cache: 448 FP8 elements, then 64 in BF16
"""

from __future__ import annotations

import enum
import math
import re
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import NamedTuple


class TypeSyntaxError(ValueError):
    """A type's text does not parse."""


class DType(enum.Enum):
    """Element types. `e2m1` packs two elements per byte, low nibble first."""

    F32 = "f32"
    BF16 = "bf16"
    F16 = "f16"
    E4M3 = "e4m3"
    E2M1 = "e2m1"
    UE8M0 = "ue8m0"
    I64 = "i64"
    I32 = "i32"
    U8 = "u8"

    def __str__(self) -> str:
        return self.value

    @property
    def bits(self) -> int:
        return _BITS[self]

    @property
    def is_float(self) -> bool:
        return self in (DType.F32, DType.BF16, DType.F16)


_BITS = {
    DType.F32: 32,
    DType.BF16: 16,
    DType.F16: 16,
    DType.E4M3: 8,
    DType.E2M1: 4,
    DType.UE8M0: 8,
    DType.I64: 64,
    DType.I32: 32,
    DType.U8: 8,
}

F32, BF16, F16 = DType.F32, DType.BF16, DType.F16
E4M3, E2M1, UE8M0 = DType.E4M3, DType.E2M1, DType.UE8M0
I64, I32, U8 = DType.I64, DType.I32, DType.U8


class GlobalScale(enum.Enum):
    """Where the second-level f32 scale of a quantized value lives."""

    NONE = "none"
    TENSOR = "tensor"  # one per matrix: the leading dimensions before the last two
    ROW = "row"  # one per row: every dimension but the last

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class QuantFormat:
    """Number format of a quantized value.

    `block` is (rows, columns) covered by one scale; `tail` elements at the end of each row stay in BF16 and
    are covered by no block.
    """

    value: DType
    scale: DType
    block: tuple[int, int]
    global_scale: GlobalScale = GlobalScale.NONE
    tail: int = 0

    def __post_init__(self) -> None:
        if self.value not in (E4M3, E2M1):
            raise ValueError(f"quantized values are e4m3 or e2m1, not {self.value}")
        if self.scale not in (UE8M0, E4M3, F32):
            raise ValueError(f"block scales are ue8m0, e4m3 or f32, not {self.scale}")
        if min(self.block) < 1 or self.tail < 0:
            raise ValueError(f"blocks have at least 1 row and column, tails at least 0 elements, not {self}")

    @property
    def largest(self) -> float:
        """Largest finite magnitude of an element."""
        return 448.0 if self.value is E4M3 else 6.0

    def __str__(self) -> str:
        parts = [str(self.value), str(self.scale), f"{self.block[0]}x{self.block[1]}"]
        if self.global_scale is not GlobalScale.NONE:
            parts.append(str(self.global_scale))
        if self.tail:
            parts.append(f"tail={self.tail}")
        return f"q[{','.join(parts)}]"


FP8_WEIGHT = QuantFormat(E4M3, UE8M0, (128, 128))  # the release's linear layers
FP8_ROW = QuantFormat(E4M3, UE8M0, (1, 128))  # activations before every FP8 or FP4 GEMM
MXFP4 = QuantFormat(E2M1, UE8M0, (1, 32))  # the release's routed experts, and index queries and keys
NVFP4 = QuantFormat(E2M1, E4M3, (1, 16), GlobalScale.TENSOR)
NVFP4_ROW = QuantFormat(E2M1, E4M3, (1, 16), GlobalScale.ROW)  # activations, global scale per token
KV_FP8 = QuantFormat(E4M3, UE8M0, (1, 64), tail=64)  # RoPE dimensions stay in BF16


class Component(NamedTuple):
    """One dense array of a value in memory: `offset` in bytes from the value's start."""

    name: str  # data | scale | tail | global_scale
    dtype: DType
    shape: tuple[int, ...]  # in elements; e2m1 data is stored as u8 with the last dimension halved
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.bits // 8


ALIGN = 16  # bytes; components start at 16-byte boundaries so that 128-bit loads need no prologue


def _lay_out(parts: list[tuple[str, DType, tuple[int, ...]]]) -> tuple[Component, ...]:
    components, offset = [], 0
    for name, dtype, shape in parts:
        component = Component(name, dtype, shape, offset)
        components.append(component)
        offset += -(-component.nbytes // ALIGN) * ALIGN
    return tuple(components)


@dataclass(frozen=True)
class TensorType:
    """A dense row-major tensor."""

    dtype: DType
    shape: tuple[int, ...]

    @cached_property
    def _text(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    def __str__(self) -> str:
        return self._text

    @cached_property
    def components(self) -> tuple[Component, ...]:
        return _lay_out([("data", self.dtype, self.shape)])

    @cached_property
    def nbytes(self) -> int:
        """Payload bytes, without alignment padding."""
        return sum(c.nbytes for c in self.components)

    @property
    def extent(self) -> int:
        """Bytes a buffer needs to hold the value, padding included."""
        last = self.components[-1]
        return -(-(last.offset + last.nbytes) // ALIGN) * ALIGN

    def with_shape(self, shape: tuple[int, ...]) -> TensorType:
        return replace(self, shape=shape)


@dataclass(frozen=True)
class QuantType:
    """A quantized tensor of logical shape `shape`; blocks run along the last two dimensions."""

    format: QuantFormat
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        rows, _ = self.format.block
        if not self.shape or (rows > 1 and len(self.shape) < 2):
            raise ValueError(f"{self.format} needs {2 if rows > 1 else 1} dimensions, got {self.shape}")
        if self.format.tail >= self.shape[-1]:
            raise ValueError(f"{self.format} leaves nothing to quantize in rows of {self.shape[-1]}")
        if self.format.value is E2M1 and self.shape[-1] % 2:
            raise ValueError(f"{self.format} packs pairs: the last dimension of {self.shape} is odd")

    @cached_property
    def _text(self) -> str:
        return f"{self.format}[{','.join(map(str, self.shape))}]"

    def __str__(self) -> str:
        return self._text

    @property
    def scale_shape(self) -> tuple[int, ...]:
        rows, columns = self.format.block
        width = -(-(self.shape[-1] - self.format.tail) // columns)
        if len(self.shape) == 1:
            return (width,)
        return (*self.shape[:-2], -(-self.shape[-2] // rows), width)

    @cached_property
    def components(self) -> tuple[Component, ...]:
        f, lead, width = self.format, self.shape[:-1], self.shape[-1] - self.format.tail
        data = (U8, (*lead, width // 2)) if f.value is E2M1 else (E4M3, (*lead, width))
        parts = [("data", *data), ("scale", f.scale, self.scale_shape)]
        if f.tail:
            parts.append(("tail", BF16, (*lead, f.tail)))
        if f.global_scale is GlobalScale.TENSOR:
            parts.append(("global_scale", F32, self.shape[:-2]))
        elif f.global_scale is GlobalScale.ROW:
            parts.append(("global_scale", F32, lead))
        return _lay_out(parts)

    @cached_property
    def nbytes(self) -> int:
        """Payload bytes of all components, without alignment padding."""
        return sum(c.nbytes for c in self.components)

    @property
    def extent(self) -> int:
        """Bytes a buffer needs to hold the value, padding included."""
        last = self.components[-1]
        return -(-(last.offset + last.nbytes) // ALIGN) * ALIGN

    def with_shape(self, shape: tuple[int, ...]) -> QuantType:
        return replace(self, shape=shape)


Type = TensorType | QuantType

MOST_DIMENSIONS, MOST_BYTES = 16, 1 << 56
"""What a type in a text may have. No machine comes near; sums of sizes below it stay 64-bit numbers."""

_COUNT = re.compile(r"0|[1-9][0-9]{0,18}")


def _count(text: str) -> int:
    """A number as `str` writes it, so that `1_0`, ` 1` and digits of other scripts are none."""
    if not _COUNT.fullmatch(text):
        raise ValueError(f"{text[:24]!r} is no number of at most 19 digits")
    return int(text)


def _parse_shape(text: str, whole: str) -> tuple[int, ...]:
    wanted = f"cannot read the shape {_cut(text)!r} of type {_cut(whole)!r}; expected [n,m,...]"
    if not (text.startswith("[") and text.endswith("]")):
        raise TypeSyntaxError(wanted)
    parts = text[1:-1].split(",") if text != "[]" else []
    if len(parts) > MOST_DIMENSIONS:
        raise TypeSyntaxError(f"{_cut(whole)!r} has {len(parts)} dimensions, at most {MOST_DIMENSIONS} do")
    try:
        shape = tuple(map(_count, parts))
    except ValueError as error:
        raise TypeSyntaxError(f"{wanted}: {error}") from None
    if 0 in shape:
        raise TypeSyntaxError(f"{whole!r} holds nothing; expected dimensions of at least 1")
    if math.prod(shape) > MOST_BYTES // 8:
        raise TypeSyntaxError(f"{whole!r} has more than {MOST_BYTES // 8:,} elements, which no memory holds")
    return shape


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


@cache
def parse_format(text: str) -> QuantFormat:
    """`str(QuantFormat)` read back. Raises TypeSyntaxError."""
    if not (text.startswith("q[") and text.endswith("]")):
        raise TypeSyntaxError(
            f"cannot read the quantized format {_cut(text)!r}; expected q[value,scale,RxC,...]"
        )
    try:
        value, scale, block, *rest = text[2:-1].split(",")
        rows, columns = block.split("x")
        fields: dict[str, object] = {}
        for part in rest:
            if part.startswith("tail="):
                fields["tail"] = _count(part[5:])
            else:
                fields["global_scale"] = GlobalScale(part)
        return QuantFormat(DType(value), DType(scale), (_count(rows), _count(columns)), **fields)  # type: ignore[arg-type]
    except ValueError as error:
        raise TypeSyntaxError(
            f"cannot read the quantized format {_cut(text)!r}: {_cut(str(error))}"
        ) from None


@cache
def parse_type(text: str) -> Type:
    """`str(Type)` read back. Raises TypeSyntaxError."""
    if text.startswith("q["):
        end = text.index("]") + 1 if "]" in text else len(text)
        format, shape = parse_format(text[:end]), _parse_shape(text[end:], text)
        try:
            return QuantType(format, shape)
        except ValueError as error:
            raise TypeSyntaxError(str(error)) from None
    name, bracket, rest = text.partition("[")
    try:
        dtype = DType(name)
    except ValueError:
        known = ", ".join(d.value for d in DType)
        raise TypeSyntaxError(
            f"unknown element type {_cut(name)!r} in {_cut(text)!r}; known: {known}"
        ) from None
    return TensorType(dtype, _parse_shape(bracket + rest, text))
