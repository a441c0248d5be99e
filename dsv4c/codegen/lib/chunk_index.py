"""Index scores of many tokens on wgmma (sm_90a): keys in registers by the queries of neighboring tokens.

A warpgroup has 64 keys as rows of the first operand, expanded once for all tokens of its CTA, and every head
of a token as a column: each key's sum over heads is added up in the order of `index.score`. Tokens of other
slots than the first's get keys of their own.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import BFloat16, Constexpr, Float32, Int32, Int64, Uint32, const_expr, range_constexpr
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.tensor_utils.layout import LayoutEnum

from dsv4c.codegen.lib import gemm, index, ptx
from dsv4c.codegen.lib.geometry import IndexChunk
from dsv4c.codegen.lib.index import Operands


class Place(NamedTuple):
    """Where a thread works: on keys `first` and on, every `stride`, of `tokens` tokens; the frequency of its
    pair.
    """

    thread: Int32
    warp: Int32
    lane: Int32
    token: Int32
    first: Int32
    stride: Int32
    frequency: Float32


@cute.jit
def enter(x: Constexpr[IndexChunk], m: Operands) -> Place:
    """Of a grid of (parts, groups of tokens): the last, which see most, begin first. Frequencies are
    constants.
    """
    thread, _, _ = cute.arch.thread_idx()
    part, group, _ = cute.arch.block_idx()
    parts, groups, _ = cute.arch.grid_dim()
    warp, lane = cute.arch.make_warp_uniform(cute.arch.warp_idx()), cute.arch.lane_idx()
    frequency = ptx.ldg_f32_constant(m.frequencies.toint() + lane * 4)
    token = (groups - 1 - group) * x.tokens
    return Place(thread, warp, lane, token, part * x.index.keys, parts * x.index.keys, frequency)


@cute.jit
def score_keys(x: Constexpr[IndexChunk], m: Operands, s: Int32, at: Place) -> None:
    """The scores of the tokens' visible keys, of each that sees more than k."""
    i = x.index
    g_data = m.keys.toint()
    g_scale = Int64(0) if const_expr(m.keys_scale is None) else m.keys_scale.toint()
    share = const_expr(i.warps // x.tokens)  # warps that prepare a token's queries
    own = at.warp // share
    position, slot = Int32(-1), Int32(-1)
    if at.token + own < x.rows:
        position = ptx.ldg32(m.positions.toint() + (at.token + own) * 4).bitcast(Int32)
        slot = ptx.ldg32(m.slots.toint() + (at.token + own) * 4).bitcast(Int32)
    visible = cutlass.min((position + 1) // i.ratio, Int32(i.capacity))
    visible = visible if visible > i.k else Int32(0)
    if at.warp % share == 0 and at.lane == 0:
        ptx.sts64(s + x.o_seen + own * 8, slot.bitcast(Uint32), visible.bitcast(Uint32))
    if at.first < visible:
        s_turns = s + x.o_turns + at.warp * 256
        index.prepare_turns(s_turns, at.frequency, position, at.lane)
        for eight in cutlass.range(at.warp % share, i.heads // 8, share, unroll=1):
            lay_queries(x, s + own * x.query, s_turns, m.q.toint(), at.token + own, eight, at.lane)
        if at.warp % share == 0 and at.lane < i.heads // 2:
            at_weight = (own * i.heads + 2 * at.lane) * 2
            g_weight = m.weights.toint() + at.token * (i.heads * 2) + at_weight
            ptx.sts32(s + x.o_weights + at_weight, index.load_weight(g_weight, i.factor))
    ptx.fence_async()
    cute.arch.sync_threads()
    for token in cutlass.range(x.tokens, unroll=1):
        keys_slot, end = find_keys(x, s, token)
        score_slot(x, m, s, at, g_data, g_scale, keys_slot, end)


@cute.jit
def find_keys(x: Constexpr[IndexChunk], s: Int32, token: Int32):
    """A token's slot, and how many of its keys the CTA's tokens see; none if an earlier one has this slot."""
    slot = ptx.lds32(s + x.o_seen + token * 8).bitcast(Int32)
    end = Int32(0)
    earlier = Int32(0)
    for n in range_constexpr(x.tokens):
        other = ptx.lds64(s + x.o_seen + n * 8)
        if other[0].bitcast(Int32) == slot:
            end = cutlass.max(end, other[1].bitcast(Int32))
            if n < token:
                earlier = Int32(1)
    if earlier > 0:
        end = Int32(0)
    return slot, end


@cute.jit
def lay_queries(
    x: Constexpr[IndexChunk],
    s_query: Int32,
    s_turns: Int32,
    g_q: Int64,
    token: Int32,
    eight: Int32,
    lane: Int32,
):
    """Heads 8 * eight.. of a token to its rows of 64 columns, in the order of keys' fragments: a quad writes
    pieces of 16 bytes, eight swizzled to a line.
    """
    words = index.query_words(x.index, s_turns, g_q, token, eight, lane)
    line = s_query + (eight * 8 + lane // 4) * 128 + lane % 4 * 4
    for n in range_constexpr(16):
        piece = n % 8 ^ lane // 4
        ptx.sts32(line + n // 8 * (x.query // 2) + piece * 16, words[n])


@cute.jit
def score_slot(
    x: Constexpr[IndexChunk],
    m: Operands,
    s: Int32,
    at: Place,
    g_data: Int64,
    g_scale: Int64,
    slot: Int32,
    end: Int32,
) -> None:
    """The scores of up to `end` keys of a slot, of its tokens."""
    i = x.index
    k_major = OperandMajorMode.K
    types = BFloat16, BFloat16, k_major, k_major, Float32, (1, 1, 1), (64, i.heads)
    first, more = (
        sm90.make_trivial_tiled_mma(*types, a_source=warpgroup.OperandSource.RMEM) for _ in range(2)
    )
    first.set(warpgroup.Field.ACCUMULATE, False)
    more.set(warpgroup.Field.ACCUMULATE, True)
    queries = sm90.make_smem_layout_b(LayoutEnum.ROW_MAJOR, (64, i.heads, 128), BFloat16, x.tokens)
    own = first.get_slice(at.thread % 128)
    b = first.make_fragment_B(own.partition_B(gemm.operand(BFloat16, s, queries)))
    a = first.make_fragment_A(first.partition_shape_A((64, 128)))
    words = cute.make_tensor(cute.recast_ptr(a.iterator, dtype=Uint32), cute.make_layout(32))
    dots = cute.make_rmem_tensor(first.partition_shape_C((64, i.heads)), Float32)
    raw = cute.make_rmem_tensor((1, 2, i.words), Uint32)
    raw.fill(0)
    rows = at.warp * 16
    if at.first < end:
        index.load_keys(i, raw, g_data, g_scale, slot, at.first + rows, at.lane)
    for key in cutlass.range(at.first, end, at.stride, unroll=1):
        expanded = index.fragments(i, raw)
        for c in range_constexpr(8):
            for n in range_constexpr(4):
                words[4 * c + n] = expanded[0, c, n]
        index.load_keys(i, raw, g_data, g_scale, slot, key + at.stride + rows, at.lane)
        for token in cutlass.range(x.tokens, unroll=1):
            seen = ptx.lds64(s + x.o_seen + token * 8)
            visible = seen[1].bitcast(Int32) if seen[0].bitcast(Int32) == slot else Int32(0)
            if key + at.warp // 4 * 64 < visible:
                warpgroup.fence()
                for c in range_constexpr(8):
                    cute.gemm((first, more)[min(c, 1)], dots, a[None, None, c], b[None, None, c, token], dots)
                warpgroup.commit_group()
                warpgroup.wait_group(0)
                total = add_heads(x, s + x.o_weights + token * (i.heads * 2), dots, at.lane)
                index.store_scores(i, total, m.scores.toint(), at.token + token, key + rows, visible, at.lane)


@cute.jit
def add_heads(x: Constexpr[IndexChunk], s_weights: Int32, dots: cute.Tensor, lane: Int32):
    """Scores [1][i] of keys 8i + g of the warp, from their dots with each head."""
    total = cute.make_rmem_tensor((1, 2), Float32)
    total.fill(0.0)
    for n in range_constexpr(x.index.heads // 8):
        weights = ptx.lds32(s_weights + (8 * n + lane % 4 * 2) * 2)
        for i in range_constexpr(2):
            total[0, i] = total[0, i] + index.weighted(dots[4 * n + 2 * i], dots[4 * n + 2 * i + 1], weights)
    for i in range_constexpr(2):
        total[0, i] = ptx.round_bf16(ptx.lanes_sum(total[0, i], 4))
    return total
