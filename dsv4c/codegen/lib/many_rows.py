"""Products of many rows on wgmma (sm_90a): which tile a CTA takes, and what each of its warps does for it.

A CTA, or a cluster that splits k, takes tiles of rows and columns in turn. Its first eight warps multiply and
store results; the others lay down steps of operands (`gemm.load`), or copy them while eight more expand
weights (`expanding`). All count tiles alike, so nobody says which one it is at.
"""

from collections.abc import Callable
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Float32, Int32, Int64, const_expr, range_constexpr

from dsv4c.codegen.lib import expanding, gemm, ptx
from dsv4c.codegen.lib.tiles import Gemm


class Matrix(NamedTuple):
    """w [rows, k], or w and v [rows, k] whose columns an activation pairs, or of every expert, with FP8 block
    scales or NVFP4 global scales; y [M, rows], the results, unless an epilogue makes something else of them.
    """

    w: cute.Pointer
    w_scale: cute.Pointer | None
    v: cute.Pointer | None
    v_scale: cute.Pointer | None
    y: cute.Pointer | None


class Operands(NamedTuple):
    """x [M, groups, k], e4m3 with ue8m0 scales per 128 or bf16, and matrices. Of experts order
    i32[experts, rows], the numbers of rows of results of each, counts i32[experts], how many these are, and
    weights f32[rows], factors of rows of paired results. lengths i32: rows that there are. others: an
    epilogue's.
    """

    x: cute.Pointer
    x_scale: cute.Pointer | None
    matrices: tuple[Matrix, ...]
    order: cute.Pointer | None
    counts: cute.Pointer | None
    weights: cute.Pointer | None
    lengths: cute.Pointer | None
    others: tuple[cute.Pointer, ...]


class Place(NamedTuple):
    """Which thread of which CTA this is."""

    thread: Int32
    block: Int32
    warp: Int32
    lane: Int32


class Work(NamedTuple):
    """What there is to do: rows, tiles of them, and tiles in all. Of these a CTA, of so many a rank in its
    cluster, takes number `tile` first, if that is `mine`.
    """

    rows: Int32
    row_tiles: Int32
    tiles: Int32
    tile: Int32
    rank: Int32
    mine: Boolean


class Tile(NamedTuple):
    """A tile: its columns' number, its first row, or whose rows it has, where their numbers are listed. There
    are `rows` rows, or so many from the first on of an expert's.
    """

    number: Int32
    row: Int32
    expert: Int32
    g_order: Int64
    rows: Int32


@cute.jit
def enter() -> Place:
    """Where this thread is."""
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    lane = cute.arch.lane_idx()
    return Place(thread, block, warp, lane)


@cute.jit
def open_ring(g: Constexpr[Gemm], s: Int32, place: Place) -> None:
    """Its barriers. All threads, before the wait."""
    gemm.open_ring(g.tiles, s, place.thread)


@cute.jit
def count(g: Constexpr[Gemm], m: Operands, s: Int32, place: Place) -> Work:
    """How many rows there are, and so tiles. All threads."""
    t = g.tiles
    rows = Int32(g.rows)
    if const_expr(t.experts):
        row_tiles = gemm.count_tiles(t, s, m.counts.toint(), place.warp, place.lane)
    else:
        if const_expr(g.counted):
            rows = cutlass.min(Int32(ptx.ldg32(m.lengths.toint())), Int32(g.rows))
        row_tiles = (rows + (t.height - 1)) // t.height
    tiles = row_tiles * g.column_tiles
    rank, tile = Int32(0), Int32(place.block)
    if const_expr(t.splits > 1):
        rank, tile = place.block % t.splits, Int32(place.block) // t.splits
    return Work(rows, row_tiles, tiles, tile, rank, tile < tiles)


@cute.jit
def _find(g: Constexpr[Gemm], m: Operands, s: Int32, work: Work, tile: Int32) -> Tile:
    """Tile number `tile`. What reads the same rows of experts, or the same weights, runs at the same time."""
    t = g.tiles
    if const_expr(t.experts):
        number = tile % g.column_tiles
        expert, part = gemm.find_expert(t, s, tile // g.column_tiles)
        rows = Int32(ptx.ldg32(m.counts.toint() + expert * 4)) - part * t.height
        g_order = m.order.toint() + (Int64(expert) * g.rows + part * t.height) * 4
        return Tile(number, Int32(0), expert, g_order, rows)
    number = tile // work.row_tiles
    row = tile % work.row_tiles * t.height
    return Tile(number, row, Int32(0), Int64(0), work.rows)


# Results ----------------------------------------------------------------------------------------------------


@cute.jit
def multiply(
    g: Constexpr[Gemm],
    m: Operands,
    s: Int32,
    place: Place,
    work: Work,
    epilogue: Constexpr[Callable[..., None] | None] = None,
) -> None:
    """The first eight warps: products of the CTA's tiles, and their results, or what an `epilogue` makes of
    number `value` and its place in [M, rows].
    """
    t = g.tiles
    cute.arch.setmaxregister_increase(t.registers[0])
    if const_expr(t.early):
        ptx.wait()
    group = place.warp // 4
    within = place.warp * 16  # the warp's first row of the tile
    if const_expr(t.height == 64):
        within = place.warp % 4 * 16
    if const_expr(t.height == 256):
        within = group * 128 + place.warp % 4 * 16
    at, tile = Int32(0), Int32(work.tile)
    while tile < work.tiles:
        found = _find(g, m, s, work, tile)
        if const_expr(t.experts and t.height == 128):
            if group * 64 < found.rows:
                _results(g, m, s, place, work, found, at, group, within, epilogue)
            else:
                gemm.pass_by(t, s, at, place.thread)
        else:
            _results(g, m, s, place, work, found, at, group, within, epilogue)
        if const_expr(t.splits > 1):
            cute.arch.cluster_wait()
        at = at + t.steps
        tile = tile + g.ctas


@cute.jit
def _results(
    g: Constexpr[Gemm],
    m: Operands,
    s: Int32,
    place: Place,
    work: Work,
    found: Tile,
    at: Int32,
    group: Int32,
    within: Int32,
    epilogue: Constexpr[Callable[..., None] | None],
) -> None:
    """A tile's products, and what is stored of them."""
    t, lane = g.tiles, place.lane
    to = Int32(-1)
    weights = [Float32(1.0), Float32(1.0)]
    if const_expr(t.experts):
        own = within + lane % 16
        if own < found.rows:
            to = Int32(ptx.ldg32(found.g_order + own * 4))
        if const_expr(t.paired):
            for half in range_constexpr(2):
                given = cute.arch.shuffle_sync(to, lane // 4 + 8 * half)
                weights[half] = ptx.ldg_f32(m.weights.toint() + Int64(cutlass.max(given, Int32(0))) * 4)
    sums = gemm.multiply(t, s, at, group, place.thread)
    first, width, g_y, factors = _columns(g, m, found.number, found.expert)
    for half in range_constexpr(t.halves):
        values = sums[half]
        if const_expr(t.splits > 1):
            values = gemm.add_splits(t, s, values, work.rank, place.thread)
        if const_expr(t.weight == "nvfp4"):
            gemm.scale_sums(t, values, factors)
        if const_expr(not t.experts):
            to = found.row + within + lane % 16 + 64 * half
            if to >= found.rows:
                to = Int32(-1)
        if const_expr(t.paired):
            values = gemm.activate(t, values, g.limit, tuple(weights))
        column = first * t.made
        if const_expr(t.height == 64):
            column = column + group * (t.made // 2)
        if const_expr(t.splits > 1):
            column = column + work.rank * (8 * t.summed // (2 if t.paired else 1))
        if const_expr(epilogue is None):
            gemm.store(t, s, values, g_y, width * g.size, to, column, width, g.size, place.warp, lane)
        else:
            gemm.give(t, s, values, to, column, width, epilogue, m.others, place.warp, lane)  # type: ignore[arg-type]


@cute.jit
def _columns(
    g: Constexpr[Gemm], m: Operands, number: Int32, expert: Int32
) -> tuple[Int32, Int32, Int64, tuple]:
    """Of the matrix that column tile `number` is of: which tile of its own that is, its columns, where its
    results are, and NVFP4's factors of them.
    """
    first, width, g_y, factors = (
        number,
        Int32(g.seats[0].rows),
        _address(m.matrices[0].y),
        _factors(g, m, 0, expert),
    )
    for n in range_constexpr(1, len(g.seats)):
        if number >= g.seats[n].first:
            first, width, g_y = number - g.seats[n].first, Int32(g.seats[n].rows), _address(m.matrices[n].y)
            factors = _factors(g, m, n, expert)
    return first, width, g_y, factors


def _address(y: cute.Pointer | None) -> Int64:
    """That of results; 0 where an epilogue has them."""
    return Int64(0) if y is None else y.toint()


@cute.jit
def _factors(g: Constexpr[Gemm], m: Operands, n: Constexpr[int], expert: Int32) -> tuple:
    """Global scales of matrix `n`, of NVFP4."""
    if const_expr(g.tiles.weight != "nvfp4"):
        return (Float32(1.0),)
    scales = [m.matrices[n].w_scale, *([m.matrices[n].v_scale] if g.tiles.paired else [])]
    if const_expr(g.tiles.experts):
        return tuple(ptx.ldg_f32_constant(p.toint() + expert * 4) for p in scales)
    return tuple(ptx.ldg_f32_constant(p.toint()) for p in scales)


# Operands ---------------------------------------------------------------------------------------------------


@cute.jit
def load(g: Constexpr[Gemm], m: Operands, s: Int32, place: Place, work: Work) -> None:
    """The last warps, four or eight: rows and weights of the CTA's tiles into the ring, step by step."""
    t = g.tiles
    cute.arch.setmaxregister_decrease(t.registers[1])
    team = place.warp // 4 - t.CONSUMERS // 128
    own = place.thread % 128
    own_rows = cute.make_rmem_tensor((t.own_rows,), Int32)
    at, tile = Int32(0), Int32(work.tile)
    if const_expr(t.early):
        if own == 0 and work.mine:
            first, _, g_w, _ = _weights(g, m, _find(g, m, s, work, tile))
            gemm.load_early(t, s, g_w, first * (t.made // 16), _begin(g, work))
        cute.arch.sync_warp()
        ptx.wait()
    while tile < work.tiles:
        found = _find(g, m, s, work, tile)
        rows: tuple = (found.row, found.rows - 1)
        if const_expr(t.experts):
            _list_rows(g, own_rows, found, own)
            rows = (own_rows, _listed(g, found, own))
        first, last, g_w, g_fw = _weights(g, m, found)
        behind = Int32(0)
        if const_expr(g.groups > 1):
            behind = first * 128 // (g.seats[0].rows // g.groups) * t.k
        g_x = m.x.toint()
        g_fx = Int64(0) if const_expr(m.x_scale is None) else m.x_scale.toint()
        first_unit = first * (t.made // 16)
        gemm.load(t, s, at, g_x, g_fx, rows, behind, g_w, g_fw, first_unit, last, _begin(g, work), team, own)
        at = at + t.steps
        tile = tile + g.ctas
    _leave(g, work)


@cute.jit
def expand(g: Constexpr[Gemm], s: Int32, place: Place, work: Work) -> None:
    """Eight warps: weights that others copy, from slots into the ring."""
    t = g.tiles
    cute.arch.setmaxregister_decrease(t.registers[1])
    at, tile = Int32(0), Int32(work.tile)
    while tile < work.tiles:
        expanding.expand(t, s, at, place.warp - t.CONSUMERS // 32, place.lane)
        at = at + t.steps
        tile = tile + g.ctas
    _leave(g, work)


@cute.jit
def copy(g: Constexpr[Gemm], m: Operands, s: Int32, place: Place, work: Work) -> None:
    """The last four warps where others expand weights: two copy rows into the ring, a thread of each of the
    others weights to slots.
    """
    t = g.tiles
    cute.arch.setmaxregister_decrease(t.registers[2])
    own = place.thread - (t.CONSUMERS + 32 * t.EXPANDERS)
    at, tile = Int32(0), Int32(work.tile)
    feeders = const_expr((t.CONSUMERS + t.COPIERS) // 32 + t.EXPANDERS)
    if own < t.COPIERS:
        own_rows = cute.make_rmem_tensor((t.own_rows,), Int32)
        scaled_rows = cute.make_rmem_tensor((t.height // t.COPIERS,), Int32)
        while tile < work.tiles:
            found = _find(g, m, s, work, tile)
            _list_rows(g, own_rows, found, own)
            for i in range_constexpr(t.height // t.COPIERS):
                scaled_rows[i] = _listed(g, found, own, t.COPIERS * i)
            g_x, g_fx = m.x.toint(), m.x_scale.toint()
            expanding.copy_rows(t, s, at, g_x, g_fx, own_rows, scaled_rows, _begin(g, work), own)
            at = at + t.steps
            tile = tile + g.ctas
    elif place.warp == feeders:
        _feed(g, m, s, place, work, 0)
    elif place.warp == feeders + 1:
        _feed(g, m, s, place, work, 1)
    _leave(g, work)


@cute.jit
def _feed(
    g: Constexpr[Gemm], m: Operands, s: Int32, place: Place, work: Work, feeder: Constexpr[int]
) -> None:
    """One of the warps that copy weights."""
    t = g.tiles
    at, tile = Int32(0), Int32(work.tile)
    if place.lane == 0:
        while tile < work.tiles:
            first, last, g_w, _ = _weights(g, m, _find(g, m, s, work, tile))
            expanding.copy_units(t, s, at, g_w, first * (t.made // 16), last, _begin(g, work), feeder)
            at = at + t.steps
            tile = tile + g.ctas
    cute.arch.sync_warp()


@cute.jit
def _list_rows(g: Constexpr[Gemm], own_rows: cute.Tensor, found: Tile, own: Int32) -> None:
    """Rows of x that this thread copies pieces of."""
    for i in range_constexpr(g.tiles.own_rows):
        own_rows[i] = _listed(g, found, gemm.x_row(g.tiles, i, own))


@cute.jit
def _listed(g: Constexpr[Gemm], found: Tile, row: Int32, behind: Constexpr[int] = 0) -> Int32:
    """Which row of x so many rows behind a row of the tile is; the last one for those that are not there."""
    if const_expr(not g.tiles.experts):
        return cutlass.min(found.row + row + behind, found.rows - 1)
    number = Int32(ptx.ldg32(found.g_order + cutlass.min(row + behind, found.rows - 1) * 4))
    return number // g.divide if const_expr(g.divide > 1) else number


@cute.jit
def _begin(g: Constexpr[Gemm], work: Work) -> Int32:
    """The first step along k that this CTA takes of a tile."""
    return work.rank * g.tiles.steps if const_expr(g.tiles.splits > 1) else Int32(0)


@cute.jit
def _leave(g: Constexpr[Gemm], work: Work) -> None:
    """Meet the CTAs that share a tile, as often as those that multiply do: twice, if there is one."""
    if const_expr(g.tiles.splits == 1):
        return
    if work.mine:
        gemm.meet()
        gemm.meet()


@cute.jit
def _weights(g: Constexpr[Gemm], m: Operands, found: Tile) -> tuple[Int32, Int32, tuple, tuple]:
    """Of the tile's matrices: which tile of their own it is, their last 16 rows, where weights are, and FP8
    block scales.
    """
    t, number = g.tiles, found.number
    first, last = number, Int32((g.seats[0].rows + 15) // 16 - 1)
    g_w, g_fw = _matrix(g, m, 0)
    for n in range_constexpr(1, len(g.seats)):
        if number >= g.seats[n].first:
            first, last = number - g.seats[n].first, Int32((g.seats[n].rows + 15) // 16 - 1)
            g_w, g_fw = _matrix(g, m, n)
    if const_expr(t.experts):
        g_w = tuple(a + Int64(found.expert) * g.expert_bytes for a in g_w)
        if const_expr(t.weight == "fp8"):
            g_fw = tuple(a + Int64(found.expert) * g.expert_scales for a in g_fw)
    if const_expr(t.weight == "fp8"):
        g_fw = tuple(a + Int64(first * t.made // 128 * t.blocks) for a in g_fw)
    return first, last, g_w, g_fw


@cute.jit
def _matrix(g: Constexpr[Gemm], m: Operands, n: Constexpr[int]) -> tuple[tuple, tuple]:
    """Where weights of matrix `n`, one or two, and their block scales are."""
    one = m.matrices[n]
    weights = [one.w, *([one.v] if g.tiles.paired else [])]
    scales = [one.w_scale, *([one.v_scale] if g.tiles.paired else [])]
    g_w = tuple(p.toint() for p in weights)
    if const_expr(g.tiles.weight != "fp8"):
        return g_w, g_w
    return g_w, tuple(p.toint() for p in scales)
