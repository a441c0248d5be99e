"""The experts of one MoE layer at decode: two launches, `up` (w1, w3, SwiGLU) and `down` (quantize, w2, sum).

Each (token, expert) pair is its own job: a CTA has one activation row, and chooses that token's experts for
itself. Chosen by score, their weights start after the wait; named by a table, before it, as the shared
expert's do. The hidden rows go
through memory in bf16 and are quantized by their readers: quantizing them in `up` ties 8 tiles of two
matrices together, a cluster per 128 columns, and that measured a third slower than CTAs that stream any tiles
without a break.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

from dsv4c.codegen.emit import Emission, Parameter, floor_us, render
from dsv4c.codegen.gemv import (
    BITS,
    FORMATS,
    SHARED_PER_CTA,
    SHARED_PER_SM,
    SMS,
    STAGES,
    WARPS,
    k_warps_of,
    span_of,
)
from dsv4c.codegen.lib.shapes import BYTES, Product, Ring
from dsv4c.errors import BuildError


@dataclass(frozen=True)
class ExpertsSpec:
    """Shapes of one MoE layer: x [batch, hidden], `top_k` routed experts of `experts`, one shared expert.

    Formats are fp8, bf16, mxfp4 or nvfp4. With bf16 weights x is bf16 and the hidden rows stay so; else x is
    FP8 (e4m3 with ue8m0 scales per 128) and the hidden rows are quantized to FP8. `packed`: x and the rows
    that `down` reads are NVFP4 with a global scale each.
    """

    name: str
    batch: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    routed: str
    shared: str
    limit: float
    packed: bool = False

    @property
    def quantized(self) -> bool:
        """Whether activations meet the weights as FP8 or NVFP4."""
        return self.routed != "bf16"

    @property
    def weight_bytes(self) -> int:
        """Bytes of one matrix of every routed expert of a token, and of the shared one."""
        bits = self.top_k * BITS[self.routed] + BITS[self.shared]
        return int(self.intermediate * self.hidden * bits / 8)


def _check(spec: ExpertsSpec) -> None:
    if not 1 <= spec.batch <= 8:
        raise BuildError(
            f"{spec.name}: batch {spec.batch}: the experts' GEMVs take 1 to 8 rows, more need a GEMM"
        )
    if spec.top_k > 32:
        raise BuildError(f"{spec.name}: {spec.top_k} experts per token: a warp holds the addresses of 32")
    if spec.hidden % 16 or spec.intermediate % 16:
        raise BuildError(
            f"{spec.name}: hidden {spec.hidden}, intermediate {spec.intermediate}: want multiples of 16"
        )
    for format in (spec.routed, spec.shared):
        if format not in BYTES:
            raise BuildError(f"{spec.name}: weight format {format!r}: known are {', '.join(BYTES)}")
    if (spec.routed == "bf16") != (spec.shared == "bf16"):
        raise BuildError(
            f"{spec.name}: {spec.routed} routed and {spec.shared} shared experts do not share activations"
        )
    if spec.packed and not spec.quantized:
        raise BuildError(f"{spec.name}: NVFP4 rows do not meet {spec.routed} weights")
    if spec.quantized and (spec.hidden % 128 or spec.intermediate % 128):
        sizes = f"hidden {spec.hidden}, intermediate {spec.intermediate}"
        raise BuildError(f"{spec.name}: {sizes}: {spec.routed} experts want multiples of 128")


def _scales(operand: str, format: str) -> list[Parameter]:
    component = {"fp8": "scale", "nvfp4": "global_scale"}.get(format)
    return [Parameter(operand, component)] if component else []


def _weight(operand: str, format: str) -> list[Parameter]:
    return [Parameter(operand), *_scales(operand, format)]


def _rows(operand: str, spec: ExpertsSpec, scaled: bool) -> list[Parameter]:
    """Activation rows, with their scales if they come quantized."""
    components = ["scale"] * scaled + ["global_scale"] * spec.packed
    return [Parameter(operand), *(Parameter(operand, c) for c in components)]


def place(sizes: dict[str, int]) -> dict[str, int]:
    """Offsets of shared arrays one after the other, and `end`."""
    places, at = {}, 0
    for name, size in sizes.items():
        places[name] = at
        at += -(-size // 16) * 16
    return {**places, "end": at}


def _most_stages(name: str, layout: Callable[[int], dict[str, int]]) -> int:
    """The deepest ring that leaves room for two CTAs per SM, or for one."""
    for limit in (SHARED_PER_SM // 2 - 1024, SHARED_PER_CTA):
        for stages in range(STAGES, 1, -1):
            if layout(stages)["end"] <= limit:
                return stages
    raise BuildError(f"{name}: the activations leave no shared memory for two stages of weights")


# up ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Routing:
    """Whence `up` has a token's experts and their weights, score / sum of scores * factor.

    scores: the k of largest score + bias, out of the gate's logits. table: a row of a table, and the logits.
    rows: a row of a table, and products with those experts' rows of a bf16 gate. `stored`: weights go to
    memory too.
    """

    source: str
    factor: float
    stored: bool = True

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """What it reads. A token's id is a step's input, and read before the wait."""
        table = (Parameter("table"), Parameter("tokens", early=True))
        return {
            "scores": (Parameter("logits"), Parameter("bias")),
            "table": (Parameter("logits"), *table),
            "rows": (Parameter("row"), Parameter("gate"), *table),
        }[self.source]

    def signature(self, spec: ExpertsSpec) -> list[str]:
        """The parameters with their types."""
        types = {
            "logits": f"f32[{spec.batch},{spec.experts}]",
            "bias": f"f32[{spec.experts}]",
            "row": f"bf16[{spec.batch},{spec.hidden}]",
            "gate": f"bf16[{spec.experts},{spec.hidden}]",
            "table": f"i32[*,{spec.top_k}]",
            "tokens": f"i32[{spec.batch}]",
        }
        return [f"{p.operand}: {types[p.operand]}" for p in self.parameters]


@dataclass(frozen=True)
class UpPart:
    """Routed or shared half of `up`. A job is a tile of w1 and the same of w3; CTAs take them in turn.

    `scores`, `sums` and `choice` are bytes of what the router keeps: before the stream, beside it, and to the
    end.
    """

    name: str
    ring: Ring
    jobs: int
    scores: int = 0
    sums: int = 0
    choice: int = 0

    @property
    def ctas(self) -> int:
        """CTAs of the part."""
        return -(-self.jobs // self.ring.rounds)

    @property
    def places(self) -> dict[str, int]:
        """Shared arrays of a CTA of this part."""
        r = self.ring
        return place(
            {
                "ring": r.ring_bytes,
                "x": r.product.x_bytes,
                "fx": r.product.fx_bytes,
                "scale": 2 * r.scale_bytes,
                "part": max(r.part_bytes, self.scores),
                "sums": self.sums,
                "choice": self.choice,
                "bars": r.bars_bytes,
                "bar": 8,
            }
        )


def padded(experts: int) -> int:
    """Places for scores: whole warps."""
    return -(-experts // 32) * 32


def _up_parts(spec: ExpertsSpec, routing: Routing) -> tuple[UpPart, UpPart]:
    """Shared and routed part. Rounds are chosen so that all CTAs fit the machine at once and read about the
    same.
    """
    tiles = -(-spec.intermediate // 16)
    kind = "f16" if spec.quantized else "bf16"
    k_warps = k_warps_of(spec.hidden, WARPS // 2)

    def part(name: str, format: str, jobs: int, rounds: int) -> UpPart:
        product = Product(format, kind, 1, spec.hidden)

        def planned(stages: int) -> UpPart:
            ring = Ring(product, 1, k_warps, span_of(product, k_warps), stages, rounds, matrices=2)
            if name == "shared":
                return UpPart(name, ring, jobs)
            scores = 8 * padded(spec.experts) if routing.source == "scores" else 0
            sums = 4 * ring.warps * spec.top_k if routing.source == "rows" else 0
            return UpPart(name, ring, jobs, scores, sums, 8 * spec.top_k)

        return planned(_most_stages(spec.name, lambda stages: planned(stages).places))

    def longest(rounds: tuple[int, ...]) -> float:
        ctas = -(-tiles // rounds[0]) - (-spec.top_k * tiles // rounds[1])
        if ctas > 2 * SMS:
            return math.inf
        return max(rounds[0] * BITS[spec.shared], rounds[1] * BITS[spec.routed])

    shared_rounds, routed_rounds = min(itertools.product(range(1, 33), repeat=2), key=longest)
    return (
        part("shared", spec.shared, tiles, shared_rounds),
        part("routed", spec.routed, spec.top_k * tiles, routed_rounds),
    )


def emit_experts_up(spec: ExpertsSpec, routing: Routing) -> Emission:
    """h = bf16(silu(min(x w1, limit)) * clamp(x w3, -limit, limit) * weight), 1 for the shared expert."""
    _check(spec)
    if spec.top_k > spec.experts or spec.experts > 1024:
        raise BuildError(f"{spec.name}: {spec.top_k} of {spec.experts} experts: want some of at most 1024")
    parts = _up_parts(spec, routing)
    parameters = (
        *_rows("x", spec, spec.quantized),
        *routing.parameters,
        *_weight("w1", spec.routed),
        *_weight("w3", spec.routed),
        *_weight("shared_w1", spec.shared),
        *_weight("shared_w3", spec.shared),
        Parameter("experts"),
        *([Parameter("weights")] if routing.stored else []),
        Parameter("h"),
        Parameter("shared_h"),
    )
    grid = (sum(part.ctas for part in parts), spec.batch, 1)
    shared = max(part.places["end"] for part in parts)
    nbytes = 2 * spec.weight_bytes
    source = render(
        "experts_up.py.jinja",
        spec=spec,
        routing=routing,
        signature=", ".join(routing.signature(spec)),
        padded=padded(spec.experts),
        parts=parts,
        pointers=[p.name for p in parameters],
        tiles=-(-spec.intermediate // 16),
        grid=grid,
        warps=parts[0].ring.warps,
        shared=shared,
        nbytes=nbytes,
        floor=floor_us(nbytes),
        formats=FORMATS,
    )
    packing = {}
    for part, prefix in zip(parts, ("shared_", ""), strict=True):
        for name in ("w1", "w3"):
            packing[prefix + name] = f"{part.ring.product.weight}/{part.ring.tile_warps}x{part.ring.span}"
    return Emission(
        symbol=f"{spec.name}_0",
        source=source,
        grid=grid,
        block=parts[0].ring.warps * 32,
        shared=shared,
        parameters=parameters,
        packing=packing,
    )


# down -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DownRings:
    """Both streams of a `down` CTA: the shared expert's tile, then the tile of every routed expert, a round
    each.
    """

    shared: Ring
    routed: Ring
    rows: Product  # the routed experts' hidden rows, together

    @property
    def places(self) -> dict[str, int]:
        """Shared arrays of a CTA."""
        return place(
            {
                "ring": self.routed.ring_bytes,
                "shared_ring": self.shared.ring_bytes,
                "x": self.rows.x_bytes,
                "fx": self.rows.fx_bytes,
                "shared_x": self.shared.product.x_bytes,
                "shared_fx": self.shared.product.fx_bytes,
                "scale": self.routed.scale_bytes,
                "shared_scale": self.shared.scale_bytes,
                "part": self.routed.part_bytes,
                "shared_part": self.shared.part_bytes,
                "bars": self.routed.bars_bytes,
                "shared_bars": self.shared.bars_bytes,
                "bar": 16,
            }
        )


def _down_rings(spec: ExpertsSpec) -> DownRings:
    tiles = -(-spec.hidden // 16)
    tile_warps = next(n for n in (1, 2, 4, 8) if n == 8 or -(-tiles // n) <= 2 * SMS)
    k_warps = k_warps_of(spec.intermediate, WARPS // tile_warps)
    kind = "bf16" if not spec.quantized else "f16" if spec.packed else "e4m3"
    routed = Product(spec.routed, kind, 1, spec.intermediate)
    shared = Product(spec.shared, kind, 1, spec.intermediate)
    rows = Product(spec.routed, kind, spec.top_k, spec.intermediate)

    def planned(stages: int) -> DownRings:
        return DownRings(
            Ring(shared, tile_warps, k_warps, span_of(shared, k_warps), 2),
            Ring(routed, tile_warps, k_warps, span_of(routed, k_warps), stages, rounds=spec.top_k),
            rows,
        )

    return planned(_most_stages(spec.name, lambda stages: planned(stages).places))


def emit_experts_down(spec: ExpertsSpec) -> Emission:
    """y = bf16(sum over the token's routed experts of fp8(h) w2, plus the shared expert's), accumulated in
    f32.
    """
    _check(spec)
    rings = _down_rings(spec)
    parameters = (
        *_rows("h", spec, spec.packed),
        *_rows("shared_h", spec, spec.packed),
        Parameter("expert_ids"),
        *_weight("w2", spec.routed),
        *_weight("shared_w2", spec.shared),
        Parameter("y"),
    )
    groups = -(-spec.hidden // (16 * rings.routed.tile_warps))
    grid = (groups, spec.batch, 1)
    source = render(
        "experts_down.py.jinja",
        spec=spec,
        rings=rings,
        pointers=[p.name for p in parameters],
        grid=grid,
        warps=rings.routed.warps,
        shared=rings.places["end"],
        nbytes=spec.weight_bytes,
        floor=floor_us(spec.weight_bytes),
        formats=FORMATS,
    )
    return Emission(
        symbol=f"{spec.name}_0",
        source=source,
        grid=grid,
        block=rings.routed.warps * 32,
        shared=rings.places["end"],
        parameters=parameters,
        packing={
            "w2": f"{spec.routed}/{rings.routed.tile_warps}x{rings.routed.span}",
            "shared_w2": f"{spec.shared}/{rings.shared.tile_warps}x{rings.shared.span}",
        },
    )
