"""Products of many rows on wgmma (sm_90a): copied tiles, which eight warps multiply.

Weights come as the GEMVs read them (`units`): FP8 and BF16 units lie as wgmma reads them, rows of 128 bytes,
eight 16-byte pieces swizzled to a row. FP8 tensor cores keep about 13 bits inside one instruction: so sums of
128 columns are scaled and added up in f32 registers.
"""

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import (
    BFloat16,
    Constexpr,
    Float8E4M3FN,
    Float32,
    Int32,
    Int64,
    Uint32,
    const_expr,
    range_constexpr,
)
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.tensor_utils.layout import LayoutEnum

from dsv4c.codegen.lib import ptx, swiglu
from dsv4c.codegen.lib.tiles import Tiles

_asm = cute.arch.inline_ptx

NUMBERS = {True: Float8E4M3FN, False: BFloat16}  # of rows of x that have scales, and of others


@cute.jit
def open_ring(t: Constexpr[Tiles], s: Int32, thread: Int32):
    """The barriers of every stage: full, and free. All threads."""
    if thread == 0:
        for i in range_constexpr(t.stages):
            ptx.mbarrier_init(s + t.o_bars + 8 * i, t.arrivals)
            ptx.mbarrier_init(s + t.o_bars + 8 * (t.stages + i), t.CONSUMERS // 32)
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()


# Rows by expert ---------------------------------------------------------------------------------------------


@cute.jit
def count_tiles(t: Constexpr[Tiles], s: Int32, g_counts: Int64, warp: Int32, lane: Int32):
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
def find_expert(t: Constexpr[Tiles], s: Int32, tile: Int32):
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


# Multiplying ------------------------------------------------------------------------------------------------


@cute.jit
def multiply(t: Constexpr[Tiles], s: Int32, at: Int32, group: Int32, thread: Int32):
    """x w^T of a tile: f32 fragments of the warpgroup's 64 rows and `t.wide` columns; `at` steps were
    multiplied before.
    """
    number = NUMBERS[t.scaled]
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
    part_shape = const_expr(mma.partition_shape_C((64, t.wide)))
    sums = cute.make_rmem_tensor((t.wide // 2,), Float32)
    sums.fill(0.0)
    products = [cute.make_rmem_tensor(part_shape, Float32) for _ in range(t.apart)]
    row = thread % 128 // 32 * 16 + thread % 32 // 4 + (group * 64 if const_expr(x_parts == 2) else 0)
    if const_expr(not t.scaled):
        products[0].fill(0.0)
        mma.set(warpgroup.Field.ACCUMULATE, True)
    for turn in cutlass.range(t.steps // t.flight, unroll=1):
        full, stages, factors = [], [], []
        for n in range_constexpr(t.flight):
            step = at + turn * t.flight + n
            stages.append(step % t.stages)
            full.append(s + t.o_bars + 8 * stages[n])
            ptx.mbarrier_wait(full[n], step // t.stages & 1)
            factors.append(load_factors(t, s + t.o_factors + stages[n] * t.FACTORS, row))
        # Here and not where it was written: there it would wait for all loads in flight.
        ptx.fence_async()
        warpgroup.fence()
        for n in range_constexpr(t.flight):
            x_at = stages[n] * 2 + group if const_expr(x_parts == 2) else stages[n]
            w_at = stages[n] * 2 + group if const_expr(w_parts == 2) else stages[n]
            own_products = products[n % t.apart]
            if const_expr(t.scaled):
                mma.set(warpgroup.Field.ACCUMULATE, False)
            for c in range_constexpr(4):
                cute.gemm(mma, own_products, x[None, None, c, x_at], w[None, None, c, w_at], own_products)
                mma.set(warpgroup.Field.ACCUMULATE, True)
            warpgroup.commit_group()
        for n in range_constexpr(t.flight):
            warpgroup.wait_group(t.flight - 1 - n)
            own_products, f = products[n % t.apart], factors[n]
            release(t, full[n], thread)
            if const_expr(t.scaled):
                add_scaled(t, sums, own_products, f)
    return sums if const_expr(t.scaled) else products[0]


@cute.jit
def load_factors(t: Constexpr[Tiles], s_f: Int32, row: Int32) -> cute.Tensor:
    """What products of rows `row` and `row` + 8 are multiplied by, [matrix, row]."""
    f = cute.make_rmem_tensor((2, 2), Float32)
    for m in range_constexpr(t.row_factors):
        for half in range_constexpr(2):
            f[m, half] = ptx.lds_f32(s_f + 512 * m + (row + 8 * half) * 4)
    return f


@cute.jit
def add_scaled(t: Constexpr[Tiles], sums: cute.Tensor, products: cute.Tensor, f: cute.Tensor):
    """sums += products times the factors of their row and matrix."""
    for j in range_constexpr(t.wide // 8):
        m = const_expr(j // 2 % 2 if t.row_factors == 2 else 0)
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
    """This CTA's part of the sums of all of the cluster's, added up in order of rank. Its columns are every
    warpgroup's from number rank * 8 * `t.summed` on. The stages are free; all consumers.
    """
    ptx.sync_threads(t.CONSUMERS)
    for j in range_constexpr(t.wide // 8):
        words = [sums[4 * j + i].bitcast(Uint32) for i in range(4)]
        ptx.sts128(s + (j * t.CONSUMERS + thread) * 16, *words)
    meet()
    own = cute.make_rmem_tensor((4 * t.summed,), Float32)
    own.fill(0.0)
    for other in range_constexpr(t.splits):
        for j in range_constexpr(t.summed):
            s_part = s + ((rank * t.summed + j) * t.CONSUMERS + thread) * 16
            words = lds128_remote(s_part, Int32(other))
            for i in range_constexpr(4):
                own[4 * j + i] = own[4 * j + i] + words[i].bitcast(Float32)
    meet()
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
def activate(t: Constexpr[Tiles], sums: cute.Tensor, limit: Constexpr[float], weights: tuple):
    """SwiGLU of paired columns under weights of the lane's rows g and g + 8: fragments of half as many."""
    made = cute.make_rmem_tensor((2 * t.summed,), Float32)
    for p in range_constexpr(t.summed // 4):
        for b in range_constexpr(2):
            for i in range_constexpr(4):
                gate, up = sums[16 * p + 4 * b + i], sums[16 * p + 8 + 4 * b + i]
                made[8 * p + 4 * b + i] = swiglu.swiglu(gate, up, limit, weights[i // 2])
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
