"""The largest logit's column, of each row."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, Int64

from dsv4c.codegen.lib import cluster, head, ptx
from dsv4c.codegen.lib.slices import Largest


class Operands(NamedTuple):
    """logits f32[N, columns] -> token i32[N]."""

    logits: cute.Pointer
    token: cute.Pointer


@cute.jit
def choose(c: Constexpr[Largest], m: Operands, s: Int32, at: head.Place) -> None:
    """The lowest of the columns with the largest logit."""
    row, rank, first, thread, warp, lane = at
    count = cutlass.min(Int32(c.width), c.columns - first)
    g_row = m.logits.toint() + Int64(row) * (c.columns * 4)
    high, low = head.column_max(g_row, first, count, c.vector, c.steps, thread, c.threads)
    cluster.meet()
    high, low = head.block_max(s, high, low, c.warps, warp, lane)
    if warp == 0:
        high, low = head.cluster_max(s + c.o_inbox, s + c.o_bar, high, low, c.ctas, rank, lane)
        if rank == 0 and lane == 0:
            ptx.stg32(m.token.toint() + row * 4, ~low)
