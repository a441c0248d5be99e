"""Where a step's tokens are: the positions of each sequence's, and how they move on."""

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Constexpr, Int32, Uint32, const_expr

from dsv4c.codegen.lib import ptx
from dsv4c.codegen.lib.slices import Run


class Operands(NamedTuple):
    """start i32[S], slots, lengths i32[B] -> positions, row_slots i32[B * tokens]."""

    start: cute.Pointer
    slots: cute.Pointer
    lengths: cute.Pointer
    positions: cute.Pointer
    row_slots: cute.Pointer


class Advanced(NamedTuple):
    """start i32[S], which moves on; slots, lengths i32[B]."""

    start: cute.Pointer
    slots: cute.Pointer
    lengths: cute.Pointer


@cute.jit
def count(p: Constexpr[Run], m: Operands) -> None:
    """start + t for token t of a sequence and its slot, -1 and 0 from lengths on; a grid of (sequences,
    parts).
    """
    token, _, _ = cute.arch.thread_idx()
    sequence, part, _ = cute.arch.block_idx()
    if const_expr(p.ctas > 1):
        token = part * p.threads + token
    if token < p.tokens:
        slot = Int32(ptx.ldg32(m.slots.toint() + sequence * 4))
        position, place = Int32(-1), Int32(0)
        if token < Int32(ptx.ldg32(m.lengths.toint() + sequence * 4)):
            position = Int32(ptx.ldg32(m.start.toint() + slot * 4)) + token
            place = slot
        at = (sequence * p.tokens + token) * 4
        ptx.stg32(m.positions.toint() + at, position.bitcast(Uint32))
        ptx.stg32(m.row_slots.toint() + at, place.bitcast(Uint32))


@cute.jit
def advance(m: Advanced) -> None:
    """start += lengths at a sequence's slot, by one thread of its CTA."""
    thread, _, _ = cute.arch.thread_idx()
    sequence, _, _ = cute.arch.block_idx()
    length = Int32(ptx.ldg32(m.lengths.toint() + sequence * 4))
    slot = Int32(ptx.ldg32(m.slots.toint() + sequence * 4))
    if thread == 0 and length != 0:
        g_start = m.start.toint() + slot * 4
        ptx.stg32(g_start, (Int32(ptx.ldg32(g_start)) + length).bitcast(Uint32))
