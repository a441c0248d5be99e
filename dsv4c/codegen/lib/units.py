"""Weight units: 16 rows x 128 k (64 in bf16) of one matrix, in the order the lanes read them, times up to 8
activation rows.

`accumulate` adds a unit's products, block scales included, to a warp's fragment: lane (g, q) = (lane/4,
lane%4) holds rows r and r+8, r = `row_of`, of activation rows 2q and 2q+1, in mma.sync order.
`numerics/packing.py` writes the units. What a format leaves to the end, a power of two, is `finish`.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Uint32, const_expr, range_constexpr

from dsv4c.codegen.lib import ptx
from dsv4c.codegen.lib.shapes import COLUMNS, Product


@cute.jit
def e2m1x8_to_f16x2x4(r: Uint32):
    """Eight e2m1 codes -> four f16x2, mma registers a0..a3, exact.

    Where the target converts, byte n is register n ("pairs" packing); elsewhere bits are pre-placed and the
    result is the value times 2^-14.
    """
    if const_expr(ptx.converts_e2m1()):
        return ptx.e2m1x8_to_f16x2x4(r)
    return place_e2m1x8(r)


@cute.jit
def place_e2m1x8(r: Uint32):
    """Eight pre-placed e2m1 codes -> four f16x2 of the value times 2^-14."""
    return cute.arch.inline_ptx(
        "{ .reg .b32 a, b; and.b32 {$w0}, {$r0}, 0x8E008E00; "
        "shl.b32 a, {$r0}, 8; and.b32 {$w1}, a, 0x8E008E00; "
        "shl.b32 a, {$r0}, 5; shl.b32 b, {$r0}, 7; and.b32 a, a, 0x0E000E00; "
        "lop3.b32 {$w2}, b, 0x80008000, a, 0xEA; "
        "shr.u32 a, {$r0}, 3; shl.b32 b, {$r0}, 15; and.b32 a, a, 0x0E000E00; "
        "lop3.b32 {$w3}, b, 0x80008000, a, 0xEA; }",
        write_only_types=[Uint32] * 4,
        read_only_args=[r],
    )


@cute.jit
def spread_f16x2(r: Uint32):
    """f16x2 (l, h) -> f16x2 (l, l) and f16x2 (h, h)."""
    return cute.arch.inline_ptx(
        "prmt.b32 {$w0}, {$r0}, 0, 0x1010; prmt.b32 {$w1}, {$r0}, 0, 0x3232;",
        write_only_types=[Uint32] * 2,
        read_only_args=[r],
    )


@cute.jit
def carried(scales: Uint32):
    """f16x2 block scales of NVFP4 with 2^7 of the 2^14 that placed bits lack; converted values lack none."""
    if const_expr(ptx.converts_e2m1()):
        return scales
    return ptx.mul_f16x2(scales, Uint32(0x58005800))


def finish(p: Product) -> float:
    """Power of two that the products accumulated by `accumulate` still lack."""
    return 1.0 if ptx.converts_e2m1() else p.finish


@cute.jit
def scale_byte(r: Uint32, byte: Constexpr[int]):
    """2^(b - 127) of byte `byte` of a word of ue8m0 scales (0 for byte 0)."""
    shifted = (r >> Uint32(1)) if const_expr(byte == 3) else (r << Uint32(23 - 8 * byte))
    return (shifted & Uint32(0x7F800000)).bitcast(Float32)


@cute.jit
def x_words(p: Constexpr[Product], s_x: Int32, unit: Int32, chunk: Constexpr[int], lane: Int32):
    """The lane's B registers of one 32-k chunk: k 8q..8q+7 of activation row g, as four f16x2 or bf16x2.

    Lanes of rows that do not exist repeat the last one: mma columns are independent, and theirs are never
    read. (Predicating them off instead keeps 128 registers alive: a load that may not happen also reads its
    destination.)
    """
    row = Int32(0)
    if const_expr(p.rows > 1):
        row = cutlass.min(lane // 4, Int32(p.rows - 1))
    column = unit * COLUMNS[p.weight] + chunk * 32 + lane % 4 * 8
    if const_expr(p.x == "e4m3"):
        w = ptx.lds64(s_x + row * p.x_stride + column)
        lo = ptx.e4m3x4_to_f16x2x2(w[0])
        hi = ptx.e4m3x4_to_f16x2x2(w[1])
        return lo[0], lo[1], hi[0], hi[1]
    w = ptx.lds128(s_x + row * p.x_stride + column * 2)
    return w[0], w[1], w[2], w[3]


@cute.jit
def x_pieces(p: Constexpr[Product], s_x: Int32, unit: Int32, chunk: Constexpr[int], lane: Int32):
    """The lane's B registers of one 64-k chunk: k 16q..16q+15 of activation row g, as eight f16x2; of rows
    that do not exist as `x_words` says.
    """
    row = Int32(0)
    if const_expr(p.rows > 1):
        row = cutlass.min(lane // 4, Int32(p.rows - 1))
    column = unit * COLUMNS[p.weight] + chunk * 64 + lane % 4 * 16
    if const_expr(p.x == "e4m3"):
        w = ptx.lds128(s_x + row * p.x_stride + column)
        return [half for i in range(4) for half in ptx.e4m3x4_to_f16x2x2(w[i])]
    s_own = s_x + row * p.x_stride + column * 2
    return [*ptx.lds128(s_own), *ptx.lds128(s_own + 16)]


@cute.jit
def row_of(lane: Int32):
    """lane / 4 with its bits reversed: the row of a unit, of the first eight, that a lane works on."""
    g = lane // 4
    return (g & 1) * 4 + (g & 2) + g // 4


@cute.jit
def accumulate(
    p: Constexpr[Product],
    rC: cute.Tensor,
    s_unit: Int32,
    s_x: Int32,
    s_fx: Int32,
    unit: Int32,
    weight_scale: Float32,
    lane: Int32,
):
    """rC[4] += scales * (unit x activations) for the unit at `s_unit`, number `unit` along k.

    `weight_scale` is the FP8 block scale; FP4 units carry theirs, BF16 has none.
    """
    q = lane % 4
    rD = cute.make_rmem_tensor((4,), Float32)
    rD.fill(0.0)
    if const_expr(p.weight == "fp8"):
        dot_fp8(p, rD, s_unit, s_x, unit, lane)
    elif const_expr(p.weight == "bf16"):
        dot_bf16(p, rD, s_unit, s_x, unit, lane)
    elif const_expr(p.weight == "mxfp4"):
        dot_mxfp4(p, rD, s_unit, s_x, unit, lane)
    else:
        dot_nvfp4(p, rD, s_unit, s_x, unit, lane)
    f0 = weight_scale
    f1 = weight_scale
    if const_expr(p.x != "bf16"):
        f0 = f0 * x_scale(p, s_fx, 2 * q, unit)
        f1 = f0
        if const_expr(p.rows > 1):
            f1 = weight_scale * x_scale(p, s_fx, 2 * q + 1, unit)
    rC[0] = rC[0] + rD[0] * f0
    rC[1] = rC[1] + rD[1] * f1
    rC[2] = rC[2] + rD[2] * f0
    rC[3] = rC[3] + rD[3] * f1


@cute.jit
def x_scale(p: Constexpr[Product], s_fx: Int32, row: Int32, unit: Int32):
    """The scale of activation row `row`, clamped to the last one, in unit `unit`."""
    r = cutlass.min(row, Int32(p.rows - 1)) if const_expr(p.rows > 1) else Int32(0)
    return ptx.lds_f32(s_fx + (r * p.units + unit) * 4)


@cute.jit
def dot_fp8(p: Constexpr[Product], rD: cute.Tensor, s_unit: Int32, s_x: Int32, unit: Int32, lane: Int32):
    """rD += e4m3 unit x e4m3 or f16 activations, products exact."""
    row, q = row_of(lane), lane % 4
    s_row = s_unit + row * 128
    for c in range_constexpr(2):
        s_own = s_row + ((4 * c + q) ^ row) * 16
        low, high = ptx.lds128(s_own), ptx.lds128(s_own + 1024)
        b = x_pieces(p, s_x, unit, c, lane)
        for h in range_constexpr(4):
            u = ptx.e4m3x4_to_f16x2x2(low[h])
            v = ptx.e4m3x4_to_f16x2x2(high[h])
            ptx.mma_f16(rD, u[0], v[0], u[1], v[1], b[2 * h], b[2 * h + 1])


@cute.jit
def dot_bf16(p: Constexpr[Product], rD: cute.Tensor, s_unit: Int32, s_x: Int32, unit: Int32, lane: Int32):
    """rD += bf16 unit x bf16 activations."""
    row, q = row_of(lane), lane % 4
    s_row = s_unit + row * 128
    for c in range_constexpr(2):
        b = x_words(p, s_x, unit, c, lane)
        s_own = s_row + ((4 * c + q) ^ row) * 16
        low, high = ptx.lds128(s_own), ptx.lds128(s_own + 1024)
        for h in range_constexpr(2):
            ptx.mma_bf16(rD, low[2 * h], high[2 * h], low[2 * h + 1], high[2 * h + 1], b[2 * h], b[2 * h + 1])


@cute.jit
def dot_mxfp4(p: Constexpr[Product], rD: cute.Tensor, s_unit: Int32, s_x: Int32, unit: Int32, lane: Int32):
    """rD += scales per 32 k * (e2m1 unit x e4m3 activations), short of `finish`."""
    s = ptx.lds64(s_unit + 1024 + (lane // 4) * 8)
    for c64 in range_constexpr(2):
        a = ptx.lds128(s_unit + 512 * c64 + lane * 16)
        for half in range_constexpr(2):
            b = x_words(p, s_x, unit, 2 * c64 + half, lane)
            rE = cute.make_rmem_tensor((4,), Float32)
            rE.fill(0.0)
            for h in range_constexpr(2):
                w = e2m1x8_to_f16x2x4(a[2 * half + h])
                ptx.mma_f16(rE, w[0], w[1], w[2], w[3], b[2 * h], b[2 * h + 1])
            lo = scale_byte(s[c64], 2 * half)
            hi = scale_byte(s[c64], 2 * half + 1)
            rD[0] = rD[0] + rE[0] * lo
            rD[2] = rD[2] + rE[2] * hi
            if const_expr(p.rows > 1):
                rD[1] = rD[1] + rE[1] * lo
                rD[3] = rD[3] + rE[3] * hi


@cute.jit
def dot_nvfp4(p: Constexpr[Product], rD: cute.Tensor, s_unit: Int32, s_x: Int32, unit: Int32, lane: Int32):
    """rD += (e2m1 unit times its e4m3 scales per 16 k, exact in f16) x activations, short of `finish`."""
    g = lane // 4
    q = lane % 4
    s = ptx.lds64(s_unit + 1024 + (g * 2 + q // 2) * 8)
    for c64 in range_constexpr(2):
        a = ptx.lds128(s_unit + 512 * c64 + lane * 16)
        scales = ptx.e4m3x4_to_f16x2x2(s[c64])
        for half in range_constexpr(2):
            b = x_words(p, s_x, unit, 2 * c64 + half, lane)
            f = spread_f16x2(carried(scales[half]))
            for h in range_constexpr(2):
                w = e2m1x8_to_f16x2x4(a[2 * half + h])
                ptx.mma_f16(
                    rD,
                    ptx.mul_f16x2(w[0], f[0]),
                    ptx.mul_f16x2(w[1], f[1]),
                    ptx.mul_f16x2(w[2], f[0]),
                    ptx.mul_f16x2(w[3], f[1]),
                    b[2 * h],
                    b[2 * h + 1],
                )
