"""Residual streams of the hyper-connections, a thread per element."""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Float64, range_constexpr

from dsv4c.codegen.meanings.values import Team, at, multiply, put, size, wide


@cute.jit
def expand_streams(team: Team, h: cute.Tensor, y: cute.Tensor, streams: Constexpr[int]):
    width = h.shape[1]
    for i in cutlass.range(team.thread, size(y.shape), team.threads):
        put(y, i, at(h, i // (streams * width) * width + i % width))


@cute.jit
def collapse_streams(team: Team, x: cute.Tensor, weights: cute.Tensor, y: cute.Tensor, out: Constexpr[str]):
    _, streams, width = x.shape
    for i in cutlass.range(team.thread, size(y.shape), team.threads):
        row, column = i // width, i % width
        own = Float64(0.0)
        for k in range_constexpr(streams):
            stream = row * streams + k
            own = own + wide(at(weights, stream)) * wide(at(x, stream * width + column))
        put(y, i, own)


@cute.jit
def mix_streams(team: Team, x: cute.Tensor, comb: cute.Tensor, y: cute.Tensor):
    _, streams, width = x.shape
    for i in cutlass.range(team.thread, size(y.shape), team.threads):
        row, k, column = i // (streams * width), i // width % streams, i % width
        own = Float64(0.0)
        for j in range_constexpr(streams):
            factor = wide(at(comb, (row * streams + j) * streams + k))
            own = own + factor * wide(at(x, (row * streams + j) * width + column))
        put(y, i, own)


@cute.jit
def spread_streams(team: Team, f: cute.Tensor, post: cute.Tensor, y: cute.Tensor):
    width, streams = f.shape[1], post.shape[1]
    for i in cutlass.range(team.thread, size(y.shape), team.threads):
        value = at(f, i // (streams * width) * width + i % width)
        put(y, i, multiply(at(post, i // width), value.to(Float32)))
