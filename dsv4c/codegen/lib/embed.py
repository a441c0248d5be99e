"""Embedding: the row of a token, copied to the streams."""

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Constexpr, Int32, Int64

from dsv4c.codegen.lib import ptx
from dsv4c.codegen.lib.slices import Embedding


class Operands(NamedTuple):
    """table bf16[*, hidden], ids i32[N] -> x bf16[N, streams, hidden]."""

    table: cute.Pointer
    ids: cute.Pointer
    x: cute.Pointer


@cute.jit
def copy_row(e: Constexpr[Embedding], m: Operands) -> None:
    """Eight columns of a token's row by each thread; a grid of (parts, tokens)."""
    thread, _, _ = cute.arch.thread_idx()
    part, row, _ = cute.arch.block_idx()
    column = (part * e.threads + thread) * 8
    if column < e.hidden:
        token = Int32(ptx.ldg32(m.ids.toint() + row * 4))
        w = ptx.ldg128_constant(m.table.toint() + (Int64(token) * e.hidden + column) * 2)
        for stream in range(e.streams):
            out = m.x.toint() + ((Int64(row) * e.streams + stream) * e.hidden + column) * 2
            ptx.stg128(out, w[0], w[1], w[2], w[3])
