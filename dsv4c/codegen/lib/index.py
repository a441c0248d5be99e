"""Index scores: rotated, Hadamard-transformed queries against the index keys, weighted ReLU sum over heads.

Keys are the 16 rows of an MMA, 8 heads its columns. Lane (g, q) holds dimensions 32q..32q+31 of keys g and g
+ 8: one scale block. In every 8 dimensions the k order is that of the FP4 expansion: pairs (3,7), (2,6) in
one MMA, (1,5), (0,4) in the next; queries are stored in that order. Keys expand times 2^-64 and queries carry
2^64, which keeps bf16 in range.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, const_expr, range_constexpr

from dsv4c.codegen.lib import hadamard, ptx, rope
from dsv4c.codegen.lib.geometry import Index

_asm = cute.arch.inline_ptx
_CARRY = 2.0**64


class Operands(NamedTuple):
    """q bf16[N, heads, 128] before RoPE, keys [S, capacity, 128], weights bf16[N, heads], frequencies
    f32[32], positions, slots i32[N] -> scores bf16[N, capacity]. Plain keys have no scale.
    """

    q: cute.Pointer
    keys: cute.Pointer
    keys_scale: cute.Pointer | None
    weights: cute.Pointer
    frequencies: cute.Pointer
    positions: cute.Pointer
    slots: cute.Pointer
    scores: cute.Pointer


class Place(NamedTuple):
    """Where a thread works: on keys `first` and on, every `stride`, of a token; the frequency of its pair."""

    token: Int32
    warp: Int32
    lane: Int32
    first: Int32
    stride: Int32
    frequency: Float32


@cute.jit
def enter(x: Constexpr[Index], m: Operands) -> Place:
    """Of a grid of (parts, tokens). Frequencies are constants."""
    part, token, _ = cute.arch.block_idx()
    parts, _, _ = cute.arch.grid_dim()
    warp, lane = cute.arch.make_warp_uniform(cute.arch.warp_idx()), cute.arch.lane_idx()
    frequency = ptx.ldg_f32_constant(m.frequencies.toint() + lane * 4)
    return Place(token, warp, lane, part * x.keys, parts * x.keys, frequency)


@cute.jit
def score_keys(x: Constexpr[Index], m: Operands, s: Int32, at: Place) -> None:
    """The scores of a token's visible keys, if there are more than k."""
    token, warp, lane, first, stride, frequency = at
    g_data = m.keys.toint()
    g_scale = Int64(0) if const_expr(m.keys_scale is None) else m.keys_scale.toint()
    position = ptx.ldg32(m.positions.toint() + token * 4).bitcast(Int32)
    slot = ptx.ldg32(m.slots.toint() + token * 4).bitcast(Int32)
    visible = cutlass.min((position + 1) // x.ratio, Int32(x.capacity))
    if visible > x.k and first < visible:
        keys = cute.make_rmem_tensor((x.tiles, 2, x.words), Uint32)
        keys.fill(0)
        own = warp * (x.tiles * 16)
        load_keys(x, keys, g_data, g_scale, slot, first + own, lane)
        weights = load_weights(x, m.weights.toint(), x.factor, token, lane)
        s_turns = s + x.o_turns + warp * 256
        prepare_turns(s_turns, frequency, position, lane)
        prepare_queries(x, s, s_turns, m.q.toint(), token, warp, lane)
        cute.arch.sync_threads()
        for key in cutlass.range(first, visible, stride, unroll=1):
            a = fragments(x, keys)
            load_keys(x, keys, g_data, g_scale, slot, key + stride + own, lane)
            total = score(x, s, a, weights, lane)
            store_scores(x, total, m.scores.toint(), token, key + own, visible, lane)


@cute.jit
def _relu_bf16x2(lo: Float32, hi: Float32):
    """max(0, bf16(x)) of two floats."""
    return _asm(
        "cvt.rn.relu.bf16x2.f32 {$w0}, {$r1}, {$r0};", write_only_types=[Uint32], read_only_args=[lo, hi]
    )


@cute.jit
def _expand(codes: Uint32, f: Uint32, pair: Constexpr[int]):
    """Nibbles 3 - pair and 7 - pair of a word of e2m1 codes, times f (bf16x2, including 2^126), as bf16x2.

    On every target: no instruction makes bf16 of e2m1, and f16 does not reach the scales.
    """
    return _asm(
        "{ .reg .b32 t, m; shl.b32 t, {$r0}, {$r2}; shr.u32 m, t, 6; and.b32 m, m, 0x01C001C0; "
        "lop3.b32 m, t, 0x80008000, m, 0xEA; mul.rn.bf16x2 {$w0}, m, {$r1}; }",
        write_only_types=[Uint32],
        read_only_args=[codes, f, Uint32(4 * pair)],
    )


# Queries ----------------------------------------------------------------------------------------------------


@cute.jit
def prepare_turns(sm: Int32, frequency: Float32, position: Int32, lane: Int32):
    """Cosine and sine of the 32 pairs to the warp's own shared memory [32][2]."""
    c, s = rope.cos_sin(position.to(Float32) * frequency)
    ptx.sts64(sm + lane * 8, c.bitcast(Uint32), s.bitcast(Uint32))
    cute.arch.sync_warp()


@cute.jit
def prepare_queries(
    x: Constexpr[Index], sm: Int32, s_turns: Int32, g_q: Int64, token: Int32, warp: Int32, lane: Int32
):
    """Heads 8 * warp.. of q bf16[N, heads, 128], as keys meet them, into MMA fragments."""
    if warp < x.heads // 8:
        words = query_words(x, s_turns, g_q, token, warp, lane)
        for w in range_constexpr(4):
            ptx.sts128(sm + ((warp * 4 + w) * 32 + lane) * 16, *words[4 * w : 4 * w + 4])


@cute.jit
def query_words(x: Constexpr[Index], s_turns: Int32, g_q: Int64, token: Int32, eight: Int32, lane: Int32):
    """Heads 8 * eight.. of q bf16[N, heads, 128], rotated, transformed and quantized, as words of two bf16.

    Lane (g, q) works on dimensions 32q..32q+31 of head g: one scale block, and its own part of the fragments.
    """
    r = cute.make_rmem_tensor((32,), Float32)
    g = g_q + ((Int64(token) * x.heads + eight * 8 + lane // 4) * 128 + lane % 4 * 32) * 2
    words = [ptx.ldg128(g + 16 * n) for n in range(4)]
    for n in range_constexpr(16):
        r[2 * n], r[2 * n + 1] = ptx.bf16x2_to_f32x2(words[n // 4][n % 4])
    if lane % 4 >= 2:
        for n in range_constexpr(8):
            turns = ptx.lds128(s_turns + (lane % 4 - 2) * 128 + n * 16)
            for i in range_constexpr(2):
                c, s = turns[2 * i].bitcast(Float32), turns[2 * i + 1].bitcast(Float32)
                even, odd = r[4 * n + 2 * i], r[4 * n + 2 * i + 1]
                r[4 * n + 2 * i] = ptx.round_bf16(even * c - odd * s)
                r[4 * n + 2 * i + 1] = ptx.round_bf16(even * s + odd * c)
    _transform(r, lane)
    if const_expr(x.format == "mxfp4"):
        _quantize(r)
    return [ptx.f32x2_to_bf16x2(r[8 * w + 3 - n], r[8 * w + 7 - n]) for w in range(4) for n in range(4)]


@cute.jit
def _transform(r: cute.Tensor, lane: Int32):
    """Hadamard transform of 128 elements over the quad's four lanes, rounded to bf16."""
    for i in range_constexpr(5):
        for n in range_constexpr(32):
            if const_expr(n & (1 << i) == 0):
                other = n | (1 << i)
                r[n], r[other] = r[n] + r[other], r[n] - r[other]
    for i in range_constexpr(2):
        sign = Float32(-1.0) if (lane & Int32(1 << i)) != Int32(0) else Float32(1.0)
        for n in range_constexpr(32):
            r[n] = rope.fma(r[n], sign, cute.arch.shuffle_sync_bfly(r[n], offset=1 << i))
    for n in range_constexpr(32):
        r[n] = ptx.round_bf16(r[n] * Float32(128.0**-0.5))


@cute.jit
def _quantize(r: cute.Tensor):
    """A block of 32 rounded to MXFP4 and scaled back, times 2^64: exact in bf16."""
    amax = Float32(0.0)
    for n in range_constexpr(32):
        amax = cute.arch.fmax(amax, ptx.magnitude(r[n]))
    byte = hadamard.mxfp4_exponent(amax)
    down, up = hadamard.power(Int32(254) - byte), hadamard.power(byte) * Float32(_CARRY)
    if const_expr(ptx.converts_e2m1()):
        for n in range_constexpr(16):
            lo, hi = ptx.f16x2_to_f32x2(ptx.round_e2m1x2(r[2 * n] * down, r[2 * n + 1] * down))
            r[2 * n], r[2 * n + 1] = lo * up, hi * up
    else:
        for n in range_constexpr(32):
            r[n] = hadamard.round_e2m1(r[n] * down) * up


# Keys -------------------------------------------------------------------------------------------------------


@cute.jit
def load_keys(
    x: Constexpr[Index],
    keys: cute.Tensor,
    g_data: Int64,
    g_scale: Int64,
    slot: Int32,
    first: Int32,
    lane: Int32,
):
    """Keys first + 16m + 8i + g of a slot to registers [m][i][words], for FP4 followed by the block scale."""
    words = 4 if const_expr(x.format == "mxfp4") else 16
    for m in range_constexpr(x.tiles):
        for i in range_constexpr(2):
            key = first + 16 * m + 8 * i + lane // 4
            at = Int64(slot) * x.capacity + key
            if key < x.capacity:
                for n in range_constexpr(words // 4):
                    r = ptx.ldg128(g_data + (at * 4 + lane % 4) * (words * 4) + n * 16)
                    for j in range_constexpr(4):
                        keys[m, i, 4 * n + j] = r[j]
                if const_expr(x.format == "mxfp4"):
                    keys[m, i, 4] = ptx.ldg_u8(g_scale + at * 4 + lane % 4)


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
                        a[m, 2 * w + pair // 2, i + 2 * (pair % 2)] = ptx.permute(lo, hi, selector)
    return a


# Scores -----------------------------------------------------------------------------------------------------


@cute.jit
def load_weights(x: Constexpr[Index], g_weights: Int64, factor: Constexpr[float], token: Int32, lane: Int32):
    """The lane's head weights times `factor`, bf16x2 [heads / 8]: heads 8n + 2q and the next."""
    r = cute.make_rmem_tensor((x.heads // 8,), Uint32)
    for n in range_constexpr(x.heads // 8):
        r[n] = load_weight(g_weights + (token * x.heads + 8 * n + lane % 4 * 2) * 2, factor)
    return r


@cute.jit
def load_weight(g_weight: Int64, factor: Constexpr[float]):
    """The weights of two heads times `factor`, bf16x2."""
    pair = ptx.ldg32(g_weight)
    if const_expr(factor != 1.0):
        lo, hi = ptx.bf16x2_to_f32x2(pair)
        pair = ptx.f32x2_to_bf16x2(lo * Float32(factor), hi * Float32(factor))
    return pair


@cute.jit
def score(x: Constexpr[Index], sm: Int32, a: cute.Tensor, weights: cute.Tensor, lane: Int32):
    """Scores [m][i] of keys 16m + 8i + g: each dot, product and the sum rounded to bf16."""
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
                total[m, i] = total[m, i] + weighted(r[m, 2 * i], r[m, 2 * i + 1], weights[n])
    for m in range_constexpr(x.tiles):
        for i in range_constexpr(2):
            total[m, i] = ptx.round_bf16(ptx.lanes_sum(total[m, i], 4))
    return total


@cute.jit
def weighted(lo: Float32, hi: Float32, weights: Uint32):
    """What the dots of two heads add to a key's score."""
    lo, hi = ptx.bf16x2_to_f32x2(ptx.mul_bf16x2(_relu_bf16x2(lo, hi), weights))
    return lo + hi


@cute.jit
def store_scores(
    x: Constexpr[Index],
    total: cute.Tensor,
    g_scores: Int64,
    token: Int32,
    first: Int32,
    visible: Int32,
    lane: Int32,
):
    """Scores of visible keys to bf16[N, capacity]: lane q of a quad stores that of half q."""
    for m in range_constexpr(x.tiles):
        key = first + 16 * m + lane % 4 * 8 + lane // 4
        value = total[m, 0]
        if lane % 4 == 1:
            value = total[m, 1]
        if lane % 4 < 2 and key < visible:
            g_score = g_scores + (Int64(token) * x.capacity + key) * 2
            ptx.stg16(g_score, value.bitcast(Uint32) >> Uint32(16))
