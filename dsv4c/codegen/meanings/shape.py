"""Changes of shape as copies, a thread per element: where a value is no view of another one's bytes."""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, range_constexpr

from dsv4c.codegen.meanings.values import Team, at, parts_of, put, size


@cute.jit
def reshape(team: Team, x: cute.Tensor, y: cute.Tensor, shape: Constexpr):
    for i in cutlass.range(team.thread, size(y.shape), team.threads):
        put(y, i, at(x, i))


@cute.jit
def slice_(
    team: Team,
    x: cute.Tensor,
    y: cute.Tensor,
    axis: Constexpr[int],
    start: Constexpr[int],
    stop: Constexpr[int],
):
    stride = size(x.shape[axis % len(x.shape) + 1 :])
    own, whole = (stop - start) * stride, x.shape[axis] * stride
    for i in cutlass.range(team.thread, size(y.shape), team.threads):
        put(y, i, at(x, i // own * whole + start * stride + i % own))


@cute.jit
def concat(team: Team, *values, axis: Constexpr[int]):
    """Quantized values part by part: they join along a leading dimension, which all parts have."""
    *parts, y = values
    place = axis % len(y.shape)
    for n in range_constexpr(len(parts_of(y))):
        joined = parts_of(y)[n]
        behind = size(joined.shape[place + 1 :])
        first = 0
        for p in range_constexpr(len(parts)):
            _copy(team, parts_of(parts[p])[n], joined, first * behind, joined.shape[place] * behind)
            first = first + parts_of(parts[p])[n].shape[place]


@cute.jit
def _copy(team: Team, x: cute.Tensor, y: cute.Tensor, first: Constexpr[int], whole: Constexpr[int]):
    own = size(x.shape) * whole // size(y.shape)
    for i in cutlass.range(team.thread, size(x.shape), team.threads):
        put(y, i // own * whole + first + i % own, at(x, i))
