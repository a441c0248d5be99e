"""FP8 weights by bf16 rows (sm_90a): widened by the warps that multiply, the first operand out of registers.

What shared memory moves limits `gemm`, and weights that are widened there would be written and read. So a
warp loads its 16-row units itself, and tensor cores take the tile's rows of x as the second operand: sums of
64 columns of results, 16 of each warp, by all rows of the tile. A lane has rows g and g + 8 of a unit, g =
lane / 4, a 16-byte piece of each at a time. Of a k16 step tensor cores want columns 2q, 2q + 1, 2q + 8 and
2q + 9 from lane 4g + q: four lanes have such a piece each, and hand each other theirs.
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
    x. The tile has the 16-row tiles of w from `first` on, none after `last`; `g_fw` is where its block scales
    start; `at` steps were multiplied before.
    """
    k_major = OperandMajorMode.K
    registers = warpgroup.OperandSource.RMEM
    mma = sm90.make_trivial_tiled_mma(
        BFloat16, BFloat16, k_major, k_major, Float32, (1, 1, 1), (64, t.height), registers
    )
    shape = const_expr((64, t.height, t.each))
    s_x = gemm.operand(
        BFloat16, s, sm90.make_smem_layout_b(LayoutEnum.ROW_MAJOR, shape, BFloat16, t.stages)
    )
    x = mma.make_fragment_B(mma.get_slice(thread % 128).partition_B(s_x))
    w = [mma.make_fragment_A(mma.partition_shape_A((64, t.each))) for _ in range(2)]
    words = [cute.recast_tensor(w[i], Uint32) for i in range(2)]
    sums = cute.make_rmem_tensor(mma.partition_shape_C((64, t.height)), Float32)
    sums.fill(0.0)
    lane = thread % 32
    tile = cutlass.min(first + group * 4 + thread % 128 // 32, last)
    g_rows = g_w + Int64(tile // t.tiles * t.group_bytes + tile % t.tiles * (t.span * t.unit) + lane // 4 * 128)
    held = cute.make_rmem_tensor((2, 8), Uint32)
    scales = cute.make_rmem_tensor((2,), Int32)
    for i in range_constexpr(2):
        _fetch(t, held, scales, i, g_rows, g_fw, begin + i, lane)
    _widen(words[0], held, scales, 0, lane)
    mma.set(warpgroup.Field.ACCUMULATE, True)
    for pair in cutlass.range(t.steps // 2, unroll=1):
        for i in range_constexpr(2):
            step = 2 * pair + i
            stage = (at + step) % t.stages
            full = s + t.o_bars + 8 * stage
            ptx.mbarrier_wait(full, (at + step) // t.stages & 1)
            ptx.fence_async()
            warpgroup.fence()
            for c in range_constexpr(4):
                cute.gemm(mma, sums, w[i][None, None, c], x[None, None, c, stage], sums)
            warpgroup.commit_group()
            _fetch(t, held, scales, i, g_rows, g_fw, begin + cutlass.min(step + 2, Int32(t.steps - 1)), lane)
            _widen(words[1 - i], held, scales, 1 - i, lane)
            warpgroup.wait_group(0)
            gemm.release(t, full, thread)
    return sums


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
    number = const_expr(cute.size(sums) // 4)  # of 8 rows
    if const_expr(size == 4):
        for j in range_constexpr(number):
            for i in range_constexpr(4):
                to, own = row + 8 * j + lane % 4 * 2 + i % 2, column + lane // 4 + i // 2 * 8
                if to < rows and own < columns:
                    ptx.stg_f32(g_y + Int64(to) * stride + own * 4, sums[4 * j + i])
    else:
        pitch = const_expr(48)  # eight rows of 16 bytes meet in no bank
        s_own = s + t.o_out + warp * (16 * t.pitch)
        s_given = s_own + (lane // 16 * 8 + lane % 8) * pitch + lane // 8 % 2 * 16
        own = column + lane % 2 * 8
        for n in range_constexpr(number // 2):
            v = [ptx.f32x2_to_bf16x2(sums[8 * n + 2 * i], sums[8 * n + 2 * i + 1]) for i in range(4)]
            ptx.stmatrix_turned(s_given, *v)
            cute.arch.sync_warp()
            to = row + 16 * n + lane // 2
            if to < rows and own < columns:
                ptx.stg128(g_y + Int64(to) * stride + own * 2, *ptx.lds128(s_own + lane // 2 * pitch + lane % 2 * 16))
            cute.arch.sync_warp()
