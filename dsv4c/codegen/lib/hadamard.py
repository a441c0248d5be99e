"""Hadamard transform of rows of 128 over 32 lanes, and MXFP4 quantization of the result.

Sylvester order, times 128^-0.5; lane l holds elements 4l..4l+3. Blocks of 32 elements are eight lanes.
"""

import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, const_expr, range_constexpr

from dsv4c.codegen.lib import ptx

_6 = 0x40C00000  # float bits of the largest e2m1


@cute.jit
def hadamard128(r: cute.Tensor, lane: Int32):
    """Transform the warp's row in place and round it to bf16. Whole warp."""
    for i in range_constexpr(2):
        for j in range_constexpr(2):
            a = j if i == 1 else 2 * j
            b = a + (2 if i == 1 else 1)
            r[a], r[b] = r[a] + r[b], r[a] - r[b]
    for i in range_constexpr(5):
        for j in range_constexpr(4):
            other = cute.arch.shuffle_sync_bfly(r[j], offset=1 << i)
            sign = Float32(-1.0) if (lane & Int32(1 << i)) != Int32(0) else Float32(1.0)
            r[j] = other + r[j] * sign
    for j in range_constexpr(4):
        r[j] = ptx.round_bf16(r[j] * Float32(128.0**-0.5))


@cute.jit
def mxfp4_exponent(amax: Float32):
    """The ue8m0 byte of a block of largest magnitude `amax`: 2^ceil(log2(max(amax, 6 * 2^-126) / 6))."""
    bits = cute.arch.fmax(amax, Float32(6.0 * 2.0**-126)).bitcast(Int32)
    return ((bits - Int32(_6) + Int32(0x7FFFFF)) >> Int32(23)) + Int32(127)


@cute.jit
def block32_exponent(r: cute.Tensor):
    """The ue8m0 byte of the block of 32 that this lane's four elements belong to. Whole warp."""
    amax = Float32(0.0)
    for j in range_constexpr(4):
        amax = cute.arch.fmax(amax, ptx.magnitude(r[j]))
    return mxfp4_exponent(ptx.lanes_max(amax, 8))


@cute.jit
def power(byte: Int32):
    """2^(byte - 127) for byte 1..254."""
    return (byte << Int32(23)).bitcast(Float32)


@cute.jit
def round_e2m1(y: Float32):
    """y, within ±6, rounded to the nearest e2m1 value, ties to the even code.

    Steps are half the power of two below |y|, at least 0.5; adding and subtracting 1.5 * 2^23 of them rounds.
    """
    power_below = cute.arch.fmax((y.bitcast(Uint32) & Uint32(0x7F800000)).bitcast(Float32), Float32(1.0))
    magic = power_below * Float32(1.5 * 2.0**22)
    return (y + magic) - magic


@cute.jit
def e2m1_code(x: Float32, byte: Int32):
    """The 4-bit code of x under block scale `byte`."""
    code = code_of(ptx.magnitude(x) * power(Int32(254) - byte))
    return code | ((x.bitcast(Uint32) >> Uint32(31)) << Uint32(3))


@cute.jit
def e2m1_codes4(r: cute.Tensor, byte: Int32):
    """The codes of this lane's four elements under block scale `byte`, the first in the lowest bits."""
    codes = Uint32(0)
    if const_expr(ptx.converts_e2m1()):
        f = power(Int32(254) - byte)
        codes = ptx.f32x2_to_e2m1x2(r[0] * f, r[1] * f) | (
            ptx.f32x2_to_e2m1x2(r[2] * f, r[3] * f) << Uint32(8)
        )
    else:
        for i in range_constexpr(4):
            codes = codes | (e2m1_code(r[i], byte) << Uint32(4 * i))
    return codes


@cute.jit
def code_of(y: Float32):
    """The code of the e2m1 value next to y, 0 <= y <= 6."""
    y = round_e2m1(y)
    code = (y.bitcast(Uint32) >> Uint32(22)) - Uint32(252)  # exponent and first mantissa bit; 1.0 is code 2
    if y < Float32(1.0):
        code = (y * Float32(2.0)).to(Uint32)
    return code
