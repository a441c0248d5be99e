"""The experts' first half of few tokens: they are chosen, and w1, w3 and SwiGLU make their hidden rows.

A job is a tile of w1 and the same of w3, of one expert and one token that chose it. CTAs of the shared expert
take its tiles for all tokens of a launch, others the routed experts' of a token, or of all, which take turns:
the stream of weights goes on from one to the next. A CTA's last warp reads the weights; where experts are
chosen by score, it chooses them, too, and where tokens take no turns CTAs have a job of the shared expert
first, whose weights are there when nobody knows yet what else to read.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, const_expr, range_constexpr

from dsv4c.codegen.lib import activations, nvfp4, ptx, router, stream, swiglu
from dsv4c.codegen.lib.shapes import Product, Up, UpPart


class Operands(NamedTuple):
    """x [N, hidden], bf16, FP8 or NVFP4. What experts are chosen by: logits f32[N, experts] and a bias
    f32[experts]; or a table i32[*, top_k] and tokens i32[N], and for their weights logits, or a row
    bf16[N, hidden] and a gate bf16[experts, hidden]. positions i32[N], where rows may not be there. w1, w3
    [experts, intermediate, hidden] and the shared expert's, with FP8 block scales or NVFP4 global scales ->
    experts i32[N, top_k], weights f32[N, top_k], h bf16[N, top_k, intermediate], shared_h
    bf16[N, intermediate].
    """

    x: cute.Pointer
    x_scale: cute.Pointer | None
    x_global_scale: cute.Pointer | None
    logits: cute.Pointer | None
    bias: cute.Pointer | None
    row: cute.Pointer | None
    gate: cute.Pointer | None
    table: cute.Pointer | None
    tokens: cute.Pointer | None
    positions: cute.Pointer | None
    w1: cute.Pointer
    w1_scale: cute.Pointer | None
    w1_global_scale: cute.Pointer | None
    w3: cute.Pointer
    w3_scale: cute.Pointer | None
    w3_global_scale: cute.Pointer | None
    shared_w1: cute.Pointer
    shared_w1_scale: cute.Pointer | None
    shared_w1_global_scale: cute.Pointer | None
    shared_w3: cute.Pointer
    shared_w3_scale: cute.Pointer | None
    shared_w3_global_scale: cute.Pointer | None
    experts: cute.Pointer
    weights: cute.Pointer | None
    h: cute.Pointer
    shared_h: cute.Pointer


class Arrays(NamedTuple):
    """Shared arrays of a CTA, as its part's `at` lays them out."""

    ring: Int32
    x: Int32
    fx: Int32
    scale: Int32
    part: Int32
    sums: Int32
    choice: Int32
    bars: Int32
    bar: Int32


class Place(NamedTuple):
    """What a thread works on: jobs local, local + CTAs of the part, ... of `token`, or of all. A token has so
    many for this CTA.
    """

    s: Arrays
    local: Int32
    token: Int32
    tid: Int32
    warp: Int32
    lane: Int32
    jobs: Int32


class Known(NamedTuple):
    """Experts that a table names, one a lane, and the first pieces of their rows of the gate."""

    expert: Int32
    rows: cute.Tensor | None


class Turns(NamedTuple):
    """Which tokens take a turn, as `router.rows_present` says, and how many."""

    order: Int32
    taken: Int32


class Weights(NamedTuple):
    """The warp that reads the weights: its arrays, and steps if no tokens take turns. w3 lies `apart` bytes
    behind w1.
    """

    ring: Int32
    bars: Int32
    part: Int32
    choice: Int32
    local: Int32
    token: Int32
    lane: Int32
    steps: Int32
    apart: Int64


def _arrays(part: UpPart, s: Int32) -> Arrays:
    return Arrays(*(s + getattr(part.at, name) for name in Arrays._fields))


@cute.jit
def _place(part: Constexpr[UpPart], s: Int32, local: Int32, token: Int32) -> Place:
    """Where this thread is."""
    tid, _, _ = cute.arch.thread_idx()
    lane = cute.arch.lane_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    return Place(_arrays(part, s), local, token, tid, warp, lane, _jobs(part, local))


def _shares(part: UpPart, local: Int32) -> bool:
    """Does CTA `local` have a job of the shared expert first?"""
    return local < part.sharing if part.sharing > 0 else False


@cute.jit
def _jobs(part: Constexpr[UpPart], local: Int32) -> Int32:
    """A CTA's jobs of a token."""
    alone = const_expr(part.ctas - part.sharing)
    jobs = part.fewer + (part.jobs - part.fewer * part.ctas + part.sharing + alone - 1 - local) // alone
    if _shares(part, local):
        jobs = Int32(part.fewer)
    return jobs


@cute.jit
def _job(part: Constexpr[UpPart], local: Int32, turn: Int32) -> Int32:
    """A CTA's job number `turn`: every so manieth, of those without jobs of the shared expert at the end."""
    job = local + turn * part.ctas
    if const_expr(part.sharing > 0):
        job = job - part.sharing * cutlass.max(turn + (1 - part.fewer), Int32(0))
    return job


@cute.jit
def _steps(part: Constexpr[UpPart], local: Int32) -> Int32:
    """Steps of its stream for them."""
    return _jobs(part, local) * part.ring.steps


# Rows -------------------------------------------------------------------------------------------------------


@cute.jit
def _stage(u: Constexpr[Up], p: Constexpr[Product], m: Operands, at: Place) -> None:
    """The token's row to shared memory, as the weights want it."""
    _expand(u, p, m, at, _load(u, p, m, at))


@cute.jit
def _load(u: Constexpr[Up], p: Constexpr[Product], m: Operands, at: Place) -> cute.Tensor | None:
    """The token's row on its way: to registers, or as it is to shared memory, by one warp."""
    codes = None
    g_x = m.x.toint() + Int64(at.token) * u.row_bytes
    if const_expr(p.x == "e4m3"):
        g_fx = m.x_scale.toint() + Int64(at.token) * (p.k // 128)
        if at.warp == 0:
            activations.copy_rows(p, at.s.x, at.s.fx, at.s.bar, g_x, g_fx, u.row_bytes, at.lane)
    elif const_expr(u.packed):
        g_fx = m.x_scale.toint() + Int64(at.token) * (p.k // 16)
        codes = nvfp4.load_packed(p, g_x, g_fx, u.row_bytes, at.tid, u.consumers)
    elif const_expr(p.x == "f16"):
        codes = activations.load_codes(p, g_x, u.row_bytes, at.tid, u.consumers)
    else:
        if at.warp == 0:
            activations.copy_rows(p, at.s.x, at.s.fx, at.s.bar, g_x, Int64(0), u.row_bytes, at.lane)
    return codes


@cute.jit
def _expand(
    u: Constexpr[Up], p: Constexpr[Product], m: Operands, at: Place, codes: cute.Tensor | None
) -> None:
    """What `_load` has in registers, to shared memory."""
    if const_expr(u.packed):
        g_gx = m.x_global_scale.toint() + Int64(at.token) * 4
        nvfp4.expand_rows(p, codes, at.s.x, at.s.fx, g_gx, u.row_bytes, at.tid, u.consumers)  # type: ignore[arg-type]
    elif const_expr(p.x == "f16"):
        g_fx = m.x_scale.toint() + Int64(at.token) * (p.k // 128)
        activations.expand_rows(p, codes, at.s.x, at.s.fx, g_fx, at.tid, u.consumers)  # type: ignore[arg-type]


# The shared expert ------------------------------------------------------------------------------------------


@cute.jit
def enter_shared(u: Constexpr[Up], m: Operands, s: Int32, local: Int32, token: Int32) -> Place:
    """Before the wait: its block scales."""
    part = u.shared
    r = part.ring
    at = _place(part, s, local, token)
    if const_expr(r.product.x != "f16"):
        ptx.open_barrier(at.s.bar, at.tid)
    ptx.meet(ptx.OPEN, u.threads)
    _shared_scales(u, m, at)
    return at


@cute.jit
def _shared_scales(u: Constexpr[Up], m: Operands, at: Place) -> None:
    """FP8 block scales of the CTA's jobs of the shared expert."""
    r = u.shared.ring
    if const_expr(r.product.weight == "fp8"):
        for n, g_scale in enumerate((m.shared_w1_scale.toint(), m.shared_w3_scale.toint())):
            s_matrix, ctas = at.s.scale + n * r.scale_bytes, Int32(u.shared.ctas)
            stream.load_block_scales(
                r, s_matrix, g_scale, at.local, ctas, Int32(u.tiles), at.tid, u.consumers
            )


@cute.jit
def multiply_shared(u: Constexpr[Up], m: Operands, at: Place) -> None:
    """Its hidden rows of all tokens of the launch."""
    p = u.shared.ring.product
    _stage(u, p, m, at)
    ptx.sync_threads(u.consumers)
    if const_expr(p.x != "f16"):
        activations.arrived(at.s.bar)
    _products(u, u.shared, m, at, at.jobs)


@cute.jit
def read_shared(u: Constexpr[Up], m: Operands, s: Int32, local: Int32) -> None:
    """Its weights into flight, whatever predecessors are at."""
    part = u.shared
    r = part.ring
    lane = cute.arch.lane_idx()
    s_ring, s_bars = s + part.at.ring, s + part.at.bars
    stream.open_ring(r, s_bars, lane)
    ptx.arrive(ptx.OPEN, u.threads)
    _read_shared(u, m, s_ring, s_bars, local, Int32(0), _steps(part, local), lane)


@cute.jit
def _read_shared(
    u: Constexpr[Up],
    m: Operands,
    s_ring: Int32,
    s_bars: Int32,
    local: Int32,
    first: Int32,
    last: Int32,
    lane: Int32,
) -> None:
    """Steps of the shared expert's weights into flight."""
    r = u.shared.ring
    apart = m.shared_w3.toint() - m.shared_w1.toint()
    g_lane = m.shared_w1.toint() + Int64(local + lane * u.shared.ctas) * r.group_bytes
    stream.produce(r, s_ring, s_bars, g_lane, apart, first, last, lane)


# On a CTA that has jobs of routed experts, too -------------------------------------------------------------


@cute.jit
def _beside(u: Constexpr[Up], at: Place) -> Place:
    """Where the shared expert's arrays are."""
    s, a = at.s.ring, u.both
    scale, part, bars = s + u.shared.ring.ring_bytes, s + a.shared_part, s + a.shared_bars
    return at._replace(s=at.s._replace(scale=scale, part=part, bars=bars), jobs=Int32(1))


@cute.jit
def _share(u: Constexpr[Up], m: Operands, at: Place) -> None:
    """The shared expert's job, with the row that is staged, while routed experts are being chosen."""
    ptx.sync_threads(u.consumers)
    if const_expr(u.shared.ring.product.x != "f16"):
        activations.arrived(at.s.bar)
    _products(u, u.shared, m, _beside(u, at), Int32(1))


# Routed experts: those who multiply -------------------------------------------------------------------------


@cute.jit
def enter(u: Constexpr[Up], m: Operands, s: Int32, local: Int32, token: Int32) -> Place:
    """Before the wait: biases of scores."""
    r = u.routed.ring
    at = _place(u.routed, s, local, Int32(0) if const_expr(r.turns > 1) else token)
    if const_expr(r.product.x != "f16"):
        ptx.open_barrier(at.s.bar, at.tid)
    ptx.meet(ptx.OPEN, u.threads)
    if const_expr(u.source == "scores"):
        router.stage_bias(at.s.part, m.bias.toint(), u.experts, u.padded, at.tid, u.consumers)
    if _shares(u.routed, local):
        _shared_scales(u, m, _beside(u, at))
    return at


@cute.jit
def look_up(u: Constexpr[Up], m: Operands, at: Place) -> Known:
    """The token's experts, as the table says, with FP8 block scales of their jobs: before the wait where the
    token is known.
    """
    expert = _table_experts(u, m, at.token, at.lane)
    if const_expr(u.routed.ring.product.weight == "fp8"):
        _block_scales(u, m, at, expert)
    return Known(expert, _early_rows(u, m, at, expert))


@cute.jit
def weigh(u: Constexpr[Up], m: Operands, at: Place, known: Known) -> None:
    """The token's row, and what its experts' weights are."""
    _stage(u, u.routed.ring.product, m, at)
    if const_expr(u.source == "rows"):
        _row_sums(u, m, at, known)
    ptx.sync_threads(u.consumers)
    if at.warp == 0:
        chosen = _scores(u, m, at, known.expert)
        router.keep_experts(at.s.choice, known.expert, u.top_k, at.lane)
        _keep_weights(u, m, at.s.choice, at.local, at.token, known.expert, chosen, at.lane)


@cute.jit
def score(u: Constexpr[Up], m: Operands, at: Place) -> Turns:
    """The token's scores, by which the warp that reads the weights chooses, and its row meanwhile; of tokens
    behind the first one the experts, by a warp each.
    """
    r = u.routed.ring
    turns = _turns(u, m)
    g_logits = m.logits.toint() + Int64(at.token) * (4 * u.experts)
    logits = router.load_logits(g_logits, u.experts, at.tid, u.consumers)
    codes = _load(u, r.product, m, at)
    router.stage_scores(at.s.part, logits, u.experts, u.padded, at.tid, u.consumers)
    ptx.arrive(ptx.SCORED, u.threads)
    _expand(u, r.product, m, at, codes)
    if const_expr(r.turns > 1):
        for n in range_constexpr((r.turns - 2 + r.warps) // r.warps):
            later = 1 + at.warp + n * r.warps
            if later < r.turns:
                _choose(u, m, at.s.choice + later * (8 * u.top_k), at.local, later, at.lane)
    if _shares(u.routed, at.local):
        _share(u, m, at)
    ptx.meet(ptx.CHOSEN, u.threads)
    if const_expr(r.product.weight == "fp8"):
        _block_scales(u, m, at, Int32(0))
        ptx.sync_threads(u.consumers)
    return turns


@cute.jit
def look_up_all(u: Constexpr[Up], m: Operands, at: Place) -> Turns:
    """All tokens' experts, as the table says, and their weights, a token a warp; the first row meanwhile."""
    r, p = u.routed.ring, u.routed.ring.product
    turns = _turns(u, m)
    codes = _load(u, p, m, at)
    for n in range_constexpr((r.turns - 1 + r.warps) // r.warps):
        token = at.warp + n * r.warps
        if token < r.turns:
            expert = _table_experts(u, m, token, at.lane)
            s_choice = at.s.choice + token * (8 * u.top_k)
            router.keep_experts(s_choice, expert, u.top_k, at.lane)
            chosen = _scores(u, m, at._replace(token=token), expert)
            _keep_weights(u, m, s_choice, at.local, token, expert, chosen, at.lane)
    _expand(u, p, m, at, codes)
    ptx.sync_threads(u.consumers)
    return turns


@cute.jit
def multiply(u: Constexpr[Up], m: Operands, at: Place) -> None:
    """The token's hidden rows, of its experts."""
    if const_expr(u.routed.ring.product.x != "f16"):
        activations.arrived(at.s.bar)
    _products(u, u.routed, m, at, at.jobs)


@cute.jit
def take_turns(u: Constexpr[Up], m: Operands, at: Place, turns: Turns) -> None:
    """The tokens' hidden rows, one token after the other; zeros of those that take no turn."""
    if const_expr(u.skips):
        for nth in cutlass.range(turns.taken, unroll=1):
            _token_jobs(u, m, at, nth, router.nth_row(turns.order, nth))
        zero, g_h, size = Uint32(0), m.h.toint(), const_expr(u.top_k * u.intermediate)
        for row in cutlass.range(1, u.routed.ring.turns, unroll=1):
            if ptx.ldg32(m.positions.toint() + row * 4).to(Int32) < 0:
                first, step = at.local * u.consumers + at.tid, const_expr(u.routed.ctas * u.consumers)
                for piece in cutlass.range(first, size // 8, step):
                    ptx.stg128(g_h + Int64(row * (size * 2) + piece * 16), zero, zero, zero, zero)
    else:
        for turn in cutlass.range(u.routed.ring.turns, unroll=1):
            _token_jobs(u, m, at, turn, turn)


@cute.jit
def _token_jobs(u: Constexpr[Up], m: Operands, at: Place, nth: Int32, token: Int32) -> None:
    """The CTA's jobs of the nth token that takes a turn: some of local, local + CTAs, ... of all tokens'."""
    part, r = u.routed, u.routed.ring
    at = _place(part, at.s.ring, at.local, token)
    at = at._replace(s=at.s._replace(choice=at.s.choice + token * (8 * u.top_k)))
    if token > 0:  # the first one is there
        _stage(u, r.product, m, at)
    ptx.sync_threads(u.consumers)
    begin = (nth * part.jobs + (part.ctas - 1) - at.local) // part.ctas
    rounds = (nth * part.jobs + (part.jobs + part.ctas - 1) - at.local) // part.ctas - begin
    _products(u, part, m, at, rounds, nth, begin)


@cute.jit
def _products(
    u: Constexpr[Up],
    part: Constexpr[UpPart],
    m: Operands,
    at: Place,
    rounds: Int32,
    nth: Int32 | int = 0,
    begin: Int32 | int = 0,
) -> None:
    """So many rounds' products, from round `begin` of the stream on: the nth token's. Then SwiGLU."""
    r, s, tid = part.ring, at.s, at.tid
    many, routed, rows = const_expr(r.turns > 1), const_expr(part == u.routed), r.product.rows
    s_block = s.scale
    if const_expr(r.product.weight == "fp8"):
        s_block = s.scale + (at.warp // (r.warps // 2)) * r.scale_bytes
    first = begin * r.steps
    stream.consume(r, s.ring, s.bars, s.x, s.fx, s_block, s.part, at.warp, at.lane, rounds, first=first)
    ptx.sync_threads(u.consumers)

    # SwiGLU.
    for n in range_constexpr(-(-r.rounds * rows * 16 // u.consumers)):
        i = tid + n * u.consumers
        turn, row, column = i // (rows * 16), i // 16 % rows, i % 16
        if const_expr(many):
            job = at.local + (begin + turn) * part.ctas - nth * part.jobs
        else:
            job = _job(part, at.local, turn)
        if turn < r.rounds and turn < rounds:
            zero = Int32(0)
            gate = stream.tile_sum(r, s.part, turn, zero, zero, row, column)
            up = stream.tile_sum(r, s.part, turn, Int32(1), zero, row, column)
            if const_expr(routed):
                s_slot = s.choice + job // u.tiles * 4
                route = ptx.lds_f32(s_slot + 4 * u.top_k)
                if const_expr(r.product.weight == "nvfp4"):
                    at_expert = ptx.lds32(s_slot).to(Int64) * 4
                    gate = gate * ptx.ldg_f32_constant(m.w1_global_scale.toint() + at_expert)
                    up = up * ptx.ldg_f32_constant(m.w3_global_scale.toint() + at_expert)
                value = swiglu.swiglu(gate, up, u.limit, route)
                place = at.token * u.top_k + job // u.tiles
                g_h = m.h.toint() + (Int64(place) * u.intermediate + job % u.tiles * 16 + column) * 2
            else:
                if const_expr(r.product.weight == "nvfp4"):
                    gate = gate * ptx.ldg_f32_constant(m.shared_w1_global_scale.toint())
                    up = up * ptx.ldg_f32_constant(m.shared_w3_global_scale.toint())
                value = swiglu.swiglu(gate, up, u.limit, Float32(1.0))
                g_h = m.shared_h.toint() + (Int64(at.token + row) * u.intermediate + job * 16 + column) * 2
            ptx.stg16(g_h, ptx.f32x2_to_bf16x2(value, value))


# The choice -------------------------------------------------------------------------------------------------


@cute.jit
def _turns(u: Constexpr[Up], m: Operands) -> Turns:
    """Which tokens take one: all, unless rows may not be there."""
    order, count = Int32(0), Int32(u.routed.ring.turns)
    if const_expr(u.skips):
        order, count = router.rows_present(m.positions.toint(), u.routed.ring.turns)
    return Turns(order, count)


@cute.jit
def _table_experts(u: Constexpr[Up], m: Operands, token: Int32, lane: Int32) -> Int32:
    """Lane i's is expert i, as the table says."""
    id = ptx.ldg32(m.tokens.toint() + token * 4).to(Int64)
    return router.table_experts(m.table.toint() + id * (4 * u.top_k), u.top_k, lane)


@cute.jit
def _early_rows(u: Constexpr[Up], m: Operands, at: Place, expert: Int32) -> cute.Tensor | None:
    """The first pieces of the experts' rows of the gate on their way, if these give the scores."""
    rows = None
    if const_expr(u.source == "rows"):
        hidden, threads = u.hidden, u.consumers
        rows = router.early_rows(m.gate.toint(), expert, hidden, u.top_k, u.held, at.tid, threads)
    return rows


@cute.jit
def _row_sums(u: Constexpr[Up], m: Operands, at: Place, known: Known) -> None:
    """The warp's parts of the token's row times those of the gate."""
    g_row, g_gate, k = m.row.toint() + Int64(at.token) * (2 * u.hidden), m.gate.toint(), u.top_k
    sums = router.row_sums(
        g_row,
        g_gate,
        known.rows,  # type: ignore[arg-type]
        known.expert,
        u.hidden,
        k,
        u.held,
        at.tid,
        u.consumers,
        at.lane,
    )
    router.share_sums(at.s.sums, sums, k, at.warp, at.lane)


@cute.jit
def _scores(u: Constexpr[Up], m: Operands, at: Place, expert: Int32) -> Float32:
    """The score of the lane's expert."""
    if const_expr(u.source == "rows"):
        return router.sum_scores(at.s.sums, u.top_k, u.routed.ring.warps, at.lane)
    g_logits = m.logits.toint() + Int64(at.token) * (4 * u.experts)
    return router.logit_scores(g_logits, expert, u.top_k, at.lane)


@cute.jit
def _choose(u: Constexpr[Up], m: Operands, s_choice: Int32, local: Int32, token: Int32, lane: Int32) -> None:
    """The token's experts and their weights, by one warp."""
    g_logits = m.logits.toint() + Int64(token) * (4 * u.experts)
    bias, k = m.bias.toint(), u.top_k
    expert, chosen = router.choose_experts(g_logits, bias, u.experts, u.padded, k, lane)
    router.keep_experts(s_choice, expert, k, lane)
    _keep_weights(u, m, s_choice, local, token, expert, chosen, lane)


@cute.jit
def _keep_weights(
    u: Constexpr[Up],
    m: Operands,
    s_choice: Int32,
    local: Int32,
    token: Int32,
    expert: Int32,
    chosen: Float32,
    lane: Int32,
) -> None:
    """The weights of the token's experts, out of their scores; by the first CTA to memory, too."""
    weight = router.keep_weights(s_choice, chosen, u.top_k, u.factor, lane)
    if const_expr(u.judged):
        position = ptx.ldg32(m.positions.toint() + token * 4).to(Int32)
        weight = router.drop_weights(s_choice, weight, u.top_k, position, lane)
    if local == 0 and lane < u.top_k:
        g_slot = Int64(token * u.top_k + lane) * 4
        ptx.stg32(m.experts.toint() + g_slot, expert.bitcast(Uint32))
        if const_expr(u.stored):
            ptx.stg_f32(m.weights.toint() + g_slot, weight)


@cute.jit
def _block_scales(u: Constexpr[Up], m: Operands, at: Place, expert: Int32) -> None:
    """FP8 block scales of the CTA's jobs; by a table lane i has expert i, else shared memory."""
    part, r = u.routed, u.routed.ring
    blocks = const_expr(-(-u.intermediate // 128) * r.product.units)
    for i in range_constexpr(r.rounds):
        job = cutlass.min(_job(part, at.local, Int32(i)), Int32(part.jobs - 1))
        if const_expr(u.source == "scores"):
            number = ptx.lds32(at.s.choice + job // u.tiles * 4).to(Int64)
        else:
            number = cute.arch.shuffle_sync(expert, job // u.tiles).to(Int64)
        block_scales = number * blocks
        for n, g_scale in enumerate((m.w1_scale.toint(), m.w3_scale.toint())):
            s_tile = at.s.scale + n * r.scale_bytes + i * (r.product.units * 4)
            g_tile, tile = g_scale + block_scales, job % u.tiles
            stream.load_tile_scales(r.product, s_tile, g_tile, tile, at.tid, u.consumers)


# Routed experts: the warp that reads the weights ------------------------------------------------------------


@cute.jit
def open_weights(u: Constexpr[Up], m: Operands, s: Int32, local: Int32, token: Int32) -> Weights:
    """Its ring."""
    r, at = u.routed.ring, u.routed.at
    lane = cute.arch.lane_idx()
    s_ring, s_bars, s_part, s_choice = s + at.ring, s + at.bars, s + at.part, s + at.choice
    stream.open_ring(r, s_bars, lane)
    if const_expr(u.joined):
        stream.open_ring(u.shared.ring, s + u.both.shared_bars, lane)
    ptx.arrive(ptx.OPEN, u.threads)
    if _shares(u.routed, local):
        depth = Int32(u.shared.ring.depth)
        _read_shared(u, m, s_ring, s + u.both.shared_bars, local, Int32(0), depth, lane)
    steps, first = Int32(0), Int32(0)
    if const_expr(r.turns == 1):
        steps, first = _steps(u.routed, local), token
    apart = m.w3.toint() - m.w1.toint()
    return Weights(s_ring, s_bars, s_part, s_choice, local, first, lane, steps, apart)


@cute.jit
def read_weights(u: Constexpr[Up], m: Operands, at: Weights) -> None:
    """The token's experts' weights into flight, and those of the tokens behind it. Chosen by score, they are
    chosen here: the first ones are on their way when the others hear of it.
    """
    part, r, lane, steps = u.routed, u.routed.ring, at.lane, at.steps
    if const_expr(u.source == "scores"):
        ptx.meet(ptx.SCORED, u.threads)
        expert, chosen = router.top_experts(at.part, u.padded, u.top_k, lane)
        g_lane = _tiles(u, m, expert, _job(part, at.local, lane))
        if const_expr(r.turns > 1):
            steps = _steps(part, at.local)
        first = cutlass.min(steps, Int32(r.ahead))
        if _shares(part, at.local):
            first = Int32(0)
        stream.produce(r, at.ring, at.bars, g_lane, at.apart, Int32(0), first, lane)
        router.keep_experts(at.choice, expert, u.top_k, lane)
        _keep_weights(u, m, at.choice, at.local, at.token, expert, chosen, lane)
        if const_expr(r.turns > 1):
            ptx.meet(ptx.CHOSEN, u.threads)  # the others have chosen, too
        else:
            ptx.arrive(ptx.CHOSEN, u.threads)
        if _shares(part, at.local):
            shared, s_bars = u.shared.ring, at.ring + u.both.shared_bars
            depth, last = Int32(shared.depth), Int32(shared.steps)
            _read_shared(u, m, at.ring, s_bars, at.local, depth, last, lane)
            stream.drained(shared, s_bars, lane)
        stream.produce(r, at.ring, at.bars, g_lane, at.apart, first, steps, lane)
        if const_expr(r.turns > 1):
            _read_turns(u, m, at, 1, steps // r.steps)
    elif const_expr(r.turns > 1):
        _read_turns(u, m, at, 0, Int32(0))
    else:
        expert = _table_experts(u, m, at.token, lane)
        g_lane = _tiles(u, m, expert, _job(part, at.local, lane))
        stream.produce(r, at.ring, at.bars, g_lane, at.apart, Int32(0), steps, lane)


@cute.jit
def _read_turns(u: Constexpr[Up], m: Operands, at: Weights, first: Constexpr[int], begin: Int32) -> None:
    """The weights of tokens from the `first` that takes a turn on, whose jobs begin with round `begin`."""
    part, r, lane = u.routed, u.routed.ring, at.lane
    turns = _turns(u, m)
    for turn in cutlass.range(first, turns.taken if const_expr(u.skips) else r.turns, unroll=1):
        row = router.nth_row(turns.order, turn) if const_expr(u.skips) else turn
        if const_expr(u.source == "scores"):
            s_mine = at.choice + row * (8 * u.top_k) + cutlass.min(lane, Int32(u.top_k - 1)) * 4
            expert = ptx.lds32(s_mine).to(Int32)
        else:
            expert = _table_experts(u, m, row, lane)
        # Lane (begin + i) % 32 holds where round begin + i starts.
        end = (turn * part.jobs + (part.jobs + part.ctas - 1) - at.local) // part.ctas
        ahead = (lane - begin) & 31
        g_lane = _tiles(u, m, expert, at.local + (begin + ahead) * part.ctas - turn * part.jobs)
        stream.produce(r, at.ring, at.bars, g_lane, at.apart, begin * r.steps, end * r.steps, lane)
        begin = end


@cute.jit
def _tiles(u: Constexpr[Up], m: Operands, expert: Int32, job: Int32) -> Int64:
    """Where the lane's job has its tile of w1; lane i has expert i."""
    job = cutlass.min(job, Int32(u.routed.jobs - 1))
    tile = cute.arch.shuffle_sync(expert, job // u.tiles).to(Int64) * u.tiles + job % u.tiles
    return m.w1.toint() + tile * u.routed.ring.group_bytes
