"""The second launch of the experts of one MoE layer at decode: hidden rows quantized, w2, and the sum.

A CTA works on one tile of columns, of every expert that a token chose; the tokens of a step take turns on it,
and the stream of weights goes on from one to the next.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

from dsv4c.arch import Arch
from dsv4c.codegen.emit import Emission, Parameter, render
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
    padded,
    positions_of,
    routed_experts,
)
from dsv4c.codegen.kernels.formats import WEIGHT_FORMATS, WEIGHTS, format_name, holds
from dsv4c.codegen.kernels.gemv import STAGES, WARPS, k_warps_of, span_of
from dsv4c.codegen.kernels.quantize import quantize_rows, scratch_for
from dsv4c.codegen.lib.shapes import Layout, Product, Ring
from dsv4c.codegen.registry import Answer, Call, Launchable, No, Request, Scratch, kernel, launchable, takes
from dsv4c.codegen.tuning import tuned
from dsv4c.cuts import PLANNED, Cut
from dsv4c.errors import BuildError
from dsv4c.passes.fusions.experts_down import ExpertsDown
from dsv4c.passes.fusions.swiglu import HashSwiglu, Swiglu
from dsv4c.types import BF16, F32, FP8_ROW, NVFP4_ROW, QuantType


@dataclass(frozen=True)
class DownRings:
    """Both streams of a `down` CTA: the shared expert's tile for all tokens, then for each token the tile of
    every routed expert, a round each.
    """

    shared: Ring
    routed: Ring
    rows: Product  # the routed experts' hidden rows of a token, together

    @property
    def packing(self) -> dict[str, str]:
        """How the weights lie, by operand."""
        rings = {"w2": self.routed, "shared_w2": self.shared}
        return {n: f"{r.product.weight}/{r.tile_warps}x{r.span}" for n, r in rings.items()}

    @property
    def window(self) -> int:
        """Rounds whose partial sums are kept: a token's, and those that a warp may be ahead of one that adds
        them up, as far as the ring is deep.
        """
        ahead = -(-self.routed.depth // self.routed.steps) if self.routed.turns > 1 else 0
        return self.routed.rounds + ahead

    @property
    def layout(self) -> Layout:
        """Shared arrays of a CTA."""
        return Layout(
            ring=self.routed.ring_bytes,
            shared_ring=self.shared.ring_bytes,
            x=self.rows.x_bytes,
            fx=self.rows.fx_bytes,
            shared_x=self.shared.product.x_bytes,
            shared_fx=self.shared.product.fx_bytes,
            scale=self.routed.scale_bytes,
            shared_scale=self.shared.scale_bytes,
            part=self.window * (self.routed.part_bytes // self.routed.rounds),
            shared_part=self.shared.part_bytes,
            bars=self.routed.bars_bytes,
            shared_bars=self.shared.bars_bytes,
            bar=0 if self.rows.fx_bytes else 16,
        )


def _down_rings(spec: ExpertsSpec, arch: Arch, cut: Cut = PLANNED) -> DownRings:
    tiles = -(-spec.hidden // 16)
    tile_warps = next(n for n in (1, 2, 4, 8) if n == 8 or -(-tiles // n) <= 2 * arch.sms)
    k_warps = k_warps_of(spec.intermediate, WARPS // tile_warps)
    kind = "bf16" if not spec.quantized else "f16" if spec.packed else "e4m3"
    shared = Product(spec.shared, kind, spec.turns, spec.intermediate)

    def planned(side: int, kind: str, early: int, stages: int) -> DownRings:
        routed = Product(spec.routed, kind, 1, spec.intermediate)
        cuts, resident = (tile_warps, k_warps), 2 // side
        return DownRings(
            Ring(shared, *cuts, span_of(shared, k_warps), early, 1, side, resident=resident),
            Ring(
                *(routed, *cuts, span_of(routed, k_warps), stages, spec.top_k, side, spec.turns),
                resident=resident,
                flight=cut.ahead,
            ),
            Product(spec.routed, kind, spec.top_k, spec.intermediate),
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

    def worth(rings: DownRings) -> tuple[int, int]:
        resident = [n for n in (rings.routed.resident, 1) if rings.layout.end <= arch.shared_of(n)]
        return len(resident), min(rings.routed.stages, 3)

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
    rings = _down_rings(spec, arch, cut)
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
    groups = -(-spec.hidden // (16 * rings.routed.tile_warps))
    grid = (groups // rings.routed.matrices, spec.batch // spec.turns, 1)
    source = render(
        "experts_down.py.jinja",
        spec=spec,
        rings=rings,
        by=by,
        choosing=[
            *(["m_expert_ids"] if not by or spec.turns > 1 else []),
            *(["m_positions"] if spec.skips else []),
            *(p.name for p in CHOICES[by]),
        ],
        padded=padded(spec.experts),
        pointers=[p.name for p in parameters],
        grid=grid,
        groups=groups,
        warps=rings.routed.warps,
        shared=rings.layout.end,
        nbytes=spec.weight_bytes,
        arch=arch,
        formats=WEIGHT_FORMATS,
    )
    return Emission(
        symbol=f"{spec.name}_0",
        source=source,
        grid=grid,
        block=rings.routed.warps * 32 + 32,
        shared=rings.layout.end,
        parameters=parameters,
        packing=rings.packing,
    )


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
        return down_launches(request, spec, _down_rings(spec, request.arch).packing, values)
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
