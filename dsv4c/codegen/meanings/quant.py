"""Quantization; the formulas are in `dsv4c.numerics.codec`, decided in f32 as there."""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Float64, Int32, Uint32, const_expr, range_constexpr

from dsv4c.codegen.lib import hadamard as e2m1_codes
from dsv4c.codegen.lib import ptx
from dsv4c.codegen.meanings.values import (
    Quantized,
    Team,
    at,
    e2m1,
    e4m3,
    largest,
    lines,
    multiply,
    put,
    size,
    wide,
)
from dsv4c.types import E2M1, E4M3, F32, UE8M0, QuantFormat


@cute.jit
def quantize(team: Constexpr[Team], x: cute.Tensor, *rest, format: Constexpr[str]):
    """x[..., K] and perhaps its global scales -> q, whose rows x's may be repeated for. A warp per block."""
    *given, q = rest
    spec = q.format
    width = x.shape[-1]
    body = width - spec.tail
    rows = size(q.shape) // width
    repeat = rows // (size(x.shape) // width)
    if const_expr(q.global_scale is not None):
        _global_scales(team, x, given, q, rows, repeat)
    columns = spec.block[1]
    blocks = -(-body // columns)
    lane = team.thread % 32
    for block in cutlass.range(team.thread // 32, rows * blocks, team.threads // 32):
        row = block // blocks
        first = block % blocks * columns
        source = row // repeat * width + first
        stop = body - first
        r = _pairs_of(x, source, lane, columns, stop)
        bits = Int32(0)
        for n in range_constexpr(cute.size(r)):
            bits = cutlass.max(bits, _magnitude(r[n]))
        bits = _most(bits)
        over_all = Float32(1.0)
        if const_expr(q.global_scale is not None):
            over_all = at(q.global_scale, row)
        divisor, stored = _block_scale(bits, over_all, spec)
        if lane == 0:
            put(q.scale, block, stored)
        for n in range_constexpr(cute.size(r) // 2):
            j = 2 * (lane + 32 * n)
            low, high = _divided(r[2 * n], divisor, spec), _divided(r[2 * n + 1], divisor, spec)
            if const_expr(spec.value is E2M1):
                if j < cutlass.min(stop, columns):
                    codes = _e2m1_code(low) | (_e2m1_code(high) << Uint32(4))
                    put(q.data, (row * body + first + j) // 2, codes)
            else:
                codes = ptx.f32x2_to_e4m3x2(low, high)
                if j < cutlass.min(stop, columns):
                    put(q.data, row * body + first + j, codes & Uint32(0xFF))
                if j + 1 < cutlass.min(stop, columns):
                    put(q.data, row * body + first + j + 1, codes >> Uint32(8))
    if const_expr(spec.tail):
        for i in cutlass.range(team.thread, rows * spec.tail, team.threads):
            put(q.tail, i, at(x, i // spec.tail // repeat * width + body + i % spec.tail).to(Float32))


@cute.jit
def _pairs_of(x: cute.Tensor, source: Int32, lane: Int32, columns: Constexpr[int], stop: Int32):
    """The lane's elements of a block, neighbors two by two, all on their way together; 0 beyond the end."""
    r = cute.make_rmem_tensor((2 * -(-columns // 64),), Float32)
    for n in range_constexpr(cute.size(r)):
        j = 2 * (lane + 32 * (n // 2)) + n % 2
        inside = j < cutlass.min(stop, columns)
        v = at(x, source + (j if inside else Int32(0))).to(Float32)
        r[n] = v if inside else Float32(0.0)
    return r


@cute.jit
def _magnitude(v: Float32):
    """Bits that order magnitudes, those of NaN above all."""
    return v.bitcast(Int32) & Int32(0x7FFFFFFF)


@cute.jit
def _most(bits: Int32):
    for i in range_constexpr(5):
        bits = cutlass.max(bits, cute.arch.shuffle_sync_bfly(bits, offset=1 << i))
    return bits


@cute.jit
def _global_scales(
    team: Constexpr[Team],
    x: cute.Tensor,
    given: Constexpr,
    q: Constexpr[Quantized],
    rows: Constexpr[int],
    repeat: Constexpr[int],
):
    """Those given, or amax of the row / (largest * 448). All threads see them behind it."""
    width = x.shape[-1]
    if const_expr(len(given) == 1):
        for row in cutlass.range(team.thread, rows, team.threads):
            put(q.global_scale, row, at(given[0], row))
    else:
        over = lines(team, rows, width)
        for row in cutlass.range(over.first, rows, over.step):
            top = Float32(0.0)
            for j in cutlass.range(over.lane, width - q.format.tail, over.width):
                v = at(x, row // repeat * width + j).to(Float32)
                top = cute.arch.fmax(top, cute.arch.fmax(v, -v))
            top = largest(top, over)
            if over.lane == 0:
                put(q.global_scale, row, ptx.divide(top, Float32(q.format.largest * 448.0)))
    cute.arch.sync_threads()


@cute.jit
def _block_scale(bits: Int32, over_all: Float32, spec: Constexpr[QuantFormat]):
    """What a block of that largest magnitude is divided by, and how its scale is stored."""
    amax = bits.bitcast(Float32)
    if const_expr(spec.scale is UE8M0 or spec.scale is F32):
        floor = Float32(1e-4 if spec.value is E4M3 else 6.0 * 2.0**-126)
        amax = floor if amax < floor else amax
    if const_expr(spec.scale is F32):
        scale = ptx.divide(amax, Float32(spec.largest))
        return scale, scale
    if const_expr(spec.scale is UE8M0):
        top = Float32(spec.largest).bitcast(Int32)
        byte = ((amax.bitcast(Int32) - top + Int32(0x7FFFFF)) >> Int32(23)) + Int32(127)
        byte = Int32(0xFF) if bits >= Int32(0x7F800000) else byte
        return _power(byte.to(Uint32)), byte.to(Uint32)
    ratio = ptx.divide(amax, multiply(Float32(spec.largest), over_all))
    ratio = Float32(0.0) if bits == Int32(0) else ratio
    byte = ptx.f32x2_to_e4m3x2(ratio, ratio) & Uint32(0xFF)
    return multiply(e4m3(byte), over_all), byte


@cute.jit
def _power(byte: Uint32):
    """2^(byte - 127); 255 is NaN."""
    v = ptx.ue8m0_to_f32(byte)
    nan = Uint32(0x7FC00000).bitcast(Float32)
    return nan if byte == Uint32(0xFF) else v


@cute.jit
def _divided(v: Float32, divisor: Float32, spec: Constexpr[QuantFormat]):
    """v / divisor, 0 where that is 0. A power of two is multiplied by its inverse, which is the same."""
    if const_expr(spec.scale is UE8M0):
        byte = divisor.bitcast(Uint32) >> Uint32(23)
        inverse = _power(Uint32(254) - byte)
        return multiply(v, divisor if byte == Uint32(255) else inverse)
    y = ptx.divide(v, divisor)
    return Float32(0.0) if divisor == Float32(0.0) else y


@cute.jit
def _e2m1_code(y: Float32):
    """The code next to y, ties to the even one, saturating; NaN as the largest."""
    bits = cutlass.min(_magnitude(y), Int32(0x40C00000))
    return e2m1_codes.code_of(bits.bitcast(Float32)) | ((y.bitcast(Uint32) >> Uint32(31)) << Uint32(3))


@cute.jit
def decoded(q: Constexpr[Quantized], row: Int32, i: Int32):
    """Element i of row number `row` of a matrix, its tail aside, without any scale: f32, exact."""
    body = q.shape[-1] - q.format.tail
    if const_expr(q.format.value is E2M1):
        byte = at(q.data, row * (body // 2) + i // 2).to(Uint32)
        return e2m1((byte >> (Uint32(4) * (i % 2).to(Uint32))) & Uint32(15))
    return e4m3(at(q.data, row * body + i).to(Uint32))


@cute.jit
def block_scale(q: Constexpr[Quantized], row: Int32, block: Int32):
    """Scale of block number `block` of a row, without the global one: f32, exact."""
    high = q.format.block[0]
    blocks = q.scale.shape[-1]
    lead = q.shape[-2] if const_expr(len(q.shape) > 1) else 1
    scale_rows = -(-lead // high)
    at_row = row // lead * scale_rows + row % lead // high
    stored = at(q.scale, at_row * blocks + block)
    if const_expr(q.format.scale is UE8M0):
        return _power(stored.to(Uint32))
    if const_expr(q.format.scale is F32):
        return stored
    return e4m3(stored.to(Uint32))


@cute.jit
def global_scale(q: Constexpr[Quantized], row: Int32):
    """The second scale of a row, f32; 1 where the format has none."""
    if const_expr(q.global_scale is None):
        return Float32(1.0)
    each = size(q.shape[:-1]) // size(q.global_scale.shape)
    return at(q.global_scale, row // each)


@cute.jit
def exact(x: Constexpr, row: Int32, i: Int32):
    """Element i of row number `row` of an array, plain or quantized, in float64."""
    if const_expr(not isinstance(x, Quantized)):
        return wide(at(x, row * x.shape[-1] + i))
    body = x.shape[-1] - x.format.tail
    inside = i if const_expr(not x.format.tail) else cutlass.min(i, Int32(body - 1))
    v = wide(decoded(x, row, inside)) * wide(block_scale(x, row, inside // x.format.block[1]))
    v = v * wide(global_scale(x, row))
    if const_expr(x.format.tail):
        behind = cutlass.max(i - body, Int32(0))
        v = wide(at(x.tail, row * x.format.tail + behind)) if i >= body else v
    return v


@cute.jit
def dequantize(team: Constexpr[Team], x: Constexpr[Quantized], y: cute.Tensor, out: Constexpr[str]):
    width = x.shape[-1]
    for i in cutlass.range(team.thread, size(x.shape), team.threads):
        put(y, i, exact(x, i // width, i % width))


@cute.jit
def hadamard(team: Constexpr[Team], x: cute.Tensor, y: cute.Tensor):
    """A thread per element: the sign of each term is the parity of the bits that its two indices share."""
    width = x.shape[-1]
    for i in cutlass.range(team.thread, size(x.shape), team.threads):
        first, column = i // width * width, i % width
        own = Float64(0.0)
        for j in cutlass.range(width):
            v = wide(at(x, first + j))
            own = own + (-v if cute.arch.popc(column & j) % 2 == 1 else v)
        put(y, i, own / Float64(width**0.5))


__all__ = [
    "block_scale",
    "decoded",
    "dequantize",
    "exact",
    "global_scale",
    "hadamard",
    "quantize",
]
