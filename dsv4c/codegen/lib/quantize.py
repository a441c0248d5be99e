"""Block quantization on the device: FP8 with power-of-two scales, decided from float bits as `runtime/codec.py` does.

scale = 2^ceil(log2(max(amax, 1e-4) / 448)), stored as its biased exponent; codes are e4m3, nearest even, saturating.
"""

import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, const_expr, range_constexpr

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
def load8(g: Int64):
    """Eight bf16 of a predecessor as floats."""
    w = ptx.ldg128(g)
    r = cute.make_rmem_tensor((8,), Float32)
    for i in range_constexpr(4):
        r[2 * i], r[2 * i + 1] = ptx.bf16x2_to_f32x2(w[i])
    return r


@cute.jit
def quantize_block(r: cute.Tensor, s_codes: Int32, s_scale: Int32, lane: Int32):
    """Quantize a block of 128 held by 16 lanes, 8 floats each: codes to `s_codes`, the scale as f32 to `s_scale`."""
    amax = Float32(0.0)
    for i in range_constexpr(8):
        amax = cute.arch.fmax(amax, cute.arch.fmax(r[i], -r[i]))
    byte = fp8_exponent(ptx.lanes_max(amax, 16))
    f = reciprocal(byte)
    lo = codes4(r[0] * f, r[1] * f, r[2] * f, r[3] * f)
    hi = codes4(r[4] * f, r[5] * f, r[6] * f, r[7] * f)
    ptx.sts64(s_codes + (lane % 16) * 8, lo, hi)
    if lane % 16 == 0:
        ptx.sts_f32(s_scale, exponent_to_f32(byte))
