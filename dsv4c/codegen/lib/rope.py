"""Rotary embedding on the device: interleaved pairs turned by the f32 angle position * frequency."""

import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

_asm = cute.arch.inline_ptx


@cute.jit
def fma(a: Float32, b: Float32, c: Float32):
    """a * b + c, rounded once."""
    return _asm(
        "fma.rn.f32 {$w0}, {$r0}, {$r1}, {$r2};", write_only_types=[Float32], read_only_args=[a, b, c]
    )


@cute.jit
def cos_sin(angle: Float32):
    """Cosine and sine of an angle below 2^20, to about 1e-7.

    pi/2 is taken off in two parts; k * (f32 of pi/2) is a multiple of 2^-23, so the first difference is
    exact.
    """
    k = _asm(
        "cvt.rni.s32.f32 {$w0}, {$r0};",
        write_only_types=[Int32],
        read_only_args=[angle * Float32(0.63661977)],
    )
    turns = k.to(Float32)
    r = fma(turns, Float32(-1.5707963705062866), angle)
    r = fma(turns, Float32(4.371139000186241e-08), r)
    x = r * r
    sine = fma(x, Float32(-1.9515295891e-4), Float32(8.3321608736e-3))
    sine = fma(sine, x, Float32(-1.6666654611e-1))
    sine = fma(sine * x, r, r)
    cosine = fma(x, Float32(2.443315711809948e-5), Float32(-1.388731625493765e-3))
    cosine = fma(cosine, x, Float32(4.166664568298827e-2))
    cosine = fma(cosine, x, Float32(-0.5))
    cosine = fma(cosine, x, Float32(1.0))
    swap = (k & Int32(1)) == Int32(1)
    c = sine if swap else cosine
    s = cosine if swap else sine
    c = (c.bitcast(Uint32) ^ (((k + Int32(1)).to(Uint32) & Uint32(2)) << Uint32(30))).bitcast(Float32)
    s = (s.bitcast(Uint32) ^ ((k.to(Uint32) & Uint32(2)) << Uint32(30))).bitcast(Float32)
    return c, s


@cute.jit
def turn(even: Float32, odd: Float32, angle: Float32):
    """The pair (even, odd) turned by `angle`, in f32. A negative angle turns back."""
    c, s = cos_sin(angle)
    return even * c - odd * s, even * s + odd * c
