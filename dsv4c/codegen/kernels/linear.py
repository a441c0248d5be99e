"""Linear layers, bound to GEMVs: what a launch multiplies, how its rows are staged, what rides along."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from dsv4c.codegen.kernels.formats import WEIGHTS, format_name, holds, is_packed
from dsv4c.codegen.kernels.gemm import gemm_launches, takes_gemm
from dsv4c.codegen.kernels.gemv import Activations, Epilogue, GemvSpec, Matrix, emit_gemv
from dsv4c.codegen.kernels.quantize import quantize_rows, scratch_for
from dsv4c.codegen.kernels.riders import NOBODY, WRITTEN, Riding, lanes, riding_of
from dsv4c.codegen.kernels.state import state_launches
from dsv4c.codegen.registry import Answer, Call, No, Request, Scratch, kernel, launchable, takes
from dsv4c.ir.ops.linear import GroupedLinear, Linear
from dsv4c.passes.fusions.in_proj import InProj
from dsv4c.passes.fusions.q_norm_quantize import QNormQuantize
from dsv4c.passes.fusions.quantize_linear import QuantizeLinear
from dsv4c.types import BF16, F32, FP8_ROW, NVFP4, NVFP4_ROW, QuantFormat, QuantType

NOTHING: Mapping[int, Epilogue] = MappingProxyType({})


def staging(request: Request, name: str, x: int, w: int, quantize: QuantFormat | None) -> Activations | No:
    """How the rows of value `x` meet weight `w`; `quantize` is what the op encodes them to first."""
    format_ = format_name(request.types[w], WEIGHTS)
    type_ = request.types[x]
    if not format_:
        return No(f"takes weights of bf16, {', '.join(map(str, WEIGHTS))}, not {request.types[w]}")
    if quantize is not None:
        if quantize != FP8_ROW or not holds(type_, BF16) or format_ == "bf16":
            return No(f"quantizes bf16 to {FP8_ROW} for quantized weights, not {type_} to {quantize}")
        return Activations(name, "e4m3", "quantize")
    if isinstance(type_, QuantType):
        if is_packed(type_) and format_ == "nvfp4":
            return Activations(name, "f16", "unpack")
        if type_.format != FP8_ROW or format_ == "bf16":
            wanted = f"{FP8_ROW} rows with quantized weights, {NVFP4_ROW} with {NVFP4}"
            return No(f"multiplies {wanted}, not {type_} with {format_}")
        return Activations(name, "e4m3")
    if type_.dtype is not BF16:
        return No(f"multiplies rows of bf16 or {FP8_ROW}, not {type_}")
    return Activations(name, "bf16") if format_ == "bf16" else Activations(name, "f16", "quantize")


def product(
    request: Request,
    name: str,
    products: Sequence[tuple[Activations, int, int]],
    values: dict[str, int],
    k: int,
    groups: int = 1,
    stage: str = "",
    scratch: dict[str, Scratch] | None = None,
    riding: Riding = NOBODY,
    epilogues: Mapping[int, Epilogue] = NOTHING,
    late: bool = False,
) -> Answer:
    """One GEMV launch, or GEMMs where rows are many; products are (activations, weight, result). `epilogues`
    go by result; `values` bind their operands.
    """
    matrices: list[Matrix] = []
    for number, (x, w, y) in enumerate(products):
        type_, result = request.types[w], request.types[y]
        if isinstance(result, QuantType) or result.dtype not in (BF16, F32):
            return No(f"writes bf16 or f32, not {result}")
        label = request.labels[w] or f"w{number}"
        if any(m.name == label for m in matrices):  # of several layers
            label = f"{label}_{number}"
        height = math.prod(type_.shape[:-1])
        format_ = format_name(type_, WEIGHTS)
        after = epilogues.get(y)
        matrix = Matrix(label, height, format_, x, f"{label}_out", str(result.dtype), after)
        values |= {matrix.name: w, matrix.out: y}
        matrices.append(matrix)
    shape = request.types[products[0][2]].shape
    rows = shape[0] if groups > 1 else math.prod(shape[:-1])  # of several streams each is a row
    if rows != shape[0]:  # which a chunk's length does not count
        request = replace(request, lengths=None)
    spec = GemvSpec(
        name,
        rows,
        k,
        tuple(matrices),
        groups,
        lanes=riding.lanes,
        riders=riding.riders,
        late=late,
    )
    alone = not scratch and not riding.riders
    if alone and takes_gemm(spec, request.arch):
        return gemm_launches(request, spec, values)
    gains = {x.gain: "f32" for x, _, _ in products if x.gain}
    values |= riding.values
    gemv = emit_gemv(spec, request.arch)
    return [launchable(request, gemv, values, stage=stage, scratch=scratch, forms=gains)]


def _packed_gemv(
    request: Request,
    name: str,
    weights: Sequence[tuple[int, int]],
    values: dict[str, int],
    shape: Sequence[int],
    eps: float | None = None,
    riding: Riding = NOBODY,
    late: bool = False,
) -> Answer:
    """Rows to NVFP4 in scratch, under a norm if `eps` is given, then (weight, result) products with them."""
    for w, _ in weights:
        if format_name(request.types[w], WEIGHTS) != "nvfp4":
            return No(f"multiplies {NVFP4_ROW} rows with {NVFP4} weights, not {request.types[w]}")
    first = quantize_rows(request, values, shape, eps=eps)
    rows = scratch_for("q", QuantType(NVFP4_ROW, tuple(shape)), "r")
    staged = Activations("q", "f16", "unpack")
    products = [(staged, w, y) for w, y in weights]
    second = product(
        request, name, products, {}, shape[-1], stage="product", scratch=rows, riding=riding, late=late
    )
    return second if isinstance(second, No) else [first, *second]


@kernel(takes(InProj, "outs"), takes(Linear, "out"), several=True)
def linears(request: Request) -> Answer:
    """Projections of one row, or of the same row encoded in several ways."""
    products: list[tuple[Activations, int, int]] = []
    values: dict[str, int] = {}
    widths = set()
    for call in request.calls:
        x, *weights = call.inputs
        name = {v: n for n, v in values.items()}.get(x, f"x{len(values) or ''}")
        values[name] = x
        widths.add(request.types[x].shape[-1])
        if len(request.types[x].shape) != 2:
            return No(f"takes rows [N,K], not {request.types[x]}")
        for w, y in zip(weights, call.outputs, strict=True):
            staged = staging(request, name, x, w, None)
            if isinstance(staged, No):
                return staged
            products.append((staged, w, y))
    if len(widths) > 1:
        return No(f"the rows of one launch have one width, these have {', '.join(map(str, sorted(widths)))}")
    name = "in_proj" if len(products) > 1 else request.labels[products[0][1]] or "linear"
    return product(request, name, products, values, widths.pop())


@kernel(takes(QuantizeLinear, "format", "out"))
def quantize_linear(request: Request) -> Answer:
    """A sublayer's last product."""
    call = request.call
    assert isinstance(call.op, QuantizeLinear)
    x, w = call.inputs
    name = request.labels[w] or "quantize_linear"
    if call.op.format == NVFP4_ROW and holds(request.types[x], BF16):
        packed = [(w, call.outputs[0])]
        return _packed_gemv(request, name, packed, {"x": x}, request.types[x].shape, late=True)
    staged = staging(request, "x", x, w, call.op.format)
    if isinstance(staged, No):
        return staged
    if len(request.types[x].shape) != 2:
        return No(f"takes rows [N,K], not {request.types[x]}")
    products = [(staged, w, call.outputs[0])]
    return product(request, name, products, {"x": x}, request.types[x].shape[-1], late=True)


@kernel(takes(GroupedLinear, "out"))
def grouped_linear(request: Request) -> Answer:
    call = request.call
    x, w = call.inputs
    staged = staging(request, "x", x, w, None)
    if isinstance(staged, No):
        return staged
    if isinstance(request.types[x], QuantType) and not is_packed(request.types[x]):
        return No(f"takes groups of bf16 or {NVFP4_ROW} rows, not {request.types[x]}")
    if staged.kind == "f16" and request.types[w].shape[1] % 128:
        return No(f"takes whole 128x128 scale blocks per group, not {request.types[w]}")
    _, groups, k = request.types[x].shape
    name = request.labels[w] or "grouped_linear"
    return product(request, name, [(staged, w, call.outputs[0])], {"x": x}, k, groups)


Q_NORM = takes(QNormQuantize, "eps", "format", "out")


@kernel(Q_NORM, *WRITTEN, several=True)
def q_norm_quantize(request: Request) -> Answer:
    """The queries' projections; the token's state writes ride along, small work beside a large stream."""
    calls = [c for c in request.calls if isinstance(c.op, QNormQuantize)]
    if len(calls) != 1:
        return No(f"takes one q_norm_quantize per launch, in which state writes ride, not {len(calls)}")
    (call,) = calls
    assert isinstance(call.op, QNormQuantize)
    x, gain = call.inputs[:2]
    row = request.types[x]
    if not holds(row, BF16) or not holds(request.types[gain], BF16):
        return No(f"normalizes bf16 rows under bf16 gains, not {row} under {request.types[gain]}")
    riding = riding_of(request, row.shape[0])
    if isinstance(riding, No):
        return riding
    if riding.riders and len(row.shape) != 2:
        return No(f"takes rows [N,K] where state writes ride, not {row}")
    if riding.apart:
        product = _q_projections(request, call, Riding(lanes=lanes(riding.riders)))
        if isinstance(product, No):
            return product
        threads = (
            product[-1].emission.block - 32
        )  # as of CTAs where they ride, without the warp for the weights
        return [*state_launches(request, riding, threads), *product]
    return _q_projections(request, call, riding)


def _q_projections(request: Request, call: Call, riding: Riding) -> Answer:
    assert isinstance(call.op, QNormQuantize)
    x, gain, *weights = call.inputs
    row = request.types[x]
    products = list(zip(weights, call.outputs, strict=True))
    values = {"x": x, "gain": gain}
    if call.op.format == NVFP4_ROW:
        return _packed_gemv(request, "q_proj", products, values, row.shape, call.op.eps, riding)
    if call.op.format not in (None, FP8_ROW):
        return No(f"quantizes the normed row to {FP8_ROW} or {NVFP4_ROW}, not {call.op.format}")
    kind = "bf16" if call.op.format is None else "e4m3"
    for w in weights:
        if (format_name(request.types[w], WEIGHTS) == "bf16") != (kind == "bf16"):
            return No(f"multiplies {kind} rows, which do not fit weights {request.types[w]}")
    staged = Activations("x", kind, "normalize", gain="gain", eps=call.op.eps)
    staging = [(staged, w, y) for w, y in products]
    return product(request, "q_proj", staging, values, row.shape[-1], riding=riding)
