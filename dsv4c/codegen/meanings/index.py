"""The indexer: scores over all entries, and the best of them."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Constexpr, Float32, Float64, Int32, Uint32, const_expr

from dsv4c.codegen.lib.sampler import order
from dsv4c.codegen.meanings.quant import exact
from dsv4c.codegen.meanings.values import Lines, Team, at, put, rounded, sums_before, total, wide


@cute.jit
def index_scores(
    team: Team,
    q: Constexpr,
    keys: Constexpr,
    weights: cute.Tensor,
    positions: cute.Tensor,
    slots: cute.Tensor,
    y: cute.Tensor,
    ratio: Constexpr[int],
):
    """A warp per score; bf16 weights mean that dots, products and the sum are each rounded to bf16."""
    rows, heads, width = q.shape
    entries = keys.shape[1]
    steps = BFloat16 if const_expr(weights.element_type is BFloat16) else Float64
    over = Lines(0, 1, team.thread % 32, 32, team)
    for i in cutlass.range(team.thread // 32, rows * entries, team.threads // 32):
        row, entry = i // entries, i % entries
        position = at(positions, row)
        score = Float32(-Float32.inf)
        if position >= 0 and entry < (position + 1) // ratio:
            own = Float64(0.0)
            for head in cutlass.range(heads):
                dot = Float64(0.0)
                for j in cutlass.range(over.lane, width, 32):
                    a = exact(q, row * heads + head, j)
                    dot = dot + a * exact(keys, at(slots, row) * entries + entry, j)
                dot = wide(rounded(total(dot, over), steps))
                dot = dot if dot > Float64(0.0) else Float64(0.0)
                own = own + wide(rounded(dot * wide(at(weights, row * heads + head)), steps))
            score = rounded(wide(rounded(own, steps)), Float32)
        if over.lane == 0:
            put(y, i, score)


@cute.jit
def top_k(team: Team, scores: cute.Tensor, y: cute.Tensor, k: Constexpr[int]):
    """The largest bound that enough keys reach, found bit by bit; then all keys above it and, of those equal
    to it, the first. One CTA.
    """
    rows, width = scores.shape
    each = y.shape[1]
    for row in cutlass.range(rows):
        bound = Uint32(0)
        for bit in cutlass.range(32):
            higher = bound | (Uint32(1) << (Uint32(31) - bit.to(Uint32)))
            own = Int32(0)
            for j in cutlass.range(team.thread, width, team.threads):
                if _key(scores, row * width + j) >= higher:
                    own = own + 1
            if _total(own, team) >= each:
                bound = higher
        above = Int32(0)
        for j in cutlass.range(team.thread, width, team.threads):
            if _key(scores, row * width + j) > bound:
                above = above + 1
        room = each - _total(above, team)  # for keys that equal the bound
        equal, found = Int32(0), Int32(0)  # so far
        for chunk in cutlass.range(-(-width // team.threads)):
            j = chunk * team.threads + team.thread
            key = Uint32(0)
            if j < width:
                key = _key(scores, row * width + j)
            same = Int32(1) if key == bound and key > Uint32(0) else Int32(0)
            before, equals = sums_before(same, Int32, team)
            chosen = Int32(1) if key > bound else Int32(0)
            chosen = Int32(1) if same == 1 and equal + before < room else chosen
            place, count = sums_before(chosen, Int32, team)
            if chosen == 1:
                put(y, row * each + found + place, j)
            equal, found = equal + equals, found + count
        for j in cutlass.range(team.thread, each, team.threads):
            if j >= found:
                put(y, row * each + j, Int32(-1))


@cute.jit
def _key(scores: cute.Tensor, i: Int32):
    """A number in the order of the scores; that of -inf, which is never chosen, is 0."""
    return (order(rounded(at(scores, i), Float32)) + Int32(0x7F800000)).bitcast(Uint32)


@cute.jit
def _total(own: Int32, team: Team):
    """Sum over all threads."""
    _, all_ = sums_before(own, Int32, team)
    return all_
