"""What surrounds products of many rows: FP8 codes of rows, the choice of experts, rows listed by expert, and
the sum over experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dsv4c.codegen.emit import Emission, Parameter, compose
from dsv4c.codegen.lib.slices import Choice, Codes, Listing, NormedCodes, Sum
from dsv4c.errors import BuildError
from dsv4c.types import FP8_ROW

QUANTIZERS, SUMMERS, CHOOSERS = 256, 256, 128  # threads
FEW_NUMBERS = 8192  # are listed by 256 threads in 3.4 us; 24,576 take 18.9 us, or 8.6 by 1,024 (H200)

Spec = Codes | NormedCodes | Listing | Sum | Choice


def _emit(
    name: str,
    what: str,
    operands: Mapping[str, str | None],
    counted: bool,
    spec: Spec,
    grid: int,
    stages: Sequence[str],
    record: str,
) -> Emission:
    """A kernel; operands "x.scale" are components. With `counted`, rows past lengths[0] are left alone."""
    split = {operand.partition("."): type_ for operand, type_ in operands.items()}
    types = {Parameter(x, component or "data"): type_ for (x, _, component), type_ in split.items()}
    alone = "\nRows past lengths[0] are left alone." if counted else ""
    return compose(
        name,
        f"{name}: {what}",
        {**types, Parameter("lengths"): "i32[1]" if counted else None},
        f"Launch: {grid} CTAs x {spec.threads} threads.{alone}",
        ("ptx.launch_dependents()", *stages),
        threads=spec.threads,
        grid=(grid, 1, 1),
        spec=spec,
        record=f"chunk_rows.{record}",
    )


def emit_quantize_fp8(name: str, rows: int, k: int, each: int = 1, counted: bool = False) -> Emission:
    """x bf16[rows, k] -> q FP8 in blocks of 128; `each` rows per counted one."""
    if k % 128:
        raise BuildError(f"{name}: rows of {k}: want a multiple of 128")
    spec = Codes(rows, k, each, QUANTIZERS)
    operands = {"x": f"bf16[{rows},{k}]", "q": f"{FP8_ROW}[{rows},{k}]", "q.scale": "its scales"}
    what = "rows to FP8, a half-warp to a block of 128."
    stages = ("ptx.wait()", "chunk_rows.quantize_rows(SPEC, m)")
    return _emit(name, what, operands, counted, spec, spec.ctas, stages, "Coded")


def emit_norm_quantize_fp8(name: str, rows: int, k: int, eps: float, counted: bool = False) -> Emission:
    """fp8(rms_norm(x) under an f32 gain), a CTA per row."""
    if k % 256 or k // 8 > 1024:
        raise BuildError(f"{name}: rows of {k}: want a multiple of 256 up to 8192")
    spec = NormedCodes(rows, k, eps)
    operands = {
        "x": f"bf16[{rows},{k}]",
        "gain": f"f32[{k}]",
        "q": f"{FP8_ROW}[{rows},{k}]",
        "q.scale": "its scales",
    }
    what = f"fp8(bf16(x * rsqrt(mean(x^2) + {eps}) * gain))."
    stages = (f"s = ptx.shared({spec.shared})", "ptx.wait()", "chunk_rows.normalize_rows(SPEC, m, s)")
    return _emit(name, what, operands, counted, spec, rows, stages, "NormCoded")


def emit_list_rows(name: str, rows: int, top_k: int, experts: int, counted: bool = False) -> Emission:
    """experts i32[rows, top_k] -> order i32[experts, rows * top_k], counts i32[experts]: a CTA per expert."""
    spec = Listing(rows, top_k, 256 if rows * top_k <= FEW_NUMBERS else 1024)
    operands = {
        "experts": f"i32[{rows},{top_k}]",
        "order": f"i32[{experts},{spec.numbers}], numbers of (row, choice) of each expert, ascending",
        "counts": f"i32[{experts}], how many",
    }
    what = "rows by the experts that they chose."
    stages = (f"s = ptx.shared({spec.shared})", "ptx.wait()", "chunk_rows.list_rows(SPEC, m, s)")
    return _emit(name, what, operands, counted, spec, experts, stages, "Listed")


def emit_sum_experts(
    name: str, rows: int, top_k: int, hidden: int, counted: bool = False, out: str = "bf16"
) -> Emission:
    """y = out(sum over a token's experts in order, plus the shared one); out is bf16 or f32."""
    spec = Sum(rows, hidden, top_k, 2 if out == "bf16" else 4, SUMMERS)
    operands = {
        "routed": f"bf16[{rows},{top_k},{hidden}]",
        "shared": f"bf16[{rows},{hidden}]",
        "y": f"{out}[{rows},{hidden}]",
    }
    what = "the sum over a row's experts, in f32."
    stages = ("ptx.wait()", "chunk_rows.sum_experts(SPEC, m)")
    return _emit(name, what, operands, counted, spec, rows * spec.ctas, stages, "Summed")


def emit_choose_experts(
    name: str, rows: int, top_k: int, experts: int, factor: float, table: bool, counted: bool = False
) -> Emission:
    """Experts and weights of rows out of the gate's logits: the best of score + bias, or a table's."""
    spec = Choice(rows, experts, top_k, factor, 32 if table else CHOOSERS)
    operands = {
        "logits": f"f32[{rows},{experts}]",
        "bias": None if table else f"f32[{experts}]",
        "table": f"i32[*,{top_k}]" if table else None,
        "tokens": f"i32[{rows}]" if table else None,
        "experts": f"i32[{rows},{top_k}]",
        "weights": f"f32[{rows},{top_k}] = score / sum of scores * {factor}",
    }
    what = "experts and their weights, a CTA per row; score = sqrt(softplus(logit))."
    stages = (f"s = ptx.shared({spec.shared})", "ptx.wait()", "chunk_rows.choose_experts(SPEC, m, s)")
    return _emit(name, what, operands, counted, spec, rows, stages, "Chosen")
