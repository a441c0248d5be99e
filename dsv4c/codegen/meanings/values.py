"""Arrays, numbers and the threads that share the work: what meanings are written in.

An array is a contiguous `cute.Tensor` of static shape, in global or shared memory; e4m3, ue8m0 and packed
e2m1 are bytes. Numbers are read with `at` and rounded once to their array's type by `put`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import (
    BFloat16,
    Constexpr,
    Float16,
    Float32,
    Float64,
    Int32,
    Int64,
    Uint8,
    Uint32,
    const_expr,
    range_constexpr,
)

from dsv4c.codegen.lib import ptx, scan
from dsv4c.types import QuantFormat, parse_format

DTYPES: dict[str, Any] = {
    "f32": Float32,
    "bf16": BFloat16,
    "f16": Float16,
    "e4m3": Uint8,
    "ue8m0": Uint8,
    "u8": Uint8,
    "i32": Int32,
    "i64": Int64,
}


@dataclass(frozen=True)
class Team:
    """`thread` of `threads` that work together. They are one CTA if there is a `scratch`, where they reduce
    in shared memory; else they may not wait for each other.
    """

    thread: Any
    threads: int
    scratch: Any = None


class Quantized(NamedTuple):
    """A quantized array, as `numerics.codec.Quantized`; `shape` is logical, tail included."""

    text: str
    shape: tuple[int, ...]
    data: cute.Tensor
    scale: cute.Tensor
    tail: cute.Tensor | None = None
    global_scale: cute.Tensor | None = None

    @property
    def format(self) -> QuantFormat:
        return parse_format(self.text)

    @property
    def parts(self) -> tuple[cute.Tensor, ...]:
        """The arrays that are present."""
        return tuple(p for p in (self.data, self.scale, self.tail, self.global_scale) if p is not None)


# Arrays -----------------------------------------------------------------------------------------------------


def size(shape: tuple[int, ...]) -> int:
    """Elements of an array of that shape."""
    total = 1
    for n in shape:
        total *= n
    return total


def array(pointer: cute.Pointer, shape: tuple[int, ...]) -> cute.Tensor:
    """A row-major array."""
    strides = [size(shape[i + 1 :]) for i in range(len(shape))]
    return cute.make_tensor(pointer, cute.make_layout(shape or (1,), stride=tuple(strides) or (1,)))


@cute.jit
def held(dtype: Constexpr, address: Int32, shape: Constexpr):
    """An array in shared memory."""
    return array(cute.make_ptr(dtype, address, cute.AddressSpace.smem, assumed_align=16), shape)


@cute.jit
def part(x: cute.Tensor, first: Int32, shape: Constexpr):
    """The elements of `x` from number `first` on, as an array of their own."""
    return array(x.iterator + Int64(first), shape)


@cute.jit
def at(x: cute.Tensor, i: Int32):
    """Element number i in row-major order, in the array's type."""
    return cute.make_tensor(x.iterator, cute.make_layout((size(x.shape),)))[i]


@cute.jit
def put(x: cute.Tensor, i: Int32, v):
    """Element number i becomes `v`, rounded once."""
    flat = cute.make_tensor(x.iterator, cute.make_layout((size(x.shape),)))
    flat[i] = rounded(v, x.element_type)


def parts_of(x: cute.Tensor | Quantized) -> tuple[cute.Tensor, ...]:
    """The arrays of a value, in memory order."""
    return x.parts if isinstance(x, Quantized) else (x,)


# Numbers ----------------------------------------------------------------------------------------------------


@cute.jit
def wide(v):
    """A number in float64, exact."""
    return v.to(Float64)


@cute.jit
def rounded(v, to: Constexpr):
    """A number rounded once, to nearest even. float64 goes to 16 bits by way of an f32 rounded to odd, which
    still tells on which side of a tie it lies.
    """
    if const_expr(type(v) is Float64 and to.width == 16):
        toward_zero = cute.arch.inline_ptx(
            "cvt.rz.f32.f64 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[v]
        )
        sticky = Int32(1) if toward_zero.to(Float64) != v and v == v else Int32(0)
        return (toward_zero.bitcast(Int32) | sticky).bitcast(Float32).to(to)
    return v.to(to)


def bf16(x: float) -> float:
    """A constant rounded to bf16: the tracer would leave out a conversion there and back."""
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    bits += 0x7FFF + (bits >> 16 & 1)
    return float(struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0])


multiply, plus = ptx.multiply, ptx.plus


@cute.jit
def reciprocal_root(x: Float32):
    """1 / sqrt(x) in f32: the root and the quotient are each rounded, as PyTorch's `rsqrt` does on a CPU."""
    root = cute.arch.inline_ptx("sqrt.rn.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x])
    return ptx.divide(Float32(1.0), root)


@cute.jit
def e4m3(byte: Uint32):
    """The number that an e4m3 code stands for, f32."""
    return ptx.f16x2_to_f32x2(ptx.e4m3x4_to_f16x2x2(byte)[0])[0]


@cute.jit
def e2m1(code: Uint32):
    """The number that an e2m1 code, 0..15, stands for, f32."""
    low = code & Uint32(7)
    small = low.to(Float32) * Float32(0.5)  # codes 0, 1 and 2
    bits = (low + Uint32(252)) << Uint32(22)
    value = small if low < Uint32(2) else bits.bitcast(Float32)
    return (value.bitcast(Uint32) | ((code & Uint32(8)) << Uint32(28))).bitcast(Float32)


# Reductions -------------------------------------------------------------------------------------------------


class Lines(NamedTuple):
    """How a team goes over lines of elements, each added up by `width` of its threads: lines first, first +
    step, ... and in them elements lane, lane + width, ...
    """

    first: Any
    step: int
    lane: Any
    width: int
    team: Team


def lines(team: Team, count: int, length: int) -> Lines:
    """Short lines get a thread each, few long ones the CTA, all others a warp."""
    if length <= 16:
        return Lines(team.thread, team.threads, 0, 1, team)
    if team.scratch is None or length <= 128 or count >= team.threads // 32:
        return Lines(team.thread // 32, team.threads // 32, team.thread % 32, 32, team)
    return Lines(0, 1, team.thread, team.threads, team)


@cute.jit
def total(own: Float64, over: Constexpr):
    """Sum over the threads of a line, in all of them, in a fixed order."""
    if const_expr(over.width > 1):
        for i in range_constexpr(5):
            own = own + cute.arch.shuffle_sync_bfly(own, offset=1 << i)
    if const_expr(over.width > 32):
        numbers = held(Float64, over.team.scratch, (over.width // 32,))
        if over.lane % 32 == 0:
            numbers[over.lane // 32] = own
        cute.arch.sync_threads()
        own = numbers[0]
        for i in range_constexpr(1, over.width // 32):
            own = own + numbers[i]
        cute.arch.sync_threads()
    return own


@cute.jit
def largest(own: Float32, over: Constexpr):
    """Maximum over the threads of a line, in all of them."""
    if const_expr(over.width > 1):
        own = ptx.lanes_max(own, 32)
    if const_expr(over.width > 32):
        numbers = held(Float32, over.team.scratch, (over.width // 32,))
        if over.lane % 32 == 0:
            numbers[over.lane // 32] = own
        cute.arch.sync_threads()
        own = numbers[0]
        for i in range_constexpr(1, over.width // 32):
            own = cute.arch.fmax(own, numbers[i])
        cute.arch.sync_threads()
    return own


@cute.jit
def each(over: Constexpr, count: Constexpr[int]):
    """The lines that a thread works on."""
    return cutlass.range(over.first, count, over.step)


@cute.jit
def sums_before(own, number: Constexpr, team: Team):
    """Sums of a `number` of each thread: over the threads in front of this one, and over all."""
    return scan.sums_before(own, number, team.scratch, team.thread, team.threads)
