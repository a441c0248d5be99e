"""The kernels of greedy_head: logits and the best column of each CTA, then the best of all."""

from dsv4c_greedy_head import GreedyHead

from dsv4c.codegen.emit import Emission, Parameter, host
from dsv4c.codegen.registry import Answer, No, Request, Scratch, kernel, launchable, takes
from dsv4c.types import BF16, F32

WARPS = 8

HEADER = """
import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32, range_constexpr

from dsv4c.codegen.lib import head, ptx
"""

LOGITS = '''"""Logits of {rows} rows, a column of the head per warp, and the best column of each CTA.

m_x: bf16[{rows},{hidden}], m_head: bf16[{columns},{hidden}]
m_logits: f32[{rows},{columns}]
m_best: u64[{rows},{ctas}], a key per CTA: the logit's order above the column's complement
Launch: {ctas} CTAs x {threads} threads; reads {nbytes} B, {floor:.2f} us at the read bandwidth of the {gpu}.
"""
{header}
THREADS = {threads}


@cute.kernel
def kernel(
    m_x: cute.Pointer,
    m_head: cute.Pointer,
    m_logits: cute.Pointer,
    m_best: cute.Pointer,
):
    ptx.launch_dependents()
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    lane = cute.arch.lane_idx()
    s_best = ptx.shared({shared})
    column = block * {warps} + warp
    g_head = m_head.toint() + Int64(column) * {row_bytes} + lane * 16
    g_x = m_x.toint() + lane * 16
    sums = cute.make_rmem_tensor(({rows},), Float32)
    for row in range_constexpr({rows}):
        sums[row] = Float32(0.0)
    ptx.wait()
    for step in cutlass.range({steps}, unroll=4):
        w = ptx.ldg128(g_head + step * 512)
        for row in range_constexpr({rows}):
            x = ptx.ldg128(g_x + row * {row_bytes} + step * 512)
            for j in range_constexpr(4):
                w0, w1 = ptx.bf16x2_to_f32x2(w[j])
                x0, x1 = ptx.bf16x2_to_f32x2(x[j])
                sums[row] = sums[row] + w0 * x0 + w1 * x1
    for row in range_constexpr({rows}):
        logit = ptx.lanes_sum(sums[row], 32)
        if lane == 0:
            ptx.stg_f32(m_logits.toint() + (Int64(row * {columns}) + column) * 4, logit)
        key = head.logit_order(logit), ~Uint32(column)
        high, low = head.block_max(s_best + row * {warps} * 8, key[0], key[1], {warps}, warp, lane)
        if thread == 0:
            ptx.stg64(m_best.toint() + (Int64(row * {ctas}) + block) * 8, high, low)


'''

CHOICE = '''"""The next token of each row: the best of {ctas} keys.

m_best: u64[N,{ctas}], m_token: i32[N]
Launch: a CTA of {threads} threads per row; reads {nbytes} B each.
"""
{header}
THREADS = {threads}


@cute.kernel
def kernel(
    m_best: cute.Pointer,
    m_token: cute.Pointer,
):
    ptx.launch_dependents()
    thread, _, _ = cute.arch.thread_idx()
    row, _, _ = cute.arch.block_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    lane = cute.arch.lane_idx()
    s_best = ptx.shared({shared})
    high = Uint32(0)
    low = Uint32(0)
    ptx.wait()
    for step in range_constexpr({steps}):
        i = thread + step * THREADS
        if i < {ctas}:
            other_high, other_low = ptx.ldg64(m_best.toint() + (Int64(row) * {ctas} + i) * 8)
            high, low = head.larger(high, low, other_high, other_low)
    high, low = head.block_max(s_best, high, low, {warps}, warp, lane)
    if thread == 0:
        ptx.stg32(m_token.toint() + row * 4, ~low)


'''


@kernel(takes(GreedyHead, "out"))
def greedy_head(request: Request) -> Answer:
    call = request.call
    x, head = (request.types[i] for i in call.inputs)
    (rows, hidden), columns = x.shape, head.shape[0]
    if x.dtype is not BF16 or head.dtype is not BF16 or call.op.out is not F32:
        return No(f"multiplies bf16 with bf16 to f32, not {x} with {head}")
    if hidden % 256 or columns % WARPS:
        return No(f"takes columns of 256 n numbers, {WARPS} at a time, not {head}")
    ctas = columns // WARPS
    facts = {
        "rows": rows,
        "hidden": hidden,
        "columns": columns,
        "ctas": ctas,
        "warps": WARPS,
        "threads": 32 * WARPS,
        "row_bytes": 2 * hidden,
        "gpu": request.arch.gpu,
        "header": HEADER,
    }
    nbytes, shared = head.nbytes + x.nbytes, rows * WARPS * 8
    first = ("x", "head", "logits", "best")
    floor, steps = request.arch.floor_us(nbytes), hidden // 256
    text = LOGITS.format(**facts, nbytes=nbytes, shared=shared, floor=floor, steps=steps)
    text += host("greedy_logits", [f"m_{name}" for name in first], [ctas, 1, 1])
    logits = Emission("greedy_logits_0", text, (ctas, 1, 1), 32 * WARPS, shared, tuple(map(Parameter, first)))

    steps = -(-ctas // (32 * WARPS))
    text = CHOICE.format(**facts, nbytes=8 * ctas, shared=WARPS * 8, steps=steps)
    text += host("greedy_choice", ["m_best", "m_token"], ["rows", 1, 1])
    parameters = (Parameter("best"), Parameter("token"))
    choice = Emission("greedy_choice_0", text, (rows, 1, 1), 32 * WARPS, WARPS * 8, parameters)

    values = {
        **call.operands,
        **{name: call.made[i] for i, name in enumerate(("token", "logits")) if i in call.made},
    }
    best = rows * ctas * 8
    written, read = Scratch("best", best, "w"), Scratch("best", best, "r")
    return [
        launchable(request, logits, values, stage="logits", scratch={"best": written}),
        launchable(request, choice, values, stage="choice", scratch={"best": read}),
    ]
