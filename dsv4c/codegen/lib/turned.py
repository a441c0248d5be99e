"""Products of bf16 rows whose first operand is the weights (sm_90a): sums that tensor cores keep, of 64 columns
of results, 16 of each warp, by all rows of the tile, so that they read a row once for each 64 columns.

What shared memory moves limits `gemm`, and FP8 weights that are widened there would be written and read. So a
warp loads its 16-row units of these itself, and tensor cores take them out of registers. A lane has rows g and
g + 8 of a unit, g = lane / 4, a 16-byte piece of each at a time. Of a k16 step tensor cores want columns 2q,
2q + 1, 2q + 8 and 2q + 9 from lane 4g + q: four lanes have such a piece each, and hand each other theirs.
"""

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import BFloat16, Constexpr, Float32, Int32, Int64, Uint32, const_expr, range_constexpr
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.tensor_utils.layout import LayoutEnum

from dsv4c.codegen.lib import gemm, ptx
from dsv4c.codegen.lib.tiles import Tiles

_asm = cute.arch.inline_ptx


@cute.jit
def multiply(
    t: Constexpr[Tiles],
    s: Int32,
    at: Int32,
    g_w: Int64,
    g_fw: Int64,
    first: Int32,
    last: Int32,
    begin: Int32,
    group: Int32,
    thread: Int32,
):
    """w x^T of a tile from step `begin` of k on: f32 fragments of the warpgroup's 64 rows of w and all rows of
    x; `at` steps were multiplied before. FP8 weights are loaded here: the tile has the 16-row tiles of w from
    `first` on, none after `last`, and `g_fw` is where its block scales start.
    """
    k_major = OperandMajorMode.K
    source = const_expr(warpgroup.OperandSource.RMEM if t.widens else warpgroup.OperandSource.SMEM)
    mma = sm90.make_trivial_tiled_mma(
        BFloat16, BFloat16, k_major, k_major, Float32, (1, 1, 1), (64, t.height), source
    )
    shape, row_major = const_expr((64, t.height, t.each)), LayoutEnum.ROW_MAJOR
    own = mma.get_slice(thread % 128)
    s_x = gemm.operand(BFloat16, s, sm90.make_smem_layout_b(row_major, shape, BFloat16, t.stages))
    x = mma.make_fragment_B(own.partition_B(s_x))
    sums = cute.make_rmem_tensor(mma.partition_shape_C((64, t.height)), Float32)
    sums.fill(0.0)
    mma.set(warpgroup.Field.ACCUMULATE, True)
    if const_expr(not t.widens):
        layout = sm90.make_smem_layout_a(row_major, shape, BFloat16, 2 * t.stages)
        w = mma.make_fragment_A(own.partition_A(gemm.operand(BFloat16, s + t.o_w, layout)))
        for step in cutlass.range(t.steps, unroll=1):
            stage = (at + step) % t.stages
            full = _arrived(t, s, at + step)
            warpgroup.fence()
            for c in range_constexpr(4):
                cute.gemm(mma, sums, w[None, None, c, 2 * stage + group], x[None, None, c, stage], sums)
            warpgroup.commit_group()
            warpgroup.wait_group(0)
            gemm.release(t, full, thread)
        return sums
    fragments = [mma.make_fragment_A(mma.partition_shape_A((64, t.each))) for _ in range(2)]
    words = [cute.recast_tensor(fragments[i], Uint32) for i in range(2)]
    lane = thread % 32
    tile = cutlass.min(first + group * 4 + thread % 128 // 32, last)
    g_rows = g_w + Int64(tile // t.tiles * t.group_bytes + tile % t.tiles * (t.span * t.unit) + lane // 4 * 128)
    held = cute.make_rmem_tensor((2, 8), Uint32)
    scales = cute.make_rmem_tensor((2,), Int32)
    for i in range_constexpr(2):
        _fetch(t, held, scales, i, g_rows, g_fw, begin + i, lane)
    _widen(words[0], held, scales, 0, lane)
    for pair in cutlass.range(t.steps // 2, unroll=1):
        for i in range_constexpr(2):
            step = 2 * pair + i
            full = _arrived(t, s, at + step)
            warpgroup.fence()
            for c in range_constexpr(4):
                cute.gemm(mma, sums, fragments[i][None, None, c], x[None, None, c, (at + step) % t.stages], sums)
            warpgroup.commit_group()
            _fetch(t, held, scales, i, g_rows, g_fw, begin + cutlass.min(step + 2, Int32(t.steps - 1)), lane)
            _widen(words[1 - i], held, scales, 1 - i, lane)
            warpgroup.wait_group(0)
            gemm.release(t, full, thread)
    return sums


@cute.jit
def _arrived(t: Constexpr[Tiles], s: Int32, step: Int32):
    """The barrier of step `step`'s stage, which then is full."""
    full = s + t.o_bars + 8 * (step % t.stages)
    ptx.mbarrier_wait(full, step // t.stages & 1)
    ptx.fence_async()
    return full


@cute.jit
def _fetch(
    t: Constexpr[Tiles],
    held: cute.Tensor,
    scales: cute.Tensor,
    i: Constexpr[int],
    g_rows: Int64,
    g_fw: Int64,
    step: Int32,
    lane: Int32,
):
    """A step of both of the lane's rows, and their block's scale, in flight to registers `i`."""
    unit, part = step // 2, step % 2
    scales[i] = Int32(ptx.ldg_u8_constant(g_fw + unit))
    g_piece = g_rows + Int64(gemm.unit_behind(t, unit) + ((4 * part + lane % 4) ^ lane // 4) * 16)
    for half in range_constexpr(2):
        v = ptx.ldg128_constant(g_piece + 1024 * half)
        for j in range_constexpr(4):
            held[i, 4 * half + j] = v[j]


@cute.jit
def _widen(words: cute.Tensor, held: cute.Tensor, scales: cute.Tensor, i: Constexpr[int], lane: Int32):
    """Registers `i` times their scale, as tensor cores take four k16 steps: of each a0 and a2 are the first
    row's, a1 and a3 the second one's.
    """
    scale = scales[i]
    most = Int32(134)  # the largest that one factor of bf16 holds besides the 2^120 that bits in place lack
    factor = Uint32((cutlass.min(scale, most) + 120) * 0x00800080)
    rest = Uint32((cutlass.max(scale - most, Int32(0)) + 127) * 0x00800080)
    for half in range_constexpr(2):
        v = [held[i, 4 * half + j] for j in range(4)]
        items = [ptx.permute(v[j // 2], v[2 + j // 2], 0x7632 if j % 2 else 0x5410) for j in range(4)]
        codes = _hand_out(items, lane)
        for c in range_constexpr(4):
            pairs = e4m3x4_to_bf16x2x2(codes[c])
            for j in range_constexpr(2):
                words[4 * c + half + 2 * j] = ptx.mul_bf16x2(ptx.mul_bf16x2(pairs[j], factor), rest)


@cute.jit
def _hand_out(items: list, lane: Int32):
    """Item q of each of the four lanes 4g..4g+3, in order of lanes, for lane 4g + q."""
    for bit in range_constexpr(2):
        own = lane >> bit & 1
        handed = [Uint32(0)] * 4
        for i in range_constexpr(2):
            low, high = const_expr((2 * i, 2 * i + 1) if bit == 0 else (i, i + 2))
            given = cute.arch.shuffle_sync_bfly(items[low] if own == 1 else items[high], offset=1 << bit)
            handed[low] = given if own == 1 else items[low]
            handed[high] = items[high] if own == 1 else given
        items = handed
    return items


@cute.jit
def e4m3x4_to_bf16x2x2(r: Uint32):
    """Four e4m3 -> two bf16x2 of the value times 2^-120, exact: the bits in place."""
    return _asm(
        "{ .reg .b32 t, u; "
        "prmt.b32 t, {$r0}, 0, 0x1404; shr.u32 u, t, 4; and.b32 u, u, 0x07F007F0; "
        "lop3.b32 {$w0}, t, 0x80008000, u, 0xEA; "
        "prmt.b32 t, {$r0}, 0, 0x3424; shr.u32 u, t, 4; and.b32 u, u, 0x07F007F0; "
        "lop3.b32 {$w1}, t, 0x80008000, u, 0xEA; }",
        write_only_types=[Uint32] * 2,
        read_only_args=[r],
    )


@cute.jit
def store(
    t: Constexpr[Tiles],
    s: Int32,
    sums: cute.Tensor,
    g_y: Int64,
    stride: Int32,
    row: Int32,
    rows: Int32,
    column: Int32,
    columns: Int32,
    size: Constexpr[int],
    warp: Int32,
    lane: Int32,
):
    """A warp's fragments of 16 columns of results, for rows of y from `row` on, as numbers of `size` bytes, 2
    for bf16 or 4 for f32: what exists, below `rows` and `columns`. Rows of y lie `stride` bytes apart.
    """
    pitch = const_expr(48 if size == 2 else 80)  # what a warp stores together meets in no bank
    pieces = const_expr(size)  # of 16 bytes of a row's columns
    s_rows = s + t.o_out + warp * (16 * t.pitch)
    for n in range_constexpr(cute.size(sums) // 8):  # of 16 rows
        if const_expr(size == 2):
            pairs = [ptx.f32x2_to_bf16x2(sums[8 * n + 2 * i], sums[8 * n + 2 * i + 1]) for i in range(4)]
            ptx.stmatrix_turned(s_rows + (lane // 16 * 8 + lane % 8) * pitch + lane // 8 % 2 * 16, *pairs)
        else:
            for i in range_constexpr(8):
                own_row = i // 4 * 8 + lane % 4 * 2 + i % 2
                s_own = s_rows + own_row * pitch + (lane // 4 + i // 2 % 2 * 8) * 4
                ptx.sts_f32(s_own, sums[8 * n + i])
        cute.arch.sync_warp()
        for i in range_constexpr(pieces // 2):
            own_row, piece = (i * 32 + lane) // pieces, lane % pieces
            to, own = row + 16 * n + own_row, column + piece * (16 // size)
            if to < rows and own < columns:
                v = ptx.lds128(s_rows + own_row * pitch + piece * 16)
                ptx.stg128(g_y + Int64(to) * stride + own * size, *v)
        cute.arch.sync_warp()
