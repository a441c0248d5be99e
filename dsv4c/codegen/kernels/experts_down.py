"""The second launch of the experts of one MoE layer at decode: hidden rows quantized, w2, and the sum.

A CTA works on one tile of columns, of every expert that a token chose; the tokens of a step take turns on it,
and the stream of weights goes on from one to the next.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsv4c.arch import Arch
from dsv4c.codegen.emit import Emission, Parameter, render
from dsv4c.codegen.kernels.chunk_experts import down_launches, takes_many
from dsv4c.codegen.kernels.experts import (
    ExpertsSpec,
    check_experts,
    most_stages,
    row_parameters,
    weight_parameters,
)
from dsv4c.codegen.kernels.formats import WEIGHT_FORMATS, WEIGHTS, format_name, holds
from dsv4c.codegen.kernels.gemv import WARPS, k_warps_of, span_of
from dsv4c.codegen.kernels.quantize import quantize_rows, scratch_for
from dsv4c.codegen.lib.shapes import Layout, Product, Ring
from dsv4c.codegen.registry import Answer, Launchable, No, Request, Scratch, kernel, launchable
from dsv4c.codegen.tuning import tuned
from dsv4c.cuts import PLANNED, Cut
from dsv4c.passes.fusions.experts_down import ExpertsDown
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
            part=self.routed.part_bytes,
            shared_part=self.shared.part_bytes,
            bars=self.routed.bars_bytes,
            shared_bars=self.shared.bars_bytes,
            bar=16,
        )


def _down_rings(spec: ExpertsSpec, arch: Arch, cut: Cut = PLANNED) -> DownRings:
    tiles = -(-spec.hidden // 16)
    tile_warps = next(n for n in (1, 2, 4, 8) if n == 8 or -(-tiles // n) <= 2 * arch.sms)
    k_warps = k_warps_of(spec.intermediate, WARPS // tile_warps)
    kind = "bf16" if not spec.quantized else "f16" if spec.packed else "e4m3"
    routed = Product(spec.routed, kind, 1, spec.intermediate)
    shared = Product(spec.shared, kind, spec.turns, spec.intermediate)
    rows = Product(spec.routed, kind, spec.top_k, spec.intermediate)

    def planned(stages: int, early: int) -> DownRings:
        span = span_of(routed, k_warps)
        return DownRings(
            Ring(shared, tile_warps, k_warps, span_of(shared, k_warps), early),
            Ring(routed, tile_warps, k_warps, span, stages, spec.top_k, 1, spec.turns, flight=cut.ahead),
            rows,
        )

    def most(early: int) -> DownRings:
        return planned(most_stages(spec.name, lambda stages: planned(stages, early).layout, arch, cut), early)

    def worth(rings: DownRings) -> tuple[bool, int]:
        return rings.layout.end <= arch.shared_of(2), min(rings.routed.stages, 3)

    if cut.early:
        return most(cut.early)
    return max(most(2), most(1), key=worth)  # many rows leave less room for what comes early


def emit_experts_down(spec: ExpertsSpec, arch: Arch) -> Emission:
    """y = out(sum over the token's routed experts of fp8(h) w2, plus the shared expert's), accumulated in
    f32.
    """
    check_experts(spec)
    return tuned(lambda cut: _emitted(spec, arch, cut), arch, spec.name, spec)


def _emitted(spec: ExpertsSpec, arch: Arch, cut: Cut) -> Emission:
    rings = _down_rings(spec, arch, cut)
    parameters = (
        *row_parameters("h", spec, spec.packed),
        *row_parameters("shared_h", spec, spec.packed),
        Parameter("expert_ids"),
        *weight_parameters("w2", spec.routed),
        *weight_parameters("shared_w2", spec.shared),
        Parameter("y"),
    )
    groups = -(-spec.hidden // (16 * rings.routed.tile_warps))
    grid = (groups, spec.batch // spec.turns, 1)
    source = render(
        "experts_down.py.jinja",
        spec=spec,
        rings=rings,
        pointers=[p.name for p in parameters],
        grid=grid,
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
    if not holds(h, BF16) or op.out not in (BF16, F32):
        return No(f"takes bf16 and makes bf16 or f32, not {h} and {op.out}")
    experts, hidden, intermediate = routed.shape
    spec = ExpertsSpec(
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
    )
    values = {**x, "shared_h": x["h_shared"], "expert_ids": x["experts"], "y": call.outputs[0]}
    if takes_many(spec, request.arch):
        return down_launches(request, spec, _down_rings(spec, request.arch).packing, values)
    if not packed:
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
