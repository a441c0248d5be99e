"""The second launch of the experts of one MoE layer at decode: hidden rows quantized, w2, and the sum.

A CTA works on one tile of columns, of every expert that a token chose; the tokens of a step take turns on it,
and the stream of weights goes on from one to the next.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

from dsv4c.arch import Arch
from dsv4c.codegen.emit import Emission, Parameter, compose
from dsv4c.codegen.kernels.chunk_experts import down_launches, takes_many
from dsv4c.codegen.kernels.experts import (
    ExpertsSpec,
    check_experts,
    row_parameters,
    weight_parameters,
)
from dsv4c.codegen.kernels.experts_up import (
    CHOSEN,
    HASH_SWIGLU,
    hash_swiglu,
    positions_of,
    routed_experts,
)
from dsv4c.codegen.kernels.formats import WEIGHT_FORMATS, WEIGHTS, format_name, holds
from dsv4c.codegen.kernels.gemv import BOUNDARY, STAGES, WARPS, k_warps_of, span_of, weights_text
from dsv4c.codegen.kernels.quantize import quantize_rows, scratch_for
from dsv4c.codegen.lib.shapes import Down, Product, Ring
from dsv4c.codegen.registry import Answer, Call, Launchable, No, Request, Scratch, kernel, launchable, takes
from dsv4c.codegen.tuning import tuned
from dsv4c.cuts import PLANNED, Cut
from dsv4c.errors import BuildError
from dsv4c.passes.fusions.experts_down import ExpertsDown
from dsv4c.passes.fusions.swiglu import HashSwiglu, Swiglu
from dsv4c.types import BF16, F32, FP8_ROW, NVFP4_ROW, QuantType


def packing_of(down: Down) -> dict[str, str]:
    """How the weights lie, by operand."""
    rings = {"w2": down.routed, "shared_w2": down.shared}
    return {n: f"{r.product.weight}/{r.tile_warps}x{r.span}" for n, r in rings.items()}


def _down(spec: ExpertsSpec, arch: Arch, cut: Cut = PLANNED, by: str = "") -> Down:
    tiles = -(-spec.hidden // 16)
    tile_warps = next(n for n in (1, 2, 4, 8) if n == 8 or -(-tiles // n) <= 2 * arch.sms)
    k_warps = k_warps_of(spec.intermediate, WARPS // tile_warps)
    kind = "bf16" if not spec.quantized else "f16" if spec.packed else "e4m3"
    shared = Product(spec.shared, kind, spec.turns, spec.intermediate)

    def planned(side: int, kind: str, early: int, stages: int) -> Down:
        routed = Product(spec.routed, kind, 1, spec.intermediate)
        cuts, resident = (tile_warps, k_warps), 2 // side
        first = Ring(shared, *cuts, span_of(shared, k_warps), early, 1, side, resident=resident)
        then = Ring(
            *(routed, *cuts, span_of(routed, k_warps), stages, spec.top_k, side, spec.turns),
            resident=resident,
            flight=cut.ahead,
        )
        if spec.turns > 1:
            pitch, after = max(first.slot_bytes, then.slot_bytes), then.all_steps
            first = replace(first, stages=stages, after=after, pitch=pitch)
            then = replace(then, before=first.steps, pitch=pitch)
        return Down(
            first,
            then,
            Product(spec.routed, kind, spec.top_k, spec.intermediate),
            *(spec.hidden, spec.experts, spec.top_k, by, spec.out, spec.packed, spec.skips),
        )

    # A CTA reads all hidden rows of a token, a quarter as many bytes as weights: one CTA on an SM, with twice
    # the tiles, reads them once where two read them twice. FP4 is multiplied as f16: codes of rows that are
    # widened once need no more of the pipe that places its bits, which turns keep busy. Many rows leave less
    # room for that, and for what comes early.
    groups = -(-tiles // tile_warps)
    paired = spec.turns > 1 and groups % 2 == 0 and arch.sms < groups
    wide = spec.turns > 1 and kind == "e4m3"
    every = itertools.product(
        (2, 1) if paired else (1,),
        ("f16", kind) if wide else (kind,),
        (cut.early,) if cut.early else (2, 1),
        (cut.stages,) if cut.stages else range(STAGES, 1, -1),
    )

    def worth(down: Down) -> tuple[int, int]:
        beside = BOUNDARY if spec.turns > 1 and down.routed.resident == 1 else 0
        resident = [n for n in (down.routed.resident, 1) if down.at.end + beside <= arch.shared_of(n)]
        return len(resident), min(down.routed.stages, 3)

    best = max(itertools.starmap(planned, every), key=worth)
    if worth(best)[0] == 0:
        raise BuildError(f"{spec.name}: the activations leave no shared memory for two stages of weights")
    return best


CHOICES = {
    "": (),
    "scores": (Parameter("logits", early=True), Parameter("bias")),
    "table": (Parameter("table"), Parameter("tokens", early=True)),
}
"""By what a token's experts are known before the wait: not at all, by the gate's logits, or by a table."""


def emit_experts_down(spec: ExpertsSpec, arch: Arch, by: str = "") -> Emission:
    """y = out(sum over the token's routed experts of fp8(h) w2, plus the shared expert's), accumulated in
    f32. `by`: one of `CHOICES`.
    """
    check_experts(spec)
    return tuned(lambda cut: _emitted(spec, arch, by, cut), arch, spec.name, spec, by)


def _emitted(spec: ExpertsSpec, arch: Arch, by: str, cut: Cut) -> Emission:
    down = _down(spec, arch, cut, by)
    parameters = (
        *row_parameters("h", spec, spec.packed),
        *row_parameters("shared_h", spec, spec.packed),
        Parameter("expert_ids"),
        *([Parameter("positions")] if spec.skips else []),
        *CHOICES[by],
        *weight_parameters("w2", spec.routed),
        *weight_parameters("shared_w2", spec.shared),
        Parameter("y"),
    )
    there = {p.name: p for p in parameters}
    fields = [
        *(f"{row}{part}" for row in ("h", "shared_h") for part in ("", "_scale", "_global_scale")),
        *("expert_ids", "positions", "logits", "bias", "table", "tokens"),
        *(f"{matrix}{part}" for matrix in ("w2", "shared_w2") for part in ("", "_scale", "_global_scale")),
        "y",
    ]
    ctas, turns = down.groups // down.routed.matrices, down.routed.turns
    # As if whole fours of warps were there, two CTAs on an SM: ptxas gives each thread 48 registers then.
    threads = -(-down.threads // 128) * 128 if turns > 1 else down.threads
    wait = ["    ptx.wait()", "    ptx.launch_dependents()"]
    first = ["    g_routed = experts_down.read_first(SPEC, m, at)"]
    what = f"{turns} tokens, which take turns" if turns > 1 else "each token on CTAs of its own"
    emission = compose(
        spec.name,
        f"{spec.name}: the experts' second half at decode, {what}.\n\n{_what(spec, by)}",
        {there.get(f"m_{name}", Parameter(name)): "" if f"m_{name}" in there else None for name in fields},
        f"Launch: grid {ctas}{' x N' if turns == 1 else ''}, block {threads}, {down.at.end} bytes of "
        f"shared memory, programmatic edges allowed.\n{weights_text(spec.weight_bytes, arch, 'token')}",
        [
            f"s = ptx.shared({down.at.end})",
            "group, token, _ = cute.arch.block_idx()",
            "warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())",
            f"if warp < {down.routed.warps}:",
            "    at = experts_down.enter(SPEC, m, s, group, token)",
            *wait,
            "    experts_down.sum_columns(SPEC, m, at)",
            f"elif warp == {down.routed.warps}:" if turns > 1 else "else:",
            "    at = experts_down.open_weights(SPEC, m, s, group, token)",
            *([*first, *wait] if by else [*wait, *first]),
            "    experts_down.read_rest(SPEC, m, at, g_routed)",
        ],
        threads=threads,
        grid=(ctas, "rows" if turns == 1 else 1, 1),
        sizes={"rows": spec.batch} if turns == 1 else None,
        resident=2 if turns > 1 else None,
        spec=down,
        record="experts_down.Operands",
    )
    return replace(emission, packing=packing_of(down))


def _what(spec: ExpertsSpec, by: str) -> str:
    """Operands and results, for people."""
    rows = "q[e2m1,e4m3,1x16,row]" if spec.packed else "bf16"
    n, k = spec.hidden, spec.intermediate
    choice = {
        "": "",
        "scores": f"logits: f32[N,{spec.experts}], bias: f32[{spec.experts}]",
        "table": f"table: i32[*,{spec.top_k}], tokens: i32[N]",
    }[by]
    coded = spec.quantized and not spec.packed
    lines = [
        f"h: {rows}[N,{spec.top_k},{k}], shared_h: {rows}[N,{k}]",
        f"expert_ids: i32[N,{spec.top_k}]{', as experts_up chose them' if by else ''}",
        *([choice] if by else []),
        f"w2: {WEIGHT_FORMATS[spec.routed]}[{spec.experts},{n},{k}]",
        f"shared_w2: {WEIGHT_FORMATS[spec.shared]}[{n},{k}]",
        "",
        f"y: {spec.out}[N,{n}] = q(shared_h) shared_w2 + sum over the token's experts of q(h) w2, rounded "
        "once",
        *(["  the shared expert's alone where positions: i32[N] are -1, whose h is 0"] if spec.skips else []),
        f"q: {'FP8, e4m3 with ue8m0 scales per 128' if coded else 'nothing'}",
    ]
    return "\n".join(f"    {line}" if line else "" for line in lines)


# Binding ----------------------------------------------------------------------------------------------------


def _spec(request: Request, call: Call, *, judged: bool = False) -> ExpertsSpec | No:
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
    if not holds(h, BF16) or op.out not in (BF16, F32):
        return No(f"takes bf16 and makes bf16 or f32, not {h} and {op.out}")
    experts, hidden, intermediate = routed.shape
    return ExpertsSpec(
        "experts_down",
        h.shape[0],
        hidden,
        intermediate,
        experts,
        h.shape[1],
        *formats,
        math.inf,
        packed,
        str(op.out),
        judged,
    )


def _values(call: Call) -> dict[str, int]:
    x = call.operands
    return {**x, "shared_h": x["h_shared"], "expert_ids": x["experts"], "y": call.outputs[0]}


DOWN = takes(ExpertsDown, "out", "format", "shared_format")


@kernel(*CHOSEN, HASH_SWIGLU, DOWN, chained=True)
def experts(request: Request) -> Answer:
    """Both halves of a layer's experts. What the first one chose them by is old when the second one begins,
    which makes the choice again and so need not wait for it, unless a table is asked for tokens that the call
    itself makes.
    """
    *first, last = request.calls
    if not first or not isinstance(last.op, ExpertsDown) or not isinstance(first[-1].op, Swiglu | HashSwiglu):
        return No("takes a router, the experts' first half and their second")
    places = positions_of(first)
    spec = _spec(request, last, judged=bool(places))
    if isinstance(spec, No):
        return spec
    if spec.packed or takes_many(spec, request.arch):
        return No(f"takes few rows of bf16, not {spec.batch}{' of NVFP4' if spec.packed else ''}")
    router = first[0].operands
    given = "tokens" not in router or router["tokens"] in request.given
    if not given and not places:
        return No("reads a table before the wait: its tokens must be the call's input")
    half = replace(request, calls=tuple(first))
    up = hash_swiglu.ask(half) if isinstance(first[0].op, HashSwiglu) else routed_experts.ask(half)
    if isinstance(up, No):
        return up
    by = "" if not given else "table" if "tokens" in router else "scores"
    names = [p.operand for p in CHOICES[by] if p.operand in router]
    values = _values(last) | {name: router[name] for name in names} | places
    logits = {"logits": Scratch("logits", up[-1].scratch["logits"], "early")} if by == "scores" else {}
    down = emit_experts_down(spec, request.arch, by)
    return [
        *(replace(launch, stage=launch.stage or "up") for launch in up),
        launchable(request, down, values, stage="down", scratch=logits),
    ]


@kernel(DOWN)
def experts_down(request: Request) -> Answer:
    spec = _spec(request, request.call)
    if isinstance(spec, No):
        return spec
    values = _values(request.call)
    if takes_many(spec, request.arch):
        return down_launches(request, spec, packing_of(_down(spec, request.arch)), values)
    if not spec.packed:
        return [launchable(request, emit_experts_down(spec, request.arch), values)]
    launches: list[Launchable] = []
    scratch: dict[str, Scratch] = {}
    for name in ("h", "shared_h"):
        number = values.pop(name)
        shape = request.types[number].shape
        launches.append(quantize_rows(request, {"x": number}, shape, name, x=name))
        scratch |= scratch_for(name, QuantType(NVFP4_ROW, shape), "r")
    return [
        *launches,
        launchable(request, emit_experts_down(spec, request.arch), values, stage="down", scratch=scratch),
    ]
