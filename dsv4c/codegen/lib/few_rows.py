"""Products of few rows of each expert with MXFP4 weights on wgmma (sm_90a): what it takes is to read the
weights. They come by bulk copies as the GEMVs read them, and go through registers, widened to e4m3, to tensor
cores; rows of x are the other operand, in shared memory.

A lane's eight codes in a row are what an instruction wants of columns 4q.. and 16 + 4q.. of 32: so words of x
are laid down in that order.
"""

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Constexpr, Float8E4M3FN, Float32, Int32, Int64, Uint32, const_expr, range_constexpr
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.tensor_utils.layout import LayoutEnum

from dsv4c.codegen.lib import gemm, ptx, swiglu
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
            behind = step // t.span * (t.tiles * t.span * t.UNIT) + step % t.span * t.UNIT
            ptx.bulk_load(
                s + t.o_w + stage * t.w_stage + lane * t.UNIT, g + Int64(behind), Int32(t.UNIT), bar
            )


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
    `rows`; `at` steps were laid down before. What lies where no row is is multiplied, and not stored.
    """
    each = const_expr(t.height // (t.COPIERS // 8))
    listed = cute.make_rmem_tensor((each,), Int64)
    for i in range_constexpr(each):
        own = thread // 8 + i * (t.COPIERS // 8)
        number = Int32(ptx.ldg32(g_order + Int64(cutlass.min(own, rows - 1)) * 4)) // divide
        listed[i] = g_x + Int64(number) * t.stride + thread % 8 // 2 * 32 + thread % 2 * 4
    g_scales = (
        g_fx + Int64(Int32(ptx.ldg32(g_order + Int64(cutlass.min(thread, rows - 1)) * 4)) // divide) * t.steps
    )
    scales = cute.make_rmem_tensor((2,), Int32)
    for i in range_constexpr(2):
        scales[i] = Int32(ptx.ldg_u8(g_scales + i))
    for pair in cutlass.range(t.steps // 2, unroll=1):
        for part in range_constexpr(2):
            step = 2 * pair + part
            now = at + step
            stage = now % t.stages
            wait_free(t, s, now)
            s_x = s + stage * (t.height * 128)
            for i in range_constexpr(each):
                row = thread // 8 + i * (t.COPIERS // 8)
                if row < rows:
                    s_piece = s_x + row * 128 + (thread % 8 ^ row % 8) * 16
                    for j in range_constexpr(4):
                        cp_async4(s_piece + 4 * j, listed[i] + Int64(step * 128 + 8 * j))
            ptx.cp_async_commit()
            if thread < t.height:
                f = ptx.ue8m0_to_f32(Uint32(scales[part]))
                ptx.sts_f32(s + t.o_factors + (stage * t.height + thread) * 4, f)
                scales[part] = Int32(ptx.ldg_u8(g_scales + cutlass.min(step + 2, Int32(t.steps - 1))))
            if step >= t.LATE:
                ptx.cp_async_wait(t.LATE)
                _announce(t, s, now - t.LATE, thread)
    ptx.cp_async_wait(0)
    for i in range_constexpr(t.LATE):
        _announce(t, s, at + (t.steps - t.LATE + i), thread)


@cute.jit
def _announce(t: Constexpr[Few], s: Int32, step: Int32, thread: Int32):
    """Rows of step `step` are there, as far as this warp goes."""
    ptx.fence_async()
    cute.arch.sync_warp()
    if thread % 32 == 0:
        ptx.mbarrier_arrive(s + t.o_bars + step % t.stages * 8)


@cute.jit
def cp_async4(s: Int32, g: Int64):
    """Asynchronous copy of 4 bytes to shared memory."""
    cute.arch.inline_ptx("cp.async.ca.shared.global [{$r0}], [{$r1}], 4;", read_only_args=[s, g])


@cute.jit
def multiply(t: Constexpr[Few], s: Int32, at: Int32, warp: Int32, lane: Int32):
    """A tile's sums: f32 fragments of the warp's 16 rows of w by `t.height` rows of x; `at` steps were
    multiplied before.
    """
    major = OperandMajorMode.K
    mma = sm90.make_trivial_tiled_mma(
        Float8E4M3FN,
        Float8E4M3FN,
        major,
        major,
        Float32,
        (1, 1, 1),
        (64, t.height),
        a_source=warpgroup.OperandSource.RMEM,
    )
    shape = const_expr((64, t.height, 128))
    s_x = gemm.operand(
        Float8E4M3FN, s, sm90.make_smem_layout_b(LayoutEnum.ROW_MAJOR, shape, Float8E4M3FN, t.stages)
    )
    w = mma.make_fragment_A(mma.partition_shape_A((64, 128)))
    x = mma.make_fragment_B(mma.get_slice(warp % 4 * 32 + lane).partition_B(s_x))
    words = cute.recast_tensor(w, Uint32)
    products = cute.make_rmem_tensor(mma.partition_shape_C((64, t.height)), Float32)
    sums = cute.make_rmem_tensor((t.height // 2,), Float32)
    sums.fill(0.0)
    for step in cutlass.range(t.steps, unroll=1):
        stage = (at + step) % t.stages
        full = s + t.o_bars + 8 * stage
        ptx.mbarrier_wait(full, (at + step) // t.stages & 1)
        s_unit = s + t.o_w + stage * t.w_stage + warp * t.UNIT
        scales = ptx.lds64(s_unit + 1024 + lane // 4 * 8)
        tops = gemm.row_tops(scales[0], scales[1])
        for share in range_constexpr(2):
            r = ptx.lds128(s_unit + 512 * share + lane * 16)
            for half in range_constexpr(2):
                tables = []
                for row in range_constexpr(2):
                    tables.extend(
                        gemm.e4m3_table(scales[share] >> Uint32(16 * half + 8 * row) & Uint32(255), tops[row])
                    )
                for part in range_constexpr(2):
                    pair = gemm.e2m1x8_to_e4m3x4x2(r[2 * half + part], *tables)
                    words[8 * share + 4 * half + 2 * part] = pair[0]
                    words[8 * share + 4 * half + 2 * part + 1] = pair[1]
        warpgroup.fence()
        mma.set(warpgroup.Field.ACCUMULATE, False)
        for c in range_constexpr(4):
            cute.gemm(mma, products, w[None, None, c], x[None, None, c, stage], products)
            mma.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.commit_group()
        s_f = s + t.o_factors + stage * (t.height * 4) + lane % 4 * 8
        fx = [ptx.lds64(s_f + 32 * j) for j in range(t.height // 8)]
        warpgroup.wait_group(0)
        ptx.fence_async()
        cute.arch.sync_warp()
        if lane == 0:
            ptx.mbarrier_arrive(full + 8 * t.stages)
        fw = [gemm.scaled_down(tops[row]) for row in range(2)]
        for j in range_constexpr(t.height // 8):
            for row in range_constexpr(2):
                for i in range_constexpr(2):
                    n = const_expr(4 * j + 2 * row + i)
                    sums[n] = sums[n] + products[n] * (fx[j][i].bitcast(Float32) * fw[row])
    return sums


@cute.jit
def meet_sums(t: Constexpr[Few], s: Int32, sums: cute.Tensor, warp: Int32, lane: Int32):
    """The tile's sums in shared memory, f32 [height][128]. All that multiply."""
    ptx.sync_threads(t.CONSUMERS)  # all have read the last tile's
    s_own = s + t.o_sums + lane % 4 * 2 * t.PITCH + (warp * 16 + lane // 4) * 4
    for j in range_constexpr(t.height // 8):
        for row in range_constexpr(2):
            for i in range_constexpr(2):
                ptx.sts_f32(s_own + (8 * j + i) * t.PITCH + 32 * row, sums[4 * j + 2 * row + i])
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
    own: Constexpr[int],
    thread: Int32,
):
    """bf16 results from `column` on, of which those below `columns` exist, to `row` of y, -1 for none: row
    `own` * 16 + thread / 16 of the tile, 16 threads a row. Of paired matrices SwiGLU under `weight`.
    """
    s_row = s + t.o_sums + (own * 16 + thread // 16) * t.PITCH
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
