"""Products of few rows of each expert with MXFP4 weights on wgmma (sm_90a): what it takes is to read the
weights. They come by bulk copies as the GEMVs read them, and go through registers to tensor cores; rows of x
are the other operand, in shared memory. Exact up to the sums: an instruction's 32 columns are a block, whose
scale its sums are multiplied by.

Moved bits make e4m3 of e2m1, in an order of columns that rows of x are laid down in, too: of 32, the words
0 2 4 6 1 3 5 7, of a word the bytes 2 0 3 1.
"""

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Constexpr, Float8E4M3FN, Float32, Int32, Int64, Uint32, const_expr, range_constexpr
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.tensor_utils.layout import LayoutEnum

from dsv4c.codegen.lib import gemm, ptx, swiglu, units
from dsv4c.codegen.lib.tiles import Few


@cute.jit
def open_ring(t: Constexpr[Few], s: Int32, thread: Int32):
    """The barriers of every stage: full, and free. All threads."""
    if thread == 0:
        for i in range_constexpr(t.stages):
            ptx.mbarrier_init(s + t.o_bars + 8 * i, 1 + t.COPIERS // 32)
            ptx.mbarrier_init(s + t.o_bars + 8 * (t.stages + i), t.CONSUMERS // 32)
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()


@cute.jit
def wait_free(t: Constexpr[Few], s: Int32, step: Int32):
    """Until what was in step `step`'s stage before is used up."""
    ptx.mbarrier_wait(s + t.o_bars + 8 * (t.stages + step % t.stages), (step // t.stages & 1) ^ 1)


@cute.jit
def copy_weights(t: Constexpr[Few], s: Int32, at: Int32, g_w: tuple, first: Int32, last: Int32, lane: Int32):
    """A tile's weights into the ring, of each matrix the 16-row tiles from `first` on, none after `last`;
    `at` steps were laid down before. A warp: eight lanes have a tile each.
    """
    tile, base = lane % 8, g_w[0]
    if const_expr(t.paired):
        tile = lane % 4
        if lane >= 4:
            base = g_w[1]
    tile = cutlass.min(first + tile, last)
    g = base + Int64(tile // t.tiles * t.group_bytes + tile % t.tiles * (t.span * t.UNIT))
    for step in cutlass.range(t.steps, unroll=1):
        now = at + step
        stage = now % t.stages
        wait_free(t, s, now)
        bar = s + t.o_bars + 8 * stage
        if lane == 0:
            ptx.mbarrier_expect(bar, Int32(t.w_stage))
        cute.arch.sync_warp()
        if lane < 8:
            unit = step * t.together
            behind = unit // t.span * (t.tiles * t.span * t.UNIT) + unit % t.span * t.UNIT
            s_tile = s + t.o_w + stage * t.w_stage + lane * t.w_tile
            ptx.bulk_load(s_tile, g + Int64(behind), Int32(t.w_tile), bar)


@cute.jit
def copy_rows(
    t: Constexpr[Few],
    s: Int32,
    at: Int32,
    g_x: Int64,
    g_fx: Int64,
    g_order: Int64,
    rows: Int32,
    divide: Constexpr[int],
    thread: Int32,
):
    """A tile's rows of x and their scales into the ring: those that `g_order` lists, of which there are
    `rows`; `at` steps were laid down before. Rows that are not there are the last one again.
    """
    each = const_expr(t.COPIERS // t.ROWS)  # threads of a row
    row, own = thread // each, thread % each * (8 // each)
    number = Int32(ptx.ldg32(g_order + Int64(cutlass.min(row, rows - 1)) * 4)) // divide
    g_row = g_x + Int64(number) * t.stride + own * 16
    g_scales = g_fx + Int64(number) * t.blocks
    held = cute.make_rmem_tensor((t.together, 32 // each + 1), Uint32)
    _fetch(t, held, g_row, g_scales, Int32(0))
    for step in cutlass.range(t.steps, unroll=1):
        now = at + step
        stage = now % t.stages
        wait_free(t, s, now)
        for i in range_constexpr(t.together):
            unit = stage * t.together + i
            for n in range_constexpr(8 // each):
                s_piece = s + unit * (t.ROWS * 128) + row * 128 + ((own + n) ^ row % 8) * 16
                ptx.sts128(s_piece, *[_ordered(held[i, 8 * (n // 2) + 2 * j + n % 2]) for j in range(4)])
            if thread % each == 0:
                f = ptx.ue8m0_to_f32(held[i, 32 // each])
                ptx.sts_f32(s + t.o_factors + (unit * t.ROWS + row) * 4, f)
        cute.arch.sync_warp()
        if thread % 32 == 0:
            ptx.mbarrier_arrive(s + t.o_bars + stage * 8)
        _fetch(t, held, g_row, g_scales, cutlass.min(step + 1, Int32(t.steps - 1)))


@cute.jit
def _fetch(t: Constexpr[Few], held: cute.Tensor, g_row: Int64, g_scales: Int64, step: Int32):
    """The thread's bytes of a row in step `step` and its scales, in flight to registers."""
    words = const_expr(held.shape[1] - 1)
    for i in range_constexpr(t.together):
        unit = step * t.together + i
        for n in range_constexpr(words // 4):
            w = ptx.ldg128(g_row + Int64(unit * 128 + n * 16))
            for j in range_constexpr(4):
                held[i, 4 * n + j] = w[j]
        held[i, words] = ptx.ldg_u8(g_scales + unit)


@cute.jit
def _ordered(r: Uint32):
    """Bytes 2 0 3 1 of a word."""
    return cute.arch.inline_ptx(
        "prmt.b32 {$w0}, {$r0}, 0, 0x1302;", write_only_types=[Uint32], read_only_args=[r]
    )


@cute.jit
def e2m1x8_to_e4m3x4x2(r: Uint32):
    """A word of MXFP4 codes as placed -> four e4m3 of row g, four of row g + 8: all times 2^-6, exact.

    Of row g signs are bits 15 31 8 24, magnitudes from bits 9 25 4 20 up; of row g + 8 7 23 0 16, 1 17 12 28.
    """
    return cute.arch.inline_ptx(
        "{ .reg .b32 t; "
        "and.b32 {$w0}, {$r0}, 0x80008000; "
        "shl.b32 t, {$r0}, 1; lop3.b32 {$w0}, t, 0x1C001C00, {$w0}, 0xEA; "
        "shr.u32 t, {$r0}, 1; lop3.b32 {$w0}, t, 0x00800080, {$w0}, 0xEA; "
        "shr.u32 t, {$r0}, 2; lop3.b32 {$w0}, t, 0x001C001C, {$w0}, 0xEA; "
        "shl.b32 t, {$r0}, 8; and.b32 {$w1}, t, 0x80008000; "
        "shl.b32 t, {$r0}, 9; lop3.b32 {$w1}, t, 0x1C001C00, {$w1}, 0xEA; "
        "shl.b32 t, {$r0}, 7; lop3.b32 {$w1}, t, 0x00800080, {$w1}, 0xEA; "
        "shr.u32 t, {$r0}, 10; lop3.b32 {$w1}, t, 0x001C001C, {$w1}, 0xEA; }",
        write_only_types=[Uint32] * 2,
        read_only_args=[r],
    )


@cute.jit
def multiply(t: Constexpr[Few], s: Int32, at: Int32, warp: Int32, lane: Int32):
    """A tile's sums times 2^-6: f32 fragments of the warp's 16 rows of w by 16 rows of x; `at` steps were
    multiplied before.
    """
    major = OperandMajorMode.K
    number = Float8E4M3FN
    mma = sm90.make_trivial_tiled_mma(
        number,
        number,
        major,
        major,
        Float32,
        (1, 1, 1),
        (64, t.ROWS),
        a_source=warpgroup.OperandSource.RMEM,
    )
    shape = const_expr((64, t.ROWS, 128))
    parts = const_expr(t.stages * t.together)
    s_x = gemm.operand(number, s, sm90.make_smem_layout_b(LayoutEnum.ROW_MAJOR, shape, number, parts))
    w = mma.make_fragment_A(mma.partition_shape_A((64, 128)))
    x = mma.make_fragment_B(mma.get_slice(warp % 4 * 32 + lane).partition_B(s_x))
    words = cute.recast_tensor(w, Uint32)
    products = [cute.make_rmem_tensor(mma.partition_shape_C((64, t.ROWS)), Float32) for _ in range(4)]
    sums = cute.make_rmem_tensor((t.ROWS // 2,), Float32)
    sums.fill(0.0)
    mma.set(warpgroup.Field.ACCUMULATE, False)
    for step in cutlass.range(t.steps, unroll=1):
        stage = (at + step) % t.stages
        full = s + t.o_bars + 8 * stage
        ptx.mbarrier_wait(full, (at + step) // t.stages & 1)
        # Here and not where rows of x were written: there it would wait for all loads in flight.
        ptx.fence_async()
        s_units = s + t.o_w + stage * t.w_stage + warp * t.w_tile
        for i in cutlass.range(t.together, unroll=1):
            s_unit = s_units + i * t.UNIT
            part = stage * t.together + i
            scales = ptx.lds64(s_unit + 1024 + lane // 4 * 8)
            for share in range_constexpr(2):
                r = ptx.lds128(s_unit + 512 * share + lane * 16)
                for n in range_constexpr(4):
                    pair = e2m1x8_to_e4m3x4x2(r[n])
                    words[8 * share + 2 * n] = pair[0]
                    words[8 * share + 2 * n + 1] = pair[1]
            warpgroup.fence()
            for c in range_constexpr(4):
                cute.gemm(mma, products[c], w[None, None, c], x[None, None, c, part], products[c])
            warpgroup.commit_group()
            s_f = s + t.o_factors + part * (t.ROWS * 4) + lane % 4 * 8
            fx = [ptx.lds64(s_f + 32 * j) for j in range(t.ROWS // 8)]
            # Of the lane's rows: bytes 0 and 1 are of the first block's scales, 2 and 3 of the next one's.
            fw = [
                ptx.ue8m0_to_f32(scales[c // 2] >> Uint32(16 * (c % 2) + 8 * row) & Uint32(255))
                for c in range(4)
                for row in range(2)
            ]
            warpgroup.wait_group(0)
            for j in range_constexpr(t.ROWS // 8):
                for row in range_constexpr(2):
                    for k in range_constexpr(2):
                        n = const_expr(4 * j + 2 * row + k)
                        block = products[0][n] * fw[row]
                        for c in range_constexpr(1, 4):
                            block = block + products[c][n] * fw[2 * c + row]
                        sums[n] = sums[n] + block * fx[j][k].bitcast(Float32)
        ptx.fence_async()
        cute.arch.sync_warp()
        if lane == 0:
            ptx.mbarrier_arrive(full + 8 * t.stages)
    return sums


@cute.jit
def meet_sums(t: Constexpr[Few], s: Int32, sums: cute.Tensor, warp: Int32, lane: Int32):
    """The tile's sums in shared memory, f32 [height][128]. All that multiply."""
    ptx.sync_threads(t.CONSUMERS)  # all have read the last tile's
    s_own = s + t.o_sums + lane % 4 * 2 * t.PITCH + (warp * 16 + units.reversed_row(lane)) * 4
    for j in range_constexpr(t.ROWS // 8):
        for row in range_constexpr(2):
            for i in range_constexpr(2):
                ptx.sts_f32(
                    s_own + (8 * j + i) * t.PITCH + 32 * row, sums[4 * j + 2 * row + i] * Float32(t.FINISH)
                )
    ptx.sync_threads(t.CONSUMERS)


@cute.jit
def store(
    t: Constexpr[Few],
    s: Int32,
    g_y: Int64,
    row: Int32,
    columns: Int32,
    column: Int32,
    weight: Float32,
    limit: Constexpr[float],
    thread: Int32,
):
    """bf16 results from `column` on, of which those below `columns` exist, to `row` of y, -1 for none: row
    thread / 16 of the tile. Of paired matrices SwiGLU under `weight`.
    """
    s_row = s + t.o_sums + thread // 16 * t.PITCH
    first = column + thread % 16 * (t.made // 16)
    if row >= 0 and first < columns:
        g = g_y + (Int64(row) * columns + first) * 2
        if const_expr(t.paired):
            gate, up = ptx.lds128(s_row + thread % 16 * 16), ptx.lds128(s_row + 256 + thread % 16 * 16)
            made = [
                swiglu.swiglu(gate[i].bitcast(Float32), up[i].bitcast(Float32), limit, weight)
                for i in range(4)
            ]
            ptx.stg64(g, ptx.f32x2_to_bf16x2(made[0], made[1]), ptx.f32x2_to_bf16x2(made[2], made[3]))
        else:
            r = [*ptx.lds128(s_row + thread % 16 * 32), *ptx.lds128(s_row + thread % 16 * 32 + 16)]
            f = [word.bitcast(Float32) for word in r]
            ptx.stg128(g, *[ptx.f32x2_to_bf16x2(f[2 * i], f[2 * i + 1]) for i in range(4)])
