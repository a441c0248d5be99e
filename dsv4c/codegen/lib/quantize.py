"""Block quantization on the device: FP8 with power-of-two scales, decided from float bits as
`numerics/codec.py` does.

scale = 2^ceil(log2(max(amax, 1e-4) / 448)), stored as its biased exponent; codes are e4m3, nearest even,
saturating.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Uint32, range_constexpr

from dsv4c.codegen.lib import ptx

_448 = 0x43E00000  # float bits of the largest e4m3


@cute.jit
def fp8_exponent(amax: Float32):
    """The ue8m0 byte of a block whose largest magnitude is `amax`."""
    bits = cute.arch.fmax(amax, Float32(1e-4)).bitcast(Int32)
    return ((bits - Int32(_448) + Int32(0x7FFFFF)) >> Int32(23)) + Int32(127)


@cute.jit
def exponent_to_f32(byte: Int32):
    """2^(byte - 127) for byte 1..254."""
    return (byte << Int32(23)).bitcast(Float32)


@cute.jit
def reciprocal(byte: Int32):
    """2^(127 - byte), for byte 1..253: what a block is multiplied by before rounding to codes, exact."""
    return ((Int32(254) - byte) << Int32(23)).bitcast(Float32)


@cute.jit
def codes4(a: Float32, b: Float32, c: Float32, d: Float32):
    """Four floats -> four e4m3 codes in one word."""
    return ptx.f32x2_to_e4m3x2(a, b) | (ptx.f32x2_to_e4m3x2(c, d) << Uint32(16))


@cute.jit
def floats8(w: cute.Tensor, n: Constexpr[int]):
    """Eight bf16, words 4n..4n+3 of `w`, as floats."""
    r = cute.make_rmem_tensor((8,), Float32)
    for i in range_constexpr(4):
        r[2 * i], r[2 * i + 1] = ptx.bf16x2_to_f32x2(w[4 * n + i])
    return r


@cute.jit
def block_amax(r: cute.Tensor):
    """Largest magnitude of a block of 128 held by 16 lanes, 8 floats each."""
    amax = Float32(0.0)
    for i in range_constexpr(8):
        amax = cute.arch.fmax(amax, ptx.magnitude(r[i]))
    return ptx.lanes_max(amax, 16)


@cute.jit
def quantize_block(r: cute.Tensor, s_codes: Int32, s_scale: Int32, lane: Int32):
    """Quantize a block of 128 held by 16 lanes, 8 floats each: codes to `s_codes`, the scale as f32 to
    `s_scale`.
    """
    lo, hi, byte = codes8(r)
    ptx.sts64(s_codes + (lane % 16) * 8, lo, hi)
    if lane % 16 == 0:
        ptx.sts_f32(s_scale, exponent_to_f32(byte))


@cute.jit
def widen_block(r: cute.Tensor, s_values: Int32, s_scale: Int32, lane: Int32):
    """`quantize_block` with every code as an f16, exact: whoever multiplies f16 converts none."""
    lo, hi, byte = codes8(r)
    a, b = ptx.e4m3x4_to_f16x2x2(lo), ptx.e4m3x4_to_f16x2x2(hi)
    ptx.sts128(s_values + (lane % 16) * 16, a[0], a[1], b[0], b[1])
    if lane % 16 == 0:
        ptx.sts_f32(s_scale, exponent_to_f32(byte))


@cute.jit
def codes8(r: cute.Tensor):
    """The lane's codes of a block of 128 held by 16 lanes, 8 floats each, in two words; the scale's byte."""
    byte = fp8_exponent(block_amax(r))
    f = reciprocal(byte)
    lo = codes4(r[0] * f, r[1] * f, r[2] * f, r[3] * f)
    hi = codes4(r[4] * f, r[5] * f, r[6] * f, r[7] * f)
    return lo, hi, byte


@cute.jit
def scale_block_f16(r: cute.Tensor, s_values: Int32, s_scale: Int32, lane: Int32):
    """A block of 128 bf16 values, held by 16 lanes as 8 floats each, as f16 times a power of two.

    The largest magnitude lands in [2^14, 2^15): what is 2^29 times smaller or more loses bits, 2^-40 of the
    largest.
    """
    exponent = block_amax(r).bitcast(Int32) >> Int32(23)
    byte = cutlass.min(cutlass.max(exponent - Int32(14), Int32(1)), Int32(253))
    f = reciprocal(byte)
    w = [ptx.f32x2_to_f16x2(r[2 * i] * f, r[2 * i + 1] * f) for i in range(4)]
    ptx.sts128(s_values + (lane % 16) * 16, w[0], w[1], w[2], w[3])
    if lane % 16 == 0:
        ptx.sts_f32(s_scale, exponent_to_f32(byte))
