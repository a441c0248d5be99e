"""The next token, and the rows it is read from."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, range_constexpr

from dsv4c.codegen.meanings.values import Team, at, held, lines, put, size


@cute.jit
def last_rows(team: Team, x: cute.Tensor, lengths: cute.Tensor, y: cute.Tensor):
    sequences = lengths.shape[0]
    tokens, width = x.shape[0] // sequences, size(y.shape) // sequences
    for i in cutlass.range(team.thread, size(y.shape), team.threads):
        length = at(lengths, i // width)
        row = i // width * tokens + cutlass.max(length - 1, Int32(0))
        value = at(x, row * width + i % width)
        put(y, i, value if length > 0 else value.dtype(0))


@cute.jit
def argmax(team: Team, logits: cute.Tensor, y: cute.Tensor):
    """The lowest column of the largest number, NaN above all."""
    rows, width = logits.shape
    over = lines(team, rows, width)
    for row in cutlass.range(over.first, rows, over.step):
        best, column = Int32(-0x80000000), Int32(0x7FFFFFFF)
        for j in cutlass.range(over.lane, width, over.width):
            key = order(at(logits, row * width + j).to(cutlass.Float32))
            if key > best or column == Int32(0x7FFFFFFF):
                best, column = key, j
        if cutlass.const_expr(over.width > 1):
            for i in range_constexpr(5):
                other = cute.arch.shuffle_sync_bfly(best, offset=1 << i)
                place = cute.arch.shuffle_sync_bfly(column, offset=1 << i)
                if other > best or (other == best and place < column):
                    best, column = other, place
        if cutlass.const_expr(over.width > 32):
            keys = held(Int32, team.scratch, (2 * (over.width // 32),))
            if over.lane % 32 == 0:
                keys[over.lane // 32 * 2] = best
                keys[over.lane // 32 * 2 + 1] = column
            cute.arch.sync_threads()
            for i in range_constexpr(over.width // 32):
                if keys[2 * i] > best or (keys[2 * i] == best and keys[2 * i + 1] < column):
                    best, column = keys[2 * i], keys[2 * i + 1]
            cute.arch.sync_threads()
        if over.lane == 0:
            put(y, row, column)


@cute.jit
def order(x: cutlass.Float32):
    """An integer that orders numbers as they are: zeros are equal, NaN is above all."""
    bits = x.bitcast(Int32)
    magnitude = bits & Int32(0x7FFFFFFF)
    key = -magnitude if bits < 0 else magnitude
    return Int32(0x7FFFFFFF) if x != x else key
