"""New rows of the caches: norm, rotation, quantization, and the write into their place.

A row is held by the first `width / 4` threads of a CTA, four neighboring elements each, as floats. Every
thread runs every line (there are barriers inside); the others carry zeros and store nothing.
"""

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, const_expr, range_constexpr

from dsv4c.codegen.lib import hadamard, ptx, quantize, rope
from dsv4c.codegen.lib.geometry import ROPE, Row, Window


class Operands(NamedTuple):
    """kv bf16[N, width], gain bf16[width], frequencies f32[32], positions and slots i32[N] -> window [S,
    ring, width] and beside [B, capacity, width], the components of their format.
    """

    kv: cute.Pointer
    gain: cute.Pointer
    frequencies: cute.Pointer
    positions: cute.Pointer
    slots: cute.Pointer
    window: tuple[cute.Pointer, ...]
    beside: tuple[cute.Pointer, ...] = ()


def addresses(components: tuple[cute.Pointer, ...]) -> tuple[Int64, Int64, Int64]:
    """Data, scale and tail of a cache; zeros for what its format does not have."""
    data, scale, tail = (m.toint() for m in components), Int64(0), Int64(0)
    return tuple([*data, scale, tail][:3])  # type: ignore[return-value]


@cute.jit
def prefetch(row: Constexpr[Row], g_gain: Int64, g_frequencies: Int64, tid: Int32):
    """The thread's gains (bf16, two words) and, where it holds rotated elements, two frequencies."""
    r = cute.make_rmem_tensor((4,), Float32)
    r.fill(0.0)
    pair = tid * 2 - (row.width - ROPE) // 2
    if tid < row.lanes:
        for i in range_constexpr(2):
            r[i] = ptx.ldg32_constant(g_gain + tid * 8 + i * 4).bitcast(Float32)
            if pair >= 0:
                r[2 + i] = ptx.ldg_f32_constant(g_frequencies + (pair + i) * 4)
    return r


@cute.jit
def normalize(
    row: Constexpr[Row],
    s_squares: Int32,
    r: cute.Tensor,
    constants: cute.Tensor,
    eps: Constexpr[float],
    tid: Int32,
    threads: Constexpr[int],
):
    """r * rsqrt(mean(r^2) + eps) * gain in f32, rounded to bf16. One barrier, 16 bytes."""
    squares = Float32(0.0)
    for i in range_constexpr(4):
        squares = squares + r[i] * r[i]
    squares = ptx.lanes_sum(squares, 32)
    if tid < row.lanes and tid % 32 == 0:
        ptx.sts_f32(s_squares + tid // 8, squares)
    ptx.sync_threads(threads)
    total = Float32(0.0)
    for i in range_constexpr(row.lanes // 32):
        total = total + ptx.lds_f32(s_squares + i * 4)
    f = cute.math.rsqrt(total * Float32(1.0 / row.width) + Float32(eps), fastmath=True)
    for i in range_constexpr(2):
        lo, hi = ptx.bf16x2_to_f32x2(constants[i].bitcast(Uint32))
        r[2 * i] = ptx.round_bf16(r[2 * i] * f * lo)
        r[2 * i + 1] = ptx.round_bf16(r[2 * i + 1] * f * hi)


@cute.jit
def rotate(row: Constexpr[Row], r: cute.Tensor, constants: cute.Tensor, position: Int32, tid: Int32):
    """Turn the last 64 elements to `position`, rounded to bf16."""
    if tid >= (row.width - ROPE) // 4:
        for i in range_constexpr(2):
            even, odd = rope.turn(r[2 * i], r[2 * i + 1], position.to(Float32) * constants[2 + i])
            r[2 * i] = ptx.round_bf16(even)
            r[2 * i + 1] = ptx.round_bf16(odd)


@cute.jit
def store(
    row: Constexpr[Row],
    r: cute.Tensor,
    g_data: Int64,
    g_scale: Int64,
    g_tail: Int64,
    place: Int64,
    tid: Int32,
):
    """Write the row to `place` of the component arrays, in the row's domain and format."""
    if const_expr(row.hadamard):
        hadamard.hadamard128(r, tid % 32)
    if const_expr(row.format == "bf16"):
        if tid < row.lanes:
            _store_bf16(r, g_data + (place * row.lanes + tid) * 8)
    elif const_expr(row.format == "fp8"):
        _store_fp8(row, r, g_data, g_scale, g_tail, place, tid)
    else:
        _store_mxfp4(r, g_data, g_scale, place, tid)


@cute.jit
def _store_bf16(r: cute.Tensor, g: Int64):
    ptx.stg64(g, ptx.f32x2_to_bf16x2(r[0], r[1]), ptx.f32x2_to_bf16x2(r[2], r[3]))


@cute.jit
def _store_fp8(
    row: Constexpr[Row],
    r: cute.Tensor,
    g_data: Int64,
    g_scale: Int64,
    g_tail: Int64,
    place: Int64,
    tid: Int32,
):
    """Blocks of 64 are 16 neighboring threads; the last 64 elements stay bf16."""
    amax = Float32(0.0)
    for i in range_constexpr(4):
        amax = cute.arch.fmax(amax, cute.arch.fmax(r[i], -r[i]))
    byte = quantize.fp8_exponent(ptx.lanes_max(amax, 16))
    f = quantize.reciprocal(byte)
    coded = (row.width - ROPE) // 4  # threads whose elements become codes
    if tid < coded:
        ptx.stg32(g_data + (place * coded + tid) * 4, quantize.codes4(r[0] * f, r[1] * f, r[2] * f, r[3] * f))
        if tid % 16 == 0:
            ptx.stg_u8(g_scale + place * (coded // 16) + tid // 16, byte.to(Uint32))
    elif tid < row.lanes:
        _store_bf16(r, g_tail + (place * (ROPE // 4) + tid - coded) * 8)


@cute.jit
def _store_mxfp4(r: cute.Tensor, g_data: Int64, g_scale: Int64, place: Int64, tid: Int32):
    """A row of 128: 64 bytes of codes, the even element in the low nibble, and 4 scales."""
    byte = hadamard.block32_exponent(r)
    codes = hadamard.e2m1_codes4(r, byte)
    if tid < 32:
        ptx.stg16(g_data + place * 64 + tid * 2, codes)
        if tid % 8 == 0:
            ptx.stg_u8(g_scale + place * 4 + tid // 8, byte.to(Uint32))


@cute.jit
def kv_store(w: Constexpr[Window], m: Operands, s: Int32, token: Int32, tid: Int32) -> None:
    """`w.threads` threads: row `token`, normed and rotated, into its slot's window.

    16 bytes of shared memory. Position -1 writes nothing. Of more rows than the ring has, a sequence's follow
    each other, and one for whose place a later one comes writes nothing.
    """
    row = w.row
    constants = prefetch(row, m.gain.toint(), m.frequencies.toint(), tid)
    ptx.wait()
    g_positions, g_slots = m.positions.toint(), m.slots.toint()
    position = ptx.ldg32(g_positions + token * 4).bitcast(Int32)
    slot = ptx.ldg32(g_slots + token * 4).to(Int64)
    r = load(row, m.kv.toint(), Int64(token), tid)
    normalize(row, s, r, constants, w.eps, tid, w.threads)
    if const_expr(w.crowded > w.ring):
        later = token + w.ring
        if later < w.crowded:
            same = ptx.ldg32(g_slots + later * 4).to(Int64) == slot
            if same and ptx.ldg32(g_positions + later * 4).bitcast(Int32) == position + w.ring:
                position = Int32(-1)
    if position >= 0:
        rotate(row, r, constants, position, tid)
        store(row, r, *addresses(m.window), slot * w.ring + position % w.ring, tid)


@cute.jit
def load(row: Constexpr[Row], g_kv: Int64, number: Int64, tid: Int32) -> cute.Tensor:
    """Row `number` of kv, as floats."""
    r = cute.make_rmem_tensor((4,), Float32)
    r.fill(0.0)
    if tid < row.lanes:
        w = ptx.ldg64(g_kv + (number * row.lanes + tid) * 8)
        for i in range_constexpr(2):
            r[2 * i], r[2 * i + 1] = ptx.bf16x2_to_f32x2(w[i])
    return r


# Chunks of many tokens --------------------------------------------------------------------------------------


@cute.jit
def tokens_of(g_positions: Int64, rows: Constexpr[int], lane: Int32):
    """How many of a sequence's `rows` hold a token: those before the first position -1. Whole warps, which
    look at every 1,024th row, then at every 32nd of those in between, ...
    """
    last, count = Int32(0), Int32(0)
    for stride in range_constexpr(4):
        step = const_expr(32 ** (3 - stride))
        if const_expr(step < rows or step == 1):
            row, position = last + lane * step, Int32(-1)
            if row < rows:
                position = ptx.ldg32(g_positions + row * 4).bitcast(Int32)
            found = cute.arch.popc(cute.arch.vote_ballot_sync(position >= 0))
            if found > 0:
                last = last + (found - 1) * step
                count = last + 1
    return count


@cute.jit
def move(
    row: Constexpr[Row],
    source: tuple,
    place: Int64,
    target: tuple,
    to: Int64,
    present: Constexpr[bool],
    tid: Int32,
):
    """Row `place` of the component arrays `source` becomes row `to` of `target`; zeros unless `present`."""
    coded = const_expr((row.width - ROPE) // 4 if row.format == "fp8" else 0)  # threads that move codes
    if tid < coded:
        _move_codes(coded, source, place, target, to, present, tid)
    elif tid < row.lanes:
        array = const_expr(2 if coded else 0)
        words = (Uint32(0), Uint32(0))
        if const_expr(present):
            words = ptx.ldg64(source[array] + (place * (row.lanes - coded) + tid - coded) * 8)
        ptx.stg64(target[array] + (to * (row.lanes - coded) + tid - coded) * 8, words[0], words[1])


@cute.jit
def _move_codes(
    coded: Constexpr[int],
    source: tuple,
    place: Int64,
    target: tuple,
    to: Int64,
    present: Constexpr[bool],
    tid: Int32,
):
    word, byte = Uint32(0), Uint32(0)
    if const_expr(present):
        word = ptx.ldg32(source[0] + (place * coded + tid) * 4)
        byte = ptx.ldg_u8(source[1] + place * (coded // 16) + tid // 16)
    ptx.stg32(target[0] + (to * coded + tid) * 4, word)
    if tid % 16 == 0:
        ptx.stg_u8(target[1] + to * (coded // 16) + tid // 16, byte)


@cute.jit
def kv_extend(w: Constexpr[Window], m: Operands, s: Int32, block: Int32, tid: Int32) -> None:
    """`w.threads` threads: one row of the copies [B, capacity, width] beside the windows of B sequences.

    The row is that of the latest position of its residue: a token of this call, normed and rotated, or what
    the ring holds. The last `ring` tokens go to the ring, too. Whose place in the ring a token takes is read
    by that token's CTA, before it writes. 16 bytes of shared memory.
    """
    row, ring, capacity, tokens = w.row, w.ring, w.capacity, w.tokens
    constants = prefetch(row, m.gain.toint(), m.frequencies.toint(), tid)
    ptx.wait()
    window, beside = addresses(m.window), addresses(m.beside)
    sequence, place = block // capacity, block % capacity
    g_positions = m.positions.toint() + Int64(sequence) * (tokens * 4)
    count = tokens_of(g_positions, tokens, tid % 32)
    first = ptx.ldg32(g_positions).bitcast(Int32)
    last = first + count - 1
    to, own = Int64(block), ptx.ldg32(m.slots.toint() + Int64(sequence) * (tokens * 4)).to(Int64) * ring
    position = last - (last - place + capacity) % capacity  # `last` may be before all places
    if count > 0 and position >= first:
        number = Int64(sequence) * tokens + position - first
        r = load(row, m.kv.toint(), number, tid)
        normalize(row, s, r, constants, w.eps, tid, w.threads)
        rotate(row, r, constants, position, tid)
        store(row, r, *beside, to, tid)
        if position > last - ring:
            old = position - ((position - first) // ring + 1) * ring
            if old >= 0 and old > last - capacity:
                there = Int64(sequence) * capacity + old % capacity
                move(row, window, own + old % ring, beside, there, True, tid)
            ptx.sync_threads(w.threads)
            store(row, r, *window, own + position % ring, tid)
    elif position >= 0 and position >= first - ring:
        if position + ring > last:
            move(row, window, own + position % ring, beside, to, True, tid)
    else:
        move(row, window, own, beside, to, False, tid)
