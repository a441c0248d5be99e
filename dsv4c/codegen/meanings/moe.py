"""Table lookups, and which rows have experts, a thread per element."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int64, const_expr

from dsv4c.codegen.meanings.values import Team, array, at, put, size


@cute.jit
def embedding(team: Team, table: cute.Tensor, ids: cute.Tensor, y: cute.Tensor):
    width = size(y.shape) // size(ids.shape)
    for i in cutlass.range(team.thread, size(y.shape), team.threads):
        row = array(table.iterator + Int64(at(ids, i // width)) * width, (width,))
        put(y, i, row[i % width])


@cute.jit
def take_along(team: Team, x: cute.Tensor, index: cute.Tensor, y: cute.Tensor):
    count = x.shape[-1]
    each = index.shape[1]
    for i in cutlass.range(team.thread, size(y.shape), team.threads):
        first = 0 if const_expr(len(x.shape) == 1) else i // each * count
        put(y, i, at(x, first + at(index, i)))


@cute.jit
def present(team: Team, weights: cute.Tensor, positions: cute.Tensor, y: cute.Tensor):
    each = weights.shape[1]
    for i in cutlass.range(team.thread, size(y.shape), team.threads):
        put(y, i, at(weights, i) if at(positions, i // each) >= 0 else Float32(0.0))
