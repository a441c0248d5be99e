"""Products of rows with weights that tensor cores do not multiply as they are packed, on wgmma (sm_90a).

Weights are the first operand, out of registers, which the warps that multiply widen them to as the GEMVs do:
FP4 to f16, FP8 to bf16. Rows of x are the other one, in shared memory, as many as there are, up to `t.rows`:
16, or 128. Their columns lie there in the order in which a lane finds those of weights: of 32, pairs
4q + 2h + t of q = 0..3 at 8h + 4t + q.

MXFP4's block scales are factors of f16 weights, relative to the largest of their row's 128 columns: exact
down to 2^-23 of it.
"""

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import (
    BFloat16,
    Constexpr,
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

from dsv4c.codegen.lib import gemm, ptx, swiglu, units
from dsv4c.codegen.lib.tiles import Widened

_asm = cute.arch.inline_ptx

NUMBERS = {True: Float16, False: BFloat16}  # what rows of x that have scales become, and others are


@cute.jit
def open_ring(t: Constexpr[Widened], s: Int32, thread: Int32):
    """The barriers of every stage: full, and free. All threads."""
    if thread == 0:
        for i in range_constexpr(t.stages):
            ptx.mbarrier_init(s + t.o_bars + 8 * i, 2 * t.copiers)
            ptx.mbarrier_init(s + t.o_bars + 8 * (t.stages + i), t.CONSUMERS // 32)
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()


# Copying ----------------------------------------------------------------------------------------------------


@cute.jit
def copy(
    t: Constexpr[Widened],
    s: Int32,
    at: Int32,
    g_w: tuple,
    first: Int32,
    last: Int32,
    g_x: Int64,
    g_fx: Int64,
    numbers: cute.Tensor,
    count: Int32,
    warp: Int32,
    lane: Int32,
):
    """A tile's weights and its `count` rows of x into the ring; `at` steps were copied before. Warp of
    `t.copiers`.

    Of each matrix, one or two, the tile has the 16-row tiles from `first` on, none after `last`. A lane has
    32 columns of rows `row_of`, which are `numbers` of x; of eight rows that are not there it copies none.
    """
    each = const_expr(8 // t.copiers)
    g_tiles = []
    for n in range_constexpr(each):
        unit = warp * each + n
        base, tile = g_w[0], first + unit
        if const_expr(t.paired):
            tile = first + unit % 4
            if unit >= 4:
                base = g_w[1]
        tile = cutlass.min(tile, last)
        g_tiles.append(base + Int64(tile // t.tiles * t.group_bytes + tile % t.tiles * (t.span * t.unit)))
    g_rows = cute.make_rmem_tensor((t.own_rows,), Int64)
    g_scales = cute.make_rmem_tensor((t.own_rows,), Int64)
    for i in range_constexpr(t.own_rows):
        g_rows[i] = g_x + (Int64(numbers[i]) * t.stride + lane // 8 * t.part)
        g_scales[i] = g_fx + Int64(numbers[i]) * t.blocks
    held = cute.make_rmem_tensor((t.together, t.own_rows, t.part // 4 + 1), Uint32)
    _fetch(t, held, g_rows, g_scales, Int32(0), count, warp)
    for step in cutlass.range(t.steps, unroll=1):
        stage = (at + step) % t.stages
        full = s + t.o_bars + 8 * stage
        ptx.mbarrier_wait(full + 8 * t.stages, ((at + step) // t.stages & 1) ^ 1)
        if lane == 0:
            ptx.mbarrier_expect(full, Int32(each * t.w_tile))
            unit = step * t.together
            behind = Int64(unit // t.span * (t.tiles * t.span * t.unit) + unit % t.span * t.unit)
            for n in range_constexpr(each):
                s_tile = s + t.o_w + stage * t.w_stage + (warp * each + n) * t.w_tile
                ptx.bulk_load(s_tile, g_tiles[n] + behind, Int32(t.w_tile), full)
        cute.arch.sync_warp()
        for j in range_constexpr(t.together):
            for i in range_constexpr(t.own_rows):
                row = row_of(t, i, warp, lane)
                if row - lane % 8 < count:
                    _lay(t, s, stage * t.together + j, row, held, j, i, lane)
        cute.arch.sync_warp()
        if lane == 0:
            ptx.mbarrier_arrive(full)
        _fetch(t, held, g_rows, g_scales, cutlass.min(step + 1, Int32(t.steps - 1)), count, warp)


@cute.jit
def row_of(t: Constexpr[Widened], i: Constexpr[int], warp: Int32, lane: Int32):
    """The tile's row that is number `i` of those a lane copies parts of."""
    return (warp + i * t.copiers) * 8 + lane % 8


@cute.jit
def _fetch(
    t: Constexpr[Widened],
    held: cute.Tensor,
    g_rows: cute.Tensor,
    g_scales: cute.Tensor,
    step: Int32,
    count: Int32,
    warp: Int32,
):
    """The lane's parts of a step's rows and the rows' scales, in flight to registers."""
    for j in range_constexpr(t.together):
        unit = step * t.together + j
        for i in range_constexpr(t.own_rows):
            if (warp + i * t.copiers) * 8 < count:
                for n in range_constexpr(t.part // 16):
                    w = ptx.ldg128(g_rows[i] + Int64(unit * (4 * t.part) + n * 16))
                    for m in range_constexpr(4):
                        held[j, i, 4 * n + m] = w[m]
                if const_expr(t.scaled):
                    held[j, i, t.part // 4] = ptx.ldg_u8(g_scales[i] + unit)


@cute.jit
def _lay(
    t: Constexpr[Widened],
    s: Int32,
    unit: Int32,
    row: Int32,
    held: cute.Tensor,
    j: Constexpr[int],
    i: Constexpr[int],
    lane: Int32,
):
    """32 columns of a row, pairs in order of lanes, and the row's scale."""
    chunk = lane // 8
    pairs = []
    if const_expr(t.scaled):
        for n in range_constexpr(8):
            pairs.extend(ptx.e4m3x4_to_f16x2x2(held[j, i, n]))
    else:
        for n in range_constexpr(16):
            pairs.append(held[j, i, n])
    s_row = s + (unit * 2 + chunk // 2) * (t.rows * 128) + row * 128
    for n in range_constexpr(4):
        ptx.sts128(s_row + ((chunk % 2 * 4 + n) ^ row % 8) * 16, *[pairs[4 * q + n] for q in range(4)])
    if const_expr(not t.scaled):
        return
    if lane < 8:
        f = ptx.ue8m0_to_f32(held[j, i, 8])
        ptx.sts_f32(s + t.o_factors + (unit * t.rows + row) * 4, f)


# Multiplying ------------------------------------------------------------------------------------------------


@cute.jit
def multiply(
    t: Constexpr[Widened], width: Constexpr[int], s: Int32, at: Int32, g_fw: Int64, warp: Int32, lane: Int32
):
    """A tile's sums short of `t.finish`: f32 fragments of the warp's 16 rows of w by `width` rows of x; `at`
    steps were multiplied before. `g_fw`: the FP8 block scales of the warp's rows.
    """
    number = NUMBERS[t.scaled]
    major = OperandMajorMode.K
    mma = sm90.make_trivial_tiled_mma(
        number,
        number,
        major,
        major,
        Float32,
        (1, 1, 1),
        (64, width),
        a_source=warpgroup.OperandSource.RMEM,
    )
    layout = sm90.make_smem_layout_b(LayoutEnum.ROW_MAJOR, (64, width, 64), number, 1)
    own = mma.get_slice(warp % 4 * 32 + lane)
    w = mma.make_fragment_A(mma.partition_shape_A((64, 128)))
    words = cute.recast_tensor(w, Uint32)
    products = cute.make_rmem_tensor(mma.partition_shape_C((64, width)), Float32)
    sums = cute.make_rmem_tensor((width // 2,), Float32)
    sums.fill(0.0)
    for step in cutlass.range(t.steps, unroll=1):
        stage = (at + step) % t.stages
        full = s + t.o_bars + 8 * stage
        ptx.mbarrier_wait(full, (at + step) // t.stages & 1)
        # Here and not where rows of x were written: there it would wait for all loads in flight.
        ptx.fence_async()
        s_units = s + t.o_w + stage * t.w_stage + warp * t.w_tile
        for i in cutlass.range(t.together, unroll=1):
            unit = stage * t.together + i
            fw = widen(t, words, s_units + i * t.unit, g_fw + step * t.together + i, lane)
            warpgroup.fence()
            mma.set(warpgroup.Field.ACCUMULATE, False)
            for half in range_constexpr(2):
                x = gemm.operand(number, s + (unit * 2 + half) * (t.rows * 128), layout)
                b = mma.make_fragment_B(own.partition_B(x))
                for c in range_constexpr(4):
                    cute.gemm(mma, products, w[None, None, 4 * half + c], b[None, None, c, 0], products)
                    mma.set(warpgroup.Field.ACCUMULATE, True)
            warpgroup.commit_group()
            warpgroup.wait_group(0)
            s_f = s + t.o_factors + unit * (t.rows * 4) + lane % 4 * 8
            for j in range_constexpr(width // 8):
                fx = (Float32(1.0), Float32(1.0))
                if const_expr(t.scaled):
                    pair = ptx.lds64(s_f + 32 * j)
                    fx = (pair[0].bitcast(Float32), pair[1].bitcast(Float32))
                for row in range_constexpr(2):
                    for k in range_constexpr(2):
                        n = const_expr(4 * j + 2 * row + k)
                        f = fx[k]
                        if const_expr(t.weight == "mxfp4"):
                            f = f * fw[row]
                        elif const_expr(t.weight == "fp8"):
                            f = fw[0]
                        sums[n] = sums[n] + products[n] * f
        ptx.fence_async()
        cute.arch.sync_warp()
        if lane == 0:
            ptx.mbarrier_arrive(full + 8 * t.stages)
    return sums


@cute.jit
def widen(t: Constexpr[Widened], words: cute.Tensor, s_unit: Int32, g_fw: Int64, lane: Int32):
    """The lane's weights of a unit as registers of eight instructions, and what sums of their two rows are to
    be multiplied by.
    """
    if const_expr(t.weight == "mxfp4"):
        return _widen_mxfp4(words, s_unit, lane)
    if const_expr(t.weight == "nvfp4"):
        _widen_nvfp4(words, s_unit, lane)
        return Float32(1.0), Float32(1.0)
    row, q = units.row_of(lane), lane % 4
    for c in range_constexpr(4):
        s_own = s_unit + (row * 128 + q % 2 * 8 + (q // 2 ^ row) * 16 ^ c * 32)
        low, high = ptx.lds64(s_own), ptx.lds64(s_own + 1024)
        for h in range_constexpr(2):
            u, v = e4m3x4_to_bf16x2x2(low[h]), e4m3x4_to_bf16x2x2(high[h])
            _put(words, 2 * c + h, (u[0], v[0], u[1], v[1]))
    f = ptx.ue8m0_to_f32(ptx.ldg_u8_constant(g_fw))
    return f, f


@cute.jit
def _put(words: cute.Tensor, block: Constexpr[int], registers: tuple):
    """Registers of instruction `block`."""
    for j in range_constexpr(4):
        words[4 * block + j] = registers[j]


@cute.jit
def _widen_mxfp4(words: cute.Tensor, s_unit: Int32, lane: Int32):
    """MXFP4 by its scales, relative to the largest of the row in these 128 columns, which is left out."""
    scales = ptx.lds64(s_unit + 1024 + lane // 4 * 8)
    # 16 bits for each of both rows
    blocks = [_halves(scales[c // 2], 0x4140 if c % 2 == 0 else 0x4342) for c in range(4)]
    top = _max16x2(_max16x2(blocks[0], blocks[1]), _max16x2(blocks[2], blocks[3]))
    # 2^14 that placed codes lack, the exponent's bias of 15: at least 0, where weights are 0 beside others
    lift = Uint32(0x011D011D) - top
    for share in range_constexpr(2):
        r = ptx.lds128(s_unit + 512 * share + lane * 16)
        for half in range_constexpr(2):
            lifted = _max16x2(blocks[2 * share + half] + lift, Uint32(0x01000100)) - Uint32(0x01000100)
            f = units.spread_f16x2(lifted << Uint32(10))
            for h in range_constexpr(2):
                a = units.e2m1x8_to_f16x2x4(r[2 * half + h])
                own = [ptx.mul_f16x2(a[k], f[k % 2]) for k in range(4)]
                _put(words, 4 * share + 2 * half + h, tuple(own))
    return ptx.ue8m0_to_f32(top & Uint32(0xFFFF)), ptx.ue8m0_to_f32(top >> Uint32(16))


@cute.jit
def _widen_nvfp4(words: cute.Tensor, s_unit: Int32, lane: Int32):
    """NVFP4 by its scales."""
    g, q = lane // 4, lane % 4
    scales = ptx.lds64(s_unit + 1024 + (g * 2 + q // 2) * 8)
    for share in range_constexpr(2):
        r = ptx.lds128(s_unit + 512 * share + lane * 16)
        own = ptx.e4m3x4_to_f16x2x2(scales[share])
        for half in range_constexpr(2):
            f = units.spread_f16x2(units.carried(own[half]))
            for h in range_constexpr(2):
                a = units.e2m1x8_to_f16x2x4(r[2 * half + h])
                _put(words, 4 * share + 2 * half + h, tuple(ptx.mul_f16x2(a[k], f[k % 2]) for k in range(4)))


@cute.jit
def _halves(r: Uint32, selector: Constexpr[int]):
    """Two bytes of a word as halves of 16 bits."""
    return _asm(f"prmt.b32 {{$w0}}, {{$r0}}, 0, {selector};", write_only_types=[Uint32], read_only_args=[r])


@cute.jit
def _max16x2(a: Uint32, b: Uint32):
    """The larger of each half."""
    return _asm(
        "{ .reg .b32 b; mov.b32 b, {$r1}; max.u16x2 {$w0}, {$r0}, b; }",  # takes no literal
        write_only_types=[Uint32],
        read_only_args=[a, b],
    )


@cute.jit
def e4m3x4_to_bf16x2x2(r: Uint32):
    """Four e4m3 -> two bf16x2, exact: the bits in place, times the 2^120 that they lack."""
    return _asm(
        "{ .reg .b32 t, u, m; mov.b32 m, 0x7B807B80; "
        "prmt.b32 t, {$r0}, 0, 0x1404; shr.u32 u, t, 4; and.b32 u, u, 0x07F007F0; "
        "lop3.b32 u, t, 0x80008000, u, 0xEA; mul.rn.bf16x2 {$w0}, u, m; "
        "prmt.b32 t, {$r0}, 0, 0x3424; shr.u32 u, t, 4; and.b32 u, u, 0x07F007F0; "
        "lop3.b32 u, t, 0x80008000, u, 0xEA; mul.rn.bf16x2 {$w1}, u, m; }",
        write_only_types=[Uint32] * 2,
        read_only_args=[r],
    )


# Results ----------------------------------------------------------------------------------------------------


@cute.jit
def store(
    t: Constexpr[Widened],
    width: Constexpr[int],
    s: Int32,
    sums: cute.Tensor,
    g_y: Int64,
    numbers: Int64,
    row: Int32,
    count: Int32,
    columns: Int32,
    column: Int32,
    factors: tuple,
    g_weights: Int64,
    limit: Constexpr[float],
    size: Constexpr[int],
    warp: Int32,
    lane: Int32,
):
    """A tile's sums times their matrix's factor as results of `size` bytes, 2 for bf16 or 4 for f32, from
    `column` on, of which those below `columns` exist: `count` rows, of experts those that `numbers` lists, or
    those from `row` on. Of paired matrices SwiGLU, of experts under their row's weight. All that multiply.
    """
    thread = warp * 32 + lane
    pitch = const_expr(4 * (128 + 4))  # bytes between rows of sums: padded off each other's banks
    s_own = s + t.o_sums + lane % 4 * 2 * pitch + (warp * 16 + units.row_of(lane)) * 4
    factor = factors[0]
    if const_expr(t.paired):
        factor = factors[1] if warp >= 4 else factors[0]
    for part in range_constexpr(width // 16):
        ptx.sync_threads(t.CONSUMERS)  # all have read what was there
        for j in range_constexpr(2):
            for half in range_constexpr(2):
                for i in range_constexpr(2):
                    value = sums[8 * part + 4 * j + 2 * half + i] * (factor * Float32(t.finish))
                    ptx.sts_f32(s_own + (8 * j + i) * pitch + 32 * half, value)
        ptx.sync_threads(t.CONSUMERS)
        n = part * 16 + thread // 16
        first = column + thread % 16 * (t.made // 16)
        if n < count and first < columns:
            to = row + n
            if const_expr(t.experts > 0):
                to = Int32(ptx.ldg32(numbers + n * 4))
            s_row = s + t.o_sums + thread // 16 * pitch
            g = g_y + (Int64(to) * columns + first) * size
            if const_expr(t.paired):
                weight = Float32(1.0)
                if const_expr(t.experts > 0):
                    weight = ptx.ldg_f32(g_weights + Int64(to) * 4)
                gate, up = ptx.lds128(s_row + thread % 16 * 16), ptx.lds128(s_row + 256 + thread % 16 * 16)
                made = [
                    swiglu.swiglu(gate[i].bitcast(Float32), up[i].bitcast(Float32), limit, weight)
                    for i in range(4)
                ]
                _store(g, made, size)
            else:
                r = [*ptx.lds128(s_row + thread % 16 * 32), *ptx.lds128(s_row + thread % 16 * 32 + 16)]
                _store(g, [word.bitcast(Float32) for word in r], size)


@cute.jit
def _store(g: Int64, values: list, size: Constexpr[int]):
    """Four or eight results."""
    if const_expr(size == 4):
        for i in range_constexpr(len(values) // 4):
            ptx.stg128(g + 16 * i, *[v.bitcast(Uint32) for v in values[4 * i : 4 * i + 4]])
    else:
        words = [ptx.f32x2_to_bf16x2(values[i], values[i + 1]) for i in range(0, len(values), 2)]
        if const_expr(len(words) == 2):
            ptx.stg64(g, *words)
        else:
            ptx.stg128(g, *words)
