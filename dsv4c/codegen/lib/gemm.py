"""Products of many rows on wgmma (sm_90a): loading warps lay down tiles, eight warps multiply them.

Weights come as the GEMVs read them (`units`): FP8 and BF16 ones are rows of 128 bytes, eight 16-byte pieces
swizzled to a row, as wgmma reads them, and come by copies, as rows of x do: boxes of tensor maps, one copy
each. What tensor cores do not multiply loading threads hold in registers and widen to such rows; MXFP4
weights `expanding` does. FP8 tensor cores keep about 13 bits inside one instruction: so sums of 128 columns
are scaled and added up in f32 registers. What is bf16 they add up themselves.
"""

from collections.abc import Callable

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import (
    BFloat16,
    Constexpr,
    Float8E4M3FN,
    Float16,
    Float32,
    Int32,
    Int64,
    Uint32,
    const_expr,
    range_constexpr,
)
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.tensor_utils.layout import LayoutEnum

from dsv4c.codegen.lib import ptx, swiglu, units
from dsv4c.codegen.lib.tiles import Few, Tiles

_asm = cute.arch.inline_ptx

NUMBERS = {"e4m3": Float8E4M3FN, "bf16": BFloat16, "f16": Float16}


@cute.jit
def open_ring(t: Constexpr[Tiles], s: Int32, thread: Int32):
    """The barriers of every stage and every slot: full, and free. All threads."""
    if thread == 0:
        for i in range_constexpr(t.stages):
            ptx.mbarrier_init(s + t.o_bars + 8 * i, t.arrivals)
            ptx.mbarrier_init(s + t.o_bars + 8 * (t.stages + i), t.CONSUMERS // 32)
        for i in range_constexpr(t.slots):
            ptx.mbarrier_init(s + t.o_bars + 8 * (2 * t.stages + i), t.FEEDERS)
            ptx.mbarrier_init(s + t.o_bars + 8 * (2 * t.stages + t.slots + i), t.EXPANDERS)
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()


@cute.jit
def wait_free(t: Constexpr[Tiles], s: Int32, step: Int32):
    """Until what was in step `step`'s stage before is multiplied."""
    ptx.mbarrier_wait(s + t.o_bars + 8 * (t.stages + step % t.stages), (step // t.stages & 1) ^ 1)


# Rows by expert ---------------------------------------------------------------------------------------------


@cute.jit
def count_tiles(t: Constexpr[Tiles | Few], s: Int32, g_counts: Int64, warp: Int32, lane: Int32):
    """Tiles of rows of all experts, who have as many rows as `g_counts` says. All threads."""
    each = const_expr(-(-t.experts // 32))
    if warp == 0:
        sums = cute.make_rmem_tensor((each,), Int32)
        total = Int32(0)
        for i in range_constexpr(each):
            expert = lane * each + i
            rows = Int32(0)
            if expert < t.experts:
                rows = Int32(ptx.ldg32(g_counts + expert * 4))
            total = total + (rows + t.height - 1) // t.height
            sums[i] = total
        before = total
        for i in range_constexpr(5):
            other = cute.arch.shuffle_sync_up(before, offset=1 << i, mask_and_clamp=0)
            if lane >= 1 << i:
                before = before + other
        before = before - total
        for i in range_constexpr(each):
            if lane * each + i < t.experts:
                ptx.sts32(s + t.o_tiles + (lane * each + i) * 4, Uint32(before + sums[i]))
    cute.arch.sync_threads()
    return Int32(ptx.lds32(s + t.o_tiles + (t.experts - 1) * 4))


@cute.jit
def find_expert(t: Constexpr[Tiles | Few], s: Int32, tile: Int32):
    """(Whose tile of rows it is, which of its own.)"""
    low, high = Int32(0), Int32(t.experts - 1)  # the first with more tiles up to it than `tile`
    for _ in range_constexpr((t.experts - 1).bit_length()):
        middle = (low + high) // 2
        if Int32(ptx.lds32(s + t.o_tiles + middle * 4)) > tile:
            high = middle
        else:
            low = cutlass.min(middle + 1, high)
    before = Int32(0)
    if low > 0:
        before = Int32(ptx.lds32(s + t.o_tiles + (low - 1) * 4))
    return low, tile - before


@cute.jit
def list_rows(
    g_experts: Int64,
    g_order: Int64,
    g_counts: Int64,
    s: Int32,
    expert: Int32,
    count: Int32,
    thread: Int32,
    threads: Constexpr[int],
):
    """Numbers n < `count` with g_experts[n] = `expert`, ascending, to `g_order`; how many, to `g_counts`. A
    CTA; a warp has numbers in a row, which it counts and then lists.
    """
    warp, lane = thread // 32, thread % 32
    warps = const_expr(threads // 32)
    share = (count + threads - 1) // threads * 32
    first, last = warp * share, cutlass.min((warp + 1) * share, count)
    found = Int32(0)
    for at in cutlass.range(first, last, 32, unroll=4):
        found = found + Int32(cute.arch.popc(_chosen(g_experts, expert, at + lane, count)))
    if lane == 0:
        ptx.sts32(s + warp * 4, Uint32(found))
    cute.arch.sync_threads()
    place, total = Int32(0), Int32(0)
    for i in range_constexpr(warps):
        other = Int32(ptx.lds32(s + i * 4))
        if i < warp:
            place = place + other
        total = total + other
    if thread == 0:
        ptx.stg32(g_counts + expert * 4, Uint32(total))
    for at in cutlass.range(first, last, 32, unroll=4):
        votes = _chosen(g_experts, expert, at + lane, count)
        if votes >> Uint32(lane) & Uint32(1) != 0:
            before = votes & ((Uint32(1) << Uint32(lane)) - Uint32(1))
            ptx.stg32(g_order + Int64(place + Int32(cute.arch.popc(before))) * 4, Uint32(at + lane))
        place = place + Int32(cute.arch.popc(votes))


@cute.jit
def _chosen(g_experts: Int64, expert: Int32, number: Int32, count: Int32):
    """A bit for each lane whose number names the expert."""
    own = Int32(ptx.ldg32(g_experts + Int64(cutlass.max(cutlass.min(number, count - 1), Int32(0))) * 4))
    return Uint32(cute.arch.vote_ballot_sync(own == expert and number < count))


# Loading ----------------------------------------------------------------------------------------------------


@cute.jit
def load(
    t: Constexpr[Tiles],
    s: Int32,
    at: Int32,
    g_x: Int64,
    g_fx: Int64,
    rows: tuple,
    behind: Int32,
    g_w: tuple,
    g_fw: tuple,
    first: Int32,
    last: Int32,
    begin: Int32,
    team: Int32,
    thread: Int32,
):
    """A tile's steps from `begin` on into the ring; `at` steps were laid down before. Thread of `team`, four
    warps.

    `rows` of x are the first of the tile's and the last that there is, or of experts those that the thread
    copies and the one whose scale it loads; the tile's columns are `behind` others. Of each matrix, one or
    two, the tile has the 16-row tiles from `first` on, none after `last`; `g_fw` is where FP8 block scales of
    these rows start. What is boxed is known by its tensor map.
    """
    lane, warp = thread % 32, thread // 32
    g_units = None
    if const_expr(t.weight != "plain" and not t.run):
        g_units = unit_places(t, g_w, first, last, thread)
    if const_expr(not t.boxed):
        g_x = g_x + Int64(behind * (1 if t.scaled else 2))
    held = cute.make_rmem_tensor((t.ahead, max(t.words, 1)), Uint32)
    scales = cute.make_rmem_tensor((t.ahead, 1 + t.halves), Int32)
    for i in range_constexpr(t.ahead):
        step = begin + i * t.loaders + team
        fetch(t, held, scales, i, g_x, g_fx, rows, g_units, g_fw, step, thread)
    for group in cutlass.range(t.steps // (t.ahead * t.loaders), unroll=1):
        for i in range_constexpr(t.ahead):
            step = (group * t.ahead + i) * t.loaders + team
            now = at + step
            stage = now % t.stages
            wait_free(t, s, now)
            full, s_x = s + t.o_bars + 8 * stage, s + stage * t.x_stage
            s_w = s + t.o_w + stage * t.w_stage
            if const_expr(t.boxed):
                if thread == step % 4 * 32:  # each warp in turn
                    ptx.mbarrier_expect_alone(full, Int32(t.x_stage))
                    ptx.box_load(s_x, g_x, (behind + (begin + step) * t.each, rows[0]), full)
                    if now >= t.early:
                        load_units(t, s_w, g_w, first, begin + step, full)
            elif const_expr(t.kind == "f16"):
                lay_x(t, s_x, held, i, thread)
            else:
                copy_x(t, s_x, g_x, rows, begin + step, thread)
            if const_expr(t.pieces == 0 and not t.run):
                if const_expr(t.weight == "plain"):
                    copy_weights(t, s_w, g_w[0], first, last, begin + step, thread)
                else:
                    copy_units(t, s_w, g_units, begin + step, thread)
            if const_expr(t.arrivals > 4):
                ptx.cp_async_arrive(full)
            lay_factors(t, s + t.o_factors + stage * t.factors, scales, i, thread)
            if const_expr(t.pieces):
                lay_weights(t, s, stage, held, scales, i, lane, warp)
            cute.arch.sync_warp()
            if lane == 0:
                ptx.mbarrier_arrive(full)
            following = begin + cutlass.min(step + t.ahead * t.loaders, Int32(t.steps - 1))
            fetch(t, held, scales, i, g_x, g_fx, rows, g_units, g_fw, following, thread)


@cute.jit
def x_row(t: Constexpr[Tiles], i: Constexpr[int], thread: Int32):
    """The tile's row that is number `i` of those a loading thread lays pieces of."""
    threads = const_expr(t.COPIERS if t.expands else 128)
    return thread // (threads // t.row_step) + i * t.row_step


@cute.jit
def row_of_x(t: Constexpr[Tiles], rows: tuple, i: Constexpr[int], thread: Int32):
    """Which row of x that is; the last one again for those that are not there."""
    if const_expr(t.experts):
        return rows[0][i]
    return cutlass.min(rows[0] + x_row(t, i, thread), rows[1])


@cute.jit
def copy_x(t: Constexpr[Tiles], s_x: Int32, g_x: Int64, rows: tuple, step: Int32, thread: Int32):
    """A step of the tile's rows of x, as they lie in memory, in flight."""
    s_own = s_x + thread // 8 * 128 + (thread % 8 ^ thread // 8 % 8) * 16  # rows are 16 apart
    g_step = g_x + Int64(step * 128 + thread % 8 * 16)
    for i in range_constexpr(t.own_rows):
        ptx.cp_async16(s_own + i * 2048, g_step + Int64(row_of_x(t, rows, i, thread)) * t.stride)


@cute.jit
def copy_weights(
    t: Constexpr[Tiles], s_w: Int32, g_w: Int64, first: Int32, last: Int32, step: Int32, thread: Int32
):
    """A step of rows of w as they lie in memory, those of 16-row tiles from `first` to `last`, in flight."""
    piece = thread % 8
    for i in range_constexpr(8):
        row = thread // 8 + 16 * i
        own = cutlass.min(first + i, last) * 16 + thread // 8
        g = g_w + Int64(own) * (2 * t.k) + step * 128 + piece * 16
        ptx.cp_async16(s_w + row * 128 + (piece ^ row % 8) * 16, g)


@cute.jit
def copy_units(t: Constexpr[Tiles], s_w: Int32, g_units: cute.Tensor, step: Int32, thread: Int32):
    """A step of the tile's units, in flight."""
    behind = unit_behind(t, step)
    for n in range_constexpr(t.UNITS):
        ptx.cp_async16(s_w + n * 2048 + thread * 16, g_units[n] + Int64(behind))


@cute.jit
def load_units(t: Constexpr[Tiles], s_w: Int32, g_w: tuple, first: Int32, step: Int32, full: Int32):
    """A step of the tile's units by boxes of tensor maps, if these bring them, in flight. One thread."""
    if const_expr(not t.run):
        return
    ptx.mbarrier_expect_alone(full, Int32(t.w_stage))
    for n in range_constexpr(t.UNITS // t.run):
        tile = first + (n // 2 if t.paired else n) * t.run
        g = g_w[n % 2] if const_expr(t.paired) else g_w[0]
        s_run = s_w + n * t.run * 2048
        if const_expr(t.weight == "plain"):
            ptx.box_load(s_run, g, (step * t.each, tile * 16), full)
        else:
            place = (Int32(0), step % t.span, tile % t.tiles, step // t.span, tile // t.tiles)
            ptx.box_load(s_run, g, place, full)


@cute.jit
def load_early(t: Constexpr[Tiles], s: Int32, g_w: tuple, first: Int32, begin: Int32):
    """Units of the first tile's first steps, which no launch before makes, in flight. One thread."""
    for step in cutlass.range(t.early, unroll=1):
        full = s + t.o_bars + 8 * step
        load_units(t, s + t.o_w + step * t.w_stage, g_w, first, begin + step, full)


@cute.jit
def unit_behind(t: Constexpr[Tiles], unit: Int32):
    """Bytes from the first unit of a tile to its number `unit` along k."""
    return unit // t.span * (t.tiles * t.span * t.unit) + unit % t.span * t.unit


@cute.jit
def lay_x(t: Constexpr[Tiles], s_x: Int32, held: cute.Tensor, i: Constexpr[int], thread: Int32):
    """A step of e4m3 rows as f16."""
    piece = thread % 4 * 2
    for n in range_constexpr(t.own_rows):
        row = x_row(t, n, thread)
        w = [ptx.e4m3x4_to_f16x2x2(held[i, t.words - 4 * t.own_rows + 4 * n + j]) for j in range(4)]
        for half in range_constexpr(2):
            s_piece = s_x + row * 128 + ((piece + half) ^ row % 8) * 16
            ptx.sts128(s_piece, *w[2 * half], *w[2 * half + 1])


@cute.jit
def lay_factors(t: Constexpr[Tiles], s_f: Int32, scales: cute.Tensor, i: Constexpr[int], thread: Int32):
    """What each row's products of the step are multiplied by: the scales of x, and of FP8 weights."""
    if const_expr(not t.promotes):
        return
    if thread < t.height:
        for n in range_constexpr(t.halves):
            x = ptx.ue8m0_to_f32(Uint32(scales[i, 1 + n]))
            for m in range_constexpr(t.row_factors):
                f = x
                if const_expr(t.weight == "fp8"):
                    f = x * ptx.ue8m0_to_f32(Uint32(scales[i, 0] >> Int32(8 * m) & Int32(255)))
                ptx.sts_f32(s_f + t.row_bytes * m + (128 * n + thread) * 4, f)


@cute.jit
def unit_of(t: Constexpr[Tiles], n: Constexpr[int], warp: Int32):
    """Which of the tile's eight units a thread's piece `n` is of."""
    if const_expr(t.weight == "nvfp4"):
        return 4 * n + warp
    if const_expr(t.pieces):
        return n // 2 * 4 + warp
    return Int32(n)


@cute.jit
def unit_places(t: Constexpr[Tiles], g_w: tuple, first: Int32, last: Int32, thread: Int32) -> cute.Tensor:
    """Where the thread's pieces of the first unit along k lie: one of each unit that is copied; of one that
    is widened, rows of both halves.
    """
    number = const_expr(t.pieces or t.UNITS)
    found = cute.make_rmem_tensor((number,), Int64)
    for n in range_constexpr(number):
        unit = unit_of(t, n, thread // 32)
        tile = unit
        base = g_w[0]
        if const_expr(t.paired):
            tile = unit // (2 * t.pair) * t.pair + unit % t.pair
            if unit // t.pair % 2 == 1:
                base = g_w[1]
        tile = cutlass.min(first + tile, last)
        inside = thread * 16
        if const_expr(t.weight == "nvfp4"):
            inside = thread % 32 * 16
        elif const_expr(t.pieces):
            inside = n % 2 * 1024 + thread % 8 * 128
        found[n] = base + Int64(tile // t.tiles * t.group_bytes + tile % t.tiles * (t.span * t.unit) + inside)
    return found


@cute.jit
def fetch(
    t: Constexpr[Tiles],
    held: cute.Tensor,
    scales: cute.Tensor,
    i: Constexpr[int],
    g_x: Int64,
    g_fx: Int64,
    rows: tuple,
    g_units: cute.Tensor,
    g_fw: tuple,
    step: Int32,
    thread: Int32,
):
    """The thread's share of a step's weights, in flight to registers `i`, and scales: those of the weights,
    then of its rows of x.
    """
    if const_expr(t.weight == "plain"):
        return
    unit, part = step // t.per_unit, step % t.per_unit
    behind = unit_behind(t, unit)
    block = step * t.each // 128
    if const_expr(t.scaled):
        for n in range_constexpr(t.halves):
            row = rows[1] if const_expr(t.experts) else cutlass.min(rows[0] + thread + 128 * n, rows[1])
            scales[i, 1 + n] = Int32(ptx.ldg_u8(g_fx + Int64(row) * t.blocks + block))
    if const_expr(t.weight == "fp8"):
        scales[i, 0] = Int32(ptx.ldg_u8_constant(g_fw[0] + block))
        if const_expr(t.paired):
            scales[i, 0] = scales[i, 0] | Int32(ptx.ldg_u8_constant(g_fw[1] + block)) << Int32(8)
    for n in range_constexpr(t.pieces):
        inside = part * t.part_bytes
        if const_expr(t.weight == "fp8"):
            inside = (4 * part + thread % 32 // 8 ^ thread % 8) * 16
        g_piece = g_units[n] + Int64(behind + inside)
        w = ptx.ldg128_constant(g_piece)
        for j in range_constexpr(4):
            held[i, n * 4 + j] = w[j]
    g, q = thread % 32 // 4, thread % 4
    for n in range_constexpr(t.pieces):
        if const_expr(t.weight == "nvfp4"):
            inside = (g * 4 + q) * 16
            at = behind + 1024 + (g * 2 + q // 2) * 8 + part * 4 - inside
            held[i, t.pieces * 4 + n] = ptx.ldg32_constant(g_units[n] + Int64(at))
    if const_expr(t.kind == "f16"):
        for n in range_constexpr(t.own_rows):
            v = ptx.ldg128(g_x + Int64(row_of_x(t, rows, n, thread)) * t.stride + step * 64 + thread % 4 * 16)
            for j in range_constexpr(4):
                held[i, t.words - 4 * t.own_rows + 4 * n + j] = v[j]


@cute.jit
def lay_weights(
    t: Constexpr[Tiles],
    s: Int32,
    stage: Int32,
    held: cute.Tensor,
    scales: cute.Tensor,
    i: Constexpr[int],
    lane: Int32,
    warp: Int32,
):
    """The thread's share of a step's weights, as tensor cores multiply them, into their rows."""
    s_w = s + t.o_w + stage * t.w_stage
    if const_expr(t.weight == "fp8"):
        scale = scales[i, 0]
        if const_expr(t.paired):
            scale = scale >> warp % 2 * 8 & Int32(255)
        most = Int32(134)  # the largest that one factor of bf16 holds besides the 2^120
        factor = Uint32((cutlass.min(scale, most) + 120) * 0x00800080)
        if scale > most:
            rest = Uint32((scale - 7) * 0x00800080)
            lay_widened(t, s_w, held, i, (factor, rest), lane, warp)
        else:
            lay_widened(t, s_w, held, i, (factor,), lane, warp)
        return
    q, row = lane % 4, units.row_of(lane)
    for n in range_constexpr(t.pieces):
        w = [held[i, 4 * n + j] for j in range(4)]
        s_row = s_w + unit_of(t, n, warp) * 2048 + row * 128
        scales = ptx.e4m3x4_to_f16x2x2(held[i, 4 * t.pieces + n])
        for half in range_constexpr(2):
            f = units.spread_f16x2(units.carried(scales[half]))
            pairs = [pair for h in range(2) for pair in units.e2m1x8_to_f16x2x4(w[2 * half + h])]
            s_piece = s_row + ((4 * half + q) ^ row) * 16
            for r in range_constexpr(2):
                own = [ptx.mul_f16x2(pairs[k], f[r]) for k in (r, r + 2, r + 4, r + 6)]
                ptx.sts128(s_piece + 1024 * r, *own)


# Widening ---------------------------------------------------------------------------------------------------


@cute.jit
def lay_widened(
    t: Constexpr[Tiles],
    s_w: Int32,
    held: cute.Tensor,
    i: Constexpr[int],
    factors: tuple,
    lane: Int32,
    warp: Int32,
):
    """e4m3 codes times their scale as bf16 into their rows. `factors` are the scale and the 2^120 that bits
    in place lack, in one number or two.
    """
    row, piece = lane % 8, lane // 8 * 2
    for n in range_constexpr(t.pieces):
        s_row = s_w + unit_of(t, n, warp) * 2048 + n % 2 * 1024 + row * 128
        for half in range_constexpr(2):
            pairs = [p for j in range(2) for p in e4m3x4_to_bf16x2x2(held[i, 4 * n + 2 * half + j])]
            for f in factors:
                pairs = [ptx.mul_bf16x2(p, f) for p in pairs]
            ptx.sts128(s_row + ((piece + half) ^ row) * 16, *pairs)


@cute.jit
def e4m3x4_to_bf16x2x2(r: Uint32):
    """Four e4m3 -> two bf16x2 of the value times 2^-120, exact: half by multiplications, beside logic."""
    return _asm(
        "{ .reg .b32 t, u; "
        "prmt.b32 t, {$r0}, 0, 0x4140; and.b32 u, t, 0x00800080; "
        "mul.lo.u32 t, t, 16; mad.lo.u32 {$w0}, u, 0xF0, t; "
        "prmt.b32 t, {$r0}, 0, 0x4342; and.b32 u, t, 0x00800080; "
        "mul.lo.u32 t, t, 16; mad.lo.u32 {$w1}, u, 0xF0, t; }",
        write_only_types=[Uint32] * 2,
        read_only_args=[r],
    )


# Multiplying ------------------------------------------------------------------------------------------------


@cute.jit
def multiply(t: Constexpr[Tiles], s: Int32, at: Int32, group: Int32, thread: Int32):
    """x w^T of a tile: f32 fragments of 64 rows and `t.wide` columns, `t.halves` of each warpgroup; `at`
    steps were multiplied before.
    """
    number = NUMBERS[t.kind]
    k_major = OperandMajorMode.K
    shape = const_expr((64, t.wide, t.each))
    mma = sm90.make_trivial_tiled_mma(number, number, k_major, k_major, Float32, (1, 1, 1), (64, t.wide))
    x_parts, w_parts = const_expr(t.height // 64), const_expr(128 // t.wide)
    s_x = operand(number, s, sm90.make_smem_layout_a(LayoutEnum.ROW_MAJOR, shape, number, t.stages * x_parts))
    s_w = operand(
        number, s + t.o_w, sm90.make_smem_layout_b(LayoutEnum.ROW_MAJOR, shape, number, t.stages * w_parts)
    )
    own = mma.get_slice(thread % 128)
    x = mma.make_fragment_A(own.partition_A(s_x))
    w = mma.make_fragment_B(own.partition_B(s_w))
    part = const_expr(mma.partition_shape_C((64, t.wide)))
    sums = [cute.make_rmem_tensor(part, Float32) for _ in range(t.halves)]
    for half in range_constexpr(t.halves):
        sums[half].fill(0.0)
    products = cute.make_rmem_tensor(part, Float32) if const_expr(t.promotes) else None
    row = thread % 128 // 32 * 16 + thread % 32 // 4
    x_first = const_expr(t.halves) * group if const_expr(x_parts > 1) else Int32(0)
    column = thread % 4 * 2 + (group * 64 if const_expr(w_parts == 2) else 0)
    mma.set(warpgroup.Field.ACCUMULATE, not t.promotes)
    for step in cutlass.range(t.steps, unroll=1):
        stage = (at + step) % t.stages
        full = s + t.o_bars + 8 * stage
        ptx.mbarrier_wait(full, (at + step) // t.stages & 1)
        if const_expr(not t.run):
            # Here and not where it was written: there it would wait for all loads in flight.
            ptx.fence_async()
        w_at = stage * 2 + group if const_expr(w_parts == 2) else stage
        s_f = s + t.o_factors + stage * t.factors
        for half in range_constexpr(t.halves):
            x_at = stage * x_parts + x_first + half
            last = const_expr(half == t.halves - 1)
            if const_expr(t.promotes):
                f = load_factors(t, s_f, row + (x_first + half) * 64)
                warpgroup.fence()
                mma.set(warpgroup.Field.ACCUMULATE, False)
                for c in range_constexpr(4):
                    cute.gemm(mma, products, x[None, None, c, x_at], w[None, None, c, w_at], products)
                    mma.set(warpgroup.Field.ACCUMULATE, True)
                warpgroup.commit_group()
                warpgroup.wait_group(0)
                if const_expr(not t.expands):
                    if const_expr(last):
                        release(t, full, thread)
                    add_scaled(t, sums[half], products, f)
                elif cute.arch.make_warp_uniform(f[1, 0].bitcast(Int32)) > 0:
                    release(t, full, thread)
                    add_scaled(t, sums[half], products, f)
                else:
                    add_scaled_apart(t, sums[half], products, f, s_f, column)
                    release(t, full, thread)
            else:
                warpgroup.fence()
                for c in range_constexpr(4):
                    cute.gemm(mma, sums[half], x[None, None, c, x_at], w[None, None, c, w_at], sums[half])
                if const_expr(last):
                    warpgroup.commit_group()
                    warpgroup.wait_group(1)
                    if step > 0:
                        release(t, s + t.o_bars + 8 * ((at + step - 1) % t.stages), thread)
    if const_expr(not t.promotes):
        warpgroup.wait_group(0)
        release(t, s + t.o_bars + 8 * ((at + t.steps - 1) % t.stages), thread)
    return sums


@cute.jit
def load_factors(t: Constexpr[Tiles], s_f: Int32, row: Int32) -> cute.Tensor:
    """What products of rows `row` and `row` + 8 are multiplied by, [matrix, row]. MXFP4's [0, ...] are times
    the tile's, which [1, 0] is, 0 for none.
    """
    f = cute.make_rmem_tensor((2, 2), Float32)
    for m in range_constexpr(t.row_factors):
        for half in range_constexpr(2):
            f[m, half] = ptx.lds_f32(s_f + t.row_bytes * m + (row + 8 * half) * 4)
    if const_expr(t.expands):
        f[1, 0] = ptx.lds_f32(s_f + 2 * t.row_bytes)
        for half in range_constexpr(2):
            if f[1, 0] > Float32(0.0):
                f[0, half] = f[0, half] * f[1, 0]
    return f


@cute.jit
def add_scaled_apart(
    t: Constexpr[Tiles], sums: cute.Tensor, products: cute.Tensor, f: cute.Tensor, s_f: Int32, column: Int32
):
    """sums += products times the factors of their row and of their column, from `column` on."""
    for j in range_constexpr(t.wide // 8):
        top = ptx.lds64(s_f + t.row_bytes + (column + 8 * j) * 4)
        for i in range_constexpr(2):
            for half in range_constexpr(2):
                at = const_expr(4 * j + 2 * half + i)
                sums[at] = sums[at] + products[at] * top[i].bitcast(Float32) * f[0, half]


@cute.jit
def add_scaled(t: Constexpr[Tiles], sums: cute.Tensor, products: cute.Tensor, f: cute.Tensor):
    """sums += products times the factors of their row and matrix."""
    for j in range_constexpr(t.wide // 8):
        m = const_expr(j // (2 * t.pair) % 2 if t.row_factors == 2 else 0)
        for i in range_constexpr(2):
            for half in range_constexpr(2):
                at = const_expr(4 * j + 2 * half + i)
                sums[at] = sums[at] + products[at] * f[m, half]


@cute.jit
def pass_by(t: Constexpr[Tiles], s: Int32, at: Int32, thread: Int32):
    """A tile of which the warpgroup has no rows: its stages fall free."""
    for step in cutlass.range(at, at + t.steps, unroll=1):
        full = s + t.o_bars + 8 * (step % t.stages)
        ptx.mbarrier_wait(full, step // t.stages & 1)
        release(t, full, thread)


@cute.jit
def release(t: Constexpr[Tiles], full: Int32, thread: Int32):
    """The stage of barrier `full` is free again: a warp has read it."""
    cute.arch.sync_warp()
    if thread % 32 == 0:
        ptx.mbarrier_arrive(full + 8 * t.stages)


@cute.jit
def operand(number: Constexpr[type], s: Int32, layout: cute.ComposedLayout) -> cute.Tensor:
    """Swizzled stages of an operand from `s` on."""
    pointer = cute.make_ptr(number, s, cute.AddressSpace.smem, assumed_align=1024)
    return cute.make_tensor(cute.recast_ptr(pointer, layout.inner, dtype=number), layout.outer)


@cute.jit
def add_splits(t: Constexpr[Tiles], s: Int32, sums: cute.Tensor, rank: Int32, thread: Int32):
    """This CTA's part of the sums of all of the cluster's, added up from its own on in order of rank. Its
    columns are every warpgroup's from number rank * 8 * `t.summed` on, or, of either of paired matrices, half
    as many. The stages are free; all consumers, who wait for the cluster before they leave.
    """
    ptx.sync_threads(t.CONSUMERS)
    for j in range_constexpr(t.wide // 8):
        words = [sums[4 * j + i].bitcast(Uint32) for i in range(4)]
        ptx.sts128(s + (j * t.CONSUMERS + thread) * 16, *words)
    meet()
    own = cute.make_rmem_tensor((4 * t.summed,), Float32)
    each = const_expr(t.summed // 2 if t.paired and t.pair > 1 else t.summed)  # groups in a row
    for other in range_constexpr(t.splits):
        for j in range_constexpr(t.summed):
            number = rank * each + j % each + j // each * (t.wide // 16)
            s_part = s + (number * t.CONSUMERS + thread) * 16
            whose = (rank + other) % t.splits
            words = ptx.lds128(s_part) if const_expr(other == 0) else lds128_remote(s_part, whose)
            for i in range_constexpr(4):
                part = words[i].bitcast(Float32)
                own[4 * j + i] = part if const_expr(other == 0) else own[4 * j + i] + part
    cute.arch.cluster_arrive()
    return own


@cute.jit
def meet():
    """All threads of the cluster; what they wrote to shared memory becomes visible to each other."""
    cute.arch.cluster_arrive()
    cute.arch.cluster_wait()


@cute.jit
def lds128_remote(s: Int32, rank: Int32):
    """Four words at shared address `s` of the cluster's CTA `rank`."""
    return _asm(
        "{ .reg .b32 a; mapa.shared::cluster.u32 a, {$r0}, {$r1}; "
        "ld.shared::cluster.v4.b32 {{$w0},{$w1},{$w2},{$w3}}, [a]; }",
        write_only_types=[Uint32] * 4,
        read_only_args=[s, rank],
    )


# Results ----------------------------------------------------------------------------------------------------


@cute.jit
def scale_sums(t: Constexpr[Tiles], sums: cute.Tensor, f: tuple):
    """Sums times what they lack and their matrix's factor."""
    for j in range_constexpr(t.summed):
        own = f[j // 2 % len(f)] * Float32(t.finish)
        for i in range_constexpr(4):
            sums[4 * j + i] = sums[4 * j + i] * own


@cute.jit
def activate(t: Constexpr[Tiles], sums: cute.Tensor, limit: Constexpr[float], weights: tuple):
    """SwiGLU of paired columns under weights of the lane's rows g and g + 8: fragments of half as many."""
    made = cute.make_rmem_tensor((2 * t.summed,), Float32)
    each = const_expr(8 if t.pair == 1 else 2 * t.summed)  # sums of one matrix in a row
    for n in range_constexpr(2 * t.summed):
        gate = const_expr(n // each * (2 * each) + n % each)
        made[n] = swiglu.swiglu(sums[gate], sums[gate + each], limit, weights[n % 4 // 2])
    return made


@cute.jit
def store(
    t: Constexpr[Tiles],
    s: Int32,
    values: cute.Tensor,
    g_y: Int64,
    stride: Int32,
    row: Int32,
    column: Int32,
    columns: Int32,
    size: Constexpr[int],
    warp: Int32,
    lane: Int32,
):
    """A warp's fragments of 16 rows as numbers of `size` bytes, 2 for bf16 or 4 for f32.

    Lanes n and n + 16 know which `row` of y row n goes to, -1 for none; rows lie `stride` bytes apart.
    Columns are those from `column` on, of which the ones below `columns` exist.
    """
    tiles = const_expr(cute.size(values) // 4)
    each = const_expr(min(tiles, 16 // size))  # n8 tiles that go through shared memory together
    pieces = const_expr(each * size // 2)  # of 16 bytes of a row
    s_rows = s + t.o_out + warp * (16 * t.pitch)
    s_own = s_rows + lane // 4 * t.pitch + lane % 4 * (2 * size)
    for part in range_constexpr(tiles // each):
        for j in range_constexpr(each):
            for half in range_constexpr(2):
                at = const_expr(4 * (part * each + j) + 2 * half)
                s_pair = s_own + half * (8 * t.pitch) + j * (8 * size)
                if const_expr(size == 2):
                    ptx.sts32(s_pair, ptx.f32x2_to_bf16x2(values[at], values[at + 1]))
                else:
                    ptx.sts64(s_pair, values[at].bitcast(Uint32), values[at + 1].bitcast(Uint32))
        cute.arch.sync_warp()
        for n in range_constexpr(-(-pieces // 2)):
            own = n * (32 // pieces) + lane // pieces  # half of the warp has none if rows are one piece
            to = cute.arch.shuffle_sync(row, own)
            first = column + part * (8 * each) + lane % pieces * (16 // size)
            if own < 16 and to >= 0 and first < columns:
                v = ptx.lds128(s_rows + own * t.pitch + lane % pieces * 16)
                ptx.stg128(g_y + Int64(to) * stride + first * size, *v)
        cute.arch.sync_warp()


@cute.jit
def give(
    t: Constexpr[Tiles],
    s: Int32,
    values: cute.Tensor,
    row: Int32,
    column: Int32,
    columns: Int32,
    epilogue: Constexpr[Callable[..., None]],
    others: tuple[cute.Pointer, ...],
    warp: Int32,
    lane: Int32,
):
    """A warp's fragments as `store` has them, to an epilogue: a row at a time, a column a lane."""
    tiles = const_expr(cute.size(values) // 4)
    each = const_expr(min(tiles, 4))
    s_rows = s + t.o_out + warp * (16 * t.pitch)
    s_own = s_rows + lane // 4 * t.pitch + lane % 4 * 8
    for part in range_constexpr(tiles // each):
        for j in range_constexpr(each):
            for half in range_constexpr(2):
                at = const_expr(4 * (part * each + j) + 2 * half)
                a, b = values[at].bitcast(Uint32), values[at + 1].bitcast(Uint32)
                ptx.sts64(s_own + half * (8 * t.pitch) + j * 32, a, b)
        cute.arch.sync_warp()
        own = column + part * (8 * each) + lane
        for n in range_constexpr(16):
            to = cute.arch.shuffle_sync(row, n)
            if to >= 0 and lane < 8 * each and own < columns:
                epilogue(ptx.lds_f32(s_rows + n * t.pitch + lane * 4), to * columns + own, *others)
        cute.arch.sync_warp()
