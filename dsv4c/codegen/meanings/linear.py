"""Matrix products, a warp per element of the result.

Exact and rounded once, except between two quantized operands: those multiply in steps of the narrower block,
dot products of a step rounded to f32, times both block scales, added in f32 in order of K; then the global
scales.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Float64, Int32, Int64, const_expr

from dsv4c.codegen.meanings import quant
from dsv4c.codegen.meanings.values import (
    Lines,
    Quantized,
    Team,
    array,
    at,
    multiply,
    plus,
    put,
    rounded,
    size,
    total,
    wide,
)


@cute.jit
def linear(team: Team, x, w, y: cute.Tensor, out: Constexpr[str]):
    columns = w.shape[0]
    for i in cutlass.range(team.thread // 32, size(y.shape), team.threads // 32):
        _store(y, i, _product(team, x, i // columns, w, 0, i % columns), team)


@cute.jit
def grouped_linear(team: Team, x, w, y: cute.Tensor, out: Constexpr[str]):
    """x[N, G, K], w[G, M, K]: row n, g of x with matrix g."""
    groups, columns, _ = w.shape
    for i in cutlass.range(team.thread // 32, size(y.shape), team.threads // 32):
        row = i // columns
        _store(y, i, _product(team, x, row, w, row % groups, i % columns), team)


@cute.jit
def expert_linear(team: Team, x, w, experts: cute.Tensor, y: cute.Tensor, out: Constexpr[str]):
    """x[N, K] or x[N, k, K]; a negative expert gives zeros."""
    columns, chosen = w.shape[1], experts.shape[1]
    shared = len(x.shape) == 2
    for i in cutlass.range(team.thread // 32, size(y.shape), team.threads // 32):
        pick = i // columns
        row = pick // chosen if const_expr(shared) else pick
        expert = at(experts, pick)
        value = _product(team, x, row, w, cutlass.max(expert, Int32(0)), i % columns)
        _store(y, i, value if expert >= 0 else Float64(0.0), team)


@cute.jit
def _store(y: cute.Tensor, i: Int32, value: Float64, team: Team):
    if team.thread % 32 == 0:
        put(y, i, value)


def matrix(w, index):
    """Matrix number `index` of [..., M, K]: beyond 2^31 elements only addresses are wide enough."""
    if isinstance(w, Quantized):
        parts = {
            name: None if p is None else _one(p, index, 0 if name == "global_scale" else 2)
            for name, p in zip(("data", "scale", "tail", "global_scale"), w[2:], strict=True)
        }
        return Quantized(w.text, w.shape[-2:], **parts)
    return _one(w, index, 2)


def _one(x, index, rank):
    shape = x.shape[len(x.shape) - rank :] if rank else ()
    return array(x.iterator + Int64(index) * size(shape), shape)


@cute.jit
def _product(team: Team, x, row: Int32, weights, index: Int32, column: Int32):
    """Row of x times row `column` of matrix number `index`, in float64; whole warp."""
    w = matrix(weights, index)
    k = x.shape[-1]
    over = Lines(0, 1, team.thread % 32, 32, team)
    if const_expr(isinstance(x, Quantized) and isinstance(w, Quantized)):
        step = min(x.format.block[1], w.format.block[1])
        own = Float32(0.0)
        for first in cutlass.range(0, k, step):
            dot = Float64(0.0)
            for j in cutlass.range(over.lane, step, 32):
                if first + j < k:
                    a, b = quant.decoded(x, row, first + j), quant.decoded(w, column, first + j)
                    dot = dot + wide(a) * wide(b)
            a_scale = quant.block_scale(x, row, first // x.format.block[1])
            b_scale = quant.block_scale(w, column, first // w.format.block[1])
            partial = multiply(rounded(total(dot, over), Float32), multiply(a_scale, b_scale))
            own = plus(own, partial)
        if const_expr(x.global_scale is not None):
            own = multiply(own, quant.global_scale(x, row))
        if const_expr(w.global_scale is not None):
            own = multiply(own, quant.global_scale(w, column))
        return wide(own)
    dot = Float64(0.0)
    for j in cutlass.range(over.lane, k, 32):
        dot = dot + quant.exact(x, row, j) * quant.exact(w, column, j)
    return total(dot, over)
