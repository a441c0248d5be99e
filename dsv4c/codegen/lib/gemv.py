"""Products of few rows with streamed weights: rows staged as the weights want them, multiplied, summed.

A CTA works on one matrix of a part, some tiles of 16 of its rows. Its last warp reads the weights, before and
behind the wait (`read_weights`); the others `enter`, wait, stage the activations, and `multiply`.
"""

from collections.abc import Callable
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, Int64, const_expr, range_constexpr

from dsv4c.codegen.lib import activations, nvfp4, ptx, stream
from dsv4c.codegen.lib.shapes import Products


class Operands(NamedTuple):
    """x [M, groups, k] with what its prologue takes: scales, global scales, a gain f32[k]. Of each matrix, in
    order: weights, FP8 block scales or NVFP4 global scales, and a result bf16 or f32 [M, rows], unless an
    epilogue makes something else of it.
    """

    x: cute.Pointer
    weights: tuple[cute.Pointer, ...]
    scales: tuple[cute.Pointer, ...] = ()
    results: tuple[cute.Pointer, ...] = ()
    x_scale: cute.Pointer | None = None
    x_global: cute.Pointer | None = None
    gain: cute.Pointer | None = None


class Arrays(NamedTuple):
    """Shared arrays of a CTA, as `Products.at` lays them out."""

    ring: Int32
    x: Int32
    fx: Int32
    squares: Int32
    gain: Int32
    scale: Int32
    part: Int32
    bars: Int32
    bar: Int32


class Place(NamedTuple):
    """What a thread works on: of a matrix of `rows` rows on `ctas` CTAs the part of CTA `local`, in so many
    rounds, for the activation rows from `first` on. Addresses are of what is its part's.
    """

    s: Arrays
    tid: Int32
    warp: Int32
    lane: Int32
    local: Int32
    ctas: Int32
    rows: Int32
    rounds: Int32
    first: Int32
    x: Int64
    x_scale: Int64
    x_global: Int64
    scale: Int64
    result: Int64


def first_row(p: Products, block: Int32) -> Int32:
    """The first of CTA `block`'s activation rows, where neighbors share the weights: whoever comes later
    reads them from L2. The last one's start early: what two CTAs compute they compute alike, and store the
    same bytes.
    """
    first = block % p.splits * p.own
    return cutlass.min(first, p.batch - p.own) if p.batch % p.own else first


@cute.jit
def _seat(
    p: Constexpr[Products], block: Int32, one: tuple[cute.Pointer, ...], other: tuple[cute.Pointer, ...]
) -> tuple[Int32, Int32, Int32, Int32, Int64, Int64]:
    """Where CTA `block` of the part sits: its number on a matrix, how many work on it, the matrix's rows, the
    rounds; and the matrix's addresses among `one` and `other`.
    """
    if const_expr(p.splits > 1):
        block = block // p.splits
    local = block
    ctas, rows = Int32(p.seats[0].ctas), Int32(p.seats[0].rows)
    g, h = _address(one, 0), _address(other, 0)
    for n in range_constexpr(1, len(p.seats)):
        if block >= p.seats[n].first:
            local = block - p.seats[n].first
            ctas, rows = Int32(p.seats[n].ctas), Int32(p.seats[n].rows)
            g, h = _address(one, n), _address(other, n)
    rounds, tile = Int32(1), const_expr(16 * p.ring.tile_warps)
    if const_expr(p.ring.rounds > 1):
        rounds = ((rows + (tile - 1)) // tile - local + ctas - 1) // ctas
    return local, ctas, rows, rounds, g, h


def _arrays(p: Products, s: Int32) -> Arrays:
    """Where they are; those that there are not, nowhere."""
    return Arrays(*(s + getattr(p.at, name) if name in p.at.sizes else Int32(0) for name in Arrays._fields))


def _address(pointers: tuple[cute.Pointer, ...], number: int) -> Int64:
    """That of a matrix's operand; 0 where there are none."""
    return pointers[number].toint() if pointers else Int64(0)


@cute.jit
def enter(p: Constexpr[Products], m: Operands, s: Int32, block: Int32) -> Place:
    """Before the wait, on CTA `block` of the part: FP8 block scales and a norm's gain into flight."""
    r, k = p.ring, p.ring.product.k
    tid, _, _ = cute.arch.thread_idx()
    lane = cute.arch.lane_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    a = _arrays(p, s)
    first = Int32(0)
    if const_expr(p.splits > 1):
        first = first_row(p, block)
    local, ctas, rows, rounds, g_y, g_scale = _seat(p, block, m.results, m.scales)
    g_x = m.x.toint()
    g_fx = Int64(0) if const_expr(m.x_scale is None) else m.x_scale.toint()
    g_gx = Int64(0) if const_expr(m.x_global is None) else m.x_global.toint()
    if const_expr(p.splits > 1):
        g_x = g_x + Int64(first) * (p.groups * p.row_bytes)
        g_fx = g_fx + Int64(first) * (p.groups * k // 16 if p.prologue == "unpack" else k // 128)
        g_gx = g_gx + Int64(first) * (p.groups * 4)
        g_y = g_y + Int64(first) * rows * p.out_bytes
    if const_expr(p.groups > 1):
        group = Int64(local // (p.seats[0].ctas // p.groups))
        g_x = g_x + group * p.row_bytes
        if const_expr(p.prologue == "unpack"):
            g_fx = g_fx + group * (k // 16)
            g_gx = g_gx + group * 4
        if const_expr(r.product.weight == "nvfp4"):
            g_scale = g_scale + group * 4
    ptx.meet(ptx.OPEN, p.threads)
    if const_expr(r.product.weight == "fp8"):
        first_tiles = local * r.matrices if const_expr(r.matrices > 1) else local
        stream.load_block_scales(r, a.scale, g_scale, first_tiles, ctas, rows // 16, tid, p.consumers)
    if const_expr(p.prologue in ("copy", "normalize")):
        ptx.open_barrier(a.bar, tid)
    if const_expr(p.prologue == "normalize"):
        g_gain = m.gain.toint()
        if tid == 0:
            activations.load_gain(r.product, a.gain, a.bar, g_gain)
    return Place(a, tid, warp, lane, local, ctas, rows, rounds, first, g_x, g_fx, g_gx, g_scale, g_y)


@cute.jit
def copy_rows(p: Constexpr[Products], at: Place) -> None:
    """Rows as their producer left them, into flight. One warp, behind the wait."""
    row_bytes = const_expr(p.groups * p.row_bytes)
    activations.copy_rows(p.ring.product, at.s.x, at.s.fx, at.s.bar, at.x, at.x_scale, row_bytes, at.lane)


@cute.jit
def stage_rows(p: Constexpr[Products], at: Place) -> None:
    """Rows made what the weights want, by another prologue. Behind the wait."""
    x, s, tid, threads = p.ring.product, at.s, at.tid, p.consumers
    row_bytes = const_expr(p.groups * p.row_bytes)
    if const_expr(p.prologue == "expand"):
        codes = activations.load_codes(x, at.x, row_bytes, tid, threads)
        activations.expand_rows(x, codes, s.x, s.fx, at.x_scale, tid, threads)
    elif const_expr(p.prologue == "unpack"):
        packed = nvfp4.load_packed(x, at.x, at.x_scale, row_bytes, tid, threads)
        nvfp4.expand_rows(x, packed, s.x, s.fx, at.x_global, row_bytes, tid, threads)
    elif const_expr(p.prologue == "quantize"):
        activations.quantize_rows(x, s.x, s.fx, at.x, row_bytes, tid, threads)
    else:
        activations.normalize_quantize_rows(x, s.x, s.fx, s.squares, s.gain, s.bar, at.x, p.eps, tid, threads)


@cute.jit
def multiply(
    p: Constexpr[Products],
    at: Place,
    epilogue: Constexpr[Callable[..., None] | None] = None,
    others: tuple[cute.Pointer, ...] = (),
) -> None:
    """The part's products with staged rows, summed over the warps of a tile, and stored; or what an
    `epilogue` makes of number `value` and its place in [M, rows], with `others`.
    """
    r, s, own = p.ring, at.s, p.own
    ptx.sync_threads(p.consumers)
    if const_expr(p.prologue == "copy"):
        activations.arrived(s.bar)
    stream.consume(r, s.ring, s.bars, s.x, s.fx, s.scale, s.part, at.warp, at.lane, at.rounds)
    ptx.sync_threads(p.consumers)
    if const_expr(epilogue is not None and p.prologue == "copy"):
        ptx.wait()  # so far only one warp has
    for n in range_constexpr(-(-r.rounds * r.sharing * own * 16 // p.consumers)):
        i = at.tid + n * p.consumers
        column = i % 16
        row = i // 16 % own
        tile = i // (16 * own) % r.tile_warps
        turn, side = i // (16 * own * r.tile_warps), Int32(0)
        group = at.local + turn * at.ctas
        if const_expr(r.matrices > 1):
            turn, side = Int32(0), turn
            group = at.local * r.matrices + side
        out = (group * r.tile_warps + tile) * 16 + column
        if turn < r.rounds and side < r.matrices and out < at.rows:
            value = stream.tile_sum(r, s.part, turn, side, tile, row, column)
            if const_expr(r.product.weight == "nvfp4"):
                value = value * ptx.ldg_f32_constant(at.scale)
            if const_expr(epilogue is not None):
                if const_expr(p.splits > 1):
                    epilogue(value, at.first * at.rows + row * at.rows + out, *others)  # type: ignore[misc]
                else:
                    epilogue(value, row * at.rows + out, *others)  # type: ignore[misc]
            elif const_expr(p.out == "bf16"):
                ptx.stg16(at.result + Int64(row * at.rows + out) * 2, ptx.f32x2_to_bf16x2(value, value))
            else:
                ptx.stg_f32(at.result + Int64(row * at.rows + out) * 4, value)


@cute.jit
def read_weights(p: Constexpr[Products], m: Operands, s: Int32, block: Int32) -> None:
    """The last warp of CTA `block`: its weights into flight, whatever predecessors are at."""
    r = p.ring
    lane = cute.arch.lane_idx()
    s_ring, s_bars = s + p.at.ring, s + p.at.bars
    stream.open_ring(r, s_bars, lane)
    ptx.arrive(ptx.OPEN, p.threads)
    local, ctas, _, rounds, g_w, _ = _seat(p, block, m.weights, ())
    tile = local
    if const_expr(r.rounds > 1):
        tile = local + lane * ctas
    if const_expr(r.matrices > 1):
        tile = local * r.matrices
    g_lane = g_w + Int64(tile) * r.group_bytes
    stream.produce(r, s_ring, s_bars, g_lane, Int64(r.group_bytes), Int32(0), rounds * r.steps, lane)
