"""Elementwise arithmetic in f32 with one cast; transcendental functions in float64, rounded once.

Meanings here take numbers and give them, but for `sum_`.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Float64, const_expr

from dsv4c.codegen.meanings.values import (
    DTYPES,
    Team,
    at,
    lines,
    multiply,
    plus,
    put,
    rounded,
    size,
    total,
    wide,
)


@cute.jit
def add(a, b):
    if const_expr(not type(a).is_float):
        return a + b
    return rounded(plus(a.to(Float32), b.to(Float32)), _common(a, b))


@cute.jit
def mul(a, b):
    if const_expr(not type(a).is_float):
        return a * b
    return rounded(multiply(a.to(Float32), b.to(Float32)), _common(a, b))


def _common(a, b):
    return type(a) if type(a) is type(b) else Float32


@cute.jit
def scale(x, factor: Constexpr[float]):
    return rounded(multiply(x.to(Float32), Float32(factor)), type(x))


@cute.jit
def shift(x, offset: Constexpr[float]):
    return rounded(plus(x.to(Float32), Float32(offset)), type(x))


@cute.jit
def clamp(x, low: Constexpr, high: Constexpr):
    """NaN stays."""
    v = x.to(Float32)
    if const_expr(low is not None):
        v = Float32(low) if v < Float32(low) else v
    if const_expr(high is not None):
        v = Float32(high) if v > Float32(high) else v
    return rounded(v, type(x))


@cute.jit
def silu(x):
    return rounded(wide(x) / (Float64(1.0) + cute.math.exp(-wide(x))), type(x))


@cute.jit
def sigmoid(x):
    return rounded(Float64(1.0) / (Float64(1.0) + cute.math.exp(-wide(x))), type(x))


@cute.jit
def sqrt_softplus(x):
    v = wide(x)
    e = cute.math.exp(v if v < Float64(20.0) else Float64(20.0))
    # log(1 + e) loses what is small of e: (1 + e) - 1 tells how much was lost.
    one = Float64(1.0) + e
    lost = one - Float64(1.0)
    soft = e if lost == Float64(0.0) else cute.math.log(one) * (e / lost)
    soft = soft if v <= Float64(20.0) else v  # NaN too
    return rounded(cute.math.sqrt(soft), type(x))


@cute.jit
def cast(x, to: Constexpr[str]):
    return rounded(x, DTYPES[to])


@cute.jit
def sum_(team: Constexpr[Team], x: cute.Tensor, y: cute.Tensor, axis: Constexpr[int], out: Constexpr[str]):
    """One line per result, its elements `stride` apart."""
    shape = x.shape
    length = shape[axis]
    stride = size(shape[axis % len(shape) + 1 :])
    over = lines(team, size(y.shape), length)
    for line in cutlass.range(over.first, size(y.shape), over.step):
        first = line // stride * (length * stride) + line % stride
        own = Float64(0.0)
        for j in cutlass.range(over.lane, length, over.width):
            own = own + wide(at(x, first + j * stride))
        own = total(own, over)
        if over.lane == 0:
            put(y, line, own)
