"""What surrounds products of many rows: FP8 codes of rows, the choice of experts, rows listed by expert, and
the sum over experts. Small kernels, each a few lines over `lib`.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping

from dsv4c.codegen.emit import Emission, Parameter, render
from dsv4c.errors import BuildError

QUANTIZERS, LISTERS, SUMMERS, CHOOSERS = 256, 256, 256, 128  # threads


def _emit(
    name: str,
    what: str,
    operands: Mapping[str, str],
    grid: int,
    threads: int,
    body: str,
    each: int = 1,
    shared: int = 0,
) -> Emission:
    """A kernel whose `body` is given; operands "x.scale" are components."""
    split = (operand.partition(".") for operand in operands)
    parameters = tuple(Parameter(name, component or "data") for name, _, component in split)
    counted = "lengths" in operands
    text = textwrap.indent(textwrap.dedent(body).strip("\n"), "    ")
    numbers = [n for n in ("Int32", "Int64", "Uint32") if re.search(rf"\b{n}\b", text)]
    libs = sorted({"ptx", *(m for m in ("chunk_rows", "gemm", "router") if f"{m}." in text)})
    source = render(
        "chunk_rows.py.jinja",
        name=name,
        what=what,
        signature="\n".join(f"m_{o.replace('.', '_')}: {t}" for o, t in operands.items()),
        counted=counted,
        each=each,
        grid=grid,
        threads=threads,
        body=text,
        numbers=numbers,
        libs=libs,
        pointers=[p.name for p in parameters],
    )
    return Emission(f"{name}_0", source, (grid, 1, 1), threads, shared, parameters)


def _counted(counted: bool) -> dict[str, str]:
    return {"lengths": "i32[1]"} if counted else {}


def emit_quantize_fp8(name: str, rows: int, k: int, each: int = 1, counted: bool = False) -> Emission:
    """x bf16[rows, k] -> q FP8 in blocks of 128; `each` rows per counted one."""
    blocks, per = rows * k // 128, QUANTIZERS // 16
    if k % 128:
        raise BuildError(f"{name}: rows of {k}: want a multiple of 128")
    limit = f"Int32(ptx.ldg32(m_lengths.toint())) * {each * k // 128}" if counted else f"Int32({blocks})"
    body = f"""
    ptx.wait()
    own = block * {per} + thread // 16
    if own < {limit}:
        g_codes, g_scales = m_q.toint(), m_q_scale.toint()
        chunk_rows.quantize_block(m_x.toint(), g_codes, g_scales, Int64(own), thread % 32)
    """
    operands = {"x": f"bf16[{rows},{k}]", "q": f"q[e4m3,ue8m0,1x128][{rows},{k}]", "q.scale": "its scales"}
    what = "rows to FP8, a half-warp to a block of 128."
    return _emit(name, what, operands | _counted(counted), -(-blocks // per), QUANTIZERS, body, each)


def emit_norm_quantize_fp8(name: str, rows: int, k: int, eps: float, counted: bool = False) -> Emission:
    """fp8(rms_norm(x) under an f32 gain), a CTA per row."""
    if k % 256 or k // 8 > 1024:
        raise BuildError(f"{name}: rows of {k}: want a multiple of 256 up to 8192")
    limit = "Int32(ptx.ldg32(m_lengths.toint()))" if counted else f"Int32({rows})"
    body = f"""
    s = ptx.shared({k // 128 * 4})
    ptx.wait()
    if block < {limit}:
        chunk_rows.normalize_quantize(
            s,
            m_x.toint(),
            m_gain.toint(),
            m_q.toint(),
            m_q_scale.toint(),
            Int64(block),
            {k},
            {eps},
            thread,
        )
    """
    operands = {
        "x": f"bf16[{rows},{k}]",
        "gain": f"f32[{k}]",
        "q": f"q[e4m3,ue8m0,1x128][{rows},{k}]",
        "q.scale": "its scales",
    }
    what = f"fp8(bf16(x * rsqrt(mean(x^2) + {eps}) * gain))."
    shared = k // 128 * 4
    return _emit(name, what, operands | _counted(counted), rows, k // 8, body, shared=shared)


def emit_list_rows(name: str, rows: int, top_k: int, experts: int, counted: bool = False) -> Emission:
    """experts i32[rows, top_k] -> order i32[experts, rows * top_k], counts i32[experts]: a CTA per expert.

    An expert has room for all numbers: a table may name it twice in a row.
    """
    limit = f"Int32(ptx.ldg32(m_lengths.toint())) * {top_k}" if counted else f"Int32({rows * top_k})"
    body = f"""
    s = ptx.shared({LISTERS // 32 * 4})
    ptx.wait()
    g_order = m_order.toint() + Int64(block) * {rows * top_k * 4}
    gemm.list_rows(m_experts.toint(), g_order, m_counts.toint(), s, block, {limit}, thread, THREADS)
    """
    operands = {
        "experts": f"i32[{rows},{top_k}]",
        "order": f"i32[{experts},{rows * top_k}], numbers of (row, choice) of each expert, ascending",
        "counts": f"i32[{experts}], how many",
    }
    what = "rows by the experts that they chose."
    shared = LISTERS // 32 * 4
    return _emit(name, what, operands | _counted(counted), experts, LISTERS, body, shared=shared)


def emit_sum_experts(
    name: str, rows: int, top_k: int, hidden: int, counted: bool = False, out: str = "bf16"
) -> Emission:
    """y = out(sum over a token's experts in order, plus the shared one); out is bf16 or f32."""
    pieces = hidden // 8
    ctas, size = -(-pieces // SUMMERS), 2 if out == "bf16" else 4
    limit = "Int32(ptx.ldg32(m_lengths.toint()))" if counted else f"Int32({rows})"
    body = f"""
    ptx.wait()
    row = block // {ctas}
    piece = block % {ctas} * THREADS + thread
    if row < {limit} and piece < {pieces}:
        g_rows, g_shared = m_routed.toint(), m_shared.toint()
        chunk_rows.sum_rows(g_rows, g_shared, m_y.toint(), Int64(row), piece, {hidden}, {top_k}, {size})
    """
    operands = {
        "routed": f"bf16[{rows},{top_k},{hidden}]",
        "shared": f"bf16[{rows},{hidden}]",
        "y": f"{out}[{rows},{hidden}]",
    }
    what = "the sum over a row's experts, in f32."
    return _emit(name, what, operands | _counted(counted), rows * ctas, SUMMERS, body)


def emit_choose_experts(
    name: str, rows: int, top_k: int, experts: int, factor: float, table: bool, counted: bool = False
) -> Emission:
    """Experts and weights of rows out of the gate's logits: the best of score + bias, or a table's."""
    padded = -(-experts // 32) * 32
    limit = "Int32(ptx.ldg32(m_lengths.toint()))" if counted else f"Int32({rows})"
    if table:
        choose = f"""
            id = ptx.ldg32(m_tokens.toint() + block * 4).to(Int64)
            expert = router.table_experts(m_table.toint() + id * {4 * top_k}, {top_k}, thread)
            chosen = router.logit_scores(g_logits, expert, {top_k}, thread)
        """
        operands = {"table": f"i32[*,{top_k}]", "tokens": f"i32[{rows}]"}
        threads, stage = 32, ""
    else:
        choose = f"expert, chosen = router.top_experts(s, {padded}, {top_k}, thread)"
        operands = {"bias": f"f32[{experts}]"}
        threads = CHOOSERS
        stage = f"""
        router.stage_bias(s, m_bias.toint(), {experts}, {padded}, thread, THREADS)
        logits = router.load_logits(g_logits, {experts}, thread, THREADS)
        router.stage_scores(s, logits, {experts}, {padded}, thread, THREADS)
        cute.arch.sync_threads()
        """
    body = (
        f"""
    s = ptx.shared({8 * padded + 8 * top_k})
    ptx.wait()
    if block < {limit}:
        g_logits = m_logits.toint() + Int64(block) * {4 * experts}
"""
        + textwrap.indent(textwrap.dedent(stage).strip("\n"), "        ")
        + f"""
        if thread < 32:
{textwrap.indent(textwrap.dedent(choose).strip(chr(10)), "            ")}
            weight = router.keep_weights(s + {8 * padded}, chosen, {top_k}, {factor}, thread)
            if thread < {top_k}:
                at = Int64(block * {top_k} + thread) * 4
                ptx.stg32(m_experts.toint() + at, expert.bitcast(Uint32))
                ptx.stg_f32(m_weights.toint() + at, weight)
    """
    )
    whole = {
        "logits": f"f32[{rows},{experts}]",
        **operands,
        "experts": f"i32[{rows},{top_k}]",
        "weights": f"f32[{rows},{top_k}] = score / sum of scores * {factor}",
    }
    what = "experts and their weights, a CTA per row; score = sqrt(softplus(logit))."
    shared = 8 * padded + 8 * top_k
    return _emit(name, what, whole | _counted(counted), rows, threads, body, shared=shared)
