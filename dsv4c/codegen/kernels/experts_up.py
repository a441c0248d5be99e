"""The first launch of the experts of one MoE layer at decode: their choice, w1, w3 and SwiGLU.

A job is a tile of one expert and one token that chose it. A CTA chooses experts for itself. Chosen by score,
their weights start after the wait; named by a table, before it, as the shared expert's do. The tokens of a
step take turns on the same CTAs, and the stream of weights goes on from one to the next.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dsv4c.arch import Arch
from dsv4c.codegen.emit import Emission, Parameter, branches, compose, place_of
from dsv4c.codegen.kernels.chunk_experts import takes_many, up_launches
from dsv4c.codegen.kernels.experts import (
    ExpertsSpec,
    check_experts,
    most_stages,
    row_parameters,
    weight_parameters,
)
from dsv4c.codegen.kernels.formats import WEIGHT_FORMATS, WEIGHTS, format_name, holds, is_packed
from dsv4c.codegen.kernels.gemv import (
    BITS,
    WARPS,
    Activations,
    GemvSpec,
    Matrix,
    emit_gemv,
    k_warps_of,
    span_of,
    weights_text,
)
from dsv4c.codegen.kernels.router import RouterGateSpec, emit_router_gate, emit_router_rows
from dsv4c.codegen.lib.shapes import Product, Ring, Up, UpPart, padded
from dsv4c.codegen.lib.slices import RowGate
from dsv4c.codegen.registry import Answer, Call, No, Request, Scratch, kernel, launchable, takes
from dsv4c.codegen.tuning import tuned
from dsv4c.cuts import PLANNED, Cut
from dsv4c.errors import BuildError
from dsv4c.ir.ops.moe import Present
from dsv4c.passes.fusions.router import HashRouter, Router
from dsv4c.passes.fusions.swiglu import HashSwiglu, Swiglu
from dsv4c.types import BF16, FP8_ROW, NVFP4, NVFP4_ROW, QuantType


@dataclass(frozen=True)
class Routing:
    """Whence `up` has a token's experts and their weights, score / sum of scores * factor.

    scores: the k of largest score + bias, out of the gate's logits. table: a row of a table, and the logits.
    rows: a row of a table, and products with those experts' rows of a bf16 gate. `stored`: weights go to
    memory too. `given`: a token's id is the call's input, and read before the wait.
    """

    source: str
    factor: float
    stored: bool = True
    given: bool = True

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """What it reads."""
        table = (Parameter("table"), Parameter("tokens", early=self.given))
        return {
            "scores": (Parameter("logits"), Parameter("bias")),
            "table": (Parameter("logits"), *table),
            "rows": (Parameter("row"), Parameter("gate"), *table),
        }[self.source]

    def signature(self, spec: ExpertsSpec) -> list[str]:
        """The parameters with their types."""
        types = {
            "logits": f"f32[N,{spec.experts}]",
            "bias": f"f32[{spec.experts}]",
            "row": f"bf16[N,{spec.hidden}]",
            "gate": f"bf16[{spec.experts},{spec.hidden}]",
            "table": f"i32[*,{spec.top_k}]",
            "tokens": "i32[N]",
        }
        return [f"{p.operand}: {types[p.operand]}" for p in self.parameters]


def _up(spec: ExpertsSpec, routing: Routing, arch: Arch, cut: Cut = PLANNED) -> Up:
    """Shared and routed part. Rounds are chosen so that all CTAs fit the machine at once and read about the
    same. Where experts are chosen by score, and tokens take no turns, some CTAs have a job of the shared
    expert first: its weights are read while nobody knows what else to read.
    """
    joined = _joined(spec, routing, arch, cut)
    if joined is not None:
        return joined
    tiles, turns = -(-spec.intermediate // 16), spec.turns
    kind = "f16" if spec.quantized else "bf16"
    k_warps = k_warps_of(spec.hidden, WARPS // 2)

    def part(name: str, format: str, jobs: int, rows: int, turns: int, ctas: int) -> UpPart:
        # As codes, many rows leave room for weights.
        product = Product(format, "e4m3" if rows > 1 else kind, rows, spec.hidden)
        rounds = -(-jobs // ctas)

        def planned(stages: int) -> UpPart:
            span = span_of(product, k_warps)
            flight = cut.ahead or (2 if turns > 1 and routing.source == "scores" else 0)
            ring = Ring(product, 1, k_warps, span, stages, rounds, 2, turns, flight=flight)
            if name == "shared":
                return UpPart(ring, jobs, ctas)
            scores = 8 * padded(spec.experts) if routing.source == "scores" else 0
            sums = 4 * ring.warps * spec.top_k if routing.source == "rows" else 0
            # The choice of every turn's row is kept.
            return UpPart(ring, jobs, ctas, scores, sums, turns * 8 * spec.top_k)

        return planned(most_stages(spec.name, lambda stages: planned(stages).at, arch, cut))

    def shared_of(rounds: int) -> UpPart:
        return part("shared", spec.shared, tiles, turns, 1, -(-tiles // rounds))

    def split(rounds: tuple[int, ...]) -> tuple[int, int]:
        return -(-tiles // rounds[0]), -(-spec.top_k * tiles * turns // rounds[1])

    def longest(rounds: tuple[int, ...]) -> float:
        if sum(split(rounds)) > 2 * arch.sms:
            return math.inf
        return max(rounds[0] * BITS[spec.shared], rounds[1] * BITS[spec.routed])

    # A warp's lanes have the rounds of a token, half an SM's shared memory the sums of all tokens'.
    lanes = range(1, 33)
    fit = list(itertools.takewhile(lambda n: shared_of(n).at.end <= arch.shared_of(2), lanes))
    tried = (cut.rounds * turns,) if cut.rounds else range(1, 32 * turns + 1)
    rounds = min(itertools.product(fit or lanes, tried), key=longest)
    if math.isinf(longest(rounds)):
        raise BuildError(f"{spec.name}: rounds of {rounds} tiles take more CTAs than are resident at once")
    routed = min(split(rounds)[1], spec.top_k * tiles)
    return Up(
        shared_of(rounds[0]),
        part("routed", spec.routed, spec.top_k * tiles, 1, turns, routed),
        *(spec.experts, spec.top_k, routing.source, routing.factor, spec.limit),
        packed=spec.packed,
        stored=routing.stored,
        judged=spec.judged,
    )


def _joined(spec: ExpertsSpec, routing: Routing, arch: Arch, cut: Cut) -> Up | None:
    """A job of the shared expert on the first CTAs, then jobs of routed ones, perhaps more on the others."""
    tiles, jobs = -(-spec.intermediate // 16), spec.top_k * -(-spec.intermediate // 16)
    if routing.source != "scores" or spec.turns > 1:
        return None

    def ctas(rounds: tuple[int, int]) -> int:
        fewer, most = rounds
        return tiles + -(-(jobs - fewer * tiles) // most)

    def longest(rounds: tuple[int, int]) -> float:
        fewer, most = rounds  # of the shared expert's weights most come while memory is idle
        return max(BITS[spec.shared] / 2 + fewer * BITS[spec.routed], most * BITS[spec.routed])

    most = (cut.rounds,) if cut.rounds else range(1, 33)
    pairs = [(fewer, n) for n in most for fewer in range(n + 1) if tiles < ctas((fewer, n)) <= 2 * arch.sms]
    if not pairs:
        return None
    fewer, rounds = min(pairs, key=longest)
    kind = "f16" if spec.quantized else "bf16"
    k_warps = k_warps_of(spec.hidden, WARPS // 2)

    def ring(format: str, rounds: int, stages: int, after: int = 0) -> Ring:
        product = Product(format, kind, 1, spec.hidden)
        span = span_of(product, k_warps)
        return Ring(product, 1, k_warps, span, stages, rounds, 2, after=after, flight=cut.ahead)

    def planned(stages: int) -> Up:
        then = ring(spec.routed, rounds, stages)
        first = ring(spec.shared, 1, 1, then.steps)
        room = then.ring_bytes - 2 * first.scale_bytes
        first = replace(first, stages=min(room // first.slot_bytes, first.steps))
        routed = UpPart(
            *(then, jobs, ctas((fewer, rounds)), 8 * padded(spec.experts), 0, 8 * spec.top_k, tiles, fewer)
        )
        numbers = spec.experts, spec.top_k, routing.source, routing.factor, spec.limit
        return Up(UpPart(first, tiles, tiles), routed, *numbers, spec.packed, routing.stored, spec.judged)

    up = planned(most_stages(spec.name, lambda stages: planned(stages).both, arch, cut))
    return up if up.shared.ring.stages > 0 else None


def emit_experts_up(spec: ExpertsSpec, routing: Routing, arch: Arch) -> Emission:
    """h = bf16(silu(min(x w1, limit)) * clamp(x w3, -limit, limit) * weight), 1 for the shared expert."""
    check_experts(spec)
    if spec.top_k > spec.experts or spec.experts > 1024:
        raise BuildError(f"{spec.name}: {spec.top_k} of {spec.experts} experts: want some of at most 1024")
    return tuned(lambda cut: _emitted(spec, routing, arch, cut), arch, spec.name, spec, routing)


def _emitted(spec: ExpertsSpec, routing: Routing, arch: Arch, cut: Cut) -> Emission:
    up = _up(spec, routing, arch, cut)
    parameters = (
        *row_parameters("x", spec, spec.quantized),
        *routing.parameters,
        *([Parameter("positions")] if spec.judged else []),
        *weight_parameters("w1", spec.routed),
        *weight_parameters("w3", spec.routed),
        *weight_parameters("shared_w1", spec.shared),
        *weight_parameters("shared_w3", spec.shared),
        Parameter("experts"),
        *([Parameter("weights")] if routing.stored else []),
        Parameter("h"),
        Parameter("shared_h"),
    )
    there = {p.name: p for p in parameters}
    matrices = ("w1", "w3", "shared_w1", "shared_w3")
    fields = [
        *("x", "x_scale", "x_global_scale", "logits", "bias", "row", "gate", "table", "tokens", "positions"),
        *(f"{matrix}{part}" for matrix in matrices for part in ("", "_scale", "_global_scale")),
        *("experts", "weights", "h", "shared_h"),
    ]
    turns = spec.turns
    grid = up.routed.ctas if up.joined else up.shared.ctas + up.routed.ctas
    what = f"{turns} tokens, which take turns" if turns > 1 else "each token on CTAs of its own"
    emission = compose(
        spec.name,
        f"{spec.name}: the experts' first half at decode, {what}.\n\n{_what(spec, routing)}",
        {there.get(f"m_{name}", Parameter(name)): "" if f"m_{name}" in there else None for name in fields},
        f"Launch: grid {grid}{' x N' if turns == 1 else ''}, block {up.threads}, {up.bytes} bytes of shared "
        f"memory, programmatic edges allowed.\n{weights_text(2 * spec.weight_bytes, arch, 'token')}",
        [
            f"s = ptx.shared({up.bytes})",
            "block, token, _ = cute.arch.block_idx()",
            "warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())",
            _branch(up, *_routed_stages(up, routing, "block"))
            if up.joined
            else branches(
                [
                    _branch(up, *_shared_stages()),
                    _branch(up, *_routed_stages(up, routing, place_of("block", up.shared.ctas))),
                ],
                [up.shared.ctas, grid],
            ),
        ],
        threads=up.threads,
        grid=(grid, "rows" if turns == 1 else 1, 1),
        sizes={"rows": spec.batch} if turns == 1 else None,
        resident=2 if turns > 1 or routing.source == "rows" else None,
        spec=up,
        record="experts_up.Operands",
    )
    return replace(emission, packing=packing_of(up))


def packing_of(up: Up) -> dict[str, str]:
    """How the weights lie, by operand."""
    parts = {"w1": up.routed, "w3": up.routed, "shared_w1": up.shared, "shared_w3": up.shared}
    return {name: part.packing for name, part in parts.items()}


WAIT = ("ptx.wait()", "ptx.launch_dependents()")


def _branch(up: Up, multiply: Sequence[str], read: Sequence[str]) -> str:
    """The stages of the warps that multiply, and of the one that reads the weights."""
    return branches(["\n".join(stages) for stages in (multiply, read)], [up.consumers // 32], "warp")


def _shared_stages() -> tuple[list[str], list[str]]:
    multiply = [
        "at = experts_up.enter_shared(SPEC, m, s, block, token)",
        *WAIT,
        "experts_up.multiply_shared(SPEC, m, at)",
    ]
    return multiply, ["experts_up.read_shared(SPEC, m, s, block)"]


def _routed_stages(up: Up, routing: Routing, local: str) -> tuple[list[str], list[str]]:
    many = up.routed.ring.turns > 1
    multiply = [f"at = experts_up.enter(SPEC, m, s, {local}, token)"]
    read = [f"at = experts_up.open_weights(SPEC, m, s, {local}, token)"]
    if routing.source == "scores":
        multiply += [*WAIT, f"{'turns = ' if many else ''}experts_up.score(SPEC, m, at)"]
    elif many:
        multiply += [*WAIT, "turns = experts_up.look_up_all(SPEC, m, at)"]
    else:
        first = ["known = experts_up.look_up(SPEC, m, at)"]
        multiply += [*first, *WAIT] if routing.given else [*WAIT, *first]
        multiply += ["experts_up.weigh(SPEC, m, at, known)"]
    multiply += [f"experts_up.{'take_turns(SPEC, m, at, turns)' if many else 'multiply(SPEC, m, at)'}"]
    waits = routing.source == "scores" or up.skips or not routing.given
    return multiply, [*read, *(WAIT if waits else []), "experts_up.read_weights(SPEC, m, at)"]


def _what(spec: ExpertsSpec, routing: Routing) -> str:
    """Operands and results, for people."""
    table, n, k, limit = routing.source != "scores", spec.hidden, spec.intermediate, spec.limit
    coded = "q[e4m3,ue8m0,1x128]" if spec.quantized else "bf16"
    chosen = "the table's row for the token's id"
    best = "those of largest score + bias, the lower number on ties"
    weights = f"score / sum of the experts' scores * {routing.factor}"
    dropped = ", 0 where positions: i32[N] are -1" if spec.judged else ""
    lines = [
        f"x: {'q[e2m1,e4m3,1x16,row]' if spec.packed else coded}[N,{n}]",
        ", ".join(routing.signature(spec)),
        f"w1, w3: {WEIGHT_FORMATS[spec.routed]}[{spec.experts},{k},{n}]",
        f"shared_w1, shared_w3: {WEIGHT_FORMATS[spec.shared]}[{k},{n}]",
        "",
        f"experts: i32[N,{spec.top_k}] = {chosen if table else best}",
        f"weights: f32[N,{spec.top_k}] = {weights}{'' if routing.stored else ', not stored'}{dropped}",
        f"  where score = sqrt(softplus({'row . gate' if routing.source == 'rows' else 'logits'}))",
        f"h: bf16[N,{spec.top_k},{k}], shared_h: bf16[N,{k}]",
        f"  = silu(min(x w1, {limit})) * clamp(x w3, -{limit}, {limit}) * weights (1 for the shared expert)",
    ]
    return "\n".join(f"    {line}" if line else "" for line in lines)


# Binding ----------------------------------------------------------------------------------------------------


def _experts(
    request: Request, name: str, op: Swiglu | HashSwiglu, x: dict[str, int], k: int, *, judged: bool = False
) -> ExpertsSpec | No:
    row, shared_row = request.types[x["x"]], x.get("x_shared", x["x"])
    if shared_row != x["x"]:
        return No(f"gives routed and shared experts the same row, not {row} and {request.types[shared_row]}")
    routed, shared = request.types[x["w1"]], request.types[x["shared_w1"]]
    formats = format_name(routed, WEIGHTS), format_name(shared, WEIGHTS)
    if not all(formats):
        return No(f"takes weights of bf16, {', '.join(map(str, WEIGHTS))}, not {routed} and {shared}")
    encoded = row.format if isinstance(row, QuantType) else None
    packed = is_packed(row) and len(row.shape) == 2 and formats == ("nvfp4", "nvfp4")
    if not packed and encoded != (None if formats[0] == "bf16" else FP8_ROW):
        wanted = f"{FP8_ROW} rows for quantized weights, bf16 for bf16, {NVFP4_ROW} if all are {NVFP4}"
        return No(f"takes {wanted}, not {row} for {routed} and {shared}")
    if op.out is not BF16:
        return No(f"rounds products to bf16, not {op.out}")
    experts, intermediate, hidden = routed.shape
    if shared.shape[0] != intermediate:
        return No(f"has a shared expert as wide as the routed ones, not {shared} beside {routed}")
    return ExpertsSpec(
        *(name, row.shape[0], hidden, intermediate, experts, k, *formats),
        limit=op.limit,
        packed=packed,
        judged=judged,
    )


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
    packed = is_packed(row) and format_name(gate, WEIGHTS) == "nvfp4"
    if not packed and not (holds(row, BF16) and holds(gate, BF16)):
        return No(f"takes bf16 rows and gate or {NVFP4_ROW} and {NVFP4}, not {row} and {gate}")
    rows, (experts, hidden) = row.shape[0], gate.shape
    # Products with the gate are made by each CTA, for a token alone; of several one makes them for all.
    apart = packed or spec.turns > 1
    source = "scores" if isinstance(router, Router) else "table" if apart else "rows"
    gemm = holds(row, BF16) and holds(gate, BF16) and hidden % 128 == 0 and experts % 8 == 0
    if gemm and takes_many(spec, request.arch):
        up = _up(spec, Routing(source, router.factor), request.arch)
        packings = {"w1": up.routed.packing, "shared_w1": up.shared.packing}
        return up_launches(request, spec, packings, router.factor, source != "scores", values)
    given = "tokens" not in values or values["tokens"] in request.given
    half = emit_experts_up(spec, Routing(source, router.factor, "weights" in values, given), request.arch)
    if source == "rows":
        return [launchable(request, half, values)]
    if packed:
        matrix = Matrix("gate", experts, "nvfp4", Activations("x", "f16", "unpack"), "logits", "f32")
        gate_kernel = emit_gemv(GemvSpec("router_gate", rows, hidden, (matrix,)), request.arch)
    elif source == "table":
        up = _up(spec, Routing(source, router.factor), request.arch)
        row_gate = RowGate(hidden, experts, spec.top_k, up.consumers, up.held)
        gate_kernel = emit_router_rows(row_gate, rows, request.arch, given=given)
    else:
        gate_kernel = emit_router_gate(RouterGateSpec(rows, hidden, experts), request.arch)
    made, read = ({"logits": Scratch("logits", rows * experts * 4, access)} for access in "wr")
    return [
        launchable(request, gate_kernel, {**values, "x": values["row"]}, stage="gate", scratch=made),
        launchable(request, half, values, stage="up", scratch=read),
    ]


CHOSEN = (
    takes(Router, "k", "factor"),
    takes(HashRouter, "factor"),
    takes(Present),
    takes(Swiglu, "out", "limit"),
)
HASH_SWIGLU = takes(HashSwiglu, "out", "limit", "factor")


def positions_of(calls: Sequence[Call]) -> dict[str, int]:
    """The positions that say which rows of a router's are there, if some may not be."""
    places = (call.operands["positions"] for call in calls if isinstance(call.op, Present))
    found = next(places, None)
    return {} if found is None else {"positions": found}


@kernel(*CHOSEN, chained=True)
def routed_experts(request: Request) -> Answer:
    """A router and the experts that it chooses: nobody else reads its weights, so each CTA makes its own, or
    none for rows that are not there.
    """
    first, between, last = request.calls[0], request.calls[1:-1], request.calls[-1]
    judged = len(between) == 1 and isinstance(between[0].op, Present)
    if not isinstance(last.op, Swiglu) or isinstance(first.op, Swiglu | Present) or between[judged:]:
        names = ", ".join(call.op.name for call in request.calls)
        return No(f"takes a router and the swiglu of its experts together, not {names}")
    router, x = first.operands, last.operands
    assert isinstance(first.op, Router | HashRouter)
    experts, weights = first.outputs
    if judged:
        if between[0].operands["weights"] != weights or request.readers[weights]:
            return No("takes the weights of its own router, which nobody else reads")
        (weights,) = between[0].outputs
    if (experts, weights) != (x["experts"], x["weights"]):
        return No("takes experts and weights of one router")
    k = request.types[x["experts"]].shape[1]
    h, shared_h = last.outputs
    values = {**router, **x, **positions_of(between), "row": router["x"], "h": h, "shared_h": shared_h}
    return _routed(request, first.op, _experts(request, "experts_up", last.op, x, k, judged=judged), values)


@kernel(HASH_SWIGLU)
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
