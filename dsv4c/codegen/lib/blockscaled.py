"""NVFP4 x NVFP4 on tcgen05: a CTA's 128 x 128 tile of y = x w^T, accumulated in tensor memory. sm_100a only.

A stage holds 256 columns of 128 rows of both sides. Codes lie as the MMA's 128-byte swizzle wants them: 16
bytes number c of row r at r * 128 + (c ^ r % 8) * 16. Scales lie in atoms of 128 rows x 64 columns: 4 bytes
of row r at r % 32 * 16 + r / 32 * 4. Weights come so from `numerics/packing.py` ("nvfp4_mma"), one bulk copy
per stage; activations are put in order here, 16 and 4 bytes at a time.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, const_expr, range_constexpr

from dsv4c.codegen.lib import ptx
from dsv4c.codegen.lib.geometry import Gemm

_asm = cute.arch.inline_ptx

TILE, K_TILE, STAGE = Gemm.TILE, Gemm.K_TILE, Gemm.STAGE
CODES, SCALES = Gemm.CODES, Gemm.SCALES
COLUMNS = 256  # of tensor memory: a power of two that holds 128 of sums, 16 + 16 of scales
X_SCALES, W_SCALES = 128, 144  # where they start

# Matrix descriptors (PTX ISA, tcgen05), high words: layout, version 1, distance of groups of eight rows.
SWIZZLED = 2 << 29 | 1 << 14 | 1024 >> 4
PLAIN = 1 << 14 | 128 >> 4
# Instruction descriptor: e2m1 x e2m1, e4m3 scales, M = 128, N = 128, K = 64.
INSTRUCTION = 1 << 7 | 1 << 10 | TILE >> 3 << 17 | TILE >> 4 << 24

_LOAD = ", ".join(f"{{$w{i}}}" for i in range(32))


# Instructions -----------------------------------------------------------------------------------------------


@cute.jit
def cp_async4(s: Int32, g: Int64):
    """Asynchronous copy of 4 bytes to shared memory, in the groups of `ptx.cp_async16`."""
    _asm("cp.async.ca.shared.global [{$r0}], [{$r1}], 4;", read_only_args=[s, g])


@cute.jit
def allocate(s: Int32):
    """`COLUMNS` columns of tensor memory, their address to shared memory. One whole warp."""
    _asm(
        "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [{$r0}], {$r1}; "
        "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;",
        read_only_args=[s, Uint32(COLUMNS)],
    )


@cute.jit
def free(tensor: Uint32):
    """Give tensor memory back. The warp that allocated it."""
    _asm(
        "tcgen05.dealloc.cta_group::1.sync.aligned.b32 {$r0}, {$r1};",
        read_only_args=[tensor, Uint32(COLUMNS)],
    )


@cute.jit
def descriptor(s: Int32, high: Constexpr[int]):
    """The descriptor of a matrix in shared memory."""
    low = ((s >> Int32(4)) & Int32(0x3FFF)) | Int32(1 << 16)
    return (Int64(high) << Int64(32)) | Int64(low)


@cute.jit
def copy_scales(tensor: Uint32, s: Int32):
    """An atom of scales into four columns, for all four groups of lanes. One thread."""
    _asm(
        "tcgen05.cp.cta_group::1.32x128b.warpx4 [{$r0}], {$r1};",
        read_only_args=[tensor, descriptor(s, PLAIN)],
    )


@cute.jit
def multiply(tensor: Uint32, s_x: Int32, s_w: Int32, x_scales: Uint32, w_scales: Uint32, add: Int32):
    """tensor = (x scaled) times (w scaled)^T of 64 columns, plus tensor if `add`. One thread."""
    _asm(
        "{ .reg .pred p; setp.ne.b32 p, {$r6}, 0; "
        "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.block16 "
        "[{$r0}], {$r1}, {$r2}, {$r3}, [{$r4}], [{$r5}], p; }",
        read_only_args=[
            tensor,
            descriptor(s_x, SWIZZLED),
            descriptor(s_w, SWIZZLED),
            Uint32(INSTRUCTION),
            x_scales,
            w_scales,
            add,
        ],
    )


@cute.jit
def commit(s_bar: Int32):
    """One arrival when this thread's MMAs have completed; they no longer read shared memory then."""
    _asm(
        "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [{$r0}];",
        read_only_args=[s_bar],
    )


@cute.jit
def after_barrier():
    """Order tensor memory behind a barrier that this thread has passed."""
    _asm("tcgen05.fence::after_thread_sync;")


@cute.jit
def before_barrier():
    """Order tensor memory before a barrier that this thread is about to reach."""
    _asm("tcgen05.fence::before_thread_sync;")


@cute.jit
def load32(tensor: Uint32):
    """32 columns of the lane's row. Whole warp."""
    return _asm(
        "tcgen05.ld.sync.aligned.32x32b.x32.b32 {" + _LOAD + "}, [{$r0}]; tcgen05.wait::ld.sync.aligned;",
        write_only_types=[Uint32] * 32,
        read_only_args=[tensor],
    )


# The tile ---------------------------------------------------------------------------------------------------


@cute.jit
def start_weights(x: Constexpr[Gemm], s: Int32, g_w: Int64, step: Int32, column_tile: Int32):
    """Put a step's codes and scales of w in flight. One thread."""
    slot = step % x.stages
    bar = s + x.bars + slot * 16
    ptx.mbarrier_expect(bar, Int32(CODES + SCALES))
    g = g_w + (Int64(column_tile) * x.steps + step) * (CODES + SCALES)
    ptx.bulk_load(s + slot * STAGE + CODES, g, Int32(CODES + SCALES), bar)


@cute.jit
def start_rows(
    x: Constexpr[Gemm], s: Int32, g_x: Int64, g_scale: Int64, step: Int32, row_tile: Int32, tid: Int32
):
    """Put a step's codes and scales of x in flight; rows that do not exist repeat the last one."""
    s_x = s + step % x.stages * STAGE
    for n in range_constexpr(TILE * 8 // TILE):  # eight 16-byte pieces to a row, next to each other in a warp
        piece = tid + n * TILE
        r, c = piece // 8, piece % 8
        row = cutlass.min(row_tile * TILE + r, Int32(x.rows - 1))
        g = g_x + Int64(row) * (x.k // 2) + step * (K_TILE // 2) + c * 16
        ptx.cp_async16(s_x + r * 128 + (c ^ (r % 8)) * 16, g)
    row = cutlass.min(row_tile * TILE + tid, Int32(x.rows - 1))
    g = g_scale + Int64(row) * (x.k // 16) + step * (K_TILE // 16)
    for j in range_constexpr(K_TILE // 64):
        cp_async4(s_x + (2 * CODES + SCALES) + j * 512 + tid % 32 * 16 + tid // 32 * 4, g + 4 * j)


@cute.jit
def multiply_stage(s_stage: Int32, tensor: Uint32, first: Int32):
    """A stage's scales to tensor memory, then its products. One thread."""
    for j in range_constexpr(K_TILE // 64):
        copy_scales(tensor + Uint32(X_SCALES + 4 * j), s_stage + (2 * CODES + SCALES) + 512 * j)
        copy_scales(tensor + Uint32(W_SCALES + 4 * j), s_stage + 2 * CODES + 512 * j)
    for j in range_constexpr(K_TILE // 64):
        add = Int32(1)
        if const_expr(j == 0):
            add = Int32(1) - first
        x_scales, w_scales = tensor + Uint32(X_SCALES + 4 * j), tensor + Uint32(W_SCALES + 4 * j)
        multiply(tensor, s_stage + 32 * j, s_stage + CODES + 32 * j, x_scales, w_scales, add)


class Operands(NamedTuple):
    """x NVFP4[rows, k] with a global scale per row, w NVFP4[columns, k] with one -> y bf16[rows, columns]."""

    x: cute.Pointer
    x_scale: cute.Pointer
    x_global_scale: cute.Pointer
    w: cute.Pointer
    w_global_scale: cute.Pointer
    y: cute.Pointer


class Place(NamedTuple):
    """Where a thread works: the aligned allocation, the sums' address, the tile."""

    s: Int32
    tensor: Uint32
    column_tile: Int32
    row_tile: Int32
    warp: Int32
    tid: Int32


@cute.jit
def enter(x: Constexpr[Gemm], m: Operands, smem: Int32) -> Place:
    """Take tensor memory, and put the first weights in flight; a grid of (columns, rows) in tiles."""
    tid, _, _ = cute.arch.thread_idx()
    column_tile, row_tile, _ = cute.arch.block_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    s = (smem + Int32(1023)) & Int32(-1024)
    s_done = s + (x.bars + 16 * x.stages)
    if warp == 0:
        allocate(s_done + 8)
    if tid == 0:
        for i in range_constexpr(x.stages):
            ptx.mbarrier_init(s + x.bars + 16 * i, 1)
            ptx.mbarrier_init(s + x.bars + 16 * i + 8, 1)
        ptx.mbarrier_init(s_done, 1)
        cute.arch.mbarrier_init_fence()
        for step in range_constexpr(min(x.stages - 1, x.steps)):
            start_weights(x, s, m.w.toint(), Int32(step), column_tile)
    before_barrier()
    cute.arch.sync_threads()
    after_barrier()
    return Place(s, ptx.lds32(s_done + 8), column_tile, row_tile, warp, tid)


@cute.jit
def gemm(x: Constexpr[Gemm], m: Operands, at: Place) -> None:
    """The CTA's tile: y = bf16(sum * x_global_scale[row] * w_global_scale)."""
    s, tensor, column_tile, row_tile, warp, tid = at
    s_done = s + (x.bars + 16 * x.stages)
    g_x, g_x_scale, g_w = m.x.toint(), m.x_scale.toint(), m.w.toint()
    for step in range_constexpr(x.stages - 1):
        if const_expr(step < x.steps):
            start_rows(x, s, g_x, g_x_scale, Int32(step), row_tile, tid)
        ptx.cp_async_commit()
    for step in cutlass.range(x.steps, unroll=1):
        ahead = step + Int32(x.stages - 1)
        if ahead < x.steps:
            if step > 0:  # the step before this one had that slot
                last = step - Int32(1)
                ptx.mbarrier_wait(s + x.bars + last % x.stages * 16 + 8, last // x.stages & 1)
            start_rows(x, s, g_x, g_x_scale, ahead, row_tile, tid)
            if tid == 0:
                start_weights(x, s, g_w, ahead, column_tile)
        ptx.cp_async_commit()
        ptx.cp_async_wait(x.stages - 1)
        ptx.fence_async()
        cute.arch.sync_threads()
        if tid == 0:
            slot = step % x.stages
            ptx.mbarrier_wait(s + x.bars + slot * 16, step // x.stages & 1)
            after_barrier()
            multiply_stage(s + slot * STAGE, tensor, (step == 0).to(Int32))
            commit(s + x.bars + slot * 16 + 8)
    if tid == 0:
        commit(s_done)
    cute.arch.sync_warp()
    ptx.mbarrier_wait(s_done, Int32(0))
    after_barrier()
    row = row_tile * TILE + tid
    scale = ptx.ldg_f32(m.x_global_scale.toint() + Int64(cutlass.min(row, Int32(x.rows - 1))) * 4)
    scale = scale * ptx.ldg_f32_constant(m.w_global_scale.toint())
    for n in range_constexpr(TILE // 32):
        r = load32(tensor + (warp.to(Uint32) << Uint32(21)) + Uint32(32 * n))
        column = column_tile * TILE + 32 * n
        for i in range_constexpr(4):
            w = [_pair(r[8 * i + 2 * j], r[8 * i + 2 * j + 1], scale) for j in range(4)]
            if row < x.rows and column + 8 * i < x.columns:
                ptx.stg128(
                    m.y.toint() + (Int64(row) * x.columns + column + 8 * i) * 2, w[0], w[1], w[2], w[3]
                )
    before_barrier()
    cute.arch.sync_threads()
    if warp == 0:
        after_barrier()
        free(tensor)


@cute.jit
def _pair(lo: Uint32, hi: Uint32, scale: Float32):
    """Two sums, scaled, as bf16x2."""
    return ptx.f32x2_to_bf16x2(lo.bitcast(Float32) * scale, hi.bitcast(Float32) * scale)
