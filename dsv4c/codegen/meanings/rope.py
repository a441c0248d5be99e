"""Rotary embedding in f32, of the cosine and sine of the f32 angle, each rounded once."""

import struct
from math import ceil, floor, log, pi

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Float64, Int32, const_expr, range_constexpr

from dsv4c.codegen.meanings.values import Team, at, multiply, plus, put, size, wide


@cute.jit
def rope(
    team: Team,
    x: cute.Tensor,
    positions: cute.Tensor,
    frequencies: cute.Tensor,
    y: cute.Tensor,
    inverse: Constexpr[bool],
    stride: Constexpr[int],
):
    """A thread per pair, plain ones in front of those that turn."""
    width = x.shape[-1]
    pairs = frequencies.shape[0]
    plain = width - 2 * pairs
    each = size(x.shape) // positions.shape[0]
    for i in cutlass.range(team.thread, size(x.shape) // width * pairs, team.threads):
        first = i // pairs * width + plain + i % pairs * 2
        position = (at(positions, first // each) * Int32(stride)).to(Float32)
        angle = multiply(position, at(frequencies, i % pairs))
        c, s = cos_sin(wide(-angle if const_expr(inverse) else angle))
        even, odd = at(x, first).to(Float32), at(x, first + 1).to(Float32)
        put(y, first, plus(multiply(even, c), -multiply(odd, s)))
        put(y, first + 1, plus(multiply(even, s), multiply(odd, c)))
    if const_expr(plain):
        for i in cutlass.range(team.thread, size(x.shape) // width * plain, team.threads):
            at_ = i // plain * width + i % plain
            put(y, at_, at(x, at_))


@cute.jit
def cos_sin(angle: Float64):
    """Cosine and sine in f32 of an angle below 2^20, the quarter turns taken off in two parts."""
    k = cute.arch.inline_ptx(
        "cvt.rni.s32.f64 {$w0}, {$r0};",
        write_only_types=[Int32],
        read_only_args=[angle * Float64(2 / pi)],
    )
    r = angle - k.to(Float64) * Float64(1.5707963267341256)  # 33 bits: exact
    r = r - k.to(Float64) * Float64(6.077100506506192e-11)
    x = r * r
    sine, cosine = Float64(0.0), Float64(0.0)
    for n in range_constexpr(9, -1, -1):  # Taylor: what is left out is below 2^-60
        sine = sine * x + Float64((-1) ** n / _factorial(2 * n + 1))
        cosine = cosine * x + Float64((-1) ** n / _factorial(2 * n))
    sine = sine * r
    swap = (k & Int32(1)) == Int32(1)
    c = sine if swap else cosine
    s = cosine if swap else sine
    c = -c if ((k + Int32(1)) & Int32(2)) == Int32(2) else c
    s = -s if (k & Int32(2)) == Int32(2) else s
    return c.to(Float32), s.to(Float32)


def _factorial(n: int) -> int:
    return 1 if n == 0 else n * _factorial(n - 1)


@cute.jit
def rope_frequencies(
    team: Team,
    y: cute.Tensor,
    theta: Constexpr[float],
    dims: Constexpr[int],
    factor: Constexpr[float],
    original_max_position: Constexpr[int],
    beta_fast: Constexpr[float],
    beta_slow: Constexpr[float],
):
    """Constants of the model, so of the kernel."""
    table = frequencies_of(theta, dims, factor, original_max_position, beta_fast, beta_slow)
    for i in range_constexpr(dims // 2):
        if team.thread == i % team.threads:
            put(y, i, Float32(table[i]))


def frequencies_of(
    theta: float, dims: int, factor: float, original: int, beta_fast: float, beta_slow: float
) -> list[float]:
    """The table, every step rounded to f32 as in the reference."""

    def pair_of(turns: float) -> float:
        return dims * log(original / (turns * 2 * pi)) / (2 * log(theta))

    powers = [_f32(theta ** _f32(_f32(2 * i) / dims)) for i in range(dims // 2)]
    plain = [_f32(1.0 / p) for p in powers]
    if factor == 1:
        return plain
    low, high = max(floor(pair_of(beta_fast)), 0), min(ceil(pair_of(beta_slow)), dims - 1)
    span = high - low if high != low else 0.001
    table = []
    for i, f in enumerate(plain):
        slow = min(max(_f32(_f32(i - low) / span), 0.0), 1.0)
        fast = _f32(1 - slow)
        kept, cut = _f32(f * fast), _f32(_f32(f / factor) * _f32(1 - fast))
        table.append(_f32(cut + kept))
    return table


def _f32(x: float) -> float:
    return float(struct.unpack("f", struct.pack("f", x))[0])
