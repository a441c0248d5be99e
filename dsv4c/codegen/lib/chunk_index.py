"""Index scores of many tokens on wgmma (sm_90a): what `index` computes, a token's heads by 64 keys at a time.

Keys are the left operand, out of registers, expanded once for a CTA's tokens of their slot; the right one is
a token's queries in shared memory, rows of 128 swizzled bytes for half of the dimensions each. Dimensions
meet in the same order as in `index`, so that scores have its bits.
"""

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import BFloat16, Constexpr, Float32, Int32, Int64, Uint32, const_expr, range_constexpr
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.tensor_utils.layout import LayoutEnum

from dsv4c.codegen.lib import gemm, index, ptx
from dsv4c.codegen.lib.geometry import ChunkIndex
from dsv4c.codegen.lib.index import Operands


@cute.jit
def score_keys(x: Constexpr[ChunkIndex], m: Operands, s_all: Int32) -> None:
    """The scores of the visible keys of a CTA's tokens, of those that see more than k. All threads."""
    s = (s_all + 1023) & Int32(-1024)
    first = cute.arch.block_idx()[0] * x.TOKENS
    warp, lane = cute.arch.make_warp_uniform(cute.arch.warp_idx()), cute.arch.lane_idx()
    g_data = m.keys.toint()
    g_scale = Int64(0) if const_expr(m.keys_scale is None) else m.keys_scale.toint()
    frequency = ptx.ldg_f32_constant(m.frequencies.toint() + lane * 4)
    for item in cutlass.range(warp, x.TOKENS * x.groups, x.warps, unroll=1):
        token = cutlass.min(first + item // x.groups, Int32(x.rows - 1))
        position = ptx.ldg32(m.positions.toint() + token * 4).bitcast(Int32)
        s_turns = s + x.o_turns + warp * 256
        index.prepare_turns(s_turns, frequency, position, lane)
        lay_queries(x, s, s_turns, m.q.toint(), token, item, lane)
        lay_weights(x, s, m.weights.toint(), token, item, lane)
        cute.arch.sync_warp()
    ptx.fence_async()
    cute.arch.sync_threads()
    slots, seen = [], []
    for i in range_constexpr(x.TOKENS):
        token = cutlass.min(first + i, Int32(x.rows - 1))
        position = ptx.ldg32(m.positions.toint() + token * 4).bitcast(Int32)
        visible = cutlass.min((position + 1) // x.ratio, Int32(x.capacity))
        if visible <= x.k or first + i >= x.rows:
            visible = Int32(0)
        slots.append(cute.arch.make_warp_uniform(ptx.ldg32(m.slots.toint() + token * 4).bitcast(Int32)))
        seen.append(cute.arch.make_warp_uniform(visible))
    same, most = slots[0] == slots[0], seen[0]
    for i in range_constexpr(1, x.TOKENS):
        same = same and slots[i] == slots[0]
        most = cutlass.max(most, seen[i])
    if same:
        score_run(x, m, s, g_data, g_scale, slots[0], seen, most, first, 0, x.TOKENS, warp, lane)
    else:
        for i in range_constexpr(x.TOKENS):
            score_run(x, m, s, g_data, g_scale, slots[i], seen, seen[i], first, i, i + 1, warp, lane)


@cute.jit
def lay_queries(
    x: Constexpr[ChunkIndex],
    s: Int32,
    s_turns: Int32,
    g_q: Int64,
    token: Int32,
    item: Int32,
    lane: Int32,
):
    """Eight heads of a token as rows of the right operand: item = the CTA's token * groups + which eight."""
    fragments = index.prepare_heads(x, s_turns, g_q, token, item % x.groups, lane)
    row = lane // 4  # of eight
    s_row = s + item // x.groups * (x.heads * 256) + (item % x.groups * 8 + row) * 128 + lane % 4 * 4
    for w in range_constexpr(4):
        for n in range_constexpr(4):
            piece = const_expr(w % 2 * 4 + n)  # an MMA's 16 dimensions are two
            ptx.sts32(s_row + w // 2 * (x.heads * 128) + (piece ^ row) * 16, fragments[w, n])


@cute.jit
def lay_weights(x: Constexpr[ChunkIndex], s: Int32, g_weights: Int64, token: Int32, item: Int32, lane: Int32):
    """Weights of eight heads times `factor`: word q * groups + which eight is of heads 2q and 2q + 1."""
    if lane < 4:
        r = ptx.ldg32(g_weights + (token * x.heads + item % x.groups * 8 + lane * 2) * 2)
        if const_expr(x.factor != 1.0):
            lo, hi = ptx.bf16x2_to_f32x2(r)
            r = ptx.f32x2_to_bf16x2(lo * Float32(x.factor), hi * Float32(x.factor))
        s_word = s + x.o_weights + item // x.groups * (x.heads * 2) + (lane * x.groups + item % x.groups) * 4
        ptx.sts32(s_word, r)


@cute.jit
def score_run(
    x: Constexpr[ChunkIndex],
    m: Operands,
    s: Int32,
    g_data: Int64,
    g_scale: Int64,
    slot: Int32,
    seen: list,
    most: Int32,
    first: Int32,
    begin: Constexpr[int],
    end: Constexpr[int],
    warp: Int32,
    lane: Int32,
):
    """Scores of the CTA's tokens from `begin` to `end`, all of one slot, none of which sees more than `most`
    keys.
    """
    major = OperandMajorMode.K
    mma = sm90.make_trivial_tiled_mma(
        BFloat16,
        BFloat16,
        major,
        major,
        Float32,
        (1, 1, 1),
        (64, x.heads),
        a_source=warpgroup.OperandSource.RMEM,
    )
    shape = const_expr((64, x.heads, 64))
    stages = const_expr(2 * x.TOKENS)
    s_q = gemm.operand(BFloat16, s, sm90.make_smem_layout_b(LayoutEnum.ROW_MAJOR, shape, BFloat16, stages))
    left = mma.make_fragment_A(mma.partition_shape_A((64, 128)))
    right = mma.make_fragment_B(mma.get_slice(warp % 4 * 32 + lane).partition_B(s_q))
    words = cute.recast_tensor(left, Uint32)
    dots = cute.make_rmem_tensor(mma.partition_shape_C((64, x.heads)), Float32)
    keys = cute.make_rmem_tensor((1, 2, x.words), Uint32)
    keys.fill(0)
    own = warp * 16
    index.load_keys(x, keys, g_data, g_scale, slot, own, lane)
    for key in cutlass.range(0, most, x.keys, unroll=1):
        a = index.fragments(x, keys)
        for c in range_constexpr(8):
            for j in range_constexpr(4):
                words[4 * c + j] = a[0, c, j]
        index.load_keys(x, keys, g_data, g_scale, slot, key + x.keys + own, lane)
        for i in range_constexpr(begin, end):
            if key + warp // 4 * 64 < seen[i]:
                warpgroup.fence()
                mma.set(warpgroup.Field.ACCUMULATE, False)
                for c in range_constexpr(8):
                    b = right[None, None, c % 4, 2 * i + c // 4]
                    cute.gemm(mma, dots, left[None, None, c], b, dots)
                    mma.set(warpgroup.Field.ACCUMULATE, True)
                warpgroup.commit_group()
                weights = load_weights(x, s, i, lane)
                warpgroup.wait_group(0)
                total = add_heads(x, dots, weights)
                index.store_scores(x, total, m.scores.toint(), first + i, key + own, seen[i], lane)


@cute.jit
def load_weights(x: Constexpr[ChunkIndex], s: Int32, i: Constexpr[int], lane: Int32):
    """The lane's weights of the CTA's token `i`, bf16x2 [groups]."""
    weights = cute.make_rmem_tensor((x.groups,), Uint32)
    s_own = s + x.o_weights + i * (x.heads * 2) + lane % 4 * (x.groups * 4)
    for n in range_constexpr(x.groups // 4):
        r = ptx.lds128(s_own + 16 * n)
        for j in range_constexpr(4):
            weights[4 * n + j] = r[j]
    return weights


@cute.jit
def add_heads(x: Constexpr[ChunkIndex], dots: cute.Tensor, weights: cute.Tensor):
    """Scores [1][half] of the warp's keys g and 8 + g, rounded to bf16."""
    total = cute.make_rmem_tensor((1, 2), Float32)
    total.fill(0.0)
    for n in range_constexpr(x.groups):
        for half in range_constexpr(2):
            at = const_expr(4 * n + 2 * half)
            total[0, half] = total[0, half] + index.weigh(dots[at], dots[at + 1], weights[n])
    for half in range_constexpr(2):
        total[0, half] = ptx.round_bf16(ptx.lanes_sum(total[0, half], 4))
    return total
