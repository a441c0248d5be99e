"""Index scores: rotated, Hadamard-transformed queries against the index keys, weighted ReLU sum over heads.

Keys are the 16 rows of an MMA, 8 heads its columns. Lane (g, q) holds dimensions 32q..32q+31 of keys g and g + 8: one scale
block. In every 8 dimensions the k order is that of the FP4 expansion: pairs (3,7), (2,6) in one MMA, (1,5), (0,4) in the
next; queries are stored in that order. Keys expand times 2^-64 and queries carry 2^64, which keeps bf16 in range.
"""

import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, const_expr, range_constexpr

from dsv4c.codegen.lib import hadamard, ptx, rope
from dsv4c.codegen.lib.geometry import Index

_asm = cute.arch.inline_ptx
_CARRY = 2.0**64


@cute.jit
def _relu_bf16x2(lo: Float32, hi: Float32):
    """max(0, bf16(x)) of two floats."""
    return _asm("cvt.rn.relu.bf16x2.f32 {$w0}, {$r1}, {$r0};", write_only_types=[Uint32], read_only_args=[lo, hi])


@cute.jit
def _expand(codes: Uint32, f: Uint32, pair: Constexpr[int]):
    """Nibbles 3 - pair and 7 - pair of a word of e2m1 codes, times f (bf16x2, including 2^126), as bf16x2."""
    return _asm(
        "{ .reg .b32 t, m; shl.b32 t, {$r0}, {$r2}; shr.u32 m, t, 6; and.b32 m, m, 0x01C001C0; "
        "lop3.b32 m, t, 0x80008000, m, 0xEA; mul.rn.bf16x2 {$w0}, m, {$r1}; }",
        write_only_types=[Uint32],
        read_only_args=[codes, f, Uint32(4 * pair)],
    )


@cute.jit
def _pick(a: Uint32, b: Uint32, selector: Constexpr[int]):
    return _asm(
        "prmt.b32 {$w0}, {$r0}, {$r1}, {$r2};", write_only_types=[Uint32], read_only_args=[a, b, Uint32(selector)]
    )


@cute.jit
def _load_u8(g: Int64):
    return _asm("ld.global.u8 {$w0}, [{$r0}];", write_only_types=[Uint32], read_only_args=[g])


# Queries --------------------------------------------------------------------------------------------------------------


@cute.jit
def load_queries(
    x: Constexpr[Index],
    sm: Int32,
    g_q: Int64,
    frequency: cute.Tensor,
    sequence: Int32,
    position: Int32,
    warp: Int32,
    lane: Int32,
):
    """Rotate, transform and quantize the warp's eighth of q bf16[B, heads, 128]; fragments to shared memory.

    Lane l works on dimensions 4l..4l+3; `frequency` holds its two (lanes 16..31).
    """
    c = cute.make_rmem_tensor((2,), Float32)
    s = cute.make_rmem_tensor((2,), Float32)
    for i in range_constexpr(2):
        c[i], s[i] = rope.cos_sin(position.to(Float32) * frequency[i])
    per_warp = x.heads // x.warps
    words = [
        ptx.ldg64(g_q + ((Int64(sequence) * x.heads + warp * per_warp + n) * 128 + lane * 4) * 2) for n in range(per_warp)
    ]
    for n in range_constexpr(per_warp):
        r = cute.make_rmem_tensor((4,), Float32)
        for i in range_constexpr(2):
            r[2 * i], r[2 * i + 1] = ptx.bf16x2_to_f32x2(words[n][i])
            if lane >= 16:
                even = ptx.round_bf16(r[2 * i] * c[i] - r[2 * i + 1] * s[i])
                r[2 * i + 1] = ptx.round_bf16(r[2 * i] * s[i] + r[2 * i + 1] * c[i])
                r[2 * i] = even
        hadamard.hadamard128(r, lane)
        if const_expr(x.format == "mxfp4"):
            byte = hadamard.block32_exponent(r)
            for i in range_constexpr(4):
                r[i] = hadamard.e2m1_value(r[i], byte) * Float32(_CARRY)
        _store_query(sm, r, warp * per_warp + n, lane)


@cute.jit
def _store_query(sm: Int32, r: cute.Tensor, head: Int32, lane: Int32):
    """Words (3,7), (2,6), (1,5), (0,4) of each 8 dimensions: even lanes hold 0..3, odd ones 4..7."""
    words = []
    for i in range_constexpr(4):
        other = cute.arch.shuffle_sync_bfly(r[3 - i], offset=1)
        words.append(ptx.f32x2_to_bf16x2(r[3 - i], other))
    if lane % 2 == 0:
        to = head % 8 * 4 + lane // 8
        ptx.sts128(sm + ((head // 8 * 4 + lane % 8 // 2) * 32 + to) * 16, *words)


# Keys -----------------------------------------------------------------------------------------------------------------


@cute.jit
def load_keys(x: Constexpr[Index], keys: cute.Tensor, g_data: Int64, g_scale: Int64, sequence: Int32, first: Int32, lane: Int32):
    """Keys first + 16m + 8i + g into registers [m][i][words], for FP4 followed by the block scale; zeros past the end."""
    words = 4 if const_expr(x.format == "mxfp4") else 16
    for m in range_constexpr(x.tiles):
        for i in range_constexpr(2):
            key = first + 16 * m + 8 * i + lane // 4
            at = Int64(sequence) * x.capacity + key
            if key < x.capacity:
                for n in range_constexpr(words // 4):
                    r = ptx.ldg128(g_data + (at * 4 + lane % 4) * (words * 4) + n * 16)
                    for j in range_constexpr(4):
                        keys[m, i, 4 * n + j] = r[j]
                if const_expr(x.format == "mxfp4"):
                    keys[m, i, 4] = _load_u8(g_scale + at * 4 + lane % 4)


@cute.jit
def fragments(x: Constexpr[Index], keys: cute.Tensor):
    """A fragments [m][8][4] of the keys in registers."""
    a = cute.make_rmem_tensor((x.tiles, 8, 4), Uint32)
    for m in range_constexpr(x.tiles):
        for i in range_constexpr(2):
            if const_expr(x.format == "mxfp4"):
                f = (keys[m, i, 4] + Uint32(62)) << Uint32(7)  # 2^(byte - 127 + 126 - 64)
                f = f | (f << Uint32(16))
                for w in range_constexpr(4):
                    for pair in range_constexpr(4):
                        a[m, 2 * w + pair // 2, i + 2 * (pair % 2)] = _expand(keys[m, i, w], f, pair)
            else:
                for w in range_constexpr(4):
                    for pair in range_constexpr(4):
                        lo, hi = keys[m, i, 4 * w + (3 - pair) // 2], keys[m, i, 4 * w + 2 + (3 - pair) // 2]
                        selector = 0x7632 if pair % 2 == 0 else 0x5410
                        a[m, 2 * w + pair // 2, i + 2 * (pair % 2)] = _pick(lo, hi, selector)
    return a


# Scores ---------------------------------------------------------------------------------------------------------------


@cute.jit
def load_weights(x: Constexpr[Index], g_weights: Int64, sequence: Int32, lane: Int32):
    """The lane's head weights, bf16x2 [heads / 8]: heads 8n + 2q and the next."""
    r = cute.make_rmem_tensor((x.heads // 8,), Uint32)
    for n in range_constexpr(x.heads // 8):
        r[n] = ptx.ldg32(g_weights + (sequence * x.heads + 8 * n + lane % 4 * 2) * 2)
    return r


@cute.jit
def score(x: Constexpr[Index], sm: Int32, a: cute.Tensor, weights: cute.Tensor, lane: Int32):
    """Scores [m][i] of keys 16m + 8i + g, in every lane of the quad: each dot, product and the sum rounded to bf16."""
    total = cute.make_rmem_tensor((x.tiles, 2), Float32)
    total.fill(0.0)
    for n in range_constexpr(x.heads // 8):
        r = cute.make_rmem_tensor((x.tiles, 4), Float32)
        r.fill(0.0)
        for w in range_constexpr(4):
            b = ptx.lds128(sm + ((n * 4 + w) * 32 + lane) * 16)
            for half in range_constexpr(2):
                for m in range_constexpr(x.tiles):
                    f = a[m, 2 * w + half, None]
                    ptx.mma_bf16(r[m, None], f[0], f[1], f[2], f[3], b[2 * half], b[2 * half + 1])
        for m in range_constexpr(x.tiles):
            for i in range_constexpr(2):
                dots = _relu_bf16x2(r[m, 2 * i], r[m, 2 * i + 1])
                lo, hi = ptx.bf16x2_to_f32x2(ptx.mul_bf16x2(dots, weights[n]))
                total[m, i] = total[m, i] + (lo + hi)
    for m in range_constexpr(x.tiles):
        for i in range_constexpr(2):
            total[m, i] = ptx.round_bf16(ptx.lanes_sum(total[m, i], 4))
    return total


@cute.jit
def store_scores(x: Constexpr[Index], total: cute.Tensor, g_scores: Int64, sequence: Int32, first: Int32, visible: Int32, lane: Int32):
    """Scores of visible keys to f32[B, capacity]: lane q of a quad stores that of half q."""
    for m in range_constexpr(x.tiles):
        key = first + 16 * m + lane % 4 * 8 + lane // 4
        value = total[m, 0]
        if lane % 4 == 1:
            value = total[m, 1]
        if lane % 4 < 2 and key < visible:
            ptx.stg_f32(g_scores + (Int64(sequence) * x.capacity + key) * 4, value)
