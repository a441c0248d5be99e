"""Decode attention with K = V shared by all heads: fetch, scores, softmax, values, and the exchange over a cluster.

Warp w owns dimensions 64w..64w+63 of every key and of 16 heads. Scores are summed over the warps in shared memory; values
need no sum. FP8 codes meet q and p in f16, where they are exact; BF16 rows stay bf16. Both products accumulate in f32.

An MMA fragment's k index may be any permutation that both operands share, and keys of a tile may come in any order:
lane (g, q) = (lane / 4, lane % 4) takes dimensions 32h + 8q..+7 of a score's k, and keys 16j + 2g + e as columns.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, const_expr, range_constexpr

from dsv4c.codegen.lib import cluster, ptx, rope, softmax
from dsv4c.codegen.lib.geometry import HEADS, ROPE, Attention

_asm = cute.arch.inline_ptx


# Instructions ---------------------------------------------------------------------------------------------------------


@cute.jit
def _copy16(s: Int32, g: Int64, present: Int32):
    """Asynchronous copy of 16 bytes, zeros unless `present`."""
    _asm(
        "{ .reg .pred p; .reg .b32 n; setp.ne.s32 p, {$r2}, 0; selp.b32 n, 16, 0, p; "
        "cp.async.cg.shared.global [{$r0}], [{$r1}], 16, n; }",
        read_only_args=[s, g, present],
    )


@cute.jit
def _mul_f16x2(a: Uint32, b: Uint32):
    return _asm("mul.rn.f16x2 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[a, b])


@cute.jit
def _pick(a: Uint32, b: Uint32, selector: Constexpr[int]):
    """Four bytes of (a, b): nibbles of `selector`, lowest byte first, count a's bytes 0..3 and b's 4..7."""
    return _asm(
        "prmt.b32 {$w0}, {$r0}, {$r1}, {$r2};", write_only_types=[Uint32], read_only_args=[a, b, Uint32(selector)]
    )


@cute.jit
def _store_u8(s: Int32, r: Uint32):
    _asm("{ .reg .b16 h, z; mov.b32 {h, z}, {$r1}; st.shared.u8 [{$r0}], h; }", read_only_args=[s, r])


@cute.jit
def _store_u16(s: Int32, r: Uint32):
    _asm("{ .reg .b16 h, z; mov.b32 {h, z}, {$r1}; st.shared.b16 [{$r0}], h; }", read_only_args=[s, r])


@cute.jit
def _load_u8(g: Int64):
    return _asm("ld.global.u8 {$w0}, [{$r0}];", write_only_types=[Uint32], read_only_args=[g])


@cute.jit
def send4(s: Int32, s_bar: Int32, rank: Int32, a: Float32, b: Float32, c: Float32, d: Float32):
    """Store four floats at shared address `s` of CTA `rank`, and count their 16 bytes on the barrier at `s_bar` there."""
    _asm(
        "{ .reg .b32 x, y; mapa.shared::cluster.u32 x, {$r0}, {$r2}; mapa.shared::cluster.u32 y, {$r1}, {$r2}; "
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [x], {{$r3},{$r4},{$r5},{$r6}}, [y]; }",
        read_only_args=[s, s_bar, rank, a, b, c, d],
    )


# The query ------------------------------------------------------------------------------------------------------------


@cute.jit
def load_query(
    a: Constexpr[Attention],
    sm: Int32,
    g_q: Int64,
    sequence: Int32,
    head: Int32,
    position: Int32,
    warp: Int32,
    lane: Int32,
):
    """The warp's A fragments [2h + sub][4] of 16 heads from `head` on: normed per head, rotated. One barrier.

    f16 for FP8 blocks, bf16 for BF16 ones. q bf16[B, heads, width]; heads beyond the last are zeros.
    """
    w = cute.make_rmem_tensor((2, 2, 4), Uint32)  # row half, h, pair
    w.fill(0)
    for i in range_constexpr(2):
        row = head + lane // 4 + 8 * i
        if row < a.heads:
            g = g_q + ((Int64(sequence) * a.heads + row) * a.width + warp * 64 + lane % 4 * 8) * 2
            for h in range_constexpr(2):
                words = ptx.ldg128(g + h * 64)
                for n in range_constexpr(4):
                    w[i, h, n] = words[n]
    for i in range_constexpr(2):
        squares = Float32(0.0)
        for h in range_constexpr(2):
            for n in range_constexpr(4):
                squares = squares + _squares(a, w[i, h, n])
        squares = ptx.lanes_sum(squares, 4)
        if lane % 4 == 0:
            ptx.sts_f32(sm + a.o_squares + ((lane // 4 + 8 * i) * a.warps + warp) * 4, squares)
    cute.arch.sync_threads()
    for i in range_constexpr(2):
        total = Float32(0.0)
        for n in range_constexpr(a.warps):
            total = total + ptx.lds_f32(sm + a.o_squares + ((lane // 4 + 8 * i) * a.warps + n) * 4)
        f = _inverse_norm(a, total)
        for h in range_constexpr(2):
            for n in range_constexpr(4):
                w[i, h, n] = _scaled(a, w[i, h, n], f)
    if warp == a.warps - 1:
        _rotate_query(a, sm, w, position, lane)
    elif const_expr(a.format == "fp8"):
        for i in range_constexpr(2):
            for h in range_constexpr(2):
                for n in range_constexpr(4):
                    w[i, h, n] = ptx.f32x2_to_f16x2(*ptx.bf16x2_to_f32x2(w[i, h, n]))
    fragments = cute.make_rmem_tensor((4, 4), Uint32)
    for h in range_constexpr(2):
        for sub in range_constexpr(2):
            for i in range_constexpr(4):
                fragments[2 * h + sub, i] = w[i % 2, h, 2 * sub + i // 2]
    return fragments


@cute.jit
def _squares(a: Constexpr[Attention], word: Uint32):
    """Sum of two squares; in the bf16 recipe each is rounded."""
    lo, hi = ptx.bf16x2_to_f32x2(ptx.mul_bf16x2(word, word))
    if const_expr(not a.exact_norm):
        lo, hi = ptx.bf16x2_to_f32x2(word)
        lo, hi = lo * lo, hi * hi
    return lo + hi


@cute.jit
def _inverse_norm(a: Constexpr[Attention], total: Float32):
    """rsqrt(total / width + eps); in the bf16 recipe mean, sum and root are each rounded."""
    mean = total * Float32(1.0 / a.width)
    if const_expr(a.exact_norm):
        mean = ptx.round_bf16(ptx.round_bf16(mean) + Float32(a.eps))
        return ptx.round_bf16(cute.math.rsqrt(mean, fastmath=True))
    return cute.math.rsqrt(mean + Float32(a.eps), fastmath=True)


@cute.jit
def _scaled(a: Constexpr[Attention], word: Uint32, f: Float32):
    """Two elements times f, rounded to bf16."""
    lo, hi = ptx.bf16x2_to_f32x2(word)
    return ptx.f32x2_to_bf16x2(lo * f, hi * f)


@cute.jit
def _rotate_query(a: Constexpr[Attention], sm: Int32, w: cute.Tensor, position: Int32, lane: Int32):
    for h in range_constexpr(2):
        frequencies = ptx.lds128(sm + a.o_frequencies + (16 * h + lane % 4 * 4) * 4)
        for n in range_constexpr(4):
            c, s = rope.cos_sin(position.to(Float32) * frequencies[n].bitcast(Float32))
            for i in range_constexpr(2):
                even, odd = ptx.bf16x2_to_f32x2(w[i, h, n])
                w[i, h, n] = ptx.f32x2_to_bf16x2(even * c - odd * s, even * s + odd * c)


# Keys -----------------------------------------------------------------------------------------------------------------


@cute.jit
def visible_entries(a: Constexpr[Attention], position: Int32):
    """How many entries (or selections) the token may see; they come first."""
    count = Int32(0)
    if const_expr(a.entries != "none"):
        count = cutlass.min((position + 1) // a.ratio, Int32(a.extra))
    return count


@cute.jit
def find_key(a: Constexpr[Attention], g_selected: Int64, sequence: Int32, key: Int32, position: Int32, visible: Int32):
    """Where key `key` of the list (window, newest first, then entries) lies: ring slot, ring + entry, or -1."""
    place = Int32(-1)
    if key < a.window:
        if key <= position:
            place = (position - key) % a.ring
    elif key < a.window + visible:
        place = key - a.window
        if const_expr(a.entries == "selected"):
            place = ptx.ldg32(g_selected + (Int64(sequence) * a.extra + place) * 4).bitcast(Int32)
        if place >= 0:
            place = place + a.ring
    return place


@cute.jit
def _row(a: Constexpr[Attention], g_window: Int64, g_entries: Int64, sequence: Int32, place: Int32, nbytes: Constexpr[int]):
    """Address of a component's row of `nbytes` at `place` (any valid address for -1)."""
    g = g_window + (Int64(sequence) * a.ring + cutlass.max(place, Int32(0))) * nbytes
    if const_expr(a.entries != "none"):
        if place >= a.ring:
            g = g_entries + (Int64(sequence) * a.capacity + place - a.ring) * nbytes
    return g


@cute.jit
def fetch_tile(
    a: Constexpr[Attention],
    s_keys: Int32,
    window: tuple,
    entries: tuple,
    scales: cute.Tensor,
    sequence: Int32,
    place: Int32,
    warp: Int32,
    lane: Int32,
):
    """Start copying the warp's rows of a tile; lane i < tile_rows knows the `place` of row warp * tile_rows + i.

    Scale bytes go to registers: scales[n] is that of row 4n + lane / 8, block lane % 8. `window` and `entries` are the
    addresses of data, scale and tail.
    """
    chunks = a.data_bytes // 16
    for n in range_constexpr(a.tile_rows):
        p = cute.arch.shuffle_sync(place, n)
        g = _row(a, window[0], entries[0], sequence, p, a.data_bytes)
        s = s_keys + (warp * a.tile_rows + n) * a.row_bytes
        for i in range_constexpr(-(-chunks // 32)):
            if lane + 32 * i < chunks:
                _copy16(s + (lane + 32 * i) * 16, g + (lane + 32 * i) * 16, p + 1)
    if const_expr(a.format == "fp8"):
        scales.fill(0)
        for n in range_constexpr(-(-a.tile_rows // 4)):
            i = 4 * n + lane // 8
            p = cute.arch.shuffle_sync(place, cutlass.min(i, a.tile_rows - 1))
            if i < a.tile_rows:
                g = _row(a, window[2], entries[2], sequence, p, ROPE * 2)
                s = s_keys + (warp * a.tile_rows + i) * a.row_bytes + a.data_bytes
                _copy16(s + lane % 8 * 16, g + lane % 8 * 16, p + 1)
                if lane % 8 < a.blocks and p >= 0:
                    scales[n] = _load_u8(_row(a, window[1], entries[1], sequence, p, a.blocks) + lane % 8)
    ptx.cp_async_commit()


@cute.jit
def publish_tile(a: Constexpr[Attention], sm: Int32, scales: cute.Tensor, place: Int32, warp: Int32, lane: Int32):
    """Scale bytes and visibility of the warp's rows to shared memory."""
    first = warp * a.tile_rows
    if const_expr(a.format == "fp8"):
        for n in range_constexpr(-(-a.tile_rows // 4)):
            i = 4 * n + lane // 8
            if i < a.tile_rows and lane % 8 < a.blocks:
                _store_u8(sm + a.o_scale + lane % 8 * a.tile + first + i, scales[n])
    if lane < a.tile_rows:
        bias = Float32(0.0)
        if place < 0:
            bias = -Float32.inf
        ptx.sts_f32(sm + a.o_bias + (first + lane) * 4, bias)


# Scores ---------------------------------------------------------------------------------------------------------------


@cute.jit
def scores(a: Constexpr[Attention], sm: Int32, s_keys: Int32, q: cute.Tensor, warp: Int32, lane: Int32):
    """q . k over the warp's dimensions for every key of the tile, to shared memory; returns what `values` scales by."""
    scale = Float32(1.0)
    s_part = sm + a.o_part + (warp * HEADS + lane // 4) * a.part_stride * 4 + lane % 4 * 16
    s_scale = sm + a.o_scale + warp * a.tile + lane % 4 * 4
    s_row = s_keys + lane // 4 * (2 * a.row_bytes)
    if const_expr(a.format == "fp8"):
        if warp < a.warps - 1:
            for j in range_constexpr(a.tile // 16):
                r = _scores16_fp8(a, s_row + j * 16 * a.row_bytes + warp * 64 + lane % 4 * 8, q)
                word = ptx.lds32(s_scale + j * 16)
                for n in range_constexpr(4):
                    f = (((word >> Uint32(8 * n)) & Uint32(0xFF)) << Uint32(23)).bitcast(Float32)
                    for i in range_constexpr(2):
                        r[n % 2, n // 2 + 2 * i] = r[n % 2, n // 2 + 2 * i] * f
                _store_part(a, s_part + j * 64, r)
            scale = relative_scales(a, sm, warp, lane)
        else:
            for j in range_constexpr(a.tile // 16):
                r = _scores16_bf16(a, s_row + j * 16 * a.row_bytes + a.data_bytes + lane % 4 * 16, q)
                _store_part(a, s_part + j * 64, r)
    else:
        for j in range_constexpr(a.tile // 16):
            r = _scores16_bf16(a, s_row + j * 16 * a.row_bytes + warp * 128 + lane % 4 * 16, q)
            _store_part(a, s_part + j * 64, r)
    return scale


@cute.jit
def _scores16_fp8(a: Constexpr[Attention], s: Int32, q: cute.Tensor):
    """16 keys of codes: accumulators [e][4], keys 2g + e."""
    r = cute.make_rmem_tensor((2, 4), Float32)
    r.fill(0.0)
    for e in range_constexpr(2):
        for h in range_constexpr(2):
            words = ptx.lds64(s + e * a.row_bytes + h * 32)
            for sub in range_constexpr(2):
                b = ptx.e4m3x4_to_f16x2x2(words[sub])
                f = 2 * h + sub
                ptx.mma_f16(r[e, None], q[f, 0], q[f, 1], q[f, 2], q[f, 3], b[0], b[1])
    return r


@cute.jit
def _scores16_bf16(a: Constexpr[Attention], s: Int32, q: cute.Tensor):
    """16 keys of bf16: accumulators [e][4], keys 2g + e."""
    r = cute.make_rmem_tensor((2, 4), Float32)
    r.fill(0.0)
    for e in range_constexpr(2):
        for h in range_constexpr(2):
            b = ptx.lds128(s + e * a.row_bytes + h * 64)
            for sub in range_constexpr(2):
                f = 2 * h + sub
                ptx.mma_bf16(r[e, None], q[f, 0], q[f, 1], q[f, 2], q[f, 3], b[2 * sub], b[2 * sub + 1])
    return r


@cute.jit
def relative_scales(a: Constexpr[Attention], sm: Int32, warp: Int32, lane: Int32):
    """The warp's key scales over the tile's largest, f16 to shared memory; returns that largest times 2^-15.

    Probabilities carry 2^15, so products keep f16's full precision down to 2^-29 of the largest.
    """
    steps = -(-a.tile // 32)
    byte = cute.make_rmem_tensor((steps,), Int32)
    byte.fill(1)
    for i in range_constexpr(steps):
        if lane + 32 * i < a.tile:
            byte[i] = cutlass.max(ptx.lds_u8(sm + a.o_scale + warp * a.tile + lane + 32 * i).to(Int32), Int32(1))
    largest = byte[0]
    for i in range_constexpr(1, steps):
        largest = cutlass.max(largest, byte[i])
    largest = cute.arch.warp_redux_sync(largest, kind="max")
    for i in range_constexpr(steps):
        if lane + 32 * i < a.tile:
            exponent = Int32(15) + byte[i] - largest
            bits = exponent << Int32(10)
            if exponent < 1:  # subnormal
                bits = Int32(1024) >> cutlass.min(Int32(1) - exponent, Int32(31))
            _store_u16(sm + a.o_factor + (warp * a.tile + lane + 32 * i) * 2, bits.to(Uint32))
    cute.arch.sync_warp()
    return ((cutlass.max(largest - 15, Int32(1))) << Int32(23)).bitcast(Float32)


@cute.jit
def _store_part(a: Constexpr[Attention], s: Int32, r: cute.Tensor):
    """Keys 4q..4q+3 of heads g and g + 8."""
    for i in range_constexpr(2):
        words = [r[n % 2, n // 2 + 2 * i].bitcast(Uint32) for n in range(4)]
        ptx.sts128(s + i * 8 * a.part_stride * 4, *words)


# Softmax --------------------------------------------------------------------------------------------------------------


@cute.jit
def soften(a: Constexpr[Attention], sm: Int32, stats: cute.Tensor, warp: Int32, lane: Int32):
    """Add the warps' scores up, update (maximum, weight) of the warp's heads, and write the tile's probabilities.

    `stats` [heads of the warp][2]; the weight is this lane's share. Scores are in powers of two.
    """
    steps = -(-a.tile // 64)
    to_log2 = Float32(a.width**-0.5 * softmax.LOG2_E)
    for n in range_constexpr(HEADS // a.warps):
        head = warp * (HEADS // a.warps) + n
        value = cute.make_rmem_tensor((steps, 2), Float32)
        value.fill(-Float32.inf)
        maximum = stats[n, 0]
        for i in range_constexpr(steps):
            column = lane * 2 + i * 64
            if column < a.tile:
                lo, hi = Float32(0.0), Float32(0.0)
                for w in range_constexpr(a.warps):
                    part = ptx.lds64(sm + a.o_part + ((w * HEADS + head) * a.part_stride + column) * 4)
                    lo, hi = lo + part[0].bitcast(Float32), hi + part[1].bitcast(Float32)
                bias = ptx.lds64(sm + a.o_bias + column * 4)
                value[i, 0] = lo * to_log2 + bias[0].bitcast(Float32)
                value[i, 1] = hi * to_log2 + bias[1].bitcast(Float32)
            maximum = cute.arch.fmax(maximum, cute.arch.fmax(value[i, 0], value[i, 1]))
        maximum = ptx.lanes_max(maximum, 32)
        correction = softmax.weight(stats[n, 0], maximum)
        total = stats[n, 1] * correction
        for i in range_constexpr(steps):
            column = lane * 2 + i * 64
            lo, hi = softmax.weight(value[i, 0], maximum), softmax.weight(value[i, 1], maximum)
            total = total + (lo + hi)
            if column < a.tile:
                word = ptx.f32x2_to_bf16x2(lo, hi)
                at = (head * a.p_stride + column) * 2
                ptx.sts32(sm + a.o_p_bf16 + at, word)
                if const_expr(a.format == "fp8"):
                    lo, hi = ptx.bf16x2_to_f32x2(word)
                    ptx.sts32(sm + a.o_p_f16 + at, ptx.f32x2_to_f16x2(lo * Float32(2.0**15), hi * Float32(2.0**15)))
        stats[n, 0] = maximum
        stats[n, 1] = total
        if lane == 0:
            ptx.sts_f32(sm + a.o_correction + head * 4, correction)


# Values ---------------------------------------------------------------------------------------------------------------


@cute.jit
def values(
    a: Constexpr[Attention], sm: Int32, s_keys: Int32, o: cute.Tensor, scale: Float32, warp: Int32, lane: Int32
):
    """o = o * correction + p . v * scale of the tile. o [8][4]: dimension 8g' + n of the warp for column g', heads g and g + 8."""
    r = cute.make_rmem_tensor((8, 4), Float32)
    r.fill(0.0)
    s_p = (lane // 4 * a.p_stride + lane % 4 * 2) * 2 + sm
    s_row = s_keys + lane % 4 * (2 * a.row_bytes)
    if const_expr(a.format == "fp8"):
        if warp < a.warps - 1:
            s_factor = sm + a.o_factor + (warp * a.tile + lane % 4 * 2) * 2
            for j in range_constexpr(a.tile // 16):
                p = _load_p(a, s_p + a.o_p_f16 + j * 32)
                for i in range_constexpr(2):
                    f = ptx.lds32(s_factor + j * 32 + i * 16)
                    p[2 * i] = _mul_f16x2(p[2 * i], f)
                    p[2 * i + 1] = _mul_f16x2(p[2 * i + 1], f)
                _values16_fp8(a, s_row + j * 16 * a.row_bytes + warp * 64 + lane // 4 * 8, p, r)
        else:
            for j in range_constexpr(a.tile // 16):
                p = _load_p(a, s_p + a.o_p_bf16 + j * 32)
                _values16_bf16(a, s_row + j * 16 * a.row_bytes + a.data_bytes + lane // 4 * 16, p, r)
    else:
        for j in range_constexpr(a.tile // 16):
            p = _load_p(a, s_p + a.o_p_bf16 + j * 32)
            _values16_bf16(a, s_row + j * 16 * a.row_bytes + warp * 128 + lane // 4 * 16, p, r)
    for i in range_constexpr(2):
        correction = ptx.lds_f32(sm + a.o_correction + (lane // 4 + 8 * i) * 4)
        for n in range_constexpr(8):
            for c in range_constexpr(2):
                o[n, 2 * i + c] = o[n, 2 * i + c] * correction + r[n, 2 * i + c] * scale


@cute.jit
def _load_p(a: Constexpr[Attention], s: Int32):
    """A fragment of 16 heads and 16 keys."""
    p = cute.make_rmem_tensor((4,), Uint32)
    for i in range_constexpr(4):
        p[i] = ptx.lds32(s + i % 2 * (16 * a.p_stride) + i // 2 * 16)
    return p


@cute.jit
def _values16_fp8(a: Constexpr[Attention], s: Int32, p: cute.Tensor, r: cute.Tensor):
    """16 keys of codes: the lane's keys 2q, 2q+1, 2q+8, 2q+9, dimensions 8g..8g+7, paired along keys."""
    k = [ptx.lds64(s + n * a.row_bytes) for n in (0, 1, 8, 9)]
    for i in range_constexpr(2):
        for half in range_constexpr(2):
            selector = 0x7362 if half else 0x5140
            lo = ptx.e4m3x4_to_f16x2x2(_pick(k[0][i], k[1][i], selector))
            hi = ptx.e4m3x4_to_f16x2x2(_pick(k[2][i], k[3][i], selector))
            for n in range_constexpr(2):
                ptx.mma_f16(r[4 * i + 2 * half + n, None], p[0], p[1], p[2], p[3], lo[n], hi[n])


@cute.jit
def _values16_bf16(a: Constexpr[Attention], s: Int32, p: cute.Tensor, r: cute.Tensor):
    """16 keys of bf16, as above."""
    k = [ptx.lds128(s + n * a.row_bytes) for n in (0, 1, 8, 9)]
    for i in range_constexpr(4):
        for n in range_constexpr(2):
            selector = 0x7632 if n else 0x5410
            lo, hi = _pick(k[0][i], k[1][i], selector), _pick(k[2][i], k[3][i], selector)
            ptx.mma_bf16(r[2 * i + n, None], p[0], p[1], p[2], p[3], lo, hi)


# The exchange ---------------------------------------------------------------------------------------------------------


@cute.jit
def open_exchange(a: Constexpr[Attention], sm: Int32, g_sink: Int64, head: Int32, tid: Int32):
    """Make the inbox's barrier ready and tell the cluster; `exchange` waits for the others. Fetch the sinks (constants)."""
    if tid < HEADS and head + tid < a.heads:
        ptx.sts_f32(sm + a.o_sink + tid * 4, ptx.ldg_f32_constant(g_sink + (head + tid) * 4))
    if tid == 0:
        cluster.open_inbox(sm + a.o_barrier, a.splits * HEADS * (a.slice * 4 + 16))
    cute.arch.cluster_arrive()


@cute.jit
def exchange(a: Constexpr[Attention], sm: Int32, o: cute.Tensor, stats: cute.Tensor, rank: Int32, warp: Int32, lane: Int32):
    """Send each CTA of the cluster its dimensions of this split's output, and (maximum, weight) of every head."""
    cute.arch.cluster_wait()
    bar = sm + a.o_barrier
    for n in range_constexpr(HEADS // a.warps):
        weight = ptx.lanes_sum(stats[n, 1], 32)
        if lane < a.splits:
            at = (rank * HEADS + warp * (HEADS // a.warps) + n) * 16
            send4(sm + a.o_stats + at, bar, Int32(lane), stats[n, 0], weight, Float32(0.0), Float32(0.0))
    dimension = warp * 64 + lane % 4 * 16
    to = dimension // a.slice
    for i in range_constexpr(2):
        at = ((rank * HEADS + lane // 4 + 8 * i) * a.slice + dimension % a.slice) * 4
        for c in range_constexpr(2):  # dimensions 16q + 8c + n
            for n in range_constexpr(2):
                s = sm + a.o_inbox + at + (8 * c + 4 * n) * 4
                send4(s, bar, to, *[o[4 * n + j, 2 * i + c] for j in range(4)])


@cute.jit
def finish(
    a: Constexpr[Attention],
    sm: Int32,
    g_out: Int64,
    sequence: Int32,
    head: Int32,
    position: Int32,
    rank: Int32,
    tid: Int32,
):
    """Merge the splits, divide by the denominator (sink included), turn the last 64 dimensions back, store bf16."""
    ptx.mbarrier_wait(sm + a.o_barrier, 0)
    quads = a.slice // 4
    for n in range_constexpr(-(-HEADS * quads // (a.warps * 32))):
        unit = tid + n * (a.warps * 32)
        row = unit // quads
        dimension = rank * a.slice + unit % quads * 4
        if unit < HEADS * quads and head + row < a.heads:
            r = _merge(a, sm, row, unit, ptx.lds_f32(sm + a.o_sink + row * 4))
            if dimension >= a.width - ROPE:
                _turn_back(a, sm, r, position, dimension)
            at = (Int64(sequence) * a.heads + head + row) * a.width + dimension
            ptx.stg64(g_out + at * 2, ptx.f32x2_to_bf16x2(r[0], r[1]), ptx.f32x2_to_bf16x2(r[2], r[3]))


@cute.jit
def _merge(a: Constexpr[Attention], sm: Int32, row: Int32, unit: Int32, sink: Float32):
    """Four dimensions of one head over all splits, divided; zeros when the token sees nothing. Rounded to bf16."""
    stats = [ptx.lds64(sm + a.o_stats + (i * HEADS + row) * 16) for i in range(a.splits)]
    maximum = stats[0][0].bitcast(Float32)
    for i in range_constexpr(1, a.splits):
        maximum = cute.arch.fmax(maximum, stats[i][0].bitcast(Float32))
    denominator = ptx.ex2(sink * Float32(softmax.LOG2_E) - softmax.reference(maximum))
    r = cute.make_rmem_tensor((4,), Float32)
    r.fill(0.0)
    for i in range_constexpr(a.splits):
        f = softmax.weight(stats[i][0].bitcast(Float32), maximum)
        denominator = denominator + stats[i][1].bitcast(Float32) * f
        words = ptx.lds128(sm + a.o_inbox + (i * HEADS * a.slice + unit * 4) * 4)
        for n in range_constexpr(4):
            r[n] = r[n] + words[n].bitcast(Float32) * f
    for n in range_constexpr(4):
        r[n] = ptx.round_bf16(ptx.divide(r[n], denominator))
    return r


@cute.jit
def _turn_back(a: Constexpr[Attention], sm: Int32, r: cute.Tensor, position: Int32, dimension: Int32):
    frequencies = ptx.lds64(sm + a.o_frequencies + (dimension - (a.width - ROPE)) * 2)
    for n in range_constexpr(2):
        angle = position.to(Float32) * frequencies[n].bitcast(Float32)
        r[2 * n], r[2 * n + 1] = rope.turn(r[2 * n], r[2 * n + 1], -angle)
