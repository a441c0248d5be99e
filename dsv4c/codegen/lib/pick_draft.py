"""A draft: the column of the largest of biased logits, and what is known of that token."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, Int64, const_expr

from dsv4c.codegen.lib import cluster, head, ptx
from dsv4c.codegen.lib.slices import Draft


class Operands(NamedTuple):
    """base f32[N, block, columns], bias f32[N, columns] -> token i32[N]. Where wanted: the sums, as `logits`;
    known bf16[N, width], the tokens' rows of table bf16[*, width].
    """

    base: cute.Pointer
    bias: cute.Pointer
    table: cute.Pointer | None
    logits: cute.Pointer | None
    token: cute.Pointer
    known: cute.Pointer | None


@cute.jit
def choose(d: Constexpr[Draft], m: Operands, s: Int32, place: head.Place) -> None:
    """The lowest of the columns with the largest sum."""
    c = d.cut
    row, rank, first, thread, warp, lane = place
    count = cutlass.min(Int32(c.width), c.columns - first)
    g_base = m.base.toint() + Int64(row * d.block + d.step) * (c.columns * 4)
    g_bias = m.bias.toint() + Int64(row) * (c.columns * 4)
    stored = const_expr(m.logits is not None)
    g_logits = m.logits.toint() + Int64(row) * (c.columns * 4) if stored else Int64(0)
    high, low = head.biased_max(
        g_base, g_bias, g_logits, stored, first, count, c.vector, c.steps, thread, c.threads
    )
    cluster.meet()
    high, low = head.block_max(s, high, low, c.warps, warp, lane)
    if warp == 0:
        high, low = head.cluster_max(s + c.o_inbox, s + c.o_bar, high, low, c.ctas, rank, lane)
        if rank == 0:
            if lane == 0:
                ptx.stg32(m.token.toint() + row * 4, ~low)
            if const_expr(m.known is not None):
                g_row = m.table.toint() + (~low).to(Int64) * (d.width * 2)
                g_known = m.known.toint() + Int64(row) * (d.width * 2)
                for n in cutlass.range_constexpr((d.width + 255) // 256):
                    at = (lane + n * 32) * 16
                    if at < d.width * 2:
                        ptx.stg128(g_known + at, *ptx.ldg128(g_row + at))
