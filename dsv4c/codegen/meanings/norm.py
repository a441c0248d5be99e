"""Normalizations."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Constexpr, Float32, Float64, const_expr, range_constexpr

from dsv4c.codegen.lib import ptx
from dsv4c.codegen.meanings.values import (
    Team,
    at,
    bf16,
    largest,
    lines,
    multiply,
    plus,
    put,
    reciprocal_root,
    rounded,
    size,
    total,
    wide,
)

HELD = 16  # numbers of a line that a thread keeps in registers


@cute.jit
def mean_square(x: cute.Tensor, line: cutlass.Int32, over: Constexpr):
    """mean(x²) of a line in float64, in all its threads."""
    width = x.shape[-1]
    own = Float64(0.0)
    for j in cutlass.range(over.lane, width, over.width):
        v = wide(at(x, line * width + j))
        own = own + v * v
    return total(own, over) / Float64(width)


@cute.jit
def rms_norm(team: Constexpr[Team], x: cute.Tensor, *rest, eps: Constexpr[float], precision: Constexpr[str]):
    """x[..., K] and perhaps gain[K] -> y[..., K]."""
    *gain, y = rest
    width = x.shape[-1]
    count = size(x.shape) // width
    over = lines(team, count, width)
    for line in cutlass.range(over.first, count, over.step):
        if const_expr(precision == "bf16"):
            _bf16_line(x, y, line, over, eps)
        elif const_expr(width <= HELD * over.width):
            _held_line(x, gain, y, line, over, eps)
        else:
            root = reciprocal_root(plus(rounded(mean_square(x, line, over), Float32), Float32(eps)))
            for j in cutlass.range(over.lane, width, over.width):
                v = multiply(at(x, line * width + j).to(Float32), root)
                if const_expr(len(gain) == 1):
                    v = multiply(v, at(gain[0], j).to(Float32))
                put(y, line * width + j, v)


@cute.jit
def _held_line(
    x: cute.Tensor,
    gain: Constexpr,
    y: cute.Tensor,
    line: cutlass.Int32,
    over: Constexpr,
    eps: Constexpr[float],
):
    """A line in the registers of its threads: all of it is on its way before anything is added up."""
    width = x.shape[-1]
    rounds = -(-width // over.width)
    r, g = cute.make_rmem_tensor((rounds,), Float32), cute.make_rmem_tensor((rounds,), Float32)
    for n in range_constexpr(rounds):
        j = cutlass.min(over.lane + n * over.width, width - 1)
        r[n] = at(x, line * width + j).to(Float32)
        g[n] = at(gain[0], j).to(Float32) if const_expr(len(gain) == 1) else Float32(1.0)
    own = Float64(0.0)
    for n in range_constexpr(rounds):
        v = wide(r[n] if over.lane + n * over.width < width else Float32(0.0))
        own = own + v * v
    root = reciprocal_root(plus(rounded(total(own, over) / Float64(width), Float32), Float32(eps)))
    for n in range_constexpr(rounds):
        if over.lane + n * over.width < width:
            put(y, line * width + over.lane + n * over.width, multiply(multiply(r[n], root), g[n]))


@cute.jit
def _bf16_line(x: cute.Tensor, y: cute.Tensor, line: cutlass.Int32, over: Constexpr, eps: Constexpr[float]):
    """Every step rounded once to bf16."""
    width = x.shape[-1]
    own = Float64(0.0)
    for j in cutlass.range(over.lane, width, over.width):
        v = at(x, line * width + j).to(BFloat16).to(Float32)
        own = own + wide(multiply(v, v).to(BFloat16))
    mean = rounded(total(own, over) / Float64(width), BFloat16)
    shifted = plus(mean.to(Float32), Float32(bf16(eps))).to(BFloat16).to(Float32)
    root = reciprocal_root(shifted).to(BFloat16).to(Float32)
    for j in cutlass.range(over.lane, width, over.width):
        v = at(x, line * width + j).to(BFloat16).to(Float32)
        put(y, line * width + j, multiply(v, root).to(BFloat16))


@cute.jit
def rsqrt_mean_square(team: Constexpr[Team], x: cute.Tensor, y: cute.Tensor, eps: Constexpr[float]):
    width = x.shape[-1]
    count = size(x.shape) // width
    over = lines(team, count, width)
    for line in cutlass.range(over.first, count, over.step):
        root = reciprocal_root(plus(rounded(mean_square(x, line, over), Float32), Float32(eps)))
        if over.lane == 0:
            put(y, line, root)


@cute.jit
def normalize(
    team: Constexpr[Team], x: cute.Tensor, y: cute.Tensor, axis: Constexpr[int], eps: Constexpr[float]
):
    shape = x.shape
    length = shape[axis]
    stride = size(shape[axis % len(shape) + 1 :])
    count = size(shape) // length
    over = lines(team, count, length)
    for line in cutlass.range(over.first, count, over.step):
        first = line // stride * (length * stride) + line % stride
        own = Float64(0.0)
        for j in cutlass.range(over.lane, length, over.width):
            own = own + wide(at(x, first + j * stride))
        below = plus(rounded(total(own, over), Float32), Float32(eps))
        for j in cutlass.range(over.lane, length, over.width):
            put(y, first + j * stride, ptx.divide(at(x, first + j * stride), below))


@cute.jit
def softmax(team: Constexpr[Team], x: cute.Tensor, y: cute.Tensor, axis: Constexpr[int]):
    shape = x.shape
    length = shape[axis]
    stride = size(shape[axis % len(shape) + 1 :])
    count = size(shape) // length
    over = lines(team, count, length)
    for line in cutlass.range(over.first, count, over.step):
        first = line // stride * (length * stride) + line % stride
        top = Float32(-Float32.inf)
        for j in cutlass.range(over.lane, length, over.width):
            top = cute.arch.fmax(top, at(x, first + j * stride))
        top = largest(top, over)
        own = Float64(0.0)
        for j in cutlass.range(over.lane, length, over.width):
            own = own + cute.math.exp(wide(at(x, first + j * stride)) - wide(top))
        below = total(own, over)
        for j in cutlass.range(over.lane, length, over.width):
            put(y, first + j * stride, cute.math.exp(wide(at(x, first + j * stride)) - wide(top)) / below)
