"""The kernels of a decode step, bound to the ops they compute: one function per family.

Each reads a spec off the op's fields and types, or says why it cannot.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dsv4c.codegen.attention import AttentionSpec, emit_attention
from dsv4c.codegen.compress import CompressSpec, KvStoreSpec, Rider
from dsv4c.codegen.experts import ExpertsSpec, Routing, emit_experts_down, emit_experts_up
from dsv4c.codegen.gemv import Activations, GemvSpec, Matrix, emit_gemv
from dsv4c.codegen.head import (
    AdvanceSpec,
    ArgmaxSpec,
    EmbedSpec,
    PositionsSpec,
    emit_advance,
    emit_argmax,
    emit_embed,
    emit_positions,
)
from dsv4c.codegen.hyper import HyperNormSpec, emit_hyper_norm
from dsv4c.codegen.index import IndexScoresSpec, TopKSpec, emit_index_scores, emit_top_k
from dsv4c.codegen.lib.slices import STREAMS
from dsv4c.codegen.quantize import QuantizeSpec, emit_quantize
from dsv4c.codegen.registry import Call, Launchable, No, Request, Scratch, kernel, launchable
from dsv4c.codegen.router import RouterGateSpec, emit_router_gate
from dsv4c.ir.ops.linear import GroupedLinear, Linear
from dsv4c.ir.ops.sample import Argmax
from dsv4c.ir.ops.state import Advance, Positions
from dsv4c.passes.fusions.attention import Attention
from dsv4c.passes.fusions.compressor import Compressor
from dsv4c.passes.fusions.embed import Embed
from dsv4c.passes.fusions.experts_down import ExpertsDown
from dsv4c.passes.fusions.head import Head
from dsv4c.passes.fusions.hyper_norm import HyperNorm, HyperNormFirst
from dsv4c.passes.fusions.in_proj import InProj
from dsv4c.passes.fusions.index_topk import IndexTopk
from dsv4c.passes.fusions.indexer import Indexer
from dsv4c.passes.fusions.kv_norm_rope_store import KvNormRopeStore
from dsv4c.passes.fusions.q_norm_quantize import QNormQuantize
from dsv4c.passes.fusions.quantize_linear import QuantizeLinear
from dsv4c.passes.fusions.router import HashRouter, Router
from dsv4c.passes.fusions.swiglu import HashSwiglu, Swiglu
from dsv4c.types import (
    BF16,
    F32,
    FP8_ROW,
    FP8_WEIGHT,
    KV_FP8,
    MXFP4,
    NVFP4,
    NVFP4_ROW,
    QuantFormat,
    QuantType,
    TensorType,
    Type,
)

Answer = Sequence[Launchable] | No

WEIGHTS = {FP8_WEIGHT: "fp8", MXFP4: "mxfp4", NVFP4: "nvfp4"}
CACHES = {KV_FP8: "fp8", MXFP4: "mxfp4"}
ROPE_DIMS = 64  # rotated at the end of a head, in every kernel
INDEX_WIDTH = 128


def format_name(type_: Type, names: dict[QuantFormat, str]) -> str:
    """What the kernel families call the number format of a type; "" for one they do not have."""
    if isinstance(type_, QuantType):
        return names.get(type_.format, "")
    return "bf16" if type_.dtype is BF16 else ""


def _is(type_: Type, dtype: object) -> bool:
    return not isinstance(type_, QuantType) and type_.dtype is dtype


# NVFP4 rows -------------------------------------------------------------------------------------------------


def _packed(type_: Type) -> bool:
    return isinstance(type_, QuantType) and type_.format == NVFP4_ROW


def _array(name: str, type_: Type, access: str) -> dict[str, Scratch]:
    """Scratch for a value of this type: an array per component."""
    suffixed = {name if c.name == "data" else f"{name}_{c.name}": c.nbytes for c in type_.components}
    return {n: Scratch(n, nbytes, access) for n, nbytes in suffixed.items()}


def _quantize(
    request: Request,
    values: dict[str, int],
    shape: Sequence[int],
    name: str = "q",
    eps: float | None = None,
    x: str = "x",
) -> Launchable:
    """bf16 rows to NVFP4. What `values` do not bind, of `x` and `q`, are scratch "row" and `name`."""
    *lead, k = shape
    spec = QuantizeSpec("quantize" if eps is None else "norm_quantize", math.prod(lead), k, eps)
    scratch: dict[str, Scratch] = {}
    if "x" not in values:
        scratch["x"] = _array("row", TensorType(BF16, tuple(shape)), "r")["row"]
    if "q" not in values:
        arrays = _array(name, QuantType(NVFP4_ROW, tuple(shape)), "w")
        scratch |= {f"q{n.removeprefix(name)}": array for n, array in arrays.items()}
    return launchable(request, emit_quantize(spec), values, stage=f"quantize_{x}", scratch=scratch)


# The ends of a step -----------------------------------------------------------------------------------------


@kernel(Positions)
def positions(request: Request) -> Answer:
    call = request.call
    assert isinstance(call.op, Positions)
    start, lengths = call.inputs
    spec = PositionsSpec(request.types[start].shape[0], call.op.tokens)
    values = {"start": start, "lengths": lengths, "positions": call.outputs[0]}
    return [launchable(request, emit_positions(spec), values)]


@kernel(Embed)
def embed(request: Request) -> Answer:
    call = request.call
    assert isinstance(call.op, Embed)
    x = call.operands
    table = request.types[x["table"]]
    if not _is(table, BF16):
        return No(f"copies rows of bf16, the table is {table}")
    if call.op.streams != STREAMS:
        return No(f"copies to {STREAMS} streams, not {call.op.streams}")
    spec = EmbedSpec(request.types[x["tokens"]].shape[0], table.shape[1])
    values = {"table": x["table"], "ids": x["tokens"], "x": call.outputs[0]}
    return [launchable(request, emit_embed(spec), values)]


@kernel(Argmax)
def argmax(request: Request) -> Answer:
    call = request.call
    logits = request.types[call.inputs[0]]
    if not _is(logits, F32) or len(logits.shape) != 2:
        return No(f"takes logits f32[N,V], not {logits}")
    values = {"logits": call.inputs[0], "token": call.outputs[0]}
    return [launchable(request, emit_argmax(ArgmaxSpec(*logits.shape)), values)]


@kernel(Advance)
def advance(request: Request) -> Answer:
    call = request.call
    start, lengths = call.inputs
    spec = AdvanceSpec(request.types[start].shape[0])
    return [launchable(request, emit_advance(spec), {"start": start, "lengths": lengths})]


# Hyper-connections ------------------------------------------------------------------------------------------


@kernel(HyperNorm, HyperNormFirst, Head)
def hyper_norm(request: Request) -> Answer:
    call = request.call
    op, x = call.op, call.operands
    assert isinstance(op, HyperNormFirst | Head)
    streams = request.types[x["streams"]]
    if not _is(streams, BF16) or streams.shape[1] != STREAMS:
        return No(f"mixes {STREAMS} streams of bf16, not {streams}")
    names = ["normed", "post_out", "comb_out", "q"] if isinstance(op, HyperNormFirst) else ["normed"]
    if not isinstance(op, HyperNormFirst) or isinstance(op, HyperNorm):
        names = ["x_out", *names]
    made = {names[place]: number for place, number in call.made.items()}
    if isinstance(op, HyperNormFirst):
        if op.format not in (None, FP8_ROW, NVFP4_ROW):
            return No(f"quantizes the row to {FP8_ROW} or {NVFP4_ROW}, not {op.format}")
        if not {"post_out", "comb_out"} <= made.keys():
            return No("writes the coefficients of the next mixing, which nobody reads")
    packed = "q" in made and isinstance(op, HyperNormFirst) and op.format == NVFP4_ROW
    spec = HyperNormSpec(
        rows=streams.shape[0],
        hidden=streams.shape[2],
        norm_eps=op.norm_eps,
        hc_eps=op.hc_eps,
        iterations=op.iterations if isinstance(op, HyperNormFirst) else 1,
        mix="f" in x,
        keep="x_out" in made,
        head=isinstance(op, Head),
        bf16="normed" in made or packed,
        fp8="q" in made and not packed,
    )
    values = {**x, "x": x["streams"], "scale": x["scales"], **made}
    if not packed:
        return [launchable(request, emit_hyper_norm(spec), values)]
    shape = request.types[made["q"]].shape
    row = {} if "normed" in made else {"normed": _array("row", TensorType(BF16, shape), "w")["row"]}
    operands = {"x": made["normed"], "q": made["q"]} if "normed" in made else {"q": made["q"]}
    return [
        launchable(request, emit_hyper_norm(spec), values, stage="norm", scratch=row),
        _quantize(request, operands, shape),
    ]


# Linear layers ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Riding:
    """State writes that go with a launch of products: their specs, and the values of their operands."""

    riders: tuple[Rider, ...] = ()
    values: Mapping[str, int] = field(default_factory=dict)


NOBODY = Riding()


def _staging(request: Request, name: str, x: int, w: int, quantize: QuantFormat | None) -> Activations | No:
    """How the rows of value `x` meet weight `w`; `quantize` is what the op encodes them to first."""
    format_ = format_name(request.types[w], WEIGHTS)
    type_ = request.types[x]
    if not format_:
        return No(f"takes weights of bf16, {', '.join(map(str, WEIGHTS))}, not {request.types[w]}")
    if quantize is not None:
        if quantize != FP8_ROW or not _is(type_, BF16) or format_ == "bf16":
            return No(f"quantizes bf16 to {FP8_ROW} for quantized weights, not {type_} to {quantize}")
        return Activations(name, "e4m3", "quantize")
    if isinstance(type_, QuantType):
        if _packed(type_) and format_ == "nvfp4":
            return Activations(name, "f16", "unpack")
        if type_.format != FP8_ROW or format_ == "bf16":
            wanted = f"{FP8_ROW} rows with quantized weights, {NVFP4_ROW} with {NVFP4}"
            return No(f"multiplies {wanted}, not {type_} with {format_}")
        return Activations(name, "e4m3")
    if type_.dtype is not BF16:
        return No(f"multiplies rows of bf16 or {FP8_ROW}, not {type_}")
    return Activations(name, "bf16") if format_ == "bf16" else Activations(name, "f16", "quantize")


def _gemv(
    request: Request,
    name: str,
    products: Sequence[tuple[Activations, int, int]],
    values: dict[str, int],
    k: int,
    groups: int = 1,
    stage: str = "",
    scratch: dict[str, Scratch] | None = None,
    riding: Riding = NOBODY,
) -> Launchable | No:
    """One GEMV launch; products are (activations, weight, result)."""
    matrices = []
    for number, (x, w, y) in enumerate(products):
        type_, result = request.types[w], request.types[y]
        if isinstance(result, QuantType) or result.dtype not in (BF16, F32):
            return No(f"writes bf16 or f32, not {result}")
        label = request.labels[w] or f"w{number}"
        height = math.prod(type_.shape[:-1])
        format_ = format_name(type_, WEIGHTS)
        matrix = Matrix(label, height, format_, x, f"{label}_out", str(result.dtype))
        values |= {matrix.name: w, matrix.out: y}
        matrices.append(matrix)
    if len({m.name for m in matrices}) < len(matrices):
        return No(f"two of its weights are called {', '.join(m.name for m in matrices)}")
    rows = math.prod(request.types[products[0][2]].shape[:1])
    spec = GemvSpec(name, rows, k, tuple(matrices), groups, riders=riding.riders)
    gains = {x.gain: "f32" for x, _, _ in products if x.gain}
    values |= riding.values
    return launchable(request, emit_gemv(spec), values, stage=stage, scratch=scratch, forms=gains)


def _packed_gemv(
    request: Request,
    name: str,
    weights: Sequence[tuple[int, int]],
    values: dict[str, int],
    shape: Sequence[int],
    eps: float | None = None,
    riding: Riding = NOBODY,
) -> Answer:
    """Rows to NVFP4 in scratch, under a norm if `eps` is given, then (weight, result) products with them."""
    for w, _ in weights:
        if format_name(request.types[w], WEIGHTS) != "nvfp4":
            return No(f"multiplies {NVFP4_ROW} rows with {NVFP4} weights, not {request.types[w]}")
    first = _quantize(request, values, shape, eps=eps)
    rows = _array("q", QuantType(NVFP4_ROW, tuple(shape)), "r")
    staged = Activations("q", "f16", "unpack")
    products = [(staged, w, y) for w, y in weights]
    second = _gemv(request, name, products, {}, shape[-1], stage="product", scratch=rows, riding=riding)
    return second if isinstance(second, No) else [first, second]


def _alone(launch: Launchable | No) -> Answer:
    return launch if isinstance(launch, No) else [launch]


@kernel(InProj, Linear, several=True)
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
            staged = _staging(request, name, x, w, None)
            if isinstance(staged, No):
                return staged
            products.append((staged, w, y))
    if len(widths) > 1:
        return No(f"the rows of one launch have one width, these have {', '.join(map(str, sorted(widths)))}")
    name = "in_proj" if len(products) > 1 else request.labels[products[0][1]] or "linear"
    return _alone(_gemv(request, name, products, values, widths.pop()))


@kernel(QuantizeLinear)
def quantize_linear(request: Request) -> Answer:
    call = request.call
    assert isinstance(call.op, QuantizeLinear)
    x, w = call.inputs
    name = request.labels[w] or "quantize_linear"
    if call.op.format == NVFP4_ROW and _is(request.types[x], BF16):
        return _packed_gemv(request, name, [(w, call.outputs[0])], {"x": x}, request.types[x].shape)
    staged = _staging(request, "x", x, w, call.op.format)
    if isinstance(staged, No):
        return staged
    if len(request.types[x].shape) != 2:
        return No(f"takes rows [N,K], not {request.types[x]}")
    products = [(staged, w, call.outputs[0])]
    return _alone(_gemv(request, name, products, {"x": x}, request.types[x].shape[-1]))


@kernel(GroupedLinear)
def grouped_linear(request: Request) -> Answer:
    call = request.call
    x, w = call.inputs
    staged = _staging(request, "x", x, w, None)
    if isinstance(staged, No):
        return staged
    if isinstance(request.types[x], QuantType) and not _packed(request.types[x]):
        return No(f"takes groups of bf16 or {NVFP4_ROW} rows, not {request.types[x]}")
    if staged.kind == "f16" and request.types[w].shape[1] % 128:
        return No(f"takes whole 128x128 scale blocks per group, not {request.types[w]}")
    _, groups, k = request.types[x].shape
    name = request.labels[w] or "grouped_linear"
    return _alone(_gemv(request, name, [(staged, w, call.outputs[0])], {"x": x}, k, groups))


@kernel(QNormQuantize, KvNormRopeStore, Compressor, several=True)
def q_norm_quantize(request: Request) -> Answer:
    """The queries' projections; the token's state writes ride along, small work beside a large stream."""
    calls = [c for c in request.calls if isinstance(c.op, QNormQuantize)]
    if len(calls) != 1:
        return No(f"takes one q_norm_quantize per launch, in which state writes ride, not {len(calls)}")
    (call,) = calls
    assert isinstance(call.op, QNormQuantize)
    x, gain, *weights = call.inputs
    row = request.types[x]
    if not _is(row, BF16) or not _is(request.types[gain], BF16):
        return No(f"normalizes bf16 rows under bf16 gains, not {row} under {request.types[gain]}")
    riding = _riding(request, row.shape[0])
    if isinstance(riding, No):
        return riding
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
    return _alone(_gemv(request, "q_proj", staging, values, row.shape[-1], riding=riding))


# State ------------------------------------------------------------------------------------------------------


def _riding(request: Request, rows: int) -> Riding | No:
    """The state writes of a request, one token each for `rows` sequences."""
    riders: list[Rider] = []
    values: dict[str, int] = {}
    for call in request.calls:
        if isinstance(call.op, QNormQuantize):
            continue
        bind = _window if isinstance(call.op, KvNormRopeStore) else _compressor
        rider = bind(request, call, rows, values)
        if isinstance(rider, No):
            return rider
        riders.append(rider)
    if len({rider.name for rider in riders}) < len(riders):
        return No("takes one window, one compressor of entries and one of index keys per launch")
    return Riding(tuple(riders), values)


def _shared(call: Call, operand: str, values: dict[str, int]) -> str:
    """A name among `values` for an operand that several riders may share."""
    number = call.operands[operand]
    taken = {v: n for n, v in values.items()}
    name = taken.get(number) or (operand if operand not in values else f"{operand}_{number}")
    values[name] = number
    return name


def _window(request: Request, call: Call, rows: int, values: dict[str, int]) -> Rider | No:
    op, x = call.op, call.operands
    assert isinstance(op, KvNormRopeStore)
    window, tokens = request.types[x["window"]], request.types[x["kv"]].shape[0]
    if not tokens == window.shape[0] == rows:
        return No(f"stores one token per sequence, not {tokens} tokens in {window.shape[0]} windows")
    if not format_name(window, CACHES):
        return No(f"stores {KV_FP8} or bf16, not {window}")
    spec = KvStoreSpec(
        window.shape[2],
        format_name(window, CACHES),
        window.shape[1],
        op.eps,
        frequencies=_shared(call, "frequencies", values),
        positions=_shared(call, "positions", values),
    )
    values |= {spec.kv: x["kv"], spec.gain: x["gain"], spec.window: x["window"]}
    return spec


def _compressor(request: Request, call: Call, rows: int, values: dict[str, int]) -> Rider | No:
    op, x = call.op, call.operands
    assert isinstance(op, Compressor)
    entries, ring = request.types[x["entries"]], request.types[x["kv_ring"]]
    if not format_name(entries, CACHES):
        return No(f"stores {KV_FP8}, {MXFP4} or bf16, not {entries}")
    if op.sequences != rows:
        return No(f"compresses one token per sequence, not {rows} tokens of {op.sequences} sequences")
    spec = CompressSpec(
        "index" if op.rotated else "compress",
        entries.shape[2],
        format_name(entries, CACHES),
        op.ratio,
        op.overlap,
        ring.shape[1],
        entries.shape[1],
        op.eps,
        hadamard=op.rotated,
        frequencies=_shared(call, "frequencies", values),
        positions=_shared(call, "positions", values),
    )
    values |= {spec.u: x["kv"], spec.s: x["gate"], spec.ape: x["bias"], spec.gain: x["gain"]}
    values |= {spec.kv_ring: x["kv_ring"], spec.score_ring: x["score_ring"], spec.entries: x["entries"]}
    return spec


# Indexer and attention --------------------------------------------------------------------------------------


@kernel(Indexer, IndexTopk, several=True)
def indexer(request: Request) -> Answer:
    """Scores, then the best of them: the first leaves out what the second need not look at."""
    op, best = request.calls[0].op, request.calls[-1].op
    if len(request.calls) != 2 or not isinstance(op, Indexer) or not isinstance(best, IndexTopk):
        names = ", ".join(call.op.name for call in request.calls)
        return No(f"takes an indexer and the index_topk of its scores together, not {names}")
    x, (scores,) = request.calls[0].operands, request.calls[0].outputs
    if request.calls[1].inputs != (scores,) or request.readers[scores]:
        return No("leaves out scores that index_topk does not look at; somebody else reads them")
    q, keys, weights = (request.types[x[n]] for n in ("q", "keys", "weights"))
    if not _is(q, BF16) or not _is(weights, BF16):
        return No(f"takes bf16 queries and head weights, not {q} and {weights}")
    if q.shape[2] != INDEX_WIDTH or q.shape[0] != keys.shape[0]:
        return No(f"takes one token per sequence in heads of {INDEX_WIDTH}, not {q} against {keys}")
    format_ = format_name(keys, CACHES)
    if format_ not in ("mxfp4", "bf16"):
        return No(f"takes keys of {MXFP4} or bf16, not {keys}")
    batch, heads, _ = q.shape
    capacity = keys.shape[1]
    first = IndexScoresSpec("index_scores", batch, heads, format_, capacity, op.ratio, best.k, op.factor)
    second = TopKSpec("index_topk", batch, capacity, best.k, op.ratio)  # of scores rounded to bf16
    values = {**x, "scores": scores, "out": request.calls[1].outputs[0]}
    return [
        launchable(request, emit_index_scores(first), values, stage="scores"),
        launchable(request, emit_top_k(second), values, stage="topk"),
    ]


@kernel(Attention)
def attention(request: Request) -> Answer:
    call = request.call
    op, x = call.op, call.operands
    assert isinstance(op, Attention)
    q, ring = request.types[x["q"]], request.types[x["ring"]]
    entries = request.types[x["entries"]] if "entries" in x else None
    batch, heads, width = q.shape
    if not _is(q, BF16):
        return No(f"takes bf16 queries, not {q}")
    if op.format not in (None, NVFP4_ROW):
        return No(f"leaves its result in bf16 or {NVFP4_ROW}, it does not quantize to {op.format}")
    if batch != ring.shape[0]:
        return No(f"takes one token per sequence, not {batch} against {ring}")
    if not math.isclose(op.scale, width**-0.5, rel_tol=1e-6):
        return No(f"scales scores by {width**-0.5} (head width {width}), not {op.scale}")
    form = format_name(ring, CACHES)
    if form not in ("fp8", "bf16") or (entries is not None and format_name(entries, CACHES) != form):
        return No(f"takes caches of {KV_FP8} or of bf16, not {ring} and {entries}")
    kind = "none" if entries is None else "selected" if "chosen" in x else "all"
    spec = AttentionSpec(
        {"none": "attention_swa", "selected": "attention_csa", "all": "attention_hca"}[kind],
        batch,
        heads,
        width,
        form,
        op.window,
        ring.shape[1],
        op.eps,
        entries=kind,
        selected_count=request.types[x["chosen"]].shape[1] if kind == "selected" else 0,
        ratio=max(1, op.ratio),
        capacity=entries.shape[1] if entries is not None else 0,
        exact_norm=op.precision is BF16,
    )
    values = {**x, "window": x["ring"], "out": call.outputs[0]}
    if kind == "selected":
        values["selected"] = x["chosen"]
    if op.format is None:
        return [launchable(request, emit_attention(spec), values)]
    q_value = values.pop("out")
    row = _array("row", TensorType(BF16, q.shape), "w")
    return [
        launchable(request, emit_attention(spec), values, stage="attend", scratch={"out": row["row"]}),
        _quantize(request, {"q": q_value}, request.types[q_value].shape),
    ]


# Experts ----------------------------------------------------------------------------------------------------


def _experts(
    request: Request, name: str, op: Swiglu | HashSwiglu, x: dict[str, int], k: int
) -> ExpertsSpec | No:
    row, shared_row = request.types[x["x"]], x.get("x_shared", x["x"])
    if shared_row != x["x"]:
        return No(f"gives routed and shared experts the same row, not {row} and {request.types[shared_row]}")
    routed, shared = request.types[x["w1"]], request.types[x["shared_w1"]]
    formats = format_name(routed, WEIGHTS), format_name(shared, WEIGHTS)
    if not all(formats):
        return No(f"takes weights of bf16, {', '.join(map(str, WEIGHTS))}, not {routed} and {shared}")
    encoded = row.format if isinstance(row, QuantType) else None
    packed = _packed(row) and len(row.shape) == 2 and formats == ("nvfp4", "nvfp4")
    if not packed and encoded != (None if formats[0] == "bf16" else FP8_ROW):
        wanted = f"{FP8_ROW} rows for quantized weights, bf16 for bf16, {NVFP4_ROW} if all are {NVFP4}"
        return No(f"takes {wanted}, not {row} for {routed} and {shared}")
    if op.out is not BF16:
        return No(f"rounds products to bf16, not {op.out}")
    experts, intermediate, hidden = routed.shape
    if shared.shape[0] != intermediate:
        return No(f"has a shared expert as wide as the routed ones, not {shared} beside {routed}")
    return ExpertsSpec(name, row.shape[0], hidden, intermediate, experts, k, *formats, op.limit, packed)


def _routed(
    request: Request, router: Router | HashRouter | HashSwiglu, spec: ExpertsSpec | No, values: dict[str, int]
) -> Answer:
    """The gate's logits if they are needed, then the experts' first half, which chooses the experts.

    `values` are the router's row and gate, and the operands of both kernels; weights are stored if it has
    them.
    """
    if isinstance(spec, No):
        return spec
    row, gate = request.types[values["row"]], request.types[values["gate"]]
    packed = _packed(row) and format_name(gate, WEIGHTS) == "nvfp4"
    if not packed and not (_is(row, BF16) and _is(gate, BF16)):
        return No(f"takes bf16 rows and gate or {NVFP4_ROW} and {NVFP4}, not {row} and {gate}")
    rows, (experts, hidden) = row.shape[0], gate.shape
    source = "scores" if isinstance(router, Router) else "table" if packed else "rows"
    up = emit_experts_up(spec, Routing(source, router.factor, "weights" in values))
    if source == "rows":
        return [launchable(request, up, values)]
    if packed:
        matrix = Matrix("gate", experts, "nvfp4", Activations("x", "f16", "unpack"), "logits", "f32")
        gate_kernel = emit_gemv(GemvSpec("router_gate", rows, hidden, (matrix,)))
    else:
        gate_kernel = emit_router_gate(RouterGateSpec(rows, hidden, experts))
    made, read = ({"logits": Scratch("logits", rows * experts * 4, access)} for access in "wr")
    return [
        launchable(request, gate_kernel, {**values, "x": values["row"]}, stage="gate", scratch=made),
        launchable(request, up, values, stage="up", scratch=read),
    ]


@kernel(Router, HashRouter, Swiglu, several=True)
def routed_experts(request: Request) -> Answer:
    """A router and the experts that it chooses: nobody else reads its weights, so each CTA makes its own."""
    first, last = request.calls[0], request.calls[-1]
    if len(request.calls) != 2 or not isinstance(last.op, Swiglu) or isinstance(first.op, Swiglu):
        names = ", ".join(call.op.name for call in request.calls)
        return No(f"takes a router and the swiglu of its experts together, not {names}")
    router, x = first.operands, last.operands
    assert isinstance(first.op, Router | HashRouter)
    if first.outputs != (x["experts"], x["weights"]):
        return No("takes experts and weights of one router")
    k = request.types[x["experts"]].shape[1]
    h, shared_h = last.outputs
    values = {**router, **x, "row": router["x"], "h": h, "shared_h": shared_h}
    return _routed(request, first.op, _experts(request, "experts_up", last.op, x, k), values)


@kernel(HashSwiglu)
def hash_swiglu(request: Request) -> Answer:
    call = request.call
    op, x = call.op, call.operands
    assert isinstance(op, HashSwiglu)
    if call.results != (0, 1, 2):
        return No("writes the chosen experts, which nobody reads")
    experts, h, shared_h = call.outputs
    routed = {**x, "x": x["x_routed"]}
    values = {**routed, "row": x["x"], "experts": experts, "h": h, "shared_h": shared_h}
    spec = _experts(request, "experts_up", op, routed, request.types[x["table"]].shape[1])
    return _routed(request, op, spec, values)


@kernel(ExpertsDown)
def experts_down(request: Request) -> Answer:
    call = request.call
    op, x = call.op, call.operands
    assert isinstance(op, ExpertsDown)
    h, routed, shared = (request.types[x[n]] for n in ("h", "w2", "shared_w2"))
    formats = format_name(routed, WEIGHTS), format_name(shared, WEIGHTS)
    if not all(formats):
        return No(f"takes weights of bf16, {', '.join(map(str, WEIGHTS))}, not {routed} and {shared}")
    wanted = None if formats[0] == "bf16" else FP8_ROW
    packed = op.format == op.shared_format == NVFP4_ROW and formats == ("nvfp4", "nvfp4")
    if not packed and (op.format != wanted or op.shared_format != wanted):
        found = f"{op.format} and {op.shared_format}"
        return No(f"encodes hidden rows as {wanted} for {formats[0]} weights, not as {found}")
    if not _is(h, BF16) or op.out is not BF16:
        return No(f"takes and makes bf16, not {h} and {op.out}")
    experts, hidden, intermediate = routed.shape
    spec = ExpertsSpec(
        "experts_down", h.shape[0], hidden, intermediate, experts, h.shape[1], *formats, math.inf, packed
    )
    values = {**x, "shared_h": x["h_shared"], "expert_ids": x["experts"], "y": call.outputs[0]}
    if not packed:
        return [launchable(request, emit_experts_down(spec), values)]
    launches: list[Launchable] = []
    scratch: dict[str, Scratch] = {}
    for name in ("h", "shared_h"):
        number = values.pop(name)
        shape = request.types[number].shape
        launches.append(_quantize(request, {"x": number}, shape, name, x=name))
        scratch |= _array(name, QuantType(NVFP4_ROW, shape), "r")
    return [*launches, launchable(request, emit_experts_down(spec), values, stage="down", scratch=scratch)]
