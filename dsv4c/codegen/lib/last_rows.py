"""The last row of each sequence's."""

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Constexpr, Int32, Int64, Uint32, range_constexpr

from dsv4c.codegen.lib import ptx
from dsv4c.codegen.lib.slices import LastRow


class Operands(NamedTuple):
    """x bf16[B * tokens, hidden], lengths i32[B] -> y bf16[B, hidden]."""

    x: cute.Pointer
    lengths: cute.Pointer
    y: cute.Pointer


@cute.jit
def copy_row(r: Constexpr[LastRow], m: Operands) -> None:
    """16 bytes of row lengths - 1, or zeros, by each thread; a grid of (parts, sequences)."""
    thread, _, _ = cute.arch.thread_idx()
    part, sequence, _ = cute.arch.block_idx()
    at = (part * r.threads + thread) * 16
    if at < r.row_bytes:
        length = Int32(ptx.ldg32(m.lengths.toint() + sequence * 4))
        w = cute.make_rmem_tensor((4,), Uint32)
        w.fill(0)
        if length > 0:
            last = Int64(sequence * r.tokens + length - 1)
            words = ptx.ldg128(m.x.toint() + last * r.row_bytes + at)
            for i in range_constexpr(4):
                w[i] = words[i]
        ptx.stg128(m.y.toint() + Int64(sequence) * r.row_bytes + at, w[0], w[1], w[2], w[3])
